"""Submission as a plan: what is asked of Redis, when it is asked again, and what a caller learns."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from openagents_worker.errors import RedisUnreachable, RequestInvalid, RunConflict, SubmitUnknown
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store.client import AnswerLost, OnDisk
from openagents_worker.store.scripts import ScriptCall, SubmitAnswer, Submitted
from openagents_worker.submission import submit as submitting
from openagents_worker.submission.new_run import NewRun, digest_of
from openagents_worker.submission.submit import Accepted, submission

REQUEST = {"agent_id": "assistant", "session_id": "s1", "input_text": "hi", "run_id": "r1"}
NEW = Submitted(SubmitAnswer.NEW, state="queued", queue="agents", sent_us=7)
LOST = AnswerLost("the answer was lost")


def settings(**env: str) -> Settings:
    return load_settings({f"OPENAGENTS_{name}": value for name, value in env.items()})


def executed(answers: list[Any], **env: str) -> tuple[Accepted, list[Any]]:
    """The result of the plan that gets these answers of scripts, and its steps."""
    plan, steps = submission(REQUEST, settings(**env), canvas="{}"), []
    step = next(plan)
    while True:
        steps.append(step)
        answer = None if isinstance(step, float) else answers.pop(0)
        try:
            step = plan.throw(answer) if isinstance(answer, Exception) else plan.send(answer)
        except StopIteration as done:
            return done.value, steps


def test_an_accepted_run_has_a_first_message() -> None:
    """With the ids, the queue that Redis has chosen, and the task options."""
    accepted, steps = executed([NEW])

    assert [type(step) for step in steps] == [ScriptCall]
    assert (accepted.run_id, accepted.queue, accepted.is_new) == ("r1", "agents", True)
    assert accepted.first is not None
    assert (accepted.first.sent_us, accepted.first.canvas, accepted.first.attempt) == (7, "{}", 0)


def test_a_lost_answer_is_asked_for_again_with_the_same_script() -> None:
    """The script may have accepted the run; the same request again is the same run."""
    same = Submitted(SubmitAnswer.SAME, state="running", queue="agents")
    accepted, steps = executed([LOST, RedisUnreachable("away"), same])

    assert steps == [steps[0], submitting.REPEAT_PAUSE_S, steps[0], submitting.REPEAT_PAUSE_S, steps[0]]
    assert (accepted.is_new, accepted.first) == (False, None)


def test_without_an_answer_it_is_not_known_whether_the_run_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After some seconds the caller learns the id with which to submit again."""
    now = iter([0.0, 1.0, submitting.REPEAT_FOR_S])
    monkeypatch.setattr(submitting, "time", SimpleNamespace(monotonic=lambda: next(now)))

    with pytest.raises(SubmitUnknown) as error:
        executed([LOST, LOST])

    assert (error.value.run_id, error.value.__cause__) == ("r1", LOST)


def test_a_redis_that_was_never_asked_has_accepted_nothing() -> None:
    """The error is raised at once."""
    with pytest.raises(RedisUnreachable, match="away"):
        executed([RedisUnreachable("away")])


def test_with_strict_durability_the_script_waits_for_the_disk() -> None:
    """Each try does."""
    _, steps = executed([LOST, NEW], DURABILITY="strict")

    assert [type(step) for step in steps] == [OnDisk, float, OnDisk]


def test_an_answer_that_does_not_accept_the_run_is_an_error_with_its_ids() -> None:
    """The plan ends with it."""
    with pytest.raises(RunConflict) as error:
        executed([Submitted(SubmitAnswer.CONFLICT)])

    assert (error.value.run_id, error.value.agent_id, error.value.session_id) == ("r1", "assistant", "s1")


@pytest.mark.parametrize(
    "wrong",
    [{"queue": 5}, {"queue": "a b"}, {"queue": "oa:x"}, {"delay_ms": -1}, {"expires_ms": 10**15}],
    ids=str,
)
def test_wrong_options_are_refused_before_redis_is_asked(wrong: dict[str, Any]) -> None:
    """With a code, whoever submits."""
    ask: Callable[..., Any] = submission
    with pytest.raises(RequestInvalid):
        next(ask(REQUEST, settings(), **wrong))


def test_an_option_that_does_not_exist_is_refused() -> None:
    """It would be ignored."""
    ask: Callable[..., Any] = submission
    with pytest.raises(TypeError, match="prority"):
        next(ask(REQUEST, settings(), prority=1))


def test_the_digest_covers_what_is_stored() -> None:
    """A field with its default value is not a part of it, so that a new field changes no digest."""
    plain = NewRun(submitting.parse_request(REQUEST), settings()).request
    same = submitting.parse_request({**REQUEST, "labels": {}, "tenant": None})
    other = submitting.parse_request({**REQUEST, "labels": {"a": "b"}})

    assert digest_of(plain) == digest_of(same) != digest_of(other)
