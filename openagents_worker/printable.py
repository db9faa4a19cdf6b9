"""Printable text. The only place that decides which characters can be written to a terminal or to a header.

Texts of models, users and the web may contain control characters. A terminal executes them: they write to the
clipboard (OSC 52), hide text, move the cursor, or change the order of the text. Such a character is shown as
Python's escape sequence.
"""

from __future__ import annotations

import re
from urllib.parse import quote

__all__ = ["escaped_line", "header_text", "json_escaped", "one_line", "printable", "unicode_escaped"]

_HIDDEN = (
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # change the order of characters (bidi)
    "\u2061-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb"  # have no width
    "\u2028\u2029"  # line and paragraph separator
    "\ud800-\udfff"  # halves of surrogate pairs: they cannot be encoded
    "\U000e0000-\U000e007f\U000e0100-\U000e01ef"  # tags and selectors: invisible text
)
_JOINERS = "\u00ad\u180e\u200b-\u200d\u2060"
# Emoji and many scripts need joiners between their characters; next to ASCII they only hide text. At the end
# of a piece of a stream, the next character is not known.
_HIDDEN_JOINER = (
    f"(?<=[\x00-\x7f{_JOINERS}])[{_JOINERS}]|[{_JOINERS}](?=[\x00-\x7f{_JOINERS}])|\\A[{_JOINERS}]\\Z"
)
_NEVER = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_HIDDEN}]|{_HIDDEN_JOINER}")  # except newline and tab
_NEVER_IN_JSON = re.compile(f"[\x7f-\x9f{_HIDDEN}]|{_HIDDEN_JOINER}")  # json.dumps escapes the others


def printable(text: str) -> str:
    """The text for a terminal: newlines and tabs are kept, other control characters are escaped.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return _NEVER.sub(_escape, text.replace("\r\n", "\n"))


def one_line(text: str, max_chars: int | None = None) -> str:
    """The text on one line, its whitespace collapsed, cut after `max_chars` characters with an ellipsis.

    >>> one_line("first line\\nsecond", 12)
    'first line …'
    """
    if max_chars is not None:
        text = text[: 8 * max_chars + 64]  # the end of a long text is never needed
    line = printable(" ".join(text.split()))
    return line if max_chars is None or len(line) <= max_chars else f"{line[: max_chars - 1]}…"


def escaped_line(text: str) -> str:
    """The text as one line: line ends, tabs and control characters are escaped.

    >>> escaped_line("first\\nsecond")
    'first\\\\nsecond'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def json_escaped(text: str) -> str:
    """JSON text for a terminal: the same values, with hidden characters written as `\\\\u…`."""
    return _NEVER_IN_JSON.sub(lambda found: unicode_escaped(found[0]), text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "backslashreplace").decode()


def unicode_escaped(character: str) -> str:
    """The character as an escape sequence of JSON; above U+FFFF it is a surrogate pair.

    >>> unicode_escaped("→")
    '\\\\u2192'
    """
    code = ord(character)
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


_PRINTABLE_IN_HEADERS = "!#$&'()*+,/:;=?@[]~|"


def header_text(text: str) -> str:
    """The text as the value of an HTTP header: everything but printable ASCII is percent-encoded."""
    return quote(text, safe=_PRINTABLE_IN_HEADERS)
