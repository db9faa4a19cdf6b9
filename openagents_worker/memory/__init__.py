"""Memories: what a session remembers from run to run."""

from openagents_worker.memory.base import MemoryPlugin
from openagents_worker.memory.buffer import BufferMemory, WindowBufferMemory

__all__ = ["BUILTIN_MEMORIES"]

BUILTIN_MEMORIES: dict[str, type[MemoryPlugin]] = {
    "buffer": BufferMemory,
    "window_buffer": WindowBufferMemory,
}
