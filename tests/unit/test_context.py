"""Context assemblers: how much of a session's past a run gets to see."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.context.tokens import BytesEstimate, TextTokens, token_counter
from openagents_worker.errors import PluginConfigError
from openagents_worker.llm.transcript import model_messages
from openagents_worker.models.media import MEDIA_TOKENS
from openagents_worker.models.omissions import omission_note
from openagents_worker.store.sessions import TranscriptSummary
from tests.support.session_reading import StoredSession, assemble, turn
from tests.unit.llm.wire import ANTHROPIC, FORMATS, RESPONSES, Format

BY_TOKENS = ["head_tail", "sliding_window", "importance_weighted"]
WORDS = TextTokens("a table of words", lambda text: [hash(word) for word in text.split()])
"""A tokenizer of our own: a word is a token."""


def messages(count: int) -> list[dict[str, Any]]:
    """Messages that no run has written."""
    return [{"role": "user", "content": str(number)} for number in range(count)]


def turns(count: int, **options: Any) -> list[dict[str, Any]]:
    return [entry for number in range(count) for entry in turn(number, **options)]


def questions(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["content"].split()[0] for entry in entries if entry["role"] == "user"]


async def test_by_default_a_run_sees_the_whole_session() -> None:
    """`default` hands over every message and every artifact."""
    session = StoredSession(messages(30), artifacts=12)

    seen = await assemble("default", session)

    assert seen.transcript == session.entries
    assert seen.session_artifacts == session.artifacts
    assert seen.metadata == {"assembler": "default", "transcript_size": 30, "omitted": 0}


@pytest.mark.parametrize("kind", sorted(BUILTIN_ASSEMBLERS))
@pytest.mark.parametrize(
    "summary", [None, TranscriptSummary(1, 6, "so far"), TranscriptSummary(1, 24, "all")]
)
async def test_turns_that_other_runs_hold_stand_behind_the_stored_ones(
    kind: str, summary: TranscriptSummary | None
) -> None:
    """A shared child sees them as if they were stored in the session."""
    options = {"counter": WORDS, "max_input_tokens": 60} if kind in BY_TOKENS else {}
    for entries in (turns(14), messages(28)):
        stored = await assemble(kind, StoredSession(entries, artifacts=12, summary=summary), **options)
        for held in (1, 2, 5, 27, 28, 40):
            session = StoredSession(entries, artifacts=12, summary=summary, held=held)
            assert await assemble(kind, session, **options) == stored
            assert await session.reader.count_messages("s1") == 28 - (summary.messages - 2 if summary else 0)
            assert await session.reader.count_artifacts("s1") == 12
            begin, end = session.reader.bounds
            assert await session.reader.load_range("s1", begin, end) == session.entries[begin:end]
            oldest = [turn_ async for turn_ in session.reader.oldest_turns("s1")]
            newest = [turn_ async for turn_ in session.reader.newest_turns("s1")]
            assert oldest == newest[::-1]


async def test_a_long_session_is_cut_and_the_model_told_how_much_is_missing() -> None:
    """`truncating` hands over the newest messages under a line that counts the others."""
    seen = await assemble("truncating", StoredSession(messages(25), artifacts=12))

    assert seen.transcript[0] == omission_note("Summary: omitted 5 older message(s)")
    assert [message["content"] for message in seen.transcript[1:]] == [str(n) for n in range(5, 25)]
    assert seen.session_artifacts == [f"artifact {n}" for n in range(2, 12)]
    assert seen.metadata == {
        "assembler": "truncating",
        "strategy": "truncating",
        "token_counter": "none",
        "transcript_size": 20,
        "omitted": 5,
        "omitted_messages": 5,
        "omitted_artifacts": 2,
    }


async def test_truncating_reads_no_more_than_it_shows() -> None:
    """A session of any length costs the same to assemble."""
    session = StoredSession(messages(10_000), artifacts=1_000)

    await assemble("truncating", session, max_messages=3, max_artifacts=2)

    assert session.read == 5


@pytest.mark.parametrize(("count", "summary"), [(20, True), (25, False), (0, True)])
async def test_no_summary_line_when_nothing_is_missing_or_none_is_wanted(count: int, summary: bool) -> None:
    """The line appears only where it says something and `include_summary_message` is true."""
    seen = await assemble("truncating", StoredSession(messages(count)), include_summary_message=summary)

    assert all(message["role"] == "user" for message in seen.transcript)
    assert len(seen.transcript) == min(count, 20)


async def test_a_run_can_be_shown_nothing_of_the_past() -> None:
    """`max_messages` and `max_artifacts` of 0 read nothing."""
    seen = await assemble(
        "truncating", StoredSession(messages(3), artifacts=3), max_messages=0, max_artifacts=0
    )

    assert [message["content"] for message in seen.transcript] == ["Summary: omitted 3 older message(s)"]
    assert seen.session_artifacts == []


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("truncating", {"max_messages": -1}),
        ("sliding_window", {"max_input_tokens": 0}),
        ("head_tail", {"head_messages": -1}),
        ("sliding_window", {"head_messages": 3}),
        ("sliding_window", {"compaction": {"max_summary_tokens": 1}}),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_at_load(kind: str, config: dict[str, Any]) -> None:
    """Limits are counts, and every option is known."""
    with pytest.raises(PluginConfigError):
        BUILTIN_ASSEMBLERS[kind](config)


# --- every assembler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILTIN_ASSEMBLERS)
@settings(deadline=None, max_examples=25)  # the machine may be busy
@given(data=st.data())
async def test_every_assembler_hands_over_whole_turns_in_order(kind: str, data: st.DataObject) -> None:
    """A question keeps its answer, and a tool call its result, wherever the limit falls."""
    shape = data.draw(st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=60), "turns")
    entries = [entry for n, (words, tool) in enumerate(shape) for entry in turn(n, words=words, tool=tool)]
    config: dict[str, Any] = {}
    if kind in BY_TOKENS:
        config = {"max_input_tokens": data.draw(st.integers(1, 300), "tokens"), "reserve_for_response": 0}
    elif kind == "truncating":
        config = {"max_messages": data.draw(st.integers(0, 20), "messages")}
    session = StoredSession(entries)

    seen = await assemble(kind, session, counter=WORDS if kind in BY_TOKENS else None, **config)

    stored = [entry for entry in seen.transcript if entry["role"] != "system"]
    assert [entry["role"] for entry in stored] == ["user", "assistant"] * (len(stored) // 2)
    numbers = [int(entry["run_id"][1:]) for entry in stored]
    assert numbers == sorted(numbers)
    assert numbers[::2] == numbers[1::2]
    sent = model_messages(seen.transcript)
    called = [call["id"] for message in sent for call in message.get("tool_calls", ())]
    assert called == [message["tool_call_id"] for message in sent if message["role"] == "tool"]
    if kind in BY_TOKENS:
        assert seen.metadata["kept_tokens"] <= config["max_input_tokens"]
        assert seen.metadata["omitted_messages"] == len(entries) - len(stored)


@pytest.mark.share(of=1)
@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
@pytest.mark.parametrize("kind", BUILTIN_ASSEMBLERS)
async def test_a_provider_gets_one_system_message_however_long_the_session_is(
    kind: str, wire: Format
) -> None:
    """Many refuse a second one. The note about left-out messages is in the next message of the user."""
    prompt, question = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "And now?"}
    seen = await assemble(kind, StoredSession(turns(60, words=300, tool=True)))

    body = wire.body([prompt, *model_messages(seen.transcript), question])

    sent = body["input"] if wire is RESPONSES else body["messages"]
    assert [at for at, message in enumerate(sent) if message.get("role") == "system"] == (
        [] if wire is ANTHROPIC else [0]
    )
    assert "omitted" not in json.dumps(body.get("system", ""))
    noted = [message for message in sent if "Summary: omitted" in json.dumps(message)]
    assert len(noted) == (kind in ("truncating", "head_tail"))
    assert all(message["role"] == "user" and "q" in json.dumps(message["content"]) for message in noted)


@pytest.mark.parametrize("kind", [kind for kind in BUILTIN_ASSEMBLERS if kind != "default"])
async def test_a_session_of_any_length_costs_the_same_to_assemble(kind: str) -> None:
    """Ten thousand messages are read no more than a thousand."""
    read = []
    for count in (500, 5_000):
        session = StoredSession(turns(count, words=30), artifacts=count)
        seen = await assemble(kind, session)
        assert seen.transcript
        read.append(session.read)

    assert read[1] <= 1.1 * read[0] < 3_000


@pytest.mark.parametrize("kind", BUILTIN_ASSEMBLERS)
async def test_a_summary_stands_for_the_messages_that_it_replaced(kind: str) -> None:
    """It comes first, as a question and its answer; the messages themselves are not read."""
    entries = turns(6)
    session = StoredSession(entries, summary=TranscriptSummary(1, 8, "They greeted each other."))

    seen = await assemble(kind, session)

    assert [(entry["role"], entry["content"]) for entry in seen.transcript] == [
        ("user", "Summarize our conversation so far."),
        ("assistant", "They greeted each other."),
        ("user", "q4"),
        ("assistant", "a4"),
        ("user", "q5"),
        ("assistant", "a5"),
    ]
    assert session.read == 4 or kind == "importance_weighted"
    assert seen.metadata["omitted"] == 0


# --- by tokens -------------------------------------------------------------------------------------------


async def test_a_sliding_window_shows_the_newest_turns_that_fit() -> None:
    """Ten words a turn: three turns in thirty tokens."""
    session = StoredSession(turns(10, words=5))

    seen = await assemble(
        "sliding_window", session, counter=WORDS, max_input_tokens=50, reserve_for_response=15
    )

    assert questions(seen.transcript) == ["q7", "q8", "q9"]
    assert seen.metadata == {
        "assembler": "sliding_window",
        "strategy": "sliding_window",
        "token_counter": "a table of words",
        "budget_input_tokens": 50,
        "kept_tokens": 30,
        "transcript_size": 6,
        "omitted_messages": 14,
        "omitted": 14,
        "omitted_artifacts": 0,
    }


async def test_head_and_tail_leave_out_the_middle_and_say_so() -> None:
    """`head_messages` counts messages and keeps whole turns."""
    session = StoredSession(turns(10, words=5))

    seen = await assemble(
        "head_tail", session, counter=WORDS, max_input_tokens=45, reserve_for_response=0, head_messages=3
    )

    assert questions(seen.transcript) == ["q0", "q1", "q8", "q9"]
    assert seen.transcript[4] == omission_note("Summary: omitted 12 message(s) from the middle.")


async def test_a_head_that_is_larger_than_the_budget_is_left_out() -> None:
    """The budget is a limit for the head too."""
    session = StoredSession([*turn(0, words=100), *turn(1), *turn(2)])

    seen = await assemble(
        "head_tail", session, counter=WORDS, max_input_tokens=10, reserve_for_response=0, head_messages=2
    )

    assert questions(seen.transcript) == ["q1", "q2"]


async def test_turns_with_tool_calls_are_more_important_than_others() -> None:
    """A system message at the beginning is the most important."""
    opening = {"role": "system", "content": "Always be polite."}
    session = StoredSession([opening, *turn(0, tool=True), *turns(10)[2:]])

    seen = await assemble(
        "importance_weighted", session, counter=WORDS, max_input_tokens=12, reserve_for_response=0
    )

    assert seen.transcript[0] == opening
    assert questions(seen.transcript) == ["q0", "q9"]


async def test_a_smaller_turn_fills_what_a_larger_one_leaves() -> None:
    """`importance_weighted` goes on behind a turn that does not fit; `sliding_window` stops there."""
    entries = [*turn(0), *turn(1), *turn(2, words=50), *turn(3)]
    budget = {"counter": WORDS, "max_input_tokens": 10, "reserve_for_response": 0}

    weighted = await assemble("importance_weighted", StoredSession(entries), **budget)
    sliding = await assemble("sliding_window", StoredSession(entries), **budget)

    assert questions(weighted.transcript) == ["q0", "q1", "q3"]
    assert questions(sliding.transcript) == ["q3"]


async def test_a_tool_call_and_its_result_count_as_tokens() -> None:
    """What a model gets is counted: also the messages inside a turn."""
    plain = await assemble("sliding_window", StoredSession(turn(0)), counter=WORDS)
    with_tool = await assemble("sliding_window", StoredSession(turn(0, tool=True)), counter=WORDS)

    assert with_tool.metadata["kept_tokens"] > plain.metadata["kept_tokens"] == 2


@pytest.mark.parametrize("kind", BY_TOKENS)
async def test_an_image_in_a_turn_counts_with_its_tokens_and_not_with_its_bytes(kind: str) -> None:
    """60 KB of base64 would be more than the budget: the run would see nothing of its session."""
    png = {"type": "image", "data": b64encode(b"\x89PNG" * 15_000).decode(), "media_type": "image/png"}
    with_image = turn(1, tool=True)
    with_image[1]["tool_messages"][1]["content"] = [{"type": "text", "text": "The page:"}, png]

    seen = await assemble(kind, StoredSession([*turn(0), *with_image]))

    assert questions(seen.transcript) == ["q0", "q1"]
    assert MEDIA_TOKENS < seen.metadata["kept_tokens"] < MEDIA_TOKENS + 100


async def test_text_that_is_not_english_has_a_stated_estimate() -> None:
    """The estimate goes by bytes: a quarter of the characters would be far too low for Chinese."""
    session = StoredSession([{"role": "user", "content": "你好" * 100}])

    seen = await assemble("sliding_window", session)

    assert seen.metadata["token_counter"] == "estimate: bytes/4"
    assert seen.metadata["kept_tokens"] == 150


def test_a_long_text_is_counted_in_pieces_and_no_further_than_needed() -> None:
    """A tokenizer never gets a text that blocks the event loop."""
    pieces: list[int] = []

    def encode(text: str) -> list[int]:
        pieces.append(len(text))
        return [0] * len(text)

    counter = TextTokens("letters", encode)
    assert counter.count("x" * 10_000) == 10_000
    assert counter.count("x" * 1_000_000, 5_000) > 5_000
    assert max(pieces) == 4_000
    assert len(pieces) == 3 + 2
    assert (counter.count(""), BytesEstimate().count("")) == (1, 1)


def test_a_model_without_a_known_tokenizer_is_estimated_and_a_wrong_encoding_refused() -> None:
    """An encoding that the agents file names is never replaced by an estimate."""
    assert token_counter("claude-unknown", None).name == "estimate: bytes/4"
    with pytest.raises(PluginConfigError, match="no_such_encoding") as refused:
        token_counter(None, "no_such_encoding")
    assert "tokenizers" in str(refused.value.hint)


# --- summaries that are due ------------------------------------------------------------------------------


async def selected(
    entries: list[dict[str, Any]], summary: TranscriptSummary | None = None, **config: Any
) -> Any:
    assembler: Any = BUILTIN_ASSEMBLERS["sliding_window"](
        {"max_input_tokens": 40, "reserve_for_response": 10, **config}
    )
    assembler.counter = WORDS
    session = StoredSession(entries, summary=summary)
    request = type("Request", (), {"session_id": "s1"})()
    return await assembler.select(request=request, session_manager=session.reader)


async def test_a_summary_is_due_when_turns_do_not_fit() -> None:
    """The older half of the budget is summarized; the newer one stays, and both are whole turns."""
    compaction = {"compaction": {"max_summary_tokens": 16}}

    fits = await selected(turns(3, words=5), **compaction)
    due = await selected(turns(5, words=5), **compaction)
    never = await selected(turns(5, words=5))

    assert (fits.summarize, fits.ranges) == (None, ((0, 6),))
    assert (due.summarize, due.with_summary, due.ranges) == ((0, 8), ((8, 10),), ((4, 10),))
    assert never.summarize is None


async def test_a_long_session_is_summarized_from_its_oldest_turns_on() -> None:
    """A model gets no more than `max_input_tokens` at once. The next runs summarize the rest."""
    compaction = {"compaction": {"max_summary_tokens": 16}}

    first = await selected(turns(50, words=5), **compaction)
    second = await selected(turns(50, words=5), TranscriptSummary(1, 8, "so far"), **compaction)

    assert (first.summarize, first.with_summary) == ((0, 8), ((98, 100),))
    assert second.summarize == (8, 16)


async def test_what_was_selected_is_stored_as_positions() -> None:
    """The record of a run grows with the number of gaps, not with the session."""
    selection = await selected(turns(50, words=5))

    assert json.loads(selection.model_dump_json(exclude_defaults=True))["ranges"] == [[94, 100]]
