"""Event text: the only place that masks and limits the payloads of the events of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from openagents_worker.errors import StepTooLarge, text_of
from openagents_worker.jsontext import MAX_NESTING
from openagents_worker.redaction import MAX_VALUES, TooManyValues, redact, shown_json
from openagents_worker.runtime.services import Services
from openagents_worker.secret_text import mask_prose, mask_short_prose

__all__ = ["EventText", "masked_name"]

MAX_EVENT_NAME_CHARS = 256  # the same limit as for ids
UTF8_BYTES = 4  # largest size of one character


class EventText:
    """Makes the names and payloads of events, as they are stored."""

    def __init__(self, run_id: str, services: Services) -> None:
        self._run_id = run_id
        self._redact_keys = keys = services.assembly.redact_keys
        self.payload: Callable[[Mapping[str, Any]], str] = partial(shown_json, keys=keys)
        """The masked payload as JSON. Values beyond the limit are left out."""
        self._preview_chars = services.settings.event_preview_chars
        self._max_bytes = services.settings.max_payload_bytes

    def preview(self, content: Any) -> Any:
        """The masked and shortened content of a call, for an event. The journal holds the whole content."""
        return redact(content, self._redact_keys, max_chars=self._preview_chars, mask=mask_prose)

    def shown(self, content: Any) -> Any:
        """The masked content, not shortened."""
        return redact(
            content, self._redact_keys, max_chars=None, max_items=None, max_depth=MAX_NESTING, mask=mask_prose
        )

    def checked(self, name: str, payload: Mapping[str, Any]) -> tuple[str, str]:
        """Name and payload of an event of user code. Raises `StepTooLarge`.

        The limit counts values before they are masked.
        """
        name = masked_name(name)
        try:
            masked = shown_json(payload, self._redact_keys, is_whole=True)
        except TooManyValues:
            raise self._too_large(name, f"more than {MAX_VALUES:,} values") from None
        self._check_size(name, masked)
        return name, masked

    def _check_size(self, name: str, payload: str) -> None:
        most = self._max_bytes
        if len(name) > MAX_EVENT_NAME_CHARS:
            problem = f"{len(name):,} characters in its name, {MAX_EVENT_NAME_CHARS} are allowed"
        elif len(payload) * UTF8_BYTES > most and (size := len(payload.encode())) > most:
            problem = f"{size:,} bytes, {most:,} are allowed"
        else:
            return
        raise self._too_large(name, problem)

    def _too_large(self, name: str, problem: str) -> StepTooLarge:
        return StepTooLarge(
            f"the event {name[:40]!r} has {problem}",
            hint="emit a reference to the data, or several smaller events",
            run_id=self._run_id,
        )


def masked_name(name: object) -> str:
    """The name of an event as text, masked. A pattern may pass any object as a name."""
    return mask_short_prose(name if type(name) is str and name.isascii() else text_of(name))
