"""The report: the only place that adds up chaos runs, and says what a published report must contain."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chaos.schedule import FaultKind

__all__ = ["PUBLISHED", "merged", "missing", "total", "write"]

Entry = Mapping[str, Any]

PUBLISHED: Mapping[str, tuple[int, Sequence[str]]] = {
    "faults": (1000, [kind.value for kind in FaultKind]),
    "SIGKILL to workers": (60, ["kill_worker", "kill_all_workers"]),
    "restarts of Redis": (20, ["kill_redis", "restart_redis", "slow_loading"]),
    "stalls and cuts shorter than the lease": (10, ["stall_worker (shorter)", "cut_worker (shorter)"]),
    "stalls and cuts longer than the lease": (10, ["stall_worker (longer)", "cut_worker (longer)"]),
    "stalls and cuts": (40, ["stall_worker", "cut_worker"]),
    "SIGTERM to workers": (20, ["terminate_worker"]),
    "SIGSTOP to workers": (20, ["pause_worker"]),
    "failovers": (1, ["fail_over"]),
    "OOM": (1, ["full_redis"]),
    "READONLY": (1, ["read_only_redis"]),
    "LOADING": (1, ["slow_loading"]),
    "MISCONF": (1, ["unsaved_redis"]),
    "SCRIPT FLUSH": (1, ["flush_scripts"]),
    "CLIENT KILL": (1, ["kill_clients"]),
    "CLIENT PAUSE": (1, ["pause_clients"]),
    "clocks that jump": (1, ["move_clock"]),
    "event loops blocked for longer than the lease": (1, ["block_loop (longer)"]),
    "lost messages": (1, ["lose_messages"]),
    "doubled messages": (1, ["double_messages"]),
    "reordered messages": (1, ["reorder_messages"]),
}
"""What a published report contains at least: how many faults of which kinds together. Failovers are only
required if one of its runs has Sentinel."""


def total(entries: Sequence[Entry]) -> dict[str, Any]:
    """The sums over all entries of a report."""
    violations: Counter[str] = Counter()
    decided: Counter[str] = Counter()
    for entry in entries:
        violations.update(entry["violations"])
        decided.update(entry.get("decided", {}))
    counts = {name: _count(entries, kinds) for name, (_, kinds) in PUBLISHED.items()}
    return {
        "faults": sum(entry["faults"]["total"] for entry in entries),
        "runs": sum(entry["runs"]["accepted"] for entry in entries),
        "executions": sum(entry["executions"] for entry in entries),
        "kinds": {name: count for name, count in counts.items() if name != "faults"},
        "decided": dict(sorted(decided.items())),
        "violations": dict(violations),
    }


def missing(entries: Sequence[Entry]) -> list[str]:
    """What a published report with these entries lacks, each as a sentence."""
    with_sentinel = any(entry["options"].get("sentinel") for entry in entries)
    found = [
        f"{name}: {count} of {least}"
        for name, (least, kinds) in PUBLISHED.items()
        if (count := _count(entries, kinds)) < least and (with_sentinel or name != "failovers")
    ]
    for mode in ("everysec", "always"):
        if not any(_count([e], ["kill_redis"]) for e in entries if e["options"]["appendfsync"] == mode):
            found.append(f"no Redis with appendfsync {mode} was killed")
    found += [f"seed {e['options']['seed']}: {text}" for e in entries for text in e["faults"]["not injected"]]
    return found


def merged(paths: Sequence[Path]) -> list[Entry]:
    """The entries of several reports. Raises `ValueError` for a run that occurs twice, and unless all are of
    one commit without changes."""
    entries = [entry for path in paths for entry in json.loads(path.read_text())["runs"]]
    commits = {entry["commit"] for entry in entries}
    if len(commits) != 1:
        raise ValueError(f"the reports must be of one commit, and are of {', '.join(sorted(commits))}")
    (commit,) = commits
    if commit.endswith("-dirty"):
        raise ValueError(f"the reports are of the commit {commit}: commit the changes first")
    runs = Counter((entry["began_at"], entry["options"]["seed"]) for entry in entries)
    for (began_at, seed), times in runs.items():
        if times > 1:
            raise ValueError(f"the run of the seed {seed} that began at {began_at} is in the reports twice")
    return entries


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write the report with these entries."""
    path.write_text(json.dumps({"total": total(entries), "runs": entries}, indent=2) + "\n")


def _count(entries: Sequence[Entry], kinds: Sequence[str]) -> int:
    """How many faults of these kinds were injected. A kind without a length is the sum of both lengths."""
    return sum(
        count
        for entry in entries
        for name, count in entry["faults"].items()
        if isinstance(count, int) and (name in kinds or name.partition(" (")[0] in kinds)
    )
