"""Given-up children: the only place that counts what children use whose results the run does not get.

The program has cancelled the call that delegated to such a child, so the child is cancelled, too. What it has
used until its end counts in the usage and in the budget of the run like that of any other child. A fact
(`given_up`) says that this is not recorded yet; the record that counts it replaces the fact.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from openagents_worker.errors import RecordUnreadable
from openagents_worker.jsontext import loads
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import RunState, RunUsage, WaitKind
from openagents_worker.models.usage import NO_USAGE
from openagents_worker.runtime.child_budgets import PendingChild
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.store.facts import Fact, FactKind
from openagents_worker.store.formats import WRITTEN, translate_parse_errors

__all__ = ["CHECK_AGAIN_MS", "GivenUpChildren"]

CHECK_AGAIN_MS = 900_000
"""How often a parked run looks whether its child has ended without a notice. Only a worker of a version that
knows no children can end one in this way."""
CHECK_EARLIER_MS = 2_000
"""The same for a child of an earlier life of the run, which does not notify this one. It was asked to stop
when that life ended."""
ENDS_WITHIN_S = 2.0
"""How long a run that ends waits for the ends of children that were asked to stop just before."""
LOOK_S = 0.1  # between two looks at their records meanwhile: a notice may be late
READ_AT_ONCE = 100
USAGE_FIELDS = ("state", "usage_in_all", "usage", "background")


@dataclass(frozen=True, slots=True)
class _GivenUpChild:
    """A child that the program has given up, and the call that had created it."""

    call: str
    child: PendingChild

    @property
    def result_fact(self) -> str:
        return f"{FactKind.CHILD}:{self.call}"

    @property
    def fact(self) -> Fact:
        value = {
            "run_id": self.child.run_id,
            "call": self.call,
            "life": self.child.life,
            "reserved": dict(self.child.reserved),
        }
        return Fact.of(FactKind.GIVEN_UP, self.child.run_id, value)


class GivenUpChildren:
    """The children that one run has given up, and whose usage is not recorded yet."""

    def __init__(self, recorder: Recorder, *, life: int, spent: Mapping[str, RunUsage]) -> None:
        """`spent`: what is recorded of the usage of such children, by their ids. To be made when it is known
        which children the run waits for."""
        self._recorder = recorder
        self._life = life
        self._facts = recorder.waits.facts
        self._spent = dict(spent)
        self._open: dict[str, _GivenUpChild] = {}
        self._made_again: dict[str, _GivenUpChild] = {}
        """Those whose calls were being made again when an earlier attempt ended."""
        self.have_counted = False
        """Whether this attempt has counted the usage of such a child."""
        self._have_ended = asyncio.Event()
        self._have_ended.set()
        for usage in spent.values():
            recorder.budget.children = recorder.budget.children.plus(usage)
        for fact in self._facts.of(FactKind.GIVEN_UP):
            value = fact.value(run_id=recorder.run_id)
            if (child := PendingChild.of(value)) is None:
                continue
            given_up = _GivenUpChild(str(value.get("call") or ""), child)
            if given_up.call in recorder.spending.children:
                self._made_again[child.run_id] = given_up
            else:
                self._add(given_up)
        recorder.spending.given_up = self
        self._facts.when_changed.append(self._look_for_results)
        self._look_for_results()

    @property
    def is_empty(self) -> bool:
        return not self._open

    # --- giving up ---------------------------------------------------------------------------------------

    async def add(self, call_id: str, child: PendingChild) -> None:
        """The program has given up the call that has created this child. Its part of the budget stays
        reserved until its end is noticed. A cancellation during the write is raised after the write."""
        given_up = _GivenUpChild(call_id, child)
        self._add(given_up)
        if self._recorder.checkpoints.keeps_given_up:
            await self._recorder.checkpoints.store_fact(given_up.fact)

    def _add(self, given_up: _GivenUpChild) -> None:
        child = given_up.child
        self._open[child.run_id] = given_up
        self._have_ended.clear()
        self._recorder.spending.children[_key(child.run_id)] = child

    def take_back(self, child_id: str) -> tuple[PendingChild | None, list[str]]:
        """The call is made again. Returns its child, and the names of the facts that its record replaces."""
        given_up = self._open.pop(child_id, None) or self._made_again.pop(child_id, None)
        self._recorder.spending.children.pop(_key(child_id), None)
        if not self._open:
            self._have_ended.set()
        return (None, []) if given_up is None else (given_up.child, [given_up.fact.name])

    def not_counted(self, child_id: str, usage: RunUsage) -> RunUsage:
        """What of the usage of a child is not recorded yet: its call was given up before, and made again."""
        known = self._spent.get(child_id)
        return usage if known is None else usage.minus(known)

    # --- their ends --------------------------------------------------------------------------------------

    def _look_for_results(self) -> None:
        """New facts were read: count the usage of children that have ended."""
        for given_up in list(self._open.values()):
            if (fact := self._facts.take(given_up.result_fact)) is not None:
                self._count(given_up, _usage_in(fact))

    async def _look_at_records(self) -> bool:
        """Count the usage of children that have ended without a notice. Whether there was one."""
        known = await self._read(list(self._open))
        found = False
        for child_id, (is_over, usage, _) in known.items():
            if is_over and (given_up := self._open.get(child_id)) is not None:
                self._count(given_up, usage)
                found = True
        return found

    def _count(self, given_up: _GivenUpChild, usage: RunUsage) -> None:
        child_id, self.have_counted = given_up.child.run_id, True
        del self._open[child_id]
        new = self.not_counted(child_id, usage)
        self._spent[child_id] = self._spent.get(child_id, NO_USAGE).plus(new)
        recorder = self._recorder
        recorder.budget.children = recorder.budget.children.plus(new)
        taken = [given_up.fact.name, given_up.result_fact]
        recorder.checkpoints.count_given_up(given_up.call, child_id, new, taken)
        recorder.spending.settle_child(_key(child_id), recorder.waits)
        if not self._open:
            self._have_ended.set()

    async def one_ended(self, info: CallInfo) -> None:
        """Wait inside a call until one of them has ended. The run may park meanwhile."""
        if await self._look_at_records():
            return
        given_up = next(iter(self._open.values()), None)
        if given_up is None:
            return
        is_earlier = given_up.child.life != self._life
        found = await self._recorder.waits.until(
            info,
            WaitKind.CHILD,
            name="budget",
            fact=given_up.result_fact,
            timeout_ms=CHECK_EARLIER_MS if is_earlier else CHECK_AGAIN_MS,
            begins_again=True,
        )
        if found is not None and given_up.child.run_id in self._open:
            self._count(given_up, _usage_in(found))

    async def wait_for_ends(self) -> None:
        """The run ends: wait a moment for children that were asked to stop, so that their usage counts."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + ENDS_WITHIN_S
        await self._look_at_records()
        while not self.is_empty and loop.time() < end_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._have_ended.wait()
            await self._look_at_records()

    # --- what is not recorded ----------------------------------------------------------------------------

    async def used_so_far(self) -> RunUsage:
        """What children have used so far whose results are not recorded, whoever has given them up. Those in
        the background do not count."""
        children = set(self._open)
        with suppress(RecordUnreadable):  # it must not prevent the run from ending
            for fact in await self._facts.stored(FactKind.GIVEN_UP, FactKind.DELEGATED):
                if (child := PendingChild.of(fact.value())) is not None:
                    children.add(child.run_id)
        total = NO_USAGE
        for child_id, (_, usage, is_in_background) in (await self._read(children)).items():
            if not is_in_background:
                total = total.plus(self.not_counted(child_id, usage))
        return total

    async def _read(self, child_ids: Collection[str]) -> dict[str, tuple[bool, RunUsage, bool]]:
        """Whether each of these runs is over, its usage so far, and whether it is in the background."""
        store, ids = self._facts.store, list(child_ids)
        found: dict[str, tuple[bool, RunUsage, bool]] = {}
        for begin in range(0, len(ids), READ_AT_ONCE):
            page = ids[begin : begin + READ_AT_ONCE]

            def question(client: Any, page: Sequence[str] = page) -> Any:
                pipeline = client.pipeline(transaction=False)
                for child_id in page:
                    pipeline.hmget(store.keys("run", child_id), *USAGE_FIELDS)
                return pipeline.execute()

            for child_id, values in zip(page, await store.ask(question), strict=True):
                state, in_all, own, background = values
                is_over = state is None or (state in set(RunState) and RunState(state).is_terminal)
                in_all = in_all if is_over else None  # of its earlier life
                found[child_id] = (is_over, _usage_of(in_all or own or "{}"), background == "1")
        return found


def _key(child_id: str) -> str:
    """The key of a child among those that have reserved a part of the budget."""
    return f"{FactKind.GIVEN_UP} {child_id}"


def _usage_of(text: str) -> RunUsage:
    try:
        with translate_parse_errors(WRITTEN):
            return RunUsage.model_validate_json(text)
    except RecordUnreadable:  # it must not prevent the run from continuing
        return NO_USAGE


def _usage_in(result: Fact) -> RunUsage:
    """The usage in the result of a child."""
    try:
        with translate_parse_errors(WRITTEN):
            return RunUsage.model_validate(loads(result.text).get("usage") or {})
    except RecordUnreadable:
        return NO_USAGE
