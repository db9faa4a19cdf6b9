"""The original SDK's package in real workers, with a model server: killed after each step, and installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.producer.handle import RunHandle
from tests.extras.environments import Environments
from tests.extras.original_program import PROGRAM
from tests.extras.test_original_sdk import HERE, PATTERNS
from tests.support.deployment import ROOT, Installation, agent, call, installed
from tests.support.waiting import PATIENCE_S, wait_for

pytestmark = [pytest.mark.extras, pytest.mark.timeout(600)]

SCRIPT = [
    {"tool_calls": [call("once", n=1)]},
    {"tool_calls": [call("once", n=2)]},
    {"text": "done"},
]
STEPS = 2 * len(SCRIPT) - 1


def original(name: str) -> dict[str, Any]:
    pattern = {"impl": PATTERNS[name], "config": {"step_timeout_ms": 600_000}}
    return agent(name, pattern=pattern, tools={"once": f"{HERE}.Once"})


def test_a_worker_is_killed_after_each_step_and_no_call_is_made_twice(
    original_sdk: Path, tmp_path: Path
) -> None:
    """Each call begins in one worker, which is killed before the call ends, and is made by the next one.

    So a worker dies between each step and the next. A finished call is never made again: each model call is
    asked for at most twice, and each tool has its effect once.
    """
    path = f"{ROOT}:{original_sdk}"
    agents = [original(name) for name in PATTERNS]
    with installed(tmp_path, *agents, PYTHONPATH=path, ONCE_FOLDER=str(tmp_path)) as shop:
        shop.model.will_say(*SCRIPT)
        shop.model.may_answer = lambda run_id: times_asked(shop, run_id) > 1
        runs = [shop.submit(name) for name in PATTERNS]
        worker, kills, held = shop.worker, 0, [""] * len(runs)
        while not all(map(is_over, runs)):
            held = wait_for(lambda before=held: next_holds(shop, runs, tmp_path, before), "all runs are held")
            if all(map(is_over, runs)):
                break
            worker.kill()
            kills += 1
            worker = shop.stack.start_worker(f"after-{kills}")
        results = [run.wait(PATIENCE_S) for run in runs]
        asked = [Counter(line["key"] for line in shop.model.asked(run.id)) for run in runs]
    effects = Counter((tmp_path / "effects").read_text().splitlines())

    assert kills >= STEPS
    assert [result.final_output for result in results] == ["done"] * len(runs)
    assert effects == Counter(f"{run.id} {n}" for run in runs for n in (1, 2))
    for name, counts, result in zip(PATTERNS, asked, results, strict=True):
        calls = len(SCRIPT) + (name == "plan_execute")
        assert counts == Counter(dict.fromkeys(counts, 2)), name
        assert (len(counts), result.usage.llm_calls, result.usage.tool_calls) == (calls, calls, 2), name


def is_over(run: RunHandle[Any]) -> bool:
    return run.record().state in ("completed", "failed", "cancelled")


def next_holds(
    shop: Installation, runs: list[RunHandle[Any]], folder: Path, before: list[str]
) -> list[str] | None:
    """For each run, the call in which it waits for the death of its worker; None until all are in another one
    than `before`. A run that is over waits in none."""
    now = ["" if is_over(run) else held_call(shop, run.id, folder) for run in runs]
    are_new = (is_over(run) or (new and new != old) for run, new, old in zip(runs, now, before, strict=True))
    return now if all(are_new) else None


def held_call(shop: Installation, run_id: str, folder: Path) -> str:
    """The call that has begun for the first time and has not ended; none if the run does something else."""
    asked = [line["key"] for line in shop.model.asked(run_id)]
    effects = folder / "effects"
    done = effects.read_text().count(f"{run_id} ") if effects.exists() else 0
    begun = len(list(folder.glob(f"begun-{run_id}-*")))
    if begun > done:
        return f"tool {begun}"
    return asked[-1] if asked and asked.count(asked[-1]) == 1 else ""


def times_asked(shop: Installation, run_id: str) -> int:
    """How often the model call that the run waits for was asked."""
    keys = [line["key"] for line in shop.model.asked(run_id)]
    return keys.count(keys[-1]) if keys else 0


def test_the_package_beside_the_wheel(environments: Environments) -> None:
    """It runs where both are installed, and is imported only for an agent that names a class of it."""
    python = str(environments.new_environment("original") / "bin" / "python")
    asked = [f"{environments.wheel}[worker,embedded]", "io-openagent-sdk>=0.4,<0.5"]
    found = ["--find-links", str(environments.wheel.parent)]
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", *found]
    done = subprocess.run([*install, *asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]

    done = subprocess.run([python, "-c", PROGRAM], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr[-4000:]
    shown = json.loads(done.stdout.splitlines()[-1])

    assert shown == {"ours": "done", "loaded_for_ours": [], "theirs": ["done", "done", "done"]}
