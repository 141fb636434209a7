"""A save of many processes without processes: each part stored in its turn, as ranks do at the same time."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ckptstore import protocol, saving
from ckptstore.errors import CheckpointError
from ckptstore.format import new_joint_save_id, part_id
from ckptstore.manifest import Manifest, content_digest
from ckptstore.objects.base import Objects
from ckptstore.performing import Performer
from ckptstore.shards import Part, Shard, Terms, Tree, Value, Whole
from ckptstore.writer import now_text, this_writer

Given = tuple[tuple[str | int, ...], torch.Tensor, tuple[int, ...], Sequence[int]]
"""The path of a tensor, a shard of it, where that begins, and the shape of the whole."""


def save(
    objects: Objects,
    run: str,
    step: int,
    parts: Sequence[Iterable[Given]],
    values: dict[str, Any],
    *,
    carried_bytes: int = 0,
    replace: bool = False,
) -> Manifest:
    """Save what all parts make up, and values, which the first process has."""
    marker = saving.ensure_store(objects)
    request = protocol.JointRequest(
        run=run, step=step, save=new_joint_save_id(), created=now_text(), writer=this_writer()
    )
    performer = Performer(objects)
    newest = performer.perform(protocol.begin(request))
    shards: dict[tuple[str | int, ...], list[Shard]] = {}
    shapes: dict[tuple[str | int, ...], Sequence[int]] = {}
    tree, whole = Tree(), Whole()
    try:
        for number, given in enumerate(parts):
            terms = Terms(
                save=request.save,
                upload=part_id(request.save, number),
                newest=newest,
                chunk_bytes=marker.chunk_bytes,
                small_bytes=marker.small_bytes,
                carried_bytes=carried_bytes,
            )
            part, paths = Part(terms), []
            for path, tensor, at, shape in given:
                part.add_shard(".".join(map(str, path)), tensor, at, shape)
                paths.append(path)
                shapes[path] = shape
            for name, value in values.items() if number == 0 else ():
                part.add_value(name, value)
            told = part.store(objects, codec="fast", threads=1)
            for path, what in zip(paths, told, strict=False):
                assert isinstance(what, Shard)
                shards.setdefault(path, []).append(what)
            for name, made in zip(values, told[len(paths) :], strict=False):
                assert isinstance(made, Value)
                tree.put((name,), whole.add_value(made))
        for path, found in shards.items():
            tree.put(path, whole.add_tensor(".".join(map(str, path)), shapes[path], found, requires_grad=False))
    except CheckpointError:
        performer.abandon()
        raise
    table, lengths, held, rest = whole.lay_out(
        chunk_bytes=marker.chunk_bytes, small_bytes=marker.small_bytes, threads=1
    )
    skeleton = tree.skeleton()
    asked = protocol.SaveRequest(
        run=run,
        step=step,
        save=request.save,
        created=request.created,
        writer=request.writer,
        metrics={},
        metadata={},
        content=content_digest(skeleton, table, list(lengths)),
        tree=skeleton,
        segments=table,
        chunks=lengths,
        raw_bytes=sum(segment.bytes for segment in table),
        replace=replace,
    )
    performer.hand_over(rest)
    return performer.perform(protocol.conclude(asked, held))
