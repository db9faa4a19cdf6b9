"""Commands about the configuration: the agents file, its schema, the environment."""

from __future__ import annotations

import json
import os

import click

from openagents_worker.agents import AppConfig, load_agents, notices
from openagents_worker.cli.commands.options import as_json_option, need
from openagents_worker.cli.terminal import dump, err, out
from openagents_worker.errors import ConfigValidationError
from openagents_worker.settings import load_settings, unknown_variables

__all__ = ["COMMANDS"]


@click.command()
@click.argument("file", required=False)
@as_json_option
def validate(file: str | None, as_json: bool) -> None:
    """Check the agents file and the settings.

    FILE, else OPENAGENTS_CONFIG; with its plugins, and the OPENAGENTS_ variables of the environment.
    """
    need("worker")
    from openagents_worker.runtime.assembly import Assembly

    if unknown := unknown_variables(os.environ):
        raise ConfigValidationError(
            "; ".join(f"{name}: no such setting" for name, _ in unknown),
            hint="; ".join(f"did you mean {meant}?" for _, meant in unknown if meant) or None,
        )
    settings = load_settings()
    settings = settings if file is None else settings.model_copy(update={"config": file})
    config = load_agents(settings.config)
    Assembly.from_settings(settings)
    agents, remarks = [agent.id for agent in config.agents], notices(config)
    if as_json:
        dump({"file": settings.config, "agents": agents, "notices": remarks})
        return
    out(f"{settings.config}: valid; agents: {', '.join(agents)}")
    for remark in remarks:
        err(f"note: {remark}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same: a schema is JSON.")
def schema(as_json: bool) -> None:
    """Print the JSON Schema of the agents file."""
    out(json.dumps(AppConfig.model_json_schema(), indent=None if as_json else 2, ensure_ascii=False))


COMMANDS = (validate, schema)
