"""Signals: the only place where the library reports spans and measurements. By default nobody receives them.

An exporter receives spans and measurements; one process has at most one. Meters receive measurements only.

Names follow OpenTelemetry's semantic conventions for generative AI: the spans `invoke_agent`, `chat` and
`execute_tool`, and attributes that begin with `gen_ai.`. Our own names begin with `openagents.`. Prompts,
answers, arguments and results of tools are reported only if an exporter asks for them.

>>> with span("openagents.publish", {"messaging.batch.message_count": 2}) as current:
...     current.set("openagents.sent", 2)
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TypeVar

__all__ = [
    "NO_SPAN",
    "TRACEPARENT",
    "AttributeValue",
    "Exporter",
    "Meter",
    "Span",
    "annotate",
    "captures_content",
    "count",
    "in_inner_span",
    "inner_span",
    "is_enabled",
    "is_measuring",
    "observe",
    "register_exporter",
    "register_meter",
    "span",
    "traceparent_of",
    "unregister_exporter",
    "unregister_meter",
    "with_traceparent",
]

T = TypeVar("T")

AttributeValue = str | bool | int | float | tuple[str, ...]
TRACEPARENT = "traceparent"
"""The message header with the parent of the spans of a run (W3C Trace Context)."""


class Span(Protocol):
    """A span that has begun. An exception that leaves its block is recorded by the exporter."""

    def set(self, name: str, value: AttributeValue) -> None:
        """Set an attribute."""
        ...

    def fail(self, code: str) -> None:
        """Mark the span as failed, with the code of the error."""
        ...


class Meter(Protocol):
    """Receives the measurements of the process, in any thread. It must be fast and must not raise."""

    def count(self, name: str, value: float, attributes: Mapping[str, AttributeValue]) -> None:
        """Add `value` to a counter."""
        ...

    def observe(self, name: str, value: float, attributes: Mapping[str, AttributeValue]) -> None:
        """Add `value` to a distribution. Times are in seconds."""
        ...


class Exporter(Meter, Protocol):
    """Receives all signals of the process, in any thread. It must be fast and must not raise."""

    def span(
        self, name: str, attributes: Mapping[str, AttributeValue], parent: str
    ) -> AbstractContextManager[Span]:
        """A span from the entry to the exit of the block.

        Its parent is the span of the surrounding block; without one, the span that the traceparent `parent`
        names, if it is not empty.
        """
        ...

    def annotate(self, name: str, value: AttributeValue) -> None:
        """Set an attribute of the current span, if there is one."""
        ...

    def traceparent(self) -> str:
        """The traceparent (W3C Trace Context) of the current span; '' without one."""
        ...

    def traceparent_of(self, seed: str) -> str:
        """The traceparent that derives from a text: the same in every process."""
        ...

    @property
    def captures_content(self) -> bool:
        """Whether spans may contain prompts, answers, arguments and results."""
        ...


class _NoSpan:
    """The span while no exporter is registered."""

    __slots__ = ()

    def __enter__(self) -> _NoSpan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def set(self, name: str, value: AttributeValue) -> None: ...

    def fail(self, code: str) -> None: ...


NO_SPAN = _NoSpan()
NO_ATTRIBUTES: Mapping[str, AttributeValue] = {}
_exporter: Exporter | None = None
_meters: tuple[Meter, ...] = ()
"""The receivers of measurements, the exporter included."""


def register_exporter(exporter: Exporter) -> None:
    """Send all signals of this process to the exporter. Raises `RuntimeError` if there is another one."""
    global _exporter
    if _exporter is not None and _exporter is not exporter:
        raise RuntimeError("an exporter is registered already; combine exporters in one")
    _exporter = exporter
    register_meter(exporter)


def unregister_exporter() -> None:
    """Send no more signals. Without a registered exporter this has no effect."""
    global _exporter
    if _exporter is not None:
        unregister_meter(_exporter)
    _exporter = None


def register_meter(meter: Meter) -> None:
    """Send all measurements of this process to this meter too. A second call with it has no effect."""
    global _meters
    if not any(meter is each for each in _meters):
        _meters = (*_meters, meter)


def unregister_meter(meter: Meter) -> None:
    """Send no more measurements to this meter. If it is not registered, this has no effect."""
    global _meters
    _meters = tuple(each for each in _meters if each is not meter)


def is_enabled() -> bool:
    """Whether spans are received: only then it is worth computing their attributes."""
    return _exporter is not None


def is_measuring() -> bool:
    """Whether measurements are received: only then it is worth computing their attributes."""
    return bool(_meters)


def span(
    name: str, attributes: Mapping[str, AttributeValue] = NO_ATTRIBUTES, *, parent: str = ""
) -> AbstractContextManager[Span]:
    """A span for a `with` block; see `Exporter.span`."""
    return NO_SPAN if _exporter is None else _exporter.span(name, attributes, parent)


def inner_span(
    name: str, attributes: Mapping[str, AttributeValue] = NO_ATTRIBUTES
) -> AbstractContextManager[Span]:
    """A span inside the current one; without a current span nothing is reported."""
    return NO_SPAN if _exporter is None or not _exporter.traceparent() else span(name, attributes)


async def in_inner_span(work: Awaitable[T], name: str, attributes: Mapping[str, AttributeValue]) -> T:
    """Await something in an `inner_span`."""
    with inner_span(name, attributes):
        return await work


def count(name: str, value: float = 1, attributes: Mapping[str, AttributeValue] = NO_ATTRIBUTES) -> None:
    """Add to a counter."""
    for meter in _meters:
        meter.count(name, value, attributes)


def observe(name: str, value: float, attributes: Mapping[str, AttributeValue] = NO_ATTRIBUTES) -> None:
    """Add to a distribution. Times are in seconds."""
    for meter in _meters:
        meter.observe(name, value, attributes)


def annotate(name: str, value: AttributeValue) -> None:
    """Set an attribute of the current span, if there is one."""
    if _exporter is not None:
        _exporter.annotate(name, value)


def traceparent_of(seed: str) -> str:
    """A traceparent that derives from a text, so that all spans of a run belong to one trace."""
    return "" if _exporter is None else _exporter.traceparent_of(seed)


def captures_content() -> bool:
    """Whether spans may contain prompts, answers, arguments and results. By default they do not."""
    return _exporter is not None and _exporter.captures_content


def with_traceparent(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a submission, with a header that names the current span, or a new one without it.

    A header of this name that the caller has set is kept. Without an exporter, nothing is added.
    """
    headers = options.get("headers") or {}
    if _exporter is None or not isinstance(headers, Mapping) or TRACEPARENT in headers:
        return options
    if not (parent := _exporter.traceparent()):
        with span("openagents.submit"):
            parent = _exporter.traceparent()
    return {**options, "headers": {TRACEPARENT: parent, **headers}} if parent else options
