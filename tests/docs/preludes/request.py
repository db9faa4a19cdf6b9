"""What a producer has at hand: the front door, and a request."""

import uuid
from typing import Annotated

from openagents_worker import AsyncClient, Client, RunHandle, RunRequest, run_agent

request = RunRequest(agent_id="assistant", session_id=f"s-{uuid.uuid4().hex}", input_text="What is 17*23?")
