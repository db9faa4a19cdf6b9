"""Metrics: what a meter adds up, and that the number of its series is bounded."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from openagents_worker.telemetry import signals
from openagents_worker.telemetry.prometheus import (
    PrometheusMeter,
    SampleCollector,
    metrics_text,
    new_registry,
)
from openagents_worker.telemetry.series import (
    MAX_LABEL_SETS,
    MAX_LABEL_VALUES,
    OTHER,
    SERIES,
    SIGNALS,
    Sample,
    SeriesKind,
)


@pytest.fixture
def meter() -> Iterator[PrometheusMeter]:
    meter = PrometheusMeter()
    signals.register_meter(meter)
    yield meter
    signals.unregister_meter(meter)


def samples(meter: PrometheusMeter) -> dict[tuple[str, tuple[str, ...]], float]:
    text = metrics_text(new_registry(meter))[0].decode()
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_add_up_by_their_labels(meter: PrometheusMeter) -> None:
    """Attributes that are no labels of the series are left out, so runs do not become series."""
    for run in ("r1", "r2"):
        attributes = {"gen_ai.agent.id": "a", "openagents.outcome": "finished", "openagents.run.id": run}
        signals.count("openagents.attempts", 1, attributes)

    assert samples(meter)[("openagents_attempts_total", ("a", "finished"))] == 2


def test_a_histogram_has_cumulated_buckets(meter: PrometheusMeter) -> None:
    """A value on a bound belongs to its bucket. The last bucket is infinite."""
    for value in (0.005, 0.2, 99):
        signals.observe("openagents.lease.renewal", value)
    found = samples(meter)

    assert found[("openagents_lease_renewal_seconds_bucket", ("0.005",))] == 1
    assert found[("openagents_lease_renewal_seconds_bucket", ("0.25",))] == 2
    assert found[("openagents_lease_renewal_seconds_bucket", ("+Inf",))] == 3
    assert found[("openagents_lease_renewal_seconds_sum", ())] == pytest.approx(99.205)


def test_a_counter_without_labels_begins_at_zero(meter: PrometheusMeter) -> None:
    """Otherwise a rate would not see its first increase."""
    assert samples(meter)[("openagents_workers_lost_total", ())] == 0


def test_further_values_of_a_label_are_counted_together(meter: PrometheusMeter) -> None:
    """A deployment with many models has as many series as one with the largest number of them."""
    for number in range(MAX_LABEL_VALUES + 5):
        signals.observe("gen_ai.client.operation.duration", 1, {"gen_ai.request.model": f"m{number}"})
    found = {
        key: value for key, value in samples(meter).items() if key[0].endswith("call_duration_seconds_count")
    }

    assert len(found) == MAX_LABEL_VALUES + 1
    assert found[("openagents_model_call_duration_seconds_count", (OTHER,))] == 5


def test_further_combinations_of_labels_are_counted_together(meter: PrometheusMeter) -> None:
    """Agents times models could be ten thousand series."""
    for agent in range(MAX_LABEL_VALUES):
        for model in range(10):
            attributes = {"gen_ai.agent.id": f"a{agent}", "gen_ai.request.model": f"m{model}"}
            signals.count("openagents.cost", 1, attributes)
    found = {key: value for key, value in samples(meter).items() if key[0] == "openagents_cost_usd_total"}

    assert len(found) == MAX_LABEL_SETS + 1
    assert sum(found.values()) == MAX_LABEL_VALUES * 10


def test_a_label_may_be_any_text(meter: PrometheusMeter) -> None:
    """A name with half of a surrogate pair, a line break or 10,000 characters does not break the scrape."""
    signals.count(
        "openagents.cost", 1, {"gen_ai.agent.id": 'a"\n\ud800', "gen_ai.request.model": "m" * 10_000}
    )

    [(agent, model)] = [labels for name, labels in samples(meter) if name == "openagents_cost_usd_total"]
    assert (agent, len(model)) == ('a"\n?', 100)


def test_a_signal_without_a_series_is_ignored(meter: PrometheusMeter) -> None:
    """A newer part of the library, or an application, may measure more."""
    signals.count("somebody.else", 1)
    signals.observe("somebody.else", 1)

    assert "somebody" not in str(samples(meter))


def test_a_source_that_fails_does_not_hide_the_others(
    meter: PrometheusMeter, caplog: pytest.LogCaptureFixture
) -> None:
    """For example, because Redis does not answer."""

    def read() -> Iterator[Sample]:
        yield Sample("openagents_queue_runs", 3, ("agents",))
        raise OSError("away")

    text = metrics_text(new_registry(meter, SampleCollector(read)))[0].decode()

    assert 'openagents_queue_runs{queue="agents"} 3.0' in text
    assert "openagents_workers_lost_total 0.0" in text
    assert "metrics.not_read" in caplog.text


def test_without_a_meter_nothing_is_measured() -> None:
    """And nothing is computed for it."""
    assert not signals.is_measuring()


def test_names_follow_the_conventions_of_prometheus() -> None:
    """Base units, a prefix, and no label that could have one value for each run."""
    names = [series.name for series in SERIES]
    assert len(set(names)) == len(names)
    assert len(SIGNALS) == sum(bool(series.signal) for series in SERIES)
    for series in SERIES:
        assert re.fullmatch(r"openagents_[a-z_]+[a-z]", series.name)
        assert not series.name.endswith(("_total", "_ms", "_count", "_sum", "_bucket"))
        assert series.help.endswith(".")
        assert not {"run", "run_id", "session", "session_id", "tenant"} & set(series.labels)
        assert (series.kind is SeriesKind.HISTOGRAM) == bool(series.buckets)
        assert list(series.buckets) == sorted(series.buckets)
