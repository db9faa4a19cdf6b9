"""The benchmark beside other systems: our own row end to end, and rows that cannot be measured."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.peers.report import BEGIN, END, rows_of, write_readme, write_table

ROOT = Path(__file__).resolve().parent.parent.parent
MACHINE = {"date": "2026-01-01 00:00 UTC", "processor": "one", "system": "Linux", "load": 0.1, "sync_ms": 0.2}
FACTS = {
    "versions": {"it": "1.0"},
    "durability": "synced",
    "recovery_setting": "timeout",
    "speed_setting": "polls",
    "restarts": False,
}


def measured(**changes: Any) -> dict[str, Any]:
    """What is known of a system after one round."""
    job = {"ms_step": 2.5, "stored": {"file": 2000}, "content": 1000}
    nothing = {"runs_s": 100.0, "worker_mb": 50.0, "servers_mb": 0}
    recovery = {"seconds": 9.5, "finished_before": 6, "finished_again": 0, "in_flight_again": 1}
    rounds = [{"jobs": [[job, job], [job, job]], "nothing": nothing}]
    found = {"title": "It", "facts": FACTS, "rounds": rounds, "recoveries": [recovery], "failures": []}
    return copy.deepcopy(found) | changes


def results(**systems: dict[str, Any]) -> dict[str, Any]:
    return {"machine": MACHINE, "rounds": 1, "minutes": 1.0, "systems": systems}


def test_a_row_shows_medians_and_the_durability_beside_them(tmp_path: Path) -> None:
    """Each figure stands in the row of its system, the bytes as a multiple of the content."""
    table = write_table(results(it=measured()), tmp_path)

    assert "| It | synced | 2.5 | 2.5 | 2.0 | 2.0 | 100 | 9.5 | 0 of 6 | 50 |  |" in table


def test_the_median_of_all_runs_of_a_job_counts() -> None:
    """A slow run among several does not move the figure."""
    found = measured()
    found["rounds"][0]["jobs"][0] = [
        {"ms_step": ms, "stored": {"file": 10}, "content": 10} for ms in (1.0, 2.0, 90.0)
    ]

    job = rows_of(results(it=found))[0]["jobs"][0]

    assert (job["ms_step"], job["range"]) == (2.0, (1.0, 90.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": [], "not_measured": "no postgres found"}, "not measured: no postgres found"),
        ({"rounds": [], "failures": ["it broke"]}, "failed: it broke"),
        ({"recoveries": [{"seconds": None, "waited_s": 60}]}, "not within 60 s"),
        ({"recoveries": [{"seconds": None, "says": "lost"}]}, "| lost |"),
    ],
)
def test_a_figure_that_is_missing_says_why(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """No cell is silently empty for a system that could not be measured, and the others keep their rows."""
    table = write_table(results(it=measured(**changes), other=measured(title="Other")), tmp_path)

    assert said in table
    assert "| Other | synced | 2.5 |" in table


def test_what_was_measured_before_a_failure_stays(tmp_path: Path) -> None:
    """The row keeps its figures, and the failure is told below in one line that breaks no table."""
    found = measured(failures=["worker is dead:\n  a | b"])
    del found["rounds"][0]["nothing"]

    table = write_table(results(it=found), tmp_path)

    assert "| It | synced | 2.5 | 2.5 | 2.0 | 2.0 |  | 9.5 |" in table
    assert "- It: worker is dead: a / b" in table


def test_the_readme_gets_the_short_table_between_its_marks(tmp_path: Path) -> None:
    """What stands around the marks stays; writing twice leaves one table."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")

    for _ in range(2):
        write_readme(results(it=measured()), readme)

    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert (text.count("| It | synced |"), text.count("old")) == (1, 0)


def test_the_readme_has_a_place_for_the_table() -> None:
    """The marks that `--readme` looks for are there, once each and in order."""
    text = (ROOT / "README.md").read_text()

    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index(END)


@pytest.mark.long
def test_our_row_is_measured_end_to_end(tmp_path: Path) -> None:
    """One round over a real Redis and a real worker: times, bytes and throughput are there."""
    command = [sys.executable, "-m", "bench", "peers", "--only", "ours-everysec", "--rounds", "1"]
    command += ["--nothing", "10", "--no-recovery", "--no-picture", "--results", str(tmp_path)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "peers.json").read_text())["systems"]["ours-everysec"]
    assert found["facts"]["durability"] == "Redis AOF everysec"
    measured_once = found["rounds"][0]
    assert all(run["ms_step"] > 0 for job in measured_once["jobs"] for run in job)
    assert all(min(run["stored"].values()) > run["content"] for job in measured_once["jobs"] for run in job)
    assert measured_once["nothing"]["runs_s"] > 0
    assert measured_once["nothing"]["worker_mb"] > 10


DIES = """
import subprocess, sys
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print('{"ok": {"child": %d}}' % child.pid, flush=True)
sys.stdin.readline()
sys.exit(3)
"""

DRIVER = """
import os, sys
from pathlib import Path
from bench.peers import drive
from bench.peers.systems import System

drive.ADAPTERS = Path(sys.argv[1])
drive.adopt_orphans()
try:
    with drive.Adapter(System("dies", "Dies", "ours", {})) as adapter:
        child = adapter.answer(30)["child"]
        adapter.ask("start", 30)
except drive.Failed as why:
    print("failed:", why)
try:
    os.kill(child, 0)
    print("the child lives")
except ProcessLookupError:
    print("the child is gone")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
def test_an_adapter_that_dies_leaves_no_process_behind(tmp_path: Path) -> None:
    """Its row fails and says so; a server that it had started in a session of its own is ended."""
    (tmp_path / "ours_peer.py").write_text(DIES)

    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert "failed: the adapter has ended" in done.stdout, done.stderr
    assert "the child is gone" in done.stdout
