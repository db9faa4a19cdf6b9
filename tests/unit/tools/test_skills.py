"""Skills: found and checked at start, shown to the model by name, and loaded when it asks for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.agents import read_agents_file
from openagents_worker.errors import PluginConfigError, ToolError, ToolNotFoundError, ToolValidationError
from openagents_worker.runtime.start_checks import find_problems
from openagents_worker.tools.skills import SkillTools
from openagents_worker.tools.skills.packages import MAX_FILE_BYTES

INVOICES = """---
name: invoices
description: >
  How to write an invoice.
  Use it for every invoice.
license: MIT
metadata:
  author: ada
---

# Invoices

Add the tax of references/tax.md.
"""


def package(root: Path, name: str, text: str | None = None, **files: str) -> Path:
    """A skill package with these files; `__` in a name is a slash."""
    folder = root / name
    folder.mkdir(parents=True)
    header = f'---\nname: "{name}"\ndescription: About {name}.\n---\nDo {name}.\n'
    (folder / "SKILL.md").write_text(header if text is None else text)
    for path, content in files.items():
        file = folder / path.replace("__", "/").replace("_py", ".py").replace("_md", ".md")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return folder


def skills(root: Path, *enabled: str) -> SkillTools:
    return SkillTools({"search_paths": [str(root)], "enabled": list(enabled)})


async def called(tools: SkillTools, tool: str, **params: Any) -> Any:
    return await tools.call(tool, params, None)  # type: ignore[arg-type]


async def test_the_model_sees_names_and_descriptions_and_loads_the_rest(tmp_path: Path) -> None:
    """The instructions and the files are not in the description of the tool."""
    package(tmp_path, "invoices", INVOICES, references__tax_md="19 %")
    package(tmp_path, "letters")
    (tmp_path / "notes.txt").write_text("no skill")
    tools = skills(tmp_path)

    load, read = await tools.list(None)

    assert (load.name, read.name) == ("load_skill", "read_skill_file")
    assert (
        "- invoices: How to write an invoice. Use it for every invoice.\n- letters: About" in load.description
    )
    assert "Add the tax" not in load.description
    assert await called(tools, "load_skill", name="invoices") == {
        "name": "invoices",
        "instructions": "# Invoices\n\nAdd the tax of references/tax.md.",
        "files": ["references/tax.md"],
    }
    assert await called(tools, "read_skill_file", name="invoices", path="references/tax.md") == {
        "path": "references/tax.md",
        "content": "19 %",
    }
    with pytest.raises(ToolValidationError, match="did you mean 'invoices'"):
        await called(tools, "load_skill", name="invoice")


async def test_only_enabled_skills_are_offered(tmp_path: Path) -> None:
    package(tmp_path, "letters")
    package(tmp_path, "orders")

    load, _ = await skills(tmp_path, "orders").list(None)

    assert "letters" not in load.description


@pytest.mark.parametrize(
    "path", ["../letters/SKILL.md", "SKILL.md", "/etc/passwd", "references/link.md", "references/.env", ""]
)
async def test_a_path_cannot_leave_the_references(tmp_path: Path, path: str) -> None:
    """Also not through a link, and hidden files do not belong to a skill."""
    folder = package(tmp_path, "invoices", references__tax_md="19 %", **{"references__.env": "KEY=1"})
    (tmp_path / "secret.md").write_text("secret")
    (folder / "references" / "link.md").symlink_to(tmp_path / "secret.md")
    package(tmp_path, "letters")

    with pytest.raises(ToolValidationError, match="has no file"):
        await called(skills(tmp_path), "read_skill_file", name="invoices", path=path)


async def test_a_file_that_becomes_a_link_is_not_read(tmp_path: Path) -> None:
    """A skill may be replaced while the worker runs."""
    folder = package(tmp_path, "invoices", references__tax_md="19 %")
    tools = skills(tmp_path)
    (tmp_path / "secret.md").write_text("secret")
    (folder / "references" / "tax.md").unlink()
    (folder / "references" / "tax.md").symlink_to(tmp_path / "secret.md")

    with pytest.raises(ToolError, match="not a file of the skill any more"):
        await called(tools, "read_skill_file", name="invoices", path="references/tax.md")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no header", "does not begin with a line ---"),
        ("---\nname: a\n", "no line --- at its end"),
        ("---\ndescription: d\n---\n", "its name '' is not"),
        ("---\nname: ../a\ndescription: d\n---\n", "its name '../a' is not"),
        ("---\nname: a\n---\n", "its description has 0 characters"),
        (f"---\nname: a\ndescription: {'x' * 1_025}\n---\n", "its description has 1,025 characters"),
        (f"---\nname: a\ndescription: d\n---\n{'x' * MAX_FILE_BYTES}", "use references"),
        (b"---\nname: a\ndescription: \xff\n---\n", "not UTF-8"),
    ],
)
def test_a_package_that_is_not_valid_is_named(tmp_path: Path, text: str | bytes, problem: str) -> None:
    """At the start of the worker."""
    folder = package(tmp_path, "broken")
    (folder / "SKILL.md").write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(PluginConfigError, match=problem) as raised:
        skills(tmp_path)
    assert str(folder) in raised.value.message


def test_what_cannot_be_found_is_named(tmp_path: Path) -> None:
    """A folder, an enabled skill, and two skills or two Python packages of one name."""
    package(tmp_path / "a", "orders", src__shop__entrypoint_py="")
    package(tmp_path / "b", "orders")
    package(tmp_path / "c", "letters", src__shop__entrypoint_py="")
    package(tmp_path / "d", "d", src__x__entrypoint_py="", src__y__entrypoint_py="")

    def found(*folders: str, enabled: tuple[str, ...] = ()) -> str:
        with pytest.raises(PluginConfigError) as raised:
            SkillTools({"search_paths": [str(tmp_path / each) for each in folders], "enabled": enabled})
        return str(raised.value)

    assert "does not exist" in found("none")
    assert "did you mean 'orders'" in found("a", enabled=("order",))
    assert "two skills have the name 'orders'" in found("a", "b")
    assert "both have a Python package 'shop'" in found("a", "c")
    assert "more than one src/<package>/entrypoint.py" in found("d")


def test_the_section_of_the_agents_file_gives_every_agent_the_skills(tmp_path: Path) -> None:
    """Unless it has a tool with the id `skills`. Problems are found at start."""
    package(tmp_path, "letters")
    agent = {
        "id": "a",
        "name": "a",
        "llm": {"provider": "mock"},
        "pattern": {"type": "react"},
        "memory": {"type": "buffer"},
    }
    other = {**agent, "id": "b", "tools": [{"id": "skills", "type": "calc"}]}

    def read(**config: Any) -> Any:
        text = json.dumps({"agents": [agent, other], "skills": {"type": "local", "config": config}})
        return read_agents_file(text, env={})

    file = read(search_paths=[str(tmp_path)])
    assert not find_problems(file, {})
    assert [tool.impl for tool in file.config.agent("a").tools] == [
        "openagents_worker.tools.skills.SkillTools"
    ]
    assert [tool.type for tool in file.config.agent("b").tools] == ["calc"]
    assert read().config.agent("a").tools == []
    (problem,) = find_problems(read(search_paths=[str(tmp_path)], enabled=["letter"]), {})
    assert problem.path[0] == "skills"
    assert "letter" in problem.message


# --- code ------------------------------------------------------------------------------------------------

CODE = """
from .words import GREETING

def run_openagent_skill(payload):
    if payload.get("who") == "nobody":
        return "not a dict"
    return {"text": f"{GREETING} {payload['who']}"}
"""
ASYNC = "async def run_openagent_skill(payload): return dict(payload, seen=True)\n"


async def test_the_code_of_a_skill_is_called_with_the_payload(tmp_path: Path) -> None:
    """The function of the original SDK, async or not. Its effects are not repeated on a guess."""
    package(
        tmp_path, "greet", src__greet_skill__entrypoint_py=CODE, src__greet_skill__words_py="GREETING = 'Hi'"
    )
    package(tmp_path, "echo", src__echo_skill__entrypoint_py=ASYNC)
    package(tmp_path, "empty", src__empty_skill__entrypoint_py="")
    package(tmp_path, "letters")
    tools = skills(tmp_path)
    run = (await tools.list(None))[-1]

    assert (run.name, run.durable_idempotent) == ("run_skill", False)
    assert (await called(tools, "load_skill", name="greet"))["can_run"] is True
    assert await called(tools, "run_skill", name="greet", payload={"who": "Ada"}) == {"text": "Hi Ada"}
    assert await called(tools, "run_skill", name="echo", payload={"x": 1}) == {"x": 1, "seen": True}
    with pytest.raises(ToolError, match="returned a str, not a dict"):
        await called(tools, "run_skill", name="greet", payload={"who": "nobody"})
    with pytest.raises(ToolError, match="has no function run_openagent_skill"):
        await called(tools, "run_skill", name="empty")
    with pytest.raises(ToolValidationError, match="has no code to run"):
        await called(tools, "run_skill", name="letters")


async def test_a_package_of_the_worker_does_not_stand_in_for_a_skill(tmp_path: Path) -> None:
    """Nor does a skill replace a package of the worker."""
    package(tmp_path, "clash", src__tests__entrypoint_py=ASYNC)
    with pytest.raises((ToolError, ImportError)):
        await called(skills(tmp_path), "run_skill", name="clash")


async def test_without_code_there_is_no_tool_that_runs_it(tmp_path: Path) -> None:
    package(tmp_path, "letters")
    with pytest.raises(ToolNotFoundError):
        await called(skills(tmp_path), "run_skill", name="letters")
