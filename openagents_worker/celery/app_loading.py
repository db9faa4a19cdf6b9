"""Loading a Celery app by its name, as `celery -A` does. The only place that imports somebody's app."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from celery import Celery
from celery.app.utils import find_app

from openagents_worker.celery.app import make_worker_app
from openagents_worker.errors import ConfigError, OpenAgentsError
from openagents_worker.producer.app_binding import find_binding, real_app
from openagents_worker.settings import Settings

__all__ = ["load_app", "prepare_as_worker", "settings_of"]


def load_app(name: str) -> Celery:
    """The app that `celery -A name` would use, its modules imported as a worker imports them.

    Raises `ConfigError` that says what could not be imported, and where.
    """
    try:
        app = find_app(name)
    except OpenAgentsError:  # what is wrong with our settings says so itself
        raise
    except Exception as error:
        # For a missing attribute Celery takes the whole name for a module, and says that there is none.
        missing = isinstance(error.__context__, AttributeError) and ":" in name
        cause = error.__context__ if missing else error
        raise ConfigError(
            f"cannot load the Celery app {name!r}: {_described(cause or error)}",
            hint="-A names it as for `celery`: shop, shop.celery or shop.celery:app, importable from "
            f"{Path.cwd()}",
        ) from error
    if not isinstance(app, Celery):
        raise ConfigError(
            f"{name!r} is not a Celery app, but an object of type {type(app).__name__}",
            hint="-A names it as for `celery`: shop, shop.celery or shop.celery:app",
        )
    app = real_app(app)
    _import_modules(app, name)
    return app


def prepare_as_worker(settings: Settings) -> None:
    """Do in this process what a worker of ours does before it imports plugins: Django is set up."""
    with make_worker_app(settings) as app:
        _import_modules(app, "openagents-worker")


def settings_of(app: Celery, name: str) -> Settings:
    """The settings with which runs were put into the app. Raises `ConfigError` when none were."""
    parts = find_binding(app)
    if parts is None or not parts.kind.has_tasks:
        raise ConfigError(
            f"the Celery app {name!r} has no runs: its tasks do not contain tasks.run_agent",
            hint="call openagents_worker.register(app) in the module that makes the app",
        )
    return parts.settings


def _import_modules(app: Celery, name: str) -> None:
    try:
        app.loader.import_default_modules()
    except Exception as error:
        raise ConfigError(
            f"cannot import the modules of the Celery app {name!r}: {_described(error)}",
            hint="a worker of this app would not start either; for Django, DJANGO_SETTINGS_MODULE is set "
            "before the app is made",
        ) from error


def _described(error: BaseException) -> str:
    """Type and text, and the innermost line of the code in the current directory where there is one."""
    here = f"{Path.cwd()}{os.sep}"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(here)]
    place = f" ({own[-1].filename.removeprefix(here)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"
