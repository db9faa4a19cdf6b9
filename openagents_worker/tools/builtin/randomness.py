"""Random values: `random_int`, `random_choice`, `random_string`, `uuid`.

The values come from the operating system and cannot be predicted, so a random string may serve as a password.
A call is recorded like any other: a later attempt of the run gets the same values from the journal.
"""

from __future__ import annotations

import string
import uuid
from random import Random, SystemRandom
from typing import Any, Literal

from pydantic import Field

from openagents_worker.errors import ToolValidationError
from openagents_worker.tools.base import ToolContext
from openagents_worker.tools.typed import READS_ONLY, TypedTool

__all__ = ["MakeUUID", "RandomChoice", "RandomInt", "RandomString"]

MAX_COUNT = 100
MAX_CHOICES = 10_000
MAX_LENGTH = 1_000
MAX_INTEGER = 2**53 - 1  # readers of JSON in other languages round larger integers

ALPHANUMERIC = string.ascii_lowercase + string.ascii_uppercase + string.digits
CHARSETS = {
    "alphanumeric": ALPHANUMERIC,
    "alpha": string.ascii_letters,
    "numeric": string.digits,
    "hex": string.digits + "abcdef",
    "ascii": ALPHANUMERIC + "!@#$%^&*",
}


class _RandomTool(TypedTool):
    """Base of these tools: `random` generates the values."""

    spec = READS_ONLY

    def __init__(self, config: dict[str, Any] | None = None, *, random: Random | None = None) -> None:
        super().__init__(config)
        self._random = random or SystemRandom()


class RandomInt(_RandomTool):
    name = "random_int"
    description = "Generates a random integer between two bounds, or several; both bounds can occur."

    class Params(TypedTool.Params):
        min: int = Field(0, ge=-MAX_INTEGER, le=MAX_INTEGER, description="The smallest possible value.")
        max: int = Field(100, ge=-MAX_INTEGER, le=MAX_INTEGER, description="The largest possible value.")
        count: int = Field(1, ge=1, le=MAX_COUNT, description="How many; for one, the result is `value`.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        if args.min > args.max:
            raise ToolValidationError(f"min: {args.min} is larger than max, {args.max}", self.name)
        values = [self._random.randint(args.min, args.max) for _ in range(args.count)]
        return {"value": values[0]} if args.count == 1 else {"values": values}


class RandomChoice(_RandomTool):
    name = "random_choice"
    description = "Chooses one element of a list at random, or several different ones."

    class Params(TypedTool.Params):
        choices: list[Any] = Field(
            min_length=1, max_length=MAX_CHOICES, description="The elements, of any type."
        )
        count: int = Field(1, ge=1, description="How many to choose; for one, the result is `value`.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        if args.count > len(args.choices):
            raise ToolValidationError(
                f"count: {args.count} of {len(args.choices)} elements cannot be chosen", self.name
            )
        values = self._random.sample(args.choices, args.count)
        return {"value": values[0]} if args.count == 1 else {"values": values}


class RandomString(_RandomTool):
    name = "random_string"
    description = "Generates a random text, for example a password or an unused name."

    class Params(TypedTool.Params):
        length: int = Field(16, ge=1, le=MAX_LENGTH, description="How many characters.")
        charset: Literal["alphanumeric", "alpha", "numeric", "hex", "ascii"] = Field(
            "alphanumeric", description="The characters: `ascii` is letters, digits and !@#$%^&*."
        )

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        characters = CHARSETS[args.charset]
        value = "".join(self._random.choice(characters) for _ in range(args.length))
        return {"value": value, "length": args.length}


class MakeUUID(_RandomTool):
    name = "uuid"
    description = "Generates a UUID (a unique identifier), or several."

    class Params(TypedTool.Params):
        version: Literal[1, 4] = Field(4, description="4: random. 1: made from the time and a random number.")
        count: int = Field(1, ge=1, le=MAX_COUNT, description="How many; for one, the result is `uuid`.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        make = self._random_uuid if args.version == 4 else self._uuid_of_time
        values = [str(make()) for _ in range(args.count)]
        return {"uuid": values[0]} if args.count == 1 else {"uuids": values}

    def _random_uuid(self) -> uuid.UUID:
        return uuid.UUID(int=self._random.getrandbits(128), version=4)

    def _uuid_of_time(self) -> uuid.UUID:
        """A UUID of version 1 with a random node: the usual one is the network address of this machine."""
        multicast = 1 << 40  # marks a node that is not the address of a network card (RFC 9562)
        return uuid.uuid1(node=self._random.getrandbits(48) | multicast)
