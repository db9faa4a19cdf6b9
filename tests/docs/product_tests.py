"""Blocks that are tests of a product. One pytest runs all with the same prelude, as starting it is slow."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from tests.docs.blocks import ROOT, Block

__all__ = ["run_product_tests"]

CONFIGURATION = """
[pytest]
addopts = -p openagents_worker.testing -p no:cacheprovider
filterwarnings = error
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
"""
IN_THE_PAGES_FOLDER = """
import pytest
@pytest.fixture(autouse=True)
def in_the_folder_of_the_page(monkeypatch):
    monkeypatch.chdir({project!r})
"""
PATIENCE_S = 900  # a busy machine


def run_product_tests(
    blocks: Sequence[Block], folder: Path, *, head: str, projects: Sequence[Path], env: Mapping[str, str]
) -> dict[str, str]:
    """What went wrong in each block, by its name; an empty text where every test has passed.

    `head` stands before each block; `projects` are the folders of their pages. The configuration is
    that of a product: no plugin of this suite is loaded.
    """
    folder.mkdir()
    (folder / "pytest.ini").write_text(CONFIGURATION)
    for number, block in enumerate(blocks):
        text = f"{head}\n{IN_THE_PAGES_FOLDER.format(project=str(projects[number]))}\n{block.text}"
        (folder / f"test_block_{number}.py").write_text(text)
    report = folder / "report.xml"
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", f"--junitxml={report}", "."],
        cwd=folder,
        env={**env, "PYTHONPATH": os.pathsep.join(map(str, [*projects, ROOT]))},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    if not report.exists():
        return {block.name: ended.stdout + ended.stderr for block in blocks}
    cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314 - pytest has just written it
    return {block.name: _problem(f"test_block_{number}", cases) for number, block in enumerate(blocks)}


def _problem(module: str, cases: Sequence[ElementTree.Element]) -> str:
    of_block = [case for case in cases if module in (case.get("classname"), case.get("name"))]
    if not of_block:
        return "the block has no test"
    return "\n".join(part.text or part.tag for case in of_block for part in case if part.tag != "system-out")
