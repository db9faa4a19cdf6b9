"""Breaks: runs each of which meets one fault at one of its commands to Redis. Workers and Redis are real."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from tests.support.command_proxy import Command, Proxy
from tests.support.supervised_deployment import World

__all__ = ["Breaks", "breaks_in", "strike_at"]

Row = dict[str, Any]


class Breaks:
    """Executes runs with faults. `rows` has a row for each fault that a run has met."""

    def __init__(self, world: World, proxy: Proxy, execute: Callable[[str], Row]) -> None:
        """`execute` executes the run with this id, checks what came of it, and returns its row."""
        self.world, self.proxy = world, proxy
        self.rows: list[Row] = []
        self._execute = execute

    def commands(self) -> list[str]:
        """The names of the commands of a run without a fault."""
        self.proxy.count()
        self._execute("counted")
        return [command.name for command in self.proxy.seen]

    def at(self, fault: str, command: int | str, nth: int = 1) -> bool:
        """Execute a run with a fault, see `strike_at`. Returns whether the run has this command."""
        met = strike_at(self.world, self.proxy, fault, command, nth)
        row = self._execute(f"{fault.replace(' ', '-')}-{command}-{nth}")
        if met:
            self.rows.append({"fault": fault, "command": met[0].number, "name": met[0].name, **row})
        self.world.wait_ready()
        return bool(met)

    def at_every_command(self, fault: str) -> None:
        """Execute a run for each of its commands."""
        for number in itertools.count(1):
            if not self.at(fault, number):
                return

    def at_every(self, fault: str, name: str) -> int:
        """Execute a run for each of its commands with this name. Returns how many there are."""
        return next(nth for nth in itertools.count(1) if not self.at(fault, name, nth)) - 1


@contextmanager
def breaks_in(world: World, execute: Callable[[str], Row]) -> Generator[Breaks]:
    """Start a world whose workers reach Redis through a proxy. It ends with the block."""
    with Proxy(world.redis.url) as proxy:
        world.redis_url_of = proxy.url_of
        world.start()
        yield Breaks(world, proxy, execute)
        world.end()


def strike_at(world: World, proxy: Proxy, fault: str, at: int | str, nth: int = 1) -> list[Command]:
    """Let the fault happen once, at the `nth` command of that number or name. Returns a list that gets it.

    `killed before`, `killed after`: the worker dies before or after the command. `answer lost`: its answer.
    """
    met: list[Command] = []
    left = itertools.count(nth - 1, -1)

    async def strike(command: Command) -> bool:
        if at not in (command.number, command.name) or met or next(left):
            return False
        met.append(command)
        if fault != "answer lost":
            await asyncio.to_thread(world.kill, world.worker(command.worker))
        return True

    proxy.count(**{"before" if fault == "killed before" else "after": strike})
    return met
