"""Random values: they are in their bounds, unpredictable, and say nothing about the machine."""

from __future__ import annotations

import uuid
from random import Random

from openagents_worker.tools.builtin.randomness import (
    CHARSETS,
    MakeUUID,
    RandomChoice,
    RandomInt,
    RandomString,
)


async def test_both_bounds_of_a_random_integer_can_occur() -> None:
    """One value is `value`, several are `values`."""
    tool = RandomInt(random=Random(1))

    assert set((await tool.invoke({"min": -1, "max": 1, "count": 100}, None))["values"]) == {-1, 0, 1}
    assert await tool.invoke({"min": 5, "max": 5}, None) == {"value": 5}


async def test_several_choices_are_different_elements() -> None:
    """Elements can be any JSON values."""
    choices = [1, "a", None, {"b": []}]

    chosen = (await RandomChoice(random=Random(1)).invoke({"choices": choices, "count": 4}, None))["values"]

    assert sorted(map(str, chosen)) == sorted(map(str, choices))
    assert (await RandomChoice().invoke({"choices": choices}, None))["value"] in choices


async def test_a_random_string_has_the_characters_of_its_charset() -> None:
    for charset, characters in CHARSETS.items():
        made = await RandomString(random=Random(1)).invoke({"length": 1_000, "charset": charset}, None)
        assert (set(made["value"]), made["length"]) == (set(characters), 1_000)


async def test_a_uuid_does_not_tell_the_network_address_of_the_worker() -> None:
    """Also version 1, whose node is a random number with the bit that no network card has."""
    made = await MakeUUID().invoke({"version": 1, "count": 2}, None)

    ids = [uuid.UUID(text) for text in made["uuids"]]
    assert [each.version for each in ids] == [1, 1]
    assert uuid.getnode() not in [each.node for each in ids]
    assert all(each.node >> 40 & 1 for each in ids)
    assert uuid.UUID((await MakeUUID().invoke({}, None))["uuid"]).version == 4


async def test_values_of_two_calls_differ() -> None:
    """Without a generator of the caller they come from the operating system."""
    assert await RandomString().invoke({}, None) != await RandomString().invoke({}, None)
