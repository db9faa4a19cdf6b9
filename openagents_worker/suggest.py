"""Suggestions. The only place that finds the known name for a misspelled one ("did you mean …?").

The name comes from outside, and the time to compare two names grows with the product of their lengths.
Therefore a long name is never compared, and of many known names only those with the most similar beginning
and end are compared.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from heapq import nlargest
from itertools import islice
from os.path import commonprefix

__all__ = [
    "MAX_COMPARED_NAMES",
    "MAX_KNOWN_NAMES",
    "MAX_NAME_CHARS",
    "agent_hint",
    "did_you_mean",
    "nearest",
]

MAX_NAME_CHARS = 64  # a suggestion does not help with a longer name
MAX_COMPARED_NAMES = 100  # comparing two names of usual length takes 20 µs
MAX_KNOWN_NAMES = 1_000  # comparing their beginnings and ends takes about 10 ms
MAX_LISTED_CHARS = 1_000  # the longest list of known names in an error
NEAR_AGENT = 0.7  # the ratio of difflib at which two of seven letters differ
_MAX_CANDIDATES = 10  # the names with the most similar beginning and end


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The most similar known name; None if none is similar enough or the name is too long to compare.

    `cutoff` is the smallest ratio of `difflib` (0 to 1) for a similar name.

    >>> nearest("assistent", ["assistant", "clerk"])
    'assistant'
    """
    if len(name) > MAX_NAME_CHARS:
        return None
    names = [
        known_name for known_name in islice(known, MAX_KNOWN_NAMES) if len(known_name) <= 2 * MAX_NAME_CHARS
    ]
    if len(names) > MAX_COMPARED_NAMES:
        names = nlargest(_MAX_CANDIDATES, names, key=lambda known_name: _common_ends(name, known_name))
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error text: `; did you mean 'x'?` for a similar known name, else the list of known names.

    >>> did_you_mean("pth", ["path", "mode"])
    "; did you mean 'path'?"
    """
    names = sorted(known)
    near = nearest(name, names)
    if near is not None:
        return f"; did you mean {near!r}?"
    listed = ", ".join(names)
    shown = listed if len(listed) <= MAX_LISTED_CHARS else f"{listed[:MAX_LISTED_CHARS]}…"
    return f"; known: {shown}" if names else "; none are known"


def agent_hint(agent_id: str, known: Iterable[str]) -> str:
    """The hint of the error for an unknown agent. It contains at most one agent id, the most similar one.

    It does not list the agents, because a user who may submit runs need not know all of them.
    """
    near = nearest(agent_id, known, cutoff=NEAR_AGENT)
    guess = f"did you mean {near!r}? " if near is not None else ""
    return (
        f"{guess}an agent becomes known when a worker that can execute it starts; `openagents-worker status` "
        "lists the known agents, `openagents-worker validate` shows why an agent cannot be executed"
    )


def _common_ends(name: str, other: str) -> int:
    """The length of the common beginning and the common end, added."""
    begin = commonprefix((name, other))  # noqa: RUF071 - these are not paths
    end = commonprefix((name[::-1], other[::-1]))  # noqa: RUF071
    return len(begin) + len(end)
