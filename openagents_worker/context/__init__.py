"""Context assemblers: they select the part of a session's transcript and artifacts that a run gets."""

from openagents_worker.context.assemblers import DefaultAssembler, TruncatingAssembler
from openagents_worker.context.base import ContextAssemblerPlugin

__all__ = ["BUILTIN_ASSEMBLERS"]

BUILTIN_ASSEMBLERS: dict[str, type[ContextAssemblerPlugin]] = {
    "default": DefaultAssembler,
    "truncating": TruncatingAssembler,
}
