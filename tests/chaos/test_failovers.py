"""When two Redis servers may have lost data is read from what they say, whoever replaced the master."""

from __future__ import annotations

from typing import Any

from chaos.failovers import Failovers, Moment

MASTER_A = {"role": "master", "master_replid": "a"}
MASTER_B = {"role": "master", "master_replid": "b"}
FOLLOWS_A = {"role": "slave", "master_link_status": "up", "master_replid": "a"}
FOLLOWS_B = {"role": "slave", "master_link_status": "up", "master_replid": "b"}
JOINS_B = {"role": "slave", "master_link_status": "down", "master_replid": "a"}

Seen = tuple[dict[str, Any] | None, dict[str, Any] | None]


def losses(*seen: Seen) -> list[tuple[float, float]]:
    """With one moment a second, the first at 0 s; asked a second after the last."""
    failovers = Failovers()
    for second, replication in enumerate(seen):
        failovers.add(Moment(second, replication))
    return failovers.until(len(seen))


def test_a_master_that_stays_loses_nothing() -> None:
    assert losses((MASTER_A, FOLLOWS_A), (None, FOLLOWS_A), (MASTER_A, None), (MASTER_A, FOLLOWS_A)) == []


def test_a_failover_ends_when_the_former_master_follows_the_new_one() -> None:
    seen: list[Seen] = [
        (MASTER_A, FOLLOWS_A),
        (None, FOLLOWS_A),
        (None, MASTER_B),
        (MASTER_A, MASTER_B),  # started again, and not yet a replica: its writes will be lost
        (JOINS_B, MASTER_B),
        (FOLLOWS_B, MASTER_B),
        (FOLLOWS_B, MASTER_B),
    ]
    assert losses(*seen) == [(0, 5)]
    assert losses(*seen[:4]) == [(0, 4)], "not over: up to now"


def test_a_second_master_that_gives_up_is_a_loss() -> None:
    assert losses((MASTER_A, FOLLOWS_A), (MASTER_A, MASTER_B), (MASTER_A, FOLLOWS_A)) == [(0, 2)]


def test_two_failovers_are_two_losses() -> None:
    seen: list[Seen] = [(MASTER_A, FOLLOWS_A), (FOLLOWS_B, MASTER_B), (FOLLOWS_B, MASTER_B)]
    assert losses(*seen, (MASTER_A, FOLLOWS_A)) == [(0, 1), (2, 3)]
