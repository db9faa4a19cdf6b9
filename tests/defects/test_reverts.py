"""The tests of the worst defects can fail: in code that has a defect again, one of its tests does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.defects.table import ROOT, Defect, defects

COPIED = ("openagents_worker", "tests", "tasks", "config", "examples", "docs", "pyproject.toml")
LIMIT_S = 280  # less than the limit of a test, so that the output of a hanging one is shown

REVERTED = [defect for defect in defects() if defect.revert is not None]


def test_the_worst_defects_are_brought_back() -> None:
    wanted = {"D05", "P01", "P02", "P03", "P05", "P11", "A02", "A03", "A07", "B01"}
    assert {defect.id for defect in REVERTED} >= wanted


@pytest.mark.long
@pytest.mark.parametrize("defect", REVERTED, ids=lambda defect: defect.id)
def test_a_test_fails_in_code_with_the_defect(defect: Defect, tmp_path: Path) -> None:
    """Not in every case of every test: pytest stops at the first failure."""
    assert defect.revert is not None
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    changed = tmp_path / defect.revert.file
    text = changed.read_text()
    assert text.count(defect.revert.line) == 1
    changed.write_text(text.replace(defect.revert.line, defect.revert.instead))

    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", *defect.tests],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )

    assert tested.returncode == pytest.ExitCode.TESTS_FAILED, tested.stdout + tested.stderr
    assert "\nFAILED tests/" in tested.stdout, tested.stdout
