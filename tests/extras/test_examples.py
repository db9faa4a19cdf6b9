"""The examples with what they need from outside: an MCP server of others, and a real model.

The tests with a real model are executed if OPENAI_API_KEY is set (and OPENAI_BASE_URL, OPENAI_MODEL). They
cost a few cents.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from examples.coding.model import CHANGED
from tests.examples.outcomes import Coding, coding, research, support
from tests.extras.server_programs import environment

pytestmark = [pytest.mark.extras, pytest.mark.timeout(600)]

REAL = pytest.mark.skipif(
    not os.environ.get("OPENAI_API_KEY"), reason="OPENAI_API_KEY is not set: no real model to ask"
)
TASK = "Let greet() in greet.py take the name of the person, and return 'Hello, NAME!' with this name."


@pytest.fixture(scope="module")
def git_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("git-server") / "env", "mcp-server-git") / "mcp-server-git"


@pytest.fixture
def coder(git_server: Path, tmp_path: Path) -> Generator[Coding]:
    with coding(tmp_path, git_server) as coder:
        yield coder


def greeting(coder: Coding) -> str:
    """What the changed program of the repository says."""
    program = "import greet; print(greet.greet('Ada'))"
    return coder.dev.run("env", "-C", coder.dev.env["CODING_REPOSITORY"], "python3", "-B", "-c", program)


def test_a_change_is_committed_when_the_person_says_so(coder: Coding) -> None:
    """A commit that is denied leaves the change in the working tree."""
    said = coder.ask(TASK, typed="n\n")

    assert "not committed: terminal denied" in said
    assert coder.git("log", "--format=%s").split("\n")[:-1] == ["Begin"]
    assert coder.git("diff", "--staged", "--name-only") == "greet.py\n"

    said = coder.ask(TASK, typed="y\n")

    assert "this is committed" in said
    assert coder.git("log", "--format=%s").split("\n")[:-1] == ["Greet people by name", "Begin"]
    assert coder.git("show", "HEAD:greet.py") == CHANGED
    assert coder.git("status", "--porcelain") == ""
    assert greeting(coder) == "Hello, Ada!\n"


@REAL
def test_a_real_model_changes_the_repository(git_server: Path, tmp_path: Path) -> None:
    with coding(tmp_path, git_server, real_model=True) as coder:
        coder.ask(TASK, typed="y\n" * 5)

        assert greeting(coder) == "Hello, Ada!\n"
        assert len(coder.git("log", "--format=%s").splitlines()) == 2
        assert coder.git("status", "--porcelain") == ""


@REAL
def test_a_real_model_pays_back_what_a_colleague_approves(tmp_path: Path) -> None:
    with support(tmp_path, real_model=True) as shop:
        answer = shop.ask_and_decide("ada", "A17 came broken. I want my money back.", "approve")

        assert answer.strip()
        assert shop.refunds() == {"A17": 4500}


@REAL
def test_a_real_model_writes_the_report_of_a_team(tmp_path: Path) -> None:
    with research(tmp_path, real_model=True) as example:
        report = example.ask("How is a dead worker noticed, and who takes its runs over?")

        assert report.strip()
        assert 2 <= len(example.team()) <= 5
        assert {run["state"] for run in example.team()} == {"completed"}
        assert "  from " in report
