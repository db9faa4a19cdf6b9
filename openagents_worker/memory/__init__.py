"""Memories: what a session remembers from run to run. A memory's module is loaded when it is used."""

from collections.abc import Mapping

from openagents_worker.loaded_at_use import LoadedAtUse
from openagents_worker.memory.base import MemoryPlugin

__all__ = ["BUILTIN_MEMORIES"]

_PLACES = {
    "buffer": "buffer:BufferMemory",
    "window_buffer": "buffer:WindowBufferMemory",
    "chain": "chain:ChainMemory",
    "markdown_memory": "markdown:MarkdownMemory",
    "zep": "zep:ZepMemory",
}
"""The module in this package and the class, by type."""

BUILTIN_MEMORIES: Mapping[str, type[MemoryPlugin]] = LoadedAtUse(__name__, _PLACES)
