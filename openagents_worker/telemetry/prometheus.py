"""Prometheus: the only place that knows its client library. Collects the series and writes them as text.

Needs `prometheus-client`, which the extras `metrics` and `flower` bring. Measurements are added to numbers in
memory. The families of the library are made when the metrics are scraped.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.series import (
    MAX_LABEL_SETS,
    MAX_LABEL_VALUES,
    OTHER,
    SERIES,
    SIGNALS,
    Sample,
    Series,
    SeriesKind,
)
from openagents_worker.telemetry.signals import AttributeValue

__all__ = ["PrometheusMeter", "SampleCollector", "metrics_text", "new_registry"]

log = get_logger(__name__)

MAX_LABEL_CHARS = 100

Labels = tuple[str, ...]


class PrometheusMeter(Collector):
    """A meter whose numbers a registry collects. Thread-safe. Measurements without a series are ignored."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[str, dict[Labels, list[float]]] = {name: {} for name in SIGNALS}
        self._attributes = {name: tuple(series.labels.values()) for name, series in SIGNALS.items()}
        self._seen: dict[tuple[str, int], set[str]] = {}
        for name, series in SIGNALS.items():
            if not series.labels:  # it exists from the start, so that its first increase is seen
                self._numbers[name][()] = _zeros(series)

    def count(self, name: str, value: float, attributes: Mapping[str, AttributeValue]) -> None:
        if (names := self._attributes.get(name)) is not None:
            labels = tuple([attributes.get(attribute, "") for attribute in names])
            with self._lock:
                self._numbers_of(name, labels)[0] += value

    def observe(self, name: str, value: float, attributes: Mapping[str, AttributeValue]) -> None:
        if (names := self._attributes.get(name)) is not None:
            labels = tuple([attributes.get(attribute, "") for attribute in names])
            with self._lock:
                numbers = self._numbers_of(name, labels)
                numbers[0] += value
                numbers[1 + bisect_left(SIGNALS[name].buckets, value)] += 1

    def _numbers_of(self, name: str, labels: tuple[AttributeValue, ...]) -> list[float]:
        """The numbers of these labels; those of `OTHER` if there are too many. Needs the lock."""
        all_numbers = self._numbers[name]
        numbers = all_numbers.get(labels)  # type: ignore[arg-type]  # usually all are texts
        if numbers is None:
            texts = tuple(self._bounded(name, place, str(label)) for place, label in enumerate(labels))
            if texts not in all_numbers and len(all_numbers) >= MAX_LABEL_SETS:
                texts = (OTHER,) * len(texts)
            numbers = all_numbers.setdefault(texts, _zeros(SIGNALS[name]))
        return numbers

    def _bounded(self, name: str, place: int, label: str) -> str:
        """The value of a label, as text that can be encoded; `OTHER` if the label has too many values."""
        label = label.encode(errors="replace").decode()[:MAX_LABEL_CHARS]
        seen = self._seen.setdefault((name, place), set())
        if label not in seen and len(seen) >= MAX_LABEL_VALUES:
            return OTHER
        seen.add(label)
        return label

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            numbers = {
                name: {labels: tuple(each) for labels, each in by_labels.items()}
                for name, by_labels in self._numbers.items()
            }
        for name, by_labels in numbers.items():
            family = _family(SIGNALS[name])
            for labels, each in by_labels.items():
                if isinstance(family, HistogramMetricFamily):
                    family.add_metric(labels, _cumulated(SIGNALS[name].buckets, each[1:]), each[0])
                else:
                    family.add_metric(labels, each[0])
            yield family


def _zeros(series: Series) -> list[float]:
    """A counter has one number. A histogram has its sum, and a count for each bucket and for infinity."""
    return [0.0] * (2 + len(series.buckets)) if series.buckets else [0.0]


def _cumulated(buckets: tuple[float, ...], counts: Iterable[float]) -> list[tuple[str, float]]:
    bounds = [*map(str, buckets), "+Inf"]
    total, found = 0.0, []
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        found.append((bound, total))
    return found


class SampleCollector(Collector):
    """Collects the samples that a function returns at each scrape. If it raises, they are left out."""

    def __init__(self, read: Callable[[], Iterable[Sample]]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        """No names: a registry that asks for them would read the samples at its start otherwise."""
        return []

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Any] = {}
        try:
            for sample in self._read():
                if sample.name not in families:
                    families[sample.name] = _family(_BY_NAME[sample.name])
                families[sample.name].add_metric(_encodable(sample.labels), sample.value)
        except Exception:  # one source that fails must not hide the others
            log.exception("metrics.not_read")
        yield from families.values()


_BY_NAME = {series.name: series for series in SERIES}


def _encodable(labels: Labels) -> Labels:
    return tuple(label.encode(errors="replace").decode()[:MAX_LABEL_CHARS] for label in labels)


def _family(series: Series) -> Any:
    families = {
        SeriesKind.COUNTER: CounterMetricFamily,
        SeriesKind.GAUGE: GaugeMetricFamily,
        SeriesKind.HISTOGRAM: HistogramMetricFamily,
    }
    return families[series.kind](series.name, series.help, labels=tuple(series.labels))


def new_registry(*collectors: Collector, process: bool = False) -> CollectorRegistry:
    """A registry of these collectors; `process`: with memory and processor time of the process, too."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    if process:
        ProcessCollector(registry=registry)
    return registry


def metrics_text(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """All metrics of a registry, in the format that the header `Accept` asks for, and its content type."""
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
