"""Unknown agents. The only place that says what to do about one, without listing those that there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["agent_hint"]

NEAR = 0.7  # of difflib's ratio: two letters of seven differ; what is farther away is not a misspelling


def agent_hint(agent_id: str, known: Iterable[str]) -> str:
    """What to do about an unknown agent. It names the agent that was probably meant, and no other: whoever
    may submit runs need not learn which agents there are."""
    near = difflib.get_close_matches(agent_id, list(known), n=1, cutoff=NEAR)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{guess}an agent is known once a worker that can serve it was started; `openagents-worker status` "
        "lists those that are, `openagents-worker validate` says why one cannot be served"
    )
