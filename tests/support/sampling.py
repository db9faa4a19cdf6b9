"""Sampling: large tables of inputs in two editions, a short one for `make test` and the rest, marked `slow`.

The short edition takes another share of the values for each name, so it has every name and every value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

__all__ = ["marked_beyond_a_share", "shares"]


def shares(names: Iterable[str], values: Sequence[Any], of: int = 4) -> list[Any]:
    """Parameters: a name with a share of the values, and the same name, marked `slow`, with the others."""
    found = []
    for turn, name in enumerate(names):
        at = turn % of
        others = [value for place, value in enumerate(values) if place % of != at]
        found.append(pytest.param(name, list(values[at::of]), id=name))
        found.append(pytest.param(name, others, id=f"{name}, other values", marks=pytest.mark.slow))
    return found


def marked_beyond_a_share(cases: Iterable[Any], of: int = 3) -> list[Any]:
    """The cases as parameters. One in `of` is in the short edition, the others are marked `slow`.

    `cases` are ordered by name. `of` must not divide the number of cases per name, so that the kinds change.
    """
    return [
        pytest.param(*case, marks=() if number % of == 0 else pytest.mark.slow)
        for number, case in enumerate(cases)
    ]
