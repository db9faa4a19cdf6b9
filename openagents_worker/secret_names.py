"""Names of secrets. The only place that says by a field's name whether a secret stands under it."""

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
"""Parts of key names whose values are secrets, whatever their case, `-` or `_`."""

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_HARMLESS = re.compile(r"_env$|tokeniz|token_type$")  # names a variable, a tokenizer, `bearer`: not a secret


class Holds(Enum):
    """What stands under a key, by its name."""

    ANYTHING = auto()
    A_SECRET = auto()
    A_SECRET_OR_NUMBER = auto()
    """Under `…token…`: a number is a count or an expiry."""
    A_SECRET_OR_COUNTS = auto()
    """Under `…tokens…`: a number or an object of numbers."""


def _normal(name: str) -> str:
    return _CAMEL.sub("_", name).replace("-", "_").replace(" ", "_").lower()


@lru_cache  # an agents file's keys are the same in every event
def parts_of(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Parts of names as names are compared."""
    return tuple(map(_normal, keys))


DEFAULT_PARTS = parts_of(DEFAULT_REDACT_KEYS)


@lru_cache(maxsize=4096)  # payloads have the same few names again and again
def holds(name: str, parts: tuple[str, ...] = DEFAULT_PARTS) -> Holds:
    """What stands under a key of that name; `parts` come from `parts_of`."""
    name = _normal(name)
    hits = () if _HARMLESS.search(name) else tuple(part for part in parts if part in name)
    if hits == ("token",):
        return Holds.A_SECRET_OR_COUNTS if "tokens" in name else Holds.A_SECRET_OR_NUMBER
    return Holds.A_SECRET if hits else Holds.ANYTHING


def is_secret(under: Holds, value: Any) -> bool:
    """Whether a value that stands under such a key is a secret."""
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
    """Whether a text under this name is a secret: `OPENAI_API_KEY`, but not `MAX_TOKENS`.

    >>> is_secrets_name("OPENAI_API_KEY"), is_secrets_name("OPENAI_MODEL")
    (True, False)
    """
    return holds(name) in (Holds.A_SECRET, Holds.A_SECRET_OR_NUMBER)
