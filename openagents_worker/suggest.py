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
    "guess",
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


def guess(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The question whether a similar known name was meant; empty if there is none.

    >>> guess("pth", ["path", "mode"])
    "did you mean 'path'?"
    """
    near = nearest(name, known, cutoff=cutoff)
    return "" if near is None else f"did you mean {near!r}?"


def did_you_mean(name: str, known: Iterable[str], what: str = "known") -> str:
    """A hint for an unknown name: the question of `guess`, otherwise all known names after the word `what`.

    >>> did_you_mean("size", ["path", "mode"], "known keys")
    'known keys: path, mode'
    """
    names = list(known)
    listed = ", ".join(names) or "none"
    shown = listed if len(listed) <= MAX_LISTED_CHARS else f"{listed[:MAX_LISTED_CHARS]}…"
    return guess(name, names) or f"{what}: {shown}"


def agent_hint(agent_id: str, known: Iterable[str]) -> str:
    """The hint of the error for an unknown agent. It contains at most one agent id, the most similar one.

    It does not list the agents, because a user who may submit runs need not know all of them.
    """
    advice = (
        "an agent becomes known when a worker that can execute it starts; `openagents-worker status` "
        "lists the known agents, `openagents-worker validate` shows why an agent cannot be executed"
    )
    return f"{guess(agent_id, known, cutoff=NEAR_AGENT)} {advice}".lstrip()


def _common_ends(name: str, other: str) -> int:
    """The length of the common beginning and the common end, added."""
    begin = commonprefix((name, other))  # noqa: RUF071 - these are not paths
    end = commonprefix((name[::-1], other[::-1]))  # noqa: RUF071
    return len(begin) + len(end)
