"""Queue names: on a Redis broker each is a key, which must not belong to another part."""

from __future__ import annotations

import pytest

from openagents_worker.errors import ConfigValidationError, OpenAgentsError
from openagents_worker.models import parse_request
from openagents_worker.producer.queue_checks import queue_to_send_to
from openagents_worker.producer.task_options import task_options_json
from openagents_worker.queue_names import MAX_QUEUE_BYTES, problem_with_queue, problem_with_read_queue
from openagents_worker.settings import load_settings
from openagents_worker.store.keys import KEYS

VALID = ["agents", "reports-2", "team:agents", "{c1}agents", "a" * MAX_QUEUE_BYTES, "ärger", "x@y", "oae:x"]
INVALID = [
    "",
    "a" * (MAX_QUEUE_BYTES + 1),
    "ä" * (MAX_QUEUE_BYTES // 2 + 1),
    "two words",
    "agents\x06\x163",
    "agents\n",
    "agents\0",
    "*",
    "a?",
    "[a]",
    "a|b",
    "\ud800",
    "‮agents",
    "unacked",
    "unacked_index",
    "unacked_mutex",
    "_kombu.binding.agents",
    "_kombu.binding_deadlines",
    "celery@host.celery.pidbox",
    "reply.celery.pidbox",
    "7c.reply.celery",
    "celeryev",
    "celeryev.7c",
    "amq.direct",
    "celery-task-meta-7",
    "celery-taskset-meta-7",
    "chord-unlock-7",
    "agents.wake",
    ".wake",
    "oa",
    "oa:due",
    *(f"oa:{spec.template.format('x')}" for spec in KEYS),
]


@pytest.mark.parametrize("name", VALID)
def test_a_name_that_is_nobody_elses_key_may_be_a_queue(name: str) -> None:
    """Letters and digits of any script, and ten other characters."""
    assert problem_with_queue(name, "oa") is None
    assert problem_with_read_queue(f"{name}.wake", "oa") is None


@pytest.mark.parametrize("name", INVALID)
def test_a_name_that_could_be_a_key_of_somebody_else_is_refused(name: str) -> None:
    """The sentence contains the name and the reason."""
    problem = problem_with_queue(name, "oa")

    assert problem is not None
    assert "is not a valid queue name: " in problem
    assert problem.isprintable()


def test_a_cells_prefix_may_have_a_hash_tag() -> None:
    """Every name that begins with it is rejected, and no other name."""
    assert problem_with_queue("oa:{c1}:due", "oa:{c1}")
    assert problem_with_queue("oa:due", "oa:{c1}") is None


@pytest.mark.parametrize("name", [name for name in INVALID if name and not name.startswith("oa")])
def test_a_request_with_such_a_queue_is_refused(name: str) -> None:
    """Before anything is written; the path names the field."""
    with pytest.raises(OpenAgentsError) as error:
        parse_request({"agent_id": "a", "session_id": "s", "input_text": "", "queue": name})

    assert error.value.code == "request.invalid"
    assert "queue: " in error.value.message


@pytest.mark.parametrize("name", [name for name in INVALID if name])
def test_a_setting_with_such_a_queue_is_refused(name: str) -> None:
    """Nobody's default queue is a key."""
    with pytest.raises(ConfigValidationError) as error:
        load_settings({"OPENAGENTS_QUEUE": name})

    assert "OPENAGENTS_QUEUE" in error.value.message


PREFIXES = ["unacked", "_kombu.binding.agents", "celery-task-meta-x", "a\x06", "x.wake"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_key_prefix_is_none_of_kombus_keys(prefix: str) -> None:
    """Our keys would be mixed with those of the broker."""
    with pytest.raises(ConfigValidationError) as error:
        load_settings({"OPENAGENTS_KEY_PREFIX": prefix})

    assert "OPENAGENTS_KEY_PREFIX" in error.value.message
    assert "key prefix" in error.value.message


@pytest.mark.parametrize("option", ["link", "link_error", "chain", "chord"])
@pytest.mark.parametrize("name", ["oa:due", "unacked", "agents\x06\x163"])
def test_what_is_linked_to_a_run_names_no_such_queue(option: str, name: str) -> None:
    """Celery sends it there when the run has ended."""
    linked = {"task": "shop.mail", "args": [], "kwargs": {}, "options": {"queue": name}}
    group = {"task": "celery.group", "kwargs": {"tasks": [linked]}, "options": {}}

    for given in (linked, [linked], group, [[group]]):
        with pytest.raises(OpenAgentsError) as error:
            task_options_json({option: given}, max_bytes=10_000, key_prefix="oa")
        assert error.value.code == "request.invalid"
        assert error.value.message.startswith(option)


def test_arguments_of_a_linked_task_may_say_what_they_like() -> None:
    """Only the options of a signature name a queue."""
    said = {"args": [{"queue": "oa:due"}], "kwargs": {"queue": "unacked"}}
    linked = {"task": "shop.mail", "options": {}, **said}

    assert task_options_json({"link": [linked]}, max_bytes=10_000, key_prefix="oa")


def test_a_stored_run_with_such_a_queue_is_sent_to_the_default_one() -> None:
    """An earlier version accepted any name."""
    settings = load_settings({"OPENAGENTS_QUEUE": "reports"})

    assert queue_to_send_to("oa:due", settings, "r1") == "reports"
    assert queue_to_send_to("other", settings, "r1") == "other"
