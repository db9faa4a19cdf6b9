"""Writes the price table, `openagents_worker/llm/prices.json`, from the table in a wheel of `litellm`.

    pip download litellm --no-deps
    python docs/prices.py litellm-*.whl

The package is not installed, and nothing of it is executed: its table is JSON (MIT license). The data file
names the wheel and the day on which it was read.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "openagents_worker" / "llm" / "prices.json"
TABLE = "litellm/model_prices_and_context_window_backup.json"
VENDORS = (
    "openai",
    "anthropic",
    "gemini",
    "deepseek",
    "mistral",
    "xai",
    "moonshot",
    "dashscope",
    "zai",
    "minimax",
    "cohere_chat",
    "cerebras",
    "groq",
)
"""Vendors that sell under names of their own. The first one that has a name decides its price. Gateways and
hosts state the cost in their replies, or sell the models of others at other prices."""
MODES = ("chat", "responses")
FIELDS = {
    "input_cost_per_token": "input",
    "output_cost_per_token": "output",
    "cache_read_input_token_cost": "cached_read",
    "cache_read_input_audio_token_cost": "cached_audio",
    "cache_creation_input_token_cost": "cached_write",
    "cache_creation_input_token_cost_above_1hr": "cached_write_long",
    "cache_creation_input_token_cost_above_12hr": "cached_write_long",
    "output_cost_per_reasoning_token": "reasoning",
    "input_cost_per_image_token": "image",
    "input_cost_per_audio_token": "audio",
    "output_cost_per_audio_token": "output_audio",
}
SEARCHES = frozenset({"openai", "anthropic"})
"""Vendors that bill each web search of a model and count them in their replies. Gemini has free ones."""
REGIONS = {
    "regional_processing_uplift_multiplier_eu": "eu",
    "regional_processing_uplift_multiplier_us": "us",
    "fedramp_uplift_multiplier": "gov",
}
"""OpenAI's regions, as their hosts begin. A model without the first two costs the same in all others."""
_FIELD = re.compile(
    rf"(?P<base>{'|'.join(sorted(FIELDS, key=len, reverse=True))})"
    r"(?:_above_(?P<above>\d+)k_tokens)?(?:_(?P<tier>flex|priority|ultrafast))?"
)


def prices(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rates by model name, in USD per million tokens, and per web search."""
    found: dict[str, dict[str, Any]] = {}
    for vendor in VENDORS:
        for name, entry in table.items():
            if entry.get("litellm_provider") != vendor or entry.get("mode") not in MODES:
                continue
            short = name.removeprefix(f"{vendor}/").lower()
            rates = _rates(entry, vendor)
            if "/" not in short and short not in found and {"input", "output"} <= rates.keys():
                found[short] = rates
    return dict(sorted(found.items()))


def _rates(entry: Mapping[str, Any], vendor: str) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for field, value in entry.items():
        match = _FIELD.fullmatch(field)
        if match is None or not isinstance(value, int | float):
            continue
        if not value and match["base"].startswith("cache_creation"):
            continue  # not priced apart: written tokens cost what other input costs
        group = rates
        if tier := match["tier"]:
            group = group.setdefault(tier, {})
        if above := match["above"]:
            group = group.setdefault("above", {}).setdefault(str(int(above) * 1000), {})
        group[FIELDS[match["base"]]] = round(value * 1_000_000, 6)
    special = entry.get("provider_specific_entry") or {}
    if fast := special.get("fast"):  # Anthropic's fast mode multiplies every rate
        rates["fast"] = _multiplied(rates, fast)
    if us := special.get("us"):  # and so does its data residency
        rates["regions"] = {"us": us}
    if regions := {region: entry[field] for field, region in REGIONS.items() if field in entry}:
        rates["regions"] = regions if "eu" in regions else {"*": 1.0, **regions}
    searches = set((entry.get("search_context_cost_per_query") or {}).values())
    if vendor in SEARCHES and len(searches) == 1:  # the same, however much a search finds
        rates["web_search"] = searches.pop()
    return rates


def _multiplied(rates: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {
        name: _multiplied(value, factor) if isinstance(value, Mapping) else round(value * factor, 6)
        for name, value in rates.items()
    }


def main(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        table = json.loads(archive.read(TABLE))
    version = "-".join(wheel.name.split("-")[:2])
    data = {
        "source": f"{TABLE} of {version} (MIT license)",
        "date": datetime.fromtimestamp(wheel.stat().st_mtime, UTC).date().isoformat(),
        "unit": "USD per million tokens; web_search: USD per search; regions: factors",
    }
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in data.items())
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(rates)}" for name, rates in prices(table).items())
    TARGET.write_text(f'{{\n{head}"models": {{\n{rows}\n}}\n}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
