"""Context assemblers: they select the part of a session's transcript and artifacts that a run gets."""

from openagents_worker.context.assemblers import DefaultAssembler, TruncatingAssembler
from openagents_worker.context.base import ContextAssemblerPlugin
from openagents_worker.context.budget import (
    HeadTailAssembler,
    ImportanceWeightedAssembler,
    SlidingWindowAssembler,
)

__all__ = ["BUILTIN_ASSEMBLERS"]

BUILTIN_ASSEMBLERS: dict[str, type[ContextAssemblerPlugin]] = {
    "default": DefaultAssembler,
    "truncating": TruncatingAssembler,
    "head_tail": HeadTailAssembler,
    "sliding_window": SlidingWindowAssembler,
    "importance_weighted": ImportanceWeightedAssembler,
}
