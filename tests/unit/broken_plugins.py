"""Plugins that cannot work, each in its own way. The agents files of `test_start_checks` name them."""

from __future__ import annotations

from typing import Any, NoReturn

from pydantic import BaseModel, Field

from openagents_worker.tools.base import ToolPlugin


class RaisesWhenMade:
    def __init__(self, config: dict[str, Any]) -> None:
        raise RuntimeError("no licence")

    async def invoke(self, params: dict[str, Any], context: Any) -> None: ...


class NoTool:
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config


class TakesNoConfig:
    async def invoke(self, params: dict[str, Any], context: Any) -> None: ...


class OwnModel(BaseModel):
    """A class whose constructor lets pydantic check its config."""

    size: int = Field(ge=1)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(**config)

    async def invoke(self, params: dict[str, Any], context: Any) -> None: ...


class Picky(ToolPlugin):
    class Config(ToolPlugin.Config):
        size: int = Field(ge=1)
        colour: str = "red"


class TakesNoLimits:
    """A pattern that does not support steps."""

    def __init__(self, config: dict[str, Any]) -> None:
        if config.get("step_timeout_ms"):
            raise ValueError("a step cannot be timed")

    async def execute(self) -> None: ...


class NoSchema(ToolPlugin):
    def schema(self) -> dict[str, Any]:
        return {"type": "objekt"}


class LargeSchema(ToolPlugin):
    """Its schema is larger than one may be."""

    name = "large_schema"

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {f"field_{n}": {"type": "string"} for n in range(5_000)}}


class CannotDescribe(ToolPlugin):
    def describe(self) -> NoReturn:
        raise RuntimeError("speechless")


A_TEXT = "not a class"


CALLED: list[str] = []
"""What was called although it makes no plugin."""


def drop_all(**options: Any) -> None:
    CALLED.append("drop_all")


async def drop_all_soon(name: str = "") -> None:
    CALLED.append("drop_all_soon")


class DropsAll:
    def __init__(self, config: dict[str, Any]) -> None:
        CALLED.append("DropsAll")
