"""The token counter of an agent: the only place that decides whether an agent needs one, and which."""

from __future__ import annotations

from openagents_worker.agents import AgentDefinition
from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.context.tokens import TokenCounter, token_counter

__all__ = ["counter_of"]


def counter_of(agent: AgentDefinition) -> TokenCounter | None:
    """The counter for the context assembler of an agent, with its tokenizer loaded. None if it needs none.

    Loading a tokenizer may take seconds, so this must not run on the event loop.
    """
    ref = agent.context_assembler
    if ref is None or not getattr(BUILTIN_ASSEMBLERS.get(ref.type or ""), "counts_tokens", False):
        return None
    encoding = ref.config.get("encoding")
    return token_counter(agent.llm.model, encoding if isinstance(encoding, str) else None)
