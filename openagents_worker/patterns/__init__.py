"""Patterns: the loop between a model and its tools. Built-in ones are loaded when they are used."""

from collections.abc import Mapping

from openagents_worker.loaded_at_use import LoadedAtUse
from openagents_worker.patterns.base import PatternPlugin

__all__ = ["BUILTIN_PATTERNS"]

BUILTIN_PATTERNS: Mapping[str, type[PatternPlugin]] = LoadedAtUse(
    __name__,
    {
        "plan_execute": "plan_execute:PlanExecutePattern",
        "react": "react:ReActPattern",
        "reflexion": "reflexion:ReflexionPattern",
    },
)
