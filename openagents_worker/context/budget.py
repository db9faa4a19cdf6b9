"""Assemblers with a token budget: they select the whole turns that fit, and say when a summary is due.

A turn (a question, its tool calls with their results, its answer) is selected as a whole or not at all. Pages
are read from the end of the transcript, or from its beginning, until the budget is used up. So a long session
costs no more than a short one.

Their `metadata`:

| key | meaning |
|---|---|
| `assembler`, `strategy` | the type of the assembler |
| `token_counter` | how tokens are counted: the name of the encoding, or `estimate: bytes/4` |
| `budget_input_tokens` | `max_input_tokens` |
| `kept_tokens` | the tokens of the messages that the run gets, without a summary that is written for it |
| `transcript_size`, `omitted_messages` | the number of stored messages that the run gets, and of the others |
| `omitted_artifacts` | the number of artifacts that the run does not get |
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from openagents_worker.context.base import (
    ContextAssemblerPlugin,
    ContextAssemblyResult,
    Selection,
    StoredTurn,
    TurnReader,
)
from openagents_worker.context.tokens import ESTIMATE, TokenCounter, tokens_of
from openagents_worker.models.omissions import omission_note

__all__ = [
    "Compaction",
    "HeadTailAssembler",
    "ImportanceWeightedAssembler",
    "SlidingWindowAssembler",
    "TokenBudgetAssembler",
]

Ranges = tuple[tuple[int, int], ...]

CANDIDATES = 4
"""`importance_weighted` considers the newest turns with this many times the tokens of its budget."""


class Compaction(BaseModel):
    """When a summary by the model of the agent replaces the oldest turns, and how long it is."""

    model_config = ConfigDict(extra="forbid")

    keep_tokens: int | None = Field(
        None, ge=0, description="Tokens of the newest turns that stay as they are. null: half of the budget."
    )
    max_summary_tokens: int = Field(
        1_000, ge=16, le=32_000, description="Largest number of tokens in a summary."
    )
    instructions: str | None = Field(
        None,
        min_length=1,
        max_length=8_000,
        description="The instructions for the model. null: a general text.",
    )


class TokenBudgetAssembler(ContextAssemblerPlugin):
    """Base class of assemblers with a token budget. `counter` is set when the worker starts."""

    counts_tokens: ClassVar[bool] = True
    strategy: ClassVar[str]
    counter: TokenCounter = ESTIMATE

    class Config(ContextAssemblerPlugin.Config):
        max_input_tokens: int = Field(
            8_000, ge=1, description="Tokens of the transcript and of the model's answer together."
        )
        max_artifacts: int = Field(10, ge=0, description="Number of artifacts, the newest, that a run sees.")
        reserve_for_response: int = Field(
            2_000, ge=0, description="Tokens of max_input_tokens that are left for the model's answer."
        )
        encoding: str | None = Field(
            None,
            min_length=1,
            max_length=100,
            description="Encoding of tiktoken that counts tokens, for example o200k_base. null: that of the "
            "model if the extra tokenizers is installed, else an estimate.",
        )
        compaction: Compaction | None = Field(
            None,
            description="If set, the model summarizes the oldest turns when the budget is used up. null: "
            "turns are left out.",
        )

    @property
    def budget(self) -> int:
        """The tokens that the transcript may have."""
        return max(0, int(self.cfg.max_input_tokens) - int(self.cfg.reserve_for_response))

    async def select(self, *, request: Any, session_manager: TurnReader) -> Selection:
        """Select the turns of a run, and those for which a summary is due."""
        reading = Reading(session_manager, request.session_id, self.counter, self.budget)
        kept = await self.kept_turns(reading, self._left_of(self.budget, session_manager))
        ranges = _ranges(kept)
        begin, end = session_manager.bounds
        shown = sum(last - first for first, last in ranges)
        summarize, with_summary = None, ranges
        if self.cfg.compaction is not None and shown < end - begin:
            summarize, with_summary = await self._compaction(reading, session_manager)
        artifacts = await session_manager.count_artifacts(request.session_id)
        return Selection(
            ranges=ranges,
            summarize=summarize,
            with_summary=with_summary,
            metadata={
                "assembler": self.strategy,
                "strategy": self.strategy,
                "token_counter": self.counter.name,
                "budget_input_tokens": self.cfg.max_input_tokens,
                "kept_tokens": sum(map(reading.cost, kept)),
                "transcript_size": shown,
                "omitted_messages": end - begin - shown,
                "omitted": end - begin - shown,
                "omitted_artifacts": max(0, artifacts - self.cfg.max_artifacts),
            },
        )

    @abstractmethod
    async def kept_turns(self, reading: Reading, budget: int) -> list[StoredTurn]:
        """The turns that fit into this many tokens, in any order."""
        raise NotImplementedError

    def _left_of(self, budget: int, session: TurnReader) -> int:
        return max(0, budget - tokens_of(session.summary, self.counter, budget))

    async def _compaction(
        self, reading: Reading, session: TurnReader
    ) -> tuple[tuple[int, int] | None, Ranges]:
        """The positions to be summarized, and the ranges behind them.

        At most `max_input_tokens` are summarized for one run, the oldest first: a model reads no more. The
        rest of a long session is summarized for the next runs.
        """
        options = self.cfg.compaction
        keep = self.budget // 2 if options.keep_tokens is None else min(options.keep_tokens, self.budget)
        newest = await reading.newest(keep)
        begin, end = session.bounds
        keep_from = min((turn.begin for turn in newest), default=end)
        summarized_to, left = begin, int(self.cfg.max_input_tokens)
        async for turn in session.oldest_turns(reading.session_id):
            left -= reading.cost(turn)
            if turn.end > keep_from or (left < 0 and summarized_to > begin):
                break
            summarized_to = turn.end
        if summarized_to == begin:
            return None, ()
        shown = await reading.newest(max(0, self.budget - options.max_summary_tokens))
        return (begin, summarized_to), _ranges(turn for turn in shown if turn.begin >= summarized_to)

    async def assemble(
        self, *, request: Any, session_state: dict[str, Any], session_manager: Any
    ) -> ContextAssemblyResult:
        selection = await self.select(request=request, session_manager=session_manager)
        return await self.assembled(selection, request=request, session_manager=session_manager)

    async def assembled(
        self, selection: Selection, *, request: Any, session_manager: TurnReader
    ) -> ContextAssemblyResult:
        """The messages and artifacts of a selection."""
        session_id = request.session_id
        begin, end = session_manager.bounds
        ranges = selection.ranges
        if selection.summarize is not None and begin >= selection.summarize[1]:
            ranges = selection.with_summary
        transcript, at = list(session_manager.summary), begin
        for first, last in ranges:
            transcript += [*self.gap(first - at), *await session_manager.load_range(session_id, first, last)]
            at = last
        most = self.cfg.max_artifacts
        return ContextAssemblyResult(
            transcript=[*transcript, *self.gap(end - at)],
            session_artifacts=await session_manager.list_artifacts(session_id, last=most) if most else [],
            metadata=dict(selection.metadata),
        )

    def gap(self, omitted: int) -> list[dict[str, Any]]:
        """The messages that stand for `omitted` messages between two that the run gets."""
        return []


class SlidingWindowAssembler(TokenBudgetAssembler):
    """The newest turns that fit into the budget."""

    strategy = "sliding_window"

    async def kept_turns(self, reading: Reading, budget: int) -> list[StoredTurn]:
        return await reading.newest(budget)


class HeadTailAssembler(TokenBudgetAssembler):
    """The first messages of the session, and the newest turns that fit beside them."""

    strategy = "head_tail"

    class Config(TokenBudgetAssembler.Config):
        head_messages: int = Field(
            3, ge=0, description="Number of messages, the oldest, that a run sees. Whole turns are counted."
        )

    async def kept_turns(self, reading: Reading, budget: int) -> list[StoredTurn]:
        head: list[StoredTurn] = []
        messages, left = 0, budget
        if self.cfg.head_messages:
            async for turn in reading.session.oldest_turns(reading.session_id):
                left -= reading.cost(turn)
                if left < 0:
                    break
                head.append(turn)
                messages += len(turn.entries)
                if messages >= self.cfg.head_messages:
                    break
        left = budget - sum(map(reading.cost, head))
        behind = head[-1].end if head else 0
        return [*head, *await reading.newest(left, behind=behind)]

    def gap(self, omitted: int) -> list[dict[str, Any]]:
        if omitted <= 0:
            return []
        return [omission_note(f"Summary: omitted {omitted} message(s) from the middle.")]


class ImportanceWeightedAssembler(TokenBudgetAssembler):
    """The most important turns that fit: first an opening system message, then turns with tool calls.

    The score of a turn falls by 1 with each message behind it. It begins at 1,000 for an opening system
    message, at 900 for a turn with tool calls, at 800 for another turn, at 500 for an answer without a
    question and at 100 for anything else.
    """

    strategy = "importance_weighted"

    async def kept_turns(self, reading: Reading, budget: int) -> list[StoredTurn]:
        """The most important ones of the newest turns and the first turn that fit into `budget` tokens."""
        turns = await reading.newest(CANDIDATES * budget)
        async for first in reading.session.oldest_turns(reading.session_id):
            if all(first.begin != turn.begin for turn in turns):
                turns.append(first)
            break
        begin, end = reading.session.bounds
        kept = []
        for turn in sorted(turns, key=lambda turn: _importance(turn, begin, end), reverse=True):
            if (cost := reading.cost(turn)) <= budget:
                kept.append(turn)
                budget -= cost
        return kept


def _importance(turn: StoredTurn, begin: int, end: int) -> int:
    roles = {entry["role"] for entry in turn.entries}
    if turn.begin == begin and "system" in roles:
        return 1_000
    age = end - turn.begin
    if "tool" in roles or any(entry.get("tool_messages") for entry in turn.entries):
        return 900 - age
    if "user" in roles:
        return 800 - age
    return (500 if "assistant" in roles else 100) - age


@dataclass
class Reading:
    """The turns of one session as they are read, with their costs in tokens."""

    session: TurnReader
    session_id: str
    counter: TokenCounter
    most: int
    """Tokens. A turn with more of them is never kept, so it counts as one more than that."""
    _costs: dict[int, int] = field(default_factory=dict)
    _newest: list[StoredTurn] = field(default_factory=list)
    _source: Any = None

    def cost(self, turn: StoredTurn) -> int:
        """The tokens of a turn."""
        if turn.begin not in self._costs:
            tokens = tokens_of(turn.entries, self.counter, self.most)
            self._costs[turn.begin] = min(tokens, self.most + 1)
        return self._costs[turn.begin]

    async def newest(self, budget: int, *, behind: int = 0) -> list[StoredTurn]:
        """The newest turns that fit into this many tokens, newest first. `behind`: none before it."""
        kept: list[StoredTurn] = []
        at = 0
        while (turn := await self._turn(at)) is not None and turn.begin >= behind:
            budget -= self.cost(turn)
            if budget < 0:
                break
            kept.append(turn)
            at += 1
        return kept

    async def _turn(self, at: int) -> StoredTurn | None:
        """The turn that is `at` turns from the end. Each one is read once."""
        if self._source is None:
            self._source = self.session.newest_turns(self.session_id)
        while len(self._newest) <= at:
            turn = await anext(self._source, None)
            if turn is None:
                return None
            self._newest.append(turn)
        return self._newest[at]


def _ranges(turns: Iterable[StoredTurn]) -> Ranges:
    """The positions of turns, ascending, with adjacent ones joined."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted((turn.begin, turn.end) for turn in turns):
        if joined and joined[-1][1] >= begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return tuple(joined)
