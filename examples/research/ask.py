"""The producer: it submits a question, shows who works on it, and prints the report.

`python -m examples.research.ask "What happens to a run when its worker dies?"`
"""

from __future__ import annotations

import sys
import uuid

from examples.research.report import Report
from openagents_worker import RunHandle, RunRequest, run_agent


def main(text: str) -> None:
    """Submit the question in a session of its own, and print the report with its sources."""
    request = RunRequest(
        agent_id="research", session_id=f"research-{uuid.uuid4()}", input_text=text, output_type=Report
    )
    handle: RunHandle[Report] = run_agent.delay(request)
    _say(f"run {handle.id}")
    for event in handle.events():
        if event.name == "run.child_started":
            _say(f"  {event.payload['agent_id']} begins: {event.payload['child_run_id']}")
        elif event.name == "run.child_completed":
            _say(f"  {event.payload['stop_reason']}: {event.payload['child_run_id']}")
    result = handle.wait(timeout=60)
    report = result.output
    print(report.summary)
    for finding in report.findings:
        print(f"\n{finding.question}\n  {finding.answer}\n  from {', '.join(finding.sources)}")
    _say(f"\n{result.usage.llm_calls} model calls, {result.usage.total_tokens} tokens, the team included")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
