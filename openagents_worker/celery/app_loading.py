"""App loading: the only place that imports a Celery app by its name, as `celery -A` does."""

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
    """Load the app that `celery -A name` would use, and import its task modules as a worker does.

    Raises `ConfigError` with the module and the line that could not be imported.
    """
    try:
        app = find_app(name)
    except OpenAgentsError:  # an error of our settings describes itself
        raise
    except Exception as error:
        # If an attribute is missing, Celery reports the whole name as a missing module.
        missing = isinstance(error.__context__, AttributeError) and ":" in name
        cause = error.__context__ if missing else error
        raise ConfigError(
            f"cannot load the Celery app {name!r}: {_describe_error(cause or error)}",
            hint="-A takes a name as `celery -A` does: shop, shop.celery or shop.celery:app, importable from "
            f"{Path.cwd()}",
        ) from error
    if not isinstance(app, Celery):
        raise ConfigError(
            f"{name!r} is not a Celery app, but an object of type {type(app).__name__}",
            hint="-A takes a name as `celery -A` does: shop, shop.celery or shop.celery:app",
        )
    app = real_app(app)
    _import_modules(app, name)
    return app


def prepare_as_worker(settings: Settings) -> None:
    """Prepare this process as our worker does before it imports plugins; this sets Django up."""
    with make_worker_app(settings) as app:
        _import_modules(app, "openagents-worker")


def settings_of(app: Celery, name: str) -> Settings:
    """The settings with which `register` was called for the app. Raises `ConfigError` if it was not."""
    parts = find_binding(app)
    if parts is None or not parts.kind.has_tasks:
        raise ConfigError(
            f"the Celery app {name!r} cannot execute runs: it has no task tasks.run_agent",
            hint="call openagents_worker.register(app) in the module that creates the app",
        )
    return parts.settings


def _import_modules(app: Celery, name: str) -> None:
    try:
        app.loader.import_default_modules()
    except Exception as error:
        raise ConfigError(
            f"cannot import the modules of the Celery app {name!r}: {_describe_error(error)}",
            hint="a worker of this app would fail too; for Django, set DJANGO_SETTINGS_MODULE before the app "
            "is created",
        ) from error


def _describe_error(error: BaseException) -> str:
    """The type and text of the error, and its innermost line in the current directory if there is one."""
    here = f"{Path.cwd()}{os.sep}"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(here)]
    place = f" ({own[-1].filename.removeprefix(here)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"
