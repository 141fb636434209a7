"""`show`: what is in a checkpoint. From its manifest alone; no tensor is read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from ckptstore import catalog, tagging
from ckptstore.cli import options
from ckptstore.cli.printing import bytes_text, counted, print_json, print_line, printable, time_text
from ckptstore.cli.target import parse_options, resolve
from ckptstore.condemning import marked_corrupt
from ckptstore.errors import CorruptError
from ckptstore.manifest import Manifest, checkpoint_digest
from ckptstore.objects.base import Objects
from ckptstore.plain_values import is_container, pairs, to_json, to_text, type_name
from ckptstore.skeleton import MAX_DEPTH, TAG, TensorNode, children, is_tensor

__all__ = ["add_to"]

MAX_VALUE_CHARACTERS = 200
"""Of a value in the tree for people; with --json it is whole."""
MAX_PLAIN_ITEMS = 8
"""Of a list of plain values on its line."""
_PLAIN_SEQUENCES = {"list", "tuple", "set", "frozenset", "deque"}

Depth = Annotated[
    int | None,
    typer.Option("--depth", metavar="N", min=1, help="Sum up what lies deeper than N levels.", show_default=False),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "show",
        epilog=options.examples(
            "ckptstore show ./ckpts/lstm@300",
            "ckptstore show ./ckpts/lstm --depth 2",
            "ckptstore show s3://bucket/ckpts/lstm --json",
        ),
    )(show)


def show(
    target: options.Target,
    depth: Depth = None,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Show what is in a checkpoint. Without @STEP it is the newest of the run.

    That is the tree with types, shapes, bytes and values; the metrics and the metadata; who saved it, and when; and
    the digest, for run.restore(expect=...). No tensor is read: ckptstore verify does that.
    """
    place = resolve(target, parse_options(storage_options))
    run = place.require_run()
    manifest = catalog.pick(place.objects, run, place.step)
    root = _tree(manifest)
    state = _State(
        tagging.listed(place.objects, run).get(manifest.step, ()),
        sorted({ref.key for ref in manifest.chunks} & marked_corrupt(place.objects)),
    )
    if as_json:
        print_json(_document(place.objects, manifest, root, depth, state))
    else:
        _print(manifest, root, depth, state)
    return 0


@dataclass(frozen=True, slots=True)
class _State:
    """What stands beside a checkpoint's manifest."""

    tags: tuple[str, ...]
    damaged: list[str]
    """The keys of its chunks that were found damaged."""


# ---- the tree


@dataclass(slots=True)
class _Item:
    """A tensor, a container, or a value of the tree."""

    path: str
    key: str
    """Its path within the container that it is in."""
    node: Any
    type: str
    tensor: TensorNode | None = None
    shares_with: str | None = None
    """The path of the first of the tensors that it shares memory with."""
    items: "list[_Item]" = field(default_factory=list)
    tensors: int = 0
    bytes: int = 0


def _tree(manifest: Manifest) -> _Item:
    """The checkpoint's tree. Raises CorruptError."""
    lengths = manifest.segment_bytes
    first_of: dict[int, str] = {}

    def build(path: str, above: str, node: Any, depth: int) -> _Item:
        if depth > MAX_DEPTH:
            raise CorruptError(f"{path} is nested deeper than {MAX_DEPTH} containers")
        key = path.removeprefix(above)
        item = _Item(path, key.removeprefix(".") if above else key, _inside(node), type_name(node))
        if is_tensor(item.node):
            item.tensor = TensorNode.from_json(item.node, path, lengths)
            item.tensors, item.bytes = 1, item.tensor.logical_bytes
            if item.tensor.tag == "tensor" and item.bytes:
                first = first_of.setdefault(item.tensor.segment, path)
                item.shares_with = None if first == path else first
        else:
            item.items = [build(below, path, child, depth + 1) for below, child in children(item.node, path)]
            item.tensors = sum(below.tensors for below in item.items)
            item.bytes = sum(below.bytes for below in item.items)
        return item

    return build("", "", manifest.tree, 0)


def _inside(node: Any) -> Any:
    """A value of a registered type as the tree that it was saved as."""
    for _ in range(MAX_DEPTH):
        if not (isinstance(node, dict) and node.get(TAG) == "registered" and "tree" in node):
            break
        node = node["tree"]
    return node


# ---- for programs


def _document(objects: Objects, manifest: Manifest, root: _Item, depth: int | None, state: _State) -> dict[str, Any]:
    return {
        "store": objects.url,
        "run": manifest.run,
        "step": manifest.step,
        "save": manifest.save,
        "digest": checkpoint_digest(manifest),
        "created": manifest.created,
        "host": to_json(manifest.writer.host),
        "pid": manifest.writer.pid,
        "version": to_json(manifest.writer.version),
        "tags": list(state.tags),
        "damaged": state.damaged,
        "metrics": to_json(manifest.metrics),
        "metadata": to_json(manifest.metadata),
        "raw_bytes": manifest.raw_bytes,
        "stored_bytes": manifest.stored_bytes,
        "new_bytes": manifest.new_bytes,
        "tree": list(_entries(root, depth)),
    }


def _entries(item: _Item, depth: int | None) -> Iterator[dict[str, Any]]:
    """The leaves at or below `item`; in the place of those that lie too deep, what they are in."""
    entry: dict[str, Any] = {"path": item.path, "type": item.type}
    if item.tensor is not None:
        tensor = item.tensor
        described = {"dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": item.bytes}
        yield entry | described | {"shares_memory_with": item.shares_with}
    elif not item.items:
        yield entry | {"value": to_json(item.node)}
    elif depth == 0:
        yield entry | {"items": len(item.items), "tensors": item.tensors, "bytes": item.bytes}
    else:
        for below in item.items:
            yield from _entries(below, None if depth is None else depth - 1)


# ---- for people


def _print(manifest: Manifest, root: _Item, depth: int | None, state: _State) -> None:
    print_line(f"{manifest.run}@{manifest.step}", bold=True)
    writer = manifest.writer
    _print_aligned(
        [
            ("saved", f"{time_text(manifest.created)} UTC"),
            ("by", f"process {writer.pid} on {writer.host}, ckptstore {writer.version}"),
            ("in memory", bytes_text(manifest.raw_bytes)),
            ("stored", f"{bytes_text(manifest.stored_bytes)}, {bytes_text(manifest.new_bytes)} of it new"),
            ("digest", checkpoint_digest(manifest)),
            *([("tags", " ".join(state.tags))] if state.tags else []),
            *([("damaged", f"{counted(len(state.damaged), 'chunk')}: see ckptstore repair")] if state.damaged else []),
            *((f"metrics.{name}", _shortened(to_text(value))) for name, value in pairs(manifest.metrics)),
            *((f"metadata.{name}", _shortened(to_text(value))) for name, value in pairs(manifest.metadata)),
        ]
    )
    print_line()
    _print_aligned(list(_rows(root, depth)) or [("", _description(root))])


def _print_aligned(rows: list[tuple[str, str]]) -> None:
    from rich.cells import cell_len

    printed = [(printable(name), printable(text)) for name, text in rows]
    width = max(cell_len(name) for name, _ in printed)
    for name, text in printed:
        print_line(f"{name}{' ' * (width - cell_len(name))}  {text}".rstrip())


def _rows(item: _Item, depth: int | None, level: int = 0) -> Iterator[tuple[str, str]]:
    for below in item.items:
        yield "  " * level + below.key, _description(below)
        if not _is_plain_sequence(below) and (depth is None or level + 1 < depth):
            yield from _rows(below, depth, level + 1)


def _description(item: _Item) -> str:
    if item.tensor is not None:
        shared = f", shares memory with {item.shares_with}" if item.shares_with is not None else ""
        kind = "" if item.tensor.tag == "tensor" else f"{item.type} "
        return f"{kind}{item.tensor.dtype} {list(item.tensor.shape)}  {bytes_text(item.bytes)}{shared}"
    if _is_plain_sequence(item) and item.items:
        values = [_value_text(below.node) for below in item.items[:MAX_PLAIN_ITEMS]]
        more = len(item.items) - len(values)
        return f"{item.type} [{', '.join(values)}{f', and {more} more' if more else ''}]"
    if is_container(item.node):
        held = f", {counted(item.tensors, 'tensor')}, {bytes_text(item.bytes)}" if item.tensors else ""
        return f"{item.type} of {len(item.items)}{held}"
    text = _value_text(item.node)
    return text if item.type in ("None", "bool", "int", "float", "str") else f"{item.type} {text}"


def _is_plain_sequence(item: _Item) -> bool:
    """Whether it holds values alone, one after the other, so that one line says it all."""
    values = all(below.tensor is None and not is_container(below.node) for below in item.items)
    return values and isinstance(item.node, dict | list) and type_name(item.node) in _PLAIN_SEQUENCES


def _value_text(node: Any) -> str:
    if node is None or isinstance(node, bool):
        return str(node)
    value = to_json(node)
    is_text = type_name(node) == "str"
    return _shortened(json.dumps(value, ensure_ascii=False) if is_text or not isinstance(value, str) else value)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}… ({len(text)} characters)"
