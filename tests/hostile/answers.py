"""The recorded answers: for each case with several valid codes, the one that this version gives.

A case names the codes that are right by the rules: one, or several where the rules leave a choice (a value
that is too large may be cut or refused). `answers.json` says which of them is given today, so that a change
of it is seen. To record anew, after a change that is meant:

    HOSTILE_ANSWERS=/tmp/answers.jsonl pytest tests/hostile -m ''
    python -m tests.hostile.answers /tmp/answers.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

__all__ = ["check"]

FILE = Path(__file__).with_name("answers.json")
RECORD_IN = "HOSTILE_ANSWERS"
OF_UNKNOWN_AGENTS = ("test_foreign_code_elsewhere: cli-run ", "test_errors_by_name: cli-run none x")
"""Cases without a recorded answer: a run for an unknown agent is refused where it is submitted if the agents
of the workers are known there, and fails otherwise."""
RECORDED: dict[str, str] = json.loads(FILE.read_text()) if FILE.exists() else {}


def check(name: str, answer: str, codes: Sequence[str]) -> None:
    """Fail unless the answer is one of the codes and, of several, the recorded one."""
    assert answer in codes
    if len(codes) == 1 or name.startswith(OF_UNKNOWN_AGENTS):
        return
    if path := os.environ.get(RECORD_IN):
        with Path(path).open("a") as lines:
            lines.write(json.dumps([name, answer]) + "\n")
        return
    assert name in RECORDED, f"no answer of {name!r} is recorded in {FILE.name}: see tests/hostile/answers.py"
    assert answer == RECORDED[name]


def main(paths: Sequence[str]) -> int:
    """Write the answers of these recordings. Print those that differ between them, and leave them out."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        for line in Path(path).read_text().splitlines():
            name, answer = json.loads(line)
            found[name].add(answer)
    unsteady = {name: sorted(answers) for name, answers in found.items() if len(answers) > 1}
    print(json.dumps(unsteady, indent=2))
    steady = {name: min(answers) for name, answers in found.items() if name not in unsteady}
    FILE.write_text(json.dumps(dict(sorted(steady.items())), indent=0) + "\n")
    return int(bool(unsteady))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
