"""The session of a run: the only place that reads it as it was when the run started.

The transcript only grows at its end, and a summary never removes the messages that it stands for. So its
length and the number of the summary determine what a run sees, in every attempt.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from openagents_worker.context.base import StoredTurn
from openagents_worker.llm.transcript import is_continuation, summary_entries, turns_of, usable_entries
from openagents_worker.runtime.history import RunStart
from openagents_worker.store.held_turns import HeldTurn
from openagents_worker.store.paging import PageSize
from openagents_worker.store.sessions import SessionStore, TranscriptSummary

__all__ = ["SessionAtStart"]

FIRST_PAGE_MESSAGES = 20
MAX_PAGE_MESSAGES = 50  # more than the budget of an assembler needs: what is read in vain costs time


class SessionAtStart:
    """The session as it was when the run started, without what other runs appended since.

    Behind the stored messages are those that runs above this one hold for shared children: they have
    positions, too. `current_summary` stands for the oldest messages. It changes when a summary is written for
    the run.
    """

    def __init__(
        self,
        sessions: SessionStore,
        start: RunStart,
        summary: TranscriptSummary | None,
        held: Sequence[HeldTurn] = (),
    ) -> None:
        self._sessions = sessions
        self._start = start
        self._held_messages = [message for turn in held for message in turn.messages]
        self._held_artifacts = [artifact for turn in held for artifact in turn.artifacts]
        self.current_summary = summary
        self._read: dict[int, Any] = {}  # messages by position: what was selected is not read again

    @property
    def summary(self) -> list[dict[str, Any]]:
        """The messages that stand for the oldest turns; empty if there is no summary."""
        return summary_entries(self.current_summary.text) if self.current_summary is not None else []

    @property
    def bounds(self) -> tuple[int, int]:
        """The positions of the first message behind the summary, and of the end of the transcript."""
        end = self._start.transcript_length + len(self._held_messages)
        return min(end, self.current_summary.messages if self.current_summary is not None else 0), end

    async def load_messages(self, session_id: str, *, last: int | None = None) -> list[dict[str, Any]]:
        """The summary if there is one, and the complete turns behind it, the oldest first.

        `last` limits the turns to the newest entries.
        """
        begin, end = self.bounds
        if begin == end:
            return self.summary
        begin = begin if last is None else max(begin, end - last)
        stored = self._start.transcript_length
        entries: list[Any] = []
        if begin < stored:
            entries = await self._sessions.load_messages(session_id, upto=stored, begin=begin)
        return [*self.summary, *usable_entries([*entries, *self._held_between(begin, end)])]

    async def list_artifacts(self, session_id: str, *, last: int | None = None) -> list[Any]:
        stored, held = self._start.artifact_count, self._held_artifacts
        last = stored + len(held) if last is None else last
        found: list[Any] = held[max(0, len(held) - last) :]
        if stored and last > len(found):
            more = await self._sessions.list_artifacts(session_id, last=last - len(found), upto=stored)
            found = [*more, *found]
        return found

    async def count_messages(self, session_id: str) -> int:
        begin, end = self.bounds
        return len(self.summary) + end - begin

    async def count_artifacts(self, session_id: str) -> int:
        return self._start.artifact_count + len(self._held_artifacts)

    async def load_range(self, session_id: str, begin: int, end: int) -> list[dict[str, Any]]:
        """The usable messages between two positions."""
        entries: list[Any] = []
        size = PageSize(first=FIRST_PAGE_MESSAGES, max_count=MAX_PAGE_MESSAGES)
        while begin < end:
            to = min(end, begin + size.count)
            entries += await self._page(session_id, begin, to, size)
            begin = to
        return usable_entries(entries)

    async def newest_turns(self, session_id: str) -> AsyncIterator[StoredTurn]:
        """The turns behind the summary, newest first. Reads no more pages than are consumed."""
        begin, at = self.bounds
        size = PageSize(first=FIRST_PAGE_MESSAGES, max_count=MAX_PAGE_MESSAGES)
        rest: list[Any] = []  # the end of a turn whose beginning is not read yet
        while at > begin:
            from_ = max(begin, at - size.count)
            entries = [*await self._page(session_id, from_, at, size), *rest]
            whole = 0
            if from_ > begin:
                while whole < len(entries) and is_continuation(entries[whole]):
                    whole += 1
            for turn in reversed(turns_of(entries[whole:], from_ + whole)):
                yield StoredTurn(*turn)
            rest, at = entries[:whole], from_

    async def oldest_turns(self, session_id: str) -> AsyncIterator[StoredTurn]:
        """The turns behind the summary, oldest first. Reads no more pages than are consumed."""
        at, end = self.bounds
        size = PageSize(first=FIRST_PAGE_MESSAGES, max_count=MAX_PAGE_MESSAGES)
        rest: list[Any] = []  # the beginning of a turn whose end is not read yet
        while at < end:
            to = min(end, at + size.count)
            entries = [*rest, *await self._page(session_id, at, to, size)]
            turns = turns_of(entries, at - len(rest))
            rest = []
            if to < end:
                begin, last, _ = turns.pop()
                rest = entries[begin - last :]
            for turn in turns:
                yield StoredTurn(*turn)
            at = to

    async def _page(self, session_id: str, begin: int, end: int, size: PageSize) -> list[Any]:
        if all(position in self._read for position in range(begin, end)):
            return [self._read[position] for position in range(begin, end)]
        entries: list[Any] = []
        stored = min(end, self._start.transcript_length)
        if begin < stored:
            entries, read = await self._sessions.load_between(session_id, begin, stored)
            size.learn(len(entries), read)
        entries += self._held_between(begin, end)
        self._read.update(enumerate(entries, begin))
        return entries

    def _held_between(self, begin: int, end: int) -> list[Any]:
        """The messages between two positions that are not stored in the session yet."""
        first = self._start.transcript_length
        return self._held_messages[max(0, begin - first) : max(0, end - first)]
