"""Lists: how long the first page of many runs takes, by filter: in the client, the command line and Flower.

Two real runs, one completed and one failed, are executed and copied byte for byte until there are as many as
asked for, each in a session of its own. Beside each list stands what reads the same rows without a filter:
one ZREVRANGE and one HMGET for each row, in one pipeline. The filters have to find rare runs: one run in a
hundred is of the agent and has the label, and one in a thousand has failed, so a page of failed runs ends
after the 10,000 runs that are examined. Then each other page of Flower is read; one run in a hundred is in a
queue. Exits with 1 if a page of Flower takes more than 300 ms, or more than 60 commands of Redis. A script
counts as one command, and a pipeline as all of its commands.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import redis

from bench._worker import print_machine
from bench.steps import agent_of, process
from openagents_worker import Client, RunRequest
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.local.stack import Stack
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.index_pages import Page
from openagents_worker.store.keys import Keys
from openagents_worker.store.records import RECORD_FIELDS
from openagents_worker.submission.submit import asubmit

ROWS = 25  # of a page of Flower; the others are asked for as many
RUNS = 100_000
RARE = 100  # one run in so many is of the agent `rare` and has the label
FAILED = 1_000  # one run in so many has failed
AGE = timedelta(days=7)  # of the oldest run
SINCE = timedelta(hours=1)
MOST_MS = 300.0
MOST_COMMANDS = 60
BATCH = 500  # runs that are copied with one pipeline
COPIED = ("run", "session", "transcript")
PAGES = ("overview", "approvals", "fleet", "session/{}", "run/{}")
"""The other pages; `{}` is the id of the newest run, which is that of its session, too."""
END = "openagents-bench: the page is read"
FAILS = {"error": "response", "message": "the model server has no such model"}


@dataclass(frozen=True)
class Filter:
    """One list in its three forms. `index` is what is read without a filter. `page` None: not in Flower."""

    name: str
    filters: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[str] = ()
    page: Mapping[str, str] | None = field(default_factory=dict)
    index: str = "all"
    kind: str = "runs"


FILTERS = (
    Filter("none"),
    Filter("state", {"state": "failed"}, ["--state", "failed"], {"state": "failed"}),
    Filter("agent", {"agent_id": "rare"}, ["--agent", "rare"], {"agent": "rare"}, "agent=rare"),
    Filter(
        "label",
        {"labels": {"team": "north"}},
        ["--label", "team=north"],
        {"label": "team=north"},
        "label=team=north",
    ),
    Filter("code", {"code": "llm.*"}, ["--code", "llm.*"], {"code": "llm.*"}),
    Filter("since", {"since": SINCE}, ["--since", "1h"], None),
    Filter("sessions", index="sessions", kind="sessions"),
)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table. Return 0 if all pages of Flower are fast enough."""
    parser = argparse.ArgumentParser(prog="python -m bench lists", description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder)) as server,
        Stack(redis_url=server.url, env={**os.environ, "OPENAGENTS_LOG_LEVEL": "ERROR"}) as stack,
        Client(server.url) as client,
    ):
        print_machine(server.url)
        asyncio.run(_make(server.url, options.runs))
        flower = stack.start_flower()
        rows = [_measure(each, client, flower, options.rounds) for each in FILTERS]
        pages = [_measure_page(each, client, flower, options.rounds) for each in PAGES]
        start_ms = _median_ms(options.rounds, lambda: _command(server.url, "runs", "--help"))
    _print(rows, options.runs, start_ms)
    _print_pages(pages)
    slowest = max([row.flower_ms or 0.0 for row in rows] + [page.flower_ms for page in pages])
    most = max([row.commands or 0 for row in rows] + [page.commands for page in pages])
    return int(slowest > MOST_MS or most > MOST_COMMANDS)


# --- the runs --------------------------------------------------------------------------------------------


async def _make(url: str, count: int) -> None:
    """Execute a run that completes and one that fails, and copy them."""
    began_s = time.monotonic()
    bad = {**agent_of("fails", 0, 10), "llm": {"provider": "scripted", "script": [FAILS]}}
    async with process(url, [agent_of("steady", 0, 10), bad]) as (store, runner, settings):
        for agent_id in ("steady", "fails"):
            request = RunRequest(agent_id=agent_id, session_id=agent_id, run_id=agent_id, input_text="go")
            await asubmit(store, request, settings=settings)
            await runner.execute(agent_id)
        dumps = {name: await _dumps(store, name) for name in ("steady", "fails")}
        await store.redis.delete(*[store.keys("index", name) for name in ("all", "sessions")])
        now_ms = int(time.time() * 1000)
        for begin in range(0, count, BATCH):
            async with store.redis.pipeline(transaction=False) as pipe:
                for number in range(begin, min(begin + BATCH, count)):
                    age_ms = int(number * AGE.total_seconds() * 1000 / count)
                    _copy(pipe, store.keys, dumps, number, now_ms - age_ms)
                await pipe.execute()
        used = (await store.redis.info("memory"))["used_memory"]
    print(f"{count:,} runs in {time.monotonic() - began_s:.0f} s, {used / 1e6:,.0f} MB", flush=True)


async def _dumps(store: AsyncStore, run_id: str) -> list[tuple[str, bytes, int]]:
    """The stored form of the keys of a run and its session, which has the same id, each with its TTL."""
    with redis.Redis.from_url(store.cell.url) as client:  # a dump is binary
        found = [
            (name, client.dump(store.keys(name, run_id)), client.pttl(store.keys(name, run_id)))
            for name in COPIED
        ]
    return [(name, dump, max(0, ttl_ms)) for name, dump, ttl_ms in found if dump is not None]


def _copy(
    pipe: Any, keys: Keys, dumps: Mapping[str, list[tuple[str, bytes, int]]], number: int, at_ms: int
) -> None:
    """The run with this number, counted from the newest one."""
    id_ = f"copy-{number:07d}"
    for name, dump, ttl_ms in dumps["fails" if number % FAILED == FAILED - 1 else "steady"]:
        pipe.restore(keys(name, id_), ttl_ms, dump)
    is_rare = number % RARE == RARE - 1
    agent, labels = ("rare", ["label=team=north"]) if is_rare else ("steady", [])
    record = {"agent": agent, "session": id_, "created": at_ms, "lists": json.dumps(labels)}
    pipe.hset(keys("run", id_), mapping=record)
    for index in ["all", "sessions", f"session={id_}", f"agent={agent}", *labels]:
        pipe.zadd(keys("index", index), {id_: at_ms})
    if is_rare:
        pipe.zadd(keys("sent", "agents"), {id_: at_ms * 1000})


# --- the lists -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The medians of one list, and how many rows its first page has."""

    name: str
    rows: int
    plain_ms: float
    client_ms: float
    command_ms: float
    flower_ms: float | None
    commands: int | None


def _measure(each: Filter, client: Client, flower: str, rounds: int) -> Measured:
    page = _page(each, client)
    if not page.items:
        sys.exit(f"the list {each.name!r} is empty")
    url, keys = client.settings.redis_url, client.store.keys
    ids = [item.run_id if each.kind == "runs" else item.session_id for item in page]
    fields = RECORD_FIELDS if each.kind == "runs" else ("holder",)
    kind = "run" if each.kind == "runs" else "session"

    def plain() -> None:
        with client.store.redis.pipeline(transaction=False) as pipe:
            pipe.zrevrange(keys("index", each.index), 0, ROWS - 1)
            for id_ in ids:
                pipe.hmget(keys(kind, id_), fields)
            pipe.execute()

    flower_ms = commands = None
    if each.page is not None:
        address = f"{flower}/{each.kind}?{urlencode(each.page)}"
        flower_ms = _median_ms(rounds, lambda: _read(address))
        # Flower sends commands of its own from time to time: the least is that of the page.
        commands = min(_commands_of(lambda: _read(address), url) for _ in range(3))
    return Measured(
        each.name,
        len(ids),
        _median_ms(rounds, plain),
        _median_ms(rounds, lambda: _page(each, client)),
        _median_ms(rounds, lambda: _command(url, each.kind, "--limit", str(ROWS), *each.options)),
        flower_ms,
        commands,
    )


def _page(each: Filter, client: Client) -> Page[Any]:
    if each.kind == "sessions":
        return client.sessions(limit=ROWS)
    filters = dict(each.filters)
    if "since" in filters:
        filters["since"] = datetime.now(UTC) - filters["since"]
    return client.runs(limit=ROWS, **filters)


def _command(url: str, *arguments: str) -> None:
    """Run the command line as a process."""
    command = [sys.executable, "-m", "openagents_worker.cli", *arguments]
    env = {**os.environ, "OPENAGENTS_REDIS_URL": url}
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _read(address: str) -> None:
    with urllib.request.urlopen(address, timeout=60) as answer:  # noqa: S310 - http to this machine
        answer.read()


def _median_ms(rounds: int, work: Callable[[], object]) -> float:
    """The median of some rounds after one that is not measured."""
    taken = []
    for _ in range(rounds + 1):
        began_s = time.perf_counter()
        work()
        taken.append((time.perf_counter() - began_s) * 1000)
    return median(taken[1:])


@dataclass(frozen=True)
class MeasuredPage:
    """The median of one of the other pages, and the commands that it sends."""

    path: str
    flower_ms: float
    commands: int


def _measure_page(path: str, client: Client, flower: str, rounds: int) -> MeasuredPage:
    newest = client.runs(limit=1).items[0].run_id
    address = f"{flower}/{path.format(newest)}"
    flower_ms = _median_ms(rounds, lambda: _read(address))
    commands = min(_commands_of(lambda: _read(address), client.settings.redis_url) for _ in range(3))
    return MeasuredPage(path.format("…"), flower_ms, commands)


def _commands_of(work: Callable[[], object], url: str) -> int:
    """How many commands are sent to Redis in the meantime, without those that scripts execute."""
    sent = 0
    with redis.Redis.from_url(url) as client, client.monitor() as monitor:
        work()
        client.echo(END)
        while (said := monitor.next_command())["command"] != f"ECHO {END}":
            sent += said["client_type"] != "lua"
    return sent


def _print(rows: Sequence[Measured], runs: int, start_ms: float) -> None:
    print(f"\nThe first page of {runs:,} runs, at most {ROWS} rows, in milliseconds\n")
    print("| filter | rows | ZREVRANGE and HMGET | client | command line | Flower | its commands |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        page = "-" if row.flower_ms is None else f"{row.flower_ms:.1f}"
        print(
            f"| {row.name} | {row.rows} | {row.plain_ms:.1f} | {row.client_ms:.1f} | {row.command_ms:.0f} "
            f"| {page} | {'-' if row.commands is None else row.commands} |"
        )
    print(f"\nThe command line alone (`runs --help`) takes {start_ms:.0f} ms.")


def _print_pages(pages: Sequence[MeasuredPage]) -> None:
    print("\nThe other pages of Flower, in milliseconds\n")
    print("| page | Flower | its commands |")
    print("|---|---|---|")
    for page in pages:
        print(f"| {page.path} | {page.flower_ms:.1f} | {page.commands} |")
