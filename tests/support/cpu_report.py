"""The cost of the tests: processor time per file and per test, printed with `make test ARGS=--cpu-report`.

Processor time says more than the duration on a machine that does other things, too. It includes the processes
that a test starts, as soon as they have ended. A process that serves a whole file counts for the last test of
the file, so the table of files is the exact one. `--cpu-report=LINES` prints longer tables.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Generator, Iterable

import pytest

NAME = "cpu_s"

_spent_s = 0.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-report",
        nargs="?",
        const=40,
        type=int,
        metavar="LINES",
        help="print the processor time of the dearest files and tests, by default 40 of each",
    )


def cpu_s() -> float:
    """The processor time of this process and of the child processes that have ended, in seconds."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what was spent since the previous report, so fixtures count for the test that needs them first."""
    global _spent_s
    report = yield
    before, _spent_s = _spent_s, cpu_s()
    report.user_properties = [*report.user_properties, (NAME, _spent_s - before)]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not (lines := config.getoption("--cpu-report")):
        return
    reports = [report for found in terminalreporter.stats.values() for report in found]
    terminalreporter.section("processor time in seconds")
    tests = (report for report in reports if isinstance(report, pytest.TestReport))
    terminalreporter.write_line("\n".join(cpu_lines(tests, lines)))


def cpu_lines(reports: Iterable[pytest.TestReport], lines: int) -> list[str]:
    """The table: the sum, this many of the dearest files and of the dearest tests."""
    files: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for report in reports:
        spent_s = sum(value for name, value in report.user_properties if name == NAME)
        files[report.nodeid.partition("::")[0]] += spent_s  # type: ignore[assignment]  # seconds
        tests[report.nodeid] += spent_s  # type: ignore[assignment]  # seconds
    dearest = [*files.most_common(lines), *tests.most_common(lines)]
    return [f"{sum(files.values()):8.1f}  all", *(f"{spent_s:8.1f}  {name}" for name, spent_s in dearest)]
