"""Replies of scripts: Lua and Python have the same fields, by name, and both sides use each of them."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest

import openagents_worker
from openagents_worker.store import scripts
from openagents_worker.store.codec import PLAIN
from openagents_worker.store.scripts.replies import decoder_of, reply_in_lua

PACKAGE = Path(openagents_worker.__file__).parent
NAMES = sorted(name for name in scripts.__all__ if name[0].islower())
REPLY = re.compile(r"\breply\s*\{")
ITEM = re.compile(r"(\w+)\s*=(?!=)")


def reply_of(name: str) -> Any:
    """The type of the reply of a script, without `None`."""
    hint = getattr(scripts, name)().script.reply
    present = [each for each in get_args(hint) if each is not type(None)]
    return present[0] if type(None) in get_args(hint) else hint


def fields_of(reply: Any) -> set[str]:
    return set(get_type_hints(reply)) if hasattr(reply, "__annotations__") else set()


def returned_by(name: str) -> set[str]:
    """The names of the fields in all `reply{…}` of a script, nested tables not included."""
    found: set[str] = set()
    lua = re.sub(r"--.*", "", getattr(scripts, name)().script.body)
    for begin in REPLY.finditer(lua):
        depth, text = 1, ""
        for character in lua[begin.end() :]:
            depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(character, 0)
            if depth == 0:
                break
            text += character if depth == 1 else ""
        found |= set(ITEM.findall(re.sub(r"'[^']*'", "''", text)))
    return found


@cache
def read_in_the_library() -> set[str]:
    """The names of all attributes that the library reads."""
    nodes = (node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("name", NAMES)
def test_a_script_returns_exactly_the_fields_that_its_reply_declares(name: str) -> None:
    """A field that is not declared would be dropped in silence; one that is never returned has no meaning."""
    assert returned_by(name) == declared_by(name)


def declared_by(name: str) -> set[str]:
    """The fields that this script must return. Only `suspend` has a delay."""
    return fields_of(reply_of(name)) - ({"delay_ms"} if name in ("release", "finish") else set())


def test_each_field_of_a_reply_is_read_in_the_library() -> None:
    """Except those of named tuples, which are unpacked."""
    replies = {reply_of(name) for name in NAMES}
    fields = {field for reply in replies if not hasattr(reply, "_fields") for field in fields_of(reply)}
    assert fields <= read_in_the_library()


def test_a_script_returns_nothing_by_position() -> None:
    """A list of different values is a reply without names."""
    positional = re.compile(r"^\s*(?:if .* then )?return \{.*\}(?: end)?$", re.MULTILINE)
    files = sorted((PACKAGE / "store/lua").glob("*.lua"))
    assert [path.name for path in files if positional.search(path.read_text())] == []


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Leaf:
    name: str
    is_green: bool = False


class Tree(NamedTuple):
    colour: Colour
    leaves: tuple[Leaf, ...] = ()
    first: Leaf | None = None
    names: frozenset[str] = frozenset()
    sizes: dict[str, str] | None = None
    height: int = 7


def test_a_reply_is_decoded_by_the_types_of_its_fields() -> None:
    """Redis answers with lists, text and numbers; a boolean is 1 or 0, and a hash is a list of pairs."""
    answer = ["red", [["a", 1], ["b", 0]], ["c", None], ["x", "x"], ["n", "1"], "3"]
    assert decoder_of(Tree)(answer, PLAIN) == Tree(
        Colour.RED, (Leaf("a", True), Leaf("b")), Leaf("c"), frozenset("x"), {"n": "1"}, 3
    )


def test_a_field_that_lua_leaves_out_has_its_default() -> None:
    assert decoder_of(Tree)(["red", None, None, None, None, None], PLAIN) == Tree(Colour.RED)


def test_lua_names_its_fields_and_the_order_is_that_of_the_class() -> None:
    values = "v_.name or false, v_.is_green ~= nil and (v_.is_green and 1 or 0)"
    assert reply_in_lua(Leaf) == f"local function reply(v_) return {{{values}}} end"
    assert "reply(list) return leaf_rows(list)" in reply_in_lua(tuple[Leaf, ...])
    assert reply_in_lua(int) == ""


def test_a_type_that_no_reply_can_have_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot return"):
        decoder_of(float)


def test_another_order_of_the_fields_is_another_script() -> None:
    """So two versions of the library that share a Redis never read each other's replies."""

    class Other(NamedTuple):
        examined: int
        wakes: tuple[scripts.Wake, ...]

    shas = {scripts.Script("wake", {"limit": int}, reply).sha for reply in (scripts.Woken, Other)}
    assert len(shas) == 2
