"""What is remembered about requests: a bounded number of digests."""

from __future__ import annotations

from openagents_worker.llm.digest_memory import MAX_REMEMBERED, DigestMemory


def test_the_oldest_content_is_forgotten() -> None:
    """A process that sees new conversations for months keeps the newest thousand."""
    memory = DigestMemory[int]()

    for number in range(MAX_REMEMBERED + 1):
        memory.put({"conversation": number}, number)

    known = [memory.get({"conversation": number}) for number in range(MAX_REMEMBERED + 1)]
    assert known == [None, *range(1, MAX_REMEMBERED + 1)]


def test_a_content_that_is_remembered_again_is_the_newest_one() -> None:
    memory = DigestMemory[str]()
    for number in range(MAX_REMEMBERED):
        memory.put(number, "first")

    memory.put(0, "again")
    memory.put("one more", "first")

    assert (memory.get(0), memory.get(1)) == ("again", None)


def test_half_a_character_in_a_content_is_no_obstacle() -> None:
    """Text of a model may have a lone half of a surrogate pair."""
    memory = DigestMemory[bool]()

    memory.put(["\ud83d"], True)

    assert memory.get(["\ud83d"]) is True
