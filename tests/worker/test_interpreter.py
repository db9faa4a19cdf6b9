"""How Python is tuned in the process of a worker."""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator

import pytest

from openagents_worker.worker.interpreter import (
    PYTHONS_SWITCH_INTERVAL_MS,
    SWITCH_INTERVAL_MS,
    loading_for_life,
    tune_interpreter,
)


@pytest.fixture(autouse=True)
def _restored() -> Generator[None]:
    gc.enable()
    threshold, interval_s = gc.get_threshold(), sys.getswitchinterval()
    yield
    gc.unfreeze()
    gc.enable()
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval_s)


def test_what_is_loaded_for_life_is_never_searched_for_garbage() -> None:
    """The block starts no collection, and its objects are in no generation afterwards."""
    with loading_for_life():
        assert not gc.isenabled()
        loaded = [[number] for number in range(10)]

    assert gc.isenabled()
    searched = {id(each) for each in gc.get_objects()}
    assert not searched & {id(each) for each in loaded}


def test_a_collector_that_was_switched_off_stays_off() -> None:
    """Also in blocks within blocks, such as a command that loads a worker."""
    with loading_for_life():
        with loading_for_life():
            pass
        assert not gc.isenabled()


def test_an_error_while_loading_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), loading_for_life():
        raise ImportError("a plugin")

    assert gc.isenabled()


def test_a_busy_loop_lets_other_threads_go_on_sooner() -> None:
    assert sys.getswitchinterval() == pytest.approx(PYTHONS_SWITCH_INTERVAL_MS / 1000)

    tune_interpreter()

    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_MS / 1000)


def test_what_other_code_has_set_stays() -> None:
    gc.set_threshold(900, 20, 20)
    sys.setswitchinterval(0.002)

    tune_interpreter()

    assert gc.get_threshold() == (900, 20, 20)
    assert sys.getswitchinterval() == pytest.approx(0.002)
