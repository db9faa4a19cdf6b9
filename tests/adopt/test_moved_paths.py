"""Import paths in users' settings work for one more release after a module has moved."""

from __future__ import annotations

from importlib import import_module

import pytest
from celery.utils.imports import symbol_by_name

WIRE_FORMAT = "openagents_worker.testing.model_server.wire_format"
MOVED = [
    ("openagents_worker.worker.pool:TaskPool", "openagents_worker.celery.pool:TaskPool"),
    ("openagents_worker.worker.app:make_worker_app", "openagents_worker.celery.app:make_worker_app"),
    ("openagents_worker.testing.model_server:ModelRequest", f"{WIRE_FORMAT}:ModelServerRequest"),
]
KEPT = ["tools.base", "patterns.base", "memory.base", "context.base", "errors", "models", "testing"]


@pytest.mark.parametrize(("old", "new"), MOVED)
def test_a_moved_name_is_found_at_its_old_path_with_a_warning(old: str, new: str) -> None:
    """The warning names both paths."""
    with pytest.warns(FutureWarning, match=f"{old} has moved to {new};".replace(":", ".")):
        found = symbol_by_name(old)

    assert found is symbol_by_name(new)


@pytest.mark.parametrize(("old", "new"), MOVED)
def test_a_moved_module_has_no_other_names(old: str, new: str) -> None:
    """A misspelt name is an AttributeError, as in any module."""
    module, _, name = old.partition(":")
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(import_module(module), name + "s")


@pytest.mark.parametrize("path", KEPT)
def test_a_public_path_has_stayed(path: str) -> None:
    """Users import these modules in their plugins."""
    assert import_module(f"openagents_worker.{path}")
