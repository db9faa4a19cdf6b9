"""The tools of a run: the only place that lists the tools of toolsets and records which tools there were.

A run keeps the tools that it began with. The list of a toolset is a recorded call, so later attempts get the
same list. The single tools belong to the program of the worker; checkpoint 0 holds their digests. A run goes
on with a single tool that has changed meanwhile, unless it contradicts its journal: then the error of the run
names the tool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from openagents_worker.agents.plugin_refs import TOOL_ID, ToolExecutorRef
from openagents_worker.errors import (
    OpenAgentsError,
    PatternError,
    PluginConfigError,
    ToolNotFoundError,
    text_of,
)
from openagents_worker.jsontext import canonical_json
from openagents_worker.llm.base import CallInfo
from openagents_worker.models.base import from_known_fields
from openagents_worker.runtime.assembly import AgentParts
from openagents_worker.runtime.calls.tool_call import NO_RULES, BoundTool, ToolPolicy
from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.journal import Record, digest_of
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.runtime.user_code import described_in_log, executing, user_error_of
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.base import Reconciled, ToolExecutionSpec, ToolPlugin
from openagents_worker.tools.checks import schema_of_tool
from openagents_worker.tools.executors import CallRules
from openagents_worker.tools.jobs import JobHandle
from openagents_worker.tools.specs import check_dependencies, declared_spec
from openagents_worker.tools.toolset import JobsOfToolset, Toolset

__all__ = ["RunTools"]

log = get_logger(__name__)

NAMES = "list() returns tools with different names, 1 to 64 of a-z A-Z 0-9 _ -"
TWICE = "give one of them another name; for the tools of an MCP server, set prefix in its config"
MAX_LISTED_TOOLS = 1_000  # their schemas are read on the event loop; a model accepts a few hundred


class RunTools:
    """The tools of one attempt. `start` is checkpoint 0 of the run, None if no earlier attempt stored it."""

    def __init__(
        self, parts: AgentParts, context: AttemptContext, recorder: Recorder, start: Record | None
    ) -> None:
        self._toolsets = parts.toolsets
        self._context = context
        self._recorder = recorder
        self._start = start
        definition = parts.definition
        self._refs = {ref.id: ref for ref in definition.tools}
        self.rules, executor = _made_by(parts, definition.tool_executor)
        self._of_agent = self.rules, executor
        self._of_tool = {
            ref.id: _made_by(parts, ref.tool_executor)
            for ref in definition.tools
            if ref.enabled and ref.tool_executor is not None
        }
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._single = {
            id_: self._bind(id_, tool, id_, self._toolsets[id_]) for id_, tool in parts.single_tools().items()
        }
        self._digests = {id_: _digest(tool) for id_, tool in self._single.items()}

    def at_start(self) -> dict[str, Any]:
        """What checkpoint 0 holds: the digests of the single tools by id, and the ids of the toolsets."""
        toolsets = [id_ for id_ in self._toolsets if id_ not in self._single]
        return {"tools": self._digests, **({"toolsets": toolsets} if toolsets else {})}

    def changed(self) -> list[str]:
        """The single tools that are not as they were at checkpoint 0, also those that are new or gone.

        Empty if an earlier version began the run: it has stored no digests.
        """
        recorded = self._start.outcome.get("tools") if self._start is not None else None
        if not isinstance(recorded, dict):
            return []
        current = self._digests
        return [id_ for id_ in sorted({*recorded, *current}) if recorded.get(id_) != current.get(id_)]

    async def all(self) -> list[BoundTool]:
        """All tools of the run. Raises `PluginConfigError` if the list of a toolset is not valid, or if the
        agent does not have a tool that another one calls."""
        tools = dict(self._single)
        for toolset_id in self._toolset_ids():
            toolset = self._toolsets.get(toolset_id)
            if toolset is None or toolset_id in self._single:
                toolset = RemovedToolset(toolset_id)
            tools_of_set = await self._listed(toolset_id, toolset)
            if (recorded := getattr(toolset, "recorded", None)) is not None:
                recorded(tools_of_set)
            for listed in tools_of_set:
                if listed.name in tools:
                    raise _not_valid(toolset_id, f"the agent already has a tool {listed.name!r}", TWICE)
                tools[listed.name] = self._bind(listed.name, listed, toolset_id, toolset)
        for tool in self._single.values():
            check_dependencies(tool.plugin, tool.tool_id, tools)
        return list(tools.values())

    def _toolset_ids(self) -> list[str]:
        """The toolsets with which the run began. Runs of earlier versions began without any."""
        ids = (self.at_start() if self._start is None else self._start.outcome).get("toolsets", [])
        return [id_ for id_ in ids if isinstance(id_, str)] if isinstance(ids, list) else []

    def _bind(self, tool_id: str, plugin: Any, source_id: str, toolset: Toolset) -> BoundTool:
        """A tool with the limits and the executor that the agents file has for its source."""
        rules, executor = self._of_tool.get(source_id, self._of_agent)
        ref = self._refs.get(source_id)
        tool = BoundTool(
            tool_id,
            plugin,
            toolset,
            timeout_ms=None if ref is None else ref.timeout_ms,
            rules=rules,
            policy=ToolPolicy() if ref is None else ToolPolicy.of(ref),
            executor=executor,
        )
        if source_id in self._of_tool and rules.max_concurrency is not None:
            tool.slots = self._slots.setdefault(source_id, asyncio.Semaphore(rules.max_concurrency))
        return tool

    async def _listed(self, toolset_id: str, toolset: Toolset) -> list[ListedTool]:
        """The tools of a toolset when the run began: from the journal, or by listing them now."""
        make = partial(self._list, toolset_id, toolset)
        listed = await self._recorder.call("tools", "list", digest_of(canonical_json(toolset_id)), make)
        with translate_parse_errors(WRITTEN):
            return [_listed_tool(described, toolset_id, toolset) for described in listed]

    async def _list(self, toolset_id: str, toolset: Toolset, _: CallInfo) -> Outcome:
        try:
            prefix = f"toolset {toolset_id}: "
            with executing("tool", toolset_id, wrap=PatternError, prefix=prefix):
                tools = await toolset.list(self._context)
                return Outcome(value=_descriptions(toolset_id, tools))
        except OpenAgentsError as error:
            fields = described_in_log(error)
            log.warning(
                "toolset.not_listed",
                run_id=self._context.run_id,
                agent_id=self._context.agent_id,
                toolset_id=toolset_id,
                **fields,
                user_error=user_error_of(error),
            )
            return Outcome(error=error)


def _made_by(parts: AgentParts, ref: ToolExecutorRef | None) -> tuple[CallRules, Any]:
    """What an executor says about calls, and the executor of the deployment inside it, if there is one."""
    return (NO_RULES, None) if ref is None else (CallRules.of(ref.layers), parts.executor(ref))


class RemovedToolset:
    """A toolset that the agents file no longer has. Its recorded calls stay, and every other call fails."""

    def __init__(self, toolset_id: str) -> None:
        self._toolset_id = toolset_id

    async def open(self) -> None: ...

    async def list(self, context: Any) -> Sequence[ToolPlugin]:
        return []

    async def call(self, tool_id: str, params: dict[str, Any], context: Any) -> Any:
        raise ToolNotFoundError(f"the agent no longer has the toolset {self._toolset_id!r}", tool_id)

    async def reconcile(self, *_: Any) -> Reconciled:
        return Reconciled.unknown()

    has_jobs = True
    """A job that was started is not asked for: its call fails like any other."""

    async def jobs(self) -> JobsOfToolset:
        raise ToolNotFoundError(f"the agent no longer has the toolset {self._toolset_id!r}")

    async def close(self) -> None: ...


class ListedTool(ToolPlugin):
    """A tool as its toolset has described it. `described` is an element of `_descriptions`."""

    def __init__(self, described: Mapping[str, Any], toolset_id: str, toolset: Any) -> None:
        super().__init__()
        self.toolset_id = toolset_id
        self._toolset = toolset
        self.name, self.description = described["name"], described["description"]
        self.durable_idempotent = not described["once"]
        self.source: Mapping[str, Any] | None = described.get("source")
        """What the toolset has said about itself for later calls of this tool."""
        self._parameters: dict[str, Any] = described["parameters"]
        made_by_toolset = {"supports_streaming": False, "cpu_bound": False}  # it makes the calls, whole
        self._spec = from_known_fields(ToolExecutionSpec, {**described["spec"], **made_by_toolset})

    def schema(self) -> dict[str, Any]:
        return self._parameters

    def execution_spec(self) -> ToolExecutionSpec:
        return self._spec

    async def reconcile(self, params: dict[str, Any], idempotency_key: str, context: Any) -> Any:
        return await self._toolset.reconcile(self.name, params, idempotency_key, context)


class ListedToolWithJobs(ListedTool):
    """A tool of a toolset that can start jobs."""

    async def invoke_background(self, params: dict[str, Any], context: Any) -> JobHandle:
        jobs: JobsOfToolset = await self._toolset.jobs()
        return await jobs.invoke_background(self.name, params, context)

    async def poll_job(self, handle: JobHandle, context: Any) -> Any:
        jobs: JobsOfToolset = await self._toolset.jobs()
        return await jobs.poll_job(self.name, handle, context)

    async def cancel_job(self, handle: JobHandle, context: Any) -> bool:
        jobs: JobsOfToolset = await self._toolset.jobs()
        return await jobs.cancel_job(self.name, handle, context)


def _listed_tool(described: Mapping[str, Any], toolset_id: str, toolset: Any) -> ListedTool:
    kind = ListedToolWithJobs if getattr(toolset, "has_jobs", False) else ListedTool
    return kind(described, toolset_id, toolset)


def _descriptions(toolset_id: str, tools: Any) -> list[dict[str, Any]]:
    """What is recorded of the tools of a toolset. Raises `PluginConfigError` if one cannot be used."""
    if not isinstance(tools, list | tuple):
        raise _not_valid(toolset_id, f"list() returned a {type(tools).__name__}, not a list")
    if len(tools) > MAX_LISTED_TOOLS:
        raise _not_valid(toolset_id, f"it has {len(tools):,} tools, {MAX_LISTED_TOOLS:,} are allowed")
    return [_description(toolset_id, tool) for tool in tools]


def _description(toolset_id: str, tool: Any) -> dict[str, Any]:
    if not hasattr(tool, "describe"):
        raise _not_valid(toolset_id, f"list() returned a {type(tool).__name__}, which is not a tool")
    described = tool.describe()
    name, parameters = text_of(described.get("name")), described.get("parameters") or {"type": "object"}
    if not TOOL_ID.match(name):
        raise _not_valid(toolset_id, f"a tool has the name {name!r}")
    try:
        schema_of_tool(parameters)
    except PluginConfigError as error:
        raise _not_valid(toolset_id, f"{name!r}: {error.message}") from error
    spec = declared_spec(tool, name)
    source = getattr(tool, "source", None)
    return {
        "name": name,
        "description": text_of(described.get("description") or ""),
        "parameters": parameters,
        "spec": spec.model_dump(exclude_defaults=True),
        "once": not getattr(tool, "durable_idempotent", True),
        **({"source": dict(source)} if source else {}),
    }


def _not_valid(toolset_id: str, problem: str, hint: str = NAMES) -> PluginConfigError:
    return PluginConfigError(f"the tools of {toolset_id!r} cannot be used: {problem}", hint=hint)


def _digest(tool: BoundTool) -> str:
    """The digest of what a model sees of a tool; empty if it is not JSON and cannot be sent to a model."""
    try:
        return digest_of(canonical_json(tool.description))
    except (TypeError, ValueError, RecursionError):
        return ""
