"""What was found, as a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

def write_table(results, folder):
    return json.dumps(results, indent=1)

def draw(folder):
    pass
