"""What the tests of installations share: one download, and the environments that were made from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.extras.environments import Environments

SDK = "io-openagent-sdk>=0.4,<0.5"


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Generator[Environments]:
    """Of this test process. What was downloaded is shared with the others of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    of_all = base.parent if base.name.startswith("popen-") else base
    environments = Environments(of_all / "installations")
    environments.download()
    yield environments
    for folder in environments.folder.glob(f"env-{os.getpid()}-*"):  # a virtual environment is large
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def original_sdk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the original SDK's package, from the package index, and nothing that it depends on."""
    folder = tmp_path_factory.mktemp("original-sdk")
    quiet = ("--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *quiet, "--no-deps", "--target", str(folder), SDK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def original_sdk_on_path(original_sdk: Path) -> Generator[Path]:
    """The package can be imported in this process until the end of the test module."""
    sys.path.append(str(original_sdk))
    try:
        yield original_sdk
    finally:
        sys.path.remove(str(original_sdk))
        for name in [name for name in sys.modules if name.split(".")[0] == "openagents"]:
            del sys.modules[name]
        sys.modules.pop("tests.extras.original_plugins", None)
