"""Messages: what a message of any producer asks for."""

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


def parsed(message: TaskMessage) -> str | RunRequest:
    return parse_message(message, max_bytes=10_000)


def test_our_own_message_names_a_run() -> None:
    """The request is stored in the run record."""
    assert parsed(message(IDS, ours=True)) == "r1"


def test_a_foreign_message_is_a_request_under_its_task_id() -> None:
    """A producer without this package sends the request itself; the Celery task id becomes the run_id."""
    request = parsed(message(REQUEST))

    assert isinstance(request, RunRequest)
    assert (request.run_id, request.input_text) == ("r1", "hi")


def test_a_request_may_be_a_keyword_argument() -> None:
    """`kwargs: {"request": …}` has the same meaning."""
    assert isinstance(parsed(message(request=REQUEST)), RunRequest)


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
def test_an_invalid_request_raises_a_precise_error(wrong: TaskMessage, says: str) -> None:
    """The sender reads the text in the error of the failed run."""
    with pytest.raises(RequestInvalid, match=says):
        parsed(wrong)


def test_a_request_that_is_too_large_is_refused() -> None:
    """Also if the producer does not know the limit."""
    with pytest.raises(RequestTooLarge):
        parsed(message({**REQUEST, "input_text": "x" * 10_000}))


def test_only_the_id_of_a_message_of_another_format_is_used() -> None:
    """Its content is for other workers; its task id is the run id in every format."""
    tomorrow = TaskMessage(
        "r1", [{"ask": "anything"}, 2], {"more": 3}, "agents", ours=True, format=NEWEST_READ + 1
    )

    assert parsed(tomorrow) == "r1"
    assert run_to_resume(tomorrow) == "r1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    args=st.lists(JSON, max_size=3), kwargs=st.dictionaries(st.text(), JSON, max_size=2), ours=st.booleans()
)
def test_any_message_is_a_request_or_a_coded_error(
    args: list[Any], kwargs: dict[str, Any], ours: bool
) -> None:
    """No message can stop a worker."""
    message = TaskMessage("r1", args, kwargs, "agents", ours)
    try:
        answer: object = parsed(message)
    except OpenAgentsError as error:
        answer = error.code.partition(".")[0]

    assert answer == "request" or isinstance(answer, RunRequest | str)


def test_a_resume_names_its_run() -> None:
    """Its checkpoint id is for display."""
    assert run_to_resume(message("r1", "r1:step:3")) == "r1"
    with pytest.raises(RequestInvalid):
        run_to_resume(message())


def test_a_message_without_an_id_is_refused() -> None:
    """Without an id, two different runs could not be distinguished."""
    anonymous = TaskMessage("no-id-1", [REQUEST], {}, "agents", ours=False, has_id=False)

    with pytest.raises(RequestInvalid, match="no task id"):
        parse_message(anonymous, max_bytes=10_000)
