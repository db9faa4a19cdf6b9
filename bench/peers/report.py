"""The results as a table and a picture. The only place that formats them."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.environments import python_of
from bench.peers.systems import JOBS

__all__ = ["draw", "rows_of", "write_readme", "write_table"]

HEAD = (
    "System",
    "durability",
    *(f"ms a step, {steps} of {size // 1024} KB" for steps, size in JOBS),
    *(f"bytes stored ÷ content, {steps} of {size // 1024} KB" for steps, size in JOBS),
    "runs/s that do nothing",
    "runs again after SIGKILL, s",
    "finished steps done again",
    "worker MB",
    "servers MB",
)
README_COLUMNS = (0, 1, 3, 5, 6, 7, 8)
OWN_LOAD = 1.5  # the highest load that the measurements themselves cause
BEGIN, END = "<!-- bench peers: begin -->", "<!-- bench peers: end -->"
NOTES = """\
How to read it:

- The time of a step is measured from its start to the start of the next step, by the clock of the worker,
  with one run at a time. Steps only create their bytes. Producer, worker and servers share this machine, so
  only the ratios are meaningful.
- **The guarantees differ between the rows.** Redis with `everysec` may lose its last second in a power
  failure; `always`, SQLite FULL, PostgreSQL and Restate's log sync before they answer. With Celery, code of
  the application stores a transcript; pydocket records tasks, not steps; the original SDK, not durable,
  stores no steps.
- Bytes are the growth of the storage until the end of the run. This library stores the journal (about the
  content once), the events for later watchers, and the memory of the session; the other systems store no
  events. Restate's log is compressed.
- Runs that do nothing have one step. LangGraph and the original SDK have no queue: their runs start in the
  process that calls them. The figures of the other systems include the submission through a broker or a
  database.
- After SIGKILL: seconds until a step starts again, with the defaults of each system. If there is a second
  worker, it takes over. DBOS, Restate, LangGraph and the original SDK have one process, which is restarted
  at once, so their figure (marked *) is mostly the start of Python, without the time until the death is
  detected. The interrupted step is repeated in all systems.
"""


def rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per system: medians, or None with the reason if there is no figure."""
    return [_row(name, system) for name, system in results["systems"].items()]


def _row(name: str, system: Mapping[str, Any]) -> dict[str, Any]:
    facts, rounds = system["facts"] or {}, system["rounds"]
    nothing = [measured["nothing"] for measured in rounds if "nothing" in measured]
    row: dict[str, Any] = {"name": name, "title": system["title"], "durability": facts.get("durability", "")}
    row |= {"why": _why(system), "restarts": facts.get("restarts", False)}
    row["jobs"] = [
        _job([job for measured in rounds for job in measured["jobs"][n]]) for n in range(len(JOBS))
    ]
    row |= {key: _median([one[key] for one in nothing]) for key in ("runs_s", "worker_mb", "servers_mb")}
    return row | _recovery(system["recoveries"])


def _why(system: Mapping[str, Any]) -> str:
    if "not_measured" in system:
        return f"not measured: {system['not_measured']}"
    return "" if system["rounds"] else f"failed: {_one_line(system['failures'][-1])}"


def _one_line(words: str) -> str:
    return " ".join(words.replace("|", "/").split())[:160]


def _job(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    times = [one["ms_step"] for one in found if one["ms_step"] is not None]
    factors = [next(iter(one["stored"].values())) / one["content"] for one in found]
    unfinished = [one for one in found if one["ms_step"] is None]
    return {
        "ms_step": _median(times),
        "range": (min(times), max(times)) if times else None,
        "factor": _median(factors),
        "says": f"none: step {unfinished[0]['reached']} in {unfinished[0]['within_s']:.0f} s"
        if unfinished
        else "",
    }


def _recovery(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    times = [one["seconds"] for one in found if one["seconds"] is not None]
    says = next((one["says"] for one in found if "says" in one), "")
    if not times and not says:
        says = f"not within {found[0]['waited_s']:.0f} s" if found else "not measured"
    again = [
        f"{one['finished_again']} of {one['finished_before']}" for one in found if "finished_again" in one
    ]
    return {"recovery_s": _median(times), "recovery_says": says, "again": max(again, default="")}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


# --- the table -------------------------------------------------------------------------------------------


def write_table(results: Mapping[str, Any], folder: Path) -> str:
    """Write `peers.md` and return its text."""
    rows, machine = rows_of(results), results["machine"]
    lines = [
        "# Comparison with other systems",
        "",
        f"{machine['date']}. {machine['processor']}; {machine['system']}; {_load(machine)}; "
        f"{machine['sync_ms']} ms to sync 4 KB. Medians over {results['rounds']} round(s) in turn, "
        f"{results['minutes']} minutes. Written by `python -m bench peers`.",
        "",
        *_table(HEAD, [_cells(row) for row in rows]),
        "",
        NOTES,
        "## Versions and dominating settings",
        "",
        *_table(
            (
                "System",
                "versions",
                "setting for recovery",
                "setting for speed",
                "ms a step, fastest to slowest",
            ),
            [
                (row["title"], *_facts(results["systems"][row["name"]]), "; ".join(map(_range, row["jobs"])))
                for row in rows
            ],
        ),
        *_failures(results),
    ]
    text = "\n".join(lines) + "\n"
    (folder / "peers.md").write_text(text)
    return text


def _failures(results: Mapping[str, Any]) -> list[str]:
    found = [
        f"- {system['title']}: {_one_line(words)}"
        for system in results["systems"].values()
        for words in system["failures"]
    ]
    return ["", "## Failures", "", *found] if found else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["why"]:
        return [row["title"], row["why"], *[""] * (len(HEAD) - 2)]
    recovery = row["recovery_says"] or _number(row["recovery_s"]) + "*" * row["restarts"]
    return [
        row["title"],
        row["durability"],
        *(job["says"] or _number(job["ms_step"]) for job in row["jobs"]),
        *(_factor(job["factor"]) for job in row["jobs"]),
        _number(row["runs_s"]),
        recovery,
        row["again"],
        _number(row["worker_mb"]),
        _number(row["servers_mb"]) if row["servers_mb"] else "",
    ]


def _facts(system: Mapping[str, Any]) -> tuple[str, str, str]:
    facts = system["facts"] or {"versions": {}, "recovery_setting": "", "speed_setting": ""}
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return versions, facts["recovery_setting"], facts["speed_setting"]


def _range(job: Mapping[str, Any]) -> str:
    return f"{_number(job['range'][0])} to {_number(job['range'][1])}" if job["range"] else "none"


def _factor(value: float | None) -> str:
    return _number(value) if value is None or value < 1000 else f"{value:,.0f}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 30 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def write_readme(results: Mapping[str, Any], file: Path) -> None:
    """Replace the text between the two marks in the README by the short table."""
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise RuntimeError(f"{file} does not contain the marks for the table: {BEGIN} and {END}")
    machine = results["machine"]
    caption = (
        f"{machine['date'].partition(' ')[0]}, {machine['processor']}, {_load(machine)}; "
        f"medians over {results['rounds']} round(s)."
    )
    lines = ["", *_table([HEAD[n] for n in README_COLUMNS], _short(results)), "", caption, ""]
    file.write_text(before + begin + "\n".join(lines) + end + after)


def _load(machine: Mapping[str, Any]) -> str:
    other = " (other programs were running)" if machine["load"] > OWN_LOAD else ""
    return f"load {machine['load']} at the end{other}"


def _short(results: Mapping[str, Any]) -> list[list[str]]:
    return [[cells[n] for n in README_COLUMNS] for cells in map(_cells, rows_of(results))]


# --- the picture -----------------------------------------------------------------------------------------


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Create `peers.png` with a script, in an environment that has matplotlib."""
    script = Path(__file__).with_name("plot.py")
    data = {
        "rows": rows_of(results),
        "machine": results["machine"],
        "rounds": results["rounds"],
        "jobs": JOBS,
    }
    done = subprocess.run(
        [str(python_of("plot")), str(script), str(folder / "peers.png")],
        input=json.dumps(data),
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the picture could not be created: {done.stderr.strip()[-400:]}")
