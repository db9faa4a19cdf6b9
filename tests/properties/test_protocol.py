"""The protocol under all faults: its promises hold after every step, and every run ends."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from tests.properties.lab import Lab
from tests.properties.machine import BATCH, play

EXAMPLES = int(os.environ.get("OPENAGENTS_TEST_EXAMPLES", "60"))  # thousands for a long hunt


@pytest.fixture
def lab(redis_url: str) -> Generator[Lab]:
    lab = Lab(redis_url)
    yield lab
    lab.close()


@pytest.mark.share(of=2)
@pytest.mark.parametrize("seed", range(EXAMPLES // BATCH))
def test_whatever_happens_the_promises_hold_and_every_run_ends(lab: Lab, seed: int) -> None:
    """Lost, duplicate and late messages; deaths and paused workers; lost answers; a Redis that loses a
    second."""
    play(lab, seed)
