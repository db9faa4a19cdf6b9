"""The built-in tools, by their `type` in the agents file. A tool's module is loaded when it is used."""

from __future__ import annotations

from collections.abc import Mapping

from openagents_worker.loaded_at_use import LoadedAtUse
from openagents_worker.tools.base import ToolPlugin

__all__ = ["BUILTIN_TOOLS"]

_PLACES = {
    "calc": "compute:Calc",
    "current_time": "clock:CurrentTime",
    "date_diff": "clock:DateDiff",
    "date_parse": "clock:DateParse",
    "delete_file": "files:DeleteFile",
    "grep_files": "grep:GrepFiles",
    "http_request": "http:HttpRequest",
    "json_parse": "text:JsonParse",
    "list_files": "files:ListFiles",
    "min_max": "compute:MinMax",
    "percentage": "compute:Percentage",
    "read_file": "files:ReadFile",
    "ripgrep": "grep:GrepFiles",  # the original SDK's second name for this tool
    "save_artifact": "artifacts:SaveArtifact",
    "text_transform": "text:TextTransform",
    "write_file": "files:WriteFile",
}
"""The module in this package and the class, by type."""


BUILTIN_TOOLS: Mapping[str, type[ToolPlugin]] = LoadedAtUse(__name__, _PLACES)
