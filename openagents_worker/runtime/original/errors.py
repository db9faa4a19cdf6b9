"""Errors of the original SDK's package: the only place that translates them, in both directions.

An error that user code raises becomes an error of this library with the same code. An error of this library
becomes one that is also an instance of the package's class with its code, for plugins that catch that class.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from openagents_worker import errors
from openagents_worker.errors import KIND_OF, PLACE, OpenAgentsError, error_from_wire, text_of
from openagents_worker.runtime.original.package import loaded

__all__ = ["as_original", "translated"]

Plain = str | int | float | bool


def translated(error: BaseException) -> OpenAgentsError | None:
    """The error of this library for an error of the package; None for any other exception.

    It has code, message, hint, `retryable`, and the fields of its class such as `retry_after_ms`.
    """
    base = loaded("errors.exceptions", "OpenAgentsError")
    if not isinstance(base, type) or not isinstance(error, base):
        return None
    try:
        return _translated(error)
    except Exception:  # noqa: BLE001 - the class of a plugin may override anything
        return None


def _translated(error: Any) -> OpenAgentsError:
    code = str(error.code)
    # The constructor masks secrets.
    masked = OpenAgentsError(
        text_of(error.args[0]) if error.args else "",
        hint=getattr(error, "hint", None),
        docs_url=getattr(error, "docs_url", None),
    )
    parent = _nearest_class(type(error))
    names = dict.fromkeys((*PLACE, *parent.extra_fields, "retry_after_ms"))
    context: dict[str, Any] = {name: _plain(getattr(error, name, None)) for name in names}
    context = {name: value for name, value in context.items() if value is not None}
    if parent.code != code:
        context[KIND_OF] = parent.code
    return error_from_wire(
        {**masked.to_dict(), "code": code, "retryable": bool(error.retryable), "context": context}
    )


def _plain(value: Any) -> Any:
    """A field as plain JSON: the name of a class, and nothing of other objects."""
    if isinstance(value, type):
        return value.__name__
    return value if isinstance(value, Plain) else None


def _nearest_class(kind: type) -> type[OpenAgentsError]:
    """The class of this library with the code of this class of the package, or of its nearest parent."""
    for base in kind.__mro__:
        code = vars(base).get("code")
        if isinstance(code, str) and code in (own := _own_classes()):
            return own[code]
    return OpenAgentsError


@lru_cache(maxsize=1)
def _own_classes() -> dict[str, type[OpenAgentsError]]:
    """The error classes of this library by code."""
    public = (getattr(errors, name) for name in errors.__all__)
    return {
        kind.code: kind for kind in public if isinstance(kind, type) and issubclass(kind, OpenAgentsError)
    }


# --- the other direction ----------------------------------------------------------------------------------


def as_original(error: OpenAgentsError) -> OpenAgentsError:
    """The same error, which is also an instance of the class of the package with its code.

    Returns the error itself if the package is not imported.
    """
    theirs = _class_of_package(type(error))
    if theirs is None or isinstance(error, theirs):
        return error
    both = _both(type(error), theirs)  # type: ignore[arg-type]  # mypy looks at the hash of an object
    made = both.__new__(both)
    Exception.__init__(made, *error.args)
    made.__dict__.update(error.__dict__)
    made.__cause__, made.__suppress_context__ = error.__cause__, error.__suppress_context__
    return made


@lru_cache(maxsize=256)
def _both(ours: type[OpenAgentsError], theirs: type[BaseException]) -> type[OpenAgentsError]:
    """A class of both kinds. What it does is defined by the class of this library."""
    return type(ours.__name__, (ours, theirs), {"__module__": ours.__module__})


def _class_of_package(kind: type[OpenAgentsError]) -> type[BaseException] | None:
    """The class of the package with the code of this class, or of its nearest parent that has one there."""
    base = loaded("errors.exceptions", "OpenAgentsError")
    if not isinstance(base, type):
        return None
    theirs = {vars(each).get("code"): each for each in reversed(list(_subclasses(base)))}
    codes = (vars(each).get("code") for each in kind.__mro__)
    return next((theirs[code] for code in codes if code in theirs), base)


def _subclasses(base: type) -> Iterator[type]:
    """The class and all its subclasses, parents before children, without those of both kinds."""
    waiting = [base]
    while waiting:
        kind = waiting.pop(0)
        if not issubclass(kind, OpenAgentsError):
            yield kind
            waiting.extend(kind.__subclasses__())
