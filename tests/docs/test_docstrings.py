"""The `>>>` examples in the docstrings of the library print what they say."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.docs.blocks import ROOT
from tests.docs.conftest import Deployment


def test_the_examples_of_the_docstrings_are_right(deployment: Deployment) -> None:
    """In a process of their own, as some of them register something, and one starts a worker."""
    ended = subprocess.run(
        [sys.executable, "-P", str(ROOT / "tests" / "docs" / "run_doctests.py")],
        cwd=deployment.folder,
        env={**deployment.env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said["failed"] == {}
    assert said["count"] > 15
