"""Clients, baselines and plots that the measurements share."""
