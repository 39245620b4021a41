"""The entry point of `python -m server`, which runs the command line."""

from server.cli.main import cli

if __name__ == "__main__":
    cli()
