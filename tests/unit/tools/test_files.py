"""File tools with real files: paths are restricted to root, and everything is limited in size."""

from __future__ import annotations

import asyncio
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from openagents_worker.agents.loading import load_agents
from openagents_worker.errors import OpenAgentsError, PermanentToolError, ToolValidationError
from openagents_worker.tools.builtin import BUILTIN_TOOLS, search
from openagents_worker.tools.builtin.files import ReadFile
from openagents_worker.tools.builtin.grep import GrepFiles
from tests.support.waiting import await_for


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a few files in it, and a secret file beside it."""
    folder = tmp_path / "root"
    (folder / "docs").mkdir(parents=True)
    (folder / "a.txt").write_text("one\ntwo\nthree\n")
    (folder / "docs" / "b.md").write_text("# Two\nmore\n")
    (folder / "docs" / "c.py").write_text("x = 2\n")
    (folder / "image.bin").write_bytes(b"\x89PNG\0\0two")
    (tmp_path / "secret.txt").write_text("two secrets")
    (folder / "leak").symlink_to(tmp_path / "secret.txt")
    (folder / "leaks").symlink_to(tmp_path)
    return folder


async def call(kind: str, root: Path, settings_: dict[str, Any] | None = None, **arguments: Any) -> Any:
    return await BUILTIN_TOOLS[kind]({"root": str(root), **(settings_ or {})}).invoke(arguments, None)


# --- the fence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read_file", "write_file", "list_files", "delete_file", "grep_files"])
@pytest.mark.parametrize(
    "path", ["../secret.txt", "/etc/passwd", "docs/../../secret.txt", "leaks/secret.txt"]
)
async def test_no_tool_leaves_its_root(root: Path, kind: str, path: str) -> None:
    """Not by `..`, not by an absolute path, not through a link."""
    more = {"write_file": {"content": "x"}, "grep_files": {"pattern": "two"}}.get(kind, {})

    with pytest.raises(ToolValidationError, match="outside of root"):
        await call(kind, root, path=path, **more)
    assert (root.parent / "secret.txt").read_text() == "two secrets"


# --- what is hidden --------------------------------------------------------------------------------------

SECRET = "two hidden"
HIDDEN = [
    ".env",
    "./.env",
    "docs/../.env",
    "docs/./../.env",
    "link-to-env",
    "docs/link-to-env",
    ".git/config",
    "docs/../.git/config",
    "link-to-git/config",
    "docs/.hidden/deep/x.txt",
    ".ENV",
    ".visible",
    "keys",
    "keys/a.txt",
    "keys/deep/a.txt",
    "Keys/a.txt",
    "KEYS/deep",
    "link-to-keys/a.txt",
    "docs/server.PEM",
    "docs/deep/server.pem",
    "conf/prod",
    "conf/prod/deep/x.txt",
    "conf/Prod/x.txt",
    "docs/caf\u0065\u0301",
]
"""Ways to write a path. `keys`, `*.pem`, `conf/prod` and `**/café` are denied, `.visible` links to a.txt."""
DENY = ["keys", "*.pem", "/conf/prod/", "**/caf\u00e9"]


@pytest.fixture
def guarded(root: Path) -> Path:
    """A root with hidden and denied files in it, and links to them."""
    for path in (".env", ".git/config", "docs/.hidden/deep/x.txt", "keys/a.txt", "keys/deep/a.txt"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(SECRET)
    for path in ("docs/server.PEM", "docs/deep/server.pem", "conf/prod/deep/x.txt", "docs/caf\u0065\u0301"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(SECRET)
    (root / "link-to-env").symlink_to(root / ".env")
    (root / "docs" / "link-to-env").symlink_to("../.env")
    (root / "link-to-git").symlink_to(".git")
    (root / "link-to-keys").symlink_to("keys")
    (root / ".visible").symlink_to("a.txt")
    return root


MORE = {"write_file": {"content": "x"}, "grep_files": {"pattern": "two"}, "delete_file": {"recursive": True}}


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes().hex()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (kind, path)
        for kind in ("read_file", "write_file", "list_files", "delete_file", "grep_files")
        for path in HIDDEN
        if kind != "delete_file" or not Path(path).name.startswith("link-to-")  # only the link goes
    ],
)
async def test_what_is_hidden_or_denied_is_reached_by_no_tool_and_no_spelling(
    guarded: Path, kind: str, path: str
) -> None:
    """Rejected through links, `..` and other letter cases, whether it exists or not. Nothing is changed."""
    before = fingerprint(guarded)

    with pytest.raises(ToolValidationError, match=r"is hidden|is denied by"):
        await call(kind, guarded, {"deny": DENY}, path=path, **MORE.get(kind, {}))
    assert fingerprint(guarded) == before


@pytest.mark.parametrize("glob", ["**/prod", "conf/**/prod", "conf/**/deep/**/*.txt"])
async def test_any_folders_of_a_denied_glob_may_be_none(guarded: Path, glob: str) -> None:
    """As in other programs."""
    with pytest.raises(ToolValidationError, match="is denied by"):
        await call("read_file", guarded, {"deny": [glob]}, path="conf/prod/deep/x.txt")


SHIPPED = Path(__file__).parents[3] / "config" / "agents.json"


@pytest.mark.parametrize("path", ["app.py", "../app.py", "../.env", ".env", "../config/agents.json"])
async def test_shipped_agents_work_in_a_folder_of_their_own(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code, keys and settings of the project are invisible to a model."""
    (tmp_path / "app.py").write_text(SECRET)
    (tmp_path / ".env").write_text(SECRET)
    monkeypatch.chdir(tmp_path)
    tools = [tool for agent in load_agents(SHIPPED, env={}).agents for tool in agent.tools]
    files = [tool for tool in tools if hasattr(BUILTIN_TOOLS.get(tool.type or ""), "allowed_paths")]

    assert {tool.type for tool in files} == {"read_file", "list_files", "grep_files"}
    for tool in files:
        given = {"path": path, **MORE.get(tool.type or "", {})}
        with pytest.raises((ToolValidationError, PermanentToolError), match=r"outside|hidden|does not exist"):
            await BUILTIN_TOOLS[tool.type or ""](tool.config).invoke(given, None)


@pytest.mark.parametrize("path", [".", "docs", "docs/.."])
async def test_what_is_hidden_or_denied_is_neither_listed_nor_searched(guarded: Path, path: str) -> None:
    """Neither its name nor its content is in a result."""
    listed = await call("list_files", guarded, {"deny": DENY}, path=path, recursive=True)
    found = await call("grep_files", guarded, {"deny": DENY}, path=path, pattern="hidden")

    names = {name for entry in listed["entries"] for name in Path(entry["path"]).parts}
    assert not any(name.startswith(".") or name.lower().endswith(".pem") for name in names)
    assert not names & {"keys", "prod", "caf\u0065\u0301"}
    assert "b.md" in names
    assert found["matches"] == []


async def test_a_folder_is_not_deleted_with_something_hidden_in_it(guarded: Path) -> None:
    """Invisible files cannot be deleted with their folder."""
    before = fingerprint(guarded)

    for path in ("docs", "conf"):
        with pytest.raises(PermanentToolError, match="holds something that is"):
            await call("delete_file", guarded, {"deny": DENY}, path=path, recursive=True)
    assert fingerprint(guarded) == before


async def test_what_is_hidden_is_seen_where_that_is_allowed_and_what_is_denied_is_not(guarded: Path) -> None:
    """`allow_hidden` concerns only names with a dot; `deny` takes precedence."""
    config = {"allow_hidden": True, "deny": [".git", "conf/*"]}

    assert (await call("read_file", guarded, config, path=".env"))["content"] == SECRET
    assert (await call("read_file", guarded, config, path="link-to-env"))["content"] == SECRET
    assert {
        match["path"] for match in (await call("grep_files", guarded, config, pattern="hidden"))["matches"]
    } >= {
        ".env",
        "docs/.hidden/deep/x.txt",
    }
    for path in (".git/config", "link-to-git/config", "conf/prod"):
        with pytest.raises(ToolValidationError, match=r"is denied by '(\.git|conf/\*)'"):
            await call("list_files", guarded, config, path=path)


async def test_a_root_may_itself_lie_under_a_hidden_folder(tmp_path: Path) -> None:
    """Only names below root are checked. A missing root is created."""
    root = tmp_path / ".cache" / "work"

    await call("write_file", root, path="a.txt", content="x")

    assert (await call("list_files", root))["entries"] == [{"path": "a.txt", "type": "file"}]


async def test_without_a_root_hidden_files_are_hidden_too(
    guarded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the working directory, and for every hidden name on a path outside of it."""
    monkeypatch.chdir(guarded)

    for path in (".env", "docs/../.env", str(guarded / ".env"), "../root/.git/config"):
        with pytest.raises(ToolValidationError, match="is hidden"):
            await BUILTIN_TOOLS["read_file"]({}).invoke({"path": path}, None)
    monkeypatch.chdir(guarded / "docs")
    with pytest.raises(ToolValidationError, match="is hidden"):
        await BUILTIN_TOOLS["read_file"]({}).invoke({"path": "../.env"}, None)


PARTS = (
    st.sampled_from(["..", ".", "docs", "a.txt", "leak", "leaks", "", "~", "/", "\0", "x" * 300]) | st.text()
)


@given(st.lists(PARTS, max_size=6).map("/".join))
@example("docs/../..")
@example("//etc/passwd")
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the folder is only looked at
def test_whatever_the_path_nothing_outside_of_root_is_reached(root: Path, path: str) -> None:
    """Any path is inside root or raises an error with a code, for reading and for deleting."""
    tool = ReadFile({"root": str(root)})
    for follow in (True, False):
        try:
            place = tool.resolved(path, follow=follow)
        except OpenAgentsError:
            continue
        assert place.parent.resolve() / place.name == place
        assert place.is_relative_to(root)


async def test_without_a_root_any_path_goes(root: Path) -> None:
    """As in the original SDK. To restrict paths, an operator sets `root`."""
    read = await BUILTIN_TOOLS["read_file"]().invoke({"path": str(root / "a.txt")}, None)
    assert read["content"] == "one\ntwo\nthree\n"


# --- read_file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "content", "truncated"),
    [
        ({}, "one\ntwo\nthree\n", False),
        ({"offset": 1}, "two\nthree\n", False),
        ({"limit": 2}, "one\ntwo\n", True),
        ({"offset": 1, "limit": 2}, "two\nthree\n", False),
        ({"offset": 9}, "", False),
    ],
)
async def test_a_file_is_read_whole_or_by_lines(
    root: Path, arguments: dict[str, Any], content: str, truncated: bool
) -> None:
    """`truncated` says whether more text follows; `bytes` is the size of the file."""
    read = await call("read_file", root, path="a.txt", **arguments)
    assert read == {"path": "a.txt", "content": content, "bytes": 14, "truncated": truncated}


async def test_a_long_file_is_cut_between_characters(root: Path) -> None:
    """At most `max_bytes` are read. An incomplete character at the end is left out."""
    (root / "long.txt").write_text("äöü")

    read = await call("read_file", root, {"max_bytes": 3}, path="long.txt")

    assert (read["content"], read["bytes"], read["truncated"]) == ("ä", 6, True)
    assert "invalid_bytes" not in read


@pytest.mark.parametrize(
    ("content", "text", "invalid"),
    [
        ("café".encode("latin-1"), "caf\ufffd", 1),
        (b"\xe2\x82 \xff\n", "\ufffd \ufffd\n", 3),  # half a euro sign has two bytes
        ("\ufffd".encode(), "\ufffd", None),
    ],
)
async def test_bytes_that_are_not_utf8_are_counted(
    root: Path, content: bytes, text: str, invalid: int | None
) -> None:
    """Who writes the text back would lose them."""
    (root / "latin.txt").write_bytes(content)

    read = await call("read_file", root, path="latin.txt")

    assert (read["content"], read.get("invalid_bytes")) == (text, invalid)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("none.txt", "none.txt does not exist"),
        ("docs", "docs is a folder"),
        ("image.bin", "not a text file"),
        ("pipe", "not a regular file"),
        ("a.txt/x", "does not exist"),
        ("x" * 300, "name too long"),
    ],
)
async def test_a_path_that_cannot_be_read_is_an_error_for_the_model(root: Path, path: str, told: str) -> None:
    """A pipe is rejected without waiting for its other end."""
    os.mkfifo(root / "pipe")

    with pytest.raises(OpenAgentsError, match=f"(?i){told}"):
        await call("read_file", root, path=path)


# --- write_file ------------------------------------------------------------------------------------------


async def test_a_file_is_written_and_added_to(root: Path) -> None:
    """Missing folders are created. `bytes` is the number of written bytes."""
    written = await call("write_file", root, path="new/deep/f.txt", content="ä\n")
    added = await call("write_file", root, path="new/deep/f.txt", content="b\n", mode="a")

    assert (written["bytes"], added["bytes"]) == (3, 2)
    assert (root / "new/deep/f.txt").read_text() == "ä\nb\n"


async def test_replacing_a_file_keeps_its_mode_and_leaves_nothing_beside_it(root: Path) -> None:
    """The content is replaced atomically."""
    (root / "a.txt").chmod(0o640)
    before = sorted(root.iterdir())

    await call("write_file", root, path="a.txt", content="new")

    assert (root / "a.txt").read_text() == "new"
    assert (root / "a.txt").stat().st_mode & 0o777 == 0o640
    assert sorted(root.iterdir()) == before


async def test_a_file_is_not_a_folder(root: Path) -> None:
    """The error does not say that the new file exists."""
    with pytest.raises(PermanentToolError, match=r"a part of a\.txt/b\.txt is a file"):
        await call("write_file", root, path="a.txt/b.txt", content="x")


async def test_a_failed_write_changes_nothing(root: Path) -> None:
    """A folder is not replaced, and no temporary file remains."""
    before = sorted(root.iterdir())

    with pytest.raises(PermanentToolError, match="docs is a folder"):
        await call("write_file", root, path="docs", content="x")
    assert sorted(root.iterdir()) == before


@pytest.mark.parametrize("mode", ["w", "a"])
async def test_a_pipe_or_device_is_never_written_or_replaced(root: Path, mode: str) -> None:
    """Only regular files are written. The call does not wait for the other end of a pipe."""
    os.mkfifo(root / "pipe")

    with pytest.raises(PermanentToolError, match="not a regular file"):
        await call("write_file", root, path="pipe", content="x", mode=mode)
    assert (root / "pipe").is_fifo()


async def test_more_than_max_bytes_is_not_written(root: Path) -> None:
    """The error tells the model to write in parts."""
    with pytest.raises(ToolValidationError, match="at most 3"):
        await call("write_file", root, {"max_bytes": 3}, path="a.txt", content="four")
    assert (root / "a.txt").read_text() == "one\ntwo\nthree\n"


# --- list_files ------------------------------------------------------------------------------------------


async def test_a_folder_is_listed_in_order(root: Path) -> None:
    """Links are listed as links and not followed."""
    listed = await call("list_files", root)

    assert listed["entries"] == [
        {"path": "a.txt", "type": "file"},
        {"path": "docs", "type": "folder"},
        {"path": "image.bin", "type": "file"},
        {"path": "leak", "type": "link"},
        {"path": "leaks", "type": "link"},
    ]


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("*.md", ["docs/b.md"]),
        ("docs/*", ["docs/b.md", "docs/c.py"]),
        ("*.[mt]*", ["a.txt", "docs/b.md"]),
        ("**/*.[mt]*", ["a.txt", "docs/b.md"]),  # any folders, also none
        ("docs/**/*.md", ["docs/b.md"]),
        ("docs/**", ["docs/b.md", "docs/c.py"]),
        ("./docs/*.py", ["docs/c.py"]),
        ("**/b.md", ["docs/b.md"]),
        ("**/docs/**/**/*.py", ["docs/c.py"]),
    ],
)
async def test_a_pattern_picks_names_or_paths(root: Path, pattern: str, paths: list[str]) -> None:
    """A glob without `/` is compared with names, a glob with `/` with whole paths."""
    listed = await call("list_files", root, pattern=pattern, recursive=True)
    assert [entry["path"] for entry in listed["entries"]] == paths


@pytest.mark.parametrize("recursive", [False, True])
async def test_a_star_of_a_path_stands_for_one_name(root: Path, recursive: bool) -> None:
    """`**/` stands for folders. A glob with `/` looks into folders without being told to."""
    (root / "docs" / "more").mkdir()
    (root / "docs" / "more" / "d.py").touch()

    for pattern, paths in {
        "docs/*.py": ["docs/c.py"],
        "*/*.py": ["docs/c.py"],
        "docs/**/*.py": ["docs/c.py", "docs/more/d.py"],
        "*/more/*": ["docs/more/d.py"],
    }.items():
        listed = await call("list_files", root, pattern=pattern, recursive=recursive)
        assert [entry["path"] for entry in listed["entries"]] == paths, pattern


@pytest.fixture
def huge_folder(tmp_path: Path) -> Path:
    """A folder of 1,005 files, created in a fixture because it would block the event loop of the test."""
    for n in range(1005):
        (tmp_path / f"{n:04}").touch()
    return tmp_path


@pytest.mark.parametrize("recursive", [False, True])
async def test_a_huge_folder_is_cut(huge_folder: Path, recursive: bool) -> None:
    """The first thousand entries are listed, always the same ones, and `truncated` is true."""
    listed = await call("list_files", huge_folder, recursive=recursive)

    assert [entry["path"] for entry in listed["entries"]] == [f"{n:04}" for n in range(1000)]
    assert listed["truncated"] is True


@pytest.mark.parametrize(("path", "told"), [("a.txt", "not a folder"), ("none", "does not exist")])
async def test_only_a_folder_is_listed(root: Path, path: str, told: str) -> None:
    """The error says why the path cannot be listed."""
    with pytest.raises(PermanentToolError, match=told):
        await call("list_files", root, path=path)


# --- delete_file -----------------------------------------------------------------------------------------


async def test_a_folder_is_deleted_only_if_recursive_is_set(root: Path) -> None:
    """It needs `recursive`; a file does not."""
    with pytest.raises(PermanentToolError, match="docs is a folder") as caught:
        await call("delete_file", root, path="docs")
    assert "recursive" in str(caught.value.hint)

    await call("delete_file", root, path="docs", recursive=True)
    await call("delete_file", root, path="a.txt")

    assert sorted(entry.name for entry in root.iterdir()) == ["image.bin", "leak", "leaks"]


async def test_a_link_to_itself_is_deleted(root: Path) -> None:
    """Where it leads does not matter."""
    (root / "loop").symlink_to("loop")
    assert (await call("delete_file", root, path="loop"))["deleted"] is True
    assert not (root / "loop").is_symlink()


async def test_of_a_link_only_the_link_is_deleted(root: Path) -> None:
    """Its target stays, even if that is a folder outside of root."""
    await call("delete_file", root, path="leaks", recursive=True)
    await call("delete_file", root, path="leak")

    assert (root.parent / "secret.txt").exists()
    assert not (root / "leak").is_symlink()


@pytest.mark.parametrize("path", [".", "docs/..", "./"])
async def test_the_root_itself_is_never_deleted(root: Path, path: str) -> None:
    """By no spelling of its path."""
    with pytest.raises(ToolValidationError, match="root folder"):
        await call("delete_file", root, path=path, recursive=True)
    assert root.is_dir()


# --- grep_files ------------------------------------------------------------------------------------------


async def test_matches_are_found_in_text_files_only(root: Path) -> None:
    """Path, line number from 1 and text. Binary files are skipped, links are not followed."""
    found = await call("grep_files", root, pattern="two", case_sensitive=False)

    assert found == {
        "matches": [
            {"path": "a.txt", "line": 2, "text": "two"},
            {"path": "docs/b.md", "line": 1, "text": "# Two"},
        ],
        "skipped": 1,
        "truncated": False,
    }


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        ({"pattern": "two"}, ["a.txt"]),
        ({"pattern": "2|Two", "file_type": "py"}, ["docs/c.py"]),
        ({"pattern": "2|Two", "file_type": ".md"}, ["docs/b.md"]),
        ({"pattern": "2|Two", "file_type": "*.md"}, ["docs/b.md"]),
        ({"pattern": "2|Two", "file_type": "*"}, ["docs/b.md", "docs/c.py"]),
        ({"pattern": "^t", "path": "a.txt"}, ["a.txt", "a.txt"]),
    ],
)
async def test_a_search_can_be_narrowed(root: Path, arguments: dict[str, Any], paths: list[str]) -> None:
    """By case, by file ending, and to one file."""
    found = await call("ripgrep", root, **arguments)
    assert [match["path"] for match in found["matches"]] == paths


@pytest.mark.parametrize(
    ("content", "pattern", "lines"),
    [
        ("total = 5\r\nnext;\r\n", r"^total = \d+$", [1]),
        ("total = 5\r\nnext;\r\n", ";$", [2]),
        ("total = 5\r\nnext;\n", r";\r$|5\r$", [1]),  # a pattern may ask for the carriage return
        (r"C:\\run" "\r\n", r"^C:\\\\run$", [1]),
        ("\ufeffimport os\nimport re\n", "^import", [1, 2]),
        ("a\n\nb\n", "^$", [2]),  # after the last end of a line there is no line
        ("", "^", []),
    ],
)
async def test_the_ends_of_a_line_are_found_whatever_wrote_the_file(
    root: Path, content: str, pattern: str, lines: list[int]
) -> None:
    """Also in a file from Windows, whose lines end with `\\r\\n`, and after a byte order mark."""
    (root / "a.txt").write_bytes(content.encode())

    found = await call("grep_files", root, pattern=pattern, path="a.txt")

    assert [match["line"] for match in found["matches"]] == lines


@pytest.mark.parametrize(
    ("before", "text"),
    [
        (0, "needle" + "y" * 494),
        (494, "x" * 494 + "needle"),
        (495, "\u2026" + "x" * 100 + "needle" + "y" * 393),
        (5_000, "\u2026" + "x" * 100 + "needle" + "y" * 393),
    ],
)
async def test_the_match_is_in_what_is_shown_of_a_long_line(root: Path, before: int, text: str) -> None:
    """500 characters of a line are shown: its beginning, or those around the match after an ellipsis."""
    (root / "a.txt").write_text("x" * before + "needle" + "y" * 1_000)
    found = await call("grep_files", root, pattern="needle", path="a.txt")
    assert [match["text"] for match in found["matches"]] == [text]


async def test_a_file_in_utf16_is_searched(root: Path) -> None:
    """If it has a byte order mark, as Windows writes it."""
    (root / "a.txt").write_text("größe = 2\n", "utf-16")
    found = await call("grep_files", root, pattern="größe", path="a.txt")
    assert [match["text"] for match in found["matches"]] == ["größe = 2"]


async def test_a_walk_that_ends_early_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`truncated` is true, so that nobody takes what was not looked at for what does not exist."""
    query = {
        "pattern": "2",
        "path": str(root),
        "case_sensitive": True,
        "glob": "*",
        "max_bytes": 1000,
        "max_matches": 100,
        "allowed_paths": search.AllowedPaths(str(root)).to_json(),
    }
    whole = search.search(query)
    monkeypatch.setattr(search, "MAX_VISITED", 3)

    cut = search.search(query)
    listed = await call("list_files", root, recursive=True)

    assert (len(whole["matches"]), whole["truncated"]) == (1, False)
    assert (len(cut["matches"]), cut["truncated"]) == (0, True)
    assert (len(listed["entries"]), listed["truncated"]) == (3, True)


async def test_a_search_stops_at_a_hundred_matches(root: Path) -> None:
    """Then `truncated` is true."""
    (root / "a.txt").write_text("x\n" * 101)

    found = await call("grep_files", root, pattern="x", path="a.txt")

    assert (len(found["matches"]), found["truncated"]) == (100, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"pattern": "("}, "no regular"), ({"pattern": "x", "path": "no"}, "does not exist")],
)
async def test_an_invalid_search_is_an_error_for_the_model(
    root: Path, arguments: dict[str, Any], told: str
) -> None:
    """The error names the pattern or the path."""
    with pytest.raises(PermanentToolError, match=told):
        await call("grep_files", root, **arguments)


async def test_a_pattern_that_would_take_for_ever_is_given_up(root: Path) -> None:
    """It runs in another process, so the event loop and other runs are not blocked."""
    (root / "a.txt").write_text("a" * 60 + "!")

    with pytest.raises(PermanentToolError, match="longer than 300 ms"):
        await call("grep_files", root, {"timeout_ms": 300}, pattern="(a+)+$")


async def test_a_cancelled_search_leaves_no_process_behind(root: Path) -> None:
    """Cancelling the call kills the search."""
    (root / "a.txt").write_text("a" * 60 + "!")
    tool = GrepFiles({"root": str(root)})
    running = asyncio.create_task(tool.invoke({"pattern": "(a+)+$"}, None))
    await await_for(_searches, "the search has started")

    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
    assert _searches() == []


def _searches() -> list[str]:
    """The search processes that this process has started."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    return [pid for pid in pids if b"search.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


# --- names that are not UTF-8 ----------------------------------------------------------------------------

LATIN = os.fsdecode(b"caf\xe9.txt")
SHOWN = r"caf\xe9.txt"


@pytest.fixture
def latin(root: Path) -> Path:
    """A folder with a Latin-1 file name in it, and a folder with such a name."""
    (root / LATIN).write_text("two cups\n")
    (root / os.fsdecode(b"d\xfc")).mkdir()
    (root / os.fsdecode(b"d\xfc") / "in.txt").write_text("two more\n")
    return root


async def test_a_name_that_is_not_utf8_is_listed_and_searched_with_the_others(latin: Path) -> None:
    """Its bytes are escaped, so that the result can be stored."""
    listed = await call("list_files", latin, recursive=True)
    found = await call("grep_files", latin, pattern="two")

    paths = [entry["path"] for entry in listed["entries"]]
    assert {SHOWN, r"d\xfc", r"d\xfc/in.txt", "a.txt", "docs/b.md"} <= set(paths)
    assert {match["path"] for match in found["matches"]} == {"a.txt", SHOWN, r"d\xfc/in.txt"}
    for answer in (listed, found):
        json.dumps(answer, ensure_ascii=False).encode()


async def test_it_is_read_and_deleted_by_the_name_that_was_shown(latin: Path) -> None:
    assert (await call("read_file", latin, path=SHOWN))["content"] == "two cups\n"
    assert (await call("grep_files", latin, path=SHOWN, pattern="cups"))["matches"][0]["path"] == SHOWN
    await call("delete_file", latin, path=SHOWN)
    assert not (latin / LATIN).exists()


@pytest.mark.parametrize(("stored", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
async def test_a_name_is_found_in_either_unicode_normalization(root: Path, stored: str, asked: str) -> None:
    """Files from a Mac have decomposed names, and a model writes composed ones."""
    place = root / unicodedata.normalize(stored, "Straßen für Fußgänger") / "a.txt"
    place.parent.mkdir()
    place.write_text("here")
    path = unicodedata.normalize(asked, "Straßen für Fußgänger/a.txt")

    read = await call("read_file", root, path=path)
    listed = await call("list_files", root, pattern=path.replace("a.txt", "*"))
    await call("write_file", root, path=path, content="there")

    assert read["content"] == "here"
    assert [entry["path"] for entry in listed["entries"]] == [str(place.relative_to(root))]
    assert place.read_text() == "there"


async def test_a_file_whose_name_looks_like_an_escape_is_itself(latin: Path) -> None:
    (latin / SHOWN).write_text("another\n")
    assert (await call("read_file", latin, path=SHOWN))["content"] == "another\n"
    assert (await call("list_files", latin, pattern=r"caf*"))["entries"] == [
        {"path": SHOWN, "type": "file"},
        {"path": SHOWN, "type": "file"},
    ]


@pytest.mark.parametrize("path", [r"\xc3\xa9", "é"])
async def test_no_spelling_of_a_name_bypasses_the_path_rules(root: Path, path: str) -> None:
    """Escaped bytes that are valid UTF-8 are compared as the name that a glob denies."""
    (root / "é").write_text("two secrets")
    with pytest.raises(ToolValidationError, match="is denied by 'é'"):
        await call("read_file", root, {"deny": ["é"]}, path=path)


@pytest.mark.parametrize("path", ["\ud800", "a\udfffb", "\udbff/x", "\udcc3\udca9"])
@pytest.mark.parametrize("kind", ["read_file", "list_files", "grep_files"])
async def test_half_a_character_is_not_a_path(root: Path, kind: str, path: str) -> None:
    more = {"grep_files": {"pattern": "two"}}.get(kind, {})
    with pytest.raises(ToolValidationError, match="path: "):
        await call(kind, root, path=path, **more)
