"""The faults: the only place that does something bad to a deployment, and ends it again."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from chaos.deployment import Deployment, Worker
from chaos.redis_servers import SingleRedis
from chaos.schedule import Fault, FaultKind

__all__ = ["Faults"]

QUEUE = "agents"
MESSAGES_WAIT_S = 3.0
"""How long a fault of the queue waits for messages that it can meet."""
LOADING_S = 2.0
MOST_CLOCK_ERROR_S = 3600
BYTES_PER_COMMAND = 150  # of the append-only file, about


class Faults:
    """Injects faults into a deployment. `done` counts those that had an effect, by kind and length."""

    def __init__(self, deployment: Deployment, *, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.without_effect: Counter[str] = Counter()
        """Faults that met nothing, such as the loss of messages of an empty queue. A block of an event loop
        belongs to them until a step gets it."""
        self.errors: list[str] = []
        self._data_losses: list[tuple[float, float]] = []
        """The deaths of a Redis that does not write to its disk at once, by the monotonic clock."""
        self._deployment = deployment
        self._chance = random.Random(seed)
        self._redis_lock = threading.Lock()
        """One fault of Redis at a time: two at once cannot be told apart."""

    @property
    def data_losses(self) -> list[tuple[float, float]]:
        """From when to when Redis may have lost what was written shortly before, by the monotonic clock."""
        watched = self._deployment.watched
        return self._data_losses if watched is None else watched.data_losses

    def inject(self, fault: Fault) -> None:
        """Do it, and end it; returns when it is over."""
        try:
            had_effect = self._act(fault)
        except Exception as error:  # noqa: BLE001 - one fault that cannot be injected stops no other
            self.errors.append(f"{fault.kind}: {type(error).__name__}: {error}")
            return
        counter = self.done if had_effect else self.without_effect
        counter[_name_of(fault)] += 1

    def _act(self, fault: Fault) -> bool:
        match fault.kind:
            case FaultKind.KILL_WORKER | FaultKind.TERMINATE_WORKER | FaultKind.PAUSE_WORKER:
                return self._signal_worker(fault)
            case FaultKind.KILL_ALL_WORKERS:
                victims = self._deployment.workers()
                for worker in victims:
                    worker.send(signal.SIGKILL)
                return bool(victims)
            case FaultKind.STALL_WORKER | FaultKind.CUT_WORKER:
                return self._disconnect_worker(fault)
            case FaultKind.BLOCK_LOOP:
                self._deployment.block_next_effect(self._seconds(fault), partial(self._has_effect, fault))
                return False
            case FaultKind.MOVE_CLOCK:
                return self._move_clock(fault)
            case FaultKind.LOSE_MESSAGES | FaultKind.DOUBLE_MESSAGES | FaultKind.REORDER_MESSAGES:
                with self._redis_lock:
                    return self._disturb_queue(fault.kind)
            case _:
                with self._redis_lock:
                    return self._disturb_redis(fault)

    def _has_effect(self, fault: Fault) -> None:
        """A fault that was injected before has met something now."""
        self.without_effect[_name_of(fault)] -= 1
        self.done[_name_of(fault)] += 1

    def _seconds(self, fault: Fault) -> float:
        """The length of a fault: from 0.2 to 0.7 leases, or from 1.2 to 1.9."""
        at_least = 1.2 if fault.longer_than_lease else 0.2
        return self._deployment.lease_s * (at_least + self._chance.uniform(0, 0.6))

    # --- workers -----------------------------------------------------------------------------------------

    def _victim(self, fault: Fault) -> Worker | None:
        workers = [worker for worker in self._deployment.workers() if not worker.paused]
        return workers[int(fault.victim * len(workers)) % len(workers)] if workers else None

    def _signal_worker(self, fault: Fault) -> bool:
        if (worker := self._victim(fault)) is None:
            return False
        if fault.kind is FaultKind.PAUSE_WORKER:
            worker.paused = True
            worker.send(signal.SIGSTOP)
            time.sleep(self._seconds(fault))
            worker.send(signal.SIGCONT)
            worker.paused = False
        else:
            worker.send(signal.SIGKILL if fault.kind is FaultKind.KILL_WORKER else signal.SIGTERM)
        return True

    def _move_clock(self, fault: Fault) -> bool:
        if (worker := self._victim(fault)) is None:
            return False
        offset_s = self._chance.randrange(60, MOST_CLOCK_ERROR_S) * self._chance.choice((-1, 1))
        return self._deployment.clocks.set(worker.name, offset_s)

    def _disconnect_worker(self, fault: Fault) -> bool:
        if (worker := self._victim(fault)) is None:
            return False
        network = self._deployment.network
        begin = network.stall if fault.kind is FaultKind.STALL_WORKER else network.cut
        begin(worker.name)
        time.sleep(self._seconds(fault))
        network.heal(worker.name)
        return True

    # --- the queue ---------------------------------------------------------------------------------------

    def _disturb_queue(self, kind: FaultKind) -> bool:
        deadline = time.monotonic() + MESSAGES_WAIT_S
        while time.monotonic() < deadline:
            if self._deployment.admin.eval(ON_QUEUE, 1, QUEUE, kind.value, self._chance.randrange(2**31)):
                return True
            time.sleep(0.002)
        return False

    # --- Redis -------------------------------------------------------------------------------------------

    def _disturb_redis(self, fault: Fault) -> bool:
        admin, seconds = self._deployment.admin, self._seconds(fault)
        match fault.kind:
            case FaultKind.FLUSH_SCRIPTS:
                admin.script_flush()
            case FaultKind.KILL_CLIENTS:
                admin.client_kill_filter(_type="normal")
                admin.client_kill_filter(_type="pubsub")
            case FaultKind.PAUSE_CLIENTS:
                admin.client_pause(round(seconds * 1000))
                time.sleep(seconds)
            case FaultKind.FAIL_OVER if self._deployment.watched is not None:
                return self._deployment.watched.fail_over(kill=fault.longer_than_lease)
            case kind if self._deployment.single is not None:
                self._disturb_single(self._deployment.single, kind, seconds)
            case other:
                raise ValueError(f"{other} is not possible in this deployment")
        return True

    def _death_of(self, server: SingleRedis) -> AbstractContextManager[None]:
        return nullcontext() if server.writes_at_once else self._data_loss()

    @contextmanager
    def _data_loss(self) -> Generator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._data_losses.append((began, time.monotonic()))

    def _disturb_single(self, server: SingleRedis, kind: FaultKind, seconds: float) -> None:
        match kind:
            case FaultKind.KILL_REDIS:
                with self._death_of(server):
                    server.restart(kill=True)
            case FaultKind.RESTART_REDIS:
                server.restart(kill=False)
            case FaultKind.SLOW_LOADING:
                commands = 1 + server.stored_bytes() // BYTES_PER_COMMAND
                delay_us = round(LOADING_S * 1e6 / commands)
                with self._death_of(server):
                    server.restart(kill=True, **{"key-load-delay": str(delay_us)})
            case FaultKind.STALL_REDIS:
                os.kill(server.pid, signal.SIGSTOP)
                time.sleep(seconds)
                os.kill(server.pid, signal.SIGCONT)
            case FaultKind.FULL_REDIS:
                with server.full():
                    time.sleep(seconds)
            case FaultKind.READ_ONLY_REDIS:
                with server.read_only():
                    time.sleep(seconds)
            case FaultKind.UNSAVED_REDIS:
                with server.failed_snapshot():
                    time.sleep(seconds)
            case other:
                raise ValueError(f"{other} is not a fault of a single Redis")


WITH_LENGTH = {
    FaultKind.PAUSE_WORKER,
    FaultKind.STALL_WORKER,
    FaultKind.CUT_WORKER,
    FaultKind.BLOCK_LOOP,
    FaultKind.STALL_REDIS,
    FaultKind.FULL_REDIS,
    FaultKind.READ_ONLY_REDIS,
    FaultKind.UNSAVED_REDIS,
    FaultKind.PAUSE_CLIENTS,
}


def _name_of(fault: Fault) -> str:
    """The name under which a fault is counted."""
    length = "longer" if fault.longer_than_lease else "shorter"
    return f"{fault.kind} ({length})" if fault.kind in WITH_LENGTH else fault.kind.value


ON_QUEUE = """
local waiting = redis.call('LRANGE', KEYS[1], 0, -1)
if #waiting == 0 or (ARGV[1] == 'reorder_messages' and #waiting < 2) then return 0 end
math.randomseed(tonumber(ARGV[2]))
local left = {}
for _, message in ipairs(waiting) do
  if ARGV[1] ~= 'lose_messages' or math.random() < 0.5 then left[#left + 1] = message end
  if ARGV[1] == 'double_messages' then left[#left + 1] = message end
end
if ARGV[1] == 'reorder_messages' then
  for i = #left, 2, -1 do
    local j = math.random(i)
    left[i], left[j] = left[j], left[i]
  end
end
if ARGV[1] == 'lose_messages' and #left == #waiting then left[#left] = nil end
redis.call('DEL', KEYS[1])
for _, message in ipairs(left) do redis.call('RPUSH', KEYS[1], message) end
return 1
"""
