"""Fleet metrics: the only place that adds the figures of the fleet to the metrics of Flower.

Flower serves them at `/metrics` beside its own, under the same authentication.
"""

from __future__ import annotations

from prometheus_client import REGISTRY

from openagents_worker.producer.client import cell_of
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store.fleet_samples import FleetSamples
from openagents_worker.telemetry.prometheus import SampleCollector

__all__ = ["serve_fleet_metrics"]

_served: set[tuple[str, str]] = set()


def serve_fleet_metrics(settings: Settings | None = None) -> None:
    """Add the figures of the fleet to `/metrics`. Without settings: those of the environment.

    A second call for the same fleet has no effect. Redis is not asked before the first scrape.
    """
    settings = settings or load_settings()
    fleet = (settings.redis_url, settings.key_prefix)
    if fleet not in _served:
        _served.add(fleet)
        REGISTRY.register(SampleCollector(FleetSamples(cell_of(settings), settings.queue)))
