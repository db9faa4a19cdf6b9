"""Changes of source files in the current folder. The only place that watches files.

It needs `watchfiles`, which the extra `embedded` brings.
"""

from __future__ import annotations

from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path

from openagents_worker.errors import ConfigError

__all__ = ["can_watch", "changed_files"]

SUFFIXES = (".py", ".json", ".md", ".toml", ".yaml", ".yml")
"""Of code, of agents files, and of prompts that lie beside them."""
LOOK_MS = 200  # between two looks of the caller at something else
SETTLE_MS = 300  # an editor or git writes several files for one change


def can_watch() -> bool:
    """Whether `watchfiles` is installed."""
    return find_spec("watchfiles") is not None


def changed_files(folder: Path, *others: Path) -> Generator[list[Path]]:
    """The files that have changed, each time; an empty list a few times a second in between.

    Watches the folder with all below it, but not `.venv`, `node_modules`, caches and hidden folders, and the
    `others`, wherever they are. Raises `ConfigError` if the system refuses that, for example because a folder
    may not be read, or because there are more folders than it watches.
    """
    from watchfiles import Change, DefaultFilter, watch

    folder = folder.resolve()
    others = tuple(path.resolve() for path in others)
    named, ignored = set(map(str, others)), DefaultFilter()

    def counts(change: Change, path: str) -> bool:
        if path in named:
            return True
        try:
            parts = Path(path).relative_to(folder).parts
        except ValueError:
            return False
        is_hidden = any(part.startswith(".") for part in parts)
        return path.endswith(SUFFIXES) and not is_hidden and ignored(change, path)

    outside = {
        path.resolve().parent for path in others if not path.resolve().is_relative_to(folder.resolve())
    }
    looks = watch(
        folder,
        *sorted(outside),
        watch_filter=counts,
        step=SETTLE_MS,
        rust_timeout=LOOK_MS,
        yield_on_timeout=True,
        raise_interrupt=True,
    )
    try:
        for changes in looks:
            yield sorted({Path(path) for _, path in changes})
    except (OSError, RuntimeError) as error:  # RuntimeError: one that `watchfiles` does not know
        raise ConfigError(
            f"the files in {folder} cannot be watched: {error}",
            hint="all folders in it must be readable; Linux watches fs.inotify.max_user_watches folders",
        ) from error
