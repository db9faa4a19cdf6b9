"""What a producer has imported; the deployment has an agent `sales`, which answers with an offer."""

from pydantic import BaseModel

from openagents_worker import RunHandle, RunRequest, run_agent
