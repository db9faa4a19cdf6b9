"""Programs of an application for the virtual environment with the oldest versions. They import only our
package.

Each function here is one program. `python old_product.py NAME` runs it and prints what it returns as JSON.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery, chain, current_app, group

from openagents_worker import (
    AsyncClient,
    Client,
    OpenAgentsError,
    RunBudget,
    RunFailed,
    RunHandle,
    RunRequest,
    register,
    run_agent,
    sse,
)

PATIENCE_S = 60


def request(agent_id: str = "clerk", **fields: Any) -> RunRequest:
    return RunRequest(agent_id=agent_id, session_id=f"s-{uuid.uuid4().hex}", input_text="17*23?", **fields)


def submit_and_wait() -> dict[str, Any]:
    """The README's producer, then all that a Celery result has."""
    handle = run_agent.delay(request())
    events = list(handle.events())
    result = handle.wait(timeout=PATIENCE_S)
    with Client() as client:
        steps = client.record(handle.id).steps
    return {
        "seqs": [event.seq for event in events if event.seq is not None],
        "names": [event.name for event in events],
        "again": [event.seq for event in handle.events(after=3)],
        "output": result.final_output,
        "got": handle.get(timeout=PATIENCE_S)["final_output"],
        "celery": [handle.state, handle.ready(), handle.successful(), handle.failed()],
        "record": handle.record().model_dump(mode="json"),
        "steps": steps,
    }


async def submit_and_wait_on_a_loop() -> dict[str, Any]:
    handle = await run_agent.adelay(request())
    events = [event async for event in handle.events()]
    result = await handle.wait(timeout=PATIENCE_S)
    async with AsyncClient() as client:
        other = await client.submit(request())
        waited = await other.wait(timeout=PATIENCE_S)
        conversation = await client.session((await other.record()).session_id)
    return {
        "seqs": [event.seq for event in events if event.seq is not None],
        "output": result.final_output,
        "client": waited.final_output,
        "transcript": [message["role"] for message in conversation.transcript],
    }


def use_loops_and_forks() -> dict[str, Any]:
    """Loops that are closed by hand, connections that the server closes, and a child; one client for all."""
    with Client() as killer:
        client = AsyncClient()
        ours = []
        for n in range(10):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(_submit_and_cancel(client, f"loop-{n}-{uuid.uuid4().hex}"))
            loop.close()
            ours.append(_ours(killer))
        asyncio.run(_submit_and_cancel(client, f"loop-{uuid.uuid4().hex}"))
        left = _ours(killer)
        loop = asyncio.new_event_loop()
        handle = loop.run_until_complete(client.submit(request()))
        for _ in range(5):
            _close_mine(killer)
            loop.run_until_complete(handle.record())
        child = os.fork()
        if child == 0:
            os._exit(
                int(asyncio.run(_knows(client, handle.id)) and killer.record(handle.id).run_id == handle.id)
            )
        knows = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        loop.run_until_complete(handle.cancel())
        loop.run_until_complete(client.close())
        loop.close()
    return {"most": max(ours), "left": left, "child_knows": knows}


def _ours(client: Client) -> int:
    """How many connections of this process Redis has, without the one that asks."""
    return len(_mine(client)) - 1


def _close_mine(client: Client) -> None:
    """What a server does to connections that were idle for long; not to the one that asks."""
    for one in _mine(client):
        client.store.redis.client_kill_filter(_id=one["id"], skipme=True)


def _mine(client: Client) -> list[dict[str, Any]]:
    found = client.store.redis.client_list()
    return [one for one in found if one["name"] == "openagents" and _is_mine(one["addr"])]


def _is_mine(address: str) -> bool:
    """Whether a connection's other end is a socket of this process."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text("utf-8").splitlines()[1:]]
    sockets = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(port)}
    return any(_link(file) in sockets for file in Path("/proc/self/fd").iterdir())


def _link(file: Path) -> str:
    try:
        return str(file.readlink())
    except OSError:  # closed since
        return ""


async def _submit_and_cancel(client: AsyncClient, run_id: str) -> None:
    handle = await client.submit(request(run_id=run_id))
    await handle.record()
    await handle.cancel()


async def _knows(client: AsyncClient, run_id: str) -> bool:
    return (await client.record(run_id)).run_id == run_id


async def watch_in_numbers() -> dict[str, Any]:
    """Many runs, each watched twice, over one connection."""
    handles = [await run_agent.adelay(request()) for _ in range(5)]

    async def watched(handle: Any) -> list[Any]:
        return [event.seq async for event in handle.aevents() if event.seq is not None]

    both = await asyncio.gather(*(watched(handle) for handle in handles for _ in range(2)))
    return {"whole": [seqs == list(range(1, len(seqs) + 1)) and len(seqs) > 5 for seqs in both]}


async def stream_to_the_web() -> dict[str, Any]:
    handle = await run_agent.adelay(request())
    frames = [frame async for frame in sse(handle)]
    rest = [frame async for frame in sse(handle, last_event_id="4")]
    return {
        "ids": [frame.splitlines()[0] for frame in frames if frame.startswith("id: ")],
        "last": frames[-1].splitlines()[0],
        "rest": [frame.splitlines()[0] for frame in rest if frame.startswith("id: ")],
    }


def cancel() -> dict[str, Any]:
    """A run that would stay for ever, cancelled at work; one by Celery's name for it."""
    told: dict[str, Any] = {}
    for how in ("cancel", "revoke"):
        handle = run_agent.delay(request("lingerer"))
        _until(handle, "tool.called")
        getattr(handle, how)("enough")
        told[how] = [handle.wait(timeout=PATIENCE_S).stop_reason, handle.state, _code(handle.get)]
    return told


def compose() -> dict[str, Any]:
    """Signatures, links, chains, groups and times."""
    linked, failed = request(run_id=f"linked-{uuid.uuid4().hex}"), request(run_id=f"after-{uuid.uuid4().hex}")
    first = run_agent.signature((request(),), link=run_agent.si(linked)).apply_async()
    broken = run_agent.apply_async(
        (request("broken", budget=RunBudget(max_resume_attempts=0)),), link_error=run_agent.si(failed)
    )
    chained = chain(run_agent.s(request()), run_agent.si(request())).apply_async()
    together = group(run_agent.s(request()) for _ in range(3)).apply_async()
    later = run_agent.apply_async((request(),), countdown=0.2, expires=PATIENCE_S, priority=3)
    return {
        "first": first.get(timeout=PATIENCE_S)["final_output"],
        "linked": _ended(linked.run_id),
        "broken": _code(lambda: broken.get(timeout=PATIENCE_S)),
        "after a failure": _ended(failed.run_id),
        "chained": [type(chained).__name__, chained.get(timeout=PATIENCE_S)["final_output"]],
        "together": [result["final_output"] for result in together.get(timeout=PATIENCE_S)],
        "later": later.get(timeout=PATIENCE_S)["final_output"],
    }


def submit_through_its_own_app() -> dict[str, Any]:
    """The runs are sent through an existing Celery app with its own settings."""
    url = os.environ["OPENAGENTS_REDIS_URL"]
    app = Celery("product", broker=url, backend=url, set_as_current=False)
    app.conf.update(
        task_routes={"tasks.*": {"queue": "low"}}, task_default_queue="default", task_acks_late=True
    )
    before = current_app._get_current_object()
    task = register(app)
    handle = task.delay(request())
    answer = handle.wait(timeout=PATIENCE_S).final_output
    together = group(task.s(request()) for _ in range(2)).apply_async()
    return {
        "output": answer,
        "together": [result["final_output"] for result in together.get(timeout=PATIENCE_S)],
        "app is untouched": current_app._get_current_object() is before and app.conf.task_acks_late,
    }


def submit_without_a_broker() -> dict[str, Any]:
    """Its broker cannot be reached, but the run is accepted."""
    return {"run_id": run_agent.delay(request()).id}


def submit_without_redis() -> dict[str, Any]:
    """Nothing is accepted, and the error has the reason."""
    return {"code": _code(lambda: run_agent.delay(request())), "unknown": _code(_ask_for_nobody)}


def _ask_for_nobody() -> Any:
    return RunHandle("nobody").record()


def _until(handle: RunHandle[Any], name: str) -> None:
    for event in handle.events():
        if event.name == name:
            return


def _ended(run_id: str) -> str:
    """The output of a run that another process will submit."""
    handle: RunHandle[Any] = RunHandle(run_id)
    for _ in range(PATIENCE_S * 20):
        if _code(handle.record) != "run.not_found":
            return str(handle.wait(timeout=PATIENCE_S).final_output)
        time.sleep(0.05)
    raise TimeoutError(run_id)


def _code(ask: Callable[[], object]) -> str:
    """The code of the error that it raises."""
    try:
        ask()
    except (RunFailed, OpenAgentsError) as error:
        return error.code
    return "none"


def main(name: str) -> None:
    program: Callable[[], Any] = globals()[name]
    print(json.dumps(asyncio.run(program()) if inspect.iscoroutinefunction(program) else program()))


if __name__ == "__main__":
    main(sys.argv[1])
