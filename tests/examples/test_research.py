"""The example of a research agent, from outside: one command asks, and the report names its sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.research.model import PATTERNS
from examples.research.team import AT_ONCE
from tests.examples.outcomes import research
from tests.support.deployment import ROOT

pytestmark = pytest.mark.long


def test_a_question_becomes_a_report_of_a_team(tmp_path: Path) -> None:
    """Each part is researched by a run of its own, and no more of them work at once than the lead allows."""
    with research(tmp_path) as example:
        report = example.ask("What happens to a run when its worker dies?")
        team, most_at_once = example.team(), example.most_at_once()

    assert f"answer {len(PATTERNS)} questions" in report
    assert all(question in report for question in PATTERNS)
    sources = [line.removeprefix("  from ") for line in report.splitlines() if line.startswith("  from ")]
    assert len(sources) == len(PATTERNS)
    assert all((ROOT / "docs" / source).is_file() for source in sources)
    assert [(run["agent_id"], run["state"]) for run in team] == [("researcher", "completed")] * len(PATTERNS)
    assert most_at_once == AT_ONCE
