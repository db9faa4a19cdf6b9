"""The command that looks for everything that keeps a deployment from executing runs safely."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click

from openagents_worker.agents import AppConfig
from openagents_worker.cli.commands.configuration import prepared
from openagents_worker.cli.commands.options import MODULES_OF_EXTRA, as_json_option
from openagents_worker.cli.doctor import (
    Finding,
    FindingKind,
    agent_findings,
    examine,
    without_variables_of_workers,
)
from openagents_worker.cli.exits import Exit, exit_code_of
from openagents_worker.cli.terminal import Safe, dump, joined, out, styled
from openagents_worker.errors import BrokerConfigError, OpenAgentsError
from openagents_worker.producer.client import Client
from openagents_worker.settings import PREFIX, Settings, load_settings

__all__ = ["COMMANDS"]

COLOURS = {FindingKind.OK: "green", FindingKind.NOTE: "yellow", FindingKind.PROBLEM: "red"}


@click.command()
@click.option("-A", "--app", default=None, help="A Celery app with runs, as for celery: shop.celery:app.")
@click.option("--fix", is_flag=True, help="Change the settings of Redis that lose runs.")
@as_json_option
def doctor(app: str | None, fix: bool, as_json: bool) -> int:
    """Look for everything that keeps this deployment from executing runs safely.

    Checks the agents and the keys of their models, Redis (version, memory, disk, clock, rights), the broker,
    the workers and their queues, and the variables of Flower. Each problem comes with what to do. The exit
    code is 0 if there is no problem, 2 if there is one, and 4 if Redis does not answer.

    \b
    openagents-worker doctor
    openagents-worker doctor -A shop.celery:app --fix

    --fix changes a running Redis only (maxmemory-policy, appendonly): change its file, too.
    """
    found: list[Finding] = []
    subject, code = "settings", Exit.SUCCESS
    try:
        settings = load_settings()
        config, found = _agents(settings, app)
        subject = "redis"
        with Client() as client:
            for finding in examine(client, config, os.environ, checks_rights=config is not None):
                found.append(_fixed(finding, client) if fix and finding.fix else finding)
            found = without_variables_of_workers(found, client)
    except OpenAgentsError as error:
        subject = "broker" if isinstance(error, BrokerConfigError) else subject
        found.append(Finding(FindingKind.PROBLEM, subject, f"{error.code}: {error.message}", error.hint))
        code = exit_code_of(error)
    if as_json:
        dump({"findings": [finding.to_json() for finding in found]})
    else:
        for finding in found:
            for line in _lines(finding):
                out(line)
    is_healthy = all(finding.kind is not FindingKind.PROBLEM for finding in found)
    return code or (Exit.SUCCESS if is_healthy else Exit.INVALID)


def _agents(settings: Settings, app: str | None) -> tuple[AppConfig | None, list[Finding]]:
    """The agents of this machine and what is wrong with them. A producer's machine has none."""
    if app is None and not _defines_agents(settings):
        text = f"no agents are defined here ({settings.config} does not exist): only workers need them"
        return None, [Finding(FindingKind.NOTE, "agents", text)]
    if not all(map(find_spec, MODULES_OF_EXTRA["worker"])):
        todo = "pip install 'openagents-worker[worker]'"
        return None, [Finding(FindingKind.NOTE, "agents", "not checked: the extra worker is missing", todo)]
    from openagents_worker.cli.validation import validated
    from openagents_worker.runtime.start_checks import remarks

    read = partial(validated, None, env=os.environ, prepare=partial(prepared, app))
    return agent_findings(read, remarks, partial(_agent_ids, settings))


def _agent_ids(settings: Settings) -> list[str]:
    """The ids of the agents of this machine; none if their file is not valid."""
    from openagents_worker.agents.code import read_agents

    try:
        config = read_agents(settings.config, may_be_absent=True).config
    except OpenAgentsError:
        return []
    return [agent.id for agent in config.agents] if config is not None else []


def _defines_agents(settings: Settings) -> bool:
    named = bool(settings.imports) or f"{PREFIX}CONFIG" in os.environ
    return named or Path(settings.config).exists()


def _fixed(finding: Finding, client: Client) -> Finding:
    """Do what the finding asks for, and say so."""
    assert finding.fix is not None
    try:
        finding.fix(client.store)
    except OpenAgentsError as error:
        return Finding(finding.kind, finding.subject, f"{finding.text}; {error.message}", finding.todo)
    return Finding(FindingKind.OK, finding.subject, f"fixed: {finding.text}", f"did {finding.todo}")


def _lines(finding: Finding) -> list[Safe]:
    kind = styled(f"{finding.kind:<8}", fg=COLOURS[finding.kind], bold=finding.kind is FindingKind.PROBLEM)
    lines = [joined(kind, f" {finding.subject:<8} ", finding.text)]
    return lines if finding.todo is None else [*lines, styled(f"{'':18}{finding.todo}", dim=True)]


COMMANDS = (doctor,)
