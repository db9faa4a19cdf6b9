"""The built-in tools, by their `type` in the agents file. A tool's module is loaded when it is used."""

from __future__ import annotations

from collections.abc import Mapping

from openagents_worker.agents.plugin import Plugin
from openagents_worker.loaded_at_use import LoadedAtUse
from openagents_worker.tools.base import ToolPlugin

__all__ = ["BUILTIN_TOOLS", "BUILTIN_TOOLSETS", "TOOL_TYPES"]

_PLACES = {
    "builtin_search": "documents:BuiltinSearch",
    "calc": "compute:Calc",
    "current_time": "clock:CurrentTime",
    "date_diff": "clock:DateDiff",
    "date_parse": "clock:DateParse",
    "delegate": "delegation:Delegate",
    "delete_file": "files:DeleteFile",
    "execute_command": "commands:ExecuteCommand",
    "get_env": "environment:GetEnv",
    "grep_files": "grep:GrepFiles",
    "host_lookup": "urls:HostLookup",
    "http_request": "http:HttpRequest",
    "json_parse": "text:JsonParse",
    "list_files": "files:ListFiles",
    "min_max": "compute:MinMax",
    "percentage": "compute:Percentage",
    "query_param": "urls:QueryParam",
    "random_choice": "randomness:RandomChoice",
    "random_int": "randomness:RandomInt",
    "random_string": "randomness:RandomString",
    "read_file": "files:ReadFile",
    "remember_preference": "remember:RememberPreference",
    "ripgrep": "ripgrep:Ripgrep",
    "save_artifact": "artifacts:SaveArtifact",
    "set_env": "environment:SetEnv",
    "shell_exec": "commands:ShellExec",
    "tavily_search": "tavily:TavilySearch",
    "text_transform": "text:TextTransform",
    "transfer": "delegation:Transfer",
    "url_build": "urls:URLBuild",
    "url_parse": "urls:URLParse",
    "uuid": "randomness:MakeUUID",
    "write_file": "files:WriteFile",
}
"""The module in this package and the class, by type."""

_TOOLSETS = {"mcp": "mcp_server:McpToolset"}


BUILTIN_TOOLS: Mapping[str, type[ToolPlugin]] = LoadedAtUse(__name__, _PLACES)

BUILTIN_TOOLSETS: Mapping[str, type[Plugin]] = LoadedAtUse(__name__, _TOOLSETS)
"""Each attempt of a run has an instance of its own, which knows the tools of the run."""

TOOL_TYPES: Mapping[str, type[Plugin]] = LoadedAtUse(__name__, {**_PLACES, **_TOOLSETS})
"""Both: what the `type` of a tool in the agents file may be."""
