"""Pieces of a reply: a worker died after the second one, and another worker began again."""

texts: dict[tuple[str, str, int | None], str] = {}
pieces = [
    {"call": "a", "offset": 0, "text": "Hel"},
    {"call": "a", "offset": 3, "text": "lo"},
    {"call": "a", "offset": 0, "text": "Go"},
    {"call": "a", "offset": 2, "text": "od day"},
    {"call": "a", "offset": 0, "text": "{}", "kind": "tool_arguments", "tool_call": 0},
]
piece = pieces[0]


def check():
    assert texts == {("a", "text", None): "Hel"}
