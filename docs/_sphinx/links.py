"""Links out of docs/ to other files of the repository: on the site they lead to pages that show those files."""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from contents import OUTSIDE

__all__ = ["outside", "page_of", "relink", "resolve"]

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(`{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)
PAGES = {path.removeprefix("../"): page for path, page in OUTSIDE.items()} | {"README.md": "index"}


def page_of(path: str) -> str:
    """The page of the site (without its ending) that shows this file or folder of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        page = path.removeprefix("docs/").removesuffix(".md")
        return "index" if page == "README" else page
    return f"generated/files/{path}"


def relink(text: str, place: str, page: str) -> str:
    """Make the links of a document that stands at a place in the repository right for the page that it becomes."""

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[1]))
        if path.startswith("docs/") and not path.endswith(".md"):  # an image, say
            target = path.removeprefix("docs/")
        else:
            target = page_of(path) + ("" if (match[2] or "").startswith("#L") else ".md")
        return posixpath.relpath(target, posixpath.dirname(page) or ".") + (match[2] or "")

    return _outside_code(text, lambda prose: LINK.sub(link, prose))


def outside(text: str, place: str) -> set[str]:
    """The files and folders beyond documents that a document leads to."""
    found: set[str] = set()

    def note(prose: str) -> str:
        for match in LINK.finditer(prose):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[1]))
            if path not in PAGES and not path.startswith("docs/"):
                found.add(path)
        return prose

    _outside_code(text, note)
    return found


def resolve(app: object, docname: str, source: list[str]) -> None:
    """Relink a document of docs/ as Sphinx reads it."""
    if not docname.startswith("generated/"):
        source[0] = relink(source[0], f"docs/{docname}.md", docname)


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    done, end = [], 0
    for fence in FENCE.finditer(text):
        done += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*done, change(text[end:])])


def documents(root: Path) -> list[Path]:
    """The Markdown files that the site is made of, those beyond docs/ first."""
    docs = root / "docs"
    inside = [
        path for path in sorted(docs.rglob("*.md")) if path.relative_to(docs).parts[0] not in ("generated", "_sphinx")
    ]
    return [root / path for path in PAGES if path != "README.md"] + inside
