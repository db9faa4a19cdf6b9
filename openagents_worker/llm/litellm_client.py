"""Models by way of the library LiteLLM: the only place that calls it, and translates its replies and errors.

LiteLLM knows many providers that have an API of their own, such as Bedrock, Vertex and Cohere. It is called
in this process, with the messages of chat completions. It has a thread of its own, because it imports
thousands of modules, and does other slow work on its event loop. Retries, limits, keys and prices are as with
the other providers.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

import httpx
from pydantic import Field

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.errors import LLMConnectionError, LLMError, LLMResponseError, text_of
from openagents_worker.http_replies import ReplyTooLarge
from openagents_worker.jsontext import dumps, replaced
from openagents_worker.llm.api_keys import ApiKeys
from openagents_worker.llm.base import ModelRequest
from openagents_worker.llm.endpoints import as_api_keys, header_problems, is_http_url, secrets_of
from openagents_worker.llm.failures import failure, presentable
from openagents_worker.llm.http import Endpoint, HttpModelClient, call_headers
from openagents_worker.llm.library_thread import LibraryThread
from openagents_worker.llm.openai_chat import ChatCompletions
from openagents_worker.llm.openai_options import OpenAIExtras
from openagents_worker.llm.options import raise_for_problems, read_extras
from openagents_worker.llm.reading import Exchange
from openagents_worker.llm.refused_fields import called_tools
from openagents_worker.llm.usage import COST_HEADERS
from openagents_worker.secret_forms import remember_secret
from openagents_worker.secret_names import is_secrets_name

__all__ = ["NO_KEY", "UNUSED_URL", "LiteLLMClient", "LiteLLMExtras"]

PROVIDER = "litellm"
NO_KEY = "the model's provider, as LiteLLM names it"
UNUSED_URL = "https://litellm.invalid/"
"""For what the HTTP clients derive from a URL; nothing is sent to it."""

_QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOCAL_AUTOROUTER_PRESETS": "True",
    "LITELLM_LOCAL_POLICY_TEMPLATES": "True",
    "LITELLM_MODE": "PRODUCTION",
}
"""Variables without which an import of LiteLLM loads files from the internet, and reads a .env file."""

_CODES = {
    "ContextWindowExceededError": "context_length_exceeded",
    "ContentPolicyViolationError": "content_filter",
    "AuthenticationError": "invalid_api_key",
    "BudgetExceededError": "insufficient_quota",
}
"""Words of our table of failures for errors whose status does not say enough."""
_NEEDS_TOOLS = re.compile("anthropic|claude|bedrock", re.IGNORECASE)
_UNSUPPORTED = "set llm.drop_params to leave out what the model does not support"


class LiteLLMExtras(OpenAIExtras):
    """The options that only this provider has: those of chat completions, and LiteLLM's own."""

    api_version: str | None = Field(
        default=None, description="The version of the provider's API. null: LiteLLM's default."
    )
    custom_llm_provider: str | None = Field(
        default=None, description="LiteLLM's name of the provider. null: known from the model's name."
    )
    drop_params: bool = Field(
        default=False,
        description="Whether options that the model does not support are left out. false: they are errors.",
    )
    thinking: dict[str, Any] | None = Field(
        default=None, description="Anthropic's thinking, for models that have it. null: none."
    )


class _LiteLLMChat(ChatCompletions):
    """The codec of chat completions, as LiteLLM takes them."""

    def body(self, request: ModelRequest, model: str) -> dict[str, Any]:
        """The body. For Claude and Bedrock, LiteLLM refuses calls in the messages of a request without tools.
        Bedrock has no `tool_choice` that forbids a call."""
        body = super().body(request, model)
        if "tools" in body or not _NEEDS_TOOLS.search(f"{body.get('custom_llm_provider')} {model}"):
            return body
        tools = called_tools(body["messages"])
        return {**body, "tools": tools} if tools else body


class LiteLLMClient(HttpModelClient):
    """A model behind LiteLLM's `acompletion`. Its name begins with its provider's: `bedrock/amazon.nova…`."""

    def __init__(self, options: LLMOptions, *, api_key: ApiKeys | str | None, **more: Any) -> None:
        """Raises `PluginConfigError` for invalid options. `more`: the arguments of `HttpModelClient`."""
        found, problems = read_extras(options, LiteLLMExtras)
        keys = as_api_keys(api_key, options, variable=NO_KEY)
        problems += [*_problems(options), *header_problems(options, keys)]
        raise_for_problems(problems)
        endpoint = Endpoint(
            provider=PROVIDER,
            url=options.api_base or UNUSED_URL,
            stream_url=options.api_base or UNUSED_URL,
            headers=dict(options.extra_headers),
            secrets=secrets_of(options, keys),
            keys=keys,
            key_headers=lambda key: {},
        )
        extras = found.model_dump(exclude_none=True)
        codec = _LiteLLMChat(options, extras)
        super().__init__(options.model or "", options, endpoint=endpoint, codec=codec, **more)
        self.keeps_format = extras.get("structured_output", "auto") != "auto"
        self._api_base = options.api_base
        self._thread = LibraryThread("openagents-litellm")

    async def _reply_body(self, exchange: Exchange) -> Any:
        """Call the library once, and return the body of the reply, streamed or not."""
        exchange.measures.clear()
        exchange.headers = httpx.Headers()
        sent_at, arguments = self._timing.clock(), self._arguments(exchange)
        try:
            if not exchange.is_streamed:
                return self._checked(await self._thread.call(lambda: _whole(arguments, exchange)))
            return await self._streamed(arguments, exchange, sent_at)
        except (LLMError, ReplyTooLarge, httpx.TransportError):
            raise
        except Exception as error:
            raise _translated(error, exchange, self._endpoint.keys.origin) from error
        finally:
            exchange.took_ms = (self._timing.clock() - sent_at) * 1000

    def _arguments(self, exchange: Exchange) -> dict[str, Any]:
        """The arguments of `acompletion`. Retries and time limits of a call are ours."""
        own = {
            "api_key": exchange.key,
            "api_base": self._api_base,
            "extra_headers": {**self._endpoint.headers, **call_headers()},
            "timeout": self._options.timeout_ms / 1000,
        }
        given = {name: value for name, value in own.items() if value is not None}
        return {**exchange.body, **given, "num_retries": 0, "max_retries": 0}

    def _checked(self, body: dict[str, Any]) -> dict[str, Any]:
        if len(dumps(body)) > self._options.max_reply_bytes:
            raise ReplyTooLarge(f"the reply has more than {self._options.max_reply_bytes} bytes")
        return body

    async def _streamed(
        self, arguments: Mapping[str, Any], exchange: Exchange, sent_at: float
    ) -> dict[str, Any]:
        """Deliver the pieces of a reply, and assemble it."""
        reader = self._codec.stream(max_chars=self._options.max_reply_bytes)
        async with aclosing(self._thread.items(lambda: _chunks(arguments, exchange))) as chunks:
            async for chunk in chunks:
                pieces = reader.add(chunk)
                if reader.begun:
                    await exchange.deliver(pieces, lambda: (self._timing.clock() - sent_at) * 1000)
        if not reader.finished:
            raise httpx.RemoteProtocolError("the stream ended before its finish_reason")
        return reader.body()

    async def aclose(self) -> None:
        """End the thread of the library."""
        await super().aclose()
        await self._thread.aclose()


def _problems(options: LLMOptions) -> list[ConfigProblem]:
    problems = []
    if find_spec("litellm") is None:
        hint = "pip install 'openagents-worker[litellm]'"
        problems.append(ConfigProblem(("provider",), "the library LiteLLM is not installed", hint))
    if not options.model:
        hint = "with its provider, for example bedrock/amazon.nova-pro-v1:0"
        problems.append(ConfigProblem(("model",), "LiteLLM needs the name of the model", hint))
    if options.api_base is not None and not is_http_url(options.api_base):
        problems.append(ConfigProblem(("api_base",), "not an http(s) URL"))
    for name in ("stream_endpoint", "proxy", "ca_file", "client_cert", "http2"):
        if getattr(options, name) is not None:
            text = "LiteLLM opens its own connections, so this option has no effect"
            problems.append(ConfigProblem((name,), text, "remove it; see LiteLLM's own variables"))
    return problems


# --- in the thread of the library ------------------------------------------------------------------------


async def _whole(arguments: Mapping[str, Any], exchange: Exchange) -> dict[str, Any]:
    """One reply as JSON."""
    reply = await _library().acompletion(**arguments)
    hidden = _hidden(reply)
    _note_headers(exchange, hidden)
    cost = hidden.get("response_cost")
    if isinstance(cost, int | float):
        exchange.headers[COST_HEADERS[0]] = repr(cost)
    return _plain(reply)


async def _chunks(arguments: Mapping[str, Any], exchange: Exchange) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed reply as JSON. The provider's connection is closed in any case."""
    chunks = await _library().acompletion(**arguments)
    _note_headers(exchange, _hidden(chunks))
    try:
        async for chunk in chunks:
            yield _plain(chunk)
    finally:
        if (close := getattr(chunks, "aclose", None)) is not None:
            with suppress(Exception):
                await close()


@cache
def _library() -> Any:
    """LiteLLM, imported without its network access, its .env file and its advertisements. The keys in the
    environment, which it finds itself, are masked in every text from now on."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name, value in os.environ.items():
        if is_secrets_name(name):
            remember_secret(value)
    library: Any = importlib.import_module("litellm")
    library.telemetry = False
    library.suppress_debug_info = True
    library.turn_off_message_logging = True
    logging.getLogger("LiteLLM").setLevel(logging.ERROR)  # its errors are translated, and logged by us
    return library


def _plain(reply: Any) -> dict[str, Any]:
    """A reply or a chunk of the library as JSON, without what is null or empty."""
    fields: dict[str, Any] = _without_none(replaced(reply.model_dump(mode="json", exclude_none=True)))
    return fields


def _without_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: found for name, item in value.items() if (found := _without_none(item)) not in (None, {})}


def _hidden(reply: Any) -> Mapping[str, Any]:
    hidden = getattr(reply, "_hidden_params", None)
    return hidden if isinstance(hidden, Mapping) else {}


def _note_headers(exchange: Exchange, hidden: Mapping[str, Any]) -> None:
    """Keep the provider's headers, with its id of the request."""
    exchange.headers = httpx.Headers(_text_headers(hidden.get("additional_headers")))


# --- errors ----------------------------------------------------------------------------------------------


def _text_headers(headers: Any) -> dict[str, str]:
    """Headers of a provider; LiteLLM puts its own name in front of them."""
    if not isinstance(headers, Mapping):
        return {}
    return {
        str(name).removeprefix("llm_provider-"): str(value)
        for name, value in headers.items()
        if str(value).isascii() and str(name).isascii()
    }


def _translated(error: Exception, exchange: Exchange, key_origin: str) -> LLMError:
    """An exception of the library as an error of ours."""
    kind, text = type(error).__name__, text_of(getattr(error, "message", None) or error)
    text = " ".join(text.removeprefix(f"litellm.{kind}: ").split())
    status = getattr(error, "status_code", None)
    response = getattr(error, "response", None)
    headers = getattr(error, "litellm_response_headers", None) or getattr(response, "headers", None)
    found = _text_headers(headers)
    if not isinstance(status, int) or not 300 <= status < 600:
        status = {"BudgetExceededError": 402}.get(kind)
    if status is None:
        message = presentable(f"{PROVIDER}: the library failed: {kind}: {text}", exchange.secrets)
        is_network = isinstance(error, OSError | TimeoutError)
        return LLMConnectionError(message) if is_network else LLMResponseError(message)
    translated = failure(
        {"error": {"message": text, "type": kind, "code": _CODES.get(kind)}},
        status=status,
        headers=found,
        provider=PROVIDER,
        key_origin=key_origin,
        secrets=exchange.secrets,
    )
    if kind == "UnsupportedParamsError":
        translated.hint = _UNSUPPORTED
    return translated
