"""Tools: functions that a model can call. The contract is in `base`, the built-in tools are in `builtin`."""

from openagents_worker.tools.base import ToolContext, ToolExecutionSpec, ToolPlugin
from openagents_worker.tools.function import tool
from openagents_worker.tools.jobs import JobHandle, JobStatus
from openagents_worker.tools.toolset import Toolset
from openagents_worker.tools.typed import TypedTool

__all__ = [
    "JobHandle",
    "JobStatus",
    "ToolContext",
    "ToolExecutionSpec",
    "ToolPlugin",
    "Toolset",
    "TypedTool",
    "tool",
]
