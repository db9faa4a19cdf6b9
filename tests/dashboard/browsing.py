"""A headless Chromium that is operated by keyboard. Real: the browser. It needs chromium and its driver."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import wait_for

__all__ = ["Browser", "browsing"]

MAX_TABS = 400
HEIGHT = 900
MOST_HEIGHT = 1_600  # of a picture
COLOURS = 96  # of a picture: text and a few tones; a third of the bytes
PICTURES = "DASHBOARD_PICTURES"
"""The environment variable with the folder to which pictures are written; without it there are none."""

FOCUSED = """
const at = document.activeElement;
const label = at.labels && at.labels.length ? at.labels[0].innerText : "";
return [at.tagName.toLowerCase(), (at.getAttribute("aria-label") || at.innerText || label || "").trim()];
"""


OUTSIDE = """
const width = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth <= width) return [];
return [...document.querySelectorAll("body *")]
    .filter(each => each.getBoundingClientRect().right > width + 1).map(each => each.outerHTML.slice(0, 150));
"""


class Browser:
    """A tab of the browser."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, path: str, *, width: int = 1280, theme: str = "light") -> None:
        """Open a page with this width (pixels) and theme of the operating system."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self._resize(width, HEIGHT)
        self.driver.get(self.url + path)

    def text(self) -> str:
        """The visible text."""
        return str(self.driver.execute_script("return document.body.innerText"))

    def wait_for_text(self, text: str) -> None:
        wait_for(lambda: text in self.text(), f"the page shows {text!r}")

    def tab_to(self, label: str, tag: str = "") -> None:
        """Press Tab until the control with this text or label has the focus."""
        seen = []
        for _ in range(MAX_TABS):
            self.press("\ue004")
            found_tag, found = self.driver.execute_script(FOCUSED)
            seen.append(found[:40])
            if found.startswith(label) and tag in ("", found_tag):
                return
        pytest.fail(f"{label!r} cannot be reached with Tab: {seen[-60:]}")

    def press(self, *keys: str) -> None:
        """Type text or keys where the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def enter(self, label: str, tag: str = "") -> None:
        """Tab to a control and press Enter."""
        self.tab_to(label, tag)
        self.press("\ue007")

    def fill(self, label: str, text: str) -> None:
        """Tab to a field and replace its text."""
        self.tab_to(label)
        self.driver.execute_script("document.activeElement.select()")
        self.press(text)

    def requested_urls(self) -> list[str]:
        """The addresses that pages have requested since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        urls = [str(params["request"]["url"]) for params in sent]
        return [
            url for url in urls if not url.startswith(("chrome:", "data:"))
        ]  # the browser's own first page

    def errors(self) -> list[str]:
        """What the console reports since the last call: refused scripts and styles, exceptions."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def parts_outside(self) -> list[str]:
        """The parts that stick out on the right, if the page must be scrolled to the side."""
        return list(self.driver.execute_script(OUTSIDE))

    def accessibility_problems(self) -> list[str]:
        """The serious violations that axe-core finds."""
        self.driver.execute_script((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
        script = "const done = arguments[arguments.length - 1]; axe.run().then(done)"
        violations = self.driver.execute_async_script(script)["violations"]
        return [
            f"{each['id']}: {node['html'][:200]}: {node['failureSummary'][:300]}"
            for each in violations
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]

    def picture(self, name: str) -> None:
        """Write a picture of the whole page, if a folder for them is set."""
        folder = os.environ.get(PICTURES)
        if not folder:
            return
        from PIL import Image  # only pictures need it

        width = self.driver.execute_script("return window.innerWidth")
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        self._resize(width, min(height, MOST_HEIGHT))
        png = Image.open(BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        png.quantize(COLOURS, dither=Image.Dither.NONE).save(Path(folder) / f"{name}.png", optimize=True)

    def _resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@contextmanager
def browsing(url: str, folder: Path) -> Generator[Browser]:
    """A browser with an empty profile during the block. Skips the test if there is no driver."""
    driver = shutil.which("chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    if driver is None:
        pytest.skip("needs chromium and its driver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={folder}")
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield Browser(chrome, url)
    finally:
        chrome.quit()
