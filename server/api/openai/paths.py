"""The paths of OpenAI's API."""

GENERATIONS = "/v1/images/generations"
#: A path of fal's platform API, which clients may call without the prefix /platform.
_PLATFORM_PATH = "/v1/models/requests/by-endpoint"


def is_openai_path(path: str) -> bool:
    """Return whether a path belongs to OpenAI's API."""
    return (path == "/v1" or path.startswith("/v1/")) and path != _PLATFORM_PATH
