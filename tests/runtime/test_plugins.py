"""Plugins: custom modules that are imported when a worker starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openagents_worker.errors import PluginLoadError
from openagents_worker.runtime.plugins import GROUP, load_plugins


def install(folder: Path, name: str, source: str) -> None:
    """An installed distribution, as pip leaves it, whose only module is a plugin."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nours = {name}\n")


def test_a_module_named_by_an_installed_package_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry point in the group `openagents_worker.plugins` is enough."""
    install(tmp_path, "house_plugin", "LOADED = True\n")
    monkeypatch.syspath_prepend(tmp_path)

    load_plugins([])

    assert sys.modules.pop("house_plugin").LOADED


def test_the_error_of_a_failed_import_names_the_module() -> None:
    """It also says where the module was named, and what it raised."""
    with pytest.raises(PluginLoadError, match=r"no_such_tools.*OPENAGENTS_IMPORTS.*ModuleNotFoundError"):
        load_plugins(["no_such_tools"])


def test_a_broken_entry_point_stops_the_start(tmp_path: Path) -> None:
    """Before any message is consumed, with an error code."""
    install(tmp_path, "torn_plugin", "raise RuntimeError('no licence')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OPENAGENTS_REDIS_URL": "redis://127.0.0.1:1/0"}

    ended = subprocess.run(
        [sys.executable, "-m", "openagents_worker.cli", "worker"],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert ended.returncode == 2
    assert "plugin.load" in ended.stderr
    assert "'torn_plugin', named by the entry point 'ours': RuntimeError: no licence" in ended.stderr
