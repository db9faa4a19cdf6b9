"""A secret store, for a function that returns keys."""

from __future__ import annotations


class Vault:
    async def read(self, path: str) -> str:
        return f"key at {path}"


vault = Vault()
