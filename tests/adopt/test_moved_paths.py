"""Import paths in users' settings work for one more release after a module has moved."""

from __future__ import annotations

from importlib import import_module

import pytest
from celery.utils.imports import symbol_by_name

MOVED = [
    ("openagents_worker.worker.pool", "openagents_worker.celery.pool", "TaskPool"),
    ("openagents_worker.worker.app", "openagents_worker.celery.app", "make_worker_app"),
]
KEPT = ["tools.base", "patterns.base", "memory.base", "context.base", "errors", "models", "testing"]


@pytest.mark.parametrize(("old", "new", "name"), MOVED)
def test_a_moved_name_is_found_at_its_old_path_with_a_warning(old: str, new: str, name: str) -> None:
    """The warning names both paths."""
    with pytest.warns(FutureWarning, match=f"{old}.{name} has moved to {new}.{name}"):
        found = symbol_by_name(f"{old}:{name}")

    assert found is getattr(import_module(new), name)


@pytest.mark.parametrize(("old", "new", "name"), MOVED)
def test_a_moved_module_has_no_other_names(old: str, new: str, name: str) -> None:
    """A misspelt name is an AttributeError, as in any module."""
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(import_module(old), name + "s")


@pytest.mark.parametrize("path", KEPT)
def test_a_public_path_has_stayed(path: str) -> None:
    """Users import these modules in their plugins."""
    assert import_module(f"openagents_worker.{path}")
