"""References to plugins: the only place that defines how an agents file names a memory, a pattern, a tool."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, WrapValidator, model_validator

from openagents_worker.agents.code_path import CodePath
from openagents_worker.agents.executors import CustomExecutor, executor_layers
from openagents_worker.agents.part import LONGEST_MS, Part, problem
from openagents_worker.agents.positions import Path

__all__ = [
    "TOOL_ID",
    "ContextAssemblerRef",
    "MemoryRef",
    "PatternRef",
    "PluginRef",
    "ToolExecutorRef",
    "ToolRef",
    "function_name",
]

TOOL_ID = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")  # what the model providers accept as a function's name
MAX_NAME = 64
_NOT_ALLOWED = re.compile(r"[^a-zA-Z0-9_-]")
_IMPL = re.compile(r"\w+(\.\w+)+")


def _checked_impl_path(path: Any, as_text: Callable[[Any], str]) -> str:
    """The path of a plugin class, unchanged. Raises the problem if it is not `package.module.Class`."""
    text = path if isinstance(path, CodePath) else as_text(path)  # pydantic would drop the object
    if not _IMPL.fullmatch(text):
        raise problem("impl", "must have the form package.module.Class")
    return text


def _tool_id(id_: str) -> str:
    if not TOOL_ID.match(id_):
        raise problem(
            "tool_id", "a tool's id is the function name the model sees: 1 to 64 of a-z A-Z 0-9 _ -"
        )
    return id_


def function_name(name: str, taken: Collection[str]) -> str:
    """A name that all model providers accept for a function, and that is not taken; always the same.

    >>> function_name("weather.get", set()), function_name("weather/get", {"weather_get"})
    ('weather_get', 'weather_get_b5768b')
    """
    text = _NOT_ALLOWED.sub("_", name) or "tool"
    if len(text) <= MAX_NAME and text not in taken:
        return text
    return f"{text[: MAX_NAME - 7]}_{sha256(name.encode(errors='replace')).hexdigest()[:6]}"


class PluginRef(Part):
    """A reference to a plugin: a built-in's name (`type`) or a class (`impl`: `package.module.Class`)."""

    type: str | None = Field(default=None, description="Name of a built-in. Give either type or impl.")
    impl: Annotated[str, WrapValidator(_checked_impl_path)] | None = Field(
        default=None,
        description="Your own class or function, package.module.Class. Give either type or impl.",
    )
    config: dict[str, JsonValue] = Field(
        default_factory=dict, description="Options of the plugin, which checks them."
    )

    @model_validator(mode="after")
    def _type_or_impl(self) -> PluginRef:
        for _, text in self.problems_of_whole(self.__dict__):
            raise problem("type_or_impl", text)
        return self

    @classmethod
    def problems_of_whole(cls, data: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
        names_set = [name for name in ("type", "impl") if data.get(name)]
        if len(names_set) != 1:
            yield (
                (),
                "set exactly one of 'type' (a registered name) and 'impl' (package.module.Class); "
                f"{'both are' if names_set else 'none is'} set",
            )


class MemoryRef(PluginRef):
    """What a session remembers from run to run."""

    on_error: Literal["continue", "fail"] = Field(
        default="continue", description="What happens if the memory fails: the run continues, or fails."
    )


class PatternRef(PluginRef):
    """How the agent thinks: the loop between its model and its tools."""


class ContextAssemblerRef(PluginRef):
    """Which part of the session's past a run sees."""


class ToolExecutorRef(PluginRef):
    """How tools are executed: default, safe, retry, filesystem_aware, network_aware, composite,
    concurrent_batch, or a class with `execute`."""

    @model_validator(mode="after")
    def _has_known_layers(self) -> ToolExecutorRef:
        _ = self.layers
        return self

    @property
    def layers(self) -> tuple[Part, ...]:
        """The options of the executor and of those inside it, the outermost first."""
        if self.impl is not None:
            return (CustomExecutor(impl=self.impl, config=self.config),)
        return executor_layers(self.type, self.config)

    @property
    def custom(self) -> PluginRef | None:
        """The class of the deployment that makes the calls; None if there is none."""
        last = self.layers[-1]
        return PluginRef(impl=last.impl, config=last.config) if isinstance(last, CustomExecutor) else None


class ToolRef(PluginRef):
    """A tool of an agent, or a toolset. `id` is the function name that the model sees.

    The tools of a toolset have names of their own.
    """

    id: Annotated[str, AfterValidator(_tool_id)] = Field(
        description="The function name that the model sees: 1 to 64 of a-z A-Z 0-9 _ -."
    )
    enabled: bool = Field(default=True, description="Whether the agent has the tool.")
    timeout_ms: int | None = Field(
        default=None,
        ge=1,
        le=LONGEST_MS,
        description="Timeout of one call in milliseconds. It overrides the timeout of the tool. "
        "null: the timeout of the tool.",
    )
    approval: Literal["always", "never"] | None = Field(
        default=None,
        description="Whether each call waits until somebody approves it: always, never. "
        "null: as the tool itself says.",
    )
    approval_timeout_ms: int | None = Field(
        default=None,
        ge=1,
        le=LONGEST_MS,
        description="Milliseconds after which approval_default decides about a call that waits for approval. "
        "null: it waits forever.",
    )
    approval_default: Literal["deny", "approve", "fail"] = Field(
        default="deny",
        description="The decision if nobody decides in time: deny (an error for the model), approve, "
        "fail (the run fails).",
    )
    on_interrupted: Literal["ask", "rerun", "fail"] = Field(
        default="ask",
        description="What happens to an interrupted call of a tool with durable_idempotent = False: "
        "ask (the run pauses until somebody decides), rerun (the call is made again), fail (the run fails).",
    )
    tool_executor: ToolExecutorRef | None = Field(
        default=None,
        description="How the calls of this tool are made, in place of the tool_executor of the agent. "
        "null: as those of the agent.",
    )
    background: bool | None = Field(
        default=None,
        description="Whether a call starts a job by invoke_background, and the run waits for its end. "
        "null: as the tool itself says.",
    )
