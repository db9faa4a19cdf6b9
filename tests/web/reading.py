"""Reading a streamed reply by the rule of docs/streaming.md for clients."""

from __future__ import annotations

from openagents_worker.events import RunEvent


class Screen:
    """Shows the reply of each call while its pieces arrive: each piece is put at its offset and ends the
    text."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.pieces: list[RunEvent] = []

    def show(self, event: RunEvent) -> None:
        if event.name != "llm.delta":
            return
        self.pieces.append(event)
        call, offset, text = (event.payload[key] for key in ("call", "offset", "text"))
        assert isinstance(call, str)
        assert isinstance(offset, int)
        known = self.texts.get(call, "")
        assert offset <= len(known), f"text is missing between {len(known)} and {offset}"
        self.texts[call] = known[:offset] + str(text)
