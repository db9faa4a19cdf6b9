"""Replies of scripts: the only place that defines how a reply travels from Lua to Python.

A script returns `reply{answer = 'OK', wakes = wakes}`. The class of the reply is a dataclass or a named
tuple. Its fields give the names, their order in the answer of Redis, and their types, on both sides: the Lua
function `reply` and the decoder are generated from it. A field that Lua leaves out gets its default. A reply
of another type is a single value, which needs no name.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.scripts.payloads import is_payload

__all__ = ["decoder_of", "reply_in_lua"]

Reply = Any
"""An answer of Redis: nested lists of str, int and None."""
Decoder = Callable[[Reply, PayloadCodec], Any]

# --- Lua -------------------------------------------------------------------------------------------------


def reply_in_lua(reply: Any) -> str:
    """The Lua function `reply`, which orders the named fields of this class. '' if the script needs none."""
    reply = _without_none(reply)
    hints = get_type_hints(reply) if _has_fields(reply) else {}
    rows = sorted({row for hint in hints.values() if (row := _row_class(hint))}, key=lambda row: row.__name__)
    if hints:
        values = ", ".join(_field_in_lua(name, hint) for name, hint in hints.items())
        return "\n".join([*map(_row_functions, rows), f"local function reply(v_) return {{{values}}} end"])
    if row := _row_class(reply):
        return f"{_row_functions(row)}\nlocal function reply(list) return {_lua_row_name(row)}s(list) end"
    return ""


def _has_fields(hint: Any) -> bool:
    """Whether this is a dataclass or a named tuple."""
    return is_dataclass(hint) or hasattr(hint, "_fields")


def _field_in_lua(name: str, hint: Any) -> str:
    """The Lua expression for a field. False becomes nil in the answer of Redis."""
    value = f"v_.{name}"
    hint = _without_none(hint)
    if row := _row_class(hint):
        return f"{value} and {_lua_row_name(row)}{'s' if row is not hint else ''}({value}) or false"
    if hint is bool:
        return f"{value} ~= nil and ({value} and 1 or 0)"
    return f"{value} or false"


def _row_functions(row: Any) -> str:
    """Lua functions for a class with fields inside of a reply, and for a list of them."""
    name = _lua_row_name(row)
    values = ", ".join(_field_in_lua(field, hint) for field, hint in get_type_hints(row).items())
    return (
        f"local function {name}(v_) return {{{values}}} end\n"
        f"local function {name}s(list) local t = {{}} "
        f"for i, v_ in ipairs(list) do t[i] = {name}(v_) end return t end"
    )


def _lua_row_name(row: Any) -> str:
    return f"{row.__name__.lower()}_row"


def _row_class(hint: Any) -> Any:
    """The class with fields in this type, if it is one or a tuple of them; else None."""
    hint = _without_none(hint)
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    return hint if _has_fields(hint) else None


# --- Python ----------------------------------------------------------------------------------------------


@cache
def decoder_of(hint: Any) -> Decoder:
    """The function that decodes a reply of this type. Raises `TypeError` if no reply can have it."""
    if (present := _without_none(hint)) is not hint:
        decode = decoder_of(present)
        return lambda value, codec: None if value is None else decode(value, codec)
    if _has_fields(hint):
        return _fields_decoder(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (tuple, frozenset):
        return _collection_decoder(origin, arguments[0])
    if origin is dict:
        return _decode_payload_pairs if is_payload(arguments[1]) else _decode_pairs
    if hint is int:
        return _decode_int
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        members = {member.value: member for member in hint}  # calling the class takes ten times as long
        return lambda value, _: members.get(value) or hint(value)
    if is_payload(hint):
        return _decode_payload
    if hint is bool:
        return _is_one
    if hint is str or origin is Literal:
        return _unchanged
    if hint is type(None):
        return _nothing
    raise TypeError(f"a script cannot return {hint}")


def _fields_decoder(row: Any) -> Decoder:
    decoders = tuple(
        (name, None if (decode := decoder_of(hint)) is _unchanged else decode)
        for name, hint in get_type_hints(row, include_extras=True).items()
    )

    def decode_fields(values: Sequence[Any], codec: PayloadCodec) -> Any:
        return row(
            **{
                name: value
                if decode_value is None
                else int(value)
                if decode_value is _decode_int  # half of the fields
                else decode_value(value, codec)
                for (name, decode_value), value in zip(decoders, values, strict=True)
                if value is not None
            }
        )

    return decode_fields


def _collection_decoder(collection: Callable[[Any], Any], item: Any) -> Decoder:
    decode_item = decoder_of(item)
    if decode_item is _unchanged:
        return lambda values, _: collection(values)
    return lambda values, codec: collection(decode_item(value, codec) for value in values)


def _decode_pairs(flat: Any, _: PayloadCodec) -> dict[str, str]:
    """A hash that Lua returned as a list: name, value, name, value …"""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _decode_payload_pairs(flat: Any, codec: PayloadCodec) -> dict[str, str]:
    """The same for values that are payloads."""
    values = flat[1::2] if codec.is_plain else map(codec.decode, flat[1::2])
    return dict(zip(flat[::2], values, strict=True))


def _decode_payload(text: str, codec: PayloadCodec) -> str:
    return codec.decode(text)


def _decode_int(value: Any, _: PayloadCodec) -> int:
    return int(value)


def _is_one(value: Any, _: PayloadCodec) -> bool:
    return bool(value == 1)


def _unchanged(value: Any, _: PayloadCodec) -> Any:
    return value


def _nothing(_: Any, __: PayloadCodec) -> None:
    return None


def _without_none(hint: Any) -> Any:
    """`X` for `X | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [each for each in get_args(hint) if each is not type(None)]
    return hint
