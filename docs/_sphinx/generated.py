"""Pages that are made from the code before Sphinx reads: the Python API, the commands, files that documents lead to."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import links
import typer.main
from sphinx.ext.autodoc.mock import mock  # type: ignore[attr-defined]

__all__ = ["public_modules", "write"]

MOCKED = ["accelerate", "keras", "lightning", "ml_dtypes", "tensorflow", "transformers"]
"""What the integrations are for, and what building the site does not need."""
RESULTS = {
    "ckptstore.collecting": ["CollectReport"],
    "ckptstore.compacting": ["CompactReport"],
    "ckptstore.diffing.report": ["Diff", "TensorDiff"],
    "ckptstore.diffing.trees": ["Change"],
    "ckptstore.doctor": ["Finding"],
    "ckptstore.pruning": ["PruneReport"],
    "ckptstore.repairing": ["RepairReport"],
    "ckptstore.usage": ["Usage", "RunUsage"],
    "ckptstore.verifying": ["VerifyReport", "Damage"],
}
"""What methods return, and nobody needs to import."""


def write(root: Path, docs: Path) -> None:
    """Make docs/generated anew; files that would not change are left alone, so that Sphinx need not read them again."""
    pages = api_pages() | {"commands.md": commands()}
    for path in ("SECURITY.md", "CHANGELOG.md"):
        page = links.page_of(path)
        pages[page.removeprefix("generated/") + ".md"] = links.relink((root / path).read_text("utf-8"), path, page)
    pages |= file_pages(root)
    folder = docs / "generated"
    for old in sorted(folder.rglob("*")):
        if old.is_file() and str(old.relative_to(folder)) not in pages:
            old.unlink()
    for name, text in pages.items():
        place = folder / name
        if not place.exists() or place.read_text("utf-8") != text:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, "utf-8")


def public_modules() -> list[str]:
    """The modules that people import from, `ckptstore` first."""
    integrations = importlib.import_module("ckptstore.integrations")
    below = [name for _, name, _ in pkgutil.iter_modules(integrations.__path__) if not name.startswith("_")]
    return [
        "ckptstore",
        *(f"ckptstore.integrations.{name}" for name in below),
        "ckptstore.migration",
        "ckptstore.testing",
    ]


def api_pages() -> dict[str, str]:
    """A page of autodoc's directives for each public module, and one for what methods return."""
    pages = {}
    with mock(MOCKED):
        for name in public_modules():
            module = importlib.import_module(name)
            pages[f"api/{name}.rst"] = "\n".join(
                [
                    heading(name),
                    f".. automodule:: {name}\n   :no-members:\n",
                    *(directive(module, member) for member in sorted(module.__all__, key=order(module))),
                ]
            )
        pages["api/results.rst"] = "\n".join(
            [
                heading("What methods return"),
                "Values to look at; none of these classes has to be imported.\n",
                *(
                    directive(importlib.import_module(name), member, "   :undoc-members:\n")
                    for name, members in RESULTS.items()
                    for member in members
                ),
            ]
        )
    return pages


def heading(title: str) -> str:
    """A title in reStructuredText."""
    return f"{title}\n{'=' * len(title)}\n"


def order(module: ModuleType) -> Callable[[str], tuple[int, str]]:
    """Classes, functions, errors, then the rest."""

    def key(name: str) -> tuple[int, str]:
        value = getattr(module, name)
        if inspect.isclass(value):
            return (2 if issubclass(value, BaseException) else 0), name
        return (1 if callable(value) else 3), name

    return key


def directive(module: ModuleType, name: str, more: str = "") -> str:
    """Autodoc's directive for one name of a module."""
    value = getattr(module, name)
    members = "   :members:\n" + more
    if inspect.isclass(value) and issubclass(value, BaseException):
        kind = f"autoexception:: {module.__name__}.{name}\n   :show-inheritance:\n{members}"
    elif inspect.isclass(value):
        fields = hasattr(value, "_fields") or dataclasses.is_dataclass(value)
        undocumented = "   :undoc-members:\n" if fields and not more else ""
        kind = f"autoclass:: {module.__name__}.{name}\n{members}{undocumented}"
    elif callable(value):
        kind = f"autofunction:: {module.__name__}.{name}\n"
    else:
        kind = f"py:data:: {name}\n   :module: {module.__name__}\n   :type: {type(value).__name__}\n"
    return f".. {kind}"


def commands() -> str:
    """What the program says of its commands and options, as a page."""
    from typer.cli import get_docs_for_click

    from ckptstore.cli import app

    command = typer.main.get_command(app)
    with command.make_context("ckptstore", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="ckptstore")  # type: ignore[arg-type]
    text = text.replace("\b\n", "")  # which tells Typer not to wrap what follows
    # Examples and the like are paragraphs that are not to be wrapped.
    text = re.sub(
        r"^((?:Examples|Exit status):)\n((?:  .*\n)+)", r"**\1**\n\n```text\n\2```\n", text, flags=re.MULTILINE
    )
    text = text.replace(
        "# `ckptstore`\n", "# Every command and option\n\nWhat `ckptstore --help` says, command by command.\n", 1
    )
    return text


def file_pages(root: Path) -> dict[str, str]:
    """A page for each file and folder of the repository that a document leads to."""
    wanted: set[str] = set()
    for document in links.documents(root):
        wanted |= links.outside(document.read_text("utf-8"), document.relative_to(root).as_posix())
    for folder in [path for path in wanted if (root / path).is_dir()]:
        wanted |= {path.relative_to(root).as_posix() for path in (root / folder).glob("*.py")}
    return {f"files/{path}.md": file_page(root, path, wanted) for path in wanted if (root / path).exists()}


def file_page(root: Path, path: str, wanted: set[str]) -> str:
    """The text of a file; of a folder, links to its files."""
    head = f"---\norphan: true\nnosearch: true\n---\n# {path}\n\n"
    if (root / path).is_dir():
        return head + "".join(
            f"- [{file}]({Path(path).name}/{Path(file).name}.md)\n"
            for file in sorted(wanted)
            if str(Path(file).parent) == path
        )
    up = "/".join([".."] * (3 + path.count("/")))
    language = {".py": "python", ".sh": "bash", ".toml": "toml"}.get(Path(path).suffix, "text")
    return f"{head}```{{literalinclude}} {up}/{path}\n:language: {language}\n```\n"
