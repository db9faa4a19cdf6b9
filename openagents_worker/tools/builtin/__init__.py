"""The built-in tools, by their `type` in the agents file."""

from openagents_worker.tools.base import ToolPlugin
from openagents_worker.tools.builtin.artifacts import SaveArtifact
from openagents_worker.tools.builtin.clock import CurrentTime, DateDiff, DateParse
from openagents_worker.tools.builtin.compute import Calc, MinMax, Percentage
from openagents_worker.tools.builtin.files import DeleteFile, GrepFiles, ListFiles, ReadFile, WriteFile
from openagents_worker.tools.builtin.http import HttpRequest
from openagents_worker.tools.builtin.text import JsonParse, TextTransform

__all__ = ["BUILTIN_TOOLS"]

BUILTIN_TOOLS: dict[str, type[ToolPlugin]] = {
    "calc": Calc,
    "current_time": CurrentTime,
    "date_diff": DateDiff,
    "date_parse": DateParse,
    "delete_file": DeleteFile,
    "grep_files": GrepFiles,
    "http_request": HttpRequest,
    "json_parse": JsonParse,
    "list_files": ListFiles,
    "min_max": MinMax,
    "percentage": Percentage,
    "read_file": ReadFile,
    "ripgrep": GrepFiles,  # the original SDK's second name for this tool
    "save_artifact": SaveArtifact,
    "text_transform": TextTransform,
    "write_file": WriteFile,
}
