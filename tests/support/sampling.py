"""Sampling: large tables of inputs in two editions, a short one for `make test` and the rest, marked `long`.

`make test-long` runs the rest, and CI runs both. Of a test with many cases, `MOST` are in the short edition.
A test that costs much has `@pytest.mark.share(of=4)`: its first, fifth, ninth … case is in the short edition.
With `of=1` all are. Where a name is tried with many values, `shares` takes others of them for each name, so
the short edition has every name and every value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

__all__ = ["mark_beyond_the_share", "marked_beyond_a_share", "shares"]


def shares(names: Iterable[str], values: Sequence[Any], of: int = 4) -> list[Any]:
    """Parameters: a name with a share of the values, and the same name, marked `long`, with the others."""
    found = []
    for turn, name in enumerate(names):
        at = turn % of
        others = [value for place, value in enumerate(values) if place % of != at]
        found.append(pytest.param(name, list(values[at::of]), id=name))
        found.append(pytest.param(name, others, id=f"{name}, other values", marks=pytest.mark.long))
    return found


def marked_beyond_a_share(cases: Iterable[Any], of: int = 3) -> list[Any]:
    """The cases as parameters. One in `of` is in the short edition, the others are marked `long`.

    `cases` are ordered by name. `of` must not divide the number of cases per name, so that the kinds change.
    """
    return [
        pytest.param(*case, marks=() if number % of == 0 else pytest.mark.long)
        for number, case in enumerate(cases)
    ]


MOST = 16
"""So many cases of a test are for `make test`, at equal distances over its table."""


def mark_beyond_the_share(items: Sequence[pytest.Item]) -> None:
    """Mark `long` all cases of a test but `MOST` of them, or but the share that its mark `share` says."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None and item.get_closest_marker("long") is None:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        share = cases[0].get_closest_marker("share")
        step = share.kwargs["of"] if share is not None else max(1.0, len(cases) / MOST)
        kept = {int(number * step) for number in range(len(cases))}
        for number, item in enumerate(cases):
            if number not in kept:
                item.add_marker(pytest.mark.long)
