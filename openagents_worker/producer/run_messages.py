"""Messages to runs. The only place that gives handles their methods to send something to a run."""

from __future__ import annotations

from openagents_worker.producer import sending
from openagents_worker.producer.methods import asynchronous_of_run, blocking_of_run

__all__ = ["AsyncRunMessages", "RunMessages"]


class RunMessages:
    """The methods of `RunHandle` that send something to its run."""

    send = blocking_of_run(sending.send)
    steer = blocking_of_run(sending.steer)
    extend = blocking_of_run(sending.extend)


class AsyncRunMessages:
    """The methods of `AsyncRunHandle` that send something to its run."""

    send = asynchronous_of_run(sending.send)
    steer = asynchronous_of_run(sending.steer)
    extend = asynchronous_of_run(sending.extend)
