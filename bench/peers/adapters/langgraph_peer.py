"""LangGraph: a graph of one node that appends a message to the state, and is repeated until there are enough.

With `durability="sync"`, a checkpoint is written before the next step starts. The state is a list with
`operator.add`, as in LangGraph's guides. Its savers write the whole list with every step, so the bytes grow
with the square of the steps. (`DeltaChannel`, which avoids this, is in beta.) The savers are opened as in
their documentation: one connection, `from_conn_string`.

LangGraph, the library, has no queue and no workers: the worker here is a process that calls `ainvoke` for
each requested run, 32 at the same time. Recovery: the death is not detected. The adapter starts another
process at once and invokes the same thread again, as a caller would have to.
"""

from __future__ import annotations

import asyncio
import operator
import os
import sqlite3
import sys
from pathlib import Path
from typing import Annotated, Any, TypedDict

import peer
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from processes import Postgres, bytes_of

URL = "PEER_URL"


class State(TypedDict):
    run_id: str
    job: list[int]
    messages: Annotated[list[str], operator.add]


async def one_step(state: State) -> dict[str, Any]:
    _, size, pause_ms = state["job"]
    return {"messages": [await peer.step(state["run_id"], len(state["messages"]), size, pause_ms)]}


def where_next(state: State) -> str:
    return "one_step" if len(state["messages"]) < state["job"][0] else END


def _saver(url: str) -> Any:
    return (AsyncPostgresSaver if url.startswith("postgresql") else AsyncSqliteSaver).from_conn_string(url)


async def work() -> None:
    async with _saver(os.environ[URL]) as saver:
        await saver.setup()
        graph = (
            StateGraph(State)
            .add_node("one_step", one_step)
            .add_edge(START, "one_step")
            .add_conditional_edges("one_step", where_next)
            .compile(checkpointer=saver)
        )

        async def execute(run_id: str, job: peer.Job, again: bool) -> None:
            config = {"configurable": {"thread_id": run_id}, "recursion_limit": job.steps + 10}
            state = None if again else {"run_id": run_id, "job": job.line(), "messages": []}
            done = await graph.ainvoke(state, config, durability="sync")
            assert len(done["messages"]) == job.steps

        await peer.execute_requests(execute)


class LangGraph(peer.Library):
    packages = (
        "langgraph",
        "langgraph-checkpoint",
        "langgraph-checkpoint-sqlite",
        "langgraph-checkpoint-postgres",
        "psycopg",
    )
    recovery_setting = "none: the caller has to notice and to ask again"

    def start(self) -> None:
        if self.options["database"] == "postgres":
            self._start_postgres()
        else:
            self.url = str(self.folder / "langgraph.sqlite")
        self.env[URL] = self.url
        self.start_worker("worker")
        if self.options["database"] == "sqlite":
            self.durability = self._sqlite_durability()

    def _start_postgres(self) -> None:
        import psycopg

        self.server = Postgres(self.folder)
        self.held.callback(self.server.stop)
        self.servers.append(self.server)
        with psycopg.connect(self.server.url(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE langgraph")
        self.url = self.server.url("langgraph")
        self.connection = self.held.enter_context(psycopg.connect(self.url, autocommit=True))
        self.durability = self.server.durability(self.connection)

    def _sqlite_durability(self) -> str:
        """The saver sets the journal's mode, which stays with the file, and leaves `synchronous` as it is."""
        with sqlite3.connect(self.url) as connection:
            mode, level = (
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
            )
        return f"SQLite journal={mode}, synchronous={('OFF', 'NORMAL', 'FULL', 'EXTRA')[level]}"

    def stored(self) -> dict[str, int]:
        if self.options["database"] == "postgres":
            return self.server.stored(self.connection)
        with sqlite3.connect(self.url) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        file = Path(self.url)
        return {"SQLite file": bytes_of(file, file.with_name(f"{file.name}-wal"))}

    def more_facts(self) -> dict[str, str]:
        if self.options["database"] == "postgres":
            return self.server.about(self.connection)
        return {"SQLite": sqlite3.sqlite_version}


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        asyncio.run(work())
    else:
        peer.serve(LangGraph)
