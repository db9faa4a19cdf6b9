"""Actions on runs. The only place that executes what a user does on a page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from openagents_worker.dashboard.page import ActionHandler, no_page
from openagents_worker.errors import RequestInvalid
from openagents_worker.models.budget import EXTENDABLE

__all__ = ["ACTIONS", "RunAction"]


class RunAction(ActionHandler):
    """`POST /run/{id}/{action}`: executes the action and returns to the page of the run."""

    async def post(self, run_id: str, action: str) -> None:
        execute = ACTIONS.get(action)
        if execute is None:
            no_page(f"there is no action {action[:40]!r}")
        shown_run = await execute(self, run_id) or run_id
        if self.get_body_argument("from", "") == "approvals":
            self.redirect(f"{self.prefix}/approvals", status=303)
        else:
            self.redirect(self.run_path(shown_run), status=303)


async def _approve(page: RunAction, run_id: str) -> None:
    arguments = page.json_field("arguments")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise RequestInvalid("arguments must be a JSON object", hint='as in {"name": "value"}')
    await page.client.approve(
        run_id, page.needed("call"), by=page.user, arguments=arguments, note=page.field("note")
    )


async def _deny(page: RunAction, run_id: str) -> None:
    await page.client.deny(run_id, page.needed("call"), by=page.user, note=page.field("note"))


async def _cancel(page: RunAction, run_id: str) -> None:
    await page.client.cancel(run_id, page.field("reason") or f"cancelled by {page.user}")


async def _resume(page: RunAction, run_id: str) -> None:
    await page.client.resume(run_id, by=page.user)


async def _fork(page: RunAction, run_id: str) -> str:
    text = page.field("input")
    options: dict[str, Any] = {} if text is None else {"input_text": text}
    handle = await page.client.fork(run_id, page.needed("checkpoint"), **options)
    return handle.id


async def _resolve(page: RunAction, run_id: str) -> None:
    action: Any = page.needed("action")
    result = page.json_field("result") if action == "skip" else None
    await page.client.resolve(
        run_id, page.needed("call"), action, by=page.user, result=result, note=page.field("note")
    )


async def _extend(page: RunAction, run_id: str) -> None:
    limits = {name: page.json_field(name) for name in EXTENDABLE}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    await page.client.extend(run_id, given, by=page.user)


async def _steer(page: RunAction, run_id: str) -> None:
    await page.client.steer(run_id, page.needed("text"), by=page.user)


async def _send(page: RunAction, run_id: str) -> None:
    await page.client.send(run_id, page.needed("name"), page.json_field("value"))


ACTIONS: Mapping[str, Callable[[RunAction, str], Awaitable[str | None]]] = {
    "approve": _approve,
    "deny": _deny,
    "cancel": _cancel,
    "resume": _resume,
    "fork": _fork,
    "resolve": _resolve,
    "extend": _extend,
    "steer": _steer,
    "send": _send,
}
"""What a user can do with a run. An action may return the id of another run to show."""
