"""The names of the files with which a test and the tools of `agents.py` talk, in the folder of the diary."""

from __future__ import annotations

PRICES = "prices.json"
KILLS = "kills"
MENDED = "mended"
CRASHES = "crashes"
