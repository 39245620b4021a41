"""OpenAI's images API in terms of fal's endpoints: requests, responses and errors."""
