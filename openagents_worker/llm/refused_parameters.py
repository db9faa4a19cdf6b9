"""Sampling parameters that a model refuses: the only place that leaves them out of its requests.

Newer models choose themselves how they sample. They refuse a request with `temperature`, `top_p` or `top_k`,
or with two of them. The clients know the names of many such models; another one is asked once more without
the parameter that its error names. A refused request is not billed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from openagents_worker.errors import LLMError, LLMResponseError

__all__ = ["RefusedParameters"]

_REFUSING_STATUS = frozenset({400, 422})
_NAME = r"[`'\"]?\b(temperature|top_p|top_k)\b[`'\"]?"
_REFUSED = re.compile(
    rf"{_NAME} (?:is deprecated|is not supported|does not support|is not available)"
    rf"|(?:unsupported parameter|unsupported value):? {_NAME}",
    re.IGNORECASE,
)
_NOT_TOGETHER = re.compile(rf"{_NAME} and {_NAME} cannot both be", re.IGNORECASE)


class RefusedParameters:
    """The parameters that the models of one provider have refused."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def without(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body without the parameters that its model has refused."""
        refused = self._names.get(str(body.get("model")), set())
        return {name: value for name, value in body.items() if name not in refused}

    def add(self, model: str, error: LLMError) -> bool:
        """Remember what an error refuses. Returns whether the request may be accepted without it."""
        if not isinstance(error, LLMResponseError) or error.status not in _REFUSING_STATUS:
            return False
        together, refused = _NOT_TOGETHER.search(error.message), _REFUSED.search(error.message)
        if together is not None:
            name = together[2]
        elif refused is not None:
            name = refused[1] or refused[2]
        else:
            return False
        known = self._names.setdefault(model, set())
        is_new = name.lower() not in known
        known.add(name.lower())
        return is_new
