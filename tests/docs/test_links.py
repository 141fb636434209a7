"""Links within the repository lead to something, and every document is in the list that the site's navigation is of."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")] + [
    path for path in sorted(DOCS.rglob("*.md")) if "generated" not in path.relative_to(DOCS).parts
]


@cache
def tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def inline(text: str) -> Iterator[Token]:
    for token in tokens(text):
        yield from token.children or ()


def links(text: str) -> list[str]:
    """Where a document leads, its images too; footnotes are plain text to this reader, their links are not."""
    return [str(token.attrs[name]) for token in inline(text) for name in ("href", "src") if name in token.attrs]


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as git hosts and the site make them."""
    found: set[str] = set()
    everything = tokens(text)
    for opening, content in pairwise(everything):
        if opening.type != "heading_open":
            continue
        title = "".join(child.content for child in content.children or () if child.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        numbered = (f"{slug}-{number}" for number in range(1, 100))
        found.add(slug if slug not in found else next(name for name in numbered if name not in found))
    return found


def dead_links(path: Path, text: str) -> list[str]:
    dead = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = unquote(link).partition("#")
        target = (path.parent / place).resolve() if place else path
        is_there = target.exists() and target.is_relative_to(ROOT)
        if is_there and anchor:
            is_there = anchor in anchors(text if target == path else target.read_text("utf-8"))
        if not is_there:
            dead.append(link)
    return dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_or_anchor_is_dead(path: Path) -> None:
    assert dead_links(path, path.read_text("utf-8")) == []


def test_this_test_can_see() -> None:
    text = "# A `b` c!\n\n# A b c\n\n[1](#a-b-c) [2](#a-b-c-1) [3](#d) [4](nowhere.md) [5](https://example.org)\n\n`[6](y)`"
    assert dead_links(ROOT / "README.md", text) == ["#d", "nowhere.md"]


def test_every_document_is_in_the_list() -> None:
    lists = {DOCS / "README.md", *DOCS.rglob("README.md")}
    listed = {(path.parent / link).resolve() for path in lists for link in links(path.read_text("utf-8"))}
    missing = [path for path in DOCUMENTS if path.is_relative_to(DOCS) and path not in listed | {DOCS / "README.md"}]
    assert not [str(path.relative_to(ROOT)) for path in missing]
