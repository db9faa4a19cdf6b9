"""Files of JSON lines that processes append to while others read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def complete_lines(path: Path) -> list[Any]:
    """The lines written so far; none if there is no file.

    A write becomes visible page by page: the last line may be there in part. Without its end it is left out.
    """
    written = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in written if line.endswith("\n")]
