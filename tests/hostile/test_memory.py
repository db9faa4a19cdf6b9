"""Endless replies, and replies that expand a thousandfold: the worker's memory stays small."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.entry_points import reply
from tests.hostile.matrix import UNBOUND
from tests.hostile.table import PROPERTY
from tests.hostile.world import World
from tests.support.hostile_server import LARGE, MB

MOST_MORE_BYTES = 200 * MB
OF_TIME_ONLY = "a byte a chunk"
# It is bounded where text without end is bounded: that is looked at each time.
LONG = "text without end, a character a piece"

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="/proc tells of a process's memory"
)


def bytes_of(world: World, name: str) -> int:
    """`VmRSS`: the memory that the worker uses now. `VmHWM`: its maximum since `forget`."""
    status = Path(f"/proc/{world.installation.worker.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def forget_the_most(world: World) -> None:
    Path(f"/proc/{world.installation.worker.pid}/clear_refs").write_text("5")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == LONG else [])
        for name in LARGE
        if OF_TIME_ONLY not in name
    ],
)
def test_a_worker_stays_small(world: World, name: str, request: pytest.FixtureRequest) -> None:
    """At most 200 MB more than before the reply, also while reading. The next run is executed."""
    request.node.user_properties.append((PROPERTY, (UNBOUND, "stream" if "text" in name else "reply")))
    forget_the_most(world)
    before = bytes_of(world, "VmRSS")

    assert reply(world, LARGE[name]) in LARGE[name].codes

    assert bytes_of(world, "VmHWM") - before < MOST_MORE_BYTES
    world.goes_on(after=name)
