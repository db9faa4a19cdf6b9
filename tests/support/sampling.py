"""Sampling: large tables of inputs in two editions, a short one for `make test` and the rest, marked `long`.

`make test-long` runs the rest, and CI runs both. Of a test with many cases, `MOST` are in the short edition.
A test that costs much has `@pytest.mark.share(of=4)`: its first, fifth, ninth … case is in the short edition.
With `of=1` all are. Where a name is tried with many values, `shares` takes others of them for each name, so
the short edition has every name and every value. Of hostile inputs, whose tables belong together, `SAMPLE` of
each kind at each entry point are in it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.hostile.matrix import SAMPLE

__all__ = ["shares", "spread"]


def shares(names: Iterable[str], values: Sequence[Any], of: int = 4) -> list[Any]:
    """Parameters: a name with a share of the values, and the same name, marked `long`, with the others."""
    found = []
    for turn, name in enumerate(names):
        at = turn % of
        others = [value for place, value in enumerate(values) if place % of != at]
        found.append(pytest.param(name, list(values[at::of]), id=name))
        found.append(pytest.param(name, others, id=f"{name}, other values", marks=pytest.mark.long))
    return found


def spread(count: int, kept: int) -> set[int]:
    """The numbers of so many of `count` cases, at equal distances over all of them."""
    return {number * count // kept for number in range(kept)} if kept < count else set(range(count))


MOST = 5
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
        return  # see `pytest_collection_modifyitems`
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
    count = len(others)
    short = spread(count, MOST) if of is None else {int(number * of) for number in range(count)}
    return {*own, *(others[number] for number in short if number < count)}


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark `long` the hostile inputs beyond their sample. `pytest tests/hostile` takes every input."""
    if any("hostile" in argument for argument in config.args):
        return
    by_pair: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        marker = item.get_closest_marker("hostile")
        if marker is None or not isinstance(item, pytest.Function):
            continue
        case: Any = item.callspec.params["case"]
        pair = (marker.kwargs["kind"], case.entry_point)
        by_pair.setdefault(pair, []).append(item)
    for tried in by_pair.values():
        kept = spread(len(tried), SAMPLE)
        for number, item in enumerate(tried):
            if number not in kept:
                item.add_marker(pytest.mark.long)


def _is_marked(call: Any, names: Sequence[str]) -> bool:
    return any(mark.name in names for mark in call.marks)
