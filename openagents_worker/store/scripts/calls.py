"""Script calls: the only place that turns a declared function into a call of the script of its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from operator import index
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

from openagents_worker.jsontext import LARGEST_INTEGER, SMALLEST_INTEGER
from openagents_worker.quick_init import quick_init
from openagents_worker.store.codec import PLAIN, PayloadCodec
from openagents_worker.store.scripts.payloads import Encoder, encoder_of, plain_type
from openagents_worker.store.scripts.replies import Decoder, Reply, decoder_of
from openagents_worker.store.scripts.source import Script

__all__ = ["ScriptCall", "script_function"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Form:
    """How the arguments of a script are sent, by their positions in its signature."""

    encoders: tuple[tuple[int, Encoder], ...]
    """Positions of arguments, and what prepares them."""
    integers: tuple[int, ...]
    texts: tuple[int, ...]
    lists_from_the_last: tuple[int, ...]
    """A list is replaced by its items, so the positions before it stay the same."""

    @classmethod
    def of(cls, hints: Mapping[str, Any]) -> Form:
        """The form of the arguments with these types."""
        types = [plain_type(hint) for hint in hints.values()]
        return cls(
            tuple(
                (at, encode)
                for at, hint in enumerate(hints.values())
                if (encode := encoder_of(hint)) is not None
            ),
            tuple(at for at, kind in enumerate(types) if kind in (int, bool)),
            tuple(at for at, kind in enumerate(types) if kind is str),
            tuple(at for at, kind in reversed([*enumerate(types)]) if kind not in (int, bool, str)),
        )


@quick_init
@dataclass(frozen=True, slots=True)
class ScriptCall(Generic[T_co]):
    """A script with its arguments, for `Store.run` and `AsyncStore.run`. `parse` parses the reply.

    Payloads are encoded here and decoded here, so that callers and scripts never see the codec.
    """

    script: Script
    args: tuple[Any, ...]
    decode: Decoder
    form: Form
    _encoded: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def parse(self, reply: Reply, codec: PayloadCodec = PLAIN) -> T_co:
        parsed: T_co = self.decode(reply, codec)
        return parsed

    def argv(self, common: tuple[int, int, int], codec: PayloadCodec = PLAIN) -> list[str | int]:
        """The arguments in the order of the signature, after those of every script. A list is its length and
        its items.

        Raises ValueError for an integer of more than 64 bits, TypeError for an argument of another type.
        """
        values = [*self._encode(codec)]
        for at in self.form.integers:
            number = values[at] = index(values[at])  # a bool becomes an integer
            if not SMALLEST_INTEGER <= number <= LARGEST_INTEGER:  # hiredis would abort the process
                raise ValueError(f"an argument of {self.script.name} does not fit into 64 bits")
        for at in self.form.texts:
            if not isinstance(values[at], str):
                raise TypeError(f"argument {at} of {self.script.name} is not text")
        for at in self.form.lists_from_the_last:
            items = values[at]
            values[at : at + 1] = (len(items), *items)
        return [*common, *values]

    def _encode(self, codec: PayloadCodec) -> list[Any]:
        """The arguments with encoded payloads. A call that is repeated must send exactly the same texts."""
        encoded = self._encoded
        if not encoded:
            encoded += self.args
            for at, encode in self.form.encoders:
                encoded[at] = encode(encoded[at], codec)
        return encoded


def script_function(declared: Callable[P, T]) -> Callable[P, ScriptCall[T]]:
    """Decorator: a function that builds the `ScriptCall` of the script with the same name.

    The decorated function is a declaration without code. Its keyword arguments are those of the script, and
    its return type is the type of the reply.
    """

    @cache  # the script is built at the first call: most processes use only some scripts
    def script() -> tuple[Script, dict[str, Any], Decoder, Form]:
        hints = get_type_hints(declared, include_extras=True)
        reply = hints.pop("return")
        defaults = {name: p.default for name, p in inspect.signature(declared).parameters.items()}
        parameters = {name: plain_type(hint) for name, hint in hints.items()}
        return Script(declared.__name__, parameters, reply), defaults, decoder_of(reply), Form.of(hints)

    def build_call(*_: P.args, **arguments: P.kwargs) -> ScriptCall[T]:
        script_of_function, defaults, decode, form = script()
        values = tuple(map(arguments.get, defaults, defaults.values()))
        return ScriptCall(script_of_function, values, decode, form)

    build_call.__name__, build_call.__doc__ = declared.__name__, declared.__doc__
    return build_call
