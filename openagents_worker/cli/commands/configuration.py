"""Commands about the configuration: the agents file, its schema, the environment."""

from __future__ import annotations

import json
import os

import click

from openagents_worker.agents import AppConfig, load_agents, notices
from openagents_worker.cli.commands.options import as_json_option, import_from_here, need
from openagents_worker.cli.display import dump
from openagents_worker.errors import ConfigValidationError
from openagents_worker.settings import Settings, load_settings, unknown_variables

__all__ = ["COMMANDS"]


@click.command()
@click.argument("file", required=False)
@click.option("-A", "--app", default=None, help="A Celery app with runs, as for celery: shop.celery:app.")
@as_json_option
def validate(file: str | None, app: str | None, as_json: bool) -> None:
    """Check the agents file (FILE, else OPENAGENTS_CONFIG), its plugins and the environment's settings.

    Plugins are imported as the worker imports them: from the current directory, too, and after the modules
    of the Celery app (-A) and Django's set-up.
    """
    need("worker")
    from openagents_worker.runtime.assembly import Assembly

    if unknown := unknown_variables(os.environ):
        raise ConfigValidationError(
            "; ".join(f"{name}: no such setting" for name, _ in unknown),
            hint="; ".join(f"did you mean {meant}?" for _, meant in unknown if meant) or None,
        )
    settings = _prepared(app)
    settings = settings if file is None else settings.model_copy(update={"config": file})
    config = load_agents(settings.config)
    Assembly.from_settings(settings)
    agents, remarks = [agent.id for agent in config.agents], notices(config)
    if as_json:
        dump({"file": settings.config, "agents": agents, "notices": remarks})
        return
    click.echo(f"{settings.config}: valid; agents: {', '.join(agents)}")
    for remark in remarks:
        click.echo(f"note: {remark}", err=True)


def _prepared(app: str | None) -> Settings:
    """The settings of the worker that is checked; what it imports before its plugins is imported."""
    from openagents_worker.worker.loading import load_app, prepare_as_worker, settings_of

    import_from_here()
    if app is not None:
        return settings_of(load_app(app), app)
    settings = load_settings()
    prepare_as_worker(settings)
    return settings


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same: a schema is JSON.")
def schema(as_json: bool) -> None:
    """Print the JSON Schema of the agents file."""
    click.echo(json.dumps(AppConfig.model_json_schema(), indent=None if as_json else 2, ensure_ascii=False))


COMMANDS = (validate, schema)
