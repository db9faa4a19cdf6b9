"""Numbers from a provider: invalid ones are limited, and never to the advantage of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.agents import LLMPricing
from openagents_worker.errors import LLMConnectionError, LLMError, LLMRateLimitError, LLMResponseError
from openagents_worker.jsontext import dumps, loads, replaced
from openagents_worker.llm.base import LLMResponse, LLMUsage, token_count
from openagents_worker.llm.failures import failure
from openagents_worker.llm.openai_chat_replies import reply_from_wire
from openagents_worker.llm.openai_chat_stream import StreamedReply
from openagents_worker.llm.pricing import price
from openagents_worker.models import RunUsage
from openagents_worker.retry_after import MAX_RETRY_AFTER_MS, retry_after_ms
from openagents_worker.runtime.calls.model import _usage_of
from tests.unit.test_jsontext import NASTY

MOST = 2**53


@pytest.mark.parametrize(
    ("said", "counted"),
    [
        (7, 7),
        (-5, 0),
        (7.9, 7),
        (None, 0),
        (True, 1),
        ("12", 12),
        ("many", 0),
        (math.inf, MOST),
        (-math.inf, 0),
        (math.nan, 0),
        (1e308, MOST),
        (2**63, MOST),
        ([10**5000], 0),
        ({}, 0),
    ],
)
def test_tokens_are_none_below_zero_and_at_most_what_can_be_counted(said: Any, counted: int) -> None:
    """A negative number would refund a budget."""
    assert token_count(said) == counted
    assert LLMUsage(said, said, said) == LLMUsage(counted, counted, counted)


def test_an_integer_of_many_digits_is_as_many_as_can_be_counted() -> None:
    """It is limited without converting it to text."""
    assert (token_count(10**5000), token_count(-(10**5000))) == (MOST, 0)


METADATA = ("cached_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "cost_usd", "ttft_ms",
            "cost_breakdown", "retries")  # fmt: skip


@given(
    tokens=st.lists(NASTY, min_size=3, max_size=3),
    metadata=st.dictionaries(st.sampled_from(METADATA), NASTY),
    pricing=st.none() | st.just(LLMPricing(input=1.0, output=2.0)),
)
def test_whatever_a_client_counts_no_run_gets_cheaper(
    tokens: list[Any], metadata: dict[str, Any], pricing: LLMPricing | None
) -> None:
    """Also with a custom client: no count is negative, and all of them can be stored and read."""
    said = LLMUsage(*tokens, metadata=metadata)
    for usage in (said, price("gpt-4o", said, pricing)):
        used = _usage_of(LLMResponse(usage=usage))

        amounts = used.model_dump()
        breakdown = amounts.pop("cost_breakdown")
        assert all(amount >= 0 for amount in [*amounts.values(), *breakdown.values()] if amount is not None)
        assert RunUsage.model_validate_json(used.model_dump_json()) == used
        total = RunUsage(input_tokens=MOST, cost_usd=1.0).plus(used)
        assert total.input_tokens == MOST
        assert total.cost_usd is not None
        assert total.cost_usd >= 1.0


@given(NASTY, NASTY)
def test_a_reply_of_any_shape_is_a_reply_or_an_error_with_a_code(body: Any, part: Any) -> None:
    """Complete and streamed. A valid reply can be stored."""
    message = {"content": part, "tool_calls": [{"id": part, "function": {"name": part, "arguments": part}}]}
    more = {"usage": part, "id": part, "model": part}
    for whole in (body, {"choices": [{"message": message, "finish_reason": part}], **more}):
        try:
            reply = reply_from_wire(whole, provider="p")
        except LLMResponseError:
            continue
        wire = replaced(reply.to_wire(), 110)
        assert LLMResponse.from_wire(loads(dumps(wire))).output_text == reply.output_text
    stream = StreamedReply()
    for chunk in (body, {"choices": [{"delta": message, "finish_reason": part}], **more}):
        try:
            stream.add(chunk)
        except LLMResponseError:
            continue


@pytest.mark.parametrize(
    ("headers", "ms"),
    [
        ({"retry-after": "1e308"}, MAX_RETRY_AFTER_MS),
        ({"retry-after-ms": "1e308"}, MAX_RETRY_AFTER_MS),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "9" * 300}, MAX_RETRY_AFTER_MS),
        ({"retry-after": "Mon, 01 Jan 9999 00:00:00 GMT"}, MAX_RETRY_AFTER_MS),
        ({"retry-after": "Mon, 01 Jan 99999999999 00:00:00 GMT"}, None),
        ({"retry-after": "Mon, 01 Jan 2025 99:00:00 GMT"}, None),
        ({"retry-after": "1", "date": "Mon, 01 Jan 99999999999 00:00:00 GMT"}, 1000),
        ({"retry-after": "-1e308"}, 0),
        ({"retry-after": "\u0661"}, 1000),
        ({"retry-after": ""}, None),
    ],
)
def test_a_provider_is_waited_for_a_week_at_most(headers: dict[str, str], ms: int | None) -> None:
    """A longer Retry-After is a mistake, for example in the unit."""
    assert retry_after_ms(headers) == ms


@given(NASTY, NASTY)
def test_a_failure_of_any_shape_is_an_error_with_a_code(body: Any, part: Any) -> None:
    """Its message contains the provider's text as far as it can be shown."""
    for found in (body, {"error": part}, {"error": {"message": part, "code": part, "type": part}}):
        for status in (None, 400, 429, 500):
            error = failure(found, status=status, headers={}, provider="p", key_origin="a file", secrets=())
            assert isinstance(error, LLMError)
            assert len(error.message.encode()) < 2_100


def test_a_status_in_a_code_has_three_digits() -> None:
    """OpenRouter sends the status as the code. A code of 5,000 digits is not a status."""

    def implied(code: Any) -> type[LLMError]:
        body = {"error": {"message": "no", "code": code}}
        return type(failure(body, status=None, headers={}, provider="p", key_origin="a file", secrets=()))

    assert implied(429) is LLMRateLimitError
    assert implied("400") is LLMResponseError
    assert implied("4" * 5_000) is implied("²") is LLMConnectionError
