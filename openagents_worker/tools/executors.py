"""Executors: the only place that makes rules for the calls of tools of the executors of an agents file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from openagents_worker.agents.executors import (
    CompositeOptions,
    ConcurrentBatchOptions,
    CustomExecutor,
    DefaultOptions,
    FilesystemOptions,
    NetworkOptions,
    RetryOptions,
    SafeOptions,
)
from openagents_worker.quick_init import quick_init
from openagents_worker.tools.policies import (
    CommandPolicy,
    CompositePolicy,
    ExecutionPolicy,
    FilesystemPolicy,
    NetworkPolicy,
)

__all__ = ["CallRules"]


@quick_init
@dataclass(frozen=True, slots=True)
class CallRules:
    """How the calls of an agent's tools are made: what its executor and those inside it say together."""

    default_timeout_ms: int | None = None
    """The time limit of a call whose tool has none."""
    may_stream: bool = True
    policies: tuple[ExecutionPolicy, ...] = ()
    """Each of them must allow a call."""
    retry: RetryOptions | None = None
    max_concurrency: int | None = None

    @classmethod
    def of(cls, layers: Sequence[Any]) -> CallRules:
        """The rules of these executors, the outermost first."""
        rules = cls()
        for options in layers:
            rules = rules._with(options)
        return rules

    def _with(self, options: Any) -> CallRules:
        match options:
            case DefaultOptions():
                return self
            case SafeOptions():
                commands = options.command_allowlist
                added = () if commands is None else (CommandPolicy(commands),)
                return replace(
                    self,
                    default_timeout_ms=options.default_timeout_ms,
                    may_stream=self.may_stream and options.allow_stream_passthrough,
                    policies=(*self.policies, *added),
                )
            case RetryOptions():
                return replace(self, retry=self.retry or options)
            case FilesystemOptions():
                return replace(self, policies=(*self.policies, FilesystemPolicy(options)))
            case NetworkOptions():
                return replace(self, policies=(*self.policies, NetworkPolicy(options)))
            case CompositeOptions():
                children = [CallRules.of(child).policies for child in options.layers]
                return replace(self, policies=(*self.policies, CompositePolicy(children, options.mode)))
            case CustomExecutor():
                return self  # it is called in place of the tool, see `runtime.calls.executors`
            case ConcurrentBatchOptions():
                most = min(self.max_concurrency or options.max_concurrency, options.max_concurrency)
                return replace(self, max_concurrency=most)
            case _:
                raise TypeError(f"{type(options).__name__} is not the options of an executor")
