"""Time limits. The only place that computes the timeouts of a worker process from the lease and the
heartbeat.

All limits are computed from these two, so that they are consistent for every lease. A limit that does not fit
the lease could end a worker that works correctly.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Self

__all__ = [
    "SHORTEST_LEASE_MS",
    "SHORTEST_LOOP_DEAD_S",
    "TimeLimits",
    "default_heartbeat_ms",
    "longest_heartbeat_ms",
]

SHORTEST_LEASE_MS = 500
"""With a shorter lease, Redis would have less than 50 ms to answer."""
SHORTEST_LOOP_DEAD_S = 1.0
"""A loop is reported as blocked after a quarter of a second. This limit must be longer."""

SHORTEST_CONFIRM_S = 1.0
BEATS_IN_A_LEASE = 4


def _limit(rule: str, reason: str) -> float:
    """A field of `TimeLimits`, with the texts for `docs/limits.md`."""
    documented: float = field(metadata={"rule": rule, "reason": reason})
    return documented


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLimits:
    """The time limits of a worker process, in seconds. `docs/limits.md` is generated from this class.

    >>> TimeLimits.of(lease_ms=10_000, heartbeat_ms=2_500).local_lease_s
    8.0
    """

    lease_s: float = _limit(
        "`OPENAGENTS_LEASE_MS`",
        "How long a lease is valid after its renewal, by the clock of Redis. After that, other workers "
        "take over the runs.",
    )
    beat_s: float = _limit(
        "`OPENAGENTS_HEARTBEAT_MS`; by default a quarter of the lease",
        "The time between two renewals. Two heartbeats and the margin fit into a lease, so one heartbeat "
        "may fail.",
    )
    margin_s: float = _limit(
        "a fifth of the lease; below a lease of 5 s one second, at most a third of the lease",
        "How long before the end of its lease the worker stops its runs.",
    )
    local_lease_s: float = _limit(
        "the lease without the margin",
        "After this time without a successful renewal, the worker begins no call and writes nothing. The "
        "time is counted from the sending of the last successful renewal.",
    )
    confirm_s: float = _limit(
        "the margin, and at least one second",
        "The time for all user code to stop after the local lease has ended. Then the worker registers "
        "again. If code has not stopped by then, the process ends.",
    )
    cancel_grace_s: float = _limit(
        "the same as `confirm_s`",
        "The time for the code of one run to stop after it was cancelled for any reason.",
    )
    renewal_connect_s: float = _limit(
        "(the local lease minus one heartbeat) / 3, at most 1.5 s",
        "Timeout for opening the connection of the heartbeat.",
    )
    renewal_answer_s: float = _limit(
        "(the local lease minus one heartbeat) / 3, at most 2 s",
        "Timeout for the answer to a renewal. After a failed heartbeat, including a new connection, there "
        "is time for another one.",
    )
    renewal_pause_s: float = _limit(
        "(the local lease minus one heartbeat) / 6, at most 0.25 s, and at most one heartbeat",
        "The pause between two attempts to reach Redis.",
    )
    run_answer_s: float = _limit(
        "half of the local lease, between 1 and 5 s",
        "Timeout for the answer to a command of a run. It is short enough to repeat a write whose answer "
        "was lost.",
    )
    claim_patience_s: float = _limit(
        "one and a half leases",
        "How long a worker tries to claim a run. After that, it drops the message, and the rescue loop "
        "sends another one. The time is longer than a lease: if the lease ends because Redis does not "
        "answer, the new incarnation still makes the claim.",
    )
    publish_patience_s: float = _limit(
        "half of the margin",
        "How long a run waits until the broker has accepted a wake-up. After that, the run continues, and "
        "the wake-up is sent in the background.",
    )
    drain_s: float = _limit(
        "`OPENAGENTS_DRAIN_TIMEOUT_S`",
        "The time for runs to reach a commit when the worker has to stop. The lease is renewed until then.",
    )
    let_go_s: float = _limit(
        "`cancel_grace_s` and one second",
        "The time to cancel the remaining calls at the end of the drain, and to store the hand-over of "
        "their runs.",
    )
    heartbeat_stop_s: float = _limit(
        "`renewal_connect_s`, `renewal_answer_s`, `renewal_pause_s` and one second",
        "The time for the heartbeat thread to end. It may be waiting for Redis.",
    )
    watch_tick_s: float = _limit(
        "an eighth of the margin, at most 0.05 s",
        "The time between two checks of the watchdog.",
    )
    accuse_s: float = _limit(
        "the margin",
        "The time to store which run blocks the event loop forever, before the watchdog ends the process.",
    )
    loop_dead_s: float = _limit(
        "`OPENAGENTS_LOOP_DEAD_S`",
        "If the event loop is blocked for this long, the process ends. The limit does not depend on the "
        "lease, because a separate thread renews the lease. A call that holds the GIL stops this thread, "
        "too. Then the process ends with its lease, if the lease ends earlier.",
    )

    @classmethod
    def of(
        cls, *, lease_ms: int, heartbeat_ms: int, drain_timeout_s: float = 25.0, loop_dead_s: float = 120.0
    ) -> Self:
        """The limits for a lease. Raises `ValueError` if the heartbeat is too slow for the lease."""
        lease_s, beat_s, margin_s = lease_ms / 1000, heartbeat_ms / 1000, _margin_s(lease_ms)
        if not 0 < heartbeat_ms <= longest_heartbeat_ms(lease_ms):
            raise ValueError(f"a heartbeat of {heartbeat_ms} ms is too slow for a lease of {lease_ms} ms")
        local_lease_s = lease_s - margin_s
        after_beat_s = local_lease_s - beat_s
        connect_s, answer_s = min(1.5, after_beat_s / 3), min(2.0, after_beat_s / 3)
        pause_s = min(0.25, beat_s, after_beat_s / 6)
        confirm_s = max(margin_s, SHORTEST_CONFIRM_S)
        return cls(
            lease_s=lease_s,
            beat_s=beat_s,
            margin_s=margin_s,
            local_lease_s=local_lease_s,
            confirm_s=confirm_s,
            cancel_grace_s=confirm_s,
            renewal_connect_s=connect_s,
            renewal_answer_s=answer_s,
            renewal_pause_s=pause_s,
            run_answer_s=min(5.0, max(1.0, local_lease_s / 2)),
            claim_patience_s=1.5 * lease_s,
            publish_patience_s=margin_s / 2,
            drain_s=drain_timeout_s,
            let_go_s=confirm_s + 1.0,
            heartbeat_stop_s=connect_s + answer_s + pause_s + 1.0,
            watch_tick_s=min(0.05, margin_s / 8),
            accuse_s=margin_s,
            loop_dead_s=loop_dead_s,
        )

    @classmethod
    def explained(cls) -> tuple[tuple[str, str, str], ...]:
        """For each limit: its name, the rule that computes it, and its purpose."""
        return tuple(
            (limit.name, limit.metadata["rule"], limit.metadata["reason"])
            for limit in dataclasses.fields(cls)
        )


def default_heartbeat_ms(lease_ms: int) -> int:
    """A quarter of the lease: two heartbeats may be lost before the lease ends."""
    return lease_ms // BEATS_IN_A_LEASE


def longest_heartbeat_ms(lease_ms: int) -> int:
    """The longest period of a heartbeat with which one heartbeat may be lost."""
    return int((lease_ms / 1000 - _margin_s(lease_ms)) / 2 * 1000)


def _margin_s(lease_ms: int) -> float:
    lease_s = lease_ms / 1000
    return max(lease_s / 5, min(1.0, lease_s / 3))
