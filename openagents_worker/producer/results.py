"""Results of Celery's own. The only place that says what an app without a result backend cannot do."""

from __future__ import annotations

from celery.backends.base import DisabledBackend

from openagents_worker.errors import ConfigError

__all__ = ["NO_RESULTS", "NoResults", "no_results_for_a_chord"]


class NoResults(DisabledBackend):  # type: ignore[misc]  # Celery ships no types
    """The backend of an app of ours that has none: Celery's own, with an error that says what to set."""

    def ensure_chords_allowed(self) -> None:
        raise no_results_for_a_chord()


NO_RESULTS = f"{NoResults.__module__}:{NoResults.__name__}"
"""As Celery names a backend; before 5.5 it takes no class."""


def no_results_for_a_chord() -> ConfigError:
    return ConfigError(
        "a chord (also a group that is followed by a task) needs a result backend, which counts its tasks",
        hint="set OPENAGENTS_RESULT_BACKEND, for instance to the same URL as OPENAGENTS_REDIS_URL; in an app "
        "of your own, its result_backend",
    )
