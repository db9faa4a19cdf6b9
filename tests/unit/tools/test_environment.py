"""Environment variables: what a run sees of the worker's, and what it sets for its session."""

from __future__ import annotations

import os

import pytest

from openagents_worker.errors import PermanentToolError, ToolError
from openagents_worker.tools.builtin.environment import GetEnv, SetEnv
from tests.unit.run_fakes import FakeRun


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("APP_MODE", "APP_TOKEN", "REDIS_URL"):
        monkeypatch.setenv(name, f"value of {name}")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("LC_MESSAGES", raising=False)


@pytest.mark.parametrize("name", ["APP_MODE", "APP_TOKEN", "REDIS_URL", "OPENAI_API_KEY", "NO_SUCH_VARIABLE"])
async def test_variables_of_the_worker_are_not_readable(name: str) -> None:
    """The error is the same for a variable that exists and for one that does not."""
    with pytest.raises(PermanentToolError, match=f"{name} may not be read") as caught:
        await GetEnv().invoke({"key": name, "default": "x"}, FakeRun())
    assert "value of" not in str(caught.value)
    assert "allow" in str(caught.value.hint)


async def test_harmless_variables_are_readable() -> None:
    """A variable that does not exist has the default."""
    read = GetEnv()

    assert await read.invoke({"key": "TZ"}, FakeRun()) == {"key": "TZ", "value": "UTC", "exists": True}
    assert await read.invoke({"key": "LC_MESSAGES", "default": "C"}, FakeRun()) == {
        "key": "LC_MESSAGES",
        "value": "C",
        "exists": False,
    }


async def test_a_glob_does_not_cover_names_of_secrets() -> None:
    """Somebody who wants an agent to see a token names it in full."""
    some, named = GetEnv({"allow": ["*"]}), GetEnv({"allow": ["APP_TOKEN"]})

    assert (await some.invoke({"key": "APP_MODE"}, FakeRun()))["value"] == "value of APP_MODE"
    with pytest.raises(PermanentToolError):
        await some.invoke({"key": "APP_TOKEN"}, FakeRun())
    assert (await named.invoke({"key": "APP_TOKEN"}, FakeRun()))["value"] == "value of APP_TOKEN"


async def test_a_variable_is_set_for_the_session_alone() -> None:
    """It is part of the state. The environment of the worker, which other runs share, stays as it is."""
    run, other = FakeRun(), FakeRun()

    done = await SetEnv().invoke({"key": "APP_MODE", "value": "mine"}, run)

    assert done == {"key": "APP_MODE", "value": "mine", "set": True}
    assert (await GetEnv().invoke({"key": "APP_MODE"}, run))["value"] == "mine"
    with pytest.raises(PermanentToolError):
        await GetEnv().invoke({"key": "APP_MODE"}, other)
    assert os.environ["APP_MODE"] == "value of APP_MODE"
    assert run.state == {"tool_environment": {"APP_MODE": "mine"}}


async def test_a_session_has_a_bounded_number_of_variables() -> None:
    run = FakeRun()
    for number in range(100):
        await SetEnv().invoke({"key": f"V{number}", "value": "x"}, run)
    await SetEnv().invoke({"key": "V7", "value": "y"}, run)

    with pytest.raises(ToolError, match="100"):
        await SetEnv().invoke({"key": "V100", "value": "x"}, run)


async def test_a_variable_needs_a_run() -> None:
    """Outside of a run there is no state."""
    with pytest.raises(PermanentToolError):
        await SetEnv().invoke({"key": "A", "value": "b"}, None)
