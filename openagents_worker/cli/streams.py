"""Standard streams. The only place that handles one that is closed, full, or cannot encode a character."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from openagents_worker.printable import unicode_escaped

__all__ = ["OutputLost", "repair_standard_streams", "exit_when_reader_closes", "discard_buffered_output"]

ESCAPED = "openagents.escaped"  # escapes as JSON does, so that the value of a JSON text does not change


class OutputLost(click.ClickException):
    """The output of a command could not be written, for example because the disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror or error}")


def repair_standard_streams() -> None:
    """Replace closed standard streams by `os.devnull`, and escape characters that a stream cannot encode.

    Without the replacement, the next socket would get the file descriptor of the closed stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            devnull = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - open until the process ends
            setattr(sys, name, devnull)
    codecs.register_error(ESCAPED, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)


@contextmanager
def exit_when_reader_closes() -> Generator[None]:
    """End the command with code 0 if the reader of its output closes the pipe, as `head` does."""
    try:
        yield
    except BrokenPipeError:
        discard_buffered_output()
        raise click.exceptions.Exit(0) from None


def discard_buffered_output() -> None:
    """Discard output that cannot be written any more. Python would report an error when it exits."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
            continue
        with suppress(io.UnsupportedOperation):
            os.dup2(devnull, stream.fileno())
    os.close(devnull)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(unicode_escaped, error.object[error.start : error.end])), error.end
