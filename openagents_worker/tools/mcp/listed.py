"""The tools of a server as the model gets them: names, descriptions, and how their calls are executed."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from openagents_worker.agents.plugin_refs import function_name
from openagents_worker.errors import PluginConfigError
from openagents_worker.suggest import did_you_mean, nearest
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.base import ToolExecutionSpec, ToolPlugin
from openagents_worker.tools.checks import schema_of_tool
from openagents_worker.tools.mcp.options import McpOptions, McpToolOptions, config_error

__all__ = ["ANY_OBJECT", "OWN_TOOLS", "McpTool", "listed_tools"]

log = get_logger(__name__)

MAX_NAME_CHARS = 256
MAX_LOGGED = 20  # of the tools that are left out of one list
MAX_DESCRIPTION_CHARS = 8_000  # a description is in each request to the model
_NO_OPTIONS = McpToolOptions()
ANY_OBJECT = {"type": "object"}
OWN_TOOLS = {
    "list_resources": ("resources", "Lists the resources of the server, with their addresses.", ()),
    "read_resource": ("resources", "Reads a resource of the server.", ("uri",)),
    "list_prompts": ("prompts", "Lists the prompts of the server, with their arguments.", ()),
    "get_prompt": ("prompts", "Gets the messages of a prompt of the server.", ("name",)),
}
"""The tools for resources and prompts: the option that offers them, the description, the arguments."""


class McpTool(ToolPlugin):
    """A tool of a server. `source` is recorded with the run: how the server knows the tool."""

    def __init__(
        self,
        name: str,
        description: str,
        parameters: dict[str, Any],
        spec: ToolExecutionSpec,
        *,
        may_repeat: bool,
        source: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.name, self.description = name, description
        self.durable_idempotent = may_repeat
        self.source = source
        self._parameters = parameters
        self._spec = spec

    def schema(self) -> dict[str, Any]:
        return self._parameters

    def execution_spec(self) -> ToolExecutionSpec:
        return self._spec


def listed_tools(options: McpOptions, tool_id: str, found: Sequence[Mapping[str, Any]]) -> list[McpTool]:
    """The tools that the model gets of those that the server has. `tool_id`: the id in the agents file.

    Raises `PluginConfigError` if a tool whose calls the agents file restricts is not among them: its name may
    be misspelled, and the tool that was meant would be called without the restriction.
    """
    _check_names(options, [name for each in found if isinstance(name := each.get("name"), str)])
    left_out: list[tuple[str, str]] = []
    by_name = _by_name(options, found, left_out)
    if options.as_one_tool:
        tools = [_one_tool(options, tool_id, by_name)]
    else:
        tools = _each_tool(options, tool_id, by_name, left_out)
    for remote, problem in left_out[:MAX_LOGGED]:
        log.warning("mcp.tool_left_out", server=options.server.shown, tool=remote[:200], error=problem)
    if len(left_out) > MAX_LOGGED:
        log.warning("mcp.tools_left_out", server=options.server.shown, tools=len(left_out))
    return tools


def _check_names(options: McpOptions, listed: Sequence[str]) -> None:
    """Report each tool that the agents file names and that the server does not list."""
    known = set(listed)
    unknown = [name for name in dict.fromkeys((*options.overrides, *options.tools)) if name not in known]
    for name in unknown:
        if options.overrides.get(name, _NO_OPTIONS).is_restriction:
            text = f"the server {options.server.shown} does not list a tool {name!r}"
            hint = did_you_mean(name, listed, "it lists")
            raise config_error("overrides", name, text=text, hint=hint)
    for name in unknown[:MAX_LOGGED]:
        meant = nearest(name, listed)
        log.warning("mcp.tool_unknown", server=options.server.shown, tool=name[:200], did_you_mean=meant)


def _each_tool(
    options: McpOptions,
    tool_id: str,
    by_name: Mapping[str, Mapping[str, Any]],
    left_out: list[tuple[str, str]],
) -> list[McpTool]:
    """A tool for each of the server, and those for resources and prompts."""
    # A name that the agents file gives is not taken by another tool of the server.
    taken = {own.name for own in options.overrides.values() if own.name}
    tools = []
    for remote, described in sorted(by_name.items()):
        try:
            tool = _tool(options, remote, described, taken)
        except PluginConfigError as error:
            left_out.append((remote, error.message))
        else:
            taken.add(tool.name)
            tools.append(tool)
    for own, (option, description, arguments) in OWN_TOOLS.items():
        if getattr(options, option):
            tools.append(
                _own_tool(options, function_name(f"{tool_id}_{own}", taken), own, description, arguments)
            )
    return tools


def _by_name(
    options: McpOptions, found: Sequence[Mapping[str, Any]], left_out: list[tuple[str, str]]
) -> dict[str, Mapping[str, Any]]:
    """The tools that the agent gets, by their names on the server. Of two with one name, the first counts."""
    by_name: dict[str, Mapping[str, Any]] = {}
    for described in found:
        remote = described.get("name")
        if not isinstance(remote, str) or (options.tools and remote not in options.tools):
            continue
        if problem := _problem_of(remote, by_name):
            left_out.append((remote, problem))
        else:
            by_name[remote] = described
    return by_name


def _problem_of(name: str, others: Container[str]) -> str:
    """Why a tool with this name cannot be used; '' if it can."""
    if not name:
        return "it has no name"
    if len(name) > MAX_NAME_CHARS:
        return f"its name has more than {MAX_NAME_CHARS} characters"
    return "its name is listed twice" if name in others else ""


def _tool(options: McpOptions, remote: str, described: Mapping[str, Any], taken: set[str]) -> McpTool:
    """The tool as the server describes it. Raises `PluginConfigError` if its schema is not accepted."""
    own = options.overrides.get(remote, _NO_OPTIONS)
    parameters = described.get("inputSchema", ANY_OBJECT)
    schema_of_tool(parameters)
    title = described.get("title")
    text = own.description or described.get("description") or (title if isinstance(title, str) else remote)
    spec, may_repeat = _execution(options, own, _hints(options, described))
    name = own.name or function_name(options.prefix + remote, taken)
    source = {"tool": remote}
    return McpTool(
        name, str(text)[:MAX_DESCRIPTION_CHARS], parameters, spec, may_repeat=may_repeat, source=source
    )


def _hints(options: McpOptions, described: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the server says about calls of a tool; empty if it is not believed."""
    hints = described.get("annotations") if options.trust_annotations else None
    return hints if isinstance(hints, dict) else {}


def _execution(
    options: McpOptions, own: McpToolOptions, hints: Mapping[str, Any]
) -> tuple[ToolExecutionSpec, bool]:
    """How calls are executed, and whether they may be repeated.

    A hint that is absent has the meaning of the protocol: the tool changes something, and a repeated call
    does it twice. An approval is needed only if the server says itself that the tool destroys something.
    """
    reads_only = own.read_only if own.read_only is not None else hints.get("readOnlyHint") is True
    may_repeat = own.idempotent if own.idempotent is not None else (
        reads_only or hints.get("idempotentHint") is True
    )  # fmt: skip
    destroys = hints.get("destructiveHint") is True and not reads_only
    spec = ToolExecutionSpec(
        concurrency_safe=reads_only,
        side_effects="none" if reads_only else "unknown",
        approval_mode=own.approval or ("always" if destroys else "inherit"),
        default_timeout_ms=own.timeout_ms or options.call_timeout_ms,
    )
    return spec, may_repeat


def _own_tool(
    options: McpOptions, name: str, own: str, description: str, arguments: Sequence[str]
) -> McpTool:
    properties: dict[str, Any] = {argument: {"type": "string"} for argument in arguments}
    if own == "get_prompt":
        properties["arguments"] = {"type": "object", "additionalProperties": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": list(arguments)}
    spec = ToolExecutionSpec(
        concurrency_safe=True, side_effects="none", default_timeout_ms=options.call_timeout_ms
    )
    return McpTool(name, description, schema, spec, may_repeat=True, source={"own": own})


def _one_tool(options: McpOptions, tool_id: str, by_name: Mapping[str, Mapping[str, Any]]) -> McpTool:
    """One tool for all of the server, as the original SDK has it. No call may be repeated.

    Each call waits for an approval if the server says of one of the tools that it destroys something.
    """
    names = list(by_name)
    schema = {
        "type": "object",
        "properties": {
            "tool": {"type": "string", **({"enum": names} if names else {})},
            "arguments": {"type": "object"},
        },
        "required": ["tool"],
    }
    text = "\n".join(
        [f"Calls a tool of the MCP server {options.server.shown}:"]
        + [f"- {name}: {str(tool.get('description') or '').strip()[:500]}" for name, tool in by_name.items()]
    )  # fmt: skip
    modes = {
        _execution(options, _NO_OPTIONS, _hints(options, each))[0].approval_mode for each in by_name.values()
    }
    spec = ToolExecutionSpec(
        default_timeout_ms=options.call_timeout_ms, approval_mode="always" if "always" in modes else "inherit"
    )
    return McpTool(
        tool_id, text[:MAX_DESCRIPTION_CHARS], schema, spec, may_repeat=False, source={"one": True}
    )
