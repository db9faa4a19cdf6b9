"""The weather service of a product."""

from openagents_worker import tool


async def ask_the_service(city, *, idempotency_key):
    return {"city": city, "key": idempotency_key}


def check():
    assert weather.tool_name == "weather"
