"""One agent that uses everything: it survives a kill at every moment and at every command to Redis.

It has three levels of children below it, tools of an MCP server, approvals, and markdown memory, in its
session and in files. What happens is counted outside of the workers: by the model server, by the MCP server,
and by the person who decides.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from openagents_worker import ApprovalNotPending
from openagents_worker.models import RunRecord, RunState
from openagents_worker.testing.model_server import ModelServerRequest
from tests.faults.breaks import strike_at
from tests.faults.conftest import runs_below
from tests.support.command_proxy import Proxy
from tests.support.effect_server import EffectServer, effect_server
from tests.support.supervised_deployment import World, table
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

RUN_ID = re.compile(r"[^:]+(:c:[0-9a-f]{12})*")
"""The beginning of an idempotency key: the run of the call, which may be a child."""
RUNS, MODEL_CALLS = 6, 18
PUTS = ("head", "left", "middle", "leaf", "right", "short")
WIPES = ("leaf", "head")
MOMENTS = ("model asked", "model answered", "tool called", "tool done")

Turns = list[list[tuple[str, dict[str, Any]]]]


def _script(turns: Turns) -> str:
    """The input of a run: the calls of each of its turns."""
    return json.dumps({"turns": turns})


def _tree(name: str) -> str:
    """The script of the head. `name` makes its effects, and what is remembered, different from others."""

    def put(n: str) -> tuple[str, dict[str, Any]]:
        return "put", {"n": f"{name} {n}"}

    def wipe(n: str) -> tuple[str, dict[str, Any]]:
        return "wipe", {"n": f"{name} wiped {n}"}

    def below(turns: Turns) -> tuple[str, dict[str, Any]]:
        return "below", {"input_text": _script(turns)}

    remember = ("remember_preference", {"rule": f"({name})", "category": "decisions"})
    leaf = below([[wipe("leaf")], [put("leaf"), remember]])
    middle = below([[leaf], [put("middle")]])
    left = below([[put("left")], [middle]])
    right = below([[put("right")], [below([[put("short")]])]])
    return _script([[remember, put("head")], [left, right], [wipe("head")]])


class Everything(World):
    """A world with an MCP server. It kills the worker of one moment, of those that are seen from outside."""

    def __init__(self, folder: Path, server: EffectServer, workers: int) -> None:
        self.server = server
        self.memory = folder / "memory"
        self.moments = 0
        self.met: list[str] = []
        self._strikes: Callable[[int, str], bool] = lambda number, what: False
        self._moments_lock = threading.Lock()
        server.breaks = self._breaks
        env = {
            "OPENAGENTS_CONFIG": str(Path(__file__).with_name("everything.json")),
            "FAULTS_MCP_URL": server.url,
            "FAULTS_MEMORY": str(self.memory),
        }
        super().__init__(folder, workers=workers, env=env)

    def strike(self, strikes: Callable[[int, str], bool] = lambda number, what: False) -> None:
        """Count moments from 1 again. The first one for which this is true kills its worker."""
        with self._moments_lock:
            self.moments, self.met, self._strikes = 0, [], strikes

    def _is_struck(self, what: str) -> bool:
        with self._moments_lock:
            self.moments += 1
            if self.met or not self._strikes(self.moments, what):
                return False
            self.met.append(what)
            return True

    def _breaks(self, moment: str, key: str) -> bool:
        """A call that is lost with its worker had no effect; or it had one, and nobody got its result."""
        if not self._is_struck(f"tool {moment}"):
            return False
        self._kill_owner(_run_of(key))
        return True

    async def _reply(self, asked: ModelServerRequest) -> Mapping[str, Any]:
        key = asked.headers["idempotency-key"]
        if self._is_struck("model asked"):
            await asyncio.to_thread(self._kill_owner, _run_of(key))
        elif self._is_struck("model answered"):
            await self._kill_after_answer(_run_of(key), key)
        return _reply_to(asked)

    # --- the person --------------------------------------------------------------------------------------

    def decide(self) -> None:
        """Approve what waits. Look at the server before deciding about a call whose outcome is unknown."""
        for asked in self.client.approvals(limit=100).items:
            with suppress(ApprovalNotPending):
                self.client.approve(asked.run_id, asked.call_id, by="anna")
        for run in self.client.runs(state=RunState.PAUSED).items:
            for waiting in run.waiting:
                with suppress(ApprovalNotPending):
                    self._resolve(run, waiting.call_id)

    def _resolve(self, run: RunRecord, call_id: str) -> None:
        done = [
            n
            for n, keys in list(self.server.effects.items())
            if any(_run_of(key) == run.run_id and key.endswith(f":{call_id}") for key in keys)
        ]
        if done:
            result = self.server.result("wipe", done[0])
            self.client.resolve(run.run_id, call_id, "skip", by="anna", result=result)
        else:
            self.client.resolve(run.run_id, call_id, "rerun", by="anna")

    # --- a whole run -------------------------------------------------------------------------------------

    def execute(self, name: str) -> dict[str, Any]:
        """Execute the head and all below it, and check what happened. Returns figures."""
        self.submit(name, agent="head", text=_tree(name))

        def has_ended() -> bool:
            self.decide()
            return self.record(name).state.is_terminal

        wait_for(has_ended, f"{name} has ended", 120)
        runs = [self.record(name), *runs_below(self, name)]
        assert [run.state for run in runs] == [RunState.COMPLETED] * RUNS
        approved = [event for run in runs for event in self._events_of(run) if event == "tool.approved"]
        assert len(approved) == len(WIPES)
        result = self.wait(name)
        recoveries = sum(run.recoveries for run in runs)
        return {
            "run": name,
            "met": ", ".join(self.met),
            "recoveries": recoveries,
            "model calls again": self._model_calls_again(name, recoveries),
            "tool calls again": self._tool_calls_again(name, recoveries),
            "remembered": self._remembered(name),
            "llm_calls": result.usage.llm_calls,
            "tool_calls": result.usage.tool_calls,
            "answer": str(result.final_output).replace(name, "…"),
        }

    def _events_of(self, run: RunRecord) -> Iterable[str]:
        return (event.name for event in self.assert_complete_events(run.run_id))

    def _model_calls_again(self, name: str, recoveries: int) -> int:
        received = (entry for entry in self.model.log if entry["event"] == "received")
        keys = [entry["key"] for entry in received if str(entry["key"]).startswith(f"{name}:")]
        assert len(set(keys)) == MODEL_CALLS, "no call is lost, and each has one key"
        assert len(keys) - MODEL_CALLS <= recoveries, "a kill repeats at most the call in flight"
        return len(keys) - MODEL_CALLS

    def _tool_calls_again(self, name: str, recoveries: int) -> int:
        effects = self.server.effects
        assert [len(effects[f"{name} wiped {n}"]) for n in WIPES] == [1] * len(WIPES)
        puts = [effects[f"{name} {n}"] for n in PUTS]
        assert [len(set(keys)) for keys in puts] == [1] * len(PUTS), "each effect has one key"
        again = sum(len(keys) - 1 for keys in puts)
        assert again <= max(recoveries, 1), "a break repeats at most the call in flight"
        return again

    def _remembered(self, name: str) -> list[int]:
        """How often the head remembers it in its session, and the leaf in the files."""
        view = self.client.session(f"session-of-{name}")
        assert len(view.transcript) == 2
        in_files = (self.memory / "decisions.md").read_text()
        return [view.state["markdown_memory"]["decisions"].count(f"({name})"), in_files.count(f"({name})")]


def _run_of(key: str) -> str:
    found = RUN_ID.match(key)
    assert found is not None
    return found[0]


def _reply_to(asked: ModelServerRequest) -> dict[str, Any]:
    """The calls of this turn, and after the last turn an answer with all their results."""
    last = max(at for at, message in enumerate(asked.messages) if message["role"] == "user")
    # What the memory knows precedes the question.
    script = json.loads(str(asked.messages[last]["content"]).rpartition("## question\n")[2])
    if asked.n < len(script["turns"]):
        calls = script["turns"][asked.n]
        return {"tool_calls": [{"name": name, "arguments": arguments} for name, arguments in calls]}
    results = [message["content"] for message in asked.messages[last:] if message["role"] == "tool"]
    return {"text": json.dumps(results)}


@pytest.fixture
def make_everything(tmp_path: Path) -> Generator[Callable[[int], Everything]]:
    """Creates the world whose workers are not started yet."""
    with ExitStack() as held:

        def make(workers: int) -> Everything:
            server = held.enter_context(effect_server())
            return held.enter_context(Everything(tmp_path, server, workers))

        yield make


Make = Callable[[int], Everything]
SAME = ("remembered", "llm_calls", "tool_calls", "answer")


def _plain(world: Everything) -> dict[str, Any]:
    """A run without a fault, with which the others are compared."""
    world.strike()
    plain = world.execute("plain")
    assert plain["remembered"] == [1, 1]
    assert (plain["model calls again"], plain["tool calls again"]) == (0, 0)
    return plain


def _assert_same(plain: dict[str, Any], row: dict[str, Any]) -> None:
    assert {key: row[key] for key in SAME} == {key: plain[key] for key in SAME}, row["run"]


def _show(title: str, rows: Iterable[dict[str, Any]]) -> None:
    table(title, [{key: row[key] for key in row if key not in SAME} for row in rows])


def _kill_at(world: Everything, plain: dict[str, Any], moments: Iterable[int]) -> list[dict[str, Any]]:
    """Kill the worker at each of these moments, in a run of its own, until a run has no such moment."""
    rows = []
    for at in moments:
        world.strike(lambda number, what, at=at: number == at)
        row = world.execute(f"moment-{at}")
        _assert_same(plain, row)
        if not world.met:
            break
        rows.append(row)
        world.wait_ready()
    return rows


def _break_at(
    world: Everything, proxy: Proxy, plain: dict[str, Any], faults: Iterable[tuple[str, int | str]]
) -> list[dict[str, Any]]:
    """Break each of these commands, in a run of its own, until a run has no such command."""
    rows = []
    world.strike()
    for fault, at in faults:
        met = strike_at(world, proxy, fault, at)
        row = world.execute(f"{fault.replace(' ', '-')}-{at}")
        _assert_same(plain, row)
        if not met:
            break
        rows.append({**row, "met": f"{fault} {met[0].name}"})
        world.wait_ready()
    return rows


BREAKS: list[tuple[str, int | str]] = [
    ("killed after", "delegate"),
    ("answer lost", "suspend"),
    ("killed after", "intent"),
    ("killed before", "finish"),
]


@pytest.mark.parametrize(
    ("kinds", "faults"),
    [
        pytest.param(MOMENTS[:1], BREAKS[:1], id="two"),
        pytest.param(MOMENTS[1:], BREAKS[1:], id="the other kinds", marks=pytest.mark.long),
    ],
)
def test_an_agent_with_everything_survives_kills(
    make_everything: Make, kinds: Sequence[str], faults: list[tuple[str, int | str]]
) -> None:
    """One kill of each kind, and a break at each script with which runs wait for others."""
    world = make_everything(2)
    with Proxy(world.redis.url) as proxy:
        world.redis_url_of = proxy.url_of
        world.start()
        plain = _plain(world)
        rows = []
        for kind in kinds:
            # The first moment of this kind in the second half of the run, where children work.
            half = 20
            world.strike(lambda number, what, kind=kind, half=half: number > half and what == kind)
            rows.append(world.execute(f"killed-{kind.replace(' ', '-')}"))
            assert world.met == [kind]
            _assert_same(plain, rows[-1])
            world.wait_ready()
        broken = _break_at(world, proxy, plain, faults)
        assert len(broken) == len(faults)
        _show("An agent with everything", [*rows, *broken])
        world.end()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_worker_is_killed_at_every_moment(make_everything: Make) -> None:
    """When the model is asked or has answered, when a tool is called or has had its effect."""
    world = make_everything(3).start()
    rows = _kill_at(world, _plain(world), itertools.count(1))
    _show("An agent with everything, killed at every moment", rows)
    assert len(rows) >= 2 * (MODEL_CALLS + len(PUTS) + len(WIPES))
    world.end()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", ["killed before", "killed after", "answer lost"])
def test_a_break_at_every_command(make_everything: Make, fault: str) -> None:
    """Of the head and of all below it."""
    world = make_everything(3)
    with Proxy(world.redis.url) as proxy:
        world.redis_url_of = proxy.url_of
        world.start()
        plain = _plain(world)
        proxy.count()
        world.execute("counted")
        least = len(proxy.seen) * 2 // 3  # batches of events depend on time
        rows = _break_at(world, proxy, plain, ((fault, at) for at in itertools.count(1)))
        _show("An agent with everything, and a break at every command", rows)
        assert len(rows) >= least
        world.end()
