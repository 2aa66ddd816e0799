"""The `repertory` command."""

from mesh.cli.main import main

__all__ = ["main"]
