"""The command line: `openagents-worker`."""

from __future__ import annotations

__all__ = ["main"]

INTERRUPTED = 130  # equals `exits.Exit.INTERRUPTED`; importing that module here would load everything


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    try:
        # Here, so that importing this package loads nothing.
        from openagents_worker.worker.interpreter import loading_for_life

        with loading_for_life():
            from openagents_worker.cli.commands import run
    except KeyboardInterrupt:  # during the import, which takes most of a command's time
        raise SystemExit(INTERRUPTED) from None

    run()
