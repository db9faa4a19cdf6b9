"""The suite itself: no test depends on how fast the machine is that it runs on.

A clock shows how long the machine took, which is nothing that a test can promise; a sleep is a guess at when
something will have happened. Tests inject a clock or wait for a condition (`tests/support/waiting.py`,
`tests/support/clocks.py`). What needs real time has the mark `slow`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CLOCKS = {"monotonic", "perf_counter", "process_time", "thread_time", "time"}
CLOCKS |= {f"{name}_ns" for name in CLOCKS}
_MENTIONED = re.compile(rf"\.({'|'.join([*sorted(CLOCKS), 'sleep'])})\b")

ALLOWED = {  # a file, and a function in it: why
    "support/waiting.py wait_for": "the one place that gives up waiting",
    "support/waiting.py await_for": "the same for asyncio",
    "support/guards.py _guard_loops.measured": "processor time of one thread, which other load does not use",
    "pool/test_lag.py hold_the_gil": "processor time: it computes until it has used enough",
    "pool/test_lag.py block_until_seen": "it blocks a loop on purpose, until the watch has seen that",
    "runtime/test_attempt.py test_a_worker_that_is_not_registered_claims_no_run": "nothing happens meanwhile",
    "runtime/test_stop.py test_tasks_that_a_pattern_has_started_stop_with_its_run": "nothing happens then",
    "runtime/test_stop.py test_a_run_waits_for_its_thread": "nothing happens meanwhile",
    "worker/test_connection_checks.py test_a_slow_network_that_cuts_connections_is_not_a_death": "slow link",
    "faults/test_full_queue.py _wait_until_nothing_comes.quiet": "for a slow test: Celery never says that",
}
MADE_UP = {"replay/programs.py", "replay/test_rules.py", "replay/world.py"}
"""Where time is virtual: the clock of `tests/replay/world.py` jumps to the next timer."""


class Finding(str):
    """`file function`; `why` has the line and the mistake."""

    why: str

    def __new__(cls, where: str, line: int, what: str) -> Finding:
        made = super().__new__(cls, where)
        made.why = f"{where} (line {line}): {what}"
        return made


def findings(source: str, file: str) -> Iterator[Finding]:
    """The places where a test compares times of a clock, or sleeps, except in tests marked `slow`."""
    if not _MENTIONED.search(source):
        return  # most files: parsing all of them takes a minute on a busy machine
    tree = ast.parse(source)
    if not _is_slow([node.value for node in tree.body if isinstance(node, ast.Assign)]):
        is_test = Path(file).name.startswith(("test_", "conftest"))
        yield from _in_body(tree, file, (), frozenset(), is_test)


def _in_body(
    body: ast.AST, file: str, names: tuple[str, ...], known: frozenset[str], is_test: bool
) -> Iterator[Finding]:
    """`known`: variables of outer functions that contain a time of a clock."""
    nodes = list(_own_nodes(body))
    timed = set(known)
    for _ in range(2):  # a variable may be made of one that is assigned further down
        timed |= {name for node in nodes for name in _assigned(node) if _shows_time(_value(node), timed)}
    where = f"{file} {'.'.join(names) or '(module)'}"
    for node in nodes:
        if isinstance(node, ast.Compare) and _shows_time(node, timed):
            yield Finding(where, node.lineno, "compares what a clock showed")
        elif is_test and isinstance(node, ast.Call) and _is_sleep(node):
            yield Finding(where, node.lineno, "sleeps")
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not _is_slow(node.decorator_list):
            yield from _in_body(node, file, (*names, node.name), frozenset(timed), is_test)


def _own_nodes(body: ast.AST) -> Iterator[ast.AST]:
    """Its nodes; of functions and classes in it only that they are there."""
    for child in ast.iter_child_nodes(body):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _own_nodes(child)


def _assigned(node: ast.AST) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
        for target in targets:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def _value(node: ast.AST) -> ast.AST:
    value: ast.AST = getattr(node, "value", None) or ast.Constant(None)
    return value


def _shows_time(node: ast.AST, timed: set[str]) -> bool:
    return any(
        _is_clock(part) or (isinstance(part, ast.Name) and part.id in timed) for part in ast.walk(node)
    )


def _is_clock(node: ast.AST) -> bool:
    """`time.monotonic`, `loop.time` and similar calls, but not TIME of Redis, which tests may compare."""
    if not isinstance(node, ast.Attribute) or node.attr not in CLOCKS:
        return False
    owner = ast.unparse(node.value)
    return owner == "time" or owner.endswith(("loop", "loop()"))


def _is_sleep(call: ast.Call) -> bool:
    named = isinstance(call.func, ast.Attribute) and call.func.attr == "sleep"
    of = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    return named and of in ("time", "asyncio") and ast.unparse(call.args[0]) != "0"


def _is_slow(nodes: list[ast.expr]) -> bool:
    return any("mark.slow" in ast.unparse(node) for node in nodes)


@cache
def everything() -> list[Finding]:
    files = sorted(TESTS.rglob("*.py"))
    named = {str(file.relative_to(TESTS)): file for file in files}
    return [
        found
        for name, file in named.items()
        if name not in MADE_UP
        for found in findings(file.read_text("utf-8"), name)
    ]


def test_no_test_measures_time_or_sleeps() -> None:
    """Both pass on an idle machine and fail on a busy one."""
    assert [found.why for found in everything() if found not in ALLOWED] == []


def test_every_exception_is_one() -> None:
    """An entry that nothing needs any more would hide the next test of that name."""
    assert set(ALLOWED) - set(everything()) == set()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("began = time.monotonic(); work(); assert time.monotonic() - began < 5", 1),
        ("clock = asyncio.get_running_loop().time; began = clock(); assert clock() - began < 5", 1),
        ("took = time.perf_counter() - began; assert took == pytest.approx(1)", 1),
        ("time.sleep(1)", 1),
        ("await asyncio.sleep(0.01)", 1),
        ("await asyncio.sleep(0)", 0),
        ("seconds, micros = redis.time(); assert seconds > 0", 0),
        ("entry = {'at': time.time()}", 0),
    ],
)
def test_what_is_found(line: str, found: int) -> None:
    """Also where the clock is called by another name, and in a function of a function."""
    function = f"async def test() -> None:\n    {line}\n"
    nested = f"def outer():\n    async def test() -> None:\n        {line}\n"
    slow = f"@pytest.mark.slow\n{function}"

    assert len(list(findings(function, "test_it.py"))) == found
    assert len(list(findings(nested, "test_it.py"))) == found
    assert list(findings(slow, "test_it.py")) == []
