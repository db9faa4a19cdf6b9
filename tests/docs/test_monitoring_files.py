"""The dashboard and the alert rules: every query names series and labels that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from openagents_worker.telemetry.series import SERIES, SeriesKind

FOLDER = Path(__file__).parents[2] / "config" / "monitoring"
OF_PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}
LABELS_OF_PROMETHEUS = {"instance", "le"}
FUNCTIONS = {"by", "sum", "max", "min", "rate", "increase", "delta", "histogram_quantile", "and", "absent"}
ALERTS = [
    rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]

BY_SAMPLE = {
    name: series
    for series in SERIES
    for name in (
        [f"{series.name}_{end}" for end in ("bucket", "count", "sum")]
        if series.kind is SeriesKind.HISTOGRAM
        else [series.full_name]
    )
}


def queries() -> Iterator[str]:
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for alert in ALERTS:
        yield alert["expr"]


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_a_query_names_series_and_labels_that_exist(query: str) -> None:
    """A renamed series would leave a panel empty and an alert silent."""
    without_texts = re.sub(r'"[^"]*"', '""', query)
    words = set(re.findall(r"\b[a-z_]+\b(?![\w.])", re.sub(r"\[[^\]]*\]", "", without_texts)))
    names = {word for word in words if word in BY_SAMPLE or word in OF_PROCESS}
    labels = {label for name in names for label in getattr(BY_SAMPLE.get(name), "labels", ())}
    labels |= LABELS_OF_PROMETHEUS

    assert names
    assert words - names - labels - FUNCTIONS == set()


def test_values_of_labels_in_queries_are_among_those_that_exist() -> None:
    """Those of the states of the fleet, of the ends of runs and of answers."""
    from openagents_worker.models import StopReason
    from openagents_worker.store.scripts import ClaimAnswer, WriteAnswer

    known = {
        "stop_reason": {reason.value for reason in StopReason},
        "answer": {answer.value.lower() for answer in (*ClaimAnswer, *WriteAnswer)},
        "state": set(
            re.findall(r"`(\w+)`", " ".join(series.help for series in SERIES if "state" in series.labels))
        ),
        "code": {""},
    }
    for query in queries():
        for label, value in re.findall(r'(\w+)!?="([^"]*)"', query):
            assert value in known[label], query


def test_figures_of_the_fleet_are_not_added_up() -> None:
    """Every worker reports all of them, so a sum would be as many times too large as there are workers."""
    for query in queries():
        of_fleet = re.findall(r"openagents_(?:fleet|queue|limit|items)_\w+", query)
        assert not of_fleet or not re.search(r"\bsum\b", query), query


def test_every_series_is_in_the_dashboard() -> None:
    """Apart from those that only alerts and people read."""
    text = (FOLDER / "grafana-dashboard.json").read_text()
    missing = {series.name for series in SERIES if series.name not in text}

    assert missing == {
        "openagents_cached_input_tokens",
        "openagents_fleet_loop_lag_seconds",
        "openagents_fleet_up",
        "openagents_items_put_aside",
        "openagents_leases_lost",
        "openagents_loop_blocks",
        "openagents_part_failing",
        "openagents_queue_workers",
        "openagents_ready",
        "openagents_run_slots",
        "openagents_worker_info",
    }


def test_an_alert_fires_if_no_process_is_left_to_report_anything() -> None:
    """The last worker takes its series with it: a comparison with a series that is missing is never true."""
    [alert] = [alert for alert in ALERTS if "absent" in alert["expr"]]

    assert alert["expr"] == "absent(openagents_fleet_up)", "which every worker and Flower report"
    assert alert["labels"]["severity"] == "critical"


def test_an_alert_says_what_has_happened_and_what_to_do() -> None:
    """To somebody who is woken by it."""
    for alert in ALERTS:
        assert set(alert) >= {"alert", "expr", "labels", "annotations"}
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert set(alert["annotations"]) == {"summary", "action"}
        assert all(text.endswith(".") for text in alert["annotations"].values())
