"""The command that serves agents as an MCP server."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version

import click

from openagents_worker.agents import load_agents
from openagents_worker.cli.commands.options import current_user
from openagents_worker.cli.mcp.agents import AgentTools, ServedAgent
from openagents_worker.cli.mcp.protocol import StdioServer
from openagents_worker.cli.streams import OutputLost
from openagents_worker.cli.terminal import err
from openagents_worker.errors import AgentNotFoundError, OpenAgentsError
from openagents_worker.producer.client import AsyncClient
from openagents_worker.settings import load_settings
from openagents_worker.suggest import agent_hint

__all__ = ["COMMANDS"]


@click.command("mcp")
@click.option("--agent", "agent_ids", multiple=True, help="Id of an agent. May be repeated. Default: all.")
@click.option("--by", default=None, help="Who approves calls. Default: the user of the operating system.")
@click.option("--json", "as_json", is_flag=True, help="No effect: the protocol is JSON.")
def mcp(agent_ids: tuple[str, ...], by: str | None, as_json: bool) -> None:
    """Serve agents as tools of an MCP server over stdio.

    A program that speaks the Model Context Protocol starts this command. Each agent that workers serve is a
    tool: its call submits a run and waits for the result. Further tools give results and events of runs,
    approve and deny calls, and cancel runs. Runs go on if the program ends.

    \b
    openagents-worker mcp --agent support --agent research
    """
    asyncio.run(_serve(agent_ids, by or current_user() or "mcp"))


async def _serve(agent_ids: Sequence[str], by: str) -> None:
    async with AsyncClient() as client:
        served = await _served(client, agent_ids)
        server = StdioServer(AgentTools(client, served, by=by), version("openagents-worker"))
        serving = asyncio.create_task(server.serve(), name="mcp server")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, serving.cancel)
        err(f"serving {', '.join(agent.id for agent in served)} over stdio")
        with suppress(asyncio.CancelledError):
            await serving
        if not server.is_answered:
            raise OutputLost(TimeoutError("the client has stopped reading"))


async def _served(client: AsyncClient, agent_ids: Sequence[str]) -> list[ServedAgent]:
    """The agents to offer. Raises `AgentNotFoundError` for one that no worker has announced."""
    known = [agent.id for agent in await client.agents()]
    for id_ in agent_ids:
        if id_ not in known:
            hint = agent_hint(id_, known)
            raise AgentNotFoundError(f"no worker has announced an agent {id_!r}", hint=hint, agent_id=id_)
    if not known:
        raise AgentNotFoundError(
            "no worker has announced an agent", hint="start a worker: openagents-worker worker"
        )
    described = _descriptions()
    return [ServedAgent(id_, described.get(id_) or _default(id_)) for id_ in agent_ids or sorted(known)]


def _descriptions() -> dict[str, str]:
    """What the agents file says about the agents, if it is on this machine."""
    with suppress(OpenAgentsError):
        agents = load_agents(load_settings().config).agents
        return {agent.id: getattr(agent, "description", None) or _default(agent.name) for agent in agents}
    return {}


def _default(name: str) -> str:
    return f"Asks the agent {name} and returns its answer. It may take minutes; progress is reported."


COMMANDS = (mcp,)
