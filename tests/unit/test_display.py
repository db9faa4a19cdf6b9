"""What `watch` and `show` print of a run: what failed and what waits is there, and nothing moves a cursor."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from openagents_worker.cli.display import Follower, error_lines
from openagents_worker.dashboard.conversation import conversation_of
from openagents_worker.dashboard.shown_text import LongText
from openagents_worker.events import RunEvent
from openagents_worker.models import ErrorDetails, RunRecord, RunState, RunUsage, StopReason
from openagents_worker.store.checkpoints import Checkpoint

TRACEBACK = "Traceback (most recent call last):\n  File \"shop.py\", line 3, in price\nKeyError: 'B2'"


def event(name: str, **payload: Any) -> RunEvent:
    return RunEvent(
        name=name, seq=1, run_id="r1", session_id="s1", agent_id="a", life=1, attempt=1,
        timestamp=datetime.now(UTC), payload=payload,
    )  # fmt: skip


def test_an_image_in_a_result_hides_no_text_from_people() -> None:
    """The page of a run shows the first characters of a result, which would be base64."""
    image = {"type": "image", "data": "AAAA" * 10_000, "media_type": "image/png"}
    value = [image, {"type": "text", "text": "A login form."}]
    found = Checkpoint(
        "r1:step:1", 1, "look:1", "tool", "look", value, None, cancelled=False, usage=RunUsage()
    )
    record = RunRecord(run_id="r1", agent_id="a", session_id="s1", queue="agents", state=RunState.RUNNING)

    (shown,) = conversation_of(record, [found])

    assert shown.text == LongText("[image]\nA login form.")


@pytest.mark.parametrize(
    ("name", "payload", "shows"),
    [
        ("memory.inject_failed", {"error": "away"}, "memory.inject_failed error=away"),
        ("memory.writeback_failed", {"error": "away"}, "memory.writeback_failed error=away"),
        ("context.compact_failed", {"error": "away"}, "context.compact_failed error=away"),
        ("tool.preflight", {"tool_id": "t", "result": "error", "error": "away"}, "tool.preflight tool_id=t"),
        (
            "tool.failed",
            {"tool_id": "prise", "error": "there is no tool", "code": "tool.not_found", "message": "so"},
            "tool.failed tool_id=prise error=there is no tool code=tool.not_found",
        ),
        (
            "llm.retrying",
            {"code": "llm.rate_limit", "delay_ms": 4000, "attempt": 1, "error": "answered 429"},
            "llm.retrying code=llm.rate_limit attempt=1 error=answered 429 again_in=4 s",
        ),
        (
            "run.retry_scheduled",
            {"due_at": 17, "delay_ms": 61_500, "error_code": "llm.rate_limit"},
            "run.retry_scheduled error_code=llm.rate_limit again_in=61.5 s",
        ),
    ],
)  # fmt: skip
def test_what_failed_and_what_waits_is_watched(
    capsys: pytest.CaptureFixture[str], name: str, payload: dict[str, Any], shows: str
) -> None:
    """Also of the families of events that are not shown when all goes well."""
    Follower(as_json=False).event(event(name, **payload))
    assert shows in capsys.readouterr().err


@pytest.mark.parametrize("name", ["memory.injected", "context.created", "tool.preflight"])
def test_what_goes_well_on_the_way_is_not(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A dozen of events a run that nobody reads."""
    Follower(as_json=False).event(event(name, result="ok"))
    assert capsys.readouterr().err == ""


def test_no_text_of_a_run_moves_the_terminals_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """What a model or a tool says is shown with its control characters escaped."""
    Follower(as_json=False).event(event("tool.failed", tool_id="t", error="\x1b[2Jgone\r\x07"))
    assert "error=\\x1b[2Jgone \\x07" in capsys.readouterr().err


def test_an_error_is_shown_with_its_traceback() -> None:
    """Below its message; none where there is none."""
    details = ErrorDetails(code="tool.error", message="KeyError: 'B2'", context={"traceback": TRACEBACK})
    assert TRACEBACK in "\n".join(error_lines(StopReason.FAILED, details))
    plain = details.model_copy(update={"context": {}})
    assert len(error_lines(StopReason.FAILED, plain)) == 1
