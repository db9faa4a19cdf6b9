"""A module that only a planted definition names. Its import shows that a worker has followed the plant."""

from __future__ import annotations

from typing import Any

__all__ = ["Assembler", "Executor", "Memory", "Pattern", "Tool"]


class Tool:
    def __init__(self, config: dict[str, Any] | None = None) -> None: ...

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        return "owned"


class Pattern:
    def __init__(self, config: dict[str, Any] | None = None) -> None: ...

    async def execute(self) -> Any:
        return {"prompt": "owned", "tools": ["owned"]}


class Memory:
    def __init__(self, config: dict[str, Any] | None = None) -> None: ...

    async def inject(self, context: Any) -> None: ...

    async def writeback(self, context: Any) -> None: ...


class Assembler:
    def __init__(self, config: dict[str, Any] | None = None) -> None: ...

    async def assemble(self, **_: Any) -> Any: ...


class Executor:
    def __init__(self, config: dict[str, Any] | None = None) -> None: ...

    async def execute(self, request: Any) -> Any: ...
