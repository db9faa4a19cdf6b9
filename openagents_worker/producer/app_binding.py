"""App bindings. The only place that stores objects of this library on a Celery app and finds registered apps.

The binding is one attribute of the app. Therefore it exists exactly as long as the app, and nothing here
keeps an app alive.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, cast

from celery import Celery, Task
from celery._state import _get_active_apps
from celery.local import Proxy

from openagents_worker.errors import ConfigError
from openagents_worker.redaction import safe_url
from openagents_worker.settings import Settings, load_settings

__all__ = [
    "AppBinding",
    "AppKind",
    "ProvidesProcess",
    "attach_binding",
    "binding_of",
    "described_app",
    "find_binding",
    "real_app",
    "registered_app",
    "without_registered_apps",
]

_ATTRIBUTE = "openagents_parts"


class AppKind(StrEnum):
    """Who made the app, and whether it has the tasks of this library."""

    PRODUCER = "producer"
    """Made by this library to publish messages."""
    WORKER = "worker"
    """Made by this library for its own workers: every queue is a queue of runs."""
    REGISTERED = "registered"
    """An app of the user with the tasks of this library: `register(app)`."""
    FOREIGN = "foreign"
    """An app of the user without these tasks; a handle or a client was made with it."""

    @property
    def has_tasks(self) -> bool:
        """Whether the app has the tasks of this library."""
        return self in (AppKind.WORKER, AppKind.REGISTERED)


class ProvidesProcess(Protocol):
    """Finds the worker process in which a task executes its run."""

    @property
    def holder(self) -> Any: ...
    def process_for(self, task: Task, request: Any) -> Any: ...
    def eager(self) -> AbstractContextManager[None]: ...


@dataclass(eq=False, slots=True)
class AppBinding:
    """The objects that this library stores for one Celery app."""

    kind: AppKind
    settings: Settings
    processes: ProvidesProcess | None = None
    """Set if the app has the tasks of this library."""
    connection: object | None = None
    """The connection of the app; `producer.connection.connection_of` makes it at its first call."""
    producers: dict[int, Any] = field(default_factory=dict)
    """Kombu's pools of publishing connections, by the id of the process that opened them."""


_registered: list[weakref.ref[Celery]] = []
_ignored = 0
# There is no lock, because another thread could hold it during a fork. Each change is one atomic step.


def real_app(app: Celery) -> Celery:
    """The app behind a proxy such as `celery.current_app`; any other app is returned as it is."""
    return cast(Celery, app._get_current_object()) if isinstance(app, Proxy) else app


def find_binding(app: Celery) -> AppBinding | None:
    """The binding of the app; None if the app has none."""
    found: AppBinding | None = getattr(app, _ATTRIBUTE, None)
    return found


def binding_of(app: Celery) -> AppBinding:
    """The binding of the app. An app without one gets one, with the settings of the environment."""
    return find_binding(app) or attach_binding(app, AppBinding(AppKind.FOREIGN, load_settings()))


def attach_binding(app: Celery, binding: AppBinding) -> AppBinding:
    """Store the binding on the app. `openagents_worker.run_agent` publishes through a registered app."""
    setattr(app, _ATTRIBUTE, binding)
    if binding.kind is AppKind.REGISTERED:
        _registered.append(weakref.ref(app, _registered.remove))
    return binding


def registered_app() -> Celery | None:
    """The registered app of this process, or None.

    Closed apps and garbage-collected apps do not count. Raises `ConfigError` if two apps are registered.
    """
    apps = _registered_apps()
    if len(apps) > 1:
        del apps
        gc.collect()  # an unused app may still exist, because it is part of reference cycles
        apps = _registered_apps()
    if len(apps) > 1:
        raise ConfigError(
            f"two Celery apps are registered in this process: {' and '.join(map(described_app, apps[:2]))}; "
            "openagents_worker.run_agent cannot choose one of them",
            hint="write run_agent = register(app) in the module of the app, and import run_agent from there; "
            "for a client use Client(app=app)",
        )
    return apps[0] if apps else None


def described_app(app: Celery) -> str:
    """The name and the broker of an app for an error message, with a masked password."""
    url = app.conf.broker_write_url or app.conf.broker_url or "amqp://"
    first = url if isinstance(url, str) else next(iter(url), "")
    return f"{app.main or 'an app without a name'!r} (broker {safe_url(first)})"


@contextmanager
def without_registered_apps() -> Generator[None]:
    """Ignore registered apps in this block, for a test with another Redis than that of the app."""
    global _ignored
    _ignored += 1
    try:
        yield
    finally:
        _ignored -= 1


def _registered_apps() -> list[Celery]:
    if _ignored:
        return []
    open_apps = _get_active_apps()  # `Celery.close()` takes an app out of it
    return [app for ref in tuple(_registered) if (app := ref()) is not None and app in open_apps]
