"""The command line: `openagents-worker`."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    from openagents_worker.cli.commands import run  # nothing is loaded by importing this package

    run()
