"""The Grafana dashboard. `generate.py` writes it to `config/monitoring/grafana-dashboard.json`.

Each panel is an entry of `ROWS`: its title, its unit, and its queries with their legends. A query of a series
of a worker adds the workers up. The figures of the fleet are the same in every process, so their queries take
the largest one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

__all__ = ["ROWS", "dashboard_text"]

COLUMNS, WIDTH, HEIGHT = 3, 8, 8

Panel = tuple[str, str, tuple[tuple[str, str], ...]]


def _rate(series: str, by: str) -> str:
    return f"sum by ({by}) (rate({series}[$__rate_interval]))"


def _quantiles(series: str, by: str = "") -> tuple[tuple[str, str], ...]:
    labels, name = (f"le, {by}", f"{{{{{by}}}}} ") if by else ("le", "")
    return tuple(
        (f"histogram_quantile({quantile}, {_rate(f'{series}_bucket', labels)})", f"{name}{text}")
        for quantile, text in ((0.5, "median"), (0.95, "95 %"))
    )


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Runs",
        (
            (
                "Runs that ended, by reason",
                "ops",
                ((_rate("openagents_runs_ended_total", "stop_reason"), "{{stop_reason}}"),),
            ),
            ("Runs by state", "short", (("max by (state) (openagents_fleet_runs)", "{{state}}"),)),
            ("Active time of a run", "s", _quantiles("openagents_run_active_seconds")),
            (
                "Runs in progress and slots",
                "short",
                (
                    ("sum(openagents_runs_in_progress)", "in progress"),
                    ("max(openagents_fleet_run_slots)", "slots"),
                ),
            ),
            ("Runs that were parked", "ops", ((_rate("openagents_runs_parked_total", "kind"), "{{kind}}"),)),
            (
                "Failed runs, by agent",
                "ops",
                (
                    (
                        _rate('openagents_runs_ended_total{stop_reason="failed"}', "agent"),
                        "{{agent}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "Queues",
        (
            (
                "Runs that wait for a worker",
                "short",
                (("max by (queue) (openagents_queue_runs)", "{{queue}}"),),
            ),
            (
                "Longest wait for a worker",
                "s",
                (("max by (queue) (openagents_queue_oldest_run_age_seconds)", "{{queue}}"),),
            ),
            (
                "Runs that wait for a limit",
                "short",
                (("max by (limit) (openagents_limit_runs_waiting)", "{{limit}}"),),
            ),
        ),
    ),
    (
        "Models and tools",
        (
            ("Duration of model calls", "s", _quantiles("openagents_model_call_duration_seconds", "model")),
            ("Time to first token", "s", _quantiles("openagents_model_time_to_first_token_seconds", "model")),
            (
                "Failed and repeated model requests",
                "ops",
                (
                    (
                        _rate('openagents_model_calls_total{code!=""}', "model, code"),
                        "{{model}} {{code}}",
                    ),
                    (_rate("openagents_model_call_retries_total", "model"), "{{model}} repeated"),
                ),
            ),
            ("Tokens", "short", ((_rate("openagents_tokens_total", "model, type"), "{{model}} {{type}}"),)),
            (
                "Cost per hour",
                "currencyUSD",
                (
                    (
                        "sum by (agent) (rate(openagents_cost_usd_total[$__rate_interval])) * 3600",
                        "{{agent}}",
                    ),
                ),
            ),
            ("Duration of tool calls", "s", _quantiles("openagents_tool_call_duration_seconds", "tool")),
            (
                "Failed tool calls",
                "ops",
                (
                    (
                        _rate('openagents_tool_calls_total{code!=""}', "tool, code"),
                        "{{tool}} {{code}}",
                    ),
                ),
            ),
            ("Steps", "ops", ((_rate("openagents_calls_total", "kind"), "{{kind}}"),)),
            ("Duration of steps", "s", _quantiles("openagents_call_duration_seconds", "kind")),
        ),
    ),
    (
        "Failures and recovery",
        (
            ("Retries of runs", "ops", ((_rate("openagents_run_retries_total", "code"), "{{code}}"),)),
            (
                "Recovered runs and dead workers",
                "short",
                (
                    (
                        "sum(increase(openagents_recovery_delay_seconds_count[$__rate_interval]))",
                        "recovered runs",
                    ),
                    ("sum(increase(openagents_workers_lost_total[$__rate_interval]))", "dead workers"),
                ),
            ),
            ("Delay of recoveries", "s", _quantiles("openagents_recovery_delay_seconds")),
            (
                "Prevented duplicates",
                "ops",
                (
                    (
                        _rate('openagents_claims_total{answer!="claimed"}', "answer"),
                        "message: {{answer}}",
                    ),
                    (_rate("openagents_calls_replayed_total", "kind"), "replayed {{kind}}"),
                    (_rate("openagents_writes_refused_total", "answer"), "refused write: {{answer}}"),
                ),
            ),
            ("Attempts", "ops", ((_rate("openagents_attempts_total", "outcome"), "{{outcome}}"),)),
            (
                "Messages that were lost and sent again",
                "short",
                (
                    (
                        "max by (queue) (increase(openagents_queue_messages_resent_total[$__rate_interval]))",
                        "{{queue}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "Workers",
        (
            ("Workers", "short", (("max by (state) (openagents_fleet_workers)", "{{state}}"),)),
            (
                "Lag of the event loop",
                "s",
                (("max by (instance) (openagents_loop_lag_seconds)", "{{instance}}"),),
            ),
            (
                "Renewal of the lease",
                "s",
                (
                    *_quantiles("openagents_lease_renewal_seconds"),
                    ("min(openagents_lease_remaining_seconds)", "shortest remaining lease"),
                ),
            ),
            (
                "Threads for tools",
                "short",
                (
                    ("sum by (state) (openagents_tool_threads)", "{{state}}"),
                    ("sum(openagents_tool_threads_waiting)", "calls that wait"),
                ),
            ),
            (
                "Memory",
                "bytes",
                (("max by (instance) (process_resident_memory_bytes)", "{{instance}}"),),
            ),
            (
                "Processor time",
                "percentunit",
                (("sum by (instance) (rate(process_cpu_seconds_total[$__rate_interval]))", "{{instance}}"),),
            ),
        ),
    ),
)


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 1, 0
    for title, panels in ROWS:
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": COLUMNS * WIDTH, "x": 0, "y": y},
            "panels": [],
        }
        number, y = number + 1, y + 1
        for place, (name, unit, queries) in enumerate(panels):
            row, column = divmod(place, COLUMNS)
            position = {"h": HEIGHT, "w": WIDTH, "x": column * WIDTH, "y": y + row * HEIGHT}
            yield _panel(number, name, unit, queries) | {"gridPos": position}
            number += 1
        y += -(-len(panels) // COLUMNS) * HEIGHT


def _panel(number: int, title: str, unit: str, queries: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 10, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": source, "expr": query, "legendFormat": legend}
            for place, (query, legend) in enumerate(queries)
        ],
    }


def dashboard_text() -> str:
    """The dashboard as JSON. Grafana asks for the data source when it is imported."""
    source = {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}
    dashboard = {
        "uid": "openagents-worker",
        "title": "openagents-worker",
        "tags": ["openagents-worker"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [source]},
        "panels": list(_panels()),
    }
    return json.dumps(dashboard, indent=1) + "\n"
