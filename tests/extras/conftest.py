"""What the tests of installations share: one download, and the environments that were made from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator

import pytest

from tests.extras.environments import Environments


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
