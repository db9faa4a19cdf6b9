"""Fleet metrics: the only place that adds the figures of the fleet to the metrics of Flower.

Flower serves them at `/metrics` beside its own. A Flower with our pages does so by itself. Flower's other
pages ask for a password if one is set. This one did not ask, so it is changed here.
"""

from __future__ import annotations

from typing import Any

from flower.views.monitor import Metrics
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from openagents_worker.producer.client import cell_of
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store.fleet_samples import FleetSamples
from openagents_worker.telemetry.prometheus import SampleCollector, new_registry

__all__ = ["fleet_registry", "metrics_with_fleet", "serve_fleet_metrics"]

OURS = "_openagents_asks_for_password"
_served: set[tuple[str, str]] = set()


def serve_fleet_metrics(settings: Settings | None = None) -> None:
    """Add the figures of the fleet to `/metrics`. Without settings: those of the environment.

    A second call for the same fleet has no effect. Redis is not asked before the first scrape.
    """
    settings = settings or load_settings()
    _require_password()
    fleet = (settings.redis_url, settings.key_prefix)
    if fleet not in _served:
        _served.add(fleet)
        REGISTRY.register(SampleCollector(FleetSamples(cell_of(settings), settings.queue)))


def fleet_registry(settings: Settings) -> CollectorRegistry:
    """The figures of the fleet with these settings. Redis is not asked before the first scrape."""
    return new_registry(SampleCollector(FleetSamples(cell_of(settings), settings.queue)))


def metrics_with_fleet(fleet: CollectorRegistry) -> bytes:
    """Flower's metrics and those of the fleet, unless a configuration file has added a fleet to them.

    This may wait for Redis, for a few seconds if it does not answer.
    """
    return generate_latest() + (b"" if _served else generate_latest(fleet))


def _require_password() -> None:
    """Let `/metrics` ask for the password of Flower, if it has one. A scraper cannot log in with OAuth."""
    if hasattr(Metrics, OURS):
        return
    write_metrics = Metrics.get

    async def get(handler: Any) -> None:
        if handler.application.options.basic_auth:
            handler.get_current_user()  # raises 401
        await write_metrics(handler)

    setattr(Metrics, OURS, True)
    Metrics.get = get
