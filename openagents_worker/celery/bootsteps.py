"""The step. The only place that ties a worker process to the life of a Celery worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from contextlib import closing
from typing import Any, NoReturn, TypeVar

from celery import Celery, bootsteps, signals
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.solo import TaskPool as SoloPool
from celery.worker import state

from openagents_worker.addresses import redis_url_of_connection
from openagents_worker.agents import notices, read_agents_file
from openagents_worker.agents.current_folder import import_from_here
from openagents_worker.celery.access import check_access
from openagents_worker.celery.app_advice import advise
from openagents_worker.celery.free_slots import FreeSlots
from openagents_worker.celery.invalid_messages import invalid_messages_step_of
from openagents_worker.celery.logs import set_up_logging
from openagents_worker.celery.pool.task_pool import TaskPool
from openagents_worker.celery.prefork import end_leases_of_reaped
from openagents_worker.celery.process_holder import ProcessHolder
from openagents_worker.celery.registration_gate import gate_of
from openagents_worker.celery.revoke import take_over_revoke
from openagents_worker.celery.run_queues import run_queues_of
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
from openagents_worker.producer.client import cell_of
from openagents_worker.producer.publisher import wake_queue
from openagents_worker.queue_names import WAKE_SUFFIX, problem_with_read_queue
from openagents_worker.settings import Settings, unknown_variables
from openagents_worker.store.client import Store
from openagents_worker.telemetry.logs import get_logger, is_json_log
from openagents_worker.worker.backlog import priorities_are_kombus
from openagents_worker.worker.versions import check_versions

__all__ = ["EX_CONFIG", "install_bootsteps"]

log = get_logger(__name__)

T = TypeVar("T")

EX_CONFIG = 2
TELL_CHILD = signal.SIGUSR2  # SIGUSR1 is billiard's, for soft time limits
NO_TIME_LIMIT_S = 20 * 24 * 3600  # the longest that epoll can wait for, in whole days, is 24
POLL_S = 0.2  # how soon a worker that waits for Redis notices that it is told to stop


def install_bootsteps(worker: Any, host: ProcessHolder, *, is_ours: bool) -> None:
    """Start the host's process before this worker consumes, and end it when the worker does.

    In an app that `is_ours` every queue is one of runs, and the log is set up by us. Called when the worker
    begins, before Celery sets up its log and makes its steps.
    """
    import_from_here(first=False)
    worker.app.steps["worker"].add(_step_of(host, is_ours))
    worker.app.steps["consumer"].add(invalid_messages_step_of(host))
    worker.app.steps["consumer"].add(FreeSlots)
    worker.app.steps["consumer"].add(gate_of(host))
    worker.app.steps["consumer"].add(EventBatches if is_ours else run_queues_of(host))
    take_over_revoke()
    logging_config = None
    with contextlib.suppress(OpenAgentsError):  # what is wrong with the agents file, our step says
        if is_ours:
            host.check()
        # Another app's worker may execute no runs: it imports no plugins before that is known.
        config = host.config if is_ours else read_agents_file(host.settings.config).config
        logging_config = config.logging if config is not None else None
    set_up_logging(worker, host.settings, logging_config, is_ours=is_ours, logfile=worker.logfile)
    if _forks(worker):
        # Celery kills a child that takes long to start, so this does not wait for Redis.
        signals.worker_process_init.connect(lambda **_: _start_child(host), weak=False)
        signals.worker_process_shutdown.connect(lambda **_: host.close(), weak=False)


def _start_child(host: ProcessHolder) -> None:
    if host.queues:
        signal.signal(TELL_CHILD, lambda *_: host.hand_over())
        host.process()


def _tell_children(pool: PreforkPool) -> None:
    """Celery waits for what its children do, and they would not know that they are waited for."""
    for pid in pool.info["processes"]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, TELL_CHILD)


def _forks(worker: Any) -> bool:
    pool = worker.pool_cls
    return pool == "prefork" if isinstance(pool, str) else issubclass(pool, PreforkPool)


def _lift_time_limits(app: Celery) -> None:
    """Keep the app's `task_time_limit` from runs: prefork takes it wherever a task has none of its own."""
    for name in OWN_TASKS:
        task = app.tasks[name]
        task.time_limit = task.time_limit or NO_TIME_LIMIT_S
        task.soft_time_limit = task.soft_time_limit or NO_TIME_LIMIT_S


def _check_pool(worker: Any) -> None:
    """Raises `ConfigValidationError` for the pools that replace what asyncio is built on."""
    name = worker.pool_cls.__module__.rpartition(".")[2]
    if name in ("gevent", "eventlet"):
        raise ConfigValidationError(
            f"the pool {name} cannot carry runs: it replaces the sockets and threads that asyncio needs",
            hint="leave --pool out; threads, prefork and solo work, too",
        )


def _check_redis(settings: Settings, queues: Collection[str]) -> None:
    """Wait until Redis answers; refuse one that throws runs away, is not as strict as asked for, or lets its
    user do less than a worker does."""
    with closing(Store(cell_of(settings), max_connections=1)) as store:
        persistence = _patiently(store.persistence_info, settings.redis_url)
    try:
        persistence.check_memory()
        if settings.durability == "strict":
            persistence.check_disk()
    except RedisUnsafe as error:
        _refuse(error)
    _patiently(lambda: check_access(settings, queues), settings.redis_url)
    if persistence.maxmemory_policy is None:
        log.warning(
            "redis.not_checked", hint="it does not answer INFO; see that maxmemory-policy is noeviction"
        )
    elif persistence.may_evict:
        log.warning(
            "redis.may_evict",
            maxmemory_policy=persistence.maxmemory_policy,
            hint="it has no limit of memory yet; with one it would throw runs away: set noeviction",
        )


def _patiently(ask: Callable[[], T], url: str) -> T:
    told = False
    while True:
        try:
            return ask()
        except RedisRefused as error:
            _refuse(error)  # waiting would not help
        except RedisUnreachable as error:
            if problem := lasting_problem(error, "REDIS_URL", url):
                _refuse(problem)
            if not told:
                log.warning("redis.away", error=error.message, hint=error.hint)
            told = True
        state.maybe_shutdown()
        time.sleep(POLL_S)


def _refuse(error: OpenAgentsError) -> NoReturn:
    if is_json_log():
        log.error("worker.not_started", code=error.code, message=error.message, hint=error.hint)
    else:
        print(printable(f"error: {error.code}: {error}"), file=sys.stderr, flush=True)
    raise SystemExit(EX_CONFIG) from None


def _most_runs(worker: Any) -> int:
    """How many runs at once one process of the worker executes."""
    one_each = _forks(worker) or issubclass(worker.pool_cls, SoloPool)
    return 1 if one_each else int(worker.concurrency)


def _step_of(host: ProcessHolder, is_ours: bool) -> type[bootsteps.StartStopStep]:
    def hand_over(**_: Any) -> None:
        # Under solo the main thread is inside of a run: it hears the signal, and cannot act upon it.
        host.hand_over()

    class Runs(bootsteps.StartStopStep):  # type: ignore[misc]
        """Started after the pool and before the first message; stopped before the pool waits for tasks."""

        requires = ("celery.worker.components:Pool",)

        def __init__(self, parent: Any, **_: Any) -> None:
            """What is wrong with the configuration ends the start here, before anything is consumed."""
            own_settings = host.settings
            if not is_ours:
                host.settings = _with_broker_of(parent.app, host.settings)
            host.node = parent.hostname
            host.max_runs = _most_runs(parent)
            host.queues = _with_wakes(parent.app, None if is_ours else _queues_of_runs(host.settings))
            self.enabled = bool(host.queues)
            try:
                if self.enabled:
                    check_versions()
                    _check_pool(parent)
                    own_settings.check_files()
                    _check_queues(host.queues, host.settings)
                    host.check()
                    _check_agents_queues(host)
            except OpenAgentsError as error:
                _refuse(error)

        def start(self, parent: Any) -> None:
            for notice in notices(host.config) if host.config is not None else ():
                log.info("agents_file.notice", notice=notice)
            for agent in host.unavailable:
                log.error(
                    "agents_file.agent_not_served",
                    agent_id=agent.agent_id,
                    code=agent.code,
                    reason=agent.reason,
                    hint=agent.hint,
                )
            for name, meant in unknown_variables(os.environ):
                log.warning("settings.unknown", variable=name, did_you_mean=meant)
            if not is_ours:
                advise(parent)
            _check_redis(host.settings, host.queues)
            if is_ours and (problem := lasting_problem_of_celery(host.settings)):
                _refuse(problem)
            if _forks(parent):
                _lift_time_limits(parent.app)
                end_leases_of_reaped(parent.pool._pool, host.settings)
                return
            host.bridge = parent.pool.bridge if isinstance(parent.pool, TaskPool) else None
            if isinstance(parent.pool, SoloPool):
                signals.worker_shutting_down.connect(hand_over, weak=False)
            process = host.process()
            while process is not None and not process.heartbeat.wait_registered(POLL_S):
                state.maybe_shutdown()

        def info(self, parent: Any) -> dict[str, Any]:
            """What `celery inspect stats` and Flower show of us."""
            return {"openagents": host.stats()}

        def stop(self, parent: Any) -> None:
            if _forks(parent):
                _tell_children(parent.pool)
            host.close()

        terminate = stop

    return Runs


def _with_wakes(app: Celery, of_runs: Collection[str] | None) -> tuple[str, ...]:
    """The queues of runs that this worker consumes (None: each is one); with one it consumes its wake-ups."""
    queues = app.amqp.queues
    names = tuple(
        name
        for name in queues.consume_from
        if name != wake_queue(name.removesuffix(WAKE_SUFFIX)) and (of_runs is None or name in of_runs)
    )
    for name in names:
        queues.select_add(wake_queue(name))
    return names


def _check_queues(queues: Collection[str], settings: Settings) -> None:
    """Raises `ConfigValidationError` for a queue to be read whose name no queue may have."""
    for name in queues:
        if problem := problem_with_read_queue(name, settings.key_prefix):
            raise ConfigValidationError(
                problem, hint="choose another name for the queue (-Q, OPENAGENTS_QUEUE)"
            )


def _check_agents_queues(host: ProcessHolder) -> None:
    """The same for the queues that agents name; the agents file does not know the key prefix."""
    for agent in host.config.agents if host.config is not None else ():
        if agent.queue and (problem := problem_with_read_queue(agent.queue, host.settings.key_prefix)):
            raise ConfigValidationError(
                f"the queue of the agent {agent.id!r}: {problem}", hint="choose another name for its queue"
            )


def _queues_of_runs(settings: Settings) -> set[str]:
    """The queue that was registered, and those that agents have of their own."""
    try:
        config = read_agents_file(settings.config).config
    except OpenAgentsError:  # who consumes the registered queue is told so by the host's check
        config = None
    agents = config.agents if config is not None else ()
    return {settings.queue, *(agent.queue for agent in agents if agent.queue)}


def _with_broker_of(app: Celery, settings: Settings) -> Settings:
    """The settings with the app's broker, whose queues tell which messages are lost.

    With a prefix before its keys, or priorities that are named otherwise than kombu does, they are not to be
    read by their names: then nothing can be read, and a run is sent again after ever longer times.
    """
    options = app.conf.broker_transport_options or {}
    if options.get("global_keyprefix") or not priorities_are_kombus(options):
        return settings.model_copy(update={"broker_url": ""})
    with app.connection_for_read() as connection:
        url = redis_url_of_connection(connection, options)
    return settings.model_copy(update={"broker_url": url or ""})
