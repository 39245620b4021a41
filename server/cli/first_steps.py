"""The lines that say where to go once the server listens: the playground, curl, and each SDK."""

from server.cli.client_env import env_command
from server.net.client_variables import base_url
from server.settings import OPEN_KEY, Settings


def first_steps(settings: Settings, endpoint: str, *, needs_key: bool) -> str:
    """Return five lines for a person, each with what to open, run or write in a program.

    `endpoint` generates an image from a prompt; it is "" if the server has no such endpoint. The lines contain FAL_KEY
    instead of a key, because logs keep what the server prints.
    """
    url = base_url(settings)
    authorization = '-H "Authorization: Key $FAL_KEY" ' if needs_key else ""
    run = f"""/{endpoint} {authorization}-H 'Content-Type: application/json' -d '{{"prompt": "a red apple"}}'"""
    credentials = "credentials: process.env.FAL_KEY, " if needs_key else ""
    key = 'os.environ["FAL_KEY"]' if needs_key else f'"{OPEN_KEY}"'
    return f"""\
  Playground   {url}
  curl         curl {url}{run if endpoint else "/openapi.json"}
  Python       {_python(settings)}
  JavaScript   fal.config({{ {credentials}proxyUrl: {{ url: "{url}/api/fal/proxy", when: "always" }} }})
  OpenAI       openai.OpenAI(base_url="{url}/v1", api_key={key})"""


def _python(settings: Settings) -> str:
    """Return what a shell runs before a program with fal_client."""
    if not settings.tls_port:
        return "fal_client requires HTTPS: start the server without --tls-port 0"
    return f'eval "$({env_command(settings)})"   # then start your program with fal_client in this shell'
