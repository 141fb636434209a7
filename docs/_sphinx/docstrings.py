"""Docstrings as they are written here, for autodoc: indented lines between paragraphs are code."""

import re

__all__ = ["mark_code"]

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Warns|Yields):$")

BAR = re.compile(r"(`[^`]*`)|\|")
"""A bar outside of code, which is a substitution's in reStructuredText and an absolute value's here."""


def mark_code(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Put a code-block directive before each indented block that belongs to no section of Google's style."""
    marked: list[str] = []
    in_section = in_code = False
    for number, line in enumerate(lines):
        if line and not line.startswith(" "):
            in_section, in_code = bool(SECTION.match(line)), False
        elif line.startswith("    ") and not in_section and not in_code and not lines[number - 1].strip():
            marked += [".. code-block:: python", ""]
            in_code = True
        marked.append(line if in_code else BAR.sub(lambda bar: bar[1] or r"\|", line))
    lines[:] = marked
