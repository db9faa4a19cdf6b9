"""How far a reader of the code has to go: counted on a real run and in the sources.

A real worker executes a run whose pattern looks at the call stack that led to it, over threads, tasks and
greenlets, and notes the modules that one of its model calls (over HTTP) passes through. The rest is counted
in the sources: long files, wide constructors, class names with two meanings, code that is written twice for
sync and async callers, and words that the project has replaced. `--json FILE` stores the figures, and
`--before FILE` shows earlier ones beside them.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench._call_path import PACKAGE, REPORT
from bench._worker import Worker, wait
from openagents_worker import Client
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.settings import load_settings
from openagents_worker.testing.model_server import ModelServer
from tests.faults.world import table

ROOT = PACKAGE.parent
MOST_HOPS, MOST_MODULES, MOST_ARGUMENTS, MOST_LINES = 12, 14, 7, 400
TABLES = {"errors.py", "settings.py"}
"""Long files that are one table each: every error with its code, every setting with its default."""

RUNS = 3

RETIRED = (
    r"carr(?:y|ies|ied|ier|iers|ying)",
    r"(?:un)?told|tellings?",
    r"crew",
    r"bodies",
    r"intake",
    r"rows",
    r"keeping",
    r"lanes?",
    r"doors?",
    r"outlook",
    r"(?:is|are|was|were|be) no [a-z]+",
    r"none of (?:a|its|ours)",
)
"""Words that a reader of this field would not guess; what crosses a wire keeps its name (a quoted word)."""


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table; 0 when every figure with a limit is within it."""
    parser = argparse.ArgumentParser(prog="python -m bench structure", description=__doc__)
    parser.add_argument("--json", type=Path, help="store the figures in this file")
    parser.add_argument("--before", type=Path, help="show the figures of this file beside them")
    parser.add_argument("--names", action="store_true", help="list what was counted, too")
    options = parser.parse_args(arguments)
    found = {**_executed(), **_written()}
    before: Mapping[str, Any] = json.loads(options.before.read_text()) if options.before else {}
    limits = {
        "hops from the message to pattern.execute()": MOST_HOPS,
        "modules that a model call passes through": MOST_MODULES,
        f"constructors with more than {MOST_ARGUMENTS} arguments": 0,
        f"files of more than {MOST_LINES} lines, without tables": 0,
        "class names with two meanings": 0,
        "retired words": 0,
    }
    rows = [
        {
            "figure": figure,
            "before": before.get(figure, ""),
            "now": len(names),
            "limit": limits.get(figure, ""),
        }
        for figure, names in found.items()
    ]
    table("How far a reader has to go", rows)
    if options.names:
        for figure, names in found.items():
            print(f"\n--- {figure}\n" + "\n".join(map(str, names)))
    if options.json:
        options.json.write_text(json.dumps({row["figure"]: row["now"] for row in rows}, indent=2) + "\n")
    return max(len(found[figure]) > limit for figure, limit in limits.items())


# --- what a run passes through ---------------------------------------------------------------------------


def _executed() -> dict[str, list[str]]:
    """The functions of the library above `pattern.execute()`, and the modules of a model call."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis() as redis:
        report = Path(folder) / "report.jsonl"
        with ModelServer([{"text": "an answer"}] * 5).serve_in_thread() as model:
            agent = {
                "id": "call_path",
                "name": "Call path",
                "llm": {
                    "provider": "openai_compatible",
                    "model": "scripted",
                    "api_base": model.url,
                    "api_key_env": "BENCH_MODEL_KEY",
                },
                "memory": {"type": "buffer"},
                "pattern": {"impl": "bench._call_path.CallPath"},
            }
            env = {REPORT: str(report), "BENCH_MODEL_KEY": "none", "PYTHONPATH": str(ROOT)}
            env |= {"OPENAGENTS_BROKER_URL": redis.url, "OPENAGENTS_LOG_LEVEL": "WARNING"}
            with Worker(Path(folder), redis.url, agent, "-c", "10", app="bench._call_path", **env):
                _run(redis.url)
        runs = [json.loads(line) for line in report.read_text().splitlines()]
    hops = min((run["hops"] for run in runs), key=len)
    first = next(index for index, hop in enumerate(hops) if hop.endswith("TaskPool.on_apply"))
    calls = [modules for run in runs for modules in run["model_calls"]]
    return {
        "hops from the message to pattern.execute()": hops[first:],
        "modules that a model call passes through": min(calls, key=len),
    }


def _run(redis_url: str) -> None:
    settings = load_settings({**os.environ, "OPENAGENTS_REDIS_URL": redis_url})
    with Client(settings=settings) as client:
        for number in range(RUNS):
            handle = client.submit(
                {
                    "agent_id": "call_path",
                    "session_id": f"session-{number}",
                    "input_text": "How do you get here?",
                }
            )
            wait(handle.ready, "the run has ended")
            handle.get()


# --- what is written -------------------------------------------------------------------------------------


def _written() -> dict[str, list[str]]:
    """Figures of the sources; each a list of what was counted."""
    files = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in files.items()}
    classes, wide, twins = defaultdict(set), [], []
    for path, tree in trees.items():
        name = str(path.relative_to(PACKAGE))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes[node.name.lstrip("_")].add(f"{name}:{node.lineno}")
        wide += [f"{name}: {what}" for what in _wide_constructors(tree)]
        twins += [f"{name}: {what}" for what in _twins(tree)]
    long = [
        f"{len(text.splitlines())} {path.relative_to(PACKAGE)}"
        for path, text in files.items()
        if len(text.splitlines()) > MOST_LINES and str(path.relative_to(PACKAGE)) not in TABLES
    ]
    return {
        f"files of more than {MOST_LINES} lines, without tables": sorted(
            long, key=lambda line: -int(line.split()[0])
        ),
        f"constructors with more than {MOST_ARGUMENTS} arguments": wide,
        "class names with two meanings": [
            f"{name}: {', '.join(sorted(places))}"
            for name, places in sorted(classes.items())
            if len(places) > 1
        ],
        "lines of async functions beside sync ones of the same name": twins,
        "retired words": list(_retired()),
        "lines of Python": [line for text in files.values() for line in text.splitlines()],
    }


def _wide_constructors(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    taken = item.args
                    number = len(taken.posonlyargs) + len(taken.args) + len(taken.kwonlyargs) - 1
                    if number > MOST_ARGUMENTS:
                        yield f"{node.name} takes {number}"


def _twins(tree: ast.Module) -> Iterator[str]:
    """The lines of async methods whose class has a sync twin, and of functions `aname` beside `name`."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.AsyncFunctionDef) and node.name.removeprefix("a") in functions:
            yield from (f"{node.name}:{line}" for line in _lines(node))
        elif (
            isinstance(node, ast.ClassDef)
            and (twin := classes.get(node.name.replace("Async", "", 1), node)) is not node
        ):
            sync = {item.name for item in twin.body if isinstance(item, ast.FunctionDef)}
            for item in node.body:
                if isinstance(item, ast.AsyncFunctionDef) and item.name in sync:
                    yield from (f"{node.name}.{item.name}:{line}" for line in _lines(item))


def _lines(node: ast.AsyncFunctionDef) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _retired() -> Iterator[str]:
    """Where a retired word stands in the library's Python, its Lua or its pages, but for quoted names."""
    words = re.compile(rf"(?<![\"'`\w.])(?:{'|'.join(RETIRED)})(?![\w\"'`])", re.IGNORECASE)
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.lua"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    for path in sorted(files):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            for found in words.finditer(line.replace("_", " ")):
                yield f"{path.relative_to(ROOT)}:{number}: {found[0]}"
