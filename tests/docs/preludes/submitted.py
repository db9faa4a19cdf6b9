"""Somebody has submitted a run, and chosen its id."""

from openagents_worker import RunRequest, run_agent

run_agent.delay(
    RunRequest(
        agent_id="assistant",
        session_id="customer-7",
        run_id="question-4711",
        input_text="What is 17*23?",
        budget={"max_tool_calls": 10, "max_duration_ms": 120_000},
        labels={"env": "prod"},
    )
)
