"""The only place that refuses to execute runs with an unsupported or missing package.

pip may install a version that conflicts with the requirements of another package. A worker relies on
measured details of these three packages; with other versions it would fail during its work.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement

from openagents_worker.errors import ConfigError
from openagents_worker.settings import PREFIX, Settings

__all__ = ["check_packages_of_settings", "check_versions"]

RELIED_ON = frozenset({"celery", "kombu", "redis"})


def check_versions(installed: Callable[[str], str] = version) -> None:
    """Raises `ConfigError` if one of them has a version that the extra `worker` does not allow."""
    wrong = []
    for requirement in _required_versions():
        with suppress(PackageNotFoundError):  # the import of a missing package reports it
            found = installed(requirement.name)
            if not requirement.specifier.contains(found, prereleases=True):
                wrong.append(f"{requirement.name} {found} is installed, {requirement.specifier} is needed")
    if wrong:
        raise ConfigError(
            f"this environment cannot execute runs: {'; '.join(wrong)}",
            hint="pip install 'openagents-worker[worker]'; a process that only submits runs may keep its own",
        )


def check_packages_of_settings(settings: Settings) -> None:
    """Raises `ConfigError` if a setting needs a package that is not installed."""
    if settings.metrics_port is not None and find_spec("prometheus_client") is None:
        raise ConfigError(
            f"{PREFIX}METRICS_PORT needs the package prometheus-client",
            hint="pip install 'openagents-worker[metrics]'",
        )


def _required_versions() -> list[Requirement]:
    """The requirements of the extra `worker` on the packages of `RELIED_ON`."""
    try:
        declared = requires("openagents-worker") or []
    except PackageNotFoundError:  # imported from a source folder, not installed
        return []
    return [
        one
        for one in map(Requirement, declared)
        if one.name in RELIED_ON and one.marker is not None and one.marker.evaluate({"extra": "worker"})
    ]
