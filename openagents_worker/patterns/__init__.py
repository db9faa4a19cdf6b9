"""Patterns: the loop between a model and its tools."""

from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.patterns.react import ReActPattern

__all__ = ["BUILTIN_PATTERNS"]

BUILTIN_PATTERNS: dict[str, type[PatternPlugin]] = {"react": ReActPattern}
