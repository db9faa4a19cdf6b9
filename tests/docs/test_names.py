"""Names in the text of the pages exist in the code: settings, error codes, events, log lines, attributes."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from inspect import get_annotations
from pathlib import Path

import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import error_classes
from openagents_worker.events import EVENT_SCHEMAS
from openagents_worker.models import RunBudget, RunUsage
from openagents_worker.patterns.base import RunContext
from openagents_worker.settings import OTHER_VARIABLES, PREFIX, Settings
from openagents_worker.testing.worker import AgentsWorker
from openagents_worker.tools.base import ToolContext, WaitingContext
from tests.docs.blocks import ROOT, pages
from tests.docs.commands import OF_THE_TESTS

GENERATED = ("docs/errors.md", "docs/events.md", "docs/keys.md", "CHANGELOG.md")  # the code itself, the past
OBJECTS = {
    "budget": RunBudget.model_fields.keys(),
    "context": {*get_annotations(RunContext), *vars(RunContext), *vars(ToolContext), *vars(WaitingContext)},
    "llm": LLMOptions.model_fields.keys(),
    "pattern": {"config"},
    "usage": RunUsage.model_fields.keys(),
    "worker": {*vars(AgentsWorker), "client"},
}
"""What an object of the pages has: `context.deps`."""
FAMILIES = {name.partition(".")[0] for name in EVENT_SCHEMAS} | {"loop", "redis", "worker", "replay"}
OF_FILES = ("json", "py", "md", "toml", "conf", "example", "jsonl", "ini", "txt")
PAGES = [page for page in pages() if str(page.relative_to(ROOT)) not in GENERATED]
_CODE = re.compile(r"`([^`\n]+)`")
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_variables_are_settings(page: Path) -> None:
    """Every `OPENAGENTS_…` of a page, in blocks too."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OTHER_VARIABLES.keys() | OF_THE_TESTS
    found = set(re.findall(rf"{PREFIX}[A-Z][A-Z0-9_]*[A-Z0-9]", page.read_text()))
    families = {
        name for name in found if any(one.startswith(f"{name}_") for one in known)
    }  # OPENAGENTS_LOG_…
    assert sorted(found - known - families) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_codes_and_events_exist(page: Path) -> None:
    """`run.poisoned` is an error code or an event, `loop.blocked` a line of the log."""
    known = {cls.code for cls in error_classes()} | EVENT_SCHEMAS.keys()
    text = _FENCED.sub("", page.read_text())
    named = {name for name in _CODE.findall(text) if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name)}
    unknown = [
        name
        for name in sorted(named - known)
        if name.partition(".")[0] in FAMILIES and not name.endswith(OF_FILES) and not _stands_in_code(name)
    ]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_names_can_be_imported(page: Path) -> None:
    """`openagents_worker.errors` and everything below it that a page names."""
    names = set(re.findall(r"openagents_worker(?:\.\w+)+(?::\w+)?", _FENCED.sub("", page.read_text())))
    assert [name for name in sorted(names) if not _exists(name)] == []


def _stands_in_code(name: str) -> bool:
    owner, attribute = name.split(".")[:2]
    return attribute in OBJECTS.get(owner, ()) or f'"{name}"' in sources()


def _exists(name: str) -> bool:
    parts = name.replace(":", ".").split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return parts[1] == "plugins"  # the entry-point group has the form of a module
            found = getattr(found, part)
        return True
    return False


@cache
def sources() -> str:
    """The text of the library, Python and Lua."""
    folder = ROOT / "openagents_worker"
    return "\n".join(file.read_text() for file in [*folder.rglob("*.py"), *folder.rglob("*.lua")])


@pytest.mark.parametrize("level", ["error", "warning"])
def test_lines_to_alert_on_are_logged_at_their_level(level: str) -> None:
    """What the page on logging calls an error is logged as one."""
    section = (ROOT / "docs" / "logging.md").read_text().partition("## Lines to alert on")[2]
    rows = re.findall(rf"^\| (`[^|]*`) \| {level} \|", section, re.MULTILINE)
    names = [name for row in rows for name in _CODE.findall(row)]
    how = {"error": "error|exception", "warning": "warning"}[level]
    assert names
    call = rf"log\.(?:(?:{how})\(|of_run\(\s*logging\.{level.upper()},)\s*"
    assert [n for n in names if not re.search(rf'{call}"{re.escape(n)}"', sources())] == []
