"""Provider failures: the only place that converts a provider's HTTP errors to errors of this library.

| the provider says | error | retried |
|---|---|---|
| 401, 403, an invalid key | `llm.auth` | no |
| 413, or a text about the length of the context | `llm.context_length` | no |
| a content filter, moderation | `llm.filtered` | no |
| 429, unless the account's quota is used up; a server error with Retry-After | `llm.rate_limit` | yes |
| 408, 409, 425, 5xx, and 529 | `llm.connection` | yes |
| 3xx, 402, other 4xx, what is not a reply | `llm.response` | no |

The header `x-should-retry` of an error goes before this table: with `true`, an error that would not be
retried becomes one of the two that are; with `false`, none is retried.

An error inside a reply with status 200 has the status that its code, type or text says, or else 500.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from openagents_worker.errors import (
    LLMAuthError,
    LLMConnectionError,
    LLMContextTooLong,
    LLMError,
    LLMRateLimitError,
    LLMReplyFiltered,
    LLMResponseError,
    text_of,
)
from openagents_worker.jsontext import dumps, replaced, whole_text
from openagents_worker.llm.strict_servers import forms_in
from openagents_worker.redaction import MASK, safe_message
from openagents_worker.retry_after import duration_ms, rate_limit_reset_ms, retry_after_ms, should_retry

__all__ = [
    "error_in",
    "failure",
    "is_out_of_quota",
    "is_page",
    "is_too_long",
    "not_a_reply",
    "presentable",
    "request_id_of",
    "wait_of",
]

_TOO_LONG = re.compile(
    r"context[ _](length|window|size)|prompt is too long|too many (input )?tokens|input length|token limit"
    r"|reduce the length|input token count|maximum model length|maximum prompt length|answered 413"
    r"|exceeds? the (available )?context|input is too long",
    re.IGNORECASE,
)
"""Error messages of providers for a request that exceeds the model's context; few send a code for it."""
_FILTERED = re.compile(
    r"content[_ ](management[_ ])?(filter|policy)|content_policy_violation|responsibleai|moderation"
    r"|flagged|prohibited[_ ]content|data_inspection_failed|(bio|cyber|misalignment|safety|usage)_policy",
    re.IGNORECASE,
)
_NO_QUOTA = re.compile(
    r"insufficient_quota|insufficient[_ ](funds|balance|credits)|billing|quota_exceeded"
    r"|exceeded_current_quota|credit balance is too low|payment required|spending limit"
    r"|specified .{0,20}usage limits",
    re.IGNORECASE,
)
_LIMITED = re.compile(r"rate limit (reached|exceeded)", re.IGNORECASE)
_SAID_WAIT = re.compile(r"(?:try again|retry) (?:in|after) ((?:\d+(?:\.\d+)?(?:h|ms|m|s))+|\d+(?= second))")
MAX_MESSAGE_CHARS = 500  # some servers and most proxies send a page of HTML
REQUEST_ID_HEADERS = (
    "x-request-id",
    "request-id",
    "apim-request-id",
    "x-ms-request-id",
    "x-amzn-requestid",
    "x-goog-request-id",
    "x-generation-id",
    "cf-ray",
)
MAX_REQUEST_ID_CHARS = 200
RETRYABLE_STATUS = frozenset({408, 409, 425})  # besides 429 and every server error
REDIRECTS = frozenset({301, 302, 303, 307, 308})

# Words in the code or type of an error inside a 200 reply. Any other error counts as a server error (500).
_STATUS_BY_WORD = {
    "server_error": 500,
    "rate_limit": 429,
    "resource_exhausted": 429,
    "too_many_requests": 429,
    "throttling": 429,
    "overloaded": 529,
    "unavailable": 503,
    "timeout": 504,
    "invalid_api_key": 401,
    "authentication": 401,
    "unauthenticated": 401,
    "unauthorized": 401,
    "permission": 403,
    "not_found": 404,
    "notfound": 404,
    "does_not_exist": 404,
    "image": 400,
    "too_large": 413,
    "invalid": 400,
    "badrequest": 400,
    "bad_request": 400,
    "context_length": 400,
    "content_filter": 400,
    "policy": 400,
    "mismatch": 400,
    "unsupported": 400,
    "unprocessable": 422,
    "validation": 422,
}

_INVALID_KEY = re.compile(
    r"(invalid|incorrect|missing) api[ _-]?key|api[ _-]?key (is )?(not valid|invalid)", re.IGNORECASE
)
# Texts of errors without any code.
_STATUS_BY_TEXT = (
    (_TOO_LONG, 400),
    (re.compile(r"not authenticated|unauthori[sz]ed", re.IGNORECASE), 401),
    (_INVALID_KEY, 401),
    (re.compile(r"model .{1,200}(not found|does not exist|not supported)", re.I), 404),
    (re.compile(r"rate limit|too many requests", re.I), 429),
)

_STATUS = re.compile("[45][0-9][0-9]")
_TITLE = re.compile(r"<(title|h1)[^>]*>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_TAGS = re.compile(r"<(script|style)\b.*?</\1>|<!--.*?-->|<[^>]*>", re.IGNORECASE | re.DOTALL)
_PAGE = re.compile(r"\s*<(!doctype|html|head|body|\?xml|h1|title|center)\b", re.IGNORECASE)
MAX_PAGE_CHARS = 20_000  # of a page that is searched for its title


class _Details(NamedTuple):
    message: str
    code: str
    kind: str
    retry_delay: Any = None

    @property
    def label(self) -> str:
        return self.code or self.kind

    @property
    def words(self) -> str:
        return f"{self.code} {self.kind}".lower()


# --- what is an error ------------------------------------------------------------------------------------


REPLY_FIELDS = ("choices", "delta", "output", "content", "usage", "response")
"""Fields of replies and of their chunks. Errors have none of them."""


def error_in(body: Any) -> Any:
    """The error that a JSON value is, in the shape of any provider; None if it is not one.

    Shapes: `error` (OpenAI, Anthropic, most others), `type` or `object` with the value `error` (vLLM),
    `errors`, `detail` (FastAPI), and `message` with a code or status. A list is an error if its first item
    is one (Gemini).
    """
    if isinstance(body, list):
        return body if body and error_in(body[0]) is not None else None
    if not isinstance(body, Mapping):
        return None
    if (
        body.get("error")
        or body.get("type") == "error"
        or body.get("object") == "error"
        or body.get("errors")
    ):
        return body
    for name in REPLY_FIELDS:  # a loop, because it runs for every chunk of a stream
        if body.get(name):
            return None
    has_code = any(body.get(name) for name in ("code", "status", "statusCode", "status_code", "error_code"))
    return body if body.get("detail") or (body.get("message") and has_code) else None


def is_page(text: str) -> bool:
    """Whether a text is a page of HTML or XML: a login page, or the error page of a proxy."""
    return _PAGE.match(text) is not None


# --- errors ----------------------------------------------------------------------------------------------


def failure(
    body: Any,
    *,
    status: int | None,
    headers: Mapping[str, str],
    provider: str,
    key_origin: str,
    secrets: Iterable[str],
) -> LLMError:
    """The exception for a provider's error reply. Its message is limited in length and contains no secrets.

    `status` None means that the error arrived inside a reply with status 200. `key_origin` says where the
    key comes from.
    """
    details = _details(body)
    may_succeed = should_retry(headers) if status is not None else None
    status = status or _implied_status(details)
    label = f" ({details.label})" if details.label else ""
    message = presentable(f"{provider} answered {status}{label}: {details.message}", secrets)
    error = _error(message, status, details, headers, key_origin)
    if may_succeed is True and not error.retryable and status not in REDIRECTS:
        error = _retryable(message, status, details, headers)
    error.is_final = may_succeed is False
    error.request_id, error.status = request_id_of(headers), status
    return error


def _error(
    message: str, status: int, details: _Details, headers: Mapping[str, str], key_origin: str
) -> LLMError:
    if status in REDIRECTS:
        target = safe_message(headers.get("location") or "another URL", MAX_MESSAGE_CHARS)
        return LLMResponseError(message, hint=f"it redirects to {target}; set llm.api_base to the new URL")
    wait_ms = _wait_ms(details, headers) if status == 429 else None
    # Gemini's text of every limit says "billing", as do those of OpenAI and Groq. A limit with a stated wait
    # ends by itself.
    ends = wait_ms is not None or (status == 429 and _LIMITED.search(details.message) is not None)
    words = details.words if ends else f"{details.words} {details.message}"
    if status == 402 or (status < 500 and _NO_QUOTA.search(words)):
        return LLMResponseError(message, hint="the quota of the provider's account is used up")
    if status == 500 and forms_in(details.message):  # llama.cpp and others: their chat template has failed
        return LLMResponseError(message)
    if status == 429 or status in RETRYABLE_STATUS or status >= 500:
        return _retryable(message, status, details, headers)
    if status == 413 or _TOO_LONG.search(message) or "context_length" in details.words:
        return LLMContextTooLong(message, hint="shorten the input, or limit the history (context.max_turns)")
    if _FILTERED.search(f"{details.words} {details.message}"):
        return LLMReplyFiltered(message)
    if status in (401, 403) or (status == 400 and _is_about_the_key(details)):
        return LLMAuthError(message, hint=f"the key comes from {key_origin}")
    return LLMResponseError(message)


def _retryable(message: str, status: int, details: _Details, headers: Mapping[str, str]) -> LLMError:
    wait_ms = _wait_ms(details, headers) if status == 429 else retry_after_ms(headers)
    if status == 429 or wait_ms is not None:
        return LLMRateLimitError(message, retry_after_ms=wait_ms)
    return LLMConnectionError(message)


def _is_about_the_key(details: _Details) -> bool:
    return "api_key" in details.words or _INVALID_KEY.search(details.message) is not None


def not_a_reply(body: Any, *, headers: Mapping[str, str], provider: str, secrets: Iterable[str]) -> LLMError:
    """The error for a reply with status 200 that is neither a reply nor an error of an API.

    An empty one is retried. A page is not: it is a login page, or `llm.api_base` is wrong.
    """
    if body == "":
        error: LLMError = LLMConnectionError(f"{provider} answered 200 with an empty body")
    elif isinstance(body, str) and is_page(body):
        text = presentable(f"{provider} answered 200 with a page: {_page_text(body)}", secrets)
        error = LLMResponseError(text, hint="check llm.api_base: this is a page for browsers, not an API")
    else:
        shown = " ".join(body.split()) if isinstance(body, str) else _shown(body)
        text = f"{provider} answered 200 with something that is not a reply: {shown}"
        error = LLMResponseError(presentable(text, secrets), hint="check llm.api_base and llm.provider")
    error.request_id = request_id_of(headers)
    return error


def is_too_long(error: LLMError) -> bool:
    """Whether the provider refused the request because it exceeds the model's context."""
    if isinstance(error, LLMContextTooLong):
        return True
    return isinstance(error, LLMResponseError) and _TOO_LONG.search(error.message) is not None


def is_out_of_quota(error: LLMError) -> bool:
    """Whether the provider's account has no quota or no money left, whichever status says so."""
    is_of_account = type(error) is LLMResponseError and error.status in range(400, 500)
    return is_of_account and (error.status == 402 or _NO_QUOTA.search(error.message) is not None)


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """The provider's id of a request, for its support."""
    found = next((value for name in REQUEST_ID_HEADERS if (value := headers.get(name))), None)
    return None if found is None else safe_message(whole_text(found), MAX_REQUEST_ID_CHARS)


def presentable(text: str, secrets: Iterable[str]) -> str:
    """The text with secrets masked, cut to `MAX_MESSAGE_CHARS`."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    text = safe_message(text, MAX_MESSAGE_CHARS + 1)  # mask before the cut, which could split a secret
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


# --- reading an error ------------------------------------------------------------------------------------


def wait_of(headers: Mapping[str, str]) -> int | None:
    """Milliseconds to wait before a retry, as the headers of a reply say it."""
    after_ms = retry_after_ms(headers)
    return rate_limit_reset_ms(headers) if after_ms is None else after_ms


def _wait_ms(details: _Details, headers: Mapping[str, str]) -> int | None:
    """How long to wait before a retry: from the headers, or from the body, as Gemini and OpenAI send it."""
    after_ms = retry_after_ms(headers)
    if after_ms is None:
        after_ms = duration_ms(details.retry_delay)
    if after_ms is None and (said := _SAID_WAIT.search(details.message)):
        after_ms = duration_ms(f"{said[1]}s" if said[1].isdigit() else said[1])
    return wait_of(headers) if after_ms is None else after_ms


def _details(body: Any) -> _Details:
    """Message, code and type of an error. OpenAI wraps them in `error`; others use only parts of that."""
    if isinstance(body, list) and body:  # Gemini's compatible endpoint
        body = body[0]
    error = body.get("error") or body if isinstance(body, Mapping) else body
    if isinstance(error, Mapping) and isinstance(errors := error.get("errors"), list) and errors:
        error = errors[0] if isinstance(errors[0], Mapping) else {"message": errors[0]}
    if not isinstance(error, Mapping):
        if isinstance(error, str) and is_page(error):
            return _Details(_page_text(error), "", "")
        text = whole_text(error) if isinstance(error, str) else _shown(error)
        outer = body if isinstance(body, Mapping) else {}
        kind = outer.get("error_type") or outer.get("type") or ""
        code = outer.get("code") or outer.get("status") or ""
        return _Details(
            " ".join(text.split()) or "no message",
            text_of(code) if code != error else "",
            text_of(kind) if kind != "error" else "",
        )
    message = error.get("message") or error.get("detail") or error.get("msg") or _shown(error)
    code = next((error[name] for name in ("code", "status_code", "statusCode") if error.get(name)), "")
    kind = next((error[name] for name in ("type", "status", "error_type") if error.get(name)), "")
    if isinstance(message, list | dict):
        message = _shown(message)
    return _Details(
        text_of(message) + _upstream(error),
        text_of(code),
        text_of(kind) if kind != "error" else "",
        _retry_delay(error),
    )


def _upstream(error: Mapping[str, Any]) -> str:
    """The text of the provider behind a gateway: OpenRouter's `metadata.raw`."""
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    return f" ({' '.join(text_of(raw).split())})" if raw else ""


def _retry_delay(error: Mapping[str, Any]) -> Any:
    """The `retryDelay` among the details of a Gemini error, for example "21s"."""
    details = error.get("details")
    found = details if isinstance(details, list) else []
    return next(
        (each["retryDelay"] for each in found if isinstance(each, Mapping) and "retryDelay" in each), None
    )


def _page_text(page: str) -> str:
    """The title of a page; without one, the beginning of its text."""
    page = page[:MAX_PAGE_CHARS]
    title = _TITLE.search(page)
    text = title.group(2) if title else _TAGS.sub(" ", page)
    return " ".join(html.unescape(whole_text(_TAGS.sub(" ", text))).split()) or "no text"


def _shown(body: Any) -> str:
    try:
        return dumps(replaced(body))
    except (TypeError, ValueError):
        return "the reply cannot be shown"


def _implied_status(details: _Details) -> int:
    if _STATUS.fullmatch(details.code):  # OpenRouter sends the status as the code
        return int(details.code)
    if _STATUS.fullmatch(details.kind):
        return int(details.kind)
    words = details.words.replace("-", "_")
    if _NO_QUOTA.search(words):
        return 402
    known = next((status for word, status in _STATUS_BY_WORD.items() if word in words), None)
    if known is None and not details.code:
        known = next((status for text, status in _STATUS_BY_TEXT if text.search(details.message)), None)
    return known or 500
