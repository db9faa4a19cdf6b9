"""The model client as patterns of the original SDK use it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from openagents_worker.errors import OpenAgentsError
from openagents_worker.llm.base import LLMResponse
from openagents_worker.patterns.step_limits import more_steps
from openagents_worker.runtime.call_counts import ORIGINAL_STEPS
from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.original.errors import as_original

__all__ = ["OriginalModel"]


class OriginalModel:
    """The recorded model client of a run, with the further methods and the errors of the original SDK.

    Each call is a step: the limit `max_steps` of the request counts them. `provider_name` is `neutral`, so
    that a pattern writes messages of no provider's own form.
    """

    provider_name = "neutral"
    price_per_mtok_input = price_per_mtok_output = None
    price_per_mtok_cached_read = price_per_mtok_cached_write = None

    def __init__(self, context: AttemptContext) -> None:
        self._context = context
        self._inner = context.llm_client
        self.model_id = self._inner.model_id
        self._last_reply: LLMResponse | None = None
        budget = context.run_request.budget
        self._max_steps = None if budget is None else budget.max_steps

    async def generate(self, *, messages: list[dict[str, Any]], **options: Any) -> LLMResponse:
        """The model's reply; see `LLMClient.generate`."""
        try:
            await self._count_step()
            reply = await self._inner.generate(messages=list(messages), **options)
        except OpenAgentsError as error:
            raise as_original(error) from error.__cause__
        self._last_reply = reply
        return reply

    async def complete(self, *, messages: list[dict[str, Any]], **options: Any) -> str:
        """The text of the reply."""
        return (await self.generate(messages=messages, **options)).output_text

    async def complete_stream(
        self, *, messages: list[dict[str, Any]], **options: Any
    ) -> AsyncIterator[SimpleNamespace]:
        """The reply as one chunk, once it is recorded: a later attempt gets the same one."""
        reply = await self.generate(messages=messages, **options)
        for kind, delta in (("content_block_delta", reply.output_text), ("message_stop", None)):
            usage = reply.usage if kind == "message_stop" else None
            yield SimpleNamespace(
                type=kind, delta=delta, content=None, error=None, error_type=None, usage=usage
            )

    def get_last_response(self) -> LLMResponse | None:
        return self._last_reply

    def count_tokens(self, text: str) -> int:
        return self._inner.count_tokens(text)

    async def aclose(self) -> None:
        """Does nothing: the client belongs to the process, not to the run."""

    async def _count_step(self) -> None:
        """Raises the verdict about the run if there is one, and `MaxStepsExceeded` above the limit.

        A pattern may have caught the error of a budget; it makes no further model call.
        """
        if (verdict := self._context.recorder.verdict) is not None:
            raise verdict
        counts = self._context.recorder.counts
        if self._max_steps is not None and counts.steps(ORIGINAL_STEPS) >= self._max_steps:
            self._max_steps = await more_steps(self._context, self._max_steps)  # type: ignore[arg-type]
        counts.count_step(ORIGINAL_STEPS)
