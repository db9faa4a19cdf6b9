"""Formats: the only place that defines in which formats runs are written, sent and read.

The format is a number for everything that a worker must understand to execute a run: request, journal, facts,
session and messages. It increases when an older worker would misread something. One version of the library
starts to read the new format, and a later version starts to write it. So two adjacent versions can execute
the same runs, and an upgrade can be reversed. The fields that the scripts use (state, owner, fence, lists)
are the same in all formats.
"""

from __future__ import annotations

from pydantic import ValidationError

from openagents_worker.errors import OtherFormat, RecordUnreadable, text_of

__all__ = [
    "BEGUN",
    "BY_CONTENT",
    "BY_PLACE",
    "DELEGATES",
    "HAS_JOB",
    "HOLDS_TURNS",
    "NEWEST_READ",
    "PARKS",
    "PARSE_ERRORS",
    "OLDEST_READ",
    "SUMMARIES",
    "WRITTEN",
    "can_read",
    "other_format_error",
    "translate_parse_errors",
    "stored_format",
]

MAX_FORMAT_DIGITS = 9

WRITTEN = 1
BY_PLACE = 1
"""A format of runs: replay finds a recorded call by its place in the program."""
BY_CONTENT = 2
"""A format of runs: replay finds a recorded call by its content (kind, name, arguments).

The first journal record has this format, and so has the run from then on."""
PARKS = 3
"""A format of runs: the run has been parked, in a state that the versions before do not know."""
DELEGATES = 4
"""A format of runs: the run has delegated to another agent, or another run has delegated to it."""
SUMMARIES = 4
"""A format of sessions: a summary stands for the oldest messages, which the versions before do not know."""
HAS_JOB = 4
"""A format of runs: a call of the run has started a job in the background of a service, and waits for it."""
HOLDS_TURNS = 5
"""A format of runs: the run lends its session to shared children and holds their turns, or is such a child.

The versions before would not write these turns, and would not show them to the next child."""
BEGUN = BY_CONTENT
"""The format of new runs. `tests/upgrade` reads this name from other versions of the library."""
NEWEST_READ = 5
MAX_PROBLEM_CHARS = 500
OLDEST_READ = WRITTEN - 2  # runs may wait for days, so they may have started two upgrades ago


def can_read(format_: int) -> bool:
    """Whether this version of the library can read this format."""
    return OLDEST_READ <= format_ <= NEWEST_READ


def other_format_error(
    format_: int, *, run_id: str | None = None, session_id: str | None = None
) -> OtherFormat:
    """The error for data in a format that this version cannot read."""
    readable = f"{max(1, OLDEST_READ)} to {NEWEST_READ}"
    return OtherFormat(
        f"the data has format {format_}, but this version of the library reads the formats {readable}",
        hint="no data is lost: read it with the version of the library that wrote it",
        run_id=run_id,
        session_id=session_id,
    )


def stored_format(text: str | None) -> int:
    """Parse the field `format` of a record. 0 if the field is missing or not a number."""
    return int(text) if text and text.isdecimal() and len(text) <= MAX_FORMAT_DIGITS else 0


class translate_parse_errors:
    """`with translate_parse_errors(format): …` translates errors of the block that parses stored data.

    Raises `OtherFormat` if this version cannot read the format, else `RecordUnreadable`: the data is broken.
    """

    __slots__ = ("_format", "_run_id", "_session_id")

    def __init__(self, format_: int, *, run_id: str | None = None, session_id: str | None = None) -> None:
        self._format = format_
        self._run_id = run_id
        self._session_id = session_id

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, PARSE_ERRORS):
            return
        if can_read(self._format):
            raise RecordUnreadable(
                f"the stored data cannot be read: {_describe_problem(error)}",
                hint="another program may have written it; other runs are not affected",
                run_id=self._run_id,
                session_id=self._session_id,
            ) from error
        raise other_format_error(self._format, run_id=self._run_id, session_id=self._session_id) from error


PARSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""The exceptions that parsing data of an unexpected shape can raise."""


def _describe_problem(error: Exception) -> str:
    """The place and kind of the problem, without the stored values: they may be secrets."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {text_of(error)}"[:MAX_PROBLEM_CHARS]
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in found[:3])
