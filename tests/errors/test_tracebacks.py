"""Tracebacks as text: for any exception they have limited length, show the user's frames and no secret."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from openagents_worker.errors import ProcessTraceback, ToolError
from openagents_worker.printable import escaped_line
from openagents_worker.runtime.user_code import user_code
from openagents_worker.tracebacks import MAX_TRACEBACK_BYTES, traceback_text

HERE = __file__


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Hostile(Exception):
    """Its attributes raise; so does its text."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __str__(self) -> str:
        raise KeyboardInterrupt


def raised(raise_it: Callable[[], Any]) -> BaseException:
    try:
        raise_it()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def fails() -> None:
    prices = {"A17": 3}
    prices["B2"] = prices["missing"]


def chained() -> None:
    try:
        fails()
    except KeyError as error:
        raise ValueError("the order has no price") from error


def in_the_handler() -> None:
    try:
        fails()
    except KeyError:
        raise ValueError("the order has no price")  # noqa: B904 - the test needs the context


def in_a_group() -> None:
    raise ExceptionGroup("two of three", [raised(fails), raised(chained)])


def nested_groups() -> None:
    error: Exception = ValueError("innermost")
    for depth in range(200):
        error = ExceptionGroup(f"level {depth}", [error, ValueError("beside")])
    raise error


def of_a_large_group() -> None:
    raise ExceptionGroup("many", [ValueError("x" * 50_000) for _ in range(1_000)])


def recursion() -> None:
    recursion()


def mutual_recursion(depth: int = 0) -> None:
    def other() -> None:
        mutual_recursion(depth + 1)

    if depth > 300:
        raise ValueError("deep enough")
    other()


def a_long_chain() -> None:
    error: Exception = ValueError("the first")
    for number in range(3_000):
        wrapped = RuntimeError(f"wrap {number}")
        wrapped.__cause__ = error
        error = wrapped
    raise error


def a_circle() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    raise one


def of_syntax() -> None:
    compile("price = = 3", "shop/prices.py", "exec")


def with_notes() -> None:
    error = ValueError("no price")
    error.add_note("order A17")
    raise error


def of_a_megabyte() -> None:
    raise ValueError("é" * 1_000_000)


def with_half_a_character() -> None:
    raise ValueError("\ud800")


def with_a_cursor_movement() -> None:
    raise ValueError("\x1b[2Jgone\r\x00")


def unreadable() -> None:
    raise Unreadable


def hostile() -> None:
    raise Hostile


def from_generated_code() -> None:
    exec(compile("\n" * 3 + "1/0", "<generated>", "exec"))  # noqa: S102 - its frame has no file


WAYS = {
    way.__name__: way
    for way in (
        fails, chained, in_the_handler, in_a_group, nested_groups, of_a_large_group, recursion,
        mutual_recursion, a_long_chain, a_circle, of_syntax, with_notes, of_a_megabyte, with_half_a_character,
        with_a_cursor_movement, unreadable, hostile, from_generated_code,
    )
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("max_bytes", [MAX_TRACEBACK_BYTES, 1_000])
def test_it_is_bounded_and_storable_whatever_was_raised(way: str, max_bytes: int) -> None:
    """Never raises; at most so many bytes of UTF-8; nothing but printable text and line ends."""
    error = raised(WAYS[way])

    text = traceback_text(error, max_bytes=max_bytes)

    assert len(text.encode()) <= max_bytes
    assert all(line.isprintable() for line in text.split("\n"))
    assert type(error).__name__ in text


@pytest.mark.parametrize(
    "way", sorted(set(WAYS) - {"hostile", "of_syntax", "nested_groups", "of_a_large_group"})
)
@pytest.mark.parametrize("max_bytes", [MAX_TRACEBACK_BYTES, 1_000])
def test_the_users_most_recent_frame_is_there_after_truncation(way: str, max_bytes: int) -> None:
    """However long messages, chains and recursions are."""
    error = raised(WAYS[way])
    last = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == HERE][-1]

    assert f'File "{HERE}", line {last.lineno}, in ' in traceback_text(error, max_bytes=max_bytes)


def test_it_reads_as_python_shows_it() -> None:
    """Causes first, each with its frames and source lines."""
    assert traceback_text(raised(chained)).splitlines() == [
        "Traceback (most recent call last):",
        f'  File "{HERE}", line {chained.__code__.co_firstlineno + 2}, in chained',
        "    fails()",
        f'  File "{HERE}", line {fails.__code__.co_firstlineno + 2}, in fails',
        '    prices["B2"] = prices["missing"]',
        "KeyError: 'missing'",
        "",
        "The above exception was the direct cause of the following exception:",
        "",
        "Traceback (most recent call last):",
        f'  File "{HERE}", line {raised.__code__.co_firstlineno + 2}, in raised',
        "    raise_it()",
        f'  File "{HERE}", line {chained.__code__.co_firstlineno + 4}, in chained',
        '    raise ValueError("the order has no price") from error',
        "ValueError: the order has no price",
    ]


def test_context_notes_syntax_and_groups_are_shown() -> None:
    """What Python's own traceback would say, too."""
    assert "During handling of the above exception" in traceback_text(raised(in_the_handler))
    assert traceback_text(raised(with_notes)).endswith("ValueError: no price\norder A17")
    assert '  File "shop/prices.py", line 1\n    price = = 3\nSyntaxError: invalid syntax' in traceback_text(
        raised(of_syntax)
    )
    group = traceback_text(raised(in_a_group))
    assert "exception 1 of 2 in the group:" in group
    assert "KeyError: 'missing'" in group
    assert "ValueError: the order has no price" in group


def test_the_users_frame_goes_before_those_of_libraries() -> None:
    """Where there is little room, what a library did inside is left out first."""

    def parses() -> None:
        json.loads('{"price": }')

    text = traceback_text(raised(parses), max_bytes=450)

    assert ", in test_the_users_frame_goes_before_those_of_libraries.<locals>.parses" in text
    assert "more frame" in text
    assert "JSONDecodeError" in text


def test_a_recursion_is_one_frame_and_a_count() -> None:
    """A thousand equal frames say no more than one."""
    text = traceback_text(raised(recursion))
    assert "RecursionError: maximum recursion depth exceeded" in text
    assert "more times]" in text
    assert text.count("in recursion") <= 2


def test_frames_of_this_library_and_of_asyncio_are_collapsed() -> None:
    """Other frames between the user's frames are one line; frames before the first are removed."""

    async def users() -> None:
        async with asyncio.timeout(10):
            await asyncio.ensure_future(inner())

    async def inner() -> None:
        with user_code(ToolError):
            fails()

    error = raised(lambda: asyncio.run(awaited(users)))
    cause = error.__cause__
    assert cause is not None
    text = traceback_text(error)
    assert "/asyncio/" not in text
    assert "openagents_worker/" not in text
    assert "in fails" in text


async def awaited(make: Callable[[], Awaitable[None]]) -> None:
    await make()


def test_an_error_of_this_library_shows_its_own_frames_where_there_are_no_others() -> None:
    """For our own log lines nothing is collapsed."""
    error = raised(lambda: escaped_line(None))  # type: ignore[arg-type]
    assert "openagents_worker/printable.py" in traceback_text(error, collapse=False)
    assert "openagents_worker/printable.py" not in traceback_text(error)


@pytest.mark.parametrize(
    "message",
    [
        "no answer from redis://:hunter2secret@h/0",
        "401 for Authorization: Bearer hunter2secret",
        "key sk-hunter2secret was refused",
        "login failed: user=ann password=hunter2secret",
        "sent {'api_key': 'hunter2secret'}",
        'sent {"client_secret": "hunter2secret"}',
        "x" * 1_990 + " sk-hunter2secret",
    ],
)
def test_no_secret_is_in_it(message: str) -> None:
    """Neither in messages, also of causes and notes, nor in source lines; local variables are not shown."""

    def fail() -> None:
        local = "hunter2" + "local"
        password = "hunter2source"  # noqa: F841
        try:
            raise KeyError(message)
        except KeyError as error:
            connect = dict
            wrapped = ValueError(message)
            wrapped.add_note(message)
            raise connect(password="hunter2source", error=wrapped)["error"] from error or local

    assert "hunter2" not in traceback_text(raised(fail)).replace("hunter2local", "")


def test_what_was_raised_in_another_process_is_shown_as_it_was_there() -> None:
    """Its frames here, which only say how it was passed on, are not."""
    error = ValueError("no price")
    error.__cause__ = ProcessTraceback('Traceback…\n  File "shop.py", line 3, in price\nValueError: no price')
    text = traceback_text(raised(lambda: raises(error)))
    assert text == 'Traceback…\n  File "shop.py", line 3, in price\nValueError: no price'


def raises(error: Exception) -> None:
    raise error
