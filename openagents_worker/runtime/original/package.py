"""The package of the original SDK: the only place that finds its classes.

This library does not depend on the package. Its classes are known once a plugin has imported them.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["PACKAGE", "is_instance", "loaded"]

PACKAGE = "openagents"


def loaded(module: str, name: str) -> Any:
    """A class or object of a module of the package; None if the module has not been imported.

    `module` is the path inside of the package, for example `interfaces.tool`.
    """
    return getattr(sys.modules.get(f"{PACKAGE}.{module}"), name, None)


def is_instance(value: object, module: str, name: str) -> bool:
    """Whether a value is an instance of a class of the package."""
    kind = loaded(module, name)
    return isinstance(kind, type) and isinstance(value, kind)
