"""What `make test` downloads on a machine that has nothing yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployment.commands import ROOT

pytestmark = pytest.mark.extras

MIB = 2**20
LIMIT_MIB = 400


def test_all_that_make_test_installs_is_not_much(tmp_path: Path) -> None:
    """It was 125 MiB when this was written, half of it pyright's Node."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(tmp_path), f"{ROOT}[dev]"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]

    downloaded = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    for file in tmp_path.iterdir():
        file.unlink()
    largest = sorted(downloaded, key=lambda name: -downloaded[name])[:5]

    assert len(downloaded) > 50
    assert sum(downloaded.values()) <= LIMIT_MIB * MIB, largest
