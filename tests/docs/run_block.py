"""Runs one Python block: its prelude first, in the same namespace, and the prelude's `check()` at last.

`python run_block.py NAME LINE BLOCK [PRELUDE …]`. A block may `await` at its top level.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
import types
import warnings
from pathlib import Path
from typing import Any


def main(name: str, line: str, block: str, *preludes: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"celery\.")  # its use of redis-py
    module = types.ModuleType("block")
    sys.modules["block"] = module
    codes = [_compiled(Path(prelude).read_text(), prelude) for prelude in preludes]
    codes.append(_compiled("\n" * (int(line) - 1) + Path(block).read_text(), name))
    if any(code.co_flags & inspect.CO_COROUTINE for code in codes):
        asyncio.run(_run_async(codes, vars(module)))
        return
    for code in codes:
        exec(code, vars(module))  # noqa: S102 - the documentation's own code
    if check := vars(module).get("check"):
        result = check()
        if inspect.isawaitable(result):
            asyncio.run(_await(result))


async def _run_async(codes: list[types.CodeType], namespace: dict[str, Any]) -> None:
    for code in codes:
        result = eval(code, namespace)  # noqa: S307 - the documentation's own code
        if inspect.isawaitable(result):
            await result
    if check := namespace.get("check"):
        result = check()
        if inspect.isawaitable(result):
            await result


async def _await(result: Any) -> None:
    await result


def _compiled(text: str, name: str) -> types.CodeType:
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code: types.CodeType = compile(text, name, "exec", flags=flags, dont_inherit=True)
    return code


if __name__ == "__main__":
    main(*sys.argv[1:])
