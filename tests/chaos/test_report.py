"""A published report: reports of one commit are merged, and it is said what is missing."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chaos.__main__ import commit_of, main
from chaos.report import PUBLISHED, merged, missing, total

numbers = itertools.count(1)


def entry(
    commit: str = "abc", appendfsync: str = "everysec", *, sentinel: bool = False, **faults: int
) -> dict[str, Any]:
    """A run of a seed that no other entry has."""
    return {
        "commit": commit,
        "began_at": "2026-11-27T10:01:44Z",
        "options": {"seed": next(numbers), "appendfsync": appendfsync, "sentinel": sentinel},
        "faults": {"total": sum(faults.values()), **faults, "without effect": 2, "not injected": []},
        "runs": {"accepted": 10, "completed": 10},
        "executions": 50,
        "decided": {"approvals: deny": 3},
        "violations": {"lost": 0},
    }


def written(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"runs": entries}))
    return path


def test_reports_of_one_commit_become_one(tmp_path: Path) -> None:
    first = written(tmp_path / "1.json", entry(kill_worker=40))
    second = written(tmp_path / "2.json", entry(kill_worker=30, **{"stall_worker (longer)": 2}))

    entries = merged([first, second])

    found = total(entries)
    assert (found["faults"], found["runs"], found["decided"]) == (72, 20, {"approvals: deny": 6})
    assert found["kinds"]["SIGKILL to workers"] == 70
    assert found["kinds"]["stalls and cuts"] == found["kinds"]["stalls and cuts longer than the lease"] == 2


@pytest.mark.parametrize(("commit", "problem"), [("abd", "one commit"), ("abc-dirty", "one commit")])
def test_reports_of_several_commits_are_refused(tmp_path: Path, commit: str, problem: str) -> None:
    paths = [written(tmp_path / "1.json", entry()), written(tmp_path / "2.json", entry(commit))]

    with pytest.raises(ValueError, match=problem):
        merged(paths)


def test_a_report_of_a_tree_with_changes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="commit the changes first"):
        merged([written(tmp_path / "1.json", entry("abc-dirty"))])


def test_what_a_published_report_lacks_is_said(tmp_path: Path) -> None:
    """Too few faults of a kind, no Redis that writes at once, and faults that could not be injected."""
    few = entry(kill_worker=59, kill_redis=20)
    few["faults"]["not injected"] = ["fail_over: it was slow"]

    lacks = missing([few])

    assert "faults: 79 of 1000" in lacks
    assert "SIGKILL to workers: 59 of 60" in lacks
    assert "no Redis with appendfsync always was killed" in lacks
    assert f"seed {few['options']['seed']}: fail_over: it was slow" in lacks
    assert not any(text.startswith("restarts of Redis") for text in lacks)


def test_failovers_are_required_of_a_report_with_sentinel_only() -> None:
    """A deployment with one Redis cannot have any."""
    assert "failovers: 0 of 1" not in missing([entry()])
    assert "failovers: 0 of 1" in missing([entry(), entry(sentinel=True)])


def test_a_run_counts_once(tmp_path: Path) -> None:
    """A report that is named twice, or is already part of another one, is refused."""
    again = written(tmp_path / "1.json", entry(kill_worker=40))

    with pytest.raises(ValueError, match="is in the reports twice"):
        merged([again, again])


def test_the_report_itself_is_no_change_of_the_tree(tmp_path: Path) -> None:
    """The second seed of a command must not be of another commit than the first one."""

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    folder = tmp_path / "chaos"
    folder.mkdir()
    for name in ("report.json", "run.py"):
        (folder / name).write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    commit = git("describe", "--always")

    (folder / "report.json").write_text("of the first seed")
    assert commit_of(folder) == commit
    (folder / "run.py").write_text("changed")
    assert commit_of(folder) == f"{commit}-dirty"


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = written(tmp_path / "1.json", entry(kill_worker=60))
    merged_to = tmp_path / "merged.json"

    assert main(["--merge", str(report), "--report", str(merged_to)]) == 1

    assert json.loads(merged_to.read_text())["total"]["faults"] == 60
    assert "missing: faults: 60 of 1000" in capsys.readouterr().out


def test_everything_that_is_published_is_counted() -> None:
    enough = {kind: 200 for _, kinds in PUBLISHED.values() for kind in kinds}
    entries = [entry(**enough), entry(appendfsync="always", **enough)]

    assert missing(entries) == []
