"""The `kvarn` command: the only part of this package that imports `serve_app`."""

from kvarn.cli.main import app, main

__all__ = ["app", "main"]
