"""The public names of `import openagents_worker`, and how few modules it loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

import openagents_worker


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after the statement."""
    program = f"{statement}\nimport sys\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import openagents_worker",
        "import openagents_worker.models",
        "import openagents_worker.errors",
        "from openagents_worker import RunFailed, RunRequest, RunResult",
    ],
)
def test_models_and_errors_load_neither_celery_nor_redis(statement: str) -> None:
    """A web product can import our models everywhere, at the price of pydantic."""
    assert not loaded_by(statement) & {"celery", "kombu", "redis"}


def test_run_agent_loads_celery_when_it_is_used() -> None:
    """A name is loaded at its first use, with only the modules that it needs."""
    assert {"celery", "redis"} <= loaded_by("from openagents_worker import run_agent")


def test_every_public_name_can_be_had() -> None:
    """`__all__` is sorted and complete, and each of its names is there."""
    assert openagents_worker.__all__ == sorted(openagents_worker.__all__)
    assert set(openagents_worker.__all__) == set(openagents_worker._MODULE_OF)
    for name in openagents_worker.__all__:
        assert getattr(openagents_worker, name) is not None
    assert set(openagents_worker.__all__) <= set(dir(openagents_worker))


@pytest.mark.parametrize(
    "names",
    [
        "ContextAssemblerPlugin MemoryPlugin PatternPlugin ToolPlugin ToolExecutionSpec Reconciled tool",
        "BudgetExhausted ModelRetryError PermanentToolError RetryableToolError SignalTimeout WaitTimeout",
    ],
)
def test_what_plugins_are_made_of_is_at_the_front_door(names: str) -> None:
    """A plugin's author needs no module of ours but the package itself."""
    assert set(names.split()) <= set(openagents_worker.__all__)


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    """As with any module."""
    with pytest.raises(AttributeError, match="run_agents"):
        openagents_worker.run_agents  # noqa: B018  # asking is the test


def test_a_worker_without_metrics_loads_nothing_for_them() -> None:
    """The client library of Prometheus takes a sixth of a second of the start of a worker."""
    modules = "openagents_worker.celery.bootsteps, openagents_worker.worker.process"

    assert "prometheus_client" not in loaded_by(f"import {modules}")
