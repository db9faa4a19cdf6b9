"""Plugins whose outcomes cannot be stored, and plugins that raise given exceptions."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, model_serializer

from openagents_worker.errors import OpenAgentsError, ToolError
from openagents_worker.memory.base import MemoryPlugin
from openagents_worker.models import RunArtifact
from tests.runtime.plugins import Charge, _Pattern

HALF = "\ud800"  # a lone surrogate: UTF-8 cannot encode it


class Foreign:
    """An object that is not JSON."""


class Refuses(Foreign):
    """An object whose `str()` raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class SerializesBadly(BaseModel):
    @model_serializer
    def _serialize(self) -> Any:
        raise KeyError("lost")


class BadFields(ToolError):
    """An error class with a field that is not JSON."""

    code = "shop.bad_fields"
    extra_fields = ("thing",)

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.thing = Foreign()


class Unfinished(OpenAgentsError):
    """An error class that does not call the constructor of its base class."""

    code = "shop.unfinished"

    def __init__(self) -> None:
        self.args = ("half made",)


def deep(levels: int) -> Any:
    value: Any = "at the bottom"
    for _ in range(levels):
        value = [value]
    return value


def circle() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


VALUES: dict[str, Callable[[], Any]] = {
    "a foreign object": Foreign,
    "an object without a text": Refuses,
    "half a character": lambda: {"text": HALF},
    "NaN": lambda: float("nan"),
    "a deep nesting": lambda: deep(300),
    "a very deep nesting": lambda: deep(50_000),
    "a circle": circle,
    "a key that is not a text": lambda: {(1, 2): 3},
    "a very large number": lambda: 10**5000,
    "a model that cannot be serialised": SerializesBadly,
    "bytes": lambda: b"\xff",
}

REPLACED: dict[str, Any] = {
    "half a character": {"text": "\ufffd"},
    "NaN": None,
    "a very large number": hex(10**5000),
}
"""What is stored of a value that JSON has no place for."""
TOO_DEEP = ("a deep nesting", "a very deep nesting")

ERRORS: dict[str, Callable[[], BaseException]] = {
    "half a character": lambda: ValueError(HALF),
    "no text": lambda: ValueError(Refuses()),
    "a long text": lambda: ValueError("x" * 3_000_000),
    "a coded error with half a character": lambda: ToolError(HALF, hint=HALF),
    "a coded error with a field that is not JSON": lambda: BadFields("with a thing"),
    "a coded error that is half made": Unfinished,
    "a cause with half a character": lambda: _with_cause(ValueError("outside"), ValueError(HALF)),
}


def _with_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def _raw_artifact(payload: Any) -> RunArtifact:
    """An artifact that was not validated, as after a change of its payload."""
    return RunArtifact.model_construct(name="plan", kind="generic", payload=payload, metadata={})


class Leaves(_Pattern):
    """Puts the value `what` at the place `where` of the run."""

    async def execute(self) -> Any:
        value = VALUES[self.config["what"]]()
        match self.config["where"]:
            case "output":
                return value
            case "artifact":
                self.context.artifacts.append(_raw_artifact(value))
            case "state":
                self.context.state["plan"] = value
            case "no artifact":
                self.context.artifacts.append(value)
            case "event":
                await self.context.emit("app.looked", seen=value)
            case "all artifacts":
                self.context.artifacts = value
            case "all state":
                self.context.state = value
            case "artifact, then an error":
                self.context.artifacts += [_raw_artifact(value), RunArtifact(name="good", payload=1)]
                raise ValueError("a bug")
        return "done"


class Names(_Pattern):
    """Emits an event with an invalid name."""

    async def execute(self) -> Any:
        await self.context.emit(self.config.get("name") or Foreign(), number=1)
        await self.context.emit(HALF, number=2)
        return "done"


class Raises(_Pattern):
    async def execute(self) -> Any:
        raise ERRORS[self.config["what"]]()


class UsesTool(_Pattern):
    """Calls its tool and returns the error of the tool."""

    async def execute(self) -> Any:
        try:
            return {"got": await self.context.tools["tool"].invoke({})}
        except OpenAgentsError as error:
            return {"code": error.code, "message": error.message[:2000]}


class GivesBack(Charge):
    """A tool that returns a value that cannot be stored, or adds it to state or artifacts."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.calls = 0

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        value = VALUES[self.config["what"]]()
        match self.config["where"]:
            case "result":
                return value
            case "artifact":
                context.artifacts.append(_raw_artifact(value))
            case "add_artifact":
                context.add_artifact("plan", payload=value)
            case "state":
                context.state["plan"] = value
        return "done"


class ToolRaises(Charge):
    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        raise ERRORS[self.config["what"]]()


# --- every error class of the library -------------------------------------------------------------------


def made(code: str) -> OpenAgentsError:
    """An error of the class with this code."""
    from openagents_worker.errors import RunFailed, error_classes

    if code == "run_failed":
        return RunFailed("the other run failed", code="shop.failed", run_id="other")
    cls = next(
        cls for cls in error_classes() if cls.code == code and cls.__module__.startswith("openagents_")
    )
    return cls(f"somebody says {code}")


class PatternSays(_Pattern):
    async def execute(self) -> Any:
        raise made(self.config["code"])


class ToolSays(Charge):
    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        raise made(self.config["code"])


class CallsTool(_Pattern):
    async def execute(self) -> Any:
        return await self.context.tools["tool"].invoke({})


class MemorySays:
    """A memory that raises in the method that its config names."""

    external = False

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    async def inject(self, context: Any) -> None:
        if self.config["step"] == "inject":
            raise made(self.config["code"])

    async def writeback(self, context: Any) -> None:
        if self.config["step"] == "writeback":
            raise made(self.config["code"])


# --- every exception of Python ---------------------------------------------------------------------------


class Odd(BaseException):
    """A custom BaseException."""


def _of_class(cls: type[BaseException]) -> Callable[[], BaseException]:
    if issubclass(cls, BaseExceptionGroup):
        return lambda: cls("several", [ValueError("one"), KeyError("two")])
    if issubclass(cls, UnicodeEncodeError):
        return lambda: cls("utf-8", "x", 0, 1, "why")
    if issubclass(cls, UnicodeDecodeError):
        return lambda: cls("utf-8", b"x", 0, 1, "why")
    if issubclass(cls, UnicodeTranslateError):
        return lambda: cls("x", 0, 1, "why")
    return lambda: cls("why")


def _exceptions() -> dict[str, Callable[[], BaseException]]:
    import concurrent.futures

    found: dict[str, type[BaseException]] = {}
    for module in (builtins, asyncio, concurrent.futures):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, BaseException):
                found[value.__name__ if module is builtins else f"{module.__name__}.{value.__name__}"] = value
    makers = {name: _of_class(cls) for name, cls in found.items()}
    makers["asyncio.IncompleteReadError"] = lambda: asyncio.IncompleteReadError(b"", 1)
    makers["asyncio.LimitOverrunError"] = lambda: asyncio.LimitOverrunError("why", 1)
    makers["a class of its own"] = lambda: Odd("why")
    makers["a group with a SystemExit in it"] = lambda: BaseExceptionGroup(
        "both", [SystemExit(3), ValueError("x")]
    )
    return makers


EXCEPTIONS = _exceptions()
KINDS = (
    "BaseException", "BaseExceptionGroup", "Exception", "GeneratorExit", "KeyboardInterrupt", "SystemExit",
    "AssertionError", "MemoryError", "OSError", "RecursionError", "StopAsyncIteration", "StopIteration",
    "ValueError", "UserWarning", "TimeoutError", "KeyError", "ConnectionResetError", "UnicodeDecodeError",
    "ExceptionGroup", "asyncio.CancelledError", "asyncio.InvalidStateError", "asyncio.IncompleteReadError",
    "concurrent.futures.CancelledError", "concurrent.futures.BrokenExecutor", "a class of its own",
    "a group with a SystemExit in it",
)  # fmt: skip
"""Those that Python, asyncio or pydantic treats on its own, and one of each family of the others."""


class Views(MemoryPlugin):
    """An external memory that puts the value `what` at the place `where` of the run."""

    class Config(MemoryPlugin.Config):
        what: str
        where: str

    async def inject(self, context: Any) -> None:
        if self.cfg.where == "view":
            context.memory_view["plan"] = VALUES[self.cfg.what]()
        if self.cfg.where == "state":
            context.state["plan"] = VALUES[self.cfg.what]()

    async def writeback(self, context: Any) -> None:
        if self.cfg.where == "writeback":
            context.state["plan"] = VALUES[self.cfg.what]()
