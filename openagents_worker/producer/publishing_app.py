"""The publishing app. The only place that decides through which Celery app a client sends messages."""

from __future__ import annotations

import os
from collections.abc import Sequence

from celery import Celery

from openagents_worker.errors import ConfigError
from openagents_worker.producer.app_binding import binding_of, find_binding, real_app, registered_app
from openagents_worker.producer.publisher import close_producers, make_app, send_wakes
from openagents_worker.settings import PREFIX, Settings, load_settings
from openagents_worker.store.keys import Keys
from openagents_worker.store.scripts import Wake
from openagents_worker.telemetry.logs import get_logger

__all__ = ["PublishingApp"]

LEFT_TO_RESCUE = "the rescue loop of a worker will send them"

log = get_logger(__name__)


class PublishingApp:
    """The Celery app of a client: the given app, the registered app, or an app that is made here.

    It is chosen for each message, because a client may be made before the app is registered.
    """

    def __init__(
        self,
        redis_url: str | None,
        settings: Settings | None,
        app: Celery | None,
        owner: object | None = None,
    ) -> None:
        """`owner` becomes the connection of an app that is made here. Raises `ConfigError`."""
        self.given_settings = _settings(redis_url, settings)
        self.given_settings.check_files()
        self.keys = Keys(self.given_settings.key_prefix)
        """The names of the Redis keys of this client."""
        self._given = None if app is None else real_app(app)
        self._follows = app is None and redis_url is None and settings is None
        self._owner = owner
        if app is None and not self._follows:
            _ = self.own_app  # raise the error of a wrong broker when the client is made

    def to_submit(self) -> tuple[Celery, Settings]:
        """The app that publishes a new run, and its settings. Raises `ConfigError` if two apps are
        registered."""
        app = registered_app() if self._follows else self._given
        if app is None:
            return self.own_app, self.given_settings
        return app, _with_queue_of(app, self.given_settings)

    @property
    def settings(self) -> Settings:
        return self._app_and_settings_to_read()[1]

    @property
    def app(self) -> Celery:
        return self._app_and_settings_to_read()[0]

    @property
    def own_app(self) -> Celery:
        """The app that belongs only to this client. The first access makes it."""
        # There is no lock, because another thread could hold it during a fork. The first app is kept.
        if (app := self._own_app_if_made) is None:
            made = make_app(self.given_settings)
            binding_of(made).connection = self._owner
            app = self.__dict__.setdefault("own_app_made", made)
        return app

    @property
    def _own_app_if_made(self) -> Celery | None:
        return self.__dict__.get("own_app_made")

    def send_wakes(self, wakes: Sequence[Wake]) -> None:
        """Publish wake-ups of accepted runs. If two apps are registered, log a warning instead."""
        if not wakes:
            return
        try:
            app, _ = self.to_submit()
        except ConfigError as error:
            log.warning("wakes.left", runs=len(wakes), error=error.message, hint=LEFT_TO_RESCUE)
            return
        send_wakes(app, wakes)

    def close_producers(self, *, of_given_app: bool) -> None:
        """Close the publishing connections of the own app and, with `of_given_app`, of the given app."""
        for app in (self._given if of_given_app else None, self._own_app_if_made):
            if app is not None:
                close_producers(app)

    def close_own_app(self) -> None:
        if (app := self._own_app_if_made) is not None:
            app.close()

    def _app_and_settings_to_read(self) -> tuple[Celery, Settings]:
        """As `to_submit`. If two apps are registered: the own app and the given settings."""
        try:
            return self.to_submit()
        except ConfigError:  # a submission raises it; reading needs no broker
            return self.own_app, self.given_settings


def _with_queue_of(app: Celery, settings: Settings) -> Settings:
    """The settings with the queue of `register(app, queue=...)`, which the workers of the app consume."""
    binding = find_binding(app)
    if binding is None or not binding.kind.has_tasks:
        return settings
    return settings.model_copy(update={"queue": binding.settings.queue})


def _settings(redis_url: str | None, settings: Settings | None) -> Settings:
    """The given settings, or those of the environment with `redis_url`, if it is set.

    Raises `ConfigError` if both are given and differ. Without a broker URL in the environment, `redis_url` is
    also the URL of the broker.
    """
    if settings is not None:
        if redis_url not in (None, settings.redis_url):
            raise ConfigError(
                "redis_url and settings name two Redis servers",
                hint="leave redis_url out: the settings name the Redis of the client",
            )
        return settings
    env = dict(os.environ) if redis_url is None else {**os.environ, f"{PREFIX}REDIS_URL": redis_url}
    return load_settings(env)
