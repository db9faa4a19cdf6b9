"""The lease of the worker process, as the runtime sees it: an interface that the worker implements."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Lease"]


class Lease(Protocol):
    """The time until which an incarnation counts as alive. Once over, it is never renewed."""

    @property
    def incarnation(self) -> str: ...

    def remaining_s(self) -> float:
        """Seconds in which this process may still write, by its own clock. 0 or less: it must not."""
        ...
