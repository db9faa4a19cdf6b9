"""Metrics of how easy the code is to read, measured in a real run and in the sources.

A real worker executes a run. The pattern of this run records the call stack that led to it, over threads,
tasks and greenlets, and the modules that one of its model calls (over HTTP) passes through. The other metrics
are counted in the sources: long files, constructors with many arguments, class names with two meanings, code
that exists twice for sync and async callers, and words and names that were replaced. `--json FILE` stores the
figures, `--before FILE` compares them with stored ones, and `--names` lists everything that was counted.
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
from tests.support.supervised_deployment import table

ROOT = PACKAGE.parent
MAX_HOPS, MAX_MODULES, MAX_ARGUMENTS, MAX_LINES = 12, 14, 7, 400
MAX_TWINS = 140  # lines; what is left talks to sockets and event loops, or makes handles
TWINS = "lines of async functions beside sync ones of the same name"
TABLES = {"errors.py", "settings.py", "store/key_table.py"}
"""Files that may be long, because each is one table: the errors with their codes, and the settings."""

HOPS = "hops from the message to pattern.execute()"
MODULES = "modules that a model call passes through"
MEASURED = frozenset({HOPS, MODULES})
"""The figures that are measured in a run. The others are counted in the sources."""

LIMITS = {
    HOPS: MAX_HOPS,
    MODULES: MAX_MODULES,
    f"constructors with more than {MAX_ARGUMENTS} arguments": 0,
    f"files of more than {MAX_LINES} lines, without tables": 0,
    "class names with two meanings": 0,
    TWINS: MAX_TWINS,
    "retired words": 0,
    "retired names": 0,
}

RUNS = 3

RETIRED = (
    r"carr(?:y|ies|ied|ier|iers|ying)",
    r"(?:un)?told|tells?|tellings?",
    r"crew",
    r"bodies",
    r"intake",
    r"keeping",
    r"lanes?",
    r"doors?",
    r"ledgers?",
    r"outlook",
    r"refusals?",
    r"call keys?",
    r"to master",
    r"note of run",
    r"(?<!there )(?:is|are|was|were|be) no (?!longer|more\b|other\b|such\b)[a-z]+",
    r"none of (?:a|ours)",
)
"""Words and phrases that were replaced everywhere, in code and in prose.

A quoted word is not counted: it may be a name that crosses a wire.
"""

OTHERS_TERMS = {
    "refusal": ("llm/", "testing/model_server/", "patterns/answers.py", "docs/messages.md"),
    "bodies": ("llm/", "testing/model_server/"),
    "tells": ("docs/agents-file.md",),
    "carrier": ("telemetry/opentelemetry.py",),
    "tell": (
        "submission/fork.py",
        "submission/new_run.py",
        "store/scripts/forking.py",
        "store/scripts/submission.py",
        "store/lua/delegate.lua",
        "store/lua/fork.lua",
        "store/lua/submit.lua",
    ),
    "UNTOLD": ("store/lua/delete_session.lua",),
}
"""Words of this list that have a meaning of their own in some files, and are not counted there.

`refusal` is a part of a reply in OpenAI's and Anthropic's formats. HTTP has bodies. OpenTelemetry propagates
a context in a carrier. A tool tells the time. `tell` is a stored field of a run, and `UNTOLD` an answer of a
script.
"""

RETIRED_MODULES = {
    "addresses": "redis_url",
    "bodies": "task_handlers",
    "broker": "kombu_redis",
    "channels": "pubsub",
    "crew": "process_provider",
    "intake": "message",
    "job": "pool_task",
    "keeping": "durability",
    "lanes": "batching, connection_pool",
    "ledger": "writer",
    "master": "sentinel",
    "notices": "cancel_listener",
    "outcome": "task_state",
    "place": "call_ids",
    "refusal": "invalid_messages",
    "room": "free_slots",
    "rows": "flower_repair",
    "step": "bootsteps",
    "tellings": "completion_messages",
    "transport": "publisher",
}
RETIRED_CLASSES = {
    "Call": "ScriptCall",
    "Carried": "AttemptResult",
    "Carrier": "RunHost",
    "Crew": "ProcessProvider",
    "Head": "RunHead",
    "Host": "ProcessProvider",
    "Job": "PoolTask",
    "Keeping": "PersistenceInfo",
    "Lanes": "PipelineBatcher, ConnectionPool",
    "Ledger": "RunWriter",
    "Order": "PoolRequest",
    "Outlook": "AttemptOutcome",
    "Places": "CallIds",
    "Rows": "FlowerRepair",
    "ToMaster": "SentinelConnection",
    "Watch": "LoopWatchdog, EventCursor",
}
RETIRED_FUNCTIONS = {
    "canvas": "task_options",
    "carried": "owned_runs, drive",
    "carry": "run, execute",
    "carry_out": "execute",
    "door": "script function",
    "keeping": "durability",
    "lane": "write_lock",
    "lanes": "batcher, connection pool",
    "note": "emit",
    "note_of_run": "emit",
    "notices": "control_channel",
    "place": "call_id",
    "refusal": "invalid message",
    "room": "free_slots",
    "rows": "flower_repair",
    "say": "emit",
    "tell": "notify",
    "tell_celery": "report_to_celery",
    "tellings": "completion_acks",
    "tie": "install_bootsteps",
    "told": "notified, translated, payload, announced",
    "untold": "notify_pending",
    "wanted": "parse_message",
}
"""Names that no module, class or function may have, and what stands in their place. Some of these words are
common in prose, where they stay."""


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table. Return 0 if every figure is within its limit."""
    parser = argparse.ArgumentParser(prog="python -m bench structure", description=__doc__)
    parser.add_argument("--json", type=Path, help="store the figures in this file")
    parser.add_argument("--before", type=Path, help="compare with the figures of this file")
    parser.add_argument("--names", action="store_true", help="also list what was counted")
    options = parser.parse_args(arguments)
    found = {**measured_in_a_run(), **counted_in_sources()}
    before: Mapping[str, Any] = json.loads(options.before.read_text()) if options.before else {}
    rows = [
        {
            "figure": figure,
            "before": before.get(figure, ""),
            "now": len(names),
            "limit": LIMITS.get(figure, ""),
        }
        for figure, names in found.items()
    ]
    table("How easy the code is to read", rows)
    if options.names:
        for figure, names in found.items():
            print(f"\n--- {figure}\n" + "\n".join(map(str, names)))
    if options.json:
        options.json.write_text(json.dumps({row["figure"]: row["now"] for row in rows}, indent=2) + "\n")
    return max(len(found[figure]) > limit for figure, limit in LIMITS.items())


# --- measured in a run -----------------------------------------------------------------------------------


def measured_in_a_run() -> dict[str, list[str]]:
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
        HOPS: hops[first:],
        MODULES: min(calls, key=len),
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


# --- counted in the sources ------------------------------------------------------------------------------


def counted_in_sources() -> dict[str, list[str]]:
    """The metrics of the sources; each is the list of what was counted."""
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
        if len(text.splitlines()) > MAX_LINES and str(path.relative_to(PACKAGE)) not in TABLES
    ]
    return {
        f"files of more than {MAX_LINES} lines, without tables": sorted(
            long, key=lambda line: -int(line.split()[0])
        ),
        f"constructors with more than {MAX_ARGUMENTS} arguments": [each for each in wide if each not in WIDE],
        WIDE_FIGURE: [each for each in wide if each in WIDE],
        "class names with two meanings": [
            f"{name}: {', '.join(sorted(places))}"
            for name, places in sorted(classes.items())
            if len(places) > 1
        ],
        TWINS: twins,
        "retired words": list(retired_words()),
        "retired names": retired_names(),
        "lines of Python": [line for text in files.values() for line in text.splitlines()],
    }


WIDE_FIGURE = "constructors with many arguments that stay"
WIDE = {
    "agents/code.py: Agent takes 12": "its arguments are the public form of an agent in Python",
}
"""Constructors with many arguments that stay, and why. One more argument is counted again."""

STAY = {
    "runtime/place.py: _place": "goes with the replay by place",
    "runtime/place.py: place": "goes with the replay by place",
    "store/keys.py: notices": "the name of the key",
}
"""Retired names that stay, and why."""


def retired_names() -> list[str]:
    """The modules, classes and functions with a retired name that does not stay, as `file: name`."""
    return [name for name in names_of_the_list() if name not in STAY]


def names_of_the_list() -> list[str]:
    """The modules, classes and functions of the library that have a retired name, as `file: name`.

    Leading underscores of a name do not count.
    """
    kinds = {"class": RETIRED_CLASSES, "def": RETIRED_FUNCTIONS}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        names = [path.stem] if path.stem in RETIRED_MODULES else []
        for kind, name in re.findall(r"^ *(?:async )?(class|def) (\w+)", path.read_text(), re.MULTILINE):
            if name.lstrip("_") in kinds[kind] and name not in names:
                names.append(name)
        found += [f"{path.relative_to(PACKAGE)}: {name}" for name in names]
    return found


def _wide_constructors(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    taken = item.args
                    number = len(taken.posonlyargs) + len(taken.args) + len(taken.kwonlyargs) - 1
                    if number > MAX_ARGUMENTS:
                        yield f"{node.name} takes {number}"


def _twins(tree: ast.Module) -> Iterator[str]:
    """The lines of async methods whose class has a sync version, and of functions `aname` beside `name`."""
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


def retired_words() -> Iterator[str]:
    """Where a retired word stands in the library's Python, its Lua or the documentation.

    A word in quotation marks or backquotes is not counted.
    """
    words = re.compile(rf"(?<![\"'`\w.])(?:{'|'.join(RETIRED)})(?![\w\"'`])", re.IGNORECASE)
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.lua"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    for path in sorted(files):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            for found in words.finditer(_spaced(line)):
                if not _is_others_term(found[0], path):
                    yield f"{path.relative_to(ROOT)}:{number}: {found[0]}"


def _is_others_term(word: str, path: Path) -> bool:
    places = OTHERS_TERMS.get(word, OTHERS_TERMS.get(word.lower(), ()))
    name = str(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT))
    return name.startswith(places) if places else False


def _spaced(text: str) -> str:
    """The text with spaces between the words of each name: `ToMaster` and `to_master` give `To Master`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).replace("_", " ")
