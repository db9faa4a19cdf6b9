"""The protocol under everything that can happen to it: the promises hold after every step, and every run ends."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.properties.lab import Lab
from tests.properties.machine import Protocol

EXAMPLES = int(os.environ.get("OPENAGENTS_TEST_EXAMPLES", "60"))  # thousands for a long hunt
STEPS = 40


@pytest.fixture
def lab(redis_url: str) -> Generator[Lab]:
    lab = Lab(redis_url)
    yield lab
    lab.close()


@pytest.mark.timeout(60 + EXAMPLES)
def test_whatever_happens_the_promises_hold_and_every_run_ends(lab: Lab) -> None:
    """Lost, doubled and late messages, deaths, sleepers, lost answers, a Redis that forgets its last second."""
    run_state_machine_as_test(
        type("ProtocolInTheLab", (Protocol,), {"lab": lab}),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        ),
    )
