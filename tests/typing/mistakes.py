"""Mistakes that a type checker finds. Each line marked `wrong` is one; checked by the test beside it."""

from __future__ import annotations

from openagents_worker import Client, RunHandle, RunRequest, RunResult, run_agent, tool

RunRequest(agent_id="assistant", session_id="s1")  # wrong: no input_text
run_agent.delay("hello")  # wrong: not a request
handle: RunHandle[str] = run_agent.delay(RunRequest(agent_id="a", session_id="s", input_text="hi"))
result: RunResult[int] = handle.wait()  # wrong: the answer is a text
length: int = handle.wait().final_output  # wrong: a text, or None
handle.wait(timeout="5 s")  # wrong: not a number
handle.wiat()  # wrong for pyright: no such name


@tool
def look_up(order_id: str) -> str:
    """Looks an order up."""
    return order_id


look_up(17)  # wrong: not a text


def decide(client: Client) -> None:
    client.approve("run-1", "refund:1")  # wrong: nobody who decides
    client.runs(sate="failed")  # wrong: no such filter
    client.handle("run-1").steer(17)  # wrong: not a text
