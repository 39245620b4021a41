"""Runs the command line: `python -m server`."""

from server.cli.main import cli

if __name__ == "__main__":
    cli()
