"""Sampling: large tables of inputs in two editions, a short one for `make test` and the rest, marked `long`.

`make test-long` runs the rest, and CI runs both. Of a test with many cases, `MOST` are in the short edition.
A test that costs much has `@pytest.mark.share(of=4)`: its first, fifth, ninth … case is in the short edition.
With `of=1` all are. Where a name is tried with many values, `shares` takes others of them for each name, so
the short edition has every name and every value.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

__all__ = ["shares"]


def shares(names: Iterable[str], values: Sequence[Any], of: int = 4) -> list[Any]:
    """Parameters: a name with a share of the values, and the same name, marked `long`, with the others."""
    found = []
    for turn, name in enumerate(names):
        at = turn % of
        others = [value for place, value in enumerate(values) if place % of != at]
        found.append(pytest.param(name, list(values[at::of]), id=name))
        found.append(pytest.param(name, others, id=f"{name}, other values", marks=pytest.mark.long))
    return found


MOST = 6
"""So many cases of a test are for `make test`, at equal distances over its table."""


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Generator[None]:
    """Mark `long` all cases of a test but `MOST` of them, or but the share that its mark `share` says.

    What the expression of marks then leaves out is not made at all, unless a case is named: making them is
    half of the time in which the tests are collected. Pytest has no hook for this, so it uses `_calls`.
    """
    yield
    test, calls = metafunc.definition, metafunc._calls
    if any(test.get_closest_marker(name) for name in OTHERS) or len(calls) < 2:
        return
    share = test.get_closest_marker("share")
    if share is None and test.get_closest_marker("hostile") is not None:
        return  # `tests/hostile/table.py` takes a sample of these
    kept = kept_of(calls, None if share is None else share.kwargs["of"])
    calls[:] = [
        call if number in kept else replace(call, marks=[*call.marks, pytest.mark.long.mark])
        for number, call in enumerate(calls)
    ]
    if "not long" in metafunc.config.option.markexpr and not any("::" in arg for arg in metafunc.config.args):
        calls[:] = [call for call in calls if not _is_marked(call, OTHERS)] or calls[:1]


OTHERS = ("long", "slow", "ui", "extras")
"""The marks of what `make test` leaves out."""


def kept_of(calls: Sequence[Any], of: float | None) -> set[int]:
    """The numbers of the cases that are in the short edition, or have a mark of their own."""
    own = [number for number, call in enumerate(calls) if _is_marked(call, OTHERS)]
    others = [number for number in range(len(calls)) if number not in own]
    step = max(1.0, len(others) / MOST) if of is None else of
    return {*own, *(others[at] for number in range(len(others)) if (at := int(number * step)) < len(others))}


def _is_marked(call: Any, names: Sequence[str]) -> bool:
    return any(mark.name in names for mark in call.marks)
