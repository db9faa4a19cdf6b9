"""A plugin module of workers: each call of the model gets an API key with the time at which it began.

A process that only runs the harness must not: the function is registered for all models of its process.
"""

from __future__ import annotations

import time

from chaos.plugins import BEGUN
from openagents_worker import register_api_keys

__all__: list[str] = []

register_api_keys(lambda provider, tenant: f"{BEGUN}{time.monotonic()}")
