"""The collection of garbage while a worker loads its parts."""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest

from openagents_worker.worker.garbage_collection import loading_for_life


@pytest.fixture(autouse=True)
def _restored() -> Generator[None]:
    gc.enable()
    yield
    gc.unfreeze()
    gc.enable()


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
