"""A plugin module that registers the function with the planted keys of tenants. Only workers import it."""

from __future__ import annotations

from openagents_worker import register_api_keys
from tests.hostile.planted import TENANT_KEY

__all__: list[str] = []


def _key(provider: str, tenant: str | None) -> str:
    if tenant == "nobody":
        raise OSError(f"refused by the store: token={TENANT_KEY}")
    return TENANT_KEY


register_api_keys(_key)
