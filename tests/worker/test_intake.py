"""The intake: what a message asks for, whoever sent it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.celery.message import TaskMessage, parse_message, run_to_resume
from openagents_worker.errors import OpenAgentsError, RequestInvalid, RequestTooLarge
from openagents_worker.models import RunRequest
from openagents_worker.store.formats import NEWEST_READ

REQUEST = {"agent_id": "assistant", "session_id": "s1", "input_text": "hi"}
IDS = {"run_id": "r1", "agent_id": "assistant", "session_id": "s1"}


def message(*args: Any, ours: bool = False, **kwargs: Any) -> TaskMessage:
    return TaskMessage("r1", args, kwargs, "agents", ours)


def asked(message: TaskMessage) -> str | RunRequest:
    return parse_message(message, max_bytes=10_000)


def test_our_own_message_names_a_run() -> None:
    """The request waits in the run record."""
    assert asked(message(IDS, ours=True)) == "r1"


def test_a_foreign_message_is_a_request_under_its_task_id() -> None:
    """A producer without our package sends the request itself; the Celery task id becomes the run_id."""
    request = asked(message(REQUEST))

    assert isinstance(request, RunRequest)
    assert (request.run_id, request.input_text) == ("r1", "hi")


def test_a_request_may_be_given_by_name() -> None:
    """`kwargs: {"request": …}` is the same."""
    assert isinstance(asked(message(request=REQUEST)), RunRequest)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (message(), "takes one argument"),
        (message(REQUEST, {"more": 1}), "takes one argument"),
        (message(REQUEST, countdown=3), "takes one argument"),
        (message("hi"), "not str"),
        (message(IDS), "input_text"),
        (message({**REQUEST, "agent": "x"}), "did you mean 'agent_id'"),
        (message({**REQUEST, "run_id": "r2"}), "not the Celery task id"),
        (message({**IDS, "run_id": "r2"}, ours=True), "not the Celery task id"),
    ],
)
def test_a_message_that_is_no_request_says_what_is_wrong(wrong: TaskMessage, says: str) -> None:
    """The sender reads it in the failed run's error."""
    with pytest.raises(RequestInvalid, match=says):
        asked(wrong)


def test_a_request_that_is_too_large_is_refused() -> None:
    """Also from a producer that does not know the limit."""
    with pytest.raises(RequestTooLarge):
        asked(message({**REQUEST, "input_text": "x" * 10_000}))


def test_of_a_message_of_another_format_only_its_id_counts() -> None:
    """Whatever it says, it says to others; its task id is its run's in all formats."""
    tomorrow = TaskMessage(
        "r1", [{"ask": "anything"}, 2], {"more": 3}, "agents", ours=True, format=NEWEST_READ + 1
    )

    assert asked(tomorrow) == "r1"
    assert run_to_resume(tomorrow) == "r1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    args=st.lists(JSON, max_size=3), kwargs=st.dictionaries(st.text(), JSON, max_size=2), ours=st.booleans()
)
def test_whatever_comes_it_is_a_request_or_a_coded_error(
    args: list[Any], kwargs: dict[str, Any], ours: bool
) -> None:
    """No message can stop a worker."""
    message = TaskMessage("r1", args, kwargs, "agents", ours)
    try:
        answer: object = asked(message)
    except OpenAgentsError as error:
        answer = error.code.partition(".")[0]

    assert answer == "request" or isinstance(answer, RunRequest | str)


def test_a_resume_names_its_run() -> None:
    """Its checkpoint is for display."""
    assert run_to_resume(message("r1", "r1:step:3")) == "r1"
    with pytest.raises(RequestInvalid):
        run_to_resume(message())


def test_a_message_without_an_id_is_refused() -> None:
    """It could be nobody's run: two of them would be taken for one."""
    anonymous = TaskMessage("no-id-1", [REQUEST], {}, "agents", ours=False, has_id=False)

    with pytest.raises(RequestInvalid, match="no task id"):
        parse_message(anonymous, max_bytes=10_000)
