"""A fault is counted when it has met something."""

from __future__ import annotations

from pathlib import Path

from chaos.deployment import Deployment
from chaos.faults import Faults
from chaos.schedule import Fault, FaultKind


def test_a_block_of_the_loop_counts_when_a_step_gets_it(tmp_path: Path) -> None:
    """Until then it has had no effect, and so has one for which no step of another run comes."""
    deployment = Deployment(tmp_path, workers=0, lease_s=2.5)
    faults = Faults(deployment, seed=1)
    for _ in range(2):
        faults.inject(Fault(0.0, FaultKind.BLOCK_LOOP, longer_than_lease=True, victim=0.0))
    assert (faults.done.total(), faults.without_effect.total()) == (0, 2)

    answers = [deployment.answer_effect({"run": "r1"}) for _ in range(2)]

    assert [set(answer) for answer in answers] == [{"block_s"}, set()]
    assert faults.done == {"block_loop (longer)": 1}
    assert faults.without_effect.total() == 1
