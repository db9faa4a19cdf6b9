"""The context of a pattern of the original SDK: the only place that calls its `setup`.

The pattern gets the context of the run, whatever context its `setup` has made. What `setup` has put into its
own context is kept.
"""

from __future__ import annotations

import inspect
from typing import Any

from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.original.package import PACKAGE, is_instance, loaded

__all__ = ["set_up"]

OPTIONAL = (
    "transcript",
    "session_artifacts",
    "assembly_metadata",
    "run_request",
    "tool_executor",
    "usage",
    "artifacts",
)
"""Parameters that `setup` need not have."""


async def set_up(pattern: Any, context: AttemptContext) -> None:
    """Call the pattern's `setup` and set its `context`. Its exceptions are raised."""
    made = None
    if hasattr(pattern, "setup"):
        done = pattern.setup(**_arguments(pattern, context))
        if inspect.isawaitable(done):
            await done
        made = getattr(pattern, "context", None)
    pattern.context = context if made is None or made is context else _joined(context, made)


def _arguments(pattern: Any, context: AttemptContext) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "agent_id": context.agent_id,
        "session_id": context.session_id,
        "input_text": context.input_text,
        "state": context.state,
        "tools": context.tools,
        "llm_client": context.llm_client,
        "llm_options": context.llm_options,
        "event_bus": context.event_bus,
        "transcript": context.transcript,
        "session_artifacts": context.session_artifacts,
        "assembly_metadata": context.assembly_metadata,
        "run_request": context.run_request,
        "tool_executor": None,
        "usage": context.usage,
        "artifacts": context.artifacts,
    }
    if is_instance(pattern, "interfaces.pattern", "PatternPlugin"):
        arguments |= _of_package(context)
    taken = inspect.signature(pattern.setup).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in taken or name not in OPTIONAL}


def _of_package(context: AttemptContext) -> dict[str, Any]:
    """The arguments that the package's own `setup` accepts only as instances of its classes."""
    artifact = loaded("interfaces.session", "SessionArtifact")
    request = loaded("interfaces.runtime", "RunRequest")
    fields = context.run_request.model_dump(exclude={"output_type", "durable"}, exclude_none=True)
    return {
        "run_request": request(**{name: fields[name] for name in fields if name in request.model_fields}),
        "usage": loaded("interfaces.runtime", "RunUsage")(**context.usage.model_dump()),
        "session_artifacts": [
            artifact(name=each.name, kind=each.kind, payload=each.payload, metadata=dict(each.metadata))
            for each in context.session_artifacts
        ],
        "artifacts": [],
    }


def _joined(context: AttemptContext, made: Any) -> Any:
    """The context of the run with what `setup` has put into the context that it made."""
    for name in ("memory_view", "scratch", "skill_metadata"):
        if isinstance(own := getattr(made, name, None), dict):
            getattr(context, name).update(own)
    if isinstance(own := getattr(made, "system_prompt_fragments", None), list):
        context.system_prompt_fragments += [
            each for each in own if each not in context.system_prompt_fragments
        ]
    if isinstance(own := getattr(made, "input_text", None), str) and own != context.input_text:
        context.run_request = context.run_request.model_copy(update={"input_text": own})
    context.active_skill = getattr(made, "active_skill", None) or context.active_skill
    is_of_package = type(made).__module__.startswith(f"{PACKAGE}.")
    return context if is_of_package else JoinedContext(context, made)


class JoinedContext:
    """The context of the run, and the attributes that only the context of the pattern's `setup` has."""

    def __init__(self, context: AttemptContext, made: Any) -> None:
        self.__dict__.update(_context=context, _made=made)

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._context, name)
        except AttributeError:
            return getattr(self._made, name)

    def __setattr__(self, name: str, value: Any) -> None:
        holder = self._context if hasattr(self._context, name) else self._made
        setattr(holder, name, value)
