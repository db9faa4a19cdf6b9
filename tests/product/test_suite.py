"""The pytest plugin, as an adopter has it: a product's suite in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SHOP = Path(__file__).parent / "shop"


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


def test_a_products_suite_passes_on_the_fixtures_of_the_plugin() -> None:
    """Redis, worker and model are there by naming fixtures; warnings are errors."""
    done = pytest_in(SHOP)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 passed" in done.stdout


def test_what_a_models_function_raises_fails_its_test(tmp_path: Path) -> None:
    """An assertion in it is seen as the test's own, not only as a failed run."""
    (tmp_path / "test_wrong.py").write_text(
        "def test_wrong(agents_worker, scripted_model):\n"
        "    @scripted_model\n"
        "    def model(call):\n"
        "        assert call.said == 'something else'\n"
        "    assert not agents_worker([{'id': 'a'}]).run('a', 'hi').ok\n"
    )

    done = pytest_in(tmp_path, "-p", "openagents_worker.testing")

    assert done.returncode == 1, done.stdout
    assert "something else" in done.stdout
    assert "1 passed, 1 error" in done.stdout


def test_the_plugin_is_not_there_unasked(pytestconfig: pytest.Config) -> None:
    """Installing the library changes nothing in anybody's test run."""
    assert not pytestconfig.pluginmanager.hasplugin("openagents_worker.testing")
    assert [point for point in entry_points(group="pytest11") if "openagents" in point.value] == []
