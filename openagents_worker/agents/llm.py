"""The `llm` section of an agent: the only place that defines its options."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from openagents_worker.agents.part import LONGEST_MS, Part, problem

__all__ = ["LLMLimits", "LLMOptions", "LLMPricing", "LLMRetryOptions"]

DEFAULT_TOTAL_TIMEOUT_MS = 600_000
DEFAULT_MAX_REPLY_BYTES = 4 * 1024 * 1024
"""Four times what a run may store, because of JSON's escapes. Parsed, it can use 25 times as much memory."""
LARGEST_MAX_REPLY_BYTES = 256 * 1024 * 1024
MAX_FALLBACKS = 8
RESERVED_BODY = frozenset({"input", "messages", "stream"})
"""Fields of a request that `extra_body` cannot replace."""


class LLMPricing(Part):
    """Prices in USD per million tokens. None: the price in the built-in table, if there is one. A cost that
    the provider states in its reply takes precedence."""

    input: float | None = Field(
        default=None,
        ge=0,
        description="USD per million input tokens. null: the price in the built-in table, if there is one.",
    )
    output: float | None = Field(
        default=None,
        ge=0,
        description="USD per million output tokens. null: the price in the built-in table, if there is one.",
    )
    cached_read: float | None = Field(
        default=None,
        ge=0,
        description="USD per million input tokens that the provider read from its cache. null: as for input.",
    )
    cached_write: float | None = Field(
        default=None,
        ge=0,
        description="USD per million input tokens that the provider wrote to its cache. null: as for input.",
    )
    cached_write_long: float | None = Field(
        default=None,
        ge=0,
        description="USD per million input tokens written to its cache for an hour or longer. null: as for "
        "input.",
    )
    reasoning: float | None = Field(
        default=None, ge=0, description="USD per million tokens of reasoning. null: as other output."
    )
    image: float | None = Field(
        default=None, ge=0, description="USD per million input tokens of images. null: as other input."
    )
    audio: float | None = Field(
        default=None, ge=0, description="USD per million input tokens of audio. null: as other input."
    )
    cached_audio: float | None = Field(
        default=None,
        ge=0,
        description="USD per million input tokens of audio that the provider read from its cache. null: the "
        "price in the built-in table, if there is one.",
    )
    web_search: float | None = Field(
        default=None,
        ge=0,
        description="USD per web search that the provider makes for the model. null: the price in the "
        "built-in table, if there is one.",
    )
    file_search: float | None = Field(
        default=None, ge=0, description="USD per search in files at the provider. null: not known."
    )
    image_generation: float | None = Field(
        default=None, ge=0, description="USD per image that a tool of the provider makes. null: not known."
    )
    code_interpreter: float | None = Field(
        default=None,
        ge=0,
        description="USD per container in which the provider executes code for a reply. null: not known.",
    )


class LLMRetryOptions(Part):
    """How a model call is retried. Short pauses are waited for inside the call. For longer ones, the run is
    suspended and uses no worker slot."""

    max_attempts: int = Field(
        default=6,
        ge=1,
        description="Largest number of requests of one model call, in all attempts of the run together.",
    )
    initial_backoff_ms: int = Field(
        default=500, ge=0, le=LONGEST_MS, description="Longest time before the second try, in milliseconds."
    )
    max_backoff_ms: int = Field(
        default=30_000,
        ge=0,
        le=LONGEST_MS,
        description="Longest time before any further try, in milliseconds. A provider may ask for more.",
    )
    suspend_above_ms: int = Field(
        default=2_000,
        ge=0,
        le=LONGEST_MS,
        description="Longest pause before a try for which the call waits, in milliseconds. For a "
        "longer one, the run is suspended.",
    )
    backoff_multiplier: float = Field(
        default=2.0, ge=1, description="Factor by which this time grows with every try."
    )
    retry_on_connection_errors: bool = Field(
        default=True, description="Whether a request is repeated if the connection fails."
    )
    total_budget_ms: int | None = Field(
        default=None,
        ge=1,
        le=LONGEST_MS,
        description="Milliseconds after the first try; no try begins later. null: no limit.",
    )


class LLMLimits(Part):
    """Limits that all workers together keep for the requests to a model."""

    key: str = Field(
        default="{provider}:{model}",
        min_length=1,
        max_length=200,
        pattern=r"^([A-Za-z0-9._:/@-]|\{(provider|model|tenant)\})+$",
        description="The name of the limit. Agents with the same name share it. {provider}, {model} and "
        "{tenant} stand for those of the call: {tenant} gives each tenant a limit of its own.",
    )
    requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Largest number of requests in a minute. They are spread evenly. null: no limit.",
    )
    tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Largest number of tokens in a minute, of requests and replies. null: no limit.",
    )
    max_concurrency: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Largest number of requests at once. null: no limit."
    )

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """The limits without their name."""
        return self.requests_per_minute, self.tokens_per_minute, self.max_concurrency


class LLMOptions(Part):
    """The model of an agent. Other keys (`seed`, `top_p` …) are the provider's options; it checks them."""

    model_config = ConfigDict(extra="allow")

    provider: str = Field(
        default="mock",
        min_length=1,
        description="The client: openai_compatible, openai_responses, anthropic, litellm, scripted or mock.",
    )
    model: str | None = Field(
        default=None, description="Name of the model at the provider. null: the provider's default."
    )
    api_base: str | None = Field(
        default=None,
        description="The http(s) URL before /chat/completions, /responses or /messages. null: the variable "
        "OPENAI_BASE_URL or ANTHROPIC_BASE_URL, or the provider's URL.",
    )
    api_key_env: str | None = Field(
        default=None,
        min_length=1,
        description="The environment variable that holds the key; it must be set. null: OPENAI_API_KEY or "
        "ANTHROPIC_API_KEY.",
    )
    api_key_file: str | None = Field(
        default=None,
        min_length=1,
        description="A file with the key, which is read again when it was replaced. null: none. Without it "
        "and without api_key_env, the function of register_api_keys returns the key, if there is one.",
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="Sampling temperature, from 0 to 2. null: the provider's default.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of tokens in a reply. null: the provider's default.",
    )
    connect_timeout_ms: int = Field(
        default=5_000, ge=1, le=LONGEST_MS, description="Timeout for opening a connection, in milliseconds."
    )
    timeout_ms: int = Field(
        default=120_000,
        ge=1,
        le=LONGEST_MS,
        description="Longest silence of the provider during a call, in milliseconds.",
    )
    total_timeout_ms: int = Field(
        default=DEFAULT_TOTAL_TIMEOUT_MS,
        ge=1,
        le=LONGEST_MS,
        description="Timeout for a whole model call, including its tries, in milliseconds. "
        "If it is not set, at least timeout_ms.",
    )
    max_reply_bytes: int = Field(
        default=DEFAULT_MAX_REPLY_BYTES,
        ge=1_024,
        le=LARGEST_MAX_REPLY_BYTES,
        description="Largest reply in bytes, after decompression. For a stream, only its text and its tool "
        "calls count.",
    )
    proxy: str | None = Field(
        default=None,
        min_length=1,
        description="The proxy of all requests: http://, https://, socks5:// or socks5h://. null: the "
        "variables HTTPS_PROXY, HTTP_PROXY and ALL_PROXY, except for the hosts in NO_PROXY.",
    )
    ca_file: str | None = Field(
        default=None,
        min_length=1,
        description="A PEM file with the certificate authorities that the server is verified with. null: "
        "those of the system.",
    )
    client_cert: str | None = Field(
        default=None,
        min_length=1,
        description="A PEM file with the certificate that is shown to the server, and its key if client_key "
        "is not set. null: none.",
    )
    client_key: str | None = Field(
        default=None,
        min_length=1,
        description="A PEM file with the key of client_cert. null: it is in client_cert.",
    )
    client_key_password_env: str | None = Field(
        default=None,
        min_length=1,
        description="The environment variable with the password of the key. null: it has none.",
    )
    http2: bool | None = Field(
        default=None,
        description="Whether HTTP/2 is used where a server offers it over TLS. null: if the extra http2 is "
        "installed.",
    )
    stream_endpoint: str | None = Field(
        default=None,
        description="URL for streamed requests, or a path below api_base. null: the same as for others.",
    )
    pricing: LLMPricing | None = Field(
        default=None, description="Prices in USD per million tokens. null: the built-in table."
    )
    retry: LLMRetryOptions = Field(
        default_factory=LLMRetryOptions, description="How a failed request is repeated."
    )
    extra_headers: dict[str, str] = Field(
        default_factory=dict, description="Further HTTP headers of every request."
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of the JSON body of every request, for what has no option here.",
    )
    extra_query: dict[str, str] = Field(
        default_factory=dict, description="Further query parameters of the URL of every request."
    )
    stream: bool = Field(
        default=True,
        description="Whether replies are streamed to those who watch them. false: never, for a server that "
        "cannot stream.",
    )
    limits: LLMLimits | None = Field(
        default=None,
        description="Limits of the requests to the model, of all workers together. A run that has to wait "
        "for more than a second is parked. null: none.",
    )
    fallbacks: list[dict[str, Any]] = Field(
        default_factory=list,
        max_length=MAX_FALLBACKS,
        description="Models that answer a call if this one cannot: objects with fields of this section. One "
        "without a provider takes all other fields from here; at another address, it says which key it gets.",
    )
    share_key: bool | None = Field(
        default=None,
        description="Only in fallbacks without a provider, at another address: whether the key is sent "
        "there, with other secrets of extra_headers, extra_query and extra_body. null: it has a key of its "
        "own.",
    )
    reasoning_model: bool | None = Field(
        default=None,
        description="Whether the model takes the parameters of reasoning models. null: known from its name.",
    )
    openai_api_style: Literal["chat_completions", "responses"] | None = Field(
        default=None,
        description="The API of OpenAI: chat_completions. For responses, use the provider openai_responses.",
    )
    script: list[dict[str, Any]] | None = Field(
        default=None, description="For the provider scripted: its replies and faults, in order."
    )
    latency_ms: int = Field(
        default=0,
        ge=0,
        le=LONGEST_MS,
        description="For the provider scripted: milliseconds before every reply.",
    )

    @model_validator(mode="after")
    def _body_is_free(self) -> LLMOptions:
        if reserved := sorted(RESERVED_BODY & self.extra_body.keys()):
            raise problem(
                "reserved",
                f"{reserved[0]} is written by the library; it cannot be set here",
                key=("extra_body", reserved[0]),
            )
        return self

    @model_validator(mode="after")
    def _timeout_is_within_total(self) -> LLMOptions:
        if "total_timeout_ms" in self.model_fields_set and self.timeout_ms > self.total_timeout_ms:
            raise problem(
                "timeouts",
                f"{self.timeout_ms} is more than total_timeout_ms ({self.total_timeout_ms}), "
                "so it could never be reached",
                key=("timeout_ms",),
            )
        return self

    @property
    def whole_call_ms(self) -> int:
        """The time limit of a whole call: `total_timeout_ms`. If that is not set, at least `timeout_ms`."""
        if "total_timeout_ms" in self.model_fields_set:
            return self.total_timeout_ms
        return max(self.timeout_ms, DEFAULT_TOTAL_TIMEOUT_MS)
