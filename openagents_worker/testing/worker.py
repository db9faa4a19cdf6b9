"""A worker inside the test's process: the only place that executes runs without Celery.

It is a real worker process without Celery (`worker.process`), with a real Redis: the same scripts, journal,
retries, cancellation, lease, rescue loop, events and results. Waiting runs are read from Redis instead of
messages (`testing.polling`). So there are no Celery callbacks, and Flower does not show the runs. Killed
processes and lost messages cannot be tested here; use real worker processes for them.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openagents_worker.agents import AgentDefinition, AppConfig, read_agents_file
from openagents_worker.agents.code import Agent, read_agents
from openagents_worker.agents.problems import rejected
from openagents_worker.llm.base import LLMClient
from openagents_worker.models import RunResult
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import RunHandle
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.plugins import load_plugins
from openagents_worker.settings import Settings
from openagents_worker.testing.polling import PollingProcess
from openagents_worker.testing.scripted_model import ScriptedModel

__all__ = ["Agents", "AgentsWorker"]

RUN_TIMEOUT_S = 30.0

Agents = Sequence[Mapping[str, Any] | Agent] | Path | str
"""Agents in Python, or definitions as in the agents file; or the path of an agents file."""


class AgentsWorker:
    """A running worker, for use in a test. `client` is a producer for it."""

    def __init__(self, config: AppConfig, settings: Settings, model: ScriptedModel | None) -> None:
        self.client = Client(settings=settings)
        self._config = config
        self._settings = settings
        self._model = model

    def submit(
        self, agent_id: str, input_text: str, *, session_id: str | None = None, **fields: Any
    ) -> RunHandle[Any]:
        """Submit a run. The default session is a new one. `fields`: other fields of `RunRequest`."""
        session_id = session_id or f"session-{uuid.uuid4().hex[:8]}"
        return self.client.submit(
            {"agent_id": agent_id, "session_id": session_id, "input_text": input_text, **fields}
        )

    def run(
        self, agent_id: str, input_text: str, *, timeout: float = RUN_TIMEOUT_S, **fields: Any
    ) -> RunResult[Any]:
        """Submit a run and wait until it ends, at most `timeout` seconds."""
        return self.submit(agent_id, input_text, **fields).wait(timeout)

    @contextmanager
    def running(self) -> Iterator[AgentsWorker]:
        """Execute runs while the block runs. Runs that have not ended then are handed over to no worker.

        Raises `RedisUnreachable` if Redis does not answer.
        """
        assembly = _TestAssembly(self._config, self._model)
        process = PollingProcess(self._settings, assembly, node=f"test@{os.getpid()}")
        try:
            process.start_and_wait()
            with self.client:
                yield self
        finally:
            process.close()


class _TestAssembly(Assembly):
    """The agents of a test, with its scripted model where there is one."""

    def __init__(self, config: AppConfig, model: ScriptedModel | None) -> None:
        super().__init__(config, env=os.environ)
        self._scripted = model
        for agent in config.agents:
            self.parts(agent.id).new_pattern()  # so that an invalid agent fails before the first run

    def model(self, definition: AgentDefinition) -> LLMClient:
        if self._scripted is None:
            return super().model(definition)
        return self._scripted.client(definition)


def config_of(agents: Agents | None, settings: Settings) -> AppConfig:
    """Load the agents of a test: definitions, which are completed with defaults, or an agents file.

    Without `agents`: those of a worker with these settings. Raises the errors of `load_agents`.
    """
    load_plugins(settings.imports)
    if agents is None:
        file = read_agents(settings.config, may_be_absent=settings.is_config_optional)
    elif isinstance(agents, Path | str):
        file = read_agents_file(agents)
    else:
        in_code = [agent for agent in agents if isinstance(agent, Agent)]
        completed = [_with_defaults(agent) for agent in agents if not isinstance(agent, Agent)]
        file = read_agents_file(json.dumps({"agents": completed}), in_code=in_code)
    if file.problems or file.config is None:
        raise rejected(file.source, file.problems)
    return file.config


def _with_defaults(agent: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        "name": agent.get("id", ""),
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
        "llm": {"provider": "scripted", "script": []},
    }
    return {**defaults, **agent}
