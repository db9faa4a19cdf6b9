"""The facts of a run: the only place where an attempt reads what was decided outside of its journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.clock import RedisClock
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.held_turns import RunHeldTurns
from openagents_worker.runtime.latch import RunLatched
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.facts import Fact, FactKind, Facts
from openagents_worker.store.scripts import Claimed
from openagents_worker.telemetry.logs import get_logger

__all__ = ["RunFacts", "read_facts"]

log = get_logger(__name__)

FACTS_A_READ = 32  # a value may have a megabyte, and Redis serves nobody else while it sends an answer


class RunFacts:
    """The facts of one run: those of its claim, and those that were announced since then.

    A fact that a call has taken is not returned again. The commit of that call deletes it.
    """

    def __init__(self, claimed: Claimed, store: FencedStore) -> None:
        self.clock = RedisClock(claimed.now_ms)
        self.at_claim = self._facts = Facts(claimed.facts)
        self.store = store
        self.held = RunHeldTurns(claimed, store)
        self._taken: set[str] = set()
        self._reading: asyncio.Task[None] | None = None
        self._announced = self.seen = claimed.facts_no
        """`seen` is the number of the newest fact from outside that was read."""
        self.when_changed: list[Callable[[], object]] = []
        """Called after new facts were read."""
        self.when_closed: Callable[[], object] = lambda: None
        """Called when the attempt has ended."""

    def take(self, name: str) -> Fact | None:
        """Take the fact with this name, or the first numbered one if the name ends with a colon."""
        fact = self._facts.first_of(name, self._taken) if name else None
        if fact is not None:
            self._taken.add(fact.name)
        return fact

    def give_back(self, fact: Fact) -> None:
        """The call that has taken this fact was cancelled before it got it: another call may take it."""
        self._taken.discard(fact.name)

    def holds(self, name: str) -> bool:
        """Whether there is a fact with this name that no call has taken."""
        return self._facts.first_of(name, self._taken) is not None

    def stored_wait(self, call_id: str) -> dict[str, Any] | None:
        """What an earlier attempt has stored of a call that was waiting; None if it was not."""
        fact = self._facts.get(FactKind.WAIT, call_id)
        value = fact.value() if fact is not None and fact.name not in self._taken else None
        return value if isinstance(value, dict) else None

    def forget(self, names: Iterable[str]) -> None:
        """These facts are being replaced by a record."""
        self._taken.update(names)

    def reset(self, name: str) -> None:
        """The script that begins something again has deleted this fact: another one may come in its place."""
        self._taken.discard(name)
        if name in self._facts.names():
            self._facts = self._facts.changed(self._facts.names() - {name}, {})

    def of(self, kind: FactKind, prefix: str = "") -> Sequence[Fact]:
        """The facts of a kind that no call has taken, in their order."""
        if not self._facts:
            return ()
        return [fact for fact in self._facts.of(kind, prefix) if fact.name not in self._taken]

    async def stored(self, *kinds: FactKind) -> Sequence[Fact]:
        """The facts of these kinds as they are stored now, also those that a call has taken."""
        keys, run_id = self.store.keys, self.store.run_id
        names = await self.store.ask(lambda client: client.hkeys(keys("facts", run_id)))
        wanted = tuple(f"{kind}:" for kind in kinds)
        read = Facts(await _read(self.store, run_id, [name for name in names if name.startswith(wanted)]))
        return [fact for kind in kinds for fact in read.of(kind)]

    def announce(self, number: int) -> None:
        """There is a fact with this number: read it, unless it was read already. Called on the loop."""
        self._announced = max(self._announced, number)
        if self._announced > self.seen and self._reading is None:
            self._reading = outside_runs(self._read_announced(), name=f"facts {self.store.run_id}")

    async def refresh(self) -> None:
        """Read what is new: a fact may have been stored that was not announced yet. Raises `RunLatched`.

        A fact is stored once. Only a decision about an interrupted call may be replaced by another one.
        """
        keys, run_id = self.store.keys, self.store.run_id

        def question(client: Any) -> Any:
            pipeline = client.pipeline(transaction=True)
            pipeline.hget(keys("run", run_id), "facts_no")
            pipeline.hkeys(keys("facts", run_id))
            return pipeline.execute()

        number, names = await self.store.ask(question)
        if (number := int(number or 0)) < self.seen:
            return  # a later answer was faster
        known = self._facts.names()
        new = [name for name in names if name not in known or name.startswith(f"{FactKind.RESOLUTION}:")]
        read = await _read(self.store, run_id, new)
        if number < self.seen:
            return
        self._facts = self._facts.changed(frozenset(names), read)
        self.seen = number
        for callback in list(self.when_changed):
            callback()

    async def look_for(self, name: str) -> Fact | None:
        """Read this fact, which may have been stored and not announced yet, and take it."""
        if name.endswith(":"):
            await self.refresh()
        elif name not in self._taken and (read := await _read(self.store, self.store.run_id, [name])):
            self._facts = self._facts.changed(self._facts.names(), read)
        return self.take(name)

    async def _read_announced(self) -> None:
        try:
            while self._announced > self.seen:
                before = self.seen
                await self.refresh()
                if self.seen == before:
                    return  # the number was not of this run
        except RunLatched:
            return
        except Exception:  # a value that another program has written; a call that waits for it reports it
            log.exception("facts.unreadable", run_id=self.store.run_id)
        finally:
            self._reading = None

    async def close(self) -> None:
        """Stop reading: the attempt has ended."""
        self.when_closed()
        self.when_changed.clear()
        self.when_closed = lambda: None
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])


async def read_facts(store: AsyncStore, run_id: str) -> dict[str, str]:
    """All facts of a run that are too large for the answer of its claim, by name."""
    names = await store.ask(lambda client: client.hkeys(store.keys("facts", run_id)))
    return await _read(store, run_id, names)


async def _read(store: AsyncStore | FencedStore, run_id: str, names: Sequence[str]) -> dict[str, str]:
    """The values of the facts with these names, in pages. What is not stored is left out."""
    read: dict[str, str] = {}
    for begin in range(0, len(names), FACTS_A_READ):
        page = names[begin : begin + FACTS_A_READ]
        texts = await store.ask(partial(_values, store.keys("facts", run_id), page))
        found = zip(page, texts, strict=True)
        read |= {name: store.codec.decode(text) for name, text in found if text is not None}
    return read


def _values(key: str, names: Sequence[str], client: Any) -> Any:
    return client.hmget(key, list(names))
