"""One page opened in a browser: what the tests of the report's page look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTHS = (390, 1440)
"""A phone and a desk."""


class Visit:
    """One page opened from disk, with everything it complained about and every address it asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1440, theme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        if self.page.locator("#lab").count():
            self.page.locator("#layer option").first.wait_for(state="attached")
            self.page.locator("#compare .value data").first.wait_for()

    def numbers(self, selector: str) -> list[float]:
        values = self.page.locator(f"{selector}").evaluate_all("found => found.map(one => one.value)")
        return [float(value) for value in values]

    def style(self, selector: str, name: str) -> str:
        return self.page.locator(selector).first.evaluate(f"one => getComputedStyle(one).{name}")
