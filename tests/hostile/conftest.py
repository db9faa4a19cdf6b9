"""Fixtures of the hostile input tests: one world for all of them, and the table at the end."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.hostile.answers import check
from tests.hostile.entry_points import ENTRY_POINTS
from tests.hostile.table import PROPERTY, Attack, Case
from tests.hostile.world import World, world_in


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with world_in(tmp_path_factory.mktemp("hostile")) as world:
        yield world


@pytest.fixture
def attack(world: World, request: pytest.FixtureRequest) -> Attack:
    """Sends a case's input through its entry point, and checks the answer and that the worker still works."""
    marker = request.node.get_closest_marker("hostile")

    def attack(case: Case) -> None:
        request.node.user_properties.append((PROPERTY, (marker.kwargs["kind"], case.entry_point)))
        world.shown.clear()
        world.printed.clear()
        answer = ENTRY_POINTS[case.entry_point](world, case.input)
        check(f"{request.node.path.stem}: {case.id}", answer, case.codes)
        world.goes_on(after=case.id)

    return attack
