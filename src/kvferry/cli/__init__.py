"""The command line: ``kvferry serve``, ``ask``, ``inspect``, ``sweep``, ``results``, ``demo``."""

from kvferry.cli.app import app, main

__all__ = ["app", "main"]
