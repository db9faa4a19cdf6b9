"""The tools of skills: the only place that shows skills to a model, reads their files and calls their code.

The model sees names and descriptions in the description of `load_skill`, and loads the rest when it needs it.
Nothing is written into the session: what the model has loaded stands in its conversation.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import Field, JsonValue

from openagents_worker.agents.plugin import Plugin
from openagents_worker.errors import ToolError, ToolNotFoundError, ToolValidationError
from openagents_worker.suggest import did_you_mean
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec, ToolPlugin
from openagents_worker.tools.skills.packages import MAX_FILE_BYTES, Skill, find_skills
from openagents_worker.tools.typed import TypedTool

__all__ = ["SkillTools"]

FUNCTION = "run_openagent_skill"
"""The function of an `entrypoint.py`, with the name of the original SDK."""
RunSync = Callable[[Callable[[], Any]], Awaitable[Any]]
READS = ToolExecutionSpec(concurrency_safe=True, side_effects="none", reads_files=True)


class SkillTools(Plugin):
    """A toolset with the skills below some folders: `load_skill`, `read_skill_file`, and `run_skill` if one
    of them has code."""

    class Config(Plugin.Config):
        search_paths: list[str] = Field(
            ["skills"], min_length=1, description="Folders with skill packages, one folder each."
        )
        enabled: list[str] = Field([], description="Names of the skills that are offered. Empty: all.")

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        """Raises `PluginConfigError` if a folder or a package is not valid."""
        super().__init__(config)
        self.run_sync: RunSync = asyncio.to_thread
        """Executes code that is not async. The runtime sets its own threads."""
        self.skills = find_skills(tuple(self.cfg.search_paths), tuple(self.cfg.enabled))
        tools: list[SkillTool] = [LoadSkill(self.skills), ReadSkillFile(self.skills)]
        if any(skill.can_run for skill in self.skills.values()):
            tools.append(RunSkill(self.skills, self))
        self._tools = {tool.name: tool for tool in tools}

    async def open(self) -> None: ...

    async def list(self, context: Any) -> Sequence[ToolPlugin]:
        return list(self._tools.values()) if self.skills else []

    async def call(self, tool_id: str, params: dict[str, Any], context: ToolContext) -> Any:
        tool = self._tools.get(tool_id)
        if tool is None:
            raise ToolNotFoundError(f"no skill of this worker has code: {tool_id} does not exist", tool_id)
        return await tool.invoke(params, context)

    async def close(self) -> None: ...


class SkillTool(TypedTool):
    """Base of the tools of skills."""

    def __init__(self, skills: Mapping[str, Skill]) -> None:
        super().__init__()
        self._skills = skills

    def skill(self, name: str) -> Skill:
        """The skill with this name. Raises `ToolValidationError` with the names that exist."""
        if (skill := self._skills.get(name)) is None:
            hint = did_you_mean(name, sorted(self._skills), "the skills are")
            raise ToolValidationError(f"there is no skill {name!r}", self.name, hint=hint)
        return skill


class LoadSkill(SkillTool):
    name = "load_skill"
    spec = READS

    def __init__(self, skills: Mapping[str, Skill]) -> None:
        super().__init__(skills)
        lines = "\n".join(f"- {skill.name}: {skill.description}" for skill in skills.values())
        self.description = (
            "Loads the instructions of a skill. Load a skill before you do a task that it is for. "
            f"The skills:\n{lines}"
        )

    class Params(TypedTool.Params):
        name: str = Field(max_length=64, description="The name of the skill.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        skill = self.skill(args.name)
        loaded: dict[str, Any] = {"name": skill.name, "instructions": skill.instructions}
        if skill.files:
            loaded["files"] = list(skill.files)
        return {**loaded, "can_run": True} if skill.can_run else loaded


class ReadSkillFile(SkillTool):
    name = "read_skill_file"
    description = "Reads a file of a skill. `load_skill` lists the files of a skill."
    spec = READS

    class Params(TypedTool.Params):
        name: str = Field(max_length=64, description="The name of the skill.")
        path: str = Field(max_length=1_024, description="The path of the file, as load_skill lists it.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        skill = self.skill(args.name)
        path = skill.files.get(args.path)  # only what was listed: a path cannot leave the skill
        if path is None:
            hint = did_you_mean(args.path, list(skill.files), "its files are") if skill.files else None
            raise ToolValidationError(
                f"the skill {skill.name!r} has no file {args.path!r}", self.name, hint=hint
            )
        try:
            return {"path": args.path, "content": await asyncio.to_thread(_content, path, skill)}
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ToolError(f"{args.path} cannot be read: {why}", self.name) from error


class RunSkill(SkillTool):
    name = "run_skill"
    description = (
        "Runs the code of a skill with a payload, and returns its result. Load the skill first: its "
        "instructions say what the payload has. Only skills with can_run have code."
    )
    durable_idempotent = False  # nothing is known of what the code does

    def __init__(self, skills: Mapping[str, Skill], toolset: SkillTools) -> None:
        super().__init__(skills)
        self._toolset = toolset

    class Params(TypedTool.Params):
        name: str = Field(max_length=64, description="The name of the skill.")
        payload: dict[str, JsonValue] = Field({}, description="The input of the skill.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        skill = self.skill(args.name)
        if skill.source is None:
            raise ToolValidationError(f"the skill {skill.name!r} has no code to run", self.name)
        function = await asyncio.to_thread(_function, skill, str(skill.source))
        if inspect.iscoroutinefunction(function):
            result = await function(dict(args.payload))
        else:
            result = await self._toolset.run_sync(partial(function, dict(args.payload)))
            if inspect.isawaitable(result):
                result = await result
        if not isinstance(result, dict):
            raise ToolError(
                f"the skill {skill.name!r} returned a {type(result).__name__}, not a dict", self.name
            )
        return result


def _content(path: Any, skill: Skill) -> str:
    if not path.resolve().is_relative_to(skill.folder):  # it was replaced by a link since it was listed
        raise FileNotFoundError(2, "it is not a file of the skill any more")
    with path.open("rb") as file:
        content: bytes = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(27, f"it has more than {MAX_FILE_BYTES // 1024} KiB")
    return content.decode()


def _function(skill: Skill, source: str) -> Callable[[dict[str, Any]], Any]:
    """The function of the skill's code. Its folder stays importable, because the code may import later."""
    if source not in sys.path:
        sys.path.append(source)
    module = importlib.import_module(f"{skill.package}.entrypoint")
    if module.__file__ is None or not skill.folder.samefile(_folder_of(module.__file__, skill)):
        raise ToolError(
            f"the worker has another Python package {skill.package!r}, which hides that of {skill.name!r}"
        )
    function = getattr(module, FUNCTION, None)
    if not callable(function):
        raise ToolError(f"the code of the skill {skill.name!r} has no function {FUNCTION}(payload)")
    return function  # type: ignore[no-any-return]


def _folder_of(file: str, skill: Skill) -> Any:
    """The folder of the skill whose code is in this file: `<folder>/src/<package>/entrypoint.py`."""
    return type(skill.folder)(file).resolve().parents[2]
