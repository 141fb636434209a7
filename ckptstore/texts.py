"""Values as people read them, without surprises: names come from stores that anybody may have written."""

__all__ = ["bytes_text", "counted", "printable", "time_text"]

_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")


def printable(text: object) -> str:
    r"""`text` with every character that could act on a terminal (escapes, line breaks, reversals) written as \x1b."""
    characters = str(text)
    if characters.isprintable():
        return characters
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in characters)


def bytes_text(count: int) -> str:
    """A size as people read it, with three digits: "115 MB", where MB is a million bytes."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in _UNITS:
        size /= 1000
        # What would be rounded to 1000 belongs to the next unit.
        if size < 999.5 or unit == _UNITS[-1]:
            break
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:.{digits}f} {unit}"


def counted(count: int, thing: str) -> str:
    """A count with its noun: "1 chunk", "2 chunks"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def time_text(created: str) -> str:
    """A time of a manifest (UTC, ISO 8601) to the second."""
    return created[:19].replace("T", " ")
