"""A program that runs agents with the patterns of the original SDK, and prints what came of it as JSON.

It runs where our wheel and the package of the original SDK are installed.
"""

from __future__ import annotations

__all__ = ["PROGRAM"]

PROGRAM = """
import json, sys

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.settings import load_settings
from openagents_worker.testing.worker import AgentsWorker, config_of

BUILTIN = "openagents.plugins.builtin.pattern"
THEIRS = ("react.ReActPattern", "plan_execute.PlanExecutePattern", "reflexion.ReflexionPattern")
DONE = {"provider": "scripted", "script": [{"text": "done"}] * 2}


def outputs(settings, *patterns):
    agents = [{"id": f"a{n}", "pattern": pattern, "llm": DONE} for n, pattern in enumerate(patterns)]
    worker = AgentsWorker(config_of(agents, settings), settings, None)
    with worker.running():
        return [worker.run(agent["id"], "hi").output for agent in agents]


with EmbeddedRedis() as redis:
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis.url})
    (ours,) = outputs(settings, {"type": "react"})
    loaded = [name for name in sys.modules if name.split(".")[0] == "openagents"]
    theirs = outputs(settings, *({"impl": f"{BUILTIN}.{name}"} for name in THEIRS))

print(json.dumps({"ours": ours, "loaded_for_ours": loaded, "theirs": theirs}))
"""
