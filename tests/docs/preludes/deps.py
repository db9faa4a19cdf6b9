"""A shop and its database."""

from contextlib import asynccontextmanager


@asynccontextmanager
async def connect(url):
    yield url


class Shop:
    def __init__(self, database):
        self.database = database


async def check():
    from openagents_worker.runtime.registry import DEPS

    async with DEPS.get("shop")() as made:
        assert isinstance(made, Shop)
