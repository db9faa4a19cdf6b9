"""Secrets in errors: an error of this library holds none from the moment it is made."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from collections.abc import Generator

import pytest

from openagents_worker import secret_forms, secret_text
from openagents_worker.agents import LoggingConfig, load_agents
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.cli.commands import fleet, run
from openagents_worker.cli.exits import Exit
from openagents_worker.errors import (
    LONGEST_TEXT_CHARS,
    ConfigValidationError,
    OpenAgentsError,
    RunFailed,
    error_classes,
    error_from_wire,
)
from openagents_worker.llm.failures import failure
from openagents_worker.models import ErrorDetails
from openagents_worker.printable import printable
from openagents_worker.secret_forms import MASK, mask_secrets
from openagents_worker.settings import load_settings
from openagents_worker.telemetry.log_format import JsonFormatter, TextFormatter
from openagents_worker.telemetry.sentry import without_secrets
from tests.hostile.planted import SECRETS, OddError

PASSWORD = "hunter2-x"
TEXT = f"cannot log in: password={PASSWORD}, at redis://:{PASSWORD}@host/0"


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.setattr(secret_forms, "_remembered", {})
    monkeypatch.setattr(secret_forms, "_known", ())
    yield
    secret_forms.mask_short.cache_clear()
    secret_text.mask_short_prose.cache_clear()


def own_classes() -> list[type[OpenAgentsError]]:
    return [cls for cls in error_classes() if cls.__module__ == "openagents_worker.errors"]


@pytest.mark.parametrize("cls", own_classes(), ids=lambda cls: cls.__name__)
def test_no_error_of_this_library_holds_a_secret(cls: type[OpenAgentsError]) -> None:
    """Neither in its text nor in its arguments, so it can be shown, pickled and sent."""
    error = cls(TEXT, hint=f"use {TEXT}")

    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - made in the line itself
    for one in (error, copy, error_from_wire(error.to_dict())):
        shown = f"{one!r} {one} {one.args} {one.message} {one.hint} {one.to_dict()}"
        assert PASSWORD not in shown
        assert "cannot log in" in one.message


def test_an_error_of_somebody_elses_class_is_masked_where_it_is_recorded() -> None:
    """A class that does not call its base class, with its own fields in `to_dict()`."""
    details = ErrorDetails.from_exception(OddError(TEXT))

    assert PASSWORD not in str(OddError(TEXT).to_dict())
    assert PASSWORD not in details.model_dump_json()
    assert details.context["response"] == {
        "body": [mask_secrets(TEXT).replace(PASSWORD, MASK)],
        "password": MASK,
    }


def test_a_very_long_message_is_cut_and_says_so() -> None:
    error = OpenAgentsError("x" * (LONGEST_TEXT_CHARS + 7))

    assert error.message.endswith("… <7 more characters>")


def test_the_result_of_a_failed_run_stays_what_it_is() -> None:
    """It is what the run has left, and was masked where it was made."""
    result = {"metadata": {"note": "token=a1b2c3"}}

    assert RunFailed("it failed", result=result).to_dict()["context"]["result"] == result


def test_the_problems_of_a_file_show_no_secret() -> None:
    problem = ConfigProblem(("llm", "api_base"), f"found {TEXT}", TEXT)
    error = ConfigValidationError("wrong", problems=[problem.to_dict()])

    assert PASSWORD not in f"{problem} {problem!r} {error.problems} {error.to_dict()}"


@pytest.mark.parametrize("secret", SECRETS[:-1], ids=[secret.name for secret in SECRETS[:-1]])
def test_a_providers_error_is_masked_before_it_is_cut(secret: object) -> None:
    """A page of HTML in front of it does not leave half of a secret."""
    for size in range(380, 480, 9):
        body = {"error": {"message": "x" * size + f" {secret.text}", "code": secret.text}}  # type: ignore[attr-defined]
        error = failure(body, status=400, headers={}, provider="p", key_origin="K", secrets=())

        assert secret.needle[:6] not in str(error)  # type: ignore[attr-defined]


def test_the_secrets_that_the_configuration_names_are_known() -> None:
    """Of a variable with a secret's name, and of the URLs in the settings; not of any other variable."""
    env = {"MY_TOKEN": "plain-w0rds", "MY_MODEL": "model-number-7"}
    agent = {"id": "a", "name": "${MY_TOKEN} ${MY_MODEL}", "llm": {"provider": "mock"}}
    load_agents(
        json.dumps({"agents": [{**agent, "memory": {"type": "buffer"}, "pattern": {"type": "react"}}]}),
        env=env,
    )
    load_settings({"OPENAGENTS_REDIS_URL": "redis://:s0me%2Fthing@host/0"})

    assert mask_secrets("plain-w0rds model-number-7") == f"{MASK} model-number-7"
    assert mask_secrets("s0me/thing s0me%2Fthing") == f"{MASK} {MASK}"


def test_the_hash_of_a_definition_does_not_depend_on_what_a_process_knows() -> None:
    """Two workers with one file serve one definition."""
    text = json.dumps({"agents": [{"id": "a", "name": "plain-w0rds", "llm": {"provider": "mock"},
                                   "memory": {"type": "buffer"}, "pattern": {"type": "react"}}]})  # fmt: skip
    before = load_agents(text).agents[0].definition_hash

    secret_forms.remember_secret("plain-w0rds")

    assert load_agents(text).agents[0].definition_hash == before


@pytest.mark.parametrize("name", ["agent_id", "session_id", "run_id", "tool_id"])
def test_an_id_that_holds_a_secret_is_masked(name: str) -> None:
    """A plugin may take a URL for the id of its tool, a producer a token for a session."""
    error = OpenAgentsError("failed", **{name: f"redis://:{PASSWORD}@host/0"})  # type: ignore[arg-type]
    ordinary = OpenAgentsError("failed", **{name: "customer-17:a3f9"})  # type: ignore[arg-type]

    assert PASSWORD not in json.dumps(error.to_dict())
    assert PASSWORD not in ErrorDetails.from_exception(error).model_dump_json()
    assert ordinary.to_dict()["context"][name] == "customer-17:a3f9"


@pytest.mark.parametrize("formatter", [JsonFormatter, TextFormatter])
def test_a_log_line_of_any_library_is_masked(formatter: type[logging.Formatter]) -> None:
    """Its message, its exception and its stack."""
    line = logging.LogRecord("other", logging.ERROR, "f.py", 1, "retrying %s", (TEXT,), None)
    line.exc_text = line.stack_info = TEXT

    shown = formatter(LoggingConfig()).format(line)  # type: ignore[arg-type]

    assert "retrying" in shown
    assert PASSWORD not in shown


def test_an_event_of_sentry_is_masked_with_the_variables_of_its_frames() -> None:
    frame = {"function": "login", "vars": {"password": "'x'", "url": f"'redis://:{PASSWORD}@host/0'", "n": 1}}
    values = [{"type": "OSError", "value": TEXT, "stacktrace": {"frames": [frame]}}]

    shown = without_secrets({"exception": {"values": values}, "level": "error"}, {})

    assert PASSWORD not in str(shown)
    assert shown["exception"]["values"][0]["stacktrace"]["frames"][0]["vars"]["n"] == 1
    assert shown["level"] == "error"


def test_a_defect_of_a_command_is_shown_masked_and_printable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python would print the exception's text as it is."""

    def broken(**_: object) -> None:
        raise RuntimeError(f"\x1b[2J{TEXT}")

    monkeypatch.setattr(fleet.status, "callback", broken)
    monkeypatch.setattr(sys, "argv", ["openagents-worker", "status"])
    with pytest.raises(SystemExit) as ended:
        run()

    shown = capsys.readouterr().err
    assert ended.value.code == Exit.RUN_FAILED
    assert "RuntimeError" in shown
    assert PASSWORD not in shown
    assert printable(shown) == shown
