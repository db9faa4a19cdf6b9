"""Telemetry: a log line is an event with fields, as text or JSON, and never shows a secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from openagents_worker.agents import LoggingConfig
from openagents_worker.printable import escaped_line
from openagents_worker.settings import load_settings
from openagents_worker.telemetry.line_groups import LineGroups
from openagents_worker.telemetry.logs import configure_logging, get_logger, reset_logging

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


FORGED = "2026-01-01T00:00:00.000Z ERROR   runtime.attempt run.failed run_id=forged"


def test_nothing_that_is_logged_can_forge_a_line(stream: io.StringIO) -> None:
    """Not an event's name, a field, another library's message or an exception's text: a line of text begins
    with a time, and what belongs to it is indented."""
    configured(stream)
    log.warning(f"event\n{FORGED}", field=f"x\r\n{FORGED}\u2028{FORGED}\x85{FORGED}")
    logging.getLogger("openagents_worker.plain").error("of %s", f"somebody\n{FORGED}")
    try:
        raise ValueError(f"no\n{FORGED}\r{FORGED}")
    except ValueError:
        log.exception("failed")
    forged = [line for line in stream.getvalue().splitlines() if line.startswith(FORGED[:10])]
    assert forged == []
    assert [line[0] for line in stream.getvalue().splitlines() if not line.startswith("20")] == [" "] * 5


def test_a_json_line_is_one_line_for_every_reader(stream: io.StringIO) -> None:
    """Also for those that end a line at Unicode's separators; a traceback is one field."""
    configured(stream, FORMAT="json")
    text = "one\ntwo\u2028three\x85four\u2029five\x0bsix"
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("failed", text=text)
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["text"] == text
    assert "ValueError: one\ntwo" in json.loads(line)["exception"]


def test_a_line_whose_arguments_do_not_fit_is_written_all_the_same(stream: io.StringIO) -> None:
    """Logging would write a complaint of many lines in its place."""
    configured(stream, FORMAT="json")
    logging.getLogger("openagents_worker.plain").error("%d of them", "many")
    assert json.loads(stream.getvalue())["event"] == "%d of them ('many',)"


def test_whoever_groups_messages_groups_by_event(caplog: pytest.LogCaptureFixture) -> None:
    """The constant part of a record's message is the event's name, as Sentry groups them."""
    with caplog.at_level(logging.INFO, "openagents_worker"):
        log.error("run.failed", run_id="r1")
        log.error("100%.done", run_id="r1")
        log.error("100%.done")
    assert [record.msg for record in caplog.records] == ["run.failed %s", "100%%.done %s", "100%.done"]
    assert caplog.messages == ["run.failed run_id=r1", "100%.done run_id=r1", "100%.done"]


def test_a_users_exception_is_shown_without_our_frames_and_ours_with_them(stream: io.StringIO) -> None:
    """`user_error` is what user code raised; `exc_info` may be a defect of this library."""
    configured(stream)

    def user_code() -> None:
        escaped_line(None)  # type: ignore[arg-type]

    try:
        user_code()
    except AttributeError as error:
        log.warning("tool.failed", user_error=error)
        log.error("run.internal_error", exc_info=error)
    users, ours = stream.getvalue().split("run.internal_error")
    assert "user_code" in users
    assert "openagents_worker/printable.py" not in users
    assert "openagents_worker/printable.py" in ours


def test_lines_of_many_runs_with_one_cause_are_one_line(stream: io.StringIO) -> None:
    """With their number and some of their ids; another cause is another line, and a single run is itself."""
    configured(stream)
    waiting: list[Callable[[], None]] = []
    groups = LineGroups(lambda _, flush: waiting.append(flush))
    for number in range(40):
        groups.add(log, logging.WARNING, "run.fenced", f"r{number}", {"detail": "Redis is away"})
    groups.add(log, logging.WARNING, "run.fenced", "other", {"detail": "the lease is over"})
    assert stream.getvalue() == ""

    for flush in waiting:
        flush()

    assert [line.split("tests ")[1] for line in stream.getvalue().splitlines()] == [
        'run.fenced runs=40 run_ids=["r0", "r1", "r2", "r3", "r4"] detail="Redis is away"',
        'run.fenced run_id=other detail="the lease is over"',
    ]
    groups.add(log, logging.WARNING, "run.fenced", "later", {"detail": "Redis is away"})
    groups.flush()
    assert stream.getvalue().splitlines()[-1].endswith('run.fenced run_id=later detail="Redis is away"')


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
