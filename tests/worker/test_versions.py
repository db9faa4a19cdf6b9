"""A worker's environment: unsupported versions are refused with an error instead of a traceback."""

from __future__ import annotations

import pytest

from openagents_worker.errors import ConfigError
from openagents_worker.settings import load_settings
from openagents_worker.worker import versions
from openagents_worker.worker.versions import RELIED_ON, check_packages_of_settings, check_versions


def test_the_installed_versions_are_supported() -> None:
    check_versions()


@pytest.mark.parametrize("name", sorted(RELIED_ON))
def test_another_version_is_refused_by_name(name: str) -> None:
    """Before a message is consumed: Celery's traceback would not mention versions."""
    versions = {"celery": "5.7.0", "kombu": "5.7.0", "redis": "8.1.0", name: "5.4.1"}

    with pytest.raises(ConfigError, match=rf"{name} 5.4.1 is installed, .*>=.* is needed") as refused:
        check_versions(versions.__getitem__)

    assert "openagents-worker[worker]" in (refused.value.hint or "")


def test_a_setting_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a message is consumed. The hint says how to install it; without the setting it is not needed."""
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    check_packages_of_settings(load_settings({"OPENAGENTS_HEALTH_PORT": "9808"}))

    with pytest.raises(ConfigError, match="OPENAGENTS_METRICS_PORT needs the package") as refused:
        check_packages_of_settings(load_settings({"OPENAGENTS_METRICS_PORT": "9808"}))

    assert "openagents-worker[metrics]" in (refused.value.hint or "")
