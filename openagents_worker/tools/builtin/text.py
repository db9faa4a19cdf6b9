"""Text: `json_parse` and `text_transform`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from openagents_worker.errors import ToolValidationError
from openagents_worker.jsontext import check, loads
from openagents_worker.tools.base import ToolContext
from openagents_worker.tools.typed import READS_ONLY, TypedTool

__all__ = ["JsonParse", "TextTransform"]


class JsonParse(TypedTool):
    name = "json_parse"
    description = "Parses JSON text and gives its value; says line and column of the first mistake."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        text: str = Field(description="The JSON text.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        try:
            value = loads(args.text)
            check(value)  # 1e999 and lone surrogates can be parsed here, but are not valid JSON elsewhere
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise ToolValidationError(f"text: no JSON at {place}: {error.msg}", self.name) from None
        except ValueError as error:
            raise ToolValidationError(f"text: no JSON that can be kept: {error}", self.name) from None
        return {"value": value}


class TextTransform(TypedTool):
    name = "text_transform"
    description = "Changes the case of a text, strips it or reverses it."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        text: str = Field(description="The text.")
        operation: Literal["upper", "lower", "title", "capitalize", "strip", "reverse"] = Field(
            description="What to do with it."
        )

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        return {"result": _OPERATIONS[args.operation](args.text)}


# An apostrophe is part of a word, and so is an accent that is a character of its own.
_WORD = re.compile("[^\\W_]+(?:['\u2019\\u0300-\\u036f]+[^\\W_]+)*")


def _title(text: str) -> str:
    """Each word with a capital letter. `str.title` makes `User'S` of `user's`, and `3Rd` of `3rd`.

    >>> _title("the user's 3rd well-known o'clock")
    "The User's 3rd Well-Known O'clock"
    """
    return _WORD.sub(lambda word: word[0].capitalize(), text)


_OPERATIONS: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "lower": str.lower,
    "title": _title,
    "capitalize": str.capitalize,
    "strip": str.strip,
    "reverse": lambda text: text[::-1],
}
