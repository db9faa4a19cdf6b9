"""Script calls: the only place that turns a declared function into a call of the script of its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

from openagents_worker.jsontext import LARGEST_INTEGER, SMALLEST_INTEGER
from openagents_worker.quick_init import quick_init
from openagents_worker.store.codec import PLAIN, PayloadCodec
from openagents_worker.store.scripts.payloads import OF_CODEC, Encoder, encoder_of, plain_type
from openagents_worker.store.scripts.replies import Decoder, decoder_of
from openagents_worker.store.scripts.source import Script

__all__ = ["ScriptCall", "script_function"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")


@quick_init
@dataclass(frozen=True, slots=True)
class ScriptCall(Generic[T_co]):
    """A script with its arguments, for `Store.run` and `AsyncStore.run`. `decode` decodes the reply.

    Payloads are encoded here and decoded here, so that callers and scripts never see the codec.
    """

    script: Script
    args: tuple[Any, ...]
    decode: Decoder
    encoders: tuple[tuple[int, Encoder], ...]
    """Positions of arguments, and what prepares them."""
    _encoded: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def argv(self, common: tuple[int, int, int], codec: PayloadCodec = PLAIN) -> list[str | int]:
        flat: list[str | int] = list(common)
        for value in self._encode(codec):
            kind = type(value)
            if kind is str or (kind is int and SMALLEST_INTEGER <= value <= LARGEST_INTEGER):
                flat.append(value)
            elif kind is list or kind is tuple:
                flat.append(len(value))
                flat += value
            elif isinstance(value, str):
                flat.append(value)
            elif isinstance(value, int):
                # This includes bool. hiredis aborts the process for an integer of more than 64 bits.
                if not SMALLEST_INTEGER <= value <= LARGEST_INTEGER:
                    raise ValueError(f"an argument of {self.script.name} does not fit into 64 bits")
                flat.append(int(value))
            else:
                flat.append(len(value))
                flat.extend(value)
        return flat

    def _encode(self, codec: PayloadCodec) -> list[Any]:
        """The arguments with encoded payloads. A call that is repeated must send exactly the same texts."""
        encoded = self._encoded
        if not encoded:
            encoded += self.args
            for at, encode in self.encoders:
                if not (codec.is_plain and encode in OF_CODEC):
                    encoded[at] = encode(encoded[at], codec)
        return encoded


def script_function(declared: Callable[P, T]) -> Callable[P, ScriptCall[T]]:
    """Decorator: a function that builds the `ScriptCall` of the script with the same name.

    The decorated function is a declaration without code. Its keyword arguments are those of the script, and
    its return type is the type of the reply.
    """

    @cache  # the script is built at the first call: most processes use only some scripts
    def script() -> tuple[Script, dict[str, Any], Decoder, tuple[tuple[int, Encoder], ...]]:
        hints = get_type_hints(declared, include_extras=True)
        reply = hints.pop("return")
        defaults = {name: p.default for name, p in inspect.signature(declared).parameters.items()}
        parameters = {name: plain_type(hint) for name, hint in hints.items()}
        encoders = tuple(
            (at, encode) for at, hint in enumerate(hints.values()) if (encode := encoder_of(hint)) is not None
        )
        return Script(declared.__name__, parameters, reply), defaults, decoder_of(reply), encoders

    def build_call(*_: P.args, **arguments: P.kwargs) -> ScriptCall[T]:
        script_of_function, defaults, decode, encoders = script()
        values = tuple(map(arguments.get, defaults, defaults.values()))
        return ScriptCall(script_of_function, values, decode, encoders)

    build_call.__name__, build_call.__doc__ = declared.__name__, declared.__doc__
    return build_call
