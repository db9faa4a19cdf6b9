"""Notes about messages that a run does not get: the only place that makes and recognises them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["is_omission_note", "omission_note"]

NAME = "omitted_messages"


def omission_note(text: str) -> dict[str, Any]:
    """The message for a model with the number of messages that are left out at its place.

    A provider gets its text at the beginning of the next user message. Many chat servers refuse a second
    system message. And the number changes in every run: a system prompt with it could not be cached.
    """
    return {"role": "system", "name": NAME, "content": text}


def is_omission_note(message: Mapping[str, Any]) -> bool:
    """Whether a message is such a note."""
    return message.get("role") == "system" and message.get("name") == NAME
