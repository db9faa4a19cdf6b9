"""Tool executors: the only place that lists their types, and what may stand in their `config`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError
from pydantic_core import PydanticCustomError

from openagents_worker.agents.part import LONGEST_MS, Part, problem
from openagents_worker.agents.positions import Path
from openagents_worker.suggest import did_you_mean

__all__ = [
    "EXECUTORS",
    "CompositeOptions",
    "ConcurrentBatchOptions",
    "CustomExecutor",
    "DefaultOptions",
    "FilesystemOptions",
    "NetworkOptions",
    "RetryOptions",
    "SafeOptions",
    "executor_layers",
]

MAX_LAYERS = 5
"""How many executors may be inside each other."""


def _safe() -> dict[str, JsonValue]:
    return {"type": "safe"}


class DefaultOptions(Part):
    """Calls have no time limit but that of their tool."""


class SafeOptions(Part):
    """Each call has a time limit, and commands may be restricted."""

    default_timeout_ms: int = Field(
        30_000, ge=1, le=LONGEST_MS, description="Timeout of calls whose tool has none."
    )
    allow_stream_passthrough: bool = Field(
        True, description="Whether tools may stream their output; false: they are called by `invoke`."
    )
    command_allowlist: list[str] | None = Field(
        None, description="The programs that a tool with the parameter `command` may start. null: all."
    )


class RetryOptions(Part):
    """A call that fails with a retryable error is made again at once, in the same attempt of the run."""

    inner: dict[str, JsonValue] = Field(
        default_factory=_safe, description="The executor that makes each try."
    )
    max_attempts: int = Field(3, ge=1, le=20, description="The most tries of one call.")
    initial_delay_ms: int = Field(200, ge=0, le=60_000, description="The pause before the second try.")
    backoff_multiplier: float = Field(2.0, ge=1, le=10, description="How much longer each pause is.")
    max_delay_ms: int = Field(
        5_000,
        ge=0,
        le=60_000,
        description="The longest pause. If an error asks for a longer one, the run waits.",
    )
    jitter: Literal["equal", "none", "full"] = Field(
        "equal", description="Which part of a pause is random: the second half, none, all of it."
    )


class FilesystemOptions(Part):
    """Tools may read and write below these folders only."""

    allow_tools: list[str] = Field(default_factory=list, description="The tools that may be called; []: all.")
    deny_tools: list[str] = Field(default_factory=list, description="Tools that may not be called.")
    read_roots: list[str] = Field(default_factory=list, description="Folders to read from; []: all.")
    write_roots: list[str] = Field(default_factory=list, description="Folders to write to; []: all.")


class ConcurrentBatchOptions(Part):
    """At most so many calls of a run are made at once."""

    inner: dict[str, JsonValue] = Field(
        default_factory=_safe, description="The executor that makes each call."
    )
    max_concurrency: int = Field(10, ge=1, le=1_000, description="The most calls at once.")


class NetworkOptions(Part):
    """Tools may reach these hosts only, as far as their arguments name one."""

    allow_hosts: list[str] = Field(
        default_factory=list, description="Allowed hosts (`*.example.com` for all subdomains); []: none."
    )
    allow_schemes: list[str] = Field(
        default_factory=lambda: ["http", "https"], description="Allowed schemes of URLs."
    )
    deny_private_networks: bool = Field(
        True, description="Whether addresses that are not on the public internet are rejected."
    )
    allow_tools: list[str] = Field(
        default_factory=list, description="Tools whose calls are not checked, such as one with a fixed host."
    )


class CompositeOptions(Part):
    """A call is allowed if all of these executors allow it, or any of them."""

    mode: Literal["all", "any"] = Field("all", description="Whether all or any must allow a call.")
    children: list[dict[str, JsonValue]] = Field(
        default_factory=list,
        max_length=20,
        description="Executors that only allow or deny: filesystem_aware, network_aware, composite.",
    )

    @property
    def layers(self) -> tuple[tuple[Part, ...], ...]:
        """The options of each child."""
        return tuple(
            _layers_of(child, ("config", "children", i), MAX_LAYERS) for i, child in enumerate(self.children)
        )


class CustomExecutor(Part):
    """An executor of a class of the deployment. It makes the calls itself, so nothing can be inside it."""

    impl: str
    config: dict[str, JsonValue] = Field(default_factory=dict)


EXECUTORS: Mapping[str, type[Part]] = MappingProxyType(
    {
        "default": DefaultOptions,
        "safe": SafeOptions,
        "retry": RetryOptions,
        "filesystem_aware": FilesystemOptions,
        "concurrent_batch": ConcurrentBatchOptions,
        "network_aware": NetworkOptions,
        "composite": CompositeOptions,
    }
)


DECIDE_ONLY = (FilesystemOptions, NetworkOptions, CompositeOptions)
"""What may be inside a composite: it has no effect on how an allowed call is made."""


def executor_layers(type_: Any, config: Mapping[str, Any], levels: int = MAX_LAYERS) -> tuple[Part, ...]:
    """The options of an executor and of those inside it, the outermost first.

    Raises a validation error that names the key.
    """
    if type_ not in EXECUTORS:
        hint = did_you_mean(str(type_), EXECUTORS, "the types are")
        raise problem("executor", f"there is no tool_executor of the type {type_!r}", hint=hint)
    if not isinstance(config, Mapping):
        raise problem("executor", "config must be an object", key=("config",))
    if levels == 0:
        raise problem("executor", f"more than {MAX_LAYERS} executors are inside each other")
    try:
        options = EXECUTORS[type_].model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        context = first.get("ctx", {})
        key = ("config", *first["loc"], *context.get("key", ()))
        raise problem("executor", first["msg"], key=key, hint=context.get("hint")) from None
    if isinstance(options, CompositeOptions):
        _check_children(options, levels - 1)
    inner = getattr(options, "inner", None)
    return (options,) if inner is None else (options, *_layers_of(inner, ("config", "inner"), levels - 1))


def _layers_of(ref: Mapping[str, Any], place: Path, levels: int) -> tuple[Part, ...]:
    """The options of an executor inside another one: `type` or `impl`, and `config`."""
    if unknown := sorted(ref.keys() - {"type", "impl", "config"}):
        raise problem("executor", "unknown key", key=(*place, unknown[0]))
    if "impl" not in ref:
        try:
            return executor_layers(ref.get("type"), ref.get("config", {}), levels)
        except PydanticCustomError as error:
            context = error.context or {}
            key = (*place, *context.get("key", ()))
            raise problem("executor", error.message(), key=key, hint=context.get("hint")) from None
    if "type" in ref or not isinstance(ref["impl"], str) or not isinstance(ref.get("config", {}), dict):
        raise problem("executor", "needs either type or impl, and an object as config", key=place)
    return (CustomExecutor(impl=ref["impl"], config=ref.get("config", {})),)


def _check_children(options: CompositeOptions, levels: int) -> None:
    for index, child in enumerate(options.children):
        place: Path = ("config", "children", index)
        (first, *_) = _layers_of(child, place, levels)
        if not isinstance(first, DECIDE_ONLY):
            raise problem("executor", "only filesystem_aware, network_aware and composite fit", key=place)
