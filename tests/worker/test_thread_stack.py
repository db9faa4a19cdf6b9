"""The stack of another thread is read as a whole, while that thread goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from types import FrameType

import pytest

from openagents_worker.worker.thread_stack import frames_of


@pytest.fixture
def stopping() -> threading.Event:
    return threading.Event()


@pytest.fixture
def started(stopping: threading.Event) -> Generator[Callable[[Callable[[], object]], int]]:
    """Starts a thread, and returns its id."""
    threads: list[threading.Thread] = []

    def start(work: Callable[[], object]) -> int:
        thread = threading.Thread(target=work)
        thread.start()
        threads.append(thread)
        return thread.ident or 0

    yield start
    stopping.set()
    for thread in threads:
        thread.join()


def test_the_innermost_frame_is_the_first(
    started: Callable[[Callable[[], object]], int], stopping: threading.Event
) -> None:
    is_inside = threading.Event()

    def outer() -> None:
        inner()

    def inner() -> None:
        is_inside.set()
        stopping.wait()

    thread_id = started(outer)
    is_inside.wait()

    names = [frame.f_code.co_name for frame in frames_of(thread_id)]
    assert names[0] == "wait"
    assert names.index("inner") + 1 == names.index("outer")
    assert names[-1] == "_bootstrap"


def test_a_thread_that_does_not_exist_has_no_frames() -> None:
    assert frames_of(0) == []


def test_a_busy_thread_has_whole_stacks(
    started: Callable[[Callable[[], object]], int], stopping: threading.Event
) -> None:
    """Its functions and generators begin and end all the time."""

    def generate(depth: int) -> Generator[int]:
        if depth:
            yield from generate(depth - 1)
        yield depth

    def work() -> None:
        while not stopping.is_set():
            assert len(list(generate(10))) == 11

    thread_id = started(work)

    for _ in range(2_000):
        frames = frames_of(thread_id)
        assert {type(frame) for frame in frames} == {FrameType}
        assert frames[-1].f_code.co_name == "_bootstrap"
