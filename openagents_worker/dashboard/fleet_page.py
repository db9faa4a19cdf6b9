"""Workers. The only place that shows the worker processes, their queues, and what was put aside."""

from __future__ import annotations

from openagents_worker.dashboard.page import PageHandler
from openagents_worker.dashboard.shown_text import ago_text, long_text, ms_of, now_ms, short_text, took_text
from openagents_worker.producer.waiting_reason import why_not_served, why_runs_wait
from openagents_worker.store.fleet import Fleet, QueueInfo, read_fleet
from openagents_worker.store.row_reads import ReadBy

__all__ = ["FleetPage"]

WORKERS = 100
ASIDE = 20
AGENTS = 20  # of one worker


class FleetPage(PageHandler):
    """Workers with their runs, lag and lease; queues with their age; problems."""

    tab = "fleet"

    async def get(self) -> None:
        store = self.client.store
        fleet = await store.execute(
            read_fleet(store.keys, self.client.settings.queue, scans_queues=False, read_by=ReadBy.SCRIPT)
        )
        aside = await self.client.put_aside()
        now = now_ms()
        self.show(
            "fleet.html",
            workers=[
                (
                    worker,
                    ago_text(ms_of(worker.started_at), now) if worker.started_at else "-",
                    took_text(worker.loop_lag_ms),
                    took_text(worker.lease_left_ms) if worker.is_alive else "over",
                    short_text(", ".join(worker.agents[:AGENTS]), 200),
                )
                for worker in fleet.workers[:WORKERS]
            ],
            more_workers=max(0, len(fleet.workers) - WORKERS),
            queues=[
                (queue, took_text(queue.oldest_age_ms), _problem_of(fleet, queue))
                for queue in fleet.queues[:WORKERS]
            ],
            more_queues=max(0, len(fleet.queues) - WORKERS),
            limits=fleet.limits[:WORKERS],
            more_limits=max(0, len(fleet.limits) - WORKERS),
            aside=[(each, long_text(each.item, 500)) for each in aside[:ASIDE]],
            more_aside=max(0, len(aside) - ASIDE),
            problems=[
                (worker.incarnation, part) for worker in fleet.workers[:WORKERS] for part in worker.parts
            ],
        )


def _problem_of(fleet: Fleet, queue: QueueInfo) -> str:
    """What is wrong with the queue, also if no run waits in it; '' if nothing is."""
    why = why_runs_wait if queue.waiting else why_not_served
    return why(fleet.workers, queue.name) or ""
