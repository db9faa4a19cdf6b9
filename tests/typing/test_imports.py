"""Imports: what a product pays for naming us, counted in modules, as time says more of the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("celery", "httpx", "kombu", "openai", "pydantic", "pydantic_settings", "pytest", "redis")


def loaded_by(statement: str) -> list[str]:
    """The modules that a fresh interpreter has loaded for a statement, beyond its own."""
    program = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True, timeout=240
    )
    return done.stdout.split()


def heavy(modules: list[str]) -> set[str]:
    return {name.split(".")[0] for name in modules} & set(HEAVY)


def test_the_front_door_costs_next_to_nothing() -> None:
    """`import openagents_worker` loads itself, and a handful of the standard library at most."""
    modules = loaded_by("import openagents_worker")

    assert [name for name in modules if name.startswith("openagents_worker")] == ["openagents_worker"]
    assert len(modules) <= 12, modules


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("from openagents_worker import RunFailed", set()),
        ("from openagents_worker import RunRequest, RunResult, RunState", {"pydantic"}),
        ("from openagents_worker import RunEvent", {"pydantic"}),
        ("from openagents_worker import tool", {"pydantic"}),
        ("import openagents_worker.models", {"pydantic"}),
        ("import openagents_worker.testing", set()),
    ],
)
def test_a_name_loads_what_it_needs_and_no_more(statement: str, allowed: set[str]) -> None:
    """Models cost pydantic; only what submits or looks costs Celery and Redis."""
    assert heavy(loaded_by(statement)) <= allowed


def test_submitting_loads_no_worker() -> None:
    """A producer has no runtime, no model's client and no agents file's models in its memory."""
    modules = loaded_by("from openagents_worker import run_agent, sse; run_agent.delay")

    rooms = {name.split(".")[1] for name in modules if name.startswith("openagents_worker.")}
    assert rooms.isdisjoint(
        {"agents", "cli", "context", "llm", "memory", "patterns", "runtime", "testing", "tools", "worker"}
    )
    assert heavy(modules).isdisjoint({"httpx", "pytest"})
