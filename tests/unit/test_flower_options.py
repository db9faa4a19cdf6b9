"""What Flower shows of a run: the reason, and only while it holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from flower.utils import strtobool

from openagents_worker.dashboard.flower_options import format_task, is_false, is_this_machine, is_true


@pytest.mark.parametrize(
    ("state", "exception", "shown"),
    [
        ("RETRY", "'waiting for session'", "waiting for session"),
        ("RETRY", "llm.rate_limit", "llm.rate_limit"),
        ("RETRY", "Retry(Retry(...), 'llm.rate_limit', 60.0)", "llm.rate_limit, retry after 60 s"),
        ("RETRY", "Retry(Retry(...), 'waiting for session', None)", "waiting for session"),
        ("FAILURE", "RunFailed('llm.response: wrong key')", "llm.response: wrong key"),
        ("FAILURE", 'RunFailed("it\'s broken", {})', "it's broken"),
        ("FAILURE", r"RunFailed('two\nlines')", "two\nlines"),
        ("FAILURE", "RunFailed('cut in the mid", "RunFailed('cut in the mid"),
        ("FAILURE", None, ""),
        ("SUCCESS", "'waiting for session'", None),
        ("STARTED", "'waiting for session'", None),
    ],
)
def test_a_runs_reason_is_in_plain_words(state: str, exception: str | None, shown: str | None) -> None:
    """Celery shows a repr, and keeps what a task was retried for when it has succeeded since."""
    task = SimpleNamespace(name="tasks.run_agent", state=state, exception=exception)

    assert format_task(task).exception == shown


def test_other_tasks_stay_as_they_are() -> None:
    task = SimpleNamespace(name="shop.pay", state="FAILURE", exception="ValueError('x')")

    assert format_task(task).exception == "ValueError('x')"


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")),
        *((host, False) for host in ("0.0.0.0", "192.0.2.1", "localhost.evil.example", "")),  # noqa: S104
    ],
)
def test_what_this_machine_is(host: str, is_ours: bool) -> None:
    assert is_this_machine(host) is is_ours


@pytest.mark.parametrize("value", ["y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0"])
def test_words_for_yes_and_no_are_those_of_flower(value: str) -> None:
    """Else Flower would do one thing, and what is checked here would say another."""
    assert is_true(value.upper()) == bool(strtobool(value))
    assert is_false(value.upper()) == (not strtobool(value))


@pytest.mark.parametrize("value", ["", "ture", "2", "none"])
def test_another_word_is_neither_yes_nor_no(value: str) -> None:
    assert not is_true(value)
    assert not is_false(value)
