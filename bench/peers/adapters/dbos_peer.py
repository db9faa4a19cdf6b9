"""DBOS: a `@DBOS.workflow` whose steps are `@DBOS.step` functions, started through a DBOS queue.

Client and worker share only the system database: SQLite opened by DBOS, or a PostgreSQL with the defaults of
`initdb`. The functions are async, like those of agents. The queue has its defaults: no limit, and a poll of
the database every second.

Recovery: DBOS continues the runs of an executor when that executor is started again. Other processes do so
only with its Conductor, a separate service. So the worker is started again at once, under the same name.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys

import peer
from dbos import DBOS, DBOSClient, DBOSConfig
from processes import Postgres, bytes_of

URL = "PEER_URL"
QUEUE = "runs"


@DBOS.step()
async def one_step(run_id: str, n: int, size: int, pause_ms: int) -> str:
    return await peer.step(run_id, n, size, pause_ms)


@DBOS.workflow()
async def run(run_id: str, steps: int, size: int, pause_ms: int) -> None:
    for n in range(steps):
        await one_step(run_id, n, size, pause_ms)


def work() -> None:
    config: DBOSConfig = {
        "name": "peer",
        "system_database_url": os.environ[URL],
        "log_level": "WARNING",
    }
    DBOS(config=config)
    DBOS.launch()
    DBOS.register_queue(QUEUE)
    print("READY", flush=True)
    signal.pause()


class Dbos(peer.Peer):
    packages = ("dbos", "sqlalchemy", "psycopg")
    restarts = True
    recovery_setting = "executor started again"
    speed_setting = "polling_interval_sec = 1 of a queue"

    def start(self) -> None:
        if self.options["database"] == "postgres":
            self._start_postgres()
        else:
            self.file = self.folder / "dbos.sqlite"
            self.url = f"sqlite:///{self.file}"
        self.env[URL] = self.url
        self.start_worker("worker")
        self.client = DBOSClient(system_database_url=self.url)
        self.held.callback(self.client.destroy)
        if self.options["database"] == "sqlite":
            self.durability = self._sqlite_durability()

    def _start_postgres(self) -> None:
        import psycopg

        self.server = Postgres(self.folder)
        self.held.callback(self.server.stop)
        self.servers.append(self.server)
        with psycopg.connect(self.server.url(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE dbos")
        self.connection = self.held.enter_context(psycopg.connect(self.server.url("dbos"), autocommit=True))
        self.durability = self.server.durability(self.connection)
        self.url = self.server.url("dbos")

    def _sqlite_durability(self) -> str:
        """As the client's own connections are set up, which are made like the worker's."""
        with self.client._sys_db.engine.connect() as connection:
            found = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous")
            }
        level = ("OFF", "NORMAL", "FULL", "EXTRA")[found["synchronous"]]
        return f"SQLite journal={found['journal_mode']}, synchronous={level}"

    def start_worker(self, name: str) -> None:
        self.launch_worker(name, self.command("worker")).wait_until_said()

    def submit(self, run_id: str, job: peer.Job) -> None:
        options = {"queue_name": QUEUE, "workflow_name": "run", "workflow_id": run_id}
        self.client.enqueue(options, run_id, *job.line())

    def wait(self, run_id: str) -> None:
        self.client.retrieve_workflow(run_id).get_result(polling_interval_sec=0.05)

    def stored(self) -> dict[str, int]:
        if self.options["database"] == "postgres":
            return self.server.stored(self.connection)
        return {"SQLite file": bytes_of(self.file, self.file.with_name(f"{self.file.name}-wal"))}

    def more_facts(self) -> dict[str, str]:
        if self.options["database"] == "postgres":
            return self.server.about(self.connection)
        return {"SQLite": sqlite3.sqlite_version}


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        work()
    else:
        peer.serve(Dbos)
