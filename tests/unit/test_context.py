"""Context assemblers: how much of a session's past a run gets to see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.context.base import ContextAssemblyResult
from openagents_worker.errors import PluginConfigError


class Session:
    """A session in memory that notes how much was read from it."""

    def __init__(self, messages: int, artifacts: int = 0) -> None:
        self.messages = [{"role": "user", "content": str(n)} for n in range(messages)]
        self.artifacts = [f"artifact {n}" for n in range(artifacts)]
        self.read = 0

    async def load_messages(self, session_id: str, *, last: int | None = None) -> list[dict[str, Any]]:
        return self._newest(self.messages, last)

    async def list_artifacts(self, session_id: str, *, last: int | None = None) -> list[Any]:
        return self._newest(self.artifacts, last)

    async def count_messages(self, session_id: str) -> int:
        return len(self.messages)

    def _newest(self, items: list[Any], last: int | None) -> list[Any]:
        assert last is None or last > 0
        newest = items if last is None else items[-last:]
        self.read += len(newest)
        return newest


async def assemble(kind: str, session: Session, **config: Any) -> ContextAssemblyResult:
    request = SimpleNamespace(session_id="s1")
    assembler = BUILTIN_ASSEMBLERS[kind](config)
    return await assembler.assemble(request=request, session_state={}, session_manager=session)


async def test_by_default_a_run_sees_the_whole_session() -> None:
    """`default` hands over every message and every artifact."""
    session = Session(messages=30, artifacts=12)

    seen = await assemble("default", session)

    assert seen.transcript == session.messages
    assert seen.session_artifacts == session.artifacts
    assert seen.metadata == {"transcript_size": 30, "omitted": 0}


async def test_a_long_session_is_cut_and_the_model_told_how_much_is_missing() -> None:
    """`truncating` hands over the newest messages under a line that counts the others."""
    seen = await assemble("truncating", Session(messages=25, artifacts=12))

    assert seen.transcript[0] == {"role": "system", "content": "Summary: omitted 5 older message(s)"}
    assert [message["content"] for message in seen.transcript[1:]] == [str(n) for n in range(5, 25)]
    assert seen.session_artifacts == [f"artifact {n}" for n in range(2, 12)]
    assert seen.metadata == {"transcript_size": 20, "omitted": 5}


async def test_truncating_reads_no_more_than_it_shows() -> None:
    """A session of any length costs the same to assemble."""
    session = Session(messages=10_000, artifacts=1_000)

    await assemble("truncating", session, max_messages=3, max_artifacts=2)

    assert session.read == 5


@pytest.mark.parametrize(("messages", "summary"), [(20, True), (25, False), (0, True)])
async def test_no_summary_line_when_nothing_is_missing_or_none_is_wanted(
    messages: int, summary: bool
) -> None:
    """The line appears only where it says something and `include_summary_message` is true."""
    seen = await assemble("truncating", Session(messages), include_summary_message=summary)

    assert all(message["role"] == "user" for message in seen.transcript)
    assert len(seen.transcript) == min(messages, 20)


async def test_a_run_can_be_shown_nothing_of_the_past() -> None:
    """`max_messages` and `max_artifacts` of 0 read nothing."""
    seen = await assemble("truncating", Session(3, 3), max_messages=0, max_artifacts=0)

    assert [message["content"] for message in seen.transcript] == ["Summary: omitted 3 older message(s)"]
    assert seen.session_artifacts == []


def test_a_negative_limit_is_refused_at_load() -> None:
    """Limits are counts."""
    with pytest.raises(PluginConfigError, match="max_messages"):
        BUILTIN_ASSEMBLERS["truncating"]({"max_messages": -1})
