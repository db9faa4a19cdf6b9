"""A tree of any size ends completely, and no call of a script ends many of its runs.

The scripts are the real ones, with a limit of three runs in place of 100. A worker that dies between two
calls leaves nothing behind that the next one does not find: all of it is in Redis.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from openagents_worker.store import scripts
from tests.properties.lab import Lab
from tests.properties.test_guards import Guard, texts_missing
from tests.support.script_calls import call

AT_ONCE = 3
LIMIT = ("local MOST_STOPPED = 100", f"local MOST_STOPPED = {AT_ONCE}")
ENDED = ("completed", "failed", "cancelled")


class Tree:
    """A run with children, who have children; one worker has claimed the parents."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        lab.run(call("register"))
        lab.run(call("submit", run_id="root"))
        self.fence = self.claim("root")
        self.ids = ["root"]

    def claim(self, run_id: str) -> str:
        claimed = self.lab.run(call("claim", run_id=run_id))
        assert claimed.answer == "CLAIMED", claimed
        fence: str = claimed.fence
        return fence

    def grow(self, parent: str, fence: str, children: int, *, background: bool = False) -> list[str]:
        grown = []
        for number in range(children):
            child = f"{parent}.{number}"
            born = self.lab.run(
                call(
                    "delegate",
                    run_id=parent,
                    fence=fence,
                    child_id=child,
                    session_id=f"session of {child}",
                    call=f"helper:{number}:1",
                    background=background,
                )
            )
            assert born.answer in ("NEW", "SAME"), born
            grown.append(child)
        self.ids += [each for each in grown if each not in self.ids]
        return grown

    def state(self, run_id: str) -> str:
        state: str = self.lab.redis.hget(self.lab.keys("run", run_id), "state")
        return state

    def alive(self) -> list[str]:
        """The runs that have not ended, and that nobody has asked to end."""
        return [
            run_id
            for run_id in self.ids
            if self.state(run_id) not in ENDED
            and self.lab.redis.hget(self.lab.keys("run", run_id), "cancel") != "1"
        ]

    def counted(self, act: Callable[[], object], most: int) -> None:
        """Run one script call: it ends a bounded number of runs."""
        before = len(self.alive())
        act()
        assert before - len(self.alive()) <= most, "one call has ended too many runs"

    def goes_on(self, calls: int = 100) -> None:
        """The rescue loops of some workers: each call may be that of another one."""
        for _ in range(calls):
            due = self.lab.run(scripts.first_due()).run_ms
            if due is None or float(due) > self.lab.now_ms():
                return
            self.counted(lambda: self.lab.run(scripts.wake(limit=100)), AT_ONCE)
        raise AssertionError("it does not end")


@pytest.fixture
def off() -> tuple[tuple[str, str], ...]:
    """The guard that is switched off."""
    return ()


@pytest.fixture
def tree(redis_url: str, off: tuple[tuple[str, str], ...]) -> Generator[Tree]:
    lab = Lab(redis_url, (LIMIT, *off))
    yield Tree(lab)
    lab.clear()
    lab.close()


def a_tree_is_cancelled(tree: Tree) -> None:
    """Seven children, two of them with seven children of their own; one child is being executed."""
    children = tree.grow("root", tree.fence, 7)
    for child in children[:2]:
        tree.grow(child, fence := tree.claim(child), 7)
        tree.lab.run(call("release", run_id=child, fence=fence))
    tree.claim(children[-1])
    tree.counted(lambda: tree.lab.run(call("cancel", run_id="root", force=True)), 1 + AT_ONCE)
    assert len(tree.alive()) >= len(tree.ids) - 1 - AT_ONCE
    tree.goes_on()
    assert tree.alive() == []
    assert not tree.lab.redis.exists(tree.lab.keys("stopping"))


def a_parent_fails_with_many_children(tree: Tree) -> None:
    """Those in the background go on. A later life of the parent can still cancel them."""
    waited_for = tree.grow("root", tree.fence, 7)
    tree.lab.run(call("finish", run_id="root", fence=tree.fence, end_state="failed"))
    tree.goes_on()
    assert tree.alive() == []
    assert {tree.state(child) for child in waited_for} == {"cancelled"}


def the_next_life_asks_for_a_child_again(tree: Tree) -> None:
    """It was not stopped yet, so it goes on for the new life; the others end."""
    children = tree.grow("root", tree.fence, 7)
    tree.lab.run(call("finish", run_id="root", fence=tree.fence, end_state="cancelled"))
    tree.lab.run(call("resume", run_id="root"))
    fence = tree.claim("root")
    kept = [child for child in children if tree.state(child) not in ENDED][-1]
    number = int(kept.rpartition(".")[2])
    tree.lab.run(
        call(
            "delegate", run_id="root", fence=fence, child_id=kept, session_id=f"session of {kept}",
            call=f"helper:{number}:1",
        )
    )  # fmt: skip
    tree.goes_on()
    assert sorted(tree.alive()) == ["root", kept]
    tree.lab.run(call("finish", run_id="root", fence=fence))
    tree.goes_on()
    assert tree.alive() == []


def a_child_is_resumed_by_somebody_else(tree: Tree) -> None:
    """It was cancelled before its turn came, and is resumed: in that life it has no parent."""
    children = tree.grow("root", tree.fence, 7)
    tree.lab.run(call("finish", run_id="root", fence=tree.fence, end_state="cancelled"))
    kept = [child for child in children if tree.state(child) not in ENDED][-1]
    tree.lab.run(call("cancel", run_id=kept))
    resumed = tree.lab.run(call("resume", run_id=kept, agent_id="helper", session_id=f"session of {kept}"))
    assert resumed.answer == "OK", resumed
    tree.goes_on()
    assert tree.alive() == [kept]


STORIES = (
    a_tree_is_cancelled,
    a_parent_fails_with_many_children,
    the_next_life_asks_for_a_child_again,
    a_child_is_resumed_by_somebody_else,
)
GUARDS = (
    Guard(
        "one call of a script ends a bounded number of runs",
        ("while to_stop[1] and stops_left > 0 do", "while to_stop[1] do"),
        (
            "redis.call('SPOP', k.stopping_children(entry), stops_left)",
            "redis.call('SPOP', k.stopping_children(entry), 1000)",
        ),
        story="a_tree_is_cancelled",
    ),
    Guard(
        "the children of children count, too",
        ("  if is_stopping then return wakes end", "  if false then return wakes end"),
        ("    stops_left = stops_left - #ids\n", ""),
        story="a_tree_is_cancelled",
    ),
    Guard(
        "what is left is in a list",
        ("  redis.call('ZADD', k.stopping(), digits(NOW_MS), entry)\n", ""),
        story="a_tree_is_cancelled",
    ),
    Guard(
        "the rescue loop continues",
        ("for _, wake in ipairs(go_on_stopping()) do wakes[#wakes + 1] = wake end\n", ""),
        story="a_parent_fails_with_many_children",
    ),
    Guard(
        "an entry stays until its last child was asked to end",
        ("    if redis.call('EXISTS', k.stopping_children(entry)) == 0 then\n", "    if true then\n"),
        story="a_parent_fails_with_many_children",
    ),
    Guard(
        "a child that a later life has asked for goes on",
        ("  if (tonumber(parent_life) or math.huge) > life then return {} end\n", ""),
        story="the_next_life_asks_for_a_child_again",
    ),
    Guard(
        "a child that somebody else has resumed goes on",
        (
            "  if (tonumber(parent_life) or math.huge) > life then",
            "  if (tonumber(parent_life) or 0) > life then",
        ),
        story="a_child_is_resumed_by_somebody_else",
    ),
)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_with_every_guard_the_story_ends_well(tree: Tree, story: Callable[[Tree], None]) -> None:
    story(tree)


@pytest.mark.parametrize(
    ("guard", "off"), [(guard, guard.off) for guard in GUARDS], ids=[guard.name for guard in GUARDS]
)
def test_without_it_a_promise_is_broken(tree: Tree, guard: Guard, off: tuple[tuple[str, str], ...]) -> None:
    story = next(story for story in STORIES if story.__name__ == guard.story)
    with pytest.raises(AssertionError):
        story(tree)


def test_every_guard_stands_in_a_script() -> None:
    assert texts_missing([*GUARDS, Guard("the limit", LIMIT)]) == []


def test_the_page_about_children_has_the_limit() -> None:
    number = LIMIT[0].rpartition(" ")[2]
    page = (Path(__file__).parents[2] / "docs/children.md").read_text("utf-8")
    assert f"the first {number} of them" in page
