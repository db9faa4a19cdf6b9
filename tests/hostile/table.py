"""The table of cases: the only place that defines and runs a case, and counts the inputs.

```python
CASES = cases("request", {"a number": ({"input_text": 17}, "request.invalid")})

@hostile("foreign computation", CASES)
def test_foreign_computation(case: Case, attack: Attack) -> None:
    attack(case)
```
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

from tests.hostile.entry_points import ENTRY_POINTS
from tests.hostile.matrix import IMPOSSIBLE

__all__ = ["TRIED", "Attack", "Case", "cases", "hostile", "lines_of"]

Test = TypeVar("Test", bound=Callable[..., None])

PROPERTY = "hostile"  # under this name a report carries what its test has tried


@dataclass(frozen=True)
class Case:
    """One input. `codes` are the valid answers; of several, `answers.json` names the one of this version."""

    entry_point: str
    name: str
    input: Any
    codes: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.entry_point in ENTRY_POINTS, f"{self.entry_point!r} is not an entry point"

    @property
    def id(self) -> str:
        return f"{self.entry_point}-{self.name}"


Attack = Callable[[Case], None]


def cases(entry_point: str, inputs: Mapping[str, tuple[Any, str | tuple[str, ...]]]) -> list[Case]:
    """The cases of one entry point: name to input and expected code, or several valid codes."""
    return [
        Case(entry_point, name, value, (codes,) if isinstance(codes, str) else codes)
        for name, (value, codes) in inputs.items()
    ]


TRIED: Counter[tuple[str, str]] = Counter()
"""How many inputs the tests that were imported have for each kind and entry_point."""


def hostile(kind: str, table: Iterable[Case]) -> Callable[[Test], Test]:
    """Marks a test that is called with each case of a table of one kind of attack."""

    def marked(test: Test) -> Test:
        found = list(table)
        TRIED.update((kind, case.entry_point) for case in found)
        parametrized = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in found])
        named: Test = pytest.mark.hostile(kind=kind)(parametrized(test))
        return named

    return marked


def lines_of(reports: Iterable[pytest.TestReport]) -> list[str]:
    """A line per kind and entry point: tried inputs, coded answers, failures; or why there are none."""
    tried: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    for report in reports:
        for name, value in report.user_properties:
            if name == PROPERTY:
                kind, entry_point = value
                tried[kind, entry_point] += report.when == "call"
                failed[kind, entry_point] += report.failed
    if not tried:
        return []
    header = f"{'kind':<30}{'entry point':<16}{'inputs':>8}{'coded':>8}{'failures':>10}"
    rows: dict[tuple[str, str], str] = {}
    for (kind, entry_point), count in tried.items():
        failures = failed[kind, entry_point]
        rows[kind, entry_point] = f"{kind:<30}{entry_point:<16}{count:>8}{count - failures:>8}{failures:>10}"
    rows |= {
        (kind, entry_point): f"{kind:<30}{entry_point:<16}{'-':>8}  {why}"
        for (kind, entry_point), why in IMPOSSIBLE.items()
        if any(kind == one for one, _ in tried)
    }
    total, failures = sum(tried.values()), sum(failed.values())
    end = f"{'all':<46}{total:>8}{total - failures:>8}{failures:>10}"
    return [header, *(row for _, row in sorted(rows.items())), end]
