"""Replies that have no end, or grow a thousand times when they are decompressed: the worker stays small."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hostile_server import LARGE, Answer, serving_in_thread
from tests.installation import PATIENCE_S, Installation, agent, installed

MB = 1024 * 1024
MOST_MORE_BYTES = 200 * MB

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="/proc tells of a process's memory"
)


@dataclass
class Hostile:
    """A worker whose model means harm, and what that says next."""

    installation: Installation
    says: dict[str, Answer]
    begin_bytes: int

    def bytes_of(self, name: str) -> int:
        """`VmRSS`: what the worker has now; `VmHWM`: the most that it ever had."""
        status = Path(f"/proc/{self.installation.worker.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Generator[Hostile]:
    says: dict[str, Answer] = {}
    with serving_in_thread(lambda _: says["now"]) as url:
        raw = agent("raw", llm={"api_base": url, "retry": {"max_attempts": 1}})
        with installed(tmp_path_factory.mktemp("memory"), raw, agent("clerk")) as installation:
            installation.model.will_say({"text": "fine"})
            assert installation.submit("clerk").wait(PATIENCE_S).ok
            hostile = Hostile(installation, says, 0)
            hostile.begin_bytes = hostile.bytes_of("VmRSS")
            yield hostile


@pytest.mark.parametrize("name", [name for name in LARGE if "a byte a chunk" not in name])  # costs time only
def test_a_worker_stays_small(hostile: Hostile, name: str) -> None:
    """At most 200 MB above its start, also while it reads; and it executes the next run."""
    hostile.says["now"] = LARGE[name]

    result = hostile.installation.submit("raw", budget={"max_resume_attempts": 0}).wait(PATIENCE_S)

    assert result.error_details is not None
    assert result.error_details.code in LARGE[name].codes
    assert hostile.bytes_of("VmHWM") - hostile.begin_bytes < MOST_MORE_BYTES
    assert hostile.installation.submit("clerk").wait(PATIENCE_S).final_output == "fine"
