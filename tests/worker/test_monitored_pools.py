"""The ports of a worker with child processes, and whether its consumer is connected."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from openagents_worker.celery import bootsteps
from openagents_worker.settings import load_settings


@pytest.mark.parametrize(("index", "ports"), [(0, (9000, None)), (3, (9003, None))])
def test_each_child_of_a_prefork_pool_has_its_own_port(
    index: int, ports: tuple[int, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that takes the place of a dead one has its index, and so its port."""
    monkeypatch.setattr(bootsteps, "current_process", lambda: SimpleNamespace(index=index))
    settings = bootsteps._with_own_ports(load_settings({"OPENAGENTS_METRICS_PORT": "9000"}))

    assert (settings.metrics_port, settings.health_port) == ports


@pytest.mark.parametrize(
    ("consumer", "is_consuming"),
    [
        (None, False),
        (SimpleNamespace(connection=None, task_consumer=None), False),
        (SimpleNamespace(connection=SimpleNamespace(connected=True), task_consumer=None), False),
        (SimpleNamespace(connection=SimpleNamespace(connected=False), task_consumer=object()), False),
        (SimpleNamespace(connection=SimpleNamespace(connected=True), task_consumer=object()), True),
    ],
)
def test_a_worker_consumes_only_with_a_connection_and_a_consumer(
    consumer: object, is_consuming: bool
) -> None:
    """Before the first connection, and after a lost one, Celery has none of them."""
    assert bootsteps._is_consuming(SimpleNamespace(consumer=consumer)) is is_consuming
