"""Results. The only place that handles a Celery app without a result backend."""

from __future__ import annotations

from celery.backends.base import DisabledBackend

from openagents_worker.errors import ConfigError

__all__ = ["NO_RESULTS", "NoResults", "no_results_for_a_chord"]


class NoResults(DisabledBackend):  # type: ignore[misc]  # Celery ships no types
    """Celery's disabled backend, with a better error for chords. Apps of this library use it."""

    def ensure_chords_allowed(self) -> None:
        raise no_results_for_a_chord()


NO_RESULTS = f"{NoResults.__module__}:{NoResults.__name__}"
"""The name of the backend for Celery, which does not accept a class before version 5.5."""


def no_results_for_a_chord() -> ConfigError:
    """The error for a chord in an app without a result backend."""
    return ConfigError(
        "a chord (also a group that is followed by a task) requires a result backend, which counts its tasks",
        hint="set OPENAGENTS_RESULT_BACKEND, for example to the value of OPENAGENTS_REDIS_URL; in your app, "
        "set result_backend",
    )
