"""Code paths: the only place that lets a reference in an agent's definition hold the plugin itself."""

from __future__ import annotations

from functools import partial
from typing import Any

__all__ = ["CodePath", "code_of"]


class CodePath(str):
    """The path of a class or function, together with the object, which need not be importable.

    Everywhere else it is a text: in the definition's hash, in messages and in logs.

    >>> def look_up(name: str) -> str: ...
    >>> str(CodePath.of(look_up)).rpartition(".")[2]
    'look_up'
    """

    __slots__ = ("code",)
    code: Any

    @classmethod
    def of(cls, code: Any) -> CodePath:
        """The path of a class or function: module and qualified name, for a closure without `<locals>`."""
        named = code
        while isinstance(named, partial):
            named = named.func
        name = getattr(named, "__qualname__", None) or type(named).__qualname__
        name = name.replace("<locals>.", "").replace("<lambda>", "lambda")
        path = cls(f"{getattr(named, '__module__', None) or '__main__'}.{name}")
        path.code = code
        return path


def code_of(path: object) -> Any:
    """The object of a path that holds it, else None."""
    return path.code if isinstance(path, CodePath) else None
