"""Random concurrent programs of tools, models and recorded functions continue correctly wherever they are
killed.

Each program is killed up to four times, before or after any command to Redis, and continues in a new process
with other timings. Its effects are counted outside of it.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.replay.programs import generate
from tests.replay.world import TOOLS, Case, Kill, number_of_process
from tests.support.deployment import ROOT

SOME = 30
SOME_THAT_WAIT = 10  # each of them takes several attempts
SOME_WITH_EFFECTS = 20
MANY = 2_000


def problems(
    redis_url: str, seed: int, *, waits: bool = False, has_effects: bool = False
) -> list[tuple[str, str]]:
    """The problems of the program of this seed. With `waits`, it also receives values and sleeps. With
    `has_effects`, its tools must not be repeated.

    A program whose result depends on its own time (sleeps, limits) continues as one of its possible
    executions. If that contradicts the journal, the run is stopped. That is not a problem.
    """
    chance = random.Random(seed)
    depends_on_time, has_jitter = chance.random() < 0.35, chance.random() < 0.6
    program = generate(seed, depends_on_time, waits=waits)
    kills = [Kill(chance.randint(2, 14), chance.random() < 0.7) for _ in range(chance.randint(1, 4))]
    steps = frozenset(name for name in TOOLS if chance.random() < 0.4)
    if has_effects:  # a recorded function may be called again
        steps = frozenset()
    found = Case(
        program.run,
        redis_url,
        seed,
        kills,
        has_jitter=has_jitter,
        depends_on_time=depends_on_time,
        is_sampled=program.is_sampled,
        has_effects=has_effects,
        steps=steps,
    ).run()
    may_contradict = depends_on_time and (has_jitter or program.has_limits)
    return [problem for problem in found if not (may_contradict and problem[0] == "mismatch")]


@pytest.mark.share(of=1)
@pytest.mark.parametrize("seed", range(SOME))
def test_a_program_continues_after_every_kill(redis_url: str, seed: int) -> None:
    """Same result, finished calls once, calls in flight with the same key, no mismatch, no hang."""
    assert problems(redis_url, seed) == []


@pytest.mark.parametrize("seed", range(SOME_THAT_WAIT))
def test_a_program_that_waits_continues_after_every_kill(redis_url: str, seed: int) -> None:
    """The same for programs that park: each value is received once, at its place."""
    assert problems(redis_url, seed, waits=True) == []


@pytest.mark.share(of=1)
@pytest.mark.parametrize("seed", range(SOME_WITH_EFFECTS))
def test_each_effect_of_a_program_happens_once_after_every_kill(redis_url: str, seed: int) -> None:
    """The same for tools with effects that know what became of a call: calls in flight happen once, too."""
    assert problems(redis_url, seed, has_effects=True, waits=seed % 2 == 1) == []


@pytest.mark.share(of=3)
@pytest.mark.parametrize("seed", range(SOME, SOME + 20))
def test_a_program_continues_under_another_python(
    redis_url: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wait_for` awaits in a new task before Python 3.12, and in the task of its caller since then."""
    older = asyncio.wait_for

    async def wait_for(work: Any, timeout: float | None) -> Any:
        if number_of_process() % 2 == 0:
            return await older(work, timeout)
        async with asyncio.timeout(timeout):
            return await work

    monkeypatch.setattr(asyncio, "wait_for", wait_for)
    assert problems(redis_url, seed) == []


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_newer_pythons(version: str, tmp_path: Path) -> None:
    """All short tests of this folder, in environments of newer Python versions."""
    python = _python(version)
    if python is None:
        pytest.skip(f"Python {version} is not on this machine")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    bin_ = tmp_path / "venv" / "bin"
    tools = ["pytest", "pytest-asyncio", "pytest-timeout", "hypothesis"]
    subprocess.run([bin_ / "pip", "install", "-q", f"{ROOT}[worker,embedded,flower]", *tools], check=True)
    subprocess.run([bin_ / "python", "-m", "pytest", "-q", "tests/replay"], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_two_thousand_programs(redis_url: str) -> None:
    """Like above. The failure lists the seeds and their problems."""
    for waits, has_effects in ((False, False), (True, False), (False, True), (True, True)):
        found = {
            seed: wrong
            for seed in range(SOME, MANY)
            if (wrong := problems(redis_url, seed, waits=waits, has_effects=has_effects))
        }
        assert found == {}


def _python(version: str) -> str | None:
    """An executable of this Python version that starts. A version manager's shim may exist without it."""
    candidates = [shutil.which(f"python{version}")]
    candidates += map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None
