"""Spending: the only place that knows what the model calls in progress of a run may still cost.

A call reserves the most that it can cost before it is made. Its record has what it did cost, which counts in
the usage of the run from then on; then its reservation ends.
"""

from __future__ import annotations

import asyncio

__all__ = ["CostReservation", "Spending"]


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
    """The reservations of one attempt. An attempt that dies reserves nothing any more."""

    def __init__(self) -> None:
        self._reserved: set[CostReservation] = set()
        self._waiting: list[asyncio.Future[None]] = []

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

    async def one_settled(self) -> None:
        """Wait until a call in progress has ended. Returns at once if there is none."""
        if self._reserved:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future
