"""The picture of the table: `plot.py FILE.png`, the rows as JSON on standard input. Needs matplotlib."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt  # after the choice of a backend
from matplotlib.axes import Axes

OURS, OTHERS, PALE, TEXT, GRID = "#d1495b", "#30638e", "#a9c0d3", "#222222", "#dddddd"
Value = tuple[float | None, str]
"""The length of a bar, or None, and its label."""


def main() -> None:
    data = json.load(sys.stdin)
    rows = [row for row in data["rows"] if not row["why"]]
    steps, size = data["jobs"][-1]
    job = f"{steps} steps of {size // 1024} KB"
    mpl.rcParams.update(
        {"font.size": 10, "text.color": TEXT, "axes.labelcolor": TEXT, "font.family": "DejaVu Sans"}
    )
    figure, panels = plt.subplots(2, 2, figsize=(14, 0.62 * len(rows) + 3.2), sharey=True)
    _panel(panels[0][0], rows, _time, f"A step, ms ({job}; shorter is better)", log=True)
    _panel(panels[0][1], rows, _bytes, f"Bytes stored ÷ content ({job}; shorter is better)", log=True)
    _panel(panels[1][0], rows, _rate, "Runs a second that do nothing, one worker (longer is better)")
    _panel(
        panels[1][1],
        rows,
        _recovery,
        "From SIGKILL to the next step, s (shorter is better)",
        log=True,
    )
    machine = data["machine"]
    figure.text(
        0.01,
        0.008,
        f"{machine['processor']}; medians over {data['rounds']} round(s), {machine['date']}. "
        "* started again at once by the benchmark, without the time until the death is detected.",
        fontsize=9,
        color="#555555",
    )
    figure.tight_layout(rect=(0, 0.025, 1, 1), h_pad=2.0, w_pad=1.5)
    figure.savefig(sys.argv[1], dpi=110)


def _panel(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], Value],
    title: str,
    *,
    log: bool = False,
) -> None:
    values = [value(row) for row in rows]
    known = [length for length, _ in values if length]
    least = min(known, default=1.0) / 3 if log else 0.0
    for place, (row, (length, label)) in enumerate(zip(rows, values, strict=True)):
        color = OURS if row["name"].startswith("ours") else PALE if "*" in label else OTHERS
        end = max(length, least * 1.05) if length is not None else least
        if length is not None:
            axes.barh(place, end - least, left=least, color=color, height=0.66, zorder=2)
        axes.annotate(
            label,
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=TEXT if length is not None else "#888888",
            zorder=3,
        )
    if log:
        axes.set_xscale("log")
        axes.set_xlim(least, max(known, default=1.0) * 8)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    else:
        axes.set_xlim(0, max(known, default=1.0) * 1.18)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    if axes.get_subplotspec().is_first_col():
        axes.set_yticks(
            range(len(rows)), [f"{row['title']}\n{row['durability']}" for row in rows], fontsize=8.5
        )
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_color(OURS if row["name"].startswith("ours") else TEXT)
    else:
        axes.tick_params(labelleft=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color=GRID, linewidth=0.7, zorder=0)
    axes.tick_params(axis="both", length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _time(row: dict[str, Any]) -> Value:
    job = row["jobs"][-1]
    return job["ms_step"], job["says"].replace("none: step", "never ends: step") or _number(job["ms_step"])


def _bytes(row: dict[str, Any]) -> Value:
    job = row["jobs"][-1]
    return job["factor"], _number(job["factor"]) + (" so far" if job["says"] else "")


def _rate(row: dict[str, Any]) -> Value:
    return row["runs_s"], _number(row["runs_s"])


def _recovery(row: dict[str, Any]) -> Value:
    if row["recovery_says"]:
        return None, row["recovery_says"]
    again = row["again"]
    repeats = f", {again} finished steps again" if again and not again.startswith("0 ") else ""
    return row["recovery_s"], f"{_number(row['recovery_s'])}{'*' if row['restarts'] else ''}{repeats}"


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,.0f}" if value >= 30 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


if __name__ == "__main__":
    main()
