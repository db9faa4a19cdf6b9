"""A method of a client and that of its asyncio form are one plan: one signature, one docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

import pytest

from openagents_worker.errors import RunNotFound
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle

FORMS = [(Client, AsyncClient), (RunHandle, AsyncRunHandle)]
OF_ASYNCIO = {"RunHandle": "AsyncRunHandle", "Iterator": "AsyncIterator", "Generator": "AsyncGenerator"}
WITHOUT_TWIN = {
    "may_call_next": "for Celery's chains",
    "forget": "for code that uses Celery's results",
    "revoke": "ignores Celery's options",
    "state": "a property, as in Celery's results",
    "get": "has Celery's options",
    "wait": "has Celery's options",
    "aevents": "is the asyncio form of events",
}
"""Methods whose two forms differ, and why."""


def methods(kind: type) -> dict[str, Callable[..., Any]]:
    """The public methods of this library."""
    return {
        name: method
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and method.__module__.startswith("openagents_worker")
    }


def pairs() -> list[Any]:
    found = []
    for blocking, asynchronous in FORMS:
        one, other = methods(blocking), methods(asynchronous)
        for name in sorted({*one, *other} - WITHOUT_TWIN.keys()):
            found.append(pytest.param(one.get(name), other.get(name), id=f"{blocking.__name__}.{name}"))
    return found


@pytest.mark.parametrize(("one", "other"), pairs())
def test_both_forms_of_a_method_have_the_same_signature(one: Any, other: Any) -> None:
    """Names, kinds, defaults and types of the parameters, and the type of the result."""
    assert one is not None
    assert other is not None
    first, second = inspect.signature(one), inspect.signature(other)

    (self, *parameters), (also_self, *others) = first.parameters.items(), second.parameters.items()
    assert self[0] == also_self[0] == "self"
    assert parameters == others
    result, bracket, rest = str(first.return_annotation).partition("[")
    assert OF_ASYNCIO.get(result, result) + bracket + rest == str(second.return_annotation)


@pytest.mark.parametrize("kind", [kind for form in FORMS for kind in form])
def test_a_method_is_described_where_it_is_used(kind: type) -> None:
    """`help()` and an editor at run time show what the method takes, not what its plan takes."""
    for name, method in methods(kind).items():
        if name not in WITHOUT_TWIN:
            assert method.__name__.removesuffix("_of_run") == name
        hints = get_type_hints(method)  # every annotation can be resolved
        assert "publishing" not in hints
        assert "Plan" not in str(inspect.signature(method).return_annotation)


def test_the_methods_of_asyncio_are_coroutine_functions() -> None:
    """So that a mock of the class returns awaitables."""
    names = ["approve", "cancel", "delete_session", "record", "runs", "send", "submit", "workers"]

    assert all(inspect.iscoroutinefunction(getattr(AsyncClient, name)) for name in names)
    assert not any(inspect.iscoroutinefunction(getattr(Client, name)) for name in names)


async def test_an_error_of_a_plan_is_raised_by_both_forms(redis_url: str) -> None:
    with Client(redis_url) as client, pytest.raises(RunNotFound):
        client.record("nobody")
    async with AsyncClient(redis_url) as client_of_loop:
        pending: Coroutine[Any, Any, Any] = client_of_loop.record("nobody")
        with pytest.raises(RunNotFound):
            await pending
