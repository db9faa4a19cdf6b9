"""Each measurement can be imported: a name of the library that it uses and that has moved is found here."""

from __future__ import annotations

import importlib

import pytest

from bench.__main__ import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_measurement_can_be_imported(name: str) -> None:
    assert callable(importlib.import_module(f"bench.{name}").main)
