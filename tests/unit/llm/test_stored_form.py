"""Stored forms: a reply and its usage are plain JSON, so that nothing has to be copied to store them."""

from __future__ import annotations

import pytest

from openagents_worker.jsontext import replaced
from openagents_worker.llm.base import FinishReason, LLMResponse, LLMToolCall, LLMUsage
from openagents_worker.models import RunUsage


def test_the_wire_form_of_a_reply_is_stored_as_it_is() -> None:
    """A member of `FinishReason` becomes its text: `replaced` returns the same object if nothing changes."""
    reply = LLMResponse(
        "hi",
        (LLMToolCall("search", {"q": "x"}, "c1"),),
        LLMUsage(1, 2, 3, {"cost_usd": 0.5}),
        finish_reason=FinishReason.TOOL_CALLS,
    )

    wire = reply.to_wire()

    assert replaced(wire) is wire
    assert type(wire["finish_reason"]) is str
    assert LLMResponse.from_wire(wire) == reply


@pytest.mark.parametrize(
    ("usage", "known"),
    [
        (RunUsage(), {}),
        (RunUsage(llm_calls=1, cost_usd=0.0, ttft_ms=0.0), {"llm_calls": 1, "cost_usd": 0.0, "ttft_ms": 0.0}),
        (
            RunUsage(tool_calls=2, cost_breakdown={"input": 1.0}),
            {"tool_calls": 2, "cost_breakdown": {"input": 1.0}},
        ),
    ],
)
def test_what_is_known_of_a_usage_are_the_fields_without_their_defaults(
    usage: RunUsage, known: dict[str, object]
) -> None:
    """A cost of zero is known; a cost of None is not."""
    assert usage.known() == known == usage.model_dump(exclude_defaults=True)


def test_adding_nothing_changes_nothing() -> None:
    """Neither the sum nor the usages that were added."""
    usage = RunUsage(llm_calls=1, input_tokens=5, cost_usd=0.25, cost_breakdown={"input": 0.25}, ttft_ms=3.0)

    assert usage.plus(RunUsage()) == RunUsage().plus(usage) == usage
    assert usage.plus(usage).cost_breakdown == {"input": 0.5}
    assert usage.cost_breakdown == {"input": 0.25}
