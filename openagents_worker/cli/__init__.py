"""The command line: `openagents-worker`."""

from __future__ import annotations

__all__ = ["main"]

INTERRUPTED = 130  # `exits.Exit.INTERRUPTED`, of which nothing may be loaded yet


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    try:
        from openagents_worker.cli.commands import run  # nothing is loaded by importing this package
    except KeyboardInterrupt:  # loading takes most of a command's time
        raise SystemExit(INTERRUPTED) from None

    run()
