"""Formats. The only place that says in which format runs are written and sent, and which are understood.

A format is what whoever carries a run must understand: its request, journal and facts, its session, its
messages. It is raised for what an older worker would misread: one version reads the new format, a later one
writes it, so that neighbours can always share the load, and an upgrade can be taken back. What the scripts
move (state, owner, fence, lists) is the frame around it, and the same in all formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from openagents_worker.errors import OtherFormat, RecordUnreadable, text_of

__all__ = [
    "BEGUN",
    "BY_CONTENT",
    "BY_PLACE",
    "NEWEST_READ",
    "OLDEST_READ",
    "UNREADABLE",
    "WRITTEN",
    "is_read",
    "other_format",
    "reading",
    "stored_format",
]

MAX_FORMAT_DIGITS = 9

WRITTEN = 1
BY_PLACE = 1
"""A run whose recorded calls are found by where in the program they stand."""
BY_CONTENT = 2
"""A run whose recorded calls are found by what they ask; its first record says so, and with it the run's."""
BEGUN = BY_CONTENT
"""The format in which runs are begun."""
NEWEST_READ = 2
MAX_PROBLEM_CHARS = 500
OLDEST_READ = WRITTEN - 2  # runs wait for days: they may have begun two upgrades ago


def is_read(format_: int) -> bool:
    """Whether this version reads what was written in that format."""
    return OLDEST_READ <= format_ <= NEWEST_READ


def other_format(format_: int, *, run_id: str | None = None, session_id: str | None = None) -> OtherFormat:
    read = f"{max(1, OLDEST_READ)} to {NEWEST_READ}"
    return OtherFormat(
        f"it has the format {format_}, and this version of the library reads {read}",
        hint="nothing is lost: ask with the version that wrote it",
        run_id=run_id,
        session_id=session_id,
    )


def stored_format(text: str | None) -> int:
    """The format that a record says it has; 0, as of one that says none, where that is not a number."""
    return int(text) if text and text.isdecimal() and len(text) <= MAX_FORMAT_DIGITS else 0


@contextmanager
def reading(format_: int, *, run_id: str | None = None, session_id: str | None = None) -> Iterator[None]:
    """Reads what can be read. Raises `OtherFormat` for what cannot because of its format, and
    `RecordUnreadable` for what is broken."""
    try:
        yield
    except UNREADABLE as error:
        if is_read(format_):
            raise RecordUnreadable(
                f"what is stored cannot be read: {_what_is_wrong(error)}",
                hint="a program other than this library may have written it; other runs are not concerned",
                run_id=run_id,
                session_id=session_id,
            ) from error
        raise other_format(format_, run_id=run_id, session_id=session_id) from error


UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading something of another shape than ours raises."""


def _what_is_wrong(error: Exception) -> str:
    """Where and what, without the values: they may be secrets."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {text_of(error)}"[:MAX_PROBLEM_CHARS]
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in found[:3])
