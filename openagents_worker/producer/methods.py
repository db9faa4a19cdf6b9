"""Methods of clients and handles. The only place that makes a method from a plan, for sync code or asyncio.

The plan is written once, with the signature and the docstring of the method. Its first argument is the
publishing app of the client. Each class names the plans that it offers:

    class Client:       record = blocking(plans.record)
    class AsyncClient:  record = asynchronous(plans.record)

A handle passes the id of its run as the next argument of the plan (`blocking_of_run`, `asynchronous_of_run`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from openagents_worker.producer.connection import AsyncConnection, Connection
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.store.client import Plan

__all__ = [
    "HasAsyncConnection",
    "HasConnection",
    "asynchronous",
    "asynchronous_of_run",
    "blocking",
    "blocking_of_run",
]

P = ParamSpec("P")
T = TypeVar("T")


class HasConnection(Protocol):
    """What a method or a handle needs from a client."""

    @property
    def connection(self) -> Connection: ...


class HasAsyncConnection(Protocol):
    """What a method or a handle needs from an async client."""

    @property
    def connection(self) -> AsyncConnection: ...


class _IsHandle(HasConnection, Protocol):
    @property
    def id(self) -> str: ...


class _IsAsyncHandle(HasAsyncConnection, Protocol):
    @property
    def id(self) -> str: ...


def blocking(
    plan: Callable[Concatenate[PublishingApp, P], Plan[T]],
) -> Callable[Concatenate[HasConnection, P], T]:
    """A method that executes the plan and returns its result."""

    @wraps(plan)
    def method(self: HasConnection, /, *args: P.args, **kwargs: P.kwargs) -> T:
        connection = self.connection
        return connection.execute(plan(connection.publishing, *args, **kwargs))

    return _described(method, plan, replaced=1)


def asynchronous(
    plan: Callable[Concatenate[PublishingApp, P], Plan[T]],
) -> Callable[Concatenate[HasAsyncConnection, P], Coroutine[Any, Any, T]]:
    """A coroutine method that executes the plan and returns its result."""

    @wraps(plan)
    async def method(self: HasAsyncConnection, /, *args: P.args, **kwargs: P.kwargs) -> T:
        connection = self.connection
        return await connection.execute(plan(connection.publishing, *args, **kwargs))

    return _described(method, plan, replaced=1)


def blocking_of_run(
    plan: Callable[Concatenate[PublishingApp, str, P], Plan[T]],
) -> Callable[Concatenate[_IsHandle, P], T]:
    """As `blocking`, for a method of a handle: the plan gets the id of its run."""

    @wraps(plan)
    def method(self: _IsHandle, /, *args: P.args, **kwargs: P.kwargs) -> T:
        connection = self.connection
        return connection.execute(plan(connection.publishing, self.id, *args, **kwargs))

    return _described(method, plan, replaced=2)


def asynchronous_of_run(
    plan: Callable[Concatenate[PublishingApp, str, P], Plan[T]],
) -> Callable[Concatenate[_IsAsyncHandle, P], Coroutine[Any, Any, T]]:
    """As `asynchronous`, for a method of a handle: the plan gets the id of its run."""

    @wraps(plan)
    async def method(self: _IsAsyncHandle, /, *args: P.args, **kwargs: P.kwargs) -> T:
        connection = self.connection
        return await connection.execute(plan(connection.publishing, self.id, *args, **kwargs))

    return _described(method, plan, replaced=2)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _described(method: _Method, plan: Callable[..., Any], *, replaced: int) -> _Method:
    """Give the method its signature, for `help()` and `inspect`: that of the plan, after `self`.

    `self` replaces the first parameters of the plan. The method returns the result of the plan.
    """
    declared = inspect.signature(plan)
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    result = str(declared.return_annotation).removeprefix("Plan[").removesuffix("]")
    parameters = list(declared.parameters.values())[replaced:]
    method.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": result}
    method.__signature__ = inspect.Signature([self, *parameters], return_annotation=result)  # type: ignore[attr-defined]  # `inspect` reads it
    return method
