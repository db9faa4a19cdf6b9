"""Patterns: the loop between a model and its tools."""

from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.patterns.plan_execute import PlanExecutePattern
from openagents_worker.patterns.react import ReActPattern
from openagents_worker.patterns.reflexion import ReflexionPattern

__all__ = ["BUILTIN_PATTERNS"]

BUILTIN_PATTERNS: dict[str, type[PatternPlugin]] = {
    "plan_execute": PlanExecutePattern,
    "react": ReActPattern,
    "reflexion": ReflexionPattern,
}
