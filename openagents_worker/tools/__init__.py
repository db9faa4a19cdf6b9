"""Tools: what an agent can do. The contract is in `base`, what we ship in `builtin`."""

from openagents_worker.tools.base import ToolContext, ToolExecutionSpec, ToolPlugin
from openagents_worker.tools.function import tool
from openagents_worker.tools.typed import TypedTool

__all__ = ["ToolContext", "ToolExecutionSpec", "ToolPlugin", "TypedTool", "tool"]
