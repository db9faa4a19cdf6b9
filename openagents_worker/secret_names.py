"""Names of secrets. The only place that decides by the name of a field whether its value is a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from functools import lru_cache
from typing import Any, assert_never

__all__ = ["DEFAULT_REDACT_KEYS", "Holds", "holds", "is_secret", "is_secrets_name", "parts_of"]

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


class Holds(Enum):
    """The kind of value that a key has, according to its name."""

    ANYTHING = auto()
    A_SECRET = auto()
    A_SECRET_OR_NUMBER = auto()
    """The key contains `token`: a number is a count or an expiry, another value is a secret."""
    A_SECRET_OR_COUNTS = auto()
    """The key contains `tokens`: a number or an object of numbers is a count, another value is a secret."""


def _normal(name: str) -> str:
    return _CAMEL.sub("_", name).replace("-", "_").replace(" ", "_").lower()


@lru_cache  # every event has the same parts from the agents file
def parts_of(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The parts in the normal form that `holds` compares."""
    return tuple(map(_normal, keys))


DEFAULT_PARTS = parts_of(DEFAULT_REDACT_KEYS)


@lru_cache(maxsize=4096)  # payloads repeat a small number of names
def holds(name: str, parts: tuple[str, ...] = DEFAULT_PARTS) -> Holds:
    """The kind of value under a key of this name; `parts` is a result of `parts_of`."""
    name = _normal(name)
    hits = () if _HARMLESS.search(name) else tuple(part for part in parts if part in name)
    if hits == ("token",):
        return Holds.A_SECRET_OR_COUNTS if "tokens" in name else Holds.A_SECRET_OR_NUMBER
    return Holds.A_SECRET if hits else Holds.ANYTHING


def is_secret(under: Holds, value: Any) -> bool:
    """Whether a value is a secret, if its key has the kind `under`."""
    if value is None or isinstance(value, bool):
        return False
    match under:
        case Holds.ANYTHING:
            return False
        case Holds.A_SECRET:
            return True
        case Holds.A_SECRET_OR_NUMBER:
            return not isinstance(value, int | float)
        case Holds.A_SECRET_OR_COUNTS:
            return not isinstance(value, int | float | Mapping)
        case _:
            assert_never(under)


def is_secrets_name(name: str) -> bool:
    """Whether a text under this name is a secret: true for `OPENAI_API_KEY`, false for `MAX_TOKENS`.

    >>> is_secrets_name("OPENAI_API_KEY"), is_secrets_name("OPENAI_MODEL")
    (True, False)
    """
    return holds(name) in (Holds.A_SECRET, Holds.A_SECRET_OR_NUMBER)
