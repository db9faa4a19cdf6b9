"""Context assemblers: which part of the past a run sees."""

from openagents_worker.context.assemblers import DefaultAssembler, TruncatingAssembler
from openagents_worker.context.base import ContextAssemblerPlugin

__all__ = ["BUILTIN_ASSEMBLERS"]

BUILTIN_ASSEMBLERS: dict[str, type[ContextAssemblerPlugin]] = {
    "default": DefaultAssembler,
    "truncating": TruncatingAssembler,
}
