"""The command that asks the worker on this machine for its health, for probes that execute a command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException

import click

from openagents_worker.cli.commands.options import as_json_option
from openagents_worker.cli.exits import Exit
from openagents_worker.cli.terminal import dump, joined, out, styled
from openagents_worker.errors import ConfigError
from openagents_worker.settings import Settings, load_settings

__all__ = ["COMMANDS"]

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - the worker listens there; it is asked here
MAX_ANSWER_BYTES = 10_000


@dataclass(frozen=True, slots=True)
class Check:
    """A check of a worker and its problem, '' if there is none."""

    name: str
    problem: str = ""


@click.command()
@click.option("--live", is_flag=True, help="Ask only whether the worker must be restarted (/livez).")
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    default=None,
    help="Port of its probes. [default: OPENAGENTS_HEALTH_PORT]",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 60),
    default=3.0,
    show_default=True,
    help="Seconds to wait for the answer.",
)
@as_json_option
def health(live: bool, port: int | None, timeout_s: float, as_json: bool) -> int:
    """Ask the worker on this machine whether it takes runs.

    For exec probes and health checks in its container: asks /readyz, or /livez with --live, and needs neither
    Redis nor the broker. The exit code is 0 if all checks are good, and 3 if one fails or nobody answers.

    \b
    openagents-worker health
    openagents-worker health --live --port 9808
    """
    settings = load_settings()
    port = port or settings.health_port
    if port is None:
        raise ConfigError(
            "the port of the probes is not known: OPENAGENTS_HEALTH_PORT is not set",
            hint="set it for the worker and for this command, or pass --port",
        )
    checks = _ask(settings, port, "/livez" if live else "/readyz", timeout_s)
    is_healthy = not any(check.problem for check in checks)
    if as_json:
        dump({"healthy": is_healthy, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            mark = styled("[-]", fg="red") if check.problem else styled("[+]", fg="green")
            out(joined(mark, f" {check.name}: {check.problem or 'ok'}"))
    return Exit.SUCCESS if is_healthy else Exit.RUN_FAILED


def _ask(settings: Settings, port: int, path: str, timeout_s: float) -> list[Check]:
    """The checks that the worker lists in its answer."""
    host = ANY_ADDRESS.get(settings.monitoring_address, settings.monitoring_address)
    connection = HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read(MAX_ANSWER_BYTES).decode(errors="replace")
    except (OSError, HTTPException) as error:
        return [Check("worker", f"no answer at {host}:{port} ({str(error) or type(error).__name__})")]
    finally:
        connection.close()
    checks = [_check_of(line) for line in text.splitlines() if line[:4] in ("[+] ", "[-] ")]
    is_good = answer.status == HTTPStatus.OK
    if not checks or is_good != all(not check.problem for check in checks):
        return [Check("worker", f"{host}:{port} answers {answer.status}, but not as a worker does")]
    return checks


def _check_of(line: str) -> Check:
    """A line of the answer: `[-] lease: none`."""
    name, _, problem = line[4:].partition(": ")
    return Check(name, problem if line.startswith("[-]") else "")


COMMANDS = (health,)
