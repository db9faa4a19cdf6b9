"""Skill packages: the only place that finds them on disk, checks them, and decides which files belong to one.

A package is a folder with a `SKILL.md`: a header with `name` and `description`, then instructions for the
model. It may have files in `references/`, and code in `src/<package>/entrypoint.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from openagents_worker.errors import PluginConfigError
from openagents_worker.suggest import did_you_mean

__all__ = ["MAX_FILE_BYTES", "Skill", "find_skills"]

MAX_SKILLS = 200
MAX_FILES = 200
MAX_FILE_BYTES = 256 * 1024
"""The largest `SKILL.md` or reference: the model reads it as a whole."""
MAX_DESCRIPTION_CHARS = 1_024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PACKAGE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_BLOCK = frozenset({">", ">-", ">+", "|", "|-", "|+"})
"""The values of YAML that say that the text follows in indented lines."""


@dataclass(frozen=True)
class Skill:
    """A skill package. `files` are its references, by their paths below the folder."""

    name: str
    description: str
    folder: Path
    instructions: str
    files: Mapping[str, Path]
    entrypoint: Path | None = None

    @property
    def can_run(self) -> bool:
        return self.entrypoint is not None

    @property
    def source(self) -> Path | None:
        """The folder from which the code of the skill is imported."""
        return self.entrypoint.parent.parent if self.entrypoint is not None else None

    @property
    def package(self) -> str:
        """The name of the Python package with the code of the skill; '' without code."""
        return self.entrypoint.parent.name if self.entrypoint is not None else ""


@lru_cache(maxsize=64)  # every attempt of a run asks, and reading hundreds of files takes long
def find_skills(search_paths: tuple[str, ...], enabled: tuple[str, ...]) -> Mapping[str, Skill]:
    """The skills below these folders by name, sorted; only those in `enabled`, if that is not empty.

    They are read once in the life of a process. Raises `PluginConfigError` for a folder that does not exist,
    a package that is not valid, and a name that no package or more than one has.
    """
    found: dict[str, Skill] = {}
    names: set[str] = set()
    for path in search_paths:
        for folder in _package_folders(path):
            skill = _read(folder)
            names.add(skill.name)
            if enabled and skill.name not in enabled:
                continue
            if (other := found.setdefault(skill.name, skill)) is not skill:
                raise PluginConfigError(
                    f"two skills have the name {skill.name!r}: {other.folder} and {skill.folder}",
                    hint="give one of them another name, or name the folder of one in search_paths",
                )
    for name in enabled:
        if name not in found:
            raise PluginConfigError(
                f"there is no skill {name!r} in {', '.join(search_paths)}",
                hint=did_you_mean(name, sorted(names), "skills that were found") if names else None,
            )
    if len(found) > MAX_SKILLS:
        raise PluginConfigError(
            f"{len(found):,} skills were found, {MAX_SKILLS} are allowed", hint="name them in enabled"
        )
    _check_packages(found.values())
    return MappingProxyType(dict(sorted(found.items())))


def _package_folders(path: str) -> list[Path]:
    root = Path(path)
    if not root.is_dir():
        raise PluginConfigError(
            f"the folder {path!r} of search_paths does not exist",
            hint=f"a relative path is below the folder in which the worker starts: {Path.cwd()}",
        )
    return sorted(each for each in root.iterdir() if (each / "SKILL.md").is_file())


def _read(folder: Path) -> Skill:
    header, instructions = _split(folder, _text_of(folder / "SKILL.md", folder))
    name, description = header.get("name", ""), header.get("description", "")
    if not _NAME.fullmatch(name):
        raise _invalid(folder, f"its name {name!r} is not 1 to 64 of A-Z a-z 0-9 . _ -")
    if not 1 <= (length := len(description)) <= MAX_DESCRIPTION_CHARS:
        raise _invalid(
            folder, f"its description has {length:,} characters; 1 to {MAX_DESCRIPTION_CHARS:,} are allowed"
        )
    return Skill(
        name, description, folder.resolve(), instructions, dict(_references(folder)), _entrypoint(folder)
    )


def _split(folder: Path, text: str) -> tuple[dict[str, str], str]:
    """The header and the instructions of a `SKILL.md`."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        raise _invalid(folder, "SKILL.md does not begin with a line ---, and a header after it")
    end = next((at for at, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        raise _invalid(folder, "the header of SKILL.md has no line --- at its end")
    return _fields(lines[1:end]), "\n".join(lines[end + 1 :]).strip()


def _fields(lines: Sequence[str]) -> dict[str, str]:
    """The fields of the header: `name: text`, or `name: >` with the text in indented lines."""
    fields: dict[str, str] = {}
    block = ""
    for line in lines:
        if line[:1].isspace() or not line.strip():
            if block:
                fields[block] = f"{fields[block]} {line.strip()}".strip()
            continue
        key, colon, value = line.partition(":")
        block, value = "", value.strip()
        if not colon or line.startswith("#"):
            continue
        if value in _BLOCK:
            block, value = key.strip(), ""
        fields[key.strip()] = _unquoted(value)
    return fields


def _unquoted(value: str) -> str:
    is_quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def _references(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files in `references`. Hidden ones and links that leave the folder do not belong to the skill."""
    root = folder.resolve()
    files = sorted(path for path in (folder / "references").rglob("*") if path.is_file())
    shown = [
        path
        for path in files
        if path.resolve().is_relative_to(root)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if len(shown) > MAX_FILES:
        raise _invalid(folder, f"it has {len(shown):,} references, {MAX_FILES} are allowed")
    for path in shown:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _invalid(
                folder, f"{path.relative_to(folder)} has more than {MAX_FILE_BYTES // 1024} KiB; split it"
            )
        yield path.relative_to(folder).as_posix(), path.resolve()


def _entrypoint(folder: Path) -> Path | None:
    found = sorted((folder / "src").glob("*/entrypoint.py"))
    if len(found) > 1:
        raise _invalid(folder, "it has more than one src/<package>/entrypoint.py")
    if not found:
        return None
    path = found[0].resolve()
    if not path.is_relative_to(folder.resolve()) or not _PACKAGE.fullmatch(path.parent.name):
        raise _invalid(folder, f"{found[0].relative_to(folder)} is not in a Python package of this folder")
    return path


def _check_packages(skills: Iterable[Skill]) -> None:
    """Raises `PluginConfigError` if the code of two skills is in packages of one name: one would hide the
    other."""
    packages: dict[str, Skill] = {}
    for skill in skills:
        if skill.can_run and (other := packages.setdefault(skill.package, skill)) is not skill:
            raise PluginConfigError(
                f"the skills {other.name!r} and {skill.name!r} both have a Python package {skill.package!r}",
                hint="rename one of the packages below src",
            )


def _text_of(path: Path, folder: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _invalid(folder, f"{path.name} has more than {MAX_FILE_BYTES // 1024} KiB; use references")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise _invalid(folder, f"{path.name} cannot be read: {why}") from error


def _invalid(folder: Path, problem: str) -> PluginConfigError:
    return PluginConfigError(f"the skill in {folder} is not valid: {problem}", hint="see docs/skills.md")
