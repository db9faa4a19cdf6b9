"""Tracebacks. The only place that turns an exception into text: bounded, redacted, whatever the exception is.

What is stored and shown to people shows the frames of the user's own code: frames of this library, of asyncio
and of Celery are collapsed into one line, a recursion too, and what has to be cut is cut farthest from where
the exception was raised. Source lines are shown, local variables never.
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
MAX_MESSAGE_CHARS = 2_000  # of one exception's text; a page of HTML is not a message
MAX_SOURCE_CHARS = 200  # of one line of source; minified and generated code has longer ones
MAX_LINKS = 8  # exceptions of a chain that are shown: those nearest to both of its ends
MAX_WALKED_LINKS = 1_000
MAX_MEMBERS = 5  # exceptions of a group that are shown
MAX_GROUP_DEPTH = 3
MAX_FRAMES = 400  # different ones of an exception that are looked at; a recursion has few different ones
MAX_NOTES = 5
SHORTEST_BLOCK_BYTES = 400

CAUSE = "The above exception was the direct cause of the following exception:"
CONTEXT = "During handling of the above exception, another exception occurred:"
HEAD = "Traceback (most recent call last):"


def traceback_text(
    error: BaseException, *, max_bytes: int = MAX_TRACEBACK_BYTES, collapse: bool = True
) -> str:
    """The exception with its causes as Python shows them, in at most so many bytes of UTF-8. Never raises.

    Without `collapse` the frames of this library are shown, too: for its own errors.
    """
    try:
        text = _chain_text(error, max_bytes, collapse=collapse, depth=0)
    except Exception as problem:  # noqa: BLE001 - an exception's class may override anything
        text = f"{type(error).__name__}: <its traceback cannot be shown: {type(problem).__name__}>"
    return _cut(whole_text(_printable(text)), max_bytes)


def is_raised_by_user(error: BaseException) -> bool:
    """Whether code that is not of this library raised it: its last frame says so."""
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
    OURS = "ours"  # this library, and what calls it: asyncio, Celery


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
    """The exception's different frames, with what is repeated counted; of very many, the first and last."""
    frames: list[_TracebackFrame] = []
    users_root: str | None = None
    for place in _walked(error.__traceback__):
        if frames and frames[-1].place == place:
            frames[-1].times += 1
            continue
        kind = _kind_of_file(place[0])
        if kind is not _Kind.OURS and users_root is None:
            users_root = _root_of(place[0])  # what our code has called: the user's, wherever it is installed
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
    """The folders into which packages are installed."""
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("purelib", "platlib")}
    folders |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    return tuple(f"{folder}/" for folder in sorted(folders))


@lru_cache(maxsize=4096)
def _root_of(file: str) -> str:
    """The package or module that an installed file belongs to; of any other file nothing need be known."""
    for folder in _installed():
        if file.startswith(folder):
            return folder + file.removeprefix(folder).partition("/")[0]
    return ""


# --- text ------------------------------------------------------------------------------------------------


def _chain_text(error: BaseException, max_bytes: int, *, collapse: bool, depth: int) -> str:
    """The exceptions of a chain, the first one first, each with its share of the space."""
    links = _links(error)
    left_out = len(links) - MAX_LINKS
    if left_out > 0:
        links = [*links[: MAX_LINKS // 2], *links[-MAX_LINKS // 2 :]]
    blocks = [_SourceBlock.of(link.error, collapse=collapse, depth=depth) for link in links]
    texts = [block.text(max_bytes) for block in blocks]
    joints = [f"\n\n{link.joint}\n\n" for link in links[1:]]
    if left_out > 0:
        joints[MAX_LINKS // 2 - 1] = f"\n\n… {left_out} more exceptions …\n\n"
    room = max_bytes - sum(len(joint.encode()) for joint in joints)
    if sum(len(text.encode()) for text in texts) > room:
        share = max(SHORTEST_BLOCK_BYTES, room // len(blocks))
        texts = [block.text(share) for block in blocks]
    return "".join(text + joint for text, joint in zip(texts, [*joints, ""], strict=True))


@dataclass(frozen=True, slots=True)
class _Link:
    error: BaseException
    joint: str  # how it belongs to the one before it


def _links(error: BaseException) -> list[_Link]:
    """The chain of causes and contexts, the first exception first."""
    links: list[_Link] = []
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen and len(links) < MAX_WALKED_LINKS:
        seen.add(id(at))
        before = at.__cause__
        joint = CAUSE
        if before is None and not at.__suppress_context__:
            before, joint = at.__context__, CONTEXT
        links.append(_Link(at, joint))
        at = None if isinstance(before, ProcessTraceback) else before
    return links[::-1]


@dataclass(slots=True)
class _SourceBlock:
    """One exception: its frames, then what it is."""

    what: str
    frames: Sequence[_TracebackFrame] = ()
    collapse: bool = True
    told: str | None = None
    """Its frames as text, where they were those of another process or another attempt."""
    members: list[BaseException] = field(default_factory=list)
    depth: int = 0

    @classmethod
    def of(cls, error: BaseException, *, collapse: bool, depth: int) -> _SourceBlock:
        block = cls(_what(error), collapse=collapse, depth=depth)
        cause = error.__cause__
        if isinstance(cause, ProcessTraceback):
            block.told = text_of(cause)
        elif isinstance(error, OpenAgentsError) and isinstance(error.traceback, str):
            block.told = error.traceback
        else:
            block.frames = _frames(error)
        if isinstance(error, BaseExceptionGroup) and depth < MAX_GROUP_DEPTH:
            block.members = list(error.exceptions)
        return block

    def text(self, max_bytes: int) -> str:
        if self.told is not None:
            return _cut(mask_secrets(self.told), max_bytes)  # the other process knows other secrets
        what = _cut(self.what, max_bytes // 2)
        room = max_bytes - len(what.encode()) - len(HEAD) - 2
        lines = self._frame_lines(room // 2 if self.members else room)
        text = "\n".join([*([HEAD, *lines] if lines else []), what])
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

    def _frame_lines(self, room: int) -> list[str]:
        """The frames for which there is room, those nearest to the end and the user's own first."""
        shown = list(range(len(self.frames)))
        if self.collapse and any(frame.kind is not _Kind.OURS for frame in self.frames):
            shown = [at for at in shown if self.frames[at].kind is not _Kind.OURS]
        texts = {}
        for at in self._in_order_of_use(shown):
            text = self.frames[at].text()
            room -= len(text.encode()) + 30  # and the line of a gap beside it
            if room < 0:
                break
            texts[at] = text
        lines: list[str] = []
        gap: list[_TracebackFrame] = []
        for at, frame in enumerate(self.frames):
            if at not in texts:
                gap.append(frame)
                continue
            lines += [*self._gap(gap, is_first=not lines), texts[at]]
            gap = []
        return lines + (self._gap(gap, is_first=False) if lines else [])

    def _in_order_of_use(self, shown: list[int]) -> list[int]:
        def rank(at: int) -> tuple[int, int]:
            match self.frames[at].kind:
                case _Kind.USER:
                    return 0, -at
                case _Kind.LIBRARY | _Kind.OURS:
                    return 1, -at
                case kind:
                    assert_never(kind)

        ranked = sorted(shown, key=rank)
        # Where it was raised is the second one to be shown, after the user's frame nearest to it.
        return list(dict.fromkeys([*ranked[:1], *shown[-1:], *ranked]))

    @staticmethod
    def _gap(frames: list[_TracebackFrame], *, is_first: bool) -> list[str]:
        if not frames or (is_first and all(frame.kind is _Kind.OURS for frame in frames)):
            return []
        count = sum(frame.times for frame in frames)
        return [f"  [{count:,} more frame{'s' if count > 1 else ''}]"]


def _what(error: BaseException) -> str:
    """The last lines of a traceback: the type, the text, the notes."""
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
    """At most so many bytes of the text: its beginning and its end, which says what happened."""
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) <= max_bytes:
        return text
    mark = f"\n[{len(encoded) - max_bytes:,} more bytes]\n"
    room = max(0, max_bytes - len(mark))
    head, tail = encoded[: room // 3], encoded[len(encoded) - (room - room // 3) :]
    return head.decode(errors="ignore") + mark + tail.decode(errors="ignore")
