"""What belongs to a Celery app. The only place that keeps objects of ours on one, and knows which have runs.

Everything that this library makes for an app hangs on one attribute of the app. So it lives exactly as long
as the app does, and nothing here keeps an app alive.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, cast

from celery import Celery, Task
from celery._state import _get_active_apps
from celery.local import Proxy

from openagents_worker.errors import ConfigError
from openagents_worker.redaction import safe_url
from openagents_worker.settings import Settings, load_settings

if TYPE_CHECKING:
    from openagents_worker.producer.client import Client

__all__ = [
    "AppKind",
    "AppBinding",
    "ProvidesProcess",
    "attach_parts",
    "described_app",
    "find_parts",
    "parts_of",
    "real_app",
    "registered_app",
    "without_registered_apps",
]

_ATTRIBUTE = "openagents_parts"


class AppKind(StrEnum):
    """Whose app it is, and what it can do."""

    PRODUCER = "producer"
    """Made by this library, to publish messages."""
    WORKER = "worker"
    """Made by this library for its own workers: every queue is one of runs."""
    REGISTERED = "registered"
    """Somebody's own, with our tasks in it: `register(app)`."""
    FOREIGN = "foreign"
    """Somebody's own without our tasks; a handle or a client was made with it."""

    @property
    def has_tasks(self) -> bool:
        """Whether our tasks are in the app."""
        return self in (AppKind.WORKER, AppKind.REGISTERED)


class ProvidesProcess(Protocol):
    """What finds the worker process in which a task's body executes its run."""

    @property
    def holder(self) -> Any: ...
    def process_for(self, task: Task) -> Any: ...
    def eager(self) -> AbstractContextManager[None]: ...


@dataclass(eq=False, slots=True)
class AppBinding:
    """All that this library keeps for one Celery app."""

    kind: AppKind
    settings: Settings
    processes: ProvidesProcess | None = None
    """Set where the app has our tasks."""
    client: Client | None = None
    """Made when it is first asked for: `producer.client.client_of`."""
    producers: dict[int, Any] = field(default_factory=dict)
    """Kombu's pools of publishing connections, by the id of the process that opened them."""


_registered: list[weakref.ref[Celery]] = []
_ignored = 0
# No lock guards them, as a thread might hold it while the process forks: each change is one step.


def real_app(app: Celery) -> Celery:
    """The app behind a proxy such as `celery.current_app`; any other app is returned as it is."""
    return cast(Celery, app._get_current_object()) if isinstance(app, Proxy) else app


def find_parts(app: Celery) -> AppBinding | None:
    """What this library keeps for the app; None where it has had nothing to do with it."""
    found: AppBinding | None = getattr(app, _ATTRIBUTE, None)
    return found


def parts_of(app: Celery) -> AppBinding:
    """What this library keeps for the app; a foreign app gets the settings of the environment."""
    return find_parts(app) or attach_parts(app, AppBinding(AppKind.FOREIGN, load_settings()))


def attach_parts(app: Celery, parts: AppBinding) -> AppBinding:
    """Keep the parts for the app. A registered app is one that the front door's `run_agent` publishes by."""
    setattr(app, _ATTRIBUTE, parts)
    if parts.kind is AppKind.REGISTERED:
        _registered.append(weakref.ref(app, _registered.remove))
    return parts


def registered_app() -> Celery | None:
    """The one registered app of this process; None when there is none.

    An app that was closed, or that nobody holds any more, does not count. Raises `ConfigError` that names
    both when there are two.
    """
    apps = _registered_apps()
    if len(apps) > 1:
        del apps
        gc.collect()  # an app is part of reference cycles: it may be there only because nobody has looked
        apps = _registered_apps()
    if len(apps) > 1:
        raise ConfigError(
            f"two Celery apps of this process have runs: {' and '.join(map(described_app, apps[:2]))}; "
            "openagents_worker.run_agent cannot know which one is meant",
            hint="import run_agent from the module that registers the app: run_agent = register(app) there; "
            "a Client takes it as Client(app=app)",
        )
    return apps[0] if apps else None


def described_app(app: Celery) -> str:
    """An app as an error text names it: its name and its broker, without a password."""
    url = app.conf.broker_write_url or app.conf.broker_url or "amqp://"
    first = url if isinstance(url, str) else next(iter(url), "")
    return f"{app.main or 'an app without a name'!r} (broker {safe_url(first)})"


@contextmanager
def without_registered_apps() -> Generator[None]:
    """Let the front door act as if no app were registered, for a test whose Redis is not the app's."""
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
