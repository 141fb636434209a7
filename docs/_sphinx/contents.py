"""The navigation of the site, out of the lists of links that documents show anyway.

docs/README.md lists every document below headings, which become the captions of the navigation. A README.md in a folder
lists that folder's documents, and so does a page that is named in `GENERATED` for what is made at build time.
"""

import posixpath
import re
from pathlib import Path

__all__ = ["GENERATED", "add", "sections"]

ITEM = re.compile(r"^- \[[^\]]*\]\(([^)#\s]+\.md)\)", re.MULTILINE)
GENERATED = {
    "reference/api": ["generated/api/*"],
    "reference/cli": ["generated/commands"],
}
"""Pages below which generated ones are filed."""
OUTSIDE = {"../SECURITY.md": "generated/security", "../CHANGELOG.md": "generated/changelog"}
"""Documents of the repository that are none of docs/, and the page that each is on the site."""


def sections(text: str) -> dict[str, list[str]]:
    """The documents that a page lists, by the heading that they stand below; where it names a section, not the page."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    found = {title: ITEM.findall(part) for title, part in zip(parts[1::2], parts[2::2], strict=True)}
    return {title: pages for title, pages in found.items() if pages}


def add(app: object, docname: str, source: list[str]) -> None:
    """Append hidden toctrees to the pages that lead to others."""
    docs = Path(app.srcdir)  # type: ignore[attr-defined]
    if docname == "index":
        for caption, pages in sections((docs / "README.md").read_text(encoding="utf-8")).items():
            source[0] += toctree(
                [OUTSIDE.get(page) or page.removesuffix(".md") for page in pages if page != "index.md"], caption
            )
    elif posixpath.basename(docname) == "README":
        folder = posixpath.dirname(docname)
        for pages in sections(source[0]).values():
            source[0] += toctree([posixpath.join(folder, page).removesuffix(".md") for page in pages])
    elif docname in GENERATED:
        source[0] += toctree(GENERATED[docname])


def toctree(pages: list[str], caption: str = "") -> str:
    """The directive for some pages."""
    lines = ["", "```{toctree}", ":hidden:", ":glob:", *([f":caption: {caption}"] if caption else []), ""]
    return "\n".join([*lines, *(f"/{page}" for page in pages), "```", ""])
