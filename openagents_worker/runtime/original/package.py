"""The package of the original SDK: the only place that finds its classes, and recognizes its plugins.

This library does not depend on the package. Its classes are known once a plugin has imported them.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["PACKAGE", "is_instance", "is_original_pattern", "loaded"]

PACKAGE = "openagents"
PATTERN_METHODS = ("setup", "react", "finalize")


def loaded(module: str, name: str) -> Any:
    """A class or object of a module of the package; None if the module has not been imported.

    `module` is the path inside of the package, for example `interfaces.tool`.
    """
    return getattr(sys.modules.get(f"{PACKAGE}.{module}"), name, None)


def is_instance(value: object, module: str, name: str) -> bool:
    """Whether a value is an instance of a class of the package."""
    kind = loaded(module, name)
    return isinstance(kind, type) and isinstance(value, kind)


def is_original_pattern(pattern: Any) -> bool:
    """Whether a pattern has a method of the original SDK that patterns of this library do not have."""
    return any(hasattr(pattern, method) for method in PATTERN_METHODS)
