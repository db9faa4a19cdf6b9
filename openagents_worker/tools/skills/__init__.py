"""Skills: packages of instructions, files and code that a model loads when a task needs them."""

from openagents_worker.tools.skills.toolset import SkillTools

__all__ = ["SkillTools"]
