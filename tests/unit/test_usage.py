"""Usage: sums are exact, bounded, and the same as sums by field."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.jsontext import LARGEST_COUNT
from openagents_worker.models import RunUsage
from openagents_worker.models.usage import NO_USAGE

COUNTS = [name for name, each in RunUsage.model_fields.items() if each.annotation is int]
_count = st.one_of(st.just(0), st.integers(0, 5_000), st.integers(LARGEST_COUNT - 5, LARGEST_COUNT + 5))
_amount = st.one_of(st.none(), st.just(0.0), st.floats(0, 1e6))
_usages = st.builds(
    RunUsage,
    **dict.fromkeys(COUNTS, _count),
    cost_usd=_amount,
    ttft_ms=_amount,
    cost_breakdown=st.dictionaries(st.sampled_from(["input", "output", "stated"]), st.floats(0, 1e6)),
)


@given(one=_usages, other=_usages)
def test_a_sum_adds_each_field(one: RunUsage, other: RunUsage) -> None:
    """Counts end at 2^53, costs have twelve digits, and the first known time to the first token counts."""
    costs = [cost for cost in (one.cost_usd, other.cost_usd) if cost is not None]
    parts = dict(one.cost_breakdown)
    for name, usd in other.cost_breakdown.items():
        parts[name] = round(parts.get(name, 0.0) + usd, 12)
    expected: dict[str, Any] = {
        name: min(getattr(one, name) + getattr(other, name), LARGEST_COUNT) for name in COUNTS
    }
    expected |= {"cost_usd": round(sum(costs), 12) if costs else None, "cost_breakdown": parts}
    expected["ttft_ms"] = other.ttft_ms if one.ttft_ms is None else one.ttft_ms
    before = one.model_copy(deep=True), other.model_copy(deep=True)

    total = one.plus(other)

    assert total == RunUsage(**expected)
    assert total.model_dump_json() == RunUsage(**expected).model_dump_json()
    assert total.model_fields_set == set(RunUsage.model_fields)
    assert RunUsage.model_validate_json(total.model_dump_json()) == total
    assert (one, other) == before


@given(usage=_usages)
def test_what_is_known_is_listed_in_the_order_of_the_fields(usage: RunUsage) -> None:
    """A cost of 0 is known, a count of 0 says nothing."""
    dumped = usage.model_dump()
    optional = {"cost_usd", "ttft_ms"}
    known = {
        name: value for name, value in dumped.items() if value or (value is not None and name in optional)
    }
    assert list(usage.known().items()) == list(known.items())
    assert list(usage.counted().items()) == [(name, value) for name, value in known.items() if value]


def test_a_sum_can_be_changed_and_copied() -> None:
    """A sum is a model as any other: patterns for the original SDK change their copy of the usage."""
    total = NO_USAGE.plus(RunUsage(llm_calls=1, cost_breakdown={"input": 1.0}))
    copied = total.model_copy(deep=True)
    copied.llm_calls = 9
    copied.cost_breakdown["input"] = 2.0
    assert (total.llm_calls, total.cost_breakdown) == (1, {"input": 1.0})
    assert RunUsage() == NO_USAGE
