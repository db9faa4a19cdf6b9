"""Formats. The only place that says in which format runs are written and sent, and which are understood.

A format is what whoever carries a run must understand: its request, journal and facts, its session, its
messages. It is raised by a change that an older worker would misread. What the scripts move (state, owner,
fence, lists) is the frame around it and the same in all formats: it cannot change while a cell lives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from openagents_worker.errors import OtherFormat

__all__ = ["FORMAT", "OLDEST_READ", "is_read", "other_format", "reading"]

FORMAT = 1
OLDEST_READ = FORMAT - 2  # runs wait for days: they may have begun two upgrades ago


def is_read(format_: int) -> bool:
    """Whether this version reads what was written in that format."""
    return OLDEST_READ <= format_ <= FORMAT


def other_format(format_: int, *, run_id: str | None = None, session_id: str | None = None) -> OtherFormat:
    return OtherFormat(
        f"it has the format {format_}, and this version of the library reads {max(1, OLDEST_READ)} to {FORMAT}",
        hint="nothing is lost: ask with the version that wrote it",
        run_id=run_id,
        session_id=session_id,
    )


@contextmanager
def reading(format_: int, **ids: str) -> Iterator[None]:
    """Reads what can be read; what cannot is no broken record when its format is another than ours."""
    try:
        yield
    except ValueError as error:
        if is_read(format_):
            raise
        raise other_format(format_, **ids) from error
