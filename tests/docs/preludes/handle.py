"""A run: `handle` is what its producer has."""

import uuid

from openagents_worker import RunRequest, run_agent

handle = run_agent.delay(
    RunRequest(agent_id="assistant", session_id=f"s-{uuid.uuid4().hex}", input_text="What is 17*23?")
)
