"""Bootsteps: the only place that starts and stops a worker process together with a Celery worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from contextlib import closing
from typing import Any, NoReturn, TypeVar

from billiard import current_process
from celery import Celery, bootsteps, signals
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.solo import TaskPool as SoloPool
from celery.worker import state

from openagents_worker.agents.code import read_agents
from openagents_worker.agents.current_folder import import_from_here
from openagents_worker.celery.access import check_access
from openagents_worker.celery.app_advice import advise
from openagents_worker.celery.free_slots import FreeSlots
from openagents_worker.celery.invalid_messages import invalid_messages_step
from openagents_worker.celery.logs import set_up_logging
from openagents_worker.celery.pool.task_pool import TaskPool, run_limit_of
from openagents_worker.celery.prefork import end_leases_on_reap
from openagents_worker.celery.process_holder import ProcessHolder
from openagents_worker.celery.registration_gate import registration_gate_step
from openagents_worker.celery.revoke import take_over_revoke
from openagents_worker.celery.run_queues import run_queues_step
from openagents_worker.celery.superuser import log_superuser
from openagents_worker.celery.task_events import EventBatches
from openagents_worker.celery.tasks import OWN_TASKS
from openagents_worker.celery.unreachable import lasting_problem, lasting_problem_of_celery
from openagents_worker.errors import (
    ConfigValidationError,
    OpenAgentsError,
    RedisRefused,
    RedisUnreachable,
    RedisUnsafe,
)
from openagents_worker.printable import printable
from openagents_worker.producer.broker_check import with_broker_of
from openagents_worker.producer.client import cell_of
from openagents_worker.producer.publisher import declared_queue, wake_queue
from openagents_worker.queue_names import WAKE_SUFFIX, problem_with_read_queue
from openagents_worker.runtime.start_checks import remarks
from openagents_worker.settings import Settings, unknown_variables
from openagents_worker.store.client import Store
from openagents_worker.telemetry.logs import get_logger, is_json_log
from openagents_worker.worker.backlog import priorities_are_kombus
from openagents_worker.worker.versions import check_packages_of_settings, check_versions

__all__ = ["EX_CONFIG", "install_bootsteps"]

log = get_logger(__name__)

T = TypeVar("T")

EX_CONFIG = 2
HAND_OVER_SIGNAL = signal.SIGUSR2  # SIGUSR1 is billiard's signal for soft time limits
NO_TIME_LIMIT_S = 20 * 24 * 3600  # epoll can wait for at most 24 days
POLL_S = 0.2  # how soon a worker that waits for Redis reacts to a stop signal


def install_bootsteps(worker: Any, holder: ProcessHolder, *, is_ours: bool) -> None:
    """Start the worker process before this Celery worker consumes, and end it with the worker.

    In an app that `is_ours` every queue is a queue of runs, and we set up the log. Called when the worker
    starts, before Celery sets up its log and creates its bootsteps.
    """
    import_from_here(first=False)
    worker.app.steps["worker"].add(_worker_process_step(holder, is_ours))
    worker.app.steps["consumer"].add(invalid_messages_step(holder))
    worker.app.steps["consumer"].add(FreeSlots)
    worker.app.steps["consumer"].add(registration_gate_step(holder))
    worker.app.steps["consumer"].add(EventBatches if is_ours else run_queues_step(holder))
    take_over_revoke()
    logging_config = None
    with contextlib.suppress(OpenAgentsError):  # our bootstep reports an invalid agents file
        if is_ours:
            holder.check()
        # A worker of another app may execute no runs: do not import plugins before that is known.
        config = holder.config if is_ours else read_agents(holder.settings.config).config
        logging_config = config.logging if config is not None else None
    set_up_logging(worker, holder.settings, logging_config, is_ours=is_ours, logfile=worker.logfile)
    if _forks(worker):
        # Celery kills a child that starts slowly, so the child does not wait for Redis.
        signals.worker_process_init.connect(lambda **_: _start_child(holder), weak=False)
        signals.worker_process_shutdown.connect(lambda **_: holder.close(), weak=False)


def _start_child(holder: ProcessHolder) -> None:
    """Start the worker process in a child of a prefork pool."""
    if holder.queues:
        signal.signal(HAND_OVER_SIGNAL, lambda *_: holder.hand_over())
        holder.settings = _with_own_ports(holder.settings)
        holder.process()


def _with_own_ports(settings: Settings) -> Settings:
    """The settings of a child of a prefork pool: the port of the n-th child, from 0, is n higher."""
    number = getattr(current_process(), "index", 0)
    ports = {name: getattr(settings, name) for name in ("metrics_port", "health_port")}
    return settings.model_copy(
        update={name: port + number for name, port in ports.items() if port is not None}
    )


def _hand_over_in_children(pool: PreforkPool) -> None:
    """Signal the child processes of the pool to hand over their runs.

    At its own shutdown, Celery waits for the children but sends them no signal.
    """
    for pid in pool.info["processes"]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, HAND_OVER_SIGNAL)


def _forks(worker: Any) -> bool:
    """Whether the pool of this worker executes tasks in child processes."""
    pool = worker.pool_cls
    return pool == "prefork" if isinstance(pool, str) else issubclass(pool, PreforkPool)


def _lift_time_limits(app: Celery) -> None:
    """Exempt runs from the app's `task_time_limit`: prefork applies it to each task without a limit."""
    for name in OWN_TASKS:
        task = app.tasks[name]
        task.time_limit = task.time_limit or NO_TIME_LIMIT_S
        task.soft_time_limit = task.soft_time_limit or NO_TIME_LIMIT_S


def _check_pool(worker: Any) -> None:
    """Raises `ConfigValidationError` for a pool that replaces the sockets and threads of asyncio."""
    name = worker.pool_cls.__module__.rpartition(".")[2]
    if name in ("gevent", "eventlet"):
        raise ConfigValidationError(
            f"runs cannot be executed in a {name} pool: it replaces the sockets and threads of asyncio",
            hint="omit --pool; the pools threads, prefork and solo also work",
        )


def _check_redis(settings: Settings, queues: Collection[str]) -> None:
    """Wait until Redis answers, then check its eviction policy, its durability and the user's rights.

    A failed check ends the process (`_refuse`).
    """
    with closing(Store(cell_of(settings), max_connections=1)) as store:
        durability = _wait_for_redis(store.persistence_info, settings.redis_url)
    try:
        durability.check_memory()
        if settings.durability == "strict":
            durability.check_disk()
    except RedisUnsafe as error:
        _refuse(error)
    _wait_for_redis(lambda: check_access(settings, queues), settings.redis_url)
    if durability.maxmemory_policy is None:
        log.warning(
            "redis.not_checked", hint="Redis refuses INFO; make sure that its maxmemory-policy is noeviction"
        )
    elif durability.may_evict:
        log.warning(
            "redis.may_evict",
            maxmemory_policy=durability.maxmemory_policy,
            hint="Redis has no memory limit now; with a limit it would evict runs: set noeviction",
        )


def _wait_for_redis(query: Callable[[], T], url: str) -> T:
    """Repeat the query until Redis answers; a missing right or a lasting problem ends the process."""
    is_logged = False
    while True:
        try:
            return query()
        except RedisRefused as error:
            _refuse(error)  # waiting would not help
        except RedisUnreachable as error:
            if problem := lasting_problem(error, "REDIS_URL", url):
                _refuse(problem)
            if not is_logged:
                log.warning("redis.away", error=error.message, hint=error.hint)
            is_logged = True
        state.maybe_shutdown()
        time.sleep(POLL_S)


def _refuse(error: OpenAgentsError) -> NoReturn:
    """Report the error and exit with `EX_CONFIG`."""
    if is_json_log():
        log.error("worker.not_started", code=error.code, message=error.message, hint=error.hint)
    else:
        print(printable(f"error: {error.code}: {error}"), file=sys.stderr, flush=True)
    raise SystemExit(EX_CONFIG) from None


def _is_consuming(worker: Any) -> bool:
    """Whether the consumer of this worker is connected to the broker and consumes. Thread-safe."""
    consumer = getattr(worker, "consumer", None)
    connection = getattr(consumer, "connection", None)
    is_open = connection is not None and connection.connected
    return bool(is_open and getattr(consumer, "task_consumer", None) is not None)


def _max_runs_per_process(worker: Any) -> int:
    """How many runs one process of the worker executes at a time; with `--autoscale`, at most.

    Called after Celery's pool step was created, which reads `--autoscale`.
    """
    if _forks(worker) or issubclass(worker.pool_cls, SoloPool):
        return 1
    run_limit = run_limit_of(worker.app) if issubclass(worker.pool_cls, TaskPool) else None
    return int(run_limit or worker.max_concurrency or worker.concurrency)


def _worker_process_step(holder: ProcessHolder, is_ours: bool) -> type[bootsteps.StartStopStep]:
    """The bootstep that starts and stops the worker process."""

    def hand_over(**_: Any) -> None:
        # In a solo pool the main thread executes a run, so Celery's own shutdown must wait for it.
        holder.hand_over()

    class WorkerProcessStep(bootsteps.StartStopStep):  # type: ignore[misc]
        """Starts after the pool and before the first message; stops before the pool waits for its tasks."""

        requires = ("celery.worker.components:Pool",)

        def __init__(self, parent: Any, **_: Any) -> None:
            """Check the configuration: an error ends the process before a message is consumed."""
            own_settings = holder.settings
            if not is_ours:
                holder.settings = _settings_with_broker(parent.app, holder.settings)
            holder.node = parent.hostname
            holder.max_runs = _max_runs_per_process(parent)
            holder.run_queues = None if is_ours else _run_queue_names(holder.settings)
            holder.queues = _queues_to_consume(parent.app, holder.run_queues)
            self.enabled = bool(holder.queues)
            try:
                if self.enabled:
                    check_versions()
                    check_packages_of_settings(holder.settings)
                    _check_pool(parent)
                    own_settings.check_files()
                    _check_queues(holder.queues, holder.settings)
                    holder.check()
                    _check_queues_of_agents(holder)
            except OpenAgentsError as error:
                _refuse(error)

        def start(self, parent: Any) -> None:
            for notice in remarks(holder.config) if holder.config is not None else ():
                log.info("agents_file.notice", notice=notice)
            for agent in holder.unavailable:
                log.error(
                    "agents_file.agent_not_served",
                    agent_id=agent.agent_id,
                    code=agent.code,
                    reason=agent.reason,
                    hint=agent.hint,
                )
            for name, meant in unknown_variables(os.environ):
                log.warning("settings.unknown", variable=name, did_you_mean=meant)
            if is_ours:
                log_superuser(parent.app)
            else:
                advise(parent)
            _check_redis(holder.settings, holder.queues)
            if is_ours and (problem := lasting_problem_of_celery(holder.settings)):
                _refuse(problem)
            if _forks(parent):
                _lift_time_limits(parent.app)
                end_leases_on_reap(parent.pool._pool, holder.settings)
                return
            holder.loop_thread = parent.pool.loop_thread if isinstance(parent.pool, TaskPool) else None
            holder.is_consuming = lambda: _is_consuming(parent)
            if isinstance(parent.pool, SoloPool):
                signals.worker_shutting_down.connect(hand_over, weak=False)
            process = holder.process()
            while process is not None and not process.heartbeat.wait_registered(POLL_S):
                state.maybe_shutdown()

        def info(self, parent: Any) -> dict[str, Any]:
            """The figures that `celery inspect stats` and Flower show."""
            return {"openagents": holder.stats()}

        def stop(self, parent: Any) -> None:
            if _forks(parent):
                _hand_over_in_children(parent.pool)
            holder.close()

        terminate = stop

    return WorkerProcessStep


def _queues_to_consume(app: Celery, run_queues: Collection[str] | None) -> tuple[str, ...]:
    """The queues of runs that this worker consumes; it then also consumes their wake-up queues.

    `run_queues` limits them to these names; None means that every queue is a queue of runs.
    """
    queues = app.amqp.queues
    names = tuple(
        name
        for name in queues.consume_from
        if name != wake_queue(name.removesuffix(WAKE_SUFFIX)) and (run_queues is None or name in run_queues)
    )
    for name in names:
        queues.select_add(declared_queue(app, wake_queue(name)))
    return names


def _check_queues(queues: Collection[str], settings: Settings) -> None:
    """Raises `ConfigValidationError` for a queue with an invalid name."""
    for name in queues:
        if problem := problem_with_read_queue(name, settings.key_prefix):
            raise ConfigValidationError(
                problem, hint="choose another name for the queue (-Q, OPENAGENTS_QUEUE)"
            )


def _check_queues_of_agents(holder: ProcessHolder) -> None:
    """Raises `ConfigValidationError` for an agent's queue whose name collides with the key prefix."""
    for agent in holder.config.agents if holder.config is not None else ():
        if agent.queue and (problem := problem_with_read_queue(agent.queue, holder.settings.key_prefix)):
            raise ConfigValidationError(
                f"the queue of the agent {agent.id!r}: {problem}", hint="choose another name for its queue"
            )


def _run_queue_names(settings: Settings) -> frozenset[str]:
    """The registered queue and the queues that the agents name, as far as they are registered by now."""
    try:
        config = read_agents(settings.config, may_be_absent=settings.is_config_optional).config
    except OpenAgentsError:  # `holder.check` reports it if the worker consumes the registered queue
        config = None
    agents = config.agents if config is not None else ()
    return frozenset({settings.queue, *(agent.queue for agent in agents if agent.queue)})


def _settings_with_broker(app: Celery, settings: Settings) -> Settings:
    """The settings with the app's broker, whose queues show which messages are lost.

    The queues cannot be read if the app sets a key prefix or its own priority names. Then the broker URL is
    empty, and the rescue loop re-sends messages with a growing grace.
    """
    if not priorities_are_kombus(app.conf.broker_transport_options or {}):
        return settings.model_copy(update={"broker_url": ""})
    return with_broker_of(app, settings)
