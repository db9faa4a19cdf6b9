"""Diagnostics: exporters that get a report of every run that has ended, and send it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from openagents_worker.loaded_at_use import LoadedAtUse

__all__ = ["BUILTIN_DIAGNOSTICS"]

BUILTIN_DIAGNOSTICS: Mapping[str, Callable[..., Any]] = LoadedAtUse(
    "openagents_worker.diagnostics",
    {
        "langfuse": "langfuse:LangfuseExporter",
        "null": "base:NullExporter",
        "phoenix": "phoenix:PhoenixExporter",
        "rich": "console:RichExporter",
    },
)
