"""The systems that are compared. The only place that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["JOBS", "SYSTEMS", "System"]

JOBS = ((20, 1024), (100, 5120))
"""Steps of a run, and bytes of each."""


@dataclass(frozen=True)
class System:
    """One row of the table: an adapter and its options."""

    name: str
    title: str
    adapter: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recovery: Literal["in turn", "beside", "no"] = "in turn"
    """`beside`: it takes minutes, so it is measured once, in a separate instance, parallel to the rounds."""
    rounds: int | None = None
    """The largest number of rounds."""
    job_runs: int = 2
    """Runs of each job per round."""

    @property
    def own_environment(self) -> bool:
        """Whether it needs a separate environment.

        This library is measured in the environment of the driver.
        """
        return self.adapter != "ours"


SYSTEMS = (
    System("ours-everysec", "openagents-worker, everysec", "ours", {"fsync": "everysec"}),
    System("ours-always", "openagents-worker, always", "ours", {"fsync": "always"}),
    System("celery", "Celery, prefork + asyncio.run", "celery"),
    System("pydocket", "pydocket", "pydocket", recovery="beside"),
    System("dbos-sqlite", "DBOS, SQLite", "dbos", {"database": "sqlite"}),
    System("dbos-postgres", "DBOS, PostgreSQL", "dbos", {"database": "postgres"}),
    System("langgraph-sqlite", "LangGraph, SQLite", "langgraph", {"database": "sqlite"}),
    System("langgraph-postgres", "LangGraph, PostgreSQL", "langgraph", {"database": "postgres"}),
    System("temporal", "Temporal, dev server", "temporal"),
    System("temporal-lifted", "Temporal, one limit lifted", "temporal", {"lifted": True}, recovery="no"),
    System("restate", "Restate", "restate"),
    System("original", "original SDK, not durable (stores no step)", "original", {"durable": False}),
    System("original-durable", "original SDK, durable", "original", {"durable": True}, rounds=1, job_runs=1),
)
