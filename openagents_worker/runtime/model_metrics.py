"""Model metrics: the only place that computes how fast the model calls of a run were."""

from __future__ import annotations

from openagents_worker.models import RunUsage
from openagents_worker.runtime.journal import Record

__all__ = ["ModelMetrics"]


class ModelMetrics:
    """The durations of the model calls of a run, in all attempts: those of replayed calls are recorded."""

    def __init__(self) -> None:
        self._took_ms: list[int] = []

    def add(self, record: Record) -> None:
        """Count a record that answers a call, if the call is one of a model."""
        if record.kind == "model" and not record.is_cancelled:
            self._took_ms.append(record.took_ms)

    def added_to(self, usage: RunUsage) -> RunUsage:
        """The usage with the median and the 95th percentile of the durations, in milliseconds."""
        took_ms = sorted(self._took_ms)
        if not took_ms:
            return usage
        at_95 = min(int(len(took_ms) * 0.95), len(took_ms) - 1)
        return usage.with_latencies(float(took_ms[len(took_ms) // 2]), float(took_ms[at_95]))
