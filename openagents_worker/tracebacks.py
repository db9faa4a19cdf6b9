"""Tracebacks. The only place that formats any exception as redacted text of limited length.

The text shows the frames of the user's code. Frames of this library, asyncio and Celery are collapsed into
one line, and so is a recursion. If the text is too long, the frames farthest from the raising line are
removed. The text contains source lines, but never local variables.
"""

from __future__ import annotations

import asyncio
import linecache
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import assert_never

from openagents_worker.errors import OpenAgentsError, ProcessTraceback, text_of
from openagents_worker.jsontext import whole_text
from openagents_worker.printable import escaped_line
from openagents_worker.redaction import redact, without_named_secrets
from openagents_worker.secret_forms import mask_secrets

__all__ = ["MAX_TRACEBACK_BYTES", "is_raised_by_user", "traceback_text"]

MAX_TRACEBACK_BYTES = 8 * 1024
MAX_MESSAGE_CHARS = 2_000  # in the message of one exception; some contain a page of HTML
MAX_SOURCE_CHARS = 200  # in one line of source; minified code has longer lines
MAX_LINKS = 8  # shown exceptions of a chain: the ones nearest to its two ends
MAX_WALKED_LINKS = 1_000
MAX_MEMBERS = 5  # shown exceptions of a group
MAX_GROUP_DEPTH = 3
MAX_FRAMES = 400  # different frames that are kept; a recursion has few different ones
MAX_NOTES = 5
SHORTEST_BLOCK_BYTES = 400

CAUSE = "The above exception was the direct cause of the following exception:"
CONTEXT = "During handling of the above exception, another exception occurred:"
HEAD = "Traceback (most recent call last):"


def traceback_text(
    error: BaseException, *, max_bytes: int = MAX_TRACEBACK_BYTES, collapse: bool = True
) -> str:
    """The exception with its causes, formatted as by Python, in at most `max_bytes` of UTF-8. Never raises.

    With `collapse=False` the frames of this library are shown, too, which is useful for its own errors.
    """
    try:
        text = _chain_text(error, max_bytes, collapse=collapse, depth=0)
    except Exception as problem:  # noqa: BLE001 - an exception's class may override anything
        text = f"{type(error).__name__}: <its traceback cannot be shown: {type(problem).__name__}>"
    return _cut(whole_text(_printable(text)), max_bytes)


def is_raised_by_user(error: BaseException) -> bool:
    """Whether code outside of this library raised the exception, according to its last frame."""
    last = None
    try:
        for last in _walked(error.__traceback__):  # noqa: B007 - the last one is wanted
            pass
    except Exception:  # noqa: BLE001 - an exception's class may override anything
        return False
    return last is not None and _kind_of_file(last[0]) is not _Kind.OURS


# --- frames ----------------------------------------------------------------------------------------------


class _Kind(StrEnum):
    USER = "user"
    LIBRARY = "library"
    OURS = "ours"  # this library, asyncio and Celery


_Place = tuple[str, int, str]  # file, line, name of the function


@dataclass(slots=True)
class _TracebackFrame:
    place: _Place
    kind: _Kind
    times: int = 1

    def text(self) -> str:
        file, line, name = self.place
        lines = [f'  File "{file}", line {line}, in {name}']
        if source := linecache.getline(file, line).strip():
            shown = without_named_secrets(str(redact(source, max_chars=MAX_SOURCE_CHARS)), quoted_only=True)
            lines.append(f"    {shown}")
        if self.times > 1:
            lines.append(f"  [the frame above {self.times - 1:,} more times]")
        return "\n".join(lines)


def _walked(trace: TracebackType | None) -> Iterator[_Place]:
    while trace is not None:
        code = trace.tb_frame.f_code
        yield code.co_filename, trace.tb_lineno, code.co_qualname
        trace = trace.tb_next


def _frames(error: BaseException) -> list[_TracebackFrame]:
    """The different frames of an exception, with the number of repetitions. Of too many, the middle is
    removed."""
    frames: list[_TracebackFrame] = []
    users_root: str | None = None
    for place in _walked(error.__traceback__):
        if frames and frames[-1].place == place:
            frames[-1].times += 1
            continue
        kind = _kind_of_file(place[0])
        if kind is not _Kind.OURS and users_root is None:
            users_root = _root_of(place[0])  # code that our code calls is user code, also if it is installed
        if kind is _Kind.LIBRARY and users_root and _root_of(place[0]) == users_root:
            kind = _Kind.USER
        frames.append(_TracebackFrame(place, kind))
        if len(frames) > MAX_FRAMES:
            del frames[MAX_FRAMES // 2]
    return frames


@lru_cache(maxsize=4096)
def _kind_of_file(file: str) -> _Kind:
    if file.startswith(_our_folders()):
        return _Kind.OURS
    if file.startswith((*_library_folders(), "<frozen ")):
        return _Kind.LIBRARY
    return _Kind.USER


@lru_cache(maxsize=1)
def _our_folders() -> tuple[str, ...]:
    standard = Path(asyncio.__file__).parent.parent
    names = ("asyncio/", "concurrent/futures/", "contextlib.py", "threading.py")
    installed = [f"{folder}{name}/" for folder in _installed() for name in ("celery", "kombu", "billiard")]
    return (f"{Path(__file__).parent}/", *(f"{standard}/{name}" for name in names), *installed)


@lru_cache(maxsize=1)
def _library_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return (*(f"{paths[name]}/" for name in ("stdlib", "platstdlib")), *_installed())


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    """The folders of installed packages."""
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("purelib", "platlib")}
    folders |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    return tuple(f"{folder}/" for folder in sorted(folders))


@lru_cache(maxsize=4096)
def _root_of(file: str) -> str:
    """The path of the package or module of an installed file; '' for any other file."""
    for folder in _installed():
        if file.startswith(folder):
            return folder + file.removeprefix(folder).partition("/")[0]
    return ""


# --- text ------------------------------------------------------------------------------------------------


def _chain_text(error: BaseException, max_bytes: int, *, collapse: bool, depth: int) -> str:
    """The text of a chain of exceptions, the first one first. Each has an equal share of `max_bytes`."""
    links = _links(error)
    left_out = len(links) - MAX_LINKS
    if left_out > 0:
        links = [*links[: MAX_LINKS // 2], *links[-MAX_LINKS // 2 :]]
    blocks = [_SourceBlock.of(link.error, collapse=collapse, depth=depth) for link in links]
    texts = [block.text(max_bytes) for block in blocks]
    joints = [f"\n\n{link.joint}\n\n" for link in links[1:]]
    if left_out > 0:
        joints[MAX_LINKS // 2 - 1] = f"\n\n… {left_out} more exceptions …\n\n"
    bytes_left = max_bytes - sum(len(joint.encode()) for joint in joints)
    if sum(len(text.encode()) for text in texts) > bytes_left:
        share = max(SHORTEST_BLOCK_BYTES, bytes_left // len(blocks))
        texts = [block.text(share) for block in blocks]
    return "".join(text + joint for text, joint in zip(texts, [*joints, ""], strict=True))


@dataclass(frozen=True, slots=True)
class _Link:
    error: BaseException
    joint: str  # the sentence between the previous exception and this one


def _links(error: BaseException) -> list[_Link]:
    """The chain of causes and contexts, the first exception first."""
    links: list[_Link] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(links) < MAX_WALKED_LINKS:
        seen.add(id(current))
        previous = current.__cause__
        joint = CAUSE
        if previous is None and not current.__suppress_context__:
            previous, joint = current.__context__, CONTEXT
        links.append(_Link(current, joint))
        current = None if isinstance(previous, ProcessTraceback) else previous
    return links[::-1]


@dataclass(slots=True)
class _SourceBlock:
    """One exception: its frames, then its type and message."""

    type_and_message: str
    frames: Sequence[_TracebackFrame] = ()
    collapse: bool = True
    foreign_text: str | None = None
    """The traceback as text, if the exception is from another process or attempt."""
    members: list[BaseException] = field(default_factory=list)
    depth: int = 0

    @classmethod
    def of(cls, error: BaseException, *, collapse: bool, depth: int) -> _SourceBlock:
        block = cls(_type_and_message(error), collapse=collapse, depth=depth)
        cause = error.__cause__
        if isinstance(cause, ProcessTraceback):
            block.foreign_text = text_of(cause)
        elif isinstance(error, OpenAgentsError) and isinstance(error.traceback, str):
            block.foreign_text = error.traceback
        else:
            block.frames = _frames(error)
        if isinstance(error, BaseExceptionGroup) and depth < MAX_GROUP_DEPTH:
            block.members = list(error.exceptions)
        return block

    def text(self, max_bytes: int) -> str:
        if self.foreign_text is not None:
            # Mask it again: the other process knows other secrets.
            return _cut(mask_secrets(self.foreign_text), max_bytes)
        type_and_message = _cut(self.type_and_message, max_bytes // 2)
        bytes_left = max_bytes - len(type_and_message.encode()) - len(HEAD) - 2
        lines = self._frame_lines(bytes_left // 2 if self.members else bytes_left)
        text = "\n".join([*([HEAD, *lines] if lines else []), type_and_message])
        return text + self._members_text(max_bytes - len(text.encode())) if self.members else text

    def _members_text(self, max_bytes: int) -> str:
        shown = self.members[: max(1, min(MAX_MEMBERS, max_bytes // SHORTEST_BLOCK_BYTES))]
        share = max_bytes // len(shown) - 60
        texts = []
        for number, member in enumerate(shown, start=1):
            inner = _chain_text(member, share, collapse=self.collapse, depth=self.depth + 1)
            head = f"  exception {number} of {len(self.members)} in the group:"
            texts.append("\n".join([head, *(f"    {line}" for line in inner.splitlines())]))
        return "\n" + "\n".join(texts)

    def _frame_lines(self, bytes_left: int) -> list[str]:
        """The frames that fit into `bytes_left`. Frames of the user and frames near the end have priority."""
        shown = list(range(len(self.frames)))
        if self.collapse and any(frame.kind is not _Kind.OURS for frame in self.frames):
            shown = [index for index in shown if self.frames[index].kind is not _Kind.OURS]
        texts = {}
        for index in self._in_order_of_priority(shown):
            text = self.frames[index].text()
            bytes_left -= len(text.encode()) + 30  # and the line of a gap next to it
            if bytes_left < 0:
                break
            texts[index] = text
        lines: list[str] = []
        gap: list[_TracebackFrame] = []
        for index, frame in enumerate(self.frames):
            if index not in texts:
                gap.append(frame)
                continue
            lines += [*self._gap(gap, is_first=not lines), texts[index]]
            gap = []
        return lines + (self._gap(gap, is_first=False) if lines else [])

    def _in_order_of_priority(self, shown: list[int]) -> list[int]:
        def rank(index: int) -> tuple[int, int]:
            match self.frames[index].kind:
                case _Kind.USER:
                    return 0, -index
                case _Kind.LIBRARY | _Kind.OURS:
                    return 1, -index
                case kind:
                    assert_never(kind)

        ranked = sorted(shown, key=rank)
        # The second one is the frame that raised the exception, after the nearest frame of the user.
        return list(dict.fromkeys([*ranked[:1], *shown[-1:], *ranked]))

    @staticmethod
    def _gap(frames: list[_TracebackFrame], *, is_first: bool) -> list[str]:
        if not frames or (is_first and all(frame.kind is _Kind.OURS for frame in frames)):
            return []
        count = sum(frame.times for frame in frames)
        return [f"  [{count:,} more frame{'s' if count > 1 else ''}]"]


def _type_and_message(error: BaseException) -> str:
    """The last lines of a traceback: the type, the message and the notes."""
    kind = type(error)
    module, name = text_of(kind.__module__), text_of(kind.__qualname__)
    name = name if module in ("builtins", "__main__") else f"{module}.{name}"
    lines = []
    message = text_of(error)
    if isinstance(error, SyntaxError) and error.filename is not None:
        lines.append(f'  File "{text_of(error.filename)}", line {text_of(error.lineno)}')
        if isinstance(error.text, str) and error.text.strip():
            lines.append(f"    {_shown(error.text.strip(), MAX_SOURCE_CHARS)}")
        message = text_of(error.msg)
    shown = _shown(message, MAX_MESSAGE_CHARS)
    lines.append(f"{name}: {shown}" if shown else name)
    notes = getattr(error, "__notes__", None)
    if isinstance(notes, list | tuple):
        lines += [_shown(text_of(note), MAX_MESSAGE_CHARS) for note in notes[:MAX_NOTES]]
    return "\n".join(lines)


def _shown(text: str, max_chars: int) -> str:
    return without_named_secrets(str(redact(text, max_chars=max_chars)))


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "\n".join(escaped_line(line) for line in text.expandtabs(4).split("\n"))


def _cut(text: str, max_bytes: int) -> str:
    """At most `max_bytes` of the text: a third from its beginning, the rest from its end with the message."""
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) <= max_bytes:
        return text
    mark = f"\n[{len(encoded) - max_bytes:,} more bytes]\n"
    bytes_left = max(0, max_bytes - len(mark))
    head, tail = encoded[: bytes_left // 3], encoded[len(encoded) - (bytes_left - bytes_left // 3) :]
    return head.decode(errors="ignore") + mark + tail.decode(errors="ignore")
