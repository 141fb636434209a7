"""What has to be true of the site that `make docs` has made: run by it, after the build."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer.main
from sphinx.ext.autodoc.mock import mock  # type: ignore[attr-defined]

from ckptstore.cli import app

sys.path.append(str(Path(__file__).parent))
import generated

SITE = Path(__file__).parents[2] / "build" / "docs"
FETCHED = {("link", "href"), ("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")}
CLICKED = ("a", "href")


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what a browser fetches to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note what a tag has."""
        for name, value in attributes:
            if name == "id" and value:
                self.anchors.add(value)
            elif (tag, name) == CLICKED and value:
                self.links.append(value)
            elif (tag, name) in FETCHED and value:
                self.fetched.append(value)


@cache
def page(path: Path) -> Page:
    """A page, read once."""
    return Page(path)


def pages() -> list[Path]:
    """All pages of the site."""
    return sorted(SITE.rglob("*.html"))


def public_names() -> Iterator[str]:
    """Every public name of every public module, and the public members of classes."""
    with mock(generated.MOCKED):
        for module_name in generated.public_modules():
            module = importlib.import_module(module_name)
            for name in module.__all__:
                value = getattr(module, name)
                yield f"{module_name}.{name}"
                if inspect.isclass(value) and not issubclass(value, BaseException):
                    yield from (
                        f"{module_name}.{name}.{member}" for member in vars(value) if not member.startswith("_")
                    )


def test_there_is_a_site() -> None:
    assert len(pages()) > 50
    assert (SITE / "index.html").exists()


def test_no_link_or_anchor_is_dead() -> None:
    dead = []
    for path in pages():
        for link in page(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or (
                parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in page(target).anchors
            ):
                dead.append(f"{path.relative_to(SITE)}: {link}")
    assert not dead


def test_nothing_is_fetched_from_elsewhere() -> None:
    fetched = {source for path in pages() for source in page(path).fetched if urlsplit(source).netloc}
    styles = {
        path.name
        for path in SITE.rglob("*.css")
        for text in [path.read_text("utf-8")]
        if "url(http" in text or "@import" in text
    }
    assert not fetched | styles


@pytest.mark.parametrize("name", sorted(set(public_names())))
def test_every_public_name_has_its_entry(name: str) -> None:
    anchors = set().union(*(page(path).anchors for path in (SITE / "generated" / "api").glob("*.html")))
    assert name in anchors


def test_every_command_and_option_is_shown() -> None:
    text = " ".join((SITE / "generated" / "commands.html").read_text("utf-8").split())
    command = typer.main.get_command(app)
    for name, one in command.commands.items():  # type: ignore[attr-defined]
        section = text.partition(f'id="ckptstore-{name}"')[2].partition("<h2")[2].partition("<section")[0]
        missing = [
            option
            for parameter in one.params
            for option in parameter.opts
            if option.startswith("--") and option not in section
        ]
        assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize(
    "document", sorted(path.stem for path in (SITE.parents[1] / "docs" / "decisions").glob("0*.md"))
)
def test_every_decision_is_a_page(document: str) -> None:
    assert (SITE / "decisions" / f"{document}.html").exists()
