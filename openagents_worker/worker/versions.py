"""Versions. The only place that refuses to carry runs with a Celery, kombu or redis-py of another version.

pip installs a package also where another one asked for a different version of it. A worker relies on details
of these three that were measured; with others it would end in its middle.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from openagents_worker.errors import ConfigError

__all__ = ["check_versions"]

RELIED_ON = frozenset({"celery", "kombu", "redis"})


def check_versions(installed: Callable[[str], str] = version) -> None:
    """Raises `ConfigError` where one of them is not of a version that the extra `worker` allows."""
    wrong = []
    for needed in _needed():
        with suppress(PackageNotFoundError):  # what is missing is said by whoever imports it
            found = installed(needed.name)
            if not needed.specifier.contains(found, prereleases=True):
                wrong.append(f"{needed.name} {found} is installed, {needed.specifier} is needed")
    if wrong:
        raise ConfigError(
            f"this environment cannot carry runs: {'; '.join(wrong)}",
            hint="pip install 'openagents-worker[worker]'; a producer needs no newer versions",
        )


def _needed() -> list[Requirement]:
    try:
        declared = requires("openagents-worker") or []
    except PackageNotFoundError:  # it is imported from a folder
        return []
    return [
        one
        for one in map(Requirement, declared)
        if one.name in RELIED_ON and one.marker is not None and one.marker.evaluate({"extra": "worker"})
    ]
