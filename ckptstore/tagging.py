"""Tags: names that people give to steps of a run, which keep them from being pruned. One small object each."""

from ckptstore import catalog
from ckptstore.errors import NotFoundError
from ckptstore.format import TagKey, check_tag, tag_prefix
from ckptstore.manifest import Tag, encode
from ckptstore.objects.base import Objects
from ckptstore.writer import now_text, this_writer

__all__ = ["add", "listed", "remove"]


def add(objects: Objects, run: str, step: int, tag: str) -> None:
    """Give a step a tag; that it has it already is fine.

    Raises:
        InvalidInputError: it cannot be a tag.
        NotFoundError: there is no checkpoint at the step.
        UnavailableError: the backend failed.
    """
    key = TagKey(run, step, check_tag(tag))
    catalog.manifest_of(objects, run, step)
    objects.create(str(key), encode(Tag(run=run, step=step, tag=tag, created=now_text(), writer=this_writer())))
    try:
        # A prune that read the tags before this one was there may have taken the step meanwhile.
        catalog.manifest_of(objects, run, step)
    except NotFoundError:
        objects.delete(str(key))
        raise


def remove(objects: Objects, run: str, step: int, tag: str) -> None:
    """Take a tag away; that the step does not have it is fine."""
    objects.delete(str(TagKey(run, step, check_tag(tag))))


def listed(objects: Objects, run: str) -> dict[int, tuple[str, ...]]:
    """The tags of each step of a run, sorted, from one listing: that a tag's object is there is what counts."""
    found: dict[int, tuple[str, ...]] = {}
    for row in objects.list(tag_prefix(run)):
        if key := TagKey.parse(row.key):
            found[key.step] = (*found.get(key.step, ()), key.tag)
    return found
