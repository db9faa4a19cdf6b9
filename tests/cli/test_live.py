"""What moves on a terminal: the tree of a run's steps, and `top`. And what a shell completes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import pytest

from openagents_worker.cli import top
from openagents_worker.cli.completion import agent_ids, run_ids, session_ids
from openagents_worker.cli.live_run import RunTree
from openagents_worker.events import RunEvent
from openagents_worker.producer.client import Client
from tests.cli.conftest import Command, register, retire
from tests.support.scripts import Hand
from tests.support.waiting import wait_for

COMMAND = [sys.executable, "-m", "openagents_worker.cli"]
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
PATIENCE_S = 60


def tree_of(*events: tuple[str, dict[str, Any]]) -> RunTree:
    """One event a second, from noon on."""
    tree = RunTree()
    for second, (name, payload) in enumerate(events):
        is_live = name.endswith(".delta")
        tree.add(
            RunEvent(
                name=name, seq=None if is_live else second + 1, run_id="r1", session_id="s1", agent_id="a",
                life=1, attempt=1, worker="w1", timestamp=NOON + timedelta(seconds=second), payload=payload,
            )
        )  # fmt: skip
    return tree


def lines_after(tree: RunTree, seconds: float) -> list[str]:
    return [click.unstyle(line) for line in tree.open_lines(NOON + timedelta(seconds=seconds), "*")]


STARTED = ("run.attempt_started", {"attempt": 1})
ASKED = ("llm.called", {"model": "m", "call": "m:1"})
SAID = (
    "llm.succeeded",
    {"model": "m", "call": "m:1", "tool_calls": ["find"], "_metrics": {"input_tokens": 7}},
)
CALLED = [("tool.called", {"tool_id": "find", "call_id": f"find:{n}", "params": {"n": n}}) for n in (1, 2)]


def found(n: int) -> tuple[str, dict[str, Any]]:
    return "tool.succeeded", {"tool_id": "find", "call_id": f"find:{n}", "result": f"it {n}"}


def test_a_finished_step_is_taken_once_in_order() -> None:
    """Of two calls side by side, the second waits for the first, although it ended before."""
    tree = tree_of(STARTED, ASKED, SAID, *CALLED, found(2))

    taken = [click.unstyle(line) for line in tree.take_finished()]
    assert taken == ["r1 a, session s1", "  ✔ m calls find  1.0 s · 7+0"]
    assert lines_after(tree, 6) == [
        '  * find {"n": 1}   3.0 s',
        '  ✔ find {"n": 2} → it 2  1.0 s',
        "* 6.0 s ",
    ]
    assert tree.take_finished() == []


def test_the_text_that_is_being_produced_is_shown_until_the_call_has_ended() -> None:
    """The end of it, and from its beginning again if the call is repeated."""
    pieces = [
        ("llm.delta", {"call": "m:1", "offset": at, "text": text}) for at, text in ((0, "Hel"), (3, "lo"))
    ]
    again = ("llm.delta", {"call": "m:1", "offset": 0, "text": "Good\x1b[2J day"})

    assert lines_after(tree_of(STARTED, ASKED, *pieces), 4)[2] == "    Hello"
    assert lines_after(tree_of(STARTED, ASKED, *pieces, again), 5)[2] == "    Good\\x1b[2J day"
    assert "    Hello" not in lines_after(tree_of(STARTED, ASKED, *pieces, SAID), 5)


def test_texts_that_are_produced_in_turn_are_not_mixed() -> None:
    """The reasoning, the text and the arguments of each tool call. The newest one is shown."""
    pieces = [
        ("llm.delta", {"call": "m:1", **piece})
        for piece in (
            {"offset": 0, "text": "So"},
            {"offset": 0, "text": '{"a"', "kind": "tool_arguments", "tool_call": 0},
            {"offset": 0, "text": '{"b"', "kind": "tool_arguments", "tool_call": 1},
            {"offset": 4, "text": ": 1}", "kind": "tool_arguments", "tool_call": 0},
            {"offset": 2, "text": " long", "kind": "text"},
        )
    ]

    assert lines_after(tree_of(STARTED, ASKED, *pieces[:4]), 4)[2] == '    {"a": 1}'
    assert lines_after(tree_of(STARTED, ASKED, *pieces), 4)[2] == "    So long"


@pytest.mark.parametrize(
    ("ending", "shows"),
    [
        (("run.recovered", {"previous_worker": "w1"}), "  ⚡ m interrupted  1.0 s"),
        (("run.waiting", {"waiting": [{"kind": "timer"}], "due_at": 1}), "  ⏸ m waits  1.0 s"),
        (("llm.failed", {"model": "m", "call": "m:1", "error": "no"}), "  ✘ m failed: error: no  1.0 s"),
        (("run.cancelled", {"reason": "enough"}), "  ⚡ m interrupted  1.0 s"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_way_a_step_ends_has_its_mark(ending: tuple[str, dict[str, Any]], shows: str) -> None:
    """And nothing is shown as running afterwards."""
    tree = tree_of(STARTED, ASKED, ending)
    assert shows in [click.unstyle(line) for line in tree.take_finished()]
    assert len(lines_after(tree, 4)) == 1


def test_a_call_that_is_repeated_is_a_line_of_its_own() -> None:
    """After the one that was interrupted, with the number of the try."""
    tree = tree_of(STARTED, ASKED, ("run.recovered", {"previous_worker": "w1"}))
    tree.take_finished()
    for event in (STARTED, ASKED):
        tree.add(
            RunEvent(
                name=event[0], seq=9, run_id="r1", session_id="s1", agent_id="a", life=1, attempt=2,
                worker="w2", timestamp=NOON + timedelta(seconds=9), payload=event[1],
            )
        )  # fmt: skip
    assert lines_after(tree, 10)[0] == "  * m   1.0 s · try 2"


def test_a_call_in_which_the_run_was_parked_is_shown_again_when_it_goes_on() -> None:
    """No event says that: the attempt goes on with it. Its line has the end of the call."""
    parked = ("run.waiting", {"waiting": [{"kind": "approval", "call_id": "find:1"}], "due_at": None})
    tree = tree_of(STARTED, CALLED[0], parked)
    tree.take_finished()
    for second, event in enumerate((STARTED, found(1)), start=9):
        tree.add(
            RunEvent(
                name=event[0], seq=second, run_id="r1", session_id="s1", agent_id="a", life=1, attempt=2,
                worker="w2", timestamp=NOON + timedelta(seconds=second), payload=event[1],
            )
        )  # fmt: skip
        if event is STARTED:
            assert lines_after(tree, 10)[0] == '  * find {"n": 1}   9.0 s'
    assert [click.unstyle(line) for line in tree.take_finished()] == ['  ✔ find {"n": 1} → it 1  9.0 s']


def test_events_that_a_pattern_makes_up_are_shown_as_far_as_possible() -> None:
    """Patterns for the original SDK emit events with these names themselves."""
    made_up = {"input_tokens": "<b>", "cost_usd": "x", "output_tokens": 3}
    said = ("llm.succeeded", {"model": "m", "call": "m:1", "output_text": "hi", "_metrics": made_up})
    tree = tree_of(STARTED, ASKED, said, ("usage.updated", {"usage": "x"}), ("usage.updated", {"usage": [1]}))

    taken = [click.unstyle(line) for line in tree.take_finished()]
    assert taken[1] == "  ✔ m hi  1.0 s · 0+3"
    assert len(lines_after(tree, 5)) == 1


@contextmanager
def on_a_terminal(url: str, *arguments: str) -> Generator[tuple[int, subprocess.Popen[bytes]]]:
    """The command on a terminal of 90 columns; its file descriptor and its process."""
    ours, theirs = pty.openpty()
    env = {
        **os.environ,
        "OPENAGENTS_REDIS_URL": url,
        "TERM": "xterm-256color",
        "COLUMNS": "90",
        "LINES": "20",
    }
    with subprocess.Popen(
        [*COMMAND, *arguments], env=env, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    ) as process:
        os.close(theirs)
        try:
            yield ours, process
        finally:
            process.kill()
            os.close(ours)


def read_until(descriptor: int, wanted: str) -> str:
    """What is written to the terminal, until this text is in it. Colours are left out."""
    screen = ""

    def arrived() -> bool:
        nonlocal screen
        if select.select([descriptor], [], [], 0.1)[0]:
            screen += os.read(descriptor, 65_536).decode(errors="replace")
        return wanted in re.sub(r"\x1b\[[0-9;]*m", "", screen)

    wait_for(arrived, f"{wanted!r} on the terminal")
    return re.sub(r"\x1b\[[0-9;]*m", "", screen)


def test_watch_draws_a_tree_on_a_terminal(redis_url: str, hand: Hand) -> None:
    """The step that is running moves; when the run has ended, its lines stay, and the cursor is back."""
    hand.submit("r1")
    hand.claim("r1")
    hand.emit("r1", "tool.called", payload=json.dumps(CALLED[0][1]))
    with on_a_terminal(redis_url, "watch", "r1") as (terminal, process):
        screen = read_until(terminal, 'find {"n": 1}')
        assert "\x1b[?25l" in screen, "the cursor is hidden while lines are drawn again"
        hand.emit("r1", "tool.succeeded", payload=json.dumps(found(1)[1]))
        screen = read_until(terminal, '✔ find {"n": 1} → it 1')
        hand.commit("r1", steps=0)
        hand.finish("r1")
        screen = read_until(terminal, "391")
        assert "\x1b[?25h" in screen
        process.wait(PATIENCE_S)


def test_top_fills_the_terminal_until_ctrl_c(redis_url: str, client: Client) -> None:
    """With workers and queues. Afterwards the terminal is as before."""
    register(client, agents=("echo",))
    with on_a_terminal(redis_url, "top", "--interval", "0.2") as (terminal, process):
        screen = read_until(terminal, "w1@box:a1b2c3")
        assert "\x1b[?1049h" in screen, "another screen"
        process.send_signal(signal.SIGINT)
        read_until(terminal, "\x1b[?1049l")
        assert process.wait(PATIENCE_S) == 0
    retire(client)


def test_a_terminal_is_as_before_after_any_signal(redis_url: str, client: Client) -> None:
    """The cursor, and what was on the screen."""
    register(client, agents=("echo",))
    for number in (signal.SIGTERM, signal.SIGHUP):
        with on_a_terminal(redis_url, "top", "--interval", "60") as (terminal, process):
            read_until(terminal, "w1@box:a1b2c3")
            process.send_signal(number)
            assert "\x1b[?25h" in read_until(terminal, "\x1b[?1049l")
            assert process.wait(PATIENCE_S) == 128 + number
    retire(client)


def test_top_says_that_it_does_not_show_all_runs(
    command: Command, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows the newest ones, and of many runs it examines the newest ones only."""
    for run_id in ("r1", "r2"):
        hand.submit(run_id, session_id=run_id)
        hand.claim(run_id)
    assert "perhaps more" not in command("top").out
    monkeypatch.setattr(top, "MAX_RUNS", 1)

    shown = command("top").out

    assert "r2" in shown
    assert "perhaps more: openagents-worker runs --state running" in shown


def test_top_does_not_look_for_unreadable_records_at_each_look(client: Client) -> None:
    """That reads a thousand runs completely, which may be large: once in half a minute."""
    names = [f"r{number}" for number in range(20)]
    for name in names:
        client.submit({"agent_id": "echo", "session_id": name, "input_text": "x" * 20_000, "run_id": name})
    now_s = 0.0
    reader = top.SnapshotReader(client, clock=lambda: now_s)

    def read() -> int:
        before = client.store.redis.info("stats")["total_net_output_bytes"]
        reader.read()
        return int(client.store.redis.info("stats")["total_net_output_bytes"] - before)

    assert read() > 400_000
    assert read() < 100_000
    now_s = top.LOOK_FOR_PROBLEMS_S
    assert read() > 400_000
    for name in names:
        client.cancel(name)


def test_top_does_not_read_the_names_of_all_keys_at_each_look(client: Client) -> None:
    """A queue without a worker is found once in half a minute, and shown from then on."""
    now_s = 0.0
    reader = top.SnapshotReader(client, clock=lambda: now_s)

    def shown() -> tuple[bool, int]:
        client.store.redis.config_resetstat()
        names = [queue.name for queue in reader.read().fleet.queues]
        scans = client.store.redis.info("commandstats").get("cmdstat_scan", {"calls": 0})["calls"]
        return "reports" in names, int(scans)

    assert shown()[1] > 0
    ids = {"agent_id": "echo", "session_id": "s1", "run_id": "r1"}
    client.submit({**ids, "input_text": "hi"}, queue="reports")
    assert shown() == (False, 0)
    now_s = top.LOOK_FOR_PROBLEMS_S
    assert shown()[0]
    assert shown() == (True, 0)
    client.cancel("r1")


def test_top_without_a_terminal_is_printed_as_often_as_asked(command: Command, client: Client) -> None:
    """As text or as lines of JSON."""
    register(client, agents=("echo",))
    client.submit({"agent_id": "echo", "session_id": "s1", "input_text": "x", "run_id": "r1"})

    text = command("top")
    looks = command("top", "--json", "--count", "2", "--interval", "0.2")

    assert "workers 1 · runs at work 0 · runs that wait 1" in text.out, text.err
    found = [json.loads(line) for line in looks.out.splitlines()]
    assert [len(each["workers"]) for each in found] == [1, 1]
    assert [each["queues"][0]["waiting"] for each in found] == [1, 1]
    client.cancel("r1")
    retire(client)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell_is_printed(command: Command, shell: str) -> None:
    done = command("completion", shell)
    assert (done.code, "_OPENAGENTS_WORKER_COMPLETE" in done.out) == (0, True), done.err


def test_ids_are_completed_from_redis(
    command: Command, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that begin with what was typed. Without Redis, nothing."""
    register(client, agents=("echo", "else"))
    for name in ("r1", "r2", "x1", "a$(b)"):
        client.submit({"agent_id": "echo", "session_id": f"s-{name}", "input_text": "x", "run_id": name})
    context, parameter = click.Context(click.Command("show")), click.Argument(["x"])

    assert sorted(run_ids(context, parameter, "r")) == ["r1", "r2"]
    assert sorted(run_ids(context, parameter, "")) == ["r1", "r2", "x1"], "no shell text"
    assert session_ids(context, parameter, "s-x") == ["s-x1"]
    assert agent_ids(context, parameter, "ec") == ["echo"]
    for name in ("r1", "r2", "x1", "a$(b)"):
        client.cancel(name)
    retire(client)
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", "redis://127.0.0.1:1/0")
    assert run_ids(context, parameter, "r") == []


def test_a_session_is_deleted(command: Command, client: Client, hand: Hand) -> None:
    """Only with --force if one of its runs has not ended."""
    hand.submit("r1")
    hand.claim("r1")

    refused = command("delete-session", "s1")
    assert (refused.code != 0, "session.busy" in refused.err) == (True, True), refused.err
    hand.commit("r1", steps=0)
    hand.finish("r1")
    deleted = command("delete-session", "s1", "--force", "--json")
    assert deleted.json == {"session_id": "s1", "runs": 1}, deleted.err
    assert "run.not_found" in command("show", "r1").err
