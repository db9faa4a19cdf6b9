"""The stream of a reply: text that a model has sent and that no watcher has received yet."""

from __future__ import annotations

from openagents_worker.jsontext import dumps, whole_text

__all__ = ["ReplyStream"]

DELTA_CHARS = 64 * 1024  # of one `llm.delta` event


class ReplyStream:
    """The unsent text of a streamed reply, and how many characters were sent."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self.sent = 0

    @property
    def has_unsent(self) -> bool:
        return bool(self._parts)

    def add(self, text: str) -> None:
        if text:
            self._parts.append(text)

    def take(self, call: str, attempt: int) -> list[str]:
        """The payloads of `llm.delta` events for the unsent text, which counts as sent from now on."""
        unsent = "".join(self._parts)
        self._parts.clear()
        payloads = []
        for at in range(0, len(unsent), DELTA_CHARS):
            text = unsent[at : at + DELTA_CHARS]
            payload = {"call": call, "attempt": attempt, "offset": self.sent, "text": whole_text(text)}
            payloads.append(dumps(payload))
            self.sent += len(text)
        return payloads
