"""What Redis counts: how often it has executed a command."""

from __future__ import annotations

from openagents_worker.producer.client import Client

__all__ = ["calls_of"]


def calls_of(client: Client, command: str) -> int:
    """How often the Redis of this client has executed the command since its start."""
    stats = client.store.ask(lambda r: r.info("commandstats"))
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])
