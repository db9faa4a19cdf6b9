"""Names of secrets. The only place that decides by the name of a field whether its value is a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from functools import lru_cache
from typing import Any, assert_never

__all__ = ["DEFAULT_REDACT_KEYS", "ValueKind", "is_secret", "is_secrets_name", "parts_of", "value_kind"]

DEFAULT_REDACT_KEYS: tuple[str, ...] = (
    "access_key",
    "account_key",
    "api_key",
    "apikey",
    "authorization",
    "cookie",
    "credential",
    "passphrase",
    "passwd",
    "password",
    "private_key",
    "secret",
    "token",
)
"""A value is a secret if its key contains one of these parts. Case, `-` and `_` make no difference."""

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_HARMLESS = re.compile(
    r"_env$|tokeniz|token_type$"
)  # the name of a variable, a tokenizer, a type such as `bearer`


class ValueKind(Enum):
    """The kind of value that a key has, according to its name."""

    NOT_SECRET = auto()
    SECRET = auto()
    SECRET_OR_NUMBER = auto()
    """The key contains `token`: a number is a count or an expiry, another value is a secret."""
    SECRET_OR_COUNTS = auto()
    """The key contains `tokens`: a number or an object of numbers is a count, another value is a secret."""


def _normal(name: str) -> str:
    return _CAMEL.sub("_", name).replace("-", "_").replace(" ", "_").lower()


@lru_cache  # every event has the same parts from the agents file
def parts_of(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The parts in the normal form that `holds` compares."""
    return tuple(map(_normal, keys))


DEFAULT_PARTS = parts_of(DEFAULT_REDACT_KEYS)


@lru_cache(maxsize=4096)  # payloads repeat a small number of names
def value_kind(name: str, parts: tuple[str, ...] = DEFAULT_PARTS) -> ValueKind:
    """The kind of value under a key of this name; `parts` is a result of `parts_of`."""
    name = _normal(name)
    hits = () if _HARMLESS.search(name) else tuple(part for part in parts if part in name)
    if hits == ("token",):
        return ValueKind.SECRET_OR_COUNTS if "tokens" in name else ValueKind.SECRET_OR_NUMBER
    return ValueKind.SECRET if hits else ValueKind.NOT_SECRET


def is_secret(kind: ValueKind, value: Any) -> bool:
    """Whether a value is a secret, if its key is of this kind."""
    if value is None or isinstance(value, bool):
        return False
    match kind:
        case ValueKind.NOT_SECRET:
            return False
        case ValueKind.SECRET:
            return True
        case ValueKind.SECRET_OR_NUMBER:
            return not isinstance(value, int | float)
        case ValueKind.SECRET_OR_COUNTS:
            return not isinstance(value, int | float | Mapping)
        case _:
            assert_never(kind)


def is_secrets_name(name: str) -> bool:
    """Whether a text under this name is a secret: true for `OPENAI_API_KEY`, false for `MAX_TOKENS`.

    >>> is_secrets_name("OPENAI_API_KEY"), is_secrets_name("OPENAI_MODEL")
    (True, False)
    """
    return value_kind(name) in (ValueKind.SECRET, ValueKind.SECRET_OR_NUMBER)
