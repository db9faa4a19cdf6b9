"""Tools that write to the log in every way, and a Celery app in which they are registered."""

from __future__ import annotations

import logging
import logging.config
import os
import threading
import warnings

from celery import Celery, signals
from celery.utils.log import get_task_logger

from openagents_worker import register, tool
from tests.runtime.failing import price_of

__all__ = ["app", "noise", "noise_elsewhere"]

app = Celery("shop", broker=os.environ.get("OPENAGENTS_REDIS_URL"), set_as_current=False)
app.conf.worker_pool = "openagents_worker.celery.pool:TaskPool"
LOG_OF_ITS_OWN = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"shop": {"format": "shop says: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "shop"}},
    "root": {"handlers": ["console"], "level": "INFO"},
}


if os.environ.get("NOISY_LOG"):

    @signals.setup_logging.connect(weak=False)
    def _set_up(**_: object) -> None:
        logging.config.dictConfig(LOG_OF_ITS_OWN)


if os.environ.get("NOISY_REGISTER"):
    register(app)


@tool(cpu_bound=True)
def noise_elsewhere(order: str) -> int:
    """Write to the log in another process."""
    print("printed elsewhere", order)
    logging.getLogger("shop.elsewhere").warning("a line of another process")
    warnings.warn("an old way elsewhere", UserWarning, stacklevel=1)
    return 1


@tool
def noise(order: str) -> int:
    """Write to the log in every way, then fail."""
    print("printed", order)
    logging.getLogger("shop.orders").error("two\nlines of %s", order)
    get_task_logger("shop.tasks").warning("a task's line")
    for name in ("kombu", "celery.worker.strategy", "httpx"):
        logging.getLogger(name).warning("a line of %s", name)
    logging.getLogger("multiprocessing").error("a line of billiard's")
    logging.getLogger("shop").error("%d of them", "not a number")
    warnings.warn("an old way", UserWarning, stacklevel=1)
    thread = threading.Thread(target=price_of, args=("thread",))
    thread.start()
    thread.join()
    return price_of(order)
