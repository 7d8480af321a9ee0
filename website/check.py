"""Links of the built site lead somewhere, and nothing is loaded from elsewhere: ``python website/check.py DIR``."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADING = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The addresses a page loads or links to, and the anchors it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag in LOADING and LOADING[tag] in found:
            self.loads.append(found[LOADING[tag]])
        elif tag == "a" and "href" in found:
            self.links.append(found["href"])


def faults(site: Path) -> list[str]:
    """One line for each address that cannot be followed; none for a whole site."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name} loads {address} from elsewhere" for address in page.loads if _is_elsewhere(address)]
        for address in [*page.links, *page.loads]:
            # The page for what is not found has addresses from the root of a server.
            if not _is_elsewhere(address) and name.name != "404.html" and not _leads(path, address, pages):
                found.append(f"{name} refers to {address}, which is not there")
    for path in sorted(site.rglob("*.css")):
        if "url(http" in path.read_text(encoding="utf-8") or "@import" in path.read_text(encoding="utf-8"):
            found.append(f"{path.relative_to(site)} loads from elsewhere")
    return found if pages else [f"{site} has no pages"]


def _is_elsewhere(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "mailto")


def _leads(path: Path, address: str, pages: dict[Path, Page]) -> bool:
    if address.startswith("data:"):
        return True
    parts = urlsplit(address)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not parts.fragment or target not in pages:
        return target.is_file()
    return unquote(parts.fragment) in pages[target].anchors


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]).resolve())
    print("\n".join(wrong) or "Every link leads somewhere, and nothing is loaded from elsewhere.")
    sys.exit(bool(wrong))
