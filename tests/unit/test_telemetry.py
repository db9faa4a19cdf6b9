"""Telemetry: a log line is an event with fields, as text or JSON, and never shows a secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from openagents_worker.agents import LoggingConfig
from openagents_worker.settings import load_settings
from openagents_worker.telemetry import configure_logging, get_logger, reset_logging

log = get_logger("openagents_worker.tests")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What was logged. pytest's own handlers on the root logger are an application's log to us."""
    yield io.StringIO()
    reset_logging()


def configured(stream: io.StringIO, config: LoggingConfig | None = None, **env: str) -> io.StringIO:
    variables = {"OPENAGENTS_LOG_AUTOCONFIGURE": "true"} | {f"OPENAGENTS_LOG_{k}": v for k, v in env.items()}
    configure_logging(load_settings(variables), stream, logging_config=config)
    return stream


def test_a_json_line_is_one_object_with_the_events_fields(stream: io.StringIO) -> None:
    """`LOG_FORMAT=json`: ts in UTC, level, logger, event, then the fields."""
    configured(stream, FORMAT="json")
    log.info("run.claimed", run_id="r1", attempt=1, event="e")
    line = json.loads(stream.getvalue())
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "info", "logger": "openagents_worker.tests", "event": "run.claimed", "run_id": "r1",
        "attempt": 1, "event_": "e",
    }  # fmt: skip


def test_a_text_line_cannot_be_mistaken_for_two_fields_or_two_lines(stream: io.StringIO) -> None:
    """Values with blanks, quotes or line breaks are quoted as in JSON."""
    configured(stream)
    log.warning("tool.failed", tool_id="calc", error='a "b"\nrun_id=forged')
    line = stream.getvalue()
    assert line.endswith('WARNING tests tool.failed tool_id=calc error="a \\"b\\"\\nrun_id=forged"\n')
    assert line.count("\n") == 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_reaches_a_line(stream: io.StringIO, form: str) -> None:
    """Not by key, not inside a text, not in a traceback, not in a line of another kind."""
    configured(stream, FORMAT=form, REDACT="pin")
    log.info("x", api_key="hunter2", url="redis://:hunter2@h", nested={"pin": "hunter2"}, input_tokens=7)
    try:
        raise ValueError("no answer from redis://:hunter2@h/0")
    except ValueError:
        log.exception("failed", run_id="r1")
    logging.getLogger("openagents_worker.plain").error("to %s", "redis://:hunter2@h/0")
    text = stream.getvalue()
    assert "hunter2" not in text
    assert "input_tokens" in text
    assert "7" in text
    assert "ValueError: no answer from redis://:***@h/0" in text


def test_an_application_that_has_set_up_its_own_log_gets_our_lines_there(
    stream: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of the application's is replaced; its handlers get name, fields and no secret."""
    assert configure_logging(load_settings({}), stream) is None
    with caplog.at_level(logging.INFO, "openagents_worker"):
        log.info("run.claimed", run_id="r1", token="hunter2")
    assert stream.getvalue() == ""
    assert caplog.messages == ["run.claimed run_id=r1 token=***"]


def test_asked_to_we_write_ours_and_leave_the_applications_handlers_alone(stream: io.StringIO) -> None:
    """`auto_configure` adds one handler to our own logger; reset takes exactly that away."""
    before = list(logging.getLogger().handlers)
    configured(stream)
    configured(stream)
    log.info("once")
    assert stream.getvalue().count("once") == 1
    assert logging.getLogger().handlers == before
    reset_logging()
    ours = logging.getLogger("openagents_worker")
    assert (ours.handlers, ours.propagate, ours.level) == ([], True, logging.NOTSET)


def test_a_process_of_ours_writes_everybodys_lines_alike(stream: io.StringIO) -> None:
    """`whole_process`: Celery's lines in the same format, and handlers and levels as before afterwards."""
    root = logging.getLogger()
    before = (list(root.handlers), root.level, root.propagate)
    configure_logging(load_settings({"OPENAGENTS_LOG_FORMAT": "json"}), stream, whole_process=True)
    logging.getLogger("celery.worker").info("connected to %s", "redis://:hunter2@h/0")
    log.info("run.claimed", run_id="r1")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["logger"] for line in lines] == ["celery.worker", "openagents_worker.tests"]
    assert lines[0]["event"] == "connected to redis://:***@h/0"
    reset_logging()
    assert (list(root.handlers), root.level, root.propagate) == before


def test_levels_are_the_environments_then_the_files_then_info(stream: io.StringIO) -> None:
    """The environment overrides the agents file; loggers of the original's names mean ours."""
    config = LoggingConfig(level="ERROR", per_logger_levels={"openagents.tests": "DEBUG"})
    configured(stream, config)
    log.debug("shown")
    get_logger("openagents_worker.other").warning("hidden")
    configured(stream, config, LEVEL="WARNING", LEVELS="openagents_worker.tests=ERROR")
    log.warning("hidden")
    get_logger("openagents_worker.other").warning("shown_too")
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["shown", "shown_too"]


def test_loggers_can_be_chosen_by_prefix_and_exclusion_wins(stream: io.StringIO) -> None:
    """`include_prefixes` and `exclude_prefixes`, as in the original."""
    configured(stream, INCLUDE="openagents.tests", EXCLUDE="openagents_worker.tests.noisy")
    log.info("shown")
    get_logger("openagents_worker.tests.noisy").info("hidden")
    get_logger("openagents_worker.other").info("hidden")
    assert stream.getvalue().count("\n") == 1
    assert "shown" in stream.getvalue()


def test_the_files_look_is_obeyed(stream: io.StringIO) -> None:
    """pretty, show_time, show_path and max_value_length each change the line."""
    configured(stream, LoggingConfig(pretty=True, show_time=False, show_path=True, max_value_length=3))
    log.info("x", text="abcdef", n=1)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "INFO    tests x"
    assert lines[1:3] == ['    text="abc… <3 more characters>"', "    n=1"]
    assert "test_telemetry.py:" in lines[3], "the place is the caller's, not this library's"
