"""The generated pages are those of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from openagents_worker.errors import OpenAgentsError, error_classes

ROOT = Path(__file__).parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WHOLE = {"errors.md", "events.md", "keys.md", "limits.md"}
"""Pages that are generated from the first line to the last."""
WITH_TABLES = {path.name for path in (ROOT / "docs").glob("*.md") if "<!-- generated:" in path.read_text()}
"""Pages with generated parts."""


@pytest.mark.parametrize("name", sorted(WHOLE | WITH_TABLES))
def test_a_generated_page_is_up_to_date(name: str) -> None:
    """`make docs` would change nothing."""
    text = {path.name: text for path, text in generator().pages()}[name]
    assert (ROOT / "docs" / name).read_text() == text


def test_the_dashboard_is_up_to_date() -> None:
    """The file that operators import in Grafana."""
    path, text = generator().dashboard_file()
    assert path.read_text() == text


def test_every_error_code_is_one_class_with_a_meaning() -> None:
    """Codes are unique, and each has a sentence that describes its cause."""
    ours = [cls for cls in error_classes() if cls.__module__ == OpenAgentsError.__module__]
    public = [cls for cls in ours if not cls.__name__.startswith("_") and "code" in cls.__dict__]
    assert len({cls.code for cls in public}) == len(public)
    assert [cls.__name__ for cls in public if not (cls.__dict__.get("__doc__") or "").strip()] == []
