"""Small tables of HTML, for notebooks.

Whatever comes from a store is escaped for HTML, with characters that act on text written out (`texts.printable`). No
script, no style sheet and no link: what a notebook shows is its own.
"""

import html
from collections.abc import Iterable, Sequence

from ckptstore.texts import printable

__all__ = ["MAX_ROWS", "caption", "table"]

MAX_ROWS = 100
"""Of a table: the newest, the largest, or those that moved farthest."""
_MAX_CHARACTERS = 200


def caption(title: str, text: str) -> str:
    """A line above a table."""
    return f"<div><strong>{_text(title)}</strong> {html.escape(printable(text))}</div>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows below headings."""
    head = "".join(f"<th>{_text(each)}</th>" for each in headings)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: str) -> str:
    shown = value if len(value) <= _MAX_CHARACTERS else f"{value[:_MAX_CHARACTERS]}…"
    return html.escape(printable(shown))
