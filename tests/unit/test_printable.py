"""Printable text: the characters that a terminal may get from any source."""

from __future__ import annotations

import doctest
import json

import pytest

from openagents_worker import printable as module
from openagents_worker.printable import json_escaped, one_line, printable

ATTACKS = {
    "escape sequence": "\x1b[2J\x1b[31mred",
    "clipboard (OSC 52)": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "title (OSC 0)": "\x1b]0;root\x07",
    "C1: CSI in one character": "\x9b31mred",
    "C1: OSC in one character": "\x9d52;c;eA==\x9c",
    "bell and backspace": "\x07pay 100\x08\x08\x08 1",
    "carriage return": "all good\rERASED",
    "delete": "a\x7fb",
    "bidi override": "user \u202egpj.exe",
    "bidi isolate": "\u2067abc\u2069",
    "byte order mark": "pay\ufeffpal",
    "line separator": "one\u2028two",
    "invisible tags": "hi\U000e0049\U000e0067",
    "half of a pair": "\ud83d",
    "null": "a\x00b",
    "sixel (DCS)": "\x1bPq#0;2;0;0;0\x1b\\",
    "program command (APC)": "\x1b_Gf=24;AAAA\x1b\\",
    "C1: DCS in one character": "\x90q\x9c",
    "hyperlink (OSC 8)": "\x1b]8;;http://evil.example\x07click\x1b]8;;\x07",
    "answerback (DA)": "\x1b[c",
    "bidi marks": "a\u200eb\u200fc",
    "space without width": "pay\u200bpal",
    "joiner in ASCII": "pay\u200dpal",
    "joiners in a row": "é\u200d\u200b\u200dé",
    "joiner alone": "\u200d",
    "word joiner": "pay\u2060pal",
    "soft hyphen": "pay\xadpal",
    "selectors": "a\U000e0101b",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS.keys())
def test_no_character_that_a_terminal_acts_on_gets_through(text: str) -> None:
    """Each is shown as its escape, so that a reader sees that it was there."""
    for shown in (printable(text), one_line(text)):
        assert shown.isprintable(), ascii(shown)
        assert shown.encode()
    assert "\\" in printable(text)


@pytest.mark.parametrize(
    "text",
    [
        "naïve café",
        "日本語",
        "שלום",
        "a\tb\nc",
        "👩‍👩‍👧",
        "क्\u200dष",
        "ภา\u200bษา",
        "👩\u200d",
        "\u200d👧",
        "price: 5 €",
        'C:\\n "x"',
    ],
)
def test_ordinary_text_of_any_script_stays_as_it_is(text: str) -> None:
    """Joiners between letters of other scripts, and of emoji, stay; newlines and tabs are layout."""
    assert printable(text) == text


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS.keys())
def test_json_on_a_terminal_is_safe_and_the_same_value(text: str) -> None:
    """Only characters in strings are escaped, so a program reads the original text."""
    shown = json_escaped(json.dumps({"text": text}, ensure_ascii=False))

    assert shown.isprintable(), ascii(shown)
    assert json.loads(shown) == {"text": text}


def test_a_long_text_is_cut_on_one_line() -> None:
    """At most the requested number of characters, with an ellipsis at the end."""
    assert one_line("word " * 1000, 20) == "word word word word…"
    assert one_line("short", 20) == "short"


def test_windows_line_ends_are_line_ends() -> None:
    assert printable("a\r\nb") == "a\nb"


def test_the_examples_are_true() -> None:
    assert doctest.testmod(module).failed == 0
