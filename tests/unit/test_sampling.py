"""The two editions of the tests are all of them; the short one is spread over each table."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.sampling import MOST

ROOT = Path(__file__).parents[2]
MARKS = ("long", "slow", "ui", "extras")
SHORT = " and ".join(f"not {mark}" for mark in MARKS)
LONG = "long and not slow"

TESTS = """
import pytest

@pytest.mark.parametrize("n", range({most}))
def test_small(n): ...

@pytest.mark.parametrize("n", range({most} * 10))
def test_large(n): ...

@pytest.mark.share(of=4)
@pytest.mark.parametrize("n", range(9))
def test_dear(n): ...

@pytest.mark.share(of=1)
@pytest.mark.parametrize("n", range({most} * 2))
def test_needed(n): ...

@pytest.mark.share(of=2)
@pytest.mark.parametrize("n", [pytest.param(0, marks=pytest.mark.slow), 1, 2, 3])
def test_slow_at_first(n): ...

@pytest.mark.parametrize("n", [pytest.param(n, marks=pytest.mark.slow) for n in range(3)])
def test_slow(n): ...

@pytest.mark.long
@pytest.mark.parametrize("n", range({most} * 2))
def test_long(n): ...

def test_one(): ...
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sampled") / "test_tables.py"
    file.write_text(TESTS.format(most=MOST))
    return file


@cache
def collected(file: Path, marks: str, *, case: str = "") -> dict[str, list[int]]:
    """The cases of each test that are selected by an expression of marks."""
    plugins = ["-p", "tests.support.sampling", "-p", "no:cacheprovider"]
    options = [*plugins, "-o", "addopts=", "-c", "pyproject.toml", "--rootdir", ".", "--co", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-m", marks, f"{file}{case}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    found: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        if "::" in line:
            name, _, number = line.partition("::")[2].partition("[")
            found.setdefault(name.removeprefix("test_"), []).append(int(number.rstrip("]") or -1))
    return found


def test_make_test_takes_a_share_of_each_table(file: Path) -> None:
    assert collected(file, SHORT) == {
        "small": list(range(MOST)),
        "large": list(range(0, MOST * 10, 10)),
        "dear": [0, 4, 8],
        "needed": list(range(MOST * 2)),
        "slow_at_first": [1, 3],
        "one": [-1],
    }


def test_make_test_long_takes_the_rest(file: Path) -> None:
    short, long = collected(file, SHORT), collected(file, LONG)

    assert long["dear"] == [1, 2, 3, 5, 6, 7]
    assert long["slow_at_first"] == [2]
    assert long["long"] == list(range(MOST * 2))
    both = {name: sorted([*short.get(name, []), *long.get(name, [])]) for name in short | long}
    slow = {"slow": [0, 1, 2], "slow_at_first": [0]}
    whole = {name: sorted([*numbers, *slow.get(name, [])]) for name, numbers in (both | {"slow": []}).items()}
    assert whole == collected(file, "slow or not slow")


def test_a_case_that_is_named_is_found(file: Path) -> None:
    """Also if it is not in the short edition: then it is deselected, and not unknown."""
    assert collected(file, "slow or not slow", case="::test_large[1]") == {"large": [1]}
    assert collected(file, SHORT, case="::test_large[1]") == {}
