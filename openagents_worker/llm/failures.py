"""Provider failures: the only place that converts a provider's HTTP errors to errors of this library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from openagents_worker.errors import (
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    text_of,
)
from openagents_worker.jsontext import dumps, replaced, whole_text
from openagents_worker.redaction import MASK, safe_message
from openagents_worker.retry_after import retry_after_ms

__all__ = ["failure", "is_too_long", "presentable"]

_TOO_LONG = re.compile(
    r"context[ _](length|window|size)|prompt is too long|too many (input )?tokens|input length|token limit"
    r"|reduce the length|input token count|maximum model length|answered 413",
    re.IGNORECASE,
)
"""Error messages of providers for a request that exceeds the model's context; few send a code for it."""
MAX_MESSAGE_CHARS = 500  # some servers and most proxies send a page of HTML

# Words in the code or type of an error inside a 200 reply. Any other error counts as a server error (500).
_STATUS_BY_WORD = {
    "rate_limit": 429,
    "invalid_api_key": 401,
    "authentication": 401,
    "permission": 403,
    "not_found": 404,
    "invalid": 400,
    "context_length": 400,
    "content_filter": 400,
    "content_policy": 400,
    "unsupported": 400,
}


_STATUS = re.compile("[45][0-9][0-9]")


class _Details(NamedTuple):
    message: str
    code: str
    kind: str

    @property
    def label(self) -> str:
        return self.code or self.kind


def failure(
    body: Any,
    *,
    status: int | None,
    headers: Mapping[str, str],
    provider: str,
    key_env: str,
    secrets: Iterable[str],
) -> LLMError:
    """The exception for a provider's error reply. Its message is limited in length and contains no secrets.

    `status` None means that the error arrived inside a reply with status 200. A 429 is a rate limit, unless
    the account's quota is used up. A server error with Retry-After is a rate limit too.
    """
    details = _details(body)
    status = status or _implied_status(details)
    label = f" ({details.label})" if details.label else ""
    message = presentable(f"{provider} answered {status}{label}: {details.message}", secrets)
    after_ms = retry_after_ms(headers)
    if "insufficient_quota" in (details.code, details.kind):  # a 429 for which a retry is useless
        return LLMResponseError(message, hint="the quota of the provider's account is used up")
    if status == 429:
        return LLMRateLimitError(message, retry_after_ms=after_ms)
    if status == 408 or status >= 500:
        if after_ms is not None:
            return LLMRateLimitError(message, retry_after_ms=after_ms)
        return LLMConnectionError(message)
    if status in (401, 403):
        return LLMResponseError(message, hint=f"the key is read from the environment variable {key_env}")
    return LLMResponseError(message)


def is_too_long(error: LLMError) -> bool:
    """Whether the provider refused the request because it exceeds the model's context."""
    return isinstance(error, LLMResponseError) and _TOO_LONG.search(error.message) is not None


def presentable(text: str, secrets: Iterable[str]) -> str:
    """The text with secrets masked, cut to `MAX_MESSAGE_CHARS`."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    text = safe_message(text, MAX_MESSAGE_CHARS + 1)  # mask before the cut, which could split a secret
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


def _details(body: Any) -> _Details:
    """Message, code and type of an error. OpenAI wraps them in `error`; others use only parts of that."""
    if isinstance(body, list) and body:  # Gemini's compatible endpoint
        body = body[0]
    error = body.get("error") or body if isinstance(body, dict) else body
    if not isinstance(error, dict):
        text = whole_text(error) if isinstance(error, str) else _shown(error)
        return _Details(" ".join(text.split()) or "no message", "", "")
    message = error.get("message") or error.get("detail") or _shown(error)
    return _Details(text_of(message), text_of(error.get("code") or ""), text_of(error.get("type") or ""))


def _shown(body: Any) -> str:
    try:
        return dumps(replaced(body))
    except (TypeError, ValueError):
        return "the reply cannot be shown"


def _implied_status(details: _Details) -> int:
    if _STATUS.fullmatch(details.code):  # OpenRouter sends the status as the code
        return int(details.code)
    words = f"{details.code} {details.kind}".lower()
    return next((status for word, status in _STATUS_BY_WORD.items() if word in words), 500)
