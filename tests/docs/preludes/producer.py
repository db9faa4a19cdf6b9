"""A request; and afterwards the answer of the run, whoever has submitted it."""

from openagents_worker import RunRequest, run_agent

request = RunRequest(
    agent_id="assistant", session_id="docs", run_id="docs-producer", input_text="What is 17*23?"
)


def check():
    assert result.final_output == "17*23 is 391."
