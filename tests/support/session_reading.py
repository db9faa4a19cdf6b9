"""Sessions for context assemblers. Real: the reader. The store is a list that counts what is read."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.context.base import ContextAssemblyResult
from openagents_worker.jsontext import dumps
from openagents_worker.runtime.history import RunStart
from openagents_worker.runtime.session_at_start import SessionAtStart
from openagents_worker.store.held_turns import HeldTurn
from openagents_worker.store.sessions import TranscriptSummary

__all__ = ["StoredSession", "assemble", "turn"]


def turn(number: int, *, words: int = 1, tool: bool = False) -> list[dict[str, Any]]:
    """A stored turn: question and answer with so many words each. `tool`: with a tool call between them."""
    ids = {"run_id": f"r{number}", "agent_id": "a"}
    answer = {"role": "assistant", "content": " ".join([f"a{number}"] * words), **ids, "is_error": False}
    if tool:
        call = {"id": f"c{number}", "name": "look", "arguments": {"n": number}}
        answer["tool_messages"] = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{number}", "name": "look", "content": f"seen {number}"},
        ]
    return [{"role": "user", "content": " ".join([f"q{number}"] * words), **ids}, answer]


class StoredSession:
    """A stored session. `read` counts the messages and artifacts that were read, `read_chars` their size.

    `held` of the messages and of the artifacts, the last ones, are not stored in it yet: other runs hold
    them.
    """

    def __init__(
        self,
        entries: Sequence[Any],
        *,
        artifacts: int = 0,
        summary: TranscriptSummary | None = None,
        held: int = 0,
    ):
        self.entries = list(entries)
        self.artifacts = [f"artifact {number}" for number in range(artifacts)]
        self.read = self.read_chars = 0
        stored, in_store = max(0, len(self.entries) - held), max(0, artifacts - held)
        turn = HeldTurn(messages=self.entries[stored:], artifacts=cast("Any", self.artifacts[in_store:]))
        start = RunStart(stored, in_store, "", epoch=summary.epoch if summary else 0)
        self.reader = SessionAtStart(cast("Any", self), start, summary, [turn])

    async def load_messages(
        self, session_id: str, *, last: int | None = None, upto: int, begin: int = 0
    ) -> list[Any]:
        begin = begin if last is None else max(begin, upto - last)
        return (await self.load_between(session_id, begin, upto))[0]

    async def load_between(self, session_id: str, begin: int, end: int) -> tuple[list[Any], int]:
        page = self.entries[begin:end]
        size = len(dumps(page))
        self.read += len(page)
        self.read_chars += size
        return [dict(entry) for entry in page], size

    async def list_artifacts(self, session_id: str, *, last: int | None = None, upto: int) -> list[Any]:
        begin = 0 if last is None else max(0, upto - last)
        self.read += upto - begin
        return self.artifacts[begin:upto]


async def assemble(
    kind: str, session: StoredSession, *, counter: Any = None, **config: Any
) -> ContextAssemblyResult:
    """What a built-in assembler gives to a run."""
    assembler: Any = BUILTIN_ASSEMBLERS[kind](config)
    if counter is not None:
        assembler.counter = counter
    request = SimpleNamespace(session_id="s1")
    result: ContextAssemblyResult = await assembler.assemble(
        request=request, session_state={}, session_manager=session.reader
    )
    return result
