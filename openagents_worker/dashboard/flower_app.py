"""Flower with our pages. The only place that joins the pages of this library with the server of Flower."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

from celery import Celery
from flower.app import Flower, rewrite_handler
from flower.views import BaseHandler, monitor
from tornado import web
from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest

from openagents_worker.dashboard.access import HOSTS_VARIABLE, AllowedHosts, can_be_compared, check_listening
from openagents_worker.dashboard.fleet_metrics import fleet_registry, metrics_with_fleet
from openagents_worker.dashboard.flower_options import format_task, tasks_columns
from openagents_worker.dashboard.log_text import escape_log_lines
from openagents_worker.dashboard.routes import PAGES
from openagents_worker.dashboard.sockets import read_sockets_as_celery_does
from openagents_worker.dashboard.templates import PageTemplates
from openagents_worker.producer.app_binding import find_binding
from openagents_worker.producer.client import AsyncClient
from openagents_worker.producer.connection import connection_of

__all__ = ["FLOWERS_COLUMNS", "FlowerWithPages", "flower_for", "show_runs_as_tasks"]

log = logging.getLogger("flower")
FLOWERS_COLUMNS = "name,uuid,state,received,runtime,worker"
"""The default of Flower's option `tasks_columns`."""


def flower_for(*, capp: Celery, options: Any, **settings: Any) -> Flower:
    """Flower for an app: with our pages if the app has our tasks, else as it is.

    Exits with code 2 if Flower would be open to others without a password.
    """
    binding = find_binding(capp)
    if binding is None or not binding.kind.has_tasks:
        return Flower(capp=capp, options=options, **settings)
    check_listening(options)
    escape_log_lines()
    read_sockets_as_celery_does()
    show_runs_as_tasks(options)
    if options.auth:
        log.warning("/metrics is readable without a login: scrapers cannot log in with OAuth")
    return FlowerWithPages(capp=capp, options=options, **settings)


def show_runs_as_tasks(options: Any) -> None:
    """Show runs on Flower's page of tasks in plain words, unless its configuration says otherwise."""
    if options.format_task is None:
        options.format_task = format_task
    if options.tasks_columns == FLOWERS_COLUMNS:
        options.tasks_columns = tasks_columns


class FlowerWithPages(Flower):  # type: ignore[misc]  # Flower has no types
    """Flower's application with our pages. Every request must have an allowed `Host`."""

    def __init__(self, *, capp: Celery, options: Any, **settings: Any) -> None:
        settings["template_loader"] = PageTemplates(settings["template_path"])
        super().__init__(capp=capp, options=options, **settings)
        self.allowed_hosts = AllowedHosts.of(options)
        self.client = AsyncClient.over(connection_of(capp).for_asyncio)
        self.fleet = fleet_registry(self.client.settings)
        pages = [*PAGES, web.url(r"/metrics", GuardedMetrics)]
        if options.url_prefix:
            pages = [rewrite_handler(page, options.url_prefix) for page in pages]
        self.add_handlers(".*", pages)

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> HTTPMessageDelegate:
        """The handler of a request; of one to another host, or with a password that Flower cannot compare, a
        handler that refuses it."""
        if not self.allowed_hosts.allow(request.host):
            refused: HTTPMessageDelegate = self.get_handler_delegate(request, OtherHost)
            return refused
        has_password = bool(self.options.basic_auth)
        if has_password and not can_be_compared(request.headers.get("Authorization", "")):
            denied: HTTPMessageDelegate = self.get_handler_delegate(request, WrongPassword)
            return denied
        found: HTTPMessageDelegate = super().find_handler(request, **kwargs)
        return found


class OtherHost(web.RequestHandler):
    """Refuses a request to another host."""

    def check_xsrf_cookie(self) -> None:
        """A request that is refused needs no cookie."""

    def prepare(self) -> None:
        host = self.request.host[:200]
        self.set_status(403)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(
            f"Flower does not answer to the host {host!r}.\n"
            f"hint: open it at the address it listens on, or set {HOSTS_VARIABLE}=name[,name]\n"
        )


class WrongPassword(web.RequestHandler):
    """Refuses a password that is not ASCII text, as Flower refuses a wrong one."""

    def check_xsrf_cookie(self) -> None:
        """A request that is refused needs no cookie."""

    def prepare(self) -> None:
        self.set_status(401)
        self.set_header("WWW-Authenticate", 'Basic realm="flower"')
        self.finish("Access denied")


class GuardedMetrics(monitor.Metrics):  # type: ignore[misc]  # as above
    """Flower's metrics, and those of the fleet. They ask for the password of Flower, if it has one."""

    def prepare(self) -> Awaitable[None] | None:
        if self.application.options.basic_auth:
            BaseHandler.get_current_user(self)  # raises HTTPError 401
        return None

    async def get(self) -> None:
        """In a thread, so that no page waits while Redis does not answer."""
        self.application.purge_offline_worker_metrics()
        fleet = self.application.fleet
        self.write(await asyncio.get_running_loop().run_in_executor(None, metrics_with_fleet, fleet))
        self.set_header("Content-Type", "text/plain")
