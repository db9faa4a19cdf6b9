"""Standard streams. The only place that says what becomes of one that is closed, full or too narrow."""

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

__all__ = ["OutputLost", "make_usable", "readers_may_leave", "say_no_more"]

ESCAPED = "openagents.escaped"  # as JSON writes it: the value of a JSON text stays what it is


class OutputLost(click.ClickException):
    """What a command was asked for could not be written: the disk is full, for example."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror or error}")


def make_usable() -> None:
    """A stream that is closed reads as empty and takes all. A character that one cannot encode is escaped.

    A closed stream is opened again: its number would else be that of the next connection.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - for the process's life
            setattr(sys, name, nowhere)
    codecs.register_error(ESCAPED, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)


@contextmanager
def readers_may_leave() -> Generator[None]:
    """A reader that has had enough, as `head` has, ends the command and is no failure."""
    try:
        yield
    except BrokenPipeError:
        say_no_more()
        raise click.exceptions.Exit(0) from None


def say_no_more() -> None:
    """Let what is still buffered go nowhere: Python writes it at its end, and would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
            continue
        with suppress(io.UnsupportedOperation):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(unicode_escaped, error.object[error.start : error.end])), error.end
