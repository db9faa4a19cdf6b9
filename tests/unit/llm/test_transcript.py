"""Transcripts: what a run adds to its session, and what later runs get from it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.llm.transcript import (
    MAX_ANSWER_FIELDS_BYTES,
    MAX_TOOL_MESSAGES_BYTES,
    model_messages,
    turn_entries,
    usable_entries,
)

IDS = {"run_id": "r1", "agent_id": "a"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "name": "add", "arguments": {}}]}
RESULT = {"role": "tool", "tool_call_id": "c", "name": "add", "content": "2"}


def asked(text: str = "hi", run_id: str | None = "r1") -> dict[str, Any]:
    return {"role": "user", "content": text, **({"run_id": run_id} if run_id else {})}


def said(text: str = "hello", run_id: str | None = "r1", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"run_id": run_id} if run_id else {}), **more}


# --- what is left ----------------------------------------------------------------------------------------


def test_a_completed_run_adds_its_question_calls_and_answer() -> None:
    """Two entries. The tool messages are in the second one, in a field that older versions ignore."""
    question, answer = turn_entries("1+1?", "2", IDS, stop_reason="completed", tool_messages=[CALLED, RESULT])

    assert question == {"role": "user", "content": "1+1?", **IDS}
    assert answer == {
        "role": "assistant",
        "content": "2",
        **IDS,
        "stop_reason": "completed",
        "is_error": False,
        "tool_messages": [CALLED, RESULT],
    }


@pytest.mark.parametrize("output", ["", " \n", None])
def test_a_run_without_an_answer_leaves_nothing(output: Any) -> None:
    """Providers reject an empty answer, and a question without an answer breaks the alternation of roles."""
    assert turn_entries("hi", output, IDS, stop_reason="completed") == []


@pytest.mark.parametrize(
    ("output", "content"), [({"a": 1}, '{"a":1}'), (0, "0"), (False, "false"), ([], "[]"), ("null", "null")]
)
def test_an_answer_that_is_not_text_is_left_as_json(output: Any, content: str) -> None:
    assert turn_entries("hi", output, IDS, stop_reason="completed")[1]["content"] == content


def test_a_question_without_text_is_left_as_the_model_was_shown_it() -> None:
    assert turn_entries(" ", "What is it?", IDS, stop_reason="completed")[0]["content"] == "(empty message)"


@pytest.mark.parametrize(
    "messages",
    [
        [CALLED],
        [RESULT],
        [CALLED, RESULT, RESULT],
        [CALLED, {**RESULT, "tool_call_id": "other"}],
        [CALLED, RESULT, CALLED, RESULT],
        [CALLED, {**RESULT, "content": "x" * 300_000}],
        [CALLED, {**RESULT, "content": object()}],
        [{"role": "system", "content": "mine"}],
        ["text"],
        "text",
        None,
        7,
    ],
)
def test_calls_that_are_not_whole_or_too_large_are_not_left(messages: Any) -> None:
    """A custom pattern may return anything. The question and the answer are stored anyway."""
    left = turn_entries("hi", "hello", IDS, stop_reason="completed", tool_messages=messages)

    assert [entry["content"] for entry in left] == ["hi", "hello"]
    assert "tool_messages" not in left[1]


# --- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "kept"),
    [
        ([asked(), said()], [asked(), said()]),
        ([asked(), said("openai answered 400", is_error=True), asked(run_id="r2"), said(run_id="r2")], "r2"),
        ([asked(), said(""), asked(run_id="r2"), said(run_id="r2")], "r2"),
        ([asked(), said(" \n")], []),
        ([asked(""), said()], [asked("(empty message)"), said()]),
        ([said(), asked(run_id="r2"), said(run_id="r2")], "r2"),
        ([asked(), asked(run_id="r2"), said(run_id="r2")], "r2"),
        ([asked(run_id="r2"), said(run_id="r2"), asked()], "r2"),
        ([asked(), said("boom", is_error=True), asked(), said()], [asked(), said()]),
        (
            [{"role": "system", "content": "Summary."}, asked(), said()],
            [{"role": "system", "content": "Summary."}, asked(), said()],
        ),
        (
            [asked(run_id=None), said(run_id=None), asked("", run_id=None)],
            [asked(run_id=None), said(run_id=None)],
        ),
        ([{"role": "robot", "content": "?"}, "text", None, {}], []),
        ([asked(), said(tool_messages=[CALLED])], [asked(), said()]),
    ],
)
def test_invalid_entries_are_left_out_when_a_session_is_read(entries: list[Any], kept: Any) -> None:
    """Entries of older versions (errors as answers, blank messages) are left out; complete turns stay."""
    expected = [asked(run_id=kept), said(run_id=kept)] if isinstance(kept, str) else kept

    assert usable_entries(entries) == expected


def test_a_model_is_shown_roles_texts_and_calls_and_nothing_else() -> None:
    """In their order. Run ids are not sent to the model."""
    entries = json.loads(
        json.dumps(turn_entries("1+1?", "2", IDS, stop_reason="completed", tool_messages=[CALLED, RESULT]))
    )

    assert model_messages(entries) == [
        {"role": "user", "content": "1+1?"},
        CALLED,
        RESULT,
        {"role": "assistant", "content": "2"},
    ]


def test_of_many_turns_the_newest_are_shown() -> None:
    """Preceded by the system messages of the context assembler."""
    summary = {"role": "system", "content": "Summary."}
    entries = [summary, *(entry for n in range(4) for entry in (asked(str(n)), said(f"re {n}")))]

    assert [message["content"] for message in model_messages(entries, turns=2)] == [
        "Summary.",
        "2",
        "re 2",
        "3",
        "re 3",
    ]
    assert len(model_messages(entries, turns=4)) == len(model_messages(entries)) == 9


# --- images, and opaque fields of the answer -------------------------------------------------------------


def test_bytes_of_images_that_are_too_large_are_left_out_of_a_transcript() -> None:
    """The turn stays. Every later run of the session would pay for the bytes. A URL stays, too."""
    photo = {"type": "image", "data": "A" * MAX_TOOL_MESSAGES_BYTES, "media_type": "image/png"}
    linked = {"type": "image", "url": "https://example.com/a.png"}
    result = RESULT | {"content": [{"type": "text", "text": "Here:"}, photo, linked]}

    _, answer = turn_entries("hi", "2", IDS, stop_reason="completed", tool_messages=[CALLED, result])

    text, left_out, kept = answer["tool_messages"][1]["content"]
    assert (text["text"], kept) == ("Here:", linked)
    assert left_out == {"type": "text", "text": "[image left out: it is too large for later turns]"}


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({"chat_completions": {"extra_content": 1}}, {"chat_completions": {"extra_content": 1}}),
        ({}, None),
        (None, None),
        ("text", None),
        ({"chat_completions": {"x": "y" * MAX_ANSWER_FIELDS_BYTES}}, None),
        ({"chat_completions": object()}, None),
    ],
)
def test_the_answer_at_the_end_of_the_messages_gives_its_opaque_fields(fields: Any, stored: Any) -> None:
    """What is too large or not JSON is left out; the answer itself is the output of the run."""
    last = {"role": "assistant", "content": "2", "provider_fields": fields}
    messages = [CALLED, RESULT, last]
    _, answer = turn_entries("hi", "two", IDS, stop_reason="completed", tool_messages=messages)

    assert answer.get("provider_fields") == stored
    assert (answer["content"], answer["tool_messages"]) == ("two", [CALLED, RESULT])
