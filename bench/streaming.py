"""The CPU time of runs whose model streams its reply, beside bare httpx that reads the same streams.

The model is a server in a process of its own. Each reply has 200 pieces, 50 a second: reasoning, text and the
arguments of a tool call. A worker process executes the runs; 20 of them are watched from another process,
which checks that every piece arrives. In alternating rounds, as many streams are read with bare httpx, on the
same kind of event loop. Then as many runs stream at once as bare httpx can read with 40 % of a core here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import redis

from bench._client_process import ClientProcess, client_process
from bench._raw_model import PIECES, chat_events, raw_model
from bench._worker import Worker, print_machine
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.producer.handle import RunHandle

PAUSE_MS = 20
WATCHED = 20
MAX_OF_HTTPX = 1.0
SHARE_OF_A_CORE, MAX_LATER = 0.4, 1.15
ENV = {"OPENAI_API_KEY": "key", "OPENAGENTS_LOG_LEVEL": "ERROR"}  # it is paused, and would warn of that
IDEAL_S = (len(chat_events(True)) - 1) * PAUSE_MS / 1000


class OneCall:
    """A pattern that asks the model once."""

    context: Any

    def __init__(self, config: Any = None) -> None:
        del config

    async def execute(self) -> Any:
        reply = await self.context.llm_client.generate(messages=[{"role": "user", "content": "go"}])
        return reply.output_text


def _agent(model_url: str) -> Mapping[str, Any]:
    return {
        "id": "streams",
        "name": "Streams",
        "llm": {"provider": "openai_compatible", "model": "gpt-4o-mini", "api_base": f"{model_url}/mixed/v1"},
        "memory": {"type": "buffer"},
        "pattern": {"impl": "bench.streaming.OneCall", "config": {"step_timeout_ms": 120_000}},
    }


def main(arguments: Sequence[str] = ()) -> int:
    """Print the tables. Return 0 if all targets are met."""
    parser = argparse.ArgumentParser(prog="python -m bench streaming", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--together", default="100,300", help="numbers of runs at the same time")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder) / "redis") as server,
        raw_model(PAUSE_MS) as model_url,
        client_process(sys.executable, "httpx", f"{model_url}/mixed/v1", "uvloop") as httpx,
    ):
        print_machine(server.url)
        bench = Bench(Path(folder), server.url, model_url, httpx)
        with bench.worker() as worker:
            tables = [
                bench.compared(worker, together, options.rounds)
                for together in map(int, options.together.split(","))
            ]
            _print_table(tables, options.rounds)
            met = all(table.ratio <= MAX_OF_HTTPX for table in tables)
            a_run = statistics.median(tables[0].bare_ms) / 1000
            many = int(SHARE_OF_A_CORE * IDEAL_S / a_run)
            later = [bench.runs(worker, many).seconds / IDEAL_S for _ in range(options.rounds)]
    times = statistics.median(later)
    print(
        f"\n{many} runs at once, as many as bare httpx reads with {SHARE_OF_A_CORE:.0%} of a core: the last"
    )
    print(f"one ends {times:.2f} times as late as ideal (limit {MAX_LATER}), median of {options.rounds}")
    return 0 if met and times <= MAX_LATER else 1


class _Runs(NamedTuple):
    """What a number of runs took, from the first start to the last end."""

    cpu_ms: float
    """CPU time of the worker, per run."""
    seconds: float
    scripts: float
    """Script calls in Redis, per run."""
    deltas: float
    """`llm.delta` events of a watched run."""


class _Table(NamedTuple):
    together: int
    bare_ms: list[float]
    runs: list[_Runs]

    @property
    def ratio(self) -> float:
        """The CPU time of the runs over that of bare httpx."""
        return statistics.median(one.cpu_ms / bare for one, bare in zip(self.runs, self.bare_ms, strict=True))


class Bench:
    """Measures on one Redis, with one model and one bare client."""

    def __init__(self, folder: Path, url: str, model_url: str, httpx: ClientProcess) -> None:
        self._folder, self._url, self._model_url, self._httpx = folder, url, model_url, httpx
        self._redis = redis.Redis.from_url(url)

    def worker(self) -> Worker:
        agent = _agent(self._model_url)
        return Worker(self._folder, self._url, agent, "-c", "2000", app="tasks", **ENV)

    def compared(self, worker: Worker, together: int, rounds: int) -> _Table:
        """Measure alternately. The first round of each warms up."""
        table = _Table(together, [], [])
        for number in range(rounds + 1):
            measures = [self._bare, lambda together: self.runs(worker, together)]
            found: list[Any] = [None, None]
            for which in (0, 1) if number % 2 else (1, 0):
                found[which] = measures[which](together)
            if number:
                table.bare_ms.append(found[0])
                table.runs.append(found[1])
                print(f"  {together}: bare {found[0]:.1f} ms, {found[1]}", file=sys.stderr, flush=True)
        return table

    def _bare(self, together: int) -> float:
        cost_us, _ = self._httpx.measure("chat", "streamed", 1, together)
        return cost_us / 1000

    def runs(self, worker: Worker, together: int) -> _Runs:
        """Execute runs at the same time. All are in the queue when the worker starts with them."""
        with Client(self._url) as client:
            worker.pause()
            handles: list[RunHandle[Any]] = [
                client.submit(RunRequest(agent_id="streams", session_id=uuid.uuid4().hex, input_text="go"))
                for _ in range(together)
            ]
            with _watchers(self._url, [handle.id for handle in handles[:WATCHED]]) as watching:
                before_s, scripts = worker.cpu_s(), self._script_calls()
                worker.go_on()
                for handle in handles:
                    handle.wait(120)
                cpu_s, scripts = worker.cpu_s() - before_s, self._script_calls() - scripts
                deltas = watching()
            records = [client.record(handle.id) for handle in handles]
        began = min(record.started_ms or 0 for record in records)
        ended = max(record.ended_ms or 0 for record in records)
        return _Runs(1000 * cpu_s / together, (ended - began) / 1000, scripts / together, deltas)

    def _script_calls(self) -> int:
        stats: Mapping[str, Any] = self._redis.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "fcall"))


def _print_table(tables: Sequence[_Table], rounds: int) -> None:
    print(
        f"\nCPU of a run in ms; {PIECES} pieces at {1000 // PAUSE_MS} a second: reasoning, text, arguments;"
    )
    print(f"{WATCHED} runs are watched; median of {rounds} alternating rounds\n")
    print(
        "| runs at once | worker | bare httpx | worker / httpx | limit | scripts a run | `llm.delta` a run |"
    )
    print("|---|---|---|---|---|---|---|")
    for table in tables:
        cpu_ms, scripts, deltas = (
            statistics.median(getattr(one, name) for one in table.runs)
            for name in ("cpu_ms", "scripts", "deltas")
        )
        print(
            f"| {table.together} | {cpu_ms:.1f} | {statistics.median(table.bare_ms):.1f} | {table.ratio:.2f} "
            f"| {MAX_OF_HTTPX} | {scripts:.1f} | {deltas:.1f} |",
            flush=True,
        )


# --- watching --------------------------------------------------------------------------------------------


@contextmanager
def _watchers(url: str, run_ids: Sequence[str]) -> Iterator[Any]:
    """One watcher for each run, in a process. Yields a function that waits for them: the pieces of a run."""
    command = [sys.executable, "-m", "bench.streaming", "watch", url, *run_ids]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise RuntimeError("the watchers did not start")

    def finished() -> float:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a watcher failed; see its output above")
        return float(line)

    try:
        yield finished
    finally:
        process.wait(60)
        process.stdout.close()


async def _watch(url: str, run_ids: Sequence[str]) -> None:
    async with AsyncClient(url) as client:
        watchers = [asyncio.create_task(_pieces(client, run_id)) for run_id in run_ids]
        await asyncio.sleep(1)  # until all have read the stored events and are subscribed
        print("ready", flush=True)
        print(statistics.mean(await asyncio.gather(*watchers)), flush=True)


async def _pieces(client: AsyncClient, run_id: str) -> int:
    """How many `llm.delta` events the run has. Raises RuntimeError if one is missing."""
    texts: Counter[str] = Counter()
    count = 0
    async for event in client.handle(run_id).events():
        if event.name == "llm.delta":
            count += 1
            kind, text, offset = (event.payload[name] for name in ("kind", "text", "offset"))
            if texts[str(kind)] != offset:
                raise RuntimeError(f"{run_id}: a piece of the {kind} is missing")
            texts[str(kind)] += len(str(text))
    if dict(texts) != _expected():
        raise RuntimeError(f"{run_id}: the pieces have {dict(texts)} characters, not {_expected()}")
    return count


def _expected() -> dict[str, int]:
    """The characters of each kind in a reply."""
    found: Counter[str] = Counter()
    for event in chat_events(True)[:-1]:
        chunk = json.loads(event.removeprefix("data: "))
        for choice in chunk["choices"]:
            delta = choice["delta"]
            found["reasoning"] += len(delta.get("reasoning_content") or "")
            found["text"] += len(delta.get("content") or "")
            for call in delta.get("tool_calls") or ():
                found["tool_arguments"] += len(call["function"]["arguments"])
    return dict(found)


if __name__ == "__main__":
    asyncio.run(_watch(sys.argv[2], sys.argv[3:]))
