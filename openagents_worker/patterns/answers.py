"""Answers: the only place that decides whether a reply without tool calls is a whole answer."""

from __future__ import annotations

from openagents_worker.errors import (
    LLMReplyEmpty,
    LLMReplyFiltered,
    LLMReplyRefused,
    LLMReplyTruncated,
    LLMResponseError,
)
from openagents_worker.llm.base import FinishReason, LLMResponse
from openagents_worker.llm.conversation import is_blank

__all__ = ["checked_answer"]

MAX_REFUSAL_CHARS = 500  # of the model's words, in the error of the run


def checked_answer(reply: LLMResponse, *, accept_truncated: bool = False, accept_empty: bool = False) -> str:
    """The text of a reply without tool calls, if it is a whole answer.

    Raises `LLMReplyTruncated`, `LLMReplyFiltered`, `LLMReplyRefused` or `LLMReplyEmpty`, and
    `LLMResponseError` for a reply that an error ended. With
    `accept_truncated`, a text that was cut by the token limit or by a filter is an answer. With
    `accept_empty`, no text is one. A reply without a finish reason, of a client that does not know it, is
    always one.
    """
    text, reason = reply.output_text, reply.finish_reason
    accepted = accept_truncated and not is_blank(text)
    match reason:
        case None:
            return text
        case FinishReason.LENGTH if not accepted:
            raise _truncated(reply)
        case FinishReason.CONTENT_FILTER if not accepted:
            raise LLMReplyFiltered("the provider's content filter cut the answer")
        case FinishReason.REFUSAL:
            raise LLMReplyRefused(f"the model refuses to answer: {text[:MAX_REFUSAL_CHARS]}".rstrip(": "))
        case FinishReason.ERROR:
            raise LLMResponseError(f"the reply ended with an error (finish reason: {reply.stop_reason})")
    if is_blank(text) and not accept_empty:
        raise LLMReplyEmpty(
            f"the model ended its reply without an answer (finish reason: {reply.stop_reason or reason})"
        )
    return text


def _truncated(reply: LLMResponse) -> LLMReplyTruncated:
    tokens = f" after {reply.usage.output_tokens:,} tokens" if reply.usage is not None else ""
    what = "the answer was cut" if not is_blank(reply.output_text) else "the model used up its tokens"
    return LLMReplyTruncated(
        f"{what}{tokens} (finish reason: {reply.stop_reason or reply.finish_reason})",
        hint="raise llm.max_tokens, or set accept_truncated in the pattern's config",
    )
