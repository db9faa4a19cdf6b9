"""Somebody has submitted a run that begins later: `run_id` is its id."""

import uuid

from openagents_worker import RunRequest, run_agent

run_id = uuid.uuid4().hex
run_agent.apply_async(
    (RunRequest(agent_id="assistant", session_id=run_id, run_id=run_id, input_text="What is 17*23?"),),
    countdown=600,
)
