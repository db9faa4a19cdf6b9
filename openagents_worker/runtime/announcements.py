"""Announcements: the only place that knows which calls of a run watchers have already seen begin.

A call that is made again by a later attempt has the same id. Watchers see it begin once in each life of its
run, and again when its tool is executed again after a failed try or after an interruption. If the run is
suspended in a call, that is stored as a fact, in the same script as the suspension. Otherwise, the question
about the approval, the intent or the job of the call says it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from openagents_worker.llm.base import CallInfo
from openagents_worker.runtime.approvals import Approvals
from openagents_worker.runtime.effects import Effect, Effects
from openagents_worker.runtime.history import RunHistory
from openagents_worker.runtime.latch import Latch, RunLatched
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.facts import Fact, FactKind

__all__ = ["Announcements"]

FAILED = "0"
"""Stored in place of the life: the last try of the call has failed, so the next one is announced."""


class Announcements:
    """What watchers know of the calls of one attempt that are not recorded yet."""

    def __init__(
        self,
        history: RunHistory,
        life: int,
        writer: RunWriter,
        latch: Latch,
        approvals: Approvals,
        effects: Effects,
    ) -> None:
        self._stored = {fact.id: fact.text for fact in history.facts.of(FactKind.CALLED)}
        self._this_life = str(life)
        self._life = life
        self._facts_at_suspend = writer.facts_at_suspend
        self._latch = latch
        self._approvals = approvals
        self._effects = effects

    def is_known(self, info: CallInfo) -> bool:
        """Whether watchers have seen this call begin in this life, and not fail since then."""
        if self.was_interrupted(info):
            return True
        stored = self._stored.get(info.call_id)
        if stored is not None:
            return stored == self._this_life
        has_job = info.noted is not None and info.noted.get("life") == self._life
        return has_job or self._approvals.asked(info.call_id) is not None

    def was_interrupted(self, info: CallInfo) -> bool:
        """Whether an earlier attempt of this life has begun the effect of this call. If it is decided that
        the tool is executed again, that is announced."""
        effect: Effect | None = info.effect
        begun = None if effect is None else effect.interrupted
        return begun is not None and begun.call == info.call_id and begun.life == self._life

    @contextmanager
    def in_progress(self, info: CallInfo) -> Iterator[None]:
        """A context manager around a call that watchers have seen begin: if the run is suspended in it, this
        is stored."""
        if not info.may_suspend:
            yield
            return
        fact = Fact(FactKind.CALLED, info.call_id, self._this_life)
        if self._stored.get(info.call_id) != self._this_life:
            self._facts_at_suspend[fact.name] = fact
        try:
            yield
        except RunLatched:
            raise
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError) or self._latch.reason is None:
                self._ended(fact)
            raise
        self._ended(fact)

    def _ended(self, fact: Fact) -> None:
        """The call has ended. Its record replaces what is stored; without a record, a later try follows."""
        if fact.id in self._stored or self._approvals.asked(fact.id) is not None:
            self._facts_at_suspend[fact.name] = Fact(FactKind.CALLED, fact.id, FAILED)
            self._effects.replaces(fact.id, fact.name)
        else:
            self._facts_at_suspend.pop(fact.name, None)
