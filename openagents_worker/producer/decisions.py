"""Decisions. The only place that gives clients and handles their methods to decide about calls."""

from __future__ import annotations

from openagents_worker.producer import deciding
from openagents_worker.producer.methods import (
    asynchronous,
    asynchronous_of_run,
    blocking,
    blocking_of_run,
)

__all__ = ["AsyncDecisions", "AsyncRunDecisions", "Decisions", "RunDecisions"]


class Decisions:
    """The methods of `Client` that decide about calls."""

    approve = blocking(deciding.approve)
    deny = blocking(deciding.deny)
    approvals = blocking(deciding.approvals)
    resolve = blocking(deciding.resolve)


class AsyncDecisions:
    """The methods of `AsyncClient` that decide about calls."""

    approve = asynchronous(deciding.approve)
    deny = asynchronous(deciding.deny)
    approvals = asynchronous(deciding.approvals)
    resolve = asynchronous(deciding.resolve)


class RunDecisions:
    """The methods of `RunHandle` that decide about calls of its run."""

    approve = blocking_of_run(deciding.approve)
    deny = blocking_of_run(deciding.deny)
    approvals = blocking_of_run(deciding.approvals_of_run)
    resolve = blocking_of_run(deciding.resolve)


class AsyncRunDecisions:
    """The methods of `AsyncRunHandle` that decide about calls of its run."""

    approve = asynchronous_of_run(deciding.approve)
    deny = asynchronous_of_run(deciding.deny)
    approvals = asynchronous_of_run(deciding.approvals_of_run)
    resolve = asynchronous_of_run(deciding.resolve)
