"""The provider `litellm`: the real library, in whose provider's place our model server answers."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.extras.environments import Environments
from tests.extras.litellm_program import PROGRAM

pytestmark = [pytest.mark.extras, pytest.mark.timeout(900)]
TIMEOUT_S = 600  # a library of 3,000 modules

FAILURES = {
    "400": ("llm.response", False),
    "401": ("llm.auth", False),
    "404": ("llm.response", False),
    "422": ("llm.response", False),
    "429": ("llm.rate_limit", True),
    "500": ("llm.connection", True),
}


@pytest.fixture(scope="module")
def python(environments: Environments) -> str:
    """Python of an environment with our wheel and the newest LiteLLM."""
    python = str(environments.new_environment("litellm") / "bin" / "python")
    asked = f"{environments.wheel}[worker,litellm]"
    found = ["--find-links", str(environments.wheel.parent)]
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", *found]
    done = subprocess.run([*command, asked], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return python


@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "anthropic/claude-sonnet-4-5"])
def test_a_model_behind_litellm_is_a_model_as_any_other(python: str, model: str) -> None:
    """Texts, tools, counts, costs and errors; whole and streamed; with no word to anybody else.

    The library is not imported before the first call. A cancelled call is cancelled at the provider.
    """
    done = subprocess.run(
        [python, "-c", PROGRAM, model], capture_output=True, text=True, timeout=TIMEOUT_S, cwd="/"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    shown: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])

    assert not shown["loaded_at_start"]
    assert shown["texts"] == ["hello there friend"] * 3
    assert shown["pieces"] > 1
    assert shown["tokens"][0] == shown["tokens"][1]
    assert all(cost is None or cost > 0 for cost in shown["costs"])
    assert shown["tools"] == [["add", 17, "tool_calls", "hello there friend", "stop"]] * 2
    assert {status: tuple(found[:2]) for status, found in shown["failures"].items()} == FAILURES
    assert all(
        has_id and f"no {status} for" in text for status, (*_, has_id, text) in shown["failures"].items()
    )
    assert shown["limited"][:4] == ["llm.rate_limit", True, 429, 7_000]
    assert shown["cancelled"]
    assert "plain-key-0000000000" not in f"{shown['failures']} {done.stdout} {done.stderr}"
    assert (shown["left"], shown["outside"]) == ([], [])
