"""Cells: the only place that defines what a process must know of the Redis that it uses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from openagents_worker.store.codec import PLAIN, PayloadCodec
from openagents_worker.store.keys import Keys

__all__ = ["Cell"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One Redis with one key prefix, and the limits of what is stored there.

    `events_maxlen` is the number of events that are kept of a run. The times are in milliseconds.
    """

    url: str = field(repr=False)  # it may contain a password
    prefix: str = "oa"
    events_maxlen: int = 10_000
    run_ttl_ms: int = 7 * 24 * 3_600_000
    session_ttl_ms: int = 30 * 24 * 3_600_000
    max_watchers: int = 1_000
    """The number of watchers that may be open in one process at the same time."""
    codec: PayloadCodec = field(default=PLAIN, repr=False)  # it may have a key
    """Encodes and decodes payload text. All processes of a cell need one that reads the same texts."""

    def without_codec(self) -> dict[str, str | int]:
        """The arguments of a cell for another process that neither reads nor writes payload text."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "codec"}

    @property
    def keys(self) -> Keys:
        return Keys(self.prefix)

    @property
    def common(self) -> tuple[int, int, int]:
        """The arguments that every script gets first, in the order of `scripts.source`."""
        return (self.events_maxlen, self.run_ttl_ms, self.session_ttl_ms)
