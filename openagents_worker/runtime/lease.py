"""The worker's lease as a run sees it: who it is, and how long it may still act."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Lease"]


class Lease(Protocol):
    """One incarnation's word that it is alive. It ends once and for ever."""

    @property
    def incarnation(self) -> str: ...

    def remaining_s(self) -> float:
        """Seconds until this process must have stopped writing, by its own clock; 0 or less: stop."""
        ...
