"""Names in messages. The only place that defines the names of the tasks of runs, and of our headers."""

from __future__ import annotations

__all__ = ["RESUME_RUN", "RUN_AGENT", "RUN_ENDED"]

RUN_AGENT = "tasks.run_agent"
RESUME_RUN = "tasks.resume_run"
RUN_ENDED = "run_ended"
"""The header of a message that only notifies Celery of a run's end."""
