"""What a user of the examples does and sees, whatever model answers: a scripted one, or a real one."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.deployment import ROOT
from tests.support.development import PATIENCE_S, Development, developing
from tests.support.waiting import wait_for

__all__ = ["Coding", "Research", "Support", "coding", "research", "support"]


class Example:
    """A running example. Its producer is executed as the README says."""

    name = ""

    def __init__(self, dev: Development) -> None:
        self.dev = dev

    @property
    def asking(self) -> tuple[str, ...]:
        return (sys.executable, "-m", f"examples.{self.name}.ask")

    def ask(self, *words: str, typed: str = "") -> str:
        return self.dev.run(*self.asking, *words, typed=typed)

    def listed(self, *command: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = json.loads(self.dev.ours(*command, "--json"))["items"]
        return items


@contextmanager
def _running(name: str, env: dict[str, str], real_model: bool) -> Generator[Development]:
    env |= {"OPENAGENTS_CONFIG": f"examples/{name}/agents.json"}
    script = () if real_model else ("--model", f"examples.{name}.model:reply")
    with developing(ROOT, *script, "--no-reload", env=env, real_model=real_model) as dev:
        yield dev


# --- support ---------------------------------------------------------------------------------------------


class Support(Example):
    name = "support"

    def refunds(self) -> dict[str, int]:
        """What the shop has paid back, by the number of the order: the effects outside of the library."""
        path = Path(self.dev.env["SUPPORT_DATABASE"])
        if not path.exists():
            return {}
        shop = sqlite3.connect(path)
        try:
            return dict(shop.execute("SELECT number, cents FROM refunds").fetchall())
        finally:
            shop.close()

    def ask_and_decide(self, customer: str, text: str, *decision: str) -> str:
        """Write as a customer, decide as a colleague when the agent asks, and return the answer."""
        before = self.refunds()
        with self.dev.start(*self.asking, customer, text) as customer_process:
            try:
                [asked] = wait_for(lambda: self.listed("approvals"), "a refund waits", PATIENCE_S)
                assert self.refunds() == before
                verb, *options = decision
                self.dev.ours(verb, asked["run_id"], "refund", "--by", "anna", *options)
                answer, _ = customer_process.communicate(timeout=PATIENCE_S)
            finally:
                customer_process.kill()
        assert customer_process.returncode == 0
        return answer


@contextmanager
def support(folder: Path, *, real_model: bool = False) -> Generator[Support]:
    env = {"SUPPORT_DATABASE": str(folder / "shop.sqlite3")}
    with _running("support", env, real_model) as dev:
        yield Support(dev)


# --- research --------------------------------------------------------------------------------------------


class Research(Example):
    name = "research"

    def run(self) -> dict[str, Any]:
        """The run of the lead."""
        [run] = self.listed("runs", "--agent", "research")
        return run

    def team(self) -> list[dict[str, Any]]:
        """The runs of the researchers."""
        return self.listed("runs", "--parent", self.run()["run_id"])

    def most_at_once(self) -> int:
        """How many researchers worked at the same time, by the events of the lead."""
        shown = self.dev.ours("watch", self.run()["run_id"], "--json").splitlines()
        names = [json.loads(line).get("name") for line in shown]
        most = now = 0
        for name in names:
            now += {"run.child_started": 1, "run.child_completed": -1}.get(str(name), 0)
            most = max(most, now)
        return most


@contextmanager
def research(folder: Path, *, real_model: bool = False) -> Generator[Research]:
    with _running("research", {}, real_model) as dev:
        yield Research(dev)


# --- coding ----------------------------------------------------------------------------------------------


class Coding(Example):
    name = "coding"

    def git(self, *arguments: str) -> str:
        return self.dev.run("git", "-C", self.dev.env["CODING_REPOSITORY"], *arguments)


@contextmanager
def coding(folder: Path, server: Path, *, real_model: bool = False) -> Generator[Coding]:
    """`server` is the program `mcp-server-git`."""
    env = {"CODING_REPOSITORY": str(folder / "greeter"), "CODING_GIT_SERVER": str(server)}
    with _running("coding", env, real_model) as dev:
        yield Coding(dev)
