"""Programs with clients that generators made, run by tests/generators."""
