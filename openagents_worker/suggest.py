"""Did you mean? The only place that finds the known name that somebody has probably meant.

The name comes from outside, and to compare two names takes as long as the product of their lengths. So a long
name is compared with nothing. Of many known names, only those are compared that begin or end like it.
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

MAX_NAME_CHARS = 64  # a typing mistake in a longer name is nothing that a suggestion would mend
MAX_COMPARED_NAMES = 100  # to compare two names of usual length takes 20 µs
MAX_KNOWN_NAMES = 1_000  # to see how they begin and end takes some 10 ms
MAX_LISTED_CHARS = 1_000  # of all known names, where none is near
NEAR_AGENT = 0.7  # of difflib's ratio: two letters of seven differ; what is farther away is not a misspelling
_FEW = 10  # of many: those that begin and end most like the name


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name that is most like this one; None where none is near, or where finding it costs too much.

    `cutoff` is the ratio of difflib from which on a name is near.

    >>> nearest("assistent", ["assistant", "clerk"])
    'assistant'
    """
    if len(name) > MAX_NAME_CHARS:
        return None
    names = [each for each in islice(known, MAX_KNOWN_NAMES) if len(each) <= 2 * MAX_NAME_CHARS]
    if len(names) > MAX_COMPARED_NAMES:
        names = nlargest(_FEW, names, key=lambda each: _in_common(name, each))
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a known name is near, else the known names.

    >>> did_you_mean("pth", ["path", "mode"])
    "; did you mean 'path'?"
    """
    names = sorted(known)
    near = nearest(name, names)
    if near is not None:
        return f"; did you mean {near!r}?"
    listed = ", ".join(names)
    shown = listed if len(listed) <= MAX_LISTED_CHARS else f"{listed[:MAX_LISTED_CHARS]}…"
    return f"; known: {shown}" if names else "; none is known"


def agent_hint(agent_id: str, known: Iterable[str]) -> str:
    """What to do about an unknown agent. It names the agent that was probably meant, and no other.

    Whoever may submit runs need not learn which agents there are.
    """
    near = nearest(agent_id, known, cutoff=NEAR_AGENT)
    guess = f"did you mean {near!r}? " if near is not None else ""
    return (
        f"{guess}an agent is known once a worker that can serve it was started; `openagents-worker status` "
        "lists those that are, `openagents-worker validate` says why one cannot be served"
    )


def _in_common(name: str, other: str) -> int:
    """How many characters both begin and end with."""
    begin = commonprefix((name, other))  # noqa: RUF071 - these are no paths
    end = commonprefix((name[::-1], other[::-1]))  # noqa: RUF071
    return len(begin) + len(end)
