"""The table. The only place that says what a case is, runs one, and counts what was tried.

```python
CASES = cases("request", {"a number": ({"input_text": 17}, "request.invalid")})

@hostile("foreign computation", CASES)
def test_foreign_computation(case: Case, attack: Attack) -> None:
    attack(case)
```
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

from tests.hostile.doors import DOORS
from tests.hostile.matrix import FEWEST, IMPOSSIBLE, MOST, SAMPLE

__all__ = ["TRIED", "Attack", "Case", "beyond_a_sample", "cases", "hostile", "lines_of"]

Test = TypeVar("Test", bound=Callable[..., None])

PROPERTY = "hostile"  # under this name a report carries what its test has tried


@dataclass(frozen=True)
class Case:
    """One input. `codes` are the answers that are right."""

    door: str
    name: str
    input: Any
    codes: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.door in DOORS, f"{self.door!r} is not a door"

    @property
    def id(self) -> str:
        return f"{self.door}-{self.name}"


Attack = Callable[[Case], None]


def cases(door: str, inputs: Mapping[str, tuple[Any, str | tuple[str, ...]]]) -> list[Case]:
    """The cases of one door: name to input and expected code, or codes of which each is right."""
    return [
        Case(door, name, value, (codes,) if isinstance(codes, str) else codes)
        for name, (value, codes) in inputs.items()
    ]


TRIED: Counter[tuple[str, str]] = Counter()
"""How many inputs the tests that were imported have for each kind and door."""


def hostile(kind: str, table: Iterable[Case]) -> Callable[[Test], Test]:
    """Marks a test that is called with each case of a table of this kind of attack."""

    def marked(test: Test) -> Test:
        found = list(table)
        rare = set(_rare(found))
        TRIED.update((kind, case.door) for case in found if id(case) not in rare)
        parametrized = pytest.mark.parametrize(
            "case",
            [
                pytest.param(case, id=case.id, marks=[pytest.mark.slow] if id(case) in rare else [])
                for case in found
            ],
        )
        named: Test = pytest.mark.hostile(kind=kind)(parametrized(test))
        return named

    return marked


def _rare(found: Iterable[Case]) -> Iterator[int]:
    """The ids of the objects that are tried by `make chaos` alone.

    A door with many inputs of one kind keeps `FEWEST` of them, from its whole table, for each time.
    """
    by_door: dict[str, list[Case]] = {}
    for case in found:
        by_door.setdefault(case.door, []).append(case)
    for all_of_it in by_door.values():
        count = len(all_of_it)
        if count > MOST:
            kept = _spread(count, FEWEST)
            yield from (id(case) for number, case in enumerate(all_of_it) if number not in kept)


def _spread(count: int, kept: int) -> set[int]:
    """The indexes of so many of `count` elements, at equal distances over all of them."""
    return {number * count // kept for number in range(kept)}


def beyond_a_sample(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The tests of hostile input that a run of all tests leaves out: of each kind and door it takes `SAMPLE`,
    from the whole table."""
    by_pair: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        marker = item.get_closest_marker("hostile")
        if (
            marker is not None
            and isinstance(item, pytest.Function)
            and item.get_closest_marker("slow") is None
        ):
            pair = (marker.kwargs["kind"], item.callspec.params["case"].door)
            by_pair.setdefault(pair, []).append(item)
    left_out: set[pytest.Item] = set()
    for tried in by_pair.values():
        kept = _spread(len(tried), SAMPLE)
        left_out.update(item for number, item in enumerate(tried) if number not in kept)
    return left_out


def lines_of(reports: Iterable[pytest.TestReport]) -> list[str]:
    """A line for each kind and door: inputs tried, coded answers, failures; or why there can be none."""
    tried: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    for report in reports:
        for name, value in report.user_properties:
            if name == PROPERTY:
                kind, door = value
                tried[kind, door] += report.when == "call"
                failed[kind, door] += report.failed
    if not tried:
        return []
    header = f"{'kind':<30}{'door':<16}{'inputs':>8}{'coded':>8}{'failures':>10}"
    rows = {
        (kind, door): f"{kind:<30}{door:<16}{count:>8}{count - failed[kind, door]:>8}{failed[kind, door]:>10}"
        for (kind, door), count in tried.items()
    }
    rows |= {
        (kind, door): f"{kind:<30}{door:<16}{'-':>8}  {why}"
        for (kind, door), why in IMPOSSIBLE.items()
        if any(kind == one for one, _ in tried)
    }
    total, failures = sum(tried.values()), sum(failed.values())
    end = f"{'all':<46}{total:>8}{total - failures:>8}{failures:>10}"
    return [header, *(row for _, row in sorted(rows.items())), end]
