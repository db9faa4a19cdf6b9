"""The app that publishes. The only place that decides which Celery app a client's messages go out by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from celery import Celery

from openagents_worker.errors import ConfigError
from openagents_worker.producer.app_binding import parts_of, real_app, registered_app
from openagents_worker.producer.publisher import close_producers, make_app, send_wakes
from openagents_worker.settings import PREFIX, Settings, load_settings
from openagents_worker.store.scripts import Wake
from openagents_worker.telemetry.logs import get_logger

if TYPE_CHECKING:
    from openagents_worker.producer.client import Client

__all__ = ["PublishingApp", "Publishes"]

LEFT_TO_RESCUE = "a worker's rescue loop sends them"

log = get_logger(__name__)


class PublishingApp:
    """How a client's messages reach workers: by the app it was given, the one that is registered, or its own.

    Asked for with each message: a client may be made before the app is registered.
    """

    def __init__(
        self,
        redis_url: str | None,
        settings: Settings | None,
        app: Celery | None,
        client: Client | None = None,
    ) -> None:
        """`client` is the one that an app made here belongs to. Raises `ConfigError`."""
        self.given_settings = _settings(redis_url, settings)
        self.given_settings.check_files()
        self._given = None if app is None else real_app(app)
        self._follows = app is None and redis_url is None and settings is None
        self._client = client
        if app is None and not self._follows:
            _ = self.own_app  # what is wrong with its broker is said when the client is made

    def to_submit(self) -> tuple[Celery, Settings]:
        """The app that publishes a new run, and its settings. Raises `ConfigError` when that is ambiguous."""
        registered = registered_app() if self._follows else None
        if registered is None:
            return self._given or self.own_app, self.given_settings
        return registered, _with_queue_of(registered, self.given_settings)

    @property
    def settings(self) -> Settings:
        return self._unambiguous()[1]

    @property
    def app(self) -> Celery:
        return self._unambiguous()[0]

    @property
    def own_app(self) -> Celery:
        """An app of the client's own, made when it is first needed."""
        # Without a lock, which a thread might hold while the process forks: the first one made is kept.
        if (found := self._made) is None:
            made = make_app(self.given_settings)
            parts_of(made).client = self._client
            found = self.__dict__.setdefault("own_app_made", made)
        return found

    @property
    def _made(self) -> Celery | None:
        return self.__dict__.get("own_app_made")

    def send_wakes(self, wakes: Sequence[Wake]) -> None:
        """Publish wake-ups of runs that were accepted before."""
        if not wakes:
            return
        try:
            app, _ = self.to_submit()
        except ConfigError as error:
            log.warning("wakes.left", runs=len(wakes), error=error.message, hint=LEFT_TO_RESCUE)
            return
        send_wakes(app, wakes)

    def close_producers(self, *, of_given_app: bool) -> None:
        """Close the publishing connections of an app of the client's own, never those of a registered one."""
        for app in (self._given if of_given_app else None, self._made):
            if app is not None:
                close_producers(app)

    def close_own_app(self) -> None:
        if (app := self._made) is not None:
            app.close()

    def _unambiguous(self) -> tuple[Celery, Settings]:
        try:
            return self.to_submit()
        except ConfigError:  # who submits is told so; whoever only reads needs no broker
            return self.own_app, self.given_settings


class Publishes:
    """What both clients have: the Celery app that their messages go out by, and its settings."""

    _publishing: PublishingApp

    @property
    def settings(self) -> Settings:
        """The settings that submissions of this client follow."""
        return self._publishing.settings

    @property
    def app(self) -> Celery:
        """The Celery app that this client's messages go out by."""
        return self._publishing.app


def _with_queue_of(app: Celery, settings: Settings) -> Settings:
    return settings.model_copy(update={"queue": parts_of(app).settings.queue})


def _settings(redis_url: str | None, settings: Settings | None) -> Settings:
    """Those given, or those of the environment; a given URL is also the broker's unless that has its own."""
    if settings is not None and redis_url is None:
        return settings
    env = dict(os.environ) if redis_url is None else {**os.environ, f"{PREFIX}REDIS_URL": redis_url}
    return load_settings(env)
