"""Spending: the only place that knows what the calls in progress of a run, and its children, may still use.

A model call reserves the most that it can cost before it is made, and a child the most that it may use. A
record has what was used, which counts in the usage of the run from then on; then the reservation ends.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from openagents_worker.llm.base import CallInfo
from openagents_worker.models import WaitKind
from openagents_worker.runtime.calls_in_progress import CallsInProgress
from openagents_worker.runtime.child_budgets import PendingChild
from openagents_worker.runtime.waits import Waits

__all__ = ["AwaitsGivenUp", "CostReservation", "Spending"]


class AwaitsGivenUp(Protocol):
    """The children that the run has given up, and that have not ended yet."""

    @property
    def is_empty(self) -> bool: ...

    async def one_ended(self, info: CallInfo) -> None:
        """Wait inside a call until one of them has ended, or until it may have."""
        ...


class CostReservation:
    """What one call may cost at most, until it has ended."""

    __slots__ = ("_spending", "usd")

    def __init__(self, spending: Spending, usd: float) -> None:
        self._spending = spending
        self.usd = usd

    def settle(self) -> None:
        """The call has ended: what it cost is in the usage of the run."""
        self._spending.settle(self)


class Spending:
    """The reservations of one attempt. An attempt that dies reserves nothing for model calls any more; what
    it has reserved for children is a fact of the run."""

    def __init__(self) -> None:
        self.children: dict[str, PendingChild] = {}
        """The children whose results are not recorded yet, by the id of their call."""
        self.children_settled = 0
        """How many calls of children have ended so far."""
        self.given_up: AwaitsGivenUp | None = None
        """Set before the first call."""
        self._reserved: set[CostReservation] = set()
        self._waiting: list[asyncio.Future[None]] = []
        self._waiting_for_children = 0

    # --- model calls -------------------------------------------------------------------------------------

    @property
    def reserved_usd(self) -> float:
        return sum(each.usd for each in self._reserved)

    def reserve(self, usd: float) -> CostReservation:
        reservation = CostReservation(self, usd)
        self._reserved.add(reservation)
        return reservation

    def settle(self, reservation: CostReservation) -> None:
        self._reserved.discard(reservation)
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def one_settled(self, calls: CallsInProgress) -> None:
        """Wait until a call in progress has ended. Returns at once if there is none.

        The call that waits cannot end by itself: a run that stops does not wait for it.
        """
        if self._reserved:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            with calls.waiting():
                await future

    # --- children ----------------------------------------------------------------------------------------

    def of_children(self, limit: str, *, for_good: bool = False) -> float:
        """What the children may still use of this limit of the run. `for_good`: only those in the background,
        of which the run gets nothing back."""
        children = self.children.values()
        return sum(each.reserved.get(limit, 0) for each in children if not (for_good and each.settles))

    def will_settle(self, limit: str) -> bool:
        """Whether the end of a child gives something back of this limit."""
        return any(child.settles and child.reserved.get(limit) for child in self.children.values())

    def settle_child(self, call_id: str, waits: Waits) -> None:
        """The call has ended: what was reserved for its child is free, or part of the usage of the run."""
        self.children.pop(call_id, None)
        self.children_settled += 1
        if self._waiting_for_children:
            waits.check_again(WaitKind.CHILD)

    async def child_settled(self, waits: Waits, info: CallInfo) -> None:
        """Wait inside a call until a child has ended. The run may park meanwhile."""
        self._waiting_for_children += 1
        try:
            if self.given_up is None or self.given_up.is_empty:
                await waits.until(info, WaitKind.CHILD, name="budget", begins_again=True)
            else:
                await self.given_up.one_ended(info)
        finally:
            self._waiting_for_children -= 1
