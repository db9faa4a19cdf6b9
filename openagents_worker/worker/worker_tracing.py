"""Worker tracing: the only place that decides whether a worker sends spans to OpenTelemetry by itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec

from openagents_worker.telemetry import signals
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.background import Health

__all__ = ["WorkerTracing", "wants_tracing"]

log = get_logger(__name__)

ENDPOINTS = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
)
PROTOCOL, PROTOCOLS = "OTEL_EXPORTER_OTLP_PROTOCOL", ("", "http/protobuf")
END_S = 5.0
PACKAGE = "opentelemetry.exporter.otlp.proto.http"


def wants_tracing(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the variables of OpenTelemetry name a collector."""
    is_disabled = env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return not is_disabled and any(env.get(name) for name in ENDPOINTS)


class WorkerTracing:
    """Sends the signals of this process to the collector that the environment names. A background part.

    It does nothing if the application has called `export_to_opentelemetry`. A missing package is one warning:
    a worker works without a collector, too.
    """

    name = "opentelemetry"

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self.health = Health()
        self._env = env
        self._end: Callable[[], None] | None = None

    def start(self) -> None:
        if signals.is_enabled():
            return
        if problem := self._problem():
            self.health.failed(problem, code="traces.not_exported")
            log.warning("traces.not_exported", reason=problem, hint="pip install 'openagents-worker[otel]'")
            return
        from openagents_worker.telemetry.opentelemetry_setup import start_export

        self._end = start_export(self._env)
        log.info("traces.exported", service=self._env.get("OTEL_SERVICE_NAME") or None)

    def _problem(self) -> str:
        if (protocol := self._env.get(PROTOCOL, "")) not in PROTOCOLS:
            return f"{PROTOCOL} is {protocol}; only http/protobuf is supported"
        return "" if _is_installed(PACKAGE) else f"the package of {PACKAGE} is not installed"

    def stop(self) -> None:
        """Send what is left, and end. A collector that does not answer holds the process for `END_S` only."""
        if self._end is None:
            return
        # A daemon: the exporters of OpenTelemetry try for half a minute and more.
        ending = threading.Thread(target=self._end, name="openagents-traces", daemon=True)
        self._end = None
        ending.start()
        ending.join(END_S)
        if ending.is_alive():
            log.warning("traces.not_sent", reason=f"the collector has not answered for {END_S:g} s")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent package
        return False
