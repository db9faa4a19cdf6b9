"""Error details. The only place that turns an exception into data that is stored and sent."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field

from openagents_worker.errors import OpenAgentsError, ProcessTraceback, text_of
from openagents_worker.jsontext import replaced
from openagents_worker.models.base import StoredModel
from openagents_worker.redaction import safe_message

__all__ = ["MAX_MESSAGE_CHARS", "ErrorDetails"]

MAX_MESSAGE_CHARS = 8_000  # a longer error message is cut


class ErrorDetails(StoredModel):
    """An error as data. `cause` is its `__cause__`, up to three levels.

    `context` has the ids of the run, step or tool, and the `traceback` if user code raised the error.
    """

    code: str
    message: str
    hint: str | None = None
    docs_url: str | None = None
    retryable: bool = False
    context: dict[str, Any] = Field(default_factory=dict)
    cause: ErrorDetails | None = None

    @property
    def traceback(self) -> str | None:
        """The traceback of your code that raised the error: redacted text, at most 8 KiB, only your frames.

        None for an error of this library, and for an error that an older version has stored.
        """
        text = self.context.get("traceback")
        return text if isinstance(text, str) else None if self.cause is None else self.cause.traceback

    @classmethod
    def from_exception(cls, error: BaseException, depth: int = 3) -> Self:
        """Any exception as data. An exception that is not an `OpenAgentsError` has the code
        `error.unknown`."""
        caused_by = None if isinstance(error.__cause__, ProcessTraceback) else error.__cause__
        cause = cls.from_exception(caused_by, depth - 1) if caused_by is not None and depth > 1 else None
        if isinstance(error, OpenAgentsError):
            if isinstance(error.traceback, str) and cause is not None:
                cause = cause._without_traceback()  # the traceback of the error includes its causes
            data = error.to_dict()
            data["message"] = safe_message(data["message"], MAX_MESSAGE_CHARS)
            data["hint"] = data["hint"] and safe_message(data["hint"], MAX_MESSAGE_CHARS)
            data["context"] = {k: _storable_or_text(v) for k, v in data["context"].items() if v is not None}
            return cls(**data, cause=cause)
        text = safe_message(text_of(error), MAX_MESSAGE_CHARS) or type(error).__name__
        return cls(code="error.unknown", message=f"{type(error).__name__}: {text}", cause=cause)

    def _without_traceback(self) -> Self:
        context = {name: value for name, value in self.context.items() if name != "traceback"}
        cause = None if self.cause is None else self.cause._without_traceback()
        return self.model_copy(update={"context": context, "cause": cause})


def _storable_or_text(value: Any) -> Any:
    """The value if it can be stored, else its text. A field of an error may contain any object."""
    try:
        return replaced(value)
    except (TypeError, ValueError):
        return safe_message(text_of(value), MAX_MESSAGE_CHARS)
