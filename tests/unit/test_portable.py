"""Checkpoints as files of other programs and back: what is kept, what is refused; a file is whole or absent."""

import argparse
import json
import math
import os
import stat
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptstore
from ckptstore import portable
from ckptstore.checkpoint import Checkpoint
from ckptstore.errors import (
    ConflictError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
    UnsupportedFormatError,
)
from ckptstore.portable import safetensors_files
from ckptstore.run import Run
from ckptstore.store import Store
from ckptstore.tree import TORCH_DTYPES, register, registry

FORMATS = ["safetensors", "pt"]
both = pytest.mark.parametrize("ending", FORMATS)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "ckpts")


@pytest.fixture
def run(store: Store) -> Run:
    return store.run("lstm")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.safetensors"


def training_state() -> dict[str, Any]:
    """A module and its optimizer after a step, generators, and values of many types."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    values: dict[Any, Any] = {"none": None, "nan": float("nan"), "long": 2**80, "complex": 1 + 2j, 7: (True, b"x")}
    values |= {"set": {1, 2}, "counter": Counter("abba"), "dtype": torch.bfloat16, "scalar": np.float32(0.5)}
    return {"model": model, "optimizer": optimizer, "rng": ckptstore.RngState(), "values": values, "blob": b"y" * 5000}


def there_and_back(run: Run, state: Any, file: Path, **saved: Any) -> tuple[Checkpoint, Checkpoint]:
    """Save `state`, export it, import it as another run; both checkpoints."""
    first = run.save(state, step=3, **saved)
    run.export(file)
    return first, Store(run._objects).run("back").import_file(file, step=3)


def skeleton(checkpoint: Checkpoint) -> Any:
    return checkpoint._manifest.tree


# ---- round trips


@both
def test_a_training_state_comes_back_the_same(run: Run, file: Path, ending: str) -> None:
    first, back = there_and_back(run, training_state(), file.with_suffix(f".{ending}"))
    assert skeleton(back) == skeleton(first)
    assert back._manifest.content == first._manifest.content


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_each_dtype_comes_back_or_is_refused(run: Run, file: Path, name: str) -> None:
    dtype = TORCH_DTYPES[name]
    tensor = torch.arange(2 * 3 * dtype.itemsize, dtype=torch.uint8).remainder(2).view(dtype).reshape(2, 3)
    state = {"weight": tensor}
    if name in ("complex32", "complex128"):
        run.save(state, step=3)
        with pytest.raises(InvalidInputError, match=f"weight has dtype {name}, which the safetensors format lacks"):
            run.export(file)
        assert not any(file.parent.iterdir())
        file = file.with_suffix(".pt")
    first, back = there_and_back(run, state, file)
    assert back._manifest.content == first._manifest.content


@both
def test_tensors_that_share_memory_share_it_again(run: Run, file: Path, ending: str) -> None:
    base = torch.arange(20.0)
    tied = torch.nn.Parameter(torch.randn(4, 5))
    state = {"embed": tied, "head": tied, "part": base[2:9], "every_other": base[4:16:2], "turned": base.view(4, 5).t()}
    _, back = there_and_back(run, state, file.with_suffix(f".{ending}"))
    loaded = Store(run._objects).run("back").load()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert isinstance(loaded["head"], torch.nn.Parameter)
    assert loaded["embed"].untyped_storage().data_ptr() == loaded["head"].untyped_storage().data_ptr()
    loaded["turned"][0, 0] = loaded["part"][0] = -1
    assert loaded["turned"][2, 0] == -1
    assert back.raw_bytes == 20 * 4 + 20 * 4


def test_views_with_overlaps_of_their_own_come_back(run: Run, file: Path) -> None:
    state = {"expanded": torch.ones(1).expand(5), "windows": torch.arange(6.0).unfold(0, 3, 1)}
    first, back = there_and_back(run, state, file)
    assert skeleton(back) == skeleton(first)
    loaded = Store(run._objects).run("back").load()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_empty_tensors_and_a_lone_tensor_come_back(run: Run, file: Path) -> None:
    first, back = there_and_back(run, torch.zeros(0, 3, requires_grad=True), file)
    assert skeleton(back) == skeleton(first)
    Store(run._objects).run("lone").save(torch.tensor(2.5), step=3)
    Store(run._objects).run("lone").export(file, overwrite=True)
    assert run.import_file(file, step=4).tensors()[""].shape == ()
    assert run.load(step=4) == 2.5


def test_all_containers_come_back_through_safetensors(run: Run, file: Path) -> None:
    attached: OrderedDict[str, Any] = OrderedDict(weight=torch.ones(2))
    attached._metadata = {"": {"version": 2, "extra": torch.zeros(2)}}  # type: ignore[attr-defined]
    state = [deque([1], maxlen=3), defaultdict(list, a=[torch.ones(1)]), frozenset({1}), attached, {"$": torch.ones(1)}]
    first, back = there_and_back(run, state, file)
    assert skeleton(back) == skeleton(first)
    assert back._manifest.content == first._manifest.content


def test_paths_that_read_the_same_do_not_collide(run: Run, file: Path) -> None:
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "__metadata__": torch.ones(2)}
    there_and_back(run, state, file)
    loaded = Store(run._objects).run("back").load()
    assert loaded["a.b"] == 0
    assert loaded["a"]["b"] == 1
    assert sorted(load_file(file)) == ["__metadata__#2", "a.b", "a.b#2"]


def test_metrics_and_metadata_go_along_in_a_safetensors_file(run: Run, file: Path) -> None:
    metrics, metadata = {"loss": math.inf, "$": 2**60}, {"config": {"layers": [1, 2]}}
    _, back = there_and_back(run, {"w": torch.ones(1)}, file, metrics=metrics, metadata=metadata)
    assert back.metrics == metrics
    assert back.metadata == metadata


def test_metrics_that_are_given_count_more_than_those_in_the_file(run: Run, file: Path) -> None:
    run.save({"w": torch.ones(1)}, step=3, metrics={"loss": 1.0}, metadata={"seed": 1})
    run.export(file)
    back = Store(run._objects).run("back").import_file(file, step=9, metrics={"loss": 2.0})
    assert back.step == 9
    assert back.metrics == {"loss": 2.0}
    assert back.metadata == {"seed": 1}


class Schedule:
    """A type of the user's own."""

    def __init__(self, rate: torch.Tensor) -> None:
        self.rate = rate


@pytest.fixture
def registered() -> Iterator[Callable[[], None]]:
    """Register `Schedule`; what is returned takes that back, as if this were another program."""
    register(Schedule, "tests.Schedule", lambda value: {"rate": value.rate}, lambda tree: Schedule(tree["rate"]))

    def forget() -> None:
        registry._by_type.pop(Schedule, None)
        registry._by_name.pop("tests.Schedule", None)

    yield forget
    forget()


def test_registered_types_need_not_be_known_to_move_a_checkpoint(
    run: Run, file: Path, registered: Callable[[], None]
) -> None:
    run.save({"schedule": Schedule(torch.ones(2))}, step=3)
    registered()
    run.export(file)
    back = Store(run._objects).run("back").import_file(file, step=3)
    assert skeleton(back) == skeleton(run.checkpoint())


def test_registered_types_are_plain_trees_in_a_pt_file(run: Run, file: Path, registered: Callable[[], None]) -> None:
    run.save({"schedule": Schedule(torch.ones(2))}, step=3)
    run.export(file.with_suffix(".pt"))
    loaded = torch.load(file.with_suffix(".pt"), weights_only=True)
    assert list(loaded["schedule"]) == ["rate"]


# ---- what others read and write


def test_other_programs_find_each_tensor_by_its_path(run: Run, file: Path) -> None:
    tied = torch.randn(2, 2)
    turned = torch.arange(6).view(2, 3).t()
    run.save({"model": {"head": tied, "embed": tied}, "list": [turned], "array": np.arange(3)}, step=3)
    run.export(file)
    found = load_file(file)
    assert sorted(found) == ["array", "list[0]", "model.embed", "model.head"]
    assert torch.equal(found["model.head"], tied)
    assert torch.equal(found["model.embed"], tied)
    assert torch.equal(found["list[0]"], turned)
    assert found["array"].tolist() == [0, 1, 2]
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_torch_load_reads_a_pt_file_with_its_defaults(run: Run, file: Path) -> None:
    model = torch.nn.Linear(2, 2)
    run.save({"model": model, "step": 3}, step=3)
    run.export(file.with_suffix(".pt"))
    loaded = torch.load(file.with_suffix(".pt"), weights_only=True)
    torch.nn.Linear(2, 2).load_state_dict(loaded["model"])
    assert torch.equal(loaded["model"]["weight"], model.weight)
    assert loaded["step"] == 3


def test_a_safetensors_file_of_another_program_is_a_flat_dict(run: Run, file: Path) -> None:
    save_file({"model.weight": torch.ones(2), "bias": torch.zeros(1)}, file, metadata={"format": "pt"})
    back = run.import_file(file, step=0, metadata={"source": "hub"})
    assert {name: value.tolist() for name, value in run.load().items()} == {"bias": [0.0], "model.weight": [1.0, 1.0]}
    assert back.metrics == {}
    assert back.metadata == {"source": "hub"}


@pytest.mark.parametrize("ending", ["pt", "pth", "ckpt", "bin"])
def test_files_of_torch_save_are_read_whatever_their_usual_name(run: Run, tmp_path: Path, ending: str) -> None:
    torch.save({"weight": torch.ones(2), "epoch": 4}, tmp_path / f"old.{ending}")
    run.import_file(tmp_path / f"old.{ending}", step=4)
    assert run.load()["epoch"] == 4


def test_importing_what_is_there_already_uploads_nothing(run: Run, file: Path) -> None:
    _, back = there_and_back(run, {"weight": torch.randn(100, 100)}, file)
    assert back.new_bytes == 0


# ---- refusals


def test_what_only_code_could_make_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    torch.save({"arguments": argparse.Namespace(lr=1)}, tmp_path / "old.pt")
    with pytest.raises(InvalidInputError, match=r"only running code could make \(argparse.Namespace\)"):
        run.import_file(tmp_path / "old.pt", step=0)
    assert run.steps() == []


def test_a_pickle_that_would_run_a_command_does_not(run: Run, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"weight": Attack()}, tmp_path / "evil.pt")
    with pytest.raises(InvalidInputError, match=r"posix\.mkdir"):
        run.import_file(tmp_path / "evil.pt", step=0)
    assert not (tmp_path / "owned").exists()


@both
@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}" + b"x" * 9])
def test_a_file_that_is_none_is_refused(run: Run, tmp_path: Path, ending: str, content: bytes) -> None:
    (tmp_path / f"old.{ending}").write_bytes(content)
    with pytest.raises(InvalidInputError, match=f"old.{ending} cannot be read as a"):
        run.import_file(tmp_path / f"old.{ending}", step=0)


@both
def test_a_file_that_is_not_there_is_not_found(run: Run, tmp_path: Path, ending: str) -> None:
    with pytest.raises(NotFoundError, match=f"there is no file .*none.{ending}"):
        run.import_file(tmp_path / f"none.{ending}", step=0)


def test_other_endings_are_refused(run: Run, tmp_path: Path) -> None:
    run.save({"w": torch.ones(1)}, step=3)
    with pytest.raises(InvalidInputError, match=r"must end in \.safetensors, \.pt"):
        run.export(tmp_path / "model.onnx")
    with pytest.raises(InvalidInputError, match=r"must end in \.safetensors, \.pt"):
        run.import_file(tmp_path / "model.onnx", step=0)


@pytest.mark.parametrize("array", [np.array(["text"]), np.arange(3, dtype=">i4"), np.zeros(2, "M8[s]")])
def test_arrays_that_torch_lacks_are_refused_by_safetensors_and_kept_by_pt(
    run: Run, file: Path, array: "np.ndarray[Any, Any]"
) -> None:
    run.save({"table": array}, step=3)
    with pytest.raises(InvalidInputError, match=r"table has dtype .*Export to a \.pt file"):
        run.export(file)
    assert not any(file.parent.iterdir())
    run.export(file.with_suffix(".pt"))
    Store(run._objects).run("back").import_file(file.with_suffix(".pt"), step=3)
    loaded = Store(run._objects).run("back").load()["table"]
    # Pickle, as torch.save uses it, turns numbers into this machine's byte order.
    assert loaded.dtype == array.dtype.newbyteorder("=")
    assert loaded.tolist() == array.tolist()


def test_without_the_package_the_error_says_how_to_install_it(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save({"w": torch.ones(1)}, step=3)
    save_file({"w": torch.ones(1)}, file)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    acts: list[Callable[[], object]] = [
        lambda: run.export(file, overwrite=True),
        lambda: run.import_file(file, step=4),
    ]
    for act in acts:
        with pytest.raises(InvalidInputError, match=r"pip install 'ckptstore\[safetensors\]'"):
            act()


def test_a_tree_too_large_for_the_header_is_refused(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "MAX_HEADER_BYTES", 2000)
    run.save({"words": "x" * 3000}, step=3)
    with pytest.raises(InvalidInputError, match=r"too many values .*Export to a \.pt file"):
        run.export(file)
    assert not any(file.parent.iterdir())


def test_importing_over_another_state_is_a_conflict(run: Run, file: Path) -> None:
    run.save({"w": torch.ones(1)}, step=3)
    save_file({"w": torch.zeros(1)}, file)
    with pytest.raises(ConflictError):
        run.import_file(file, step=3)
    assert run.load()["w"] == 1


# ---- files that somebody changed


def changed(file: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    """Write an exported file again after `change(document, tensors)`."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    document = json.loads(metadata[safetensors_files.TREE_KEY])
    change(document, tensors)
    metadata[safetensors_files.TREE_KEY] = json.dumps(document)
    save_file(tensors, file, metadata=metadata)


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], object]] = {
    "a tensor is missing": lambda document, tensors: tensors.pop("bias"),
    "there is one more tensor": lambda document, tensors: tensors.update(more=torch.ones(1)),
    "a tensor has another shape": lambda document, tensors: tensors.update(bias=torch.ones(5)),
    "a tensor has another dtype": lambda document, tensors: tensors.update(bias=torch.ones(2, dtype=torch.int32)),
    "shared memory differs": lambda document, tensors: tensors.update(head=torch.zeros(2, 2)),
    "a name is said twice": lambda document, tensors: document.update(names=["bias", "bias", "head"]),
    "a name is missing": lambda document, tensors: document.update(names=["bias", "embed"]),
    "a segment is too short": lambda document, tensors: document.update(segments=[1, 1, 1]),
    "a segment is larger than any memory": lambda document, tensors: (
        document["segments"].__setitem__(0, 2**61),
        document["tree"]["embed"].__setitem__("offset", 4),
    ),
    "the tree makes no sense": lambda document, tensors: document.update(tree={"$": "nonsense"}),
    "the tree is deeper than any": lambda document, tensors: document.update(tree=json.loads("[" * 200 + "]" * 200)),
    "the document is not ours": lambda document, tensors: document.pop("segments"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_refused_and_nothing_saved(run: Run, file: Path, name: str) -> None:
    tied = torch.ones(2, 2)
    run.save({"embed": tied, "head": tied, "bias": torch.ones(2)}, step=3)
    run.export(file)
    changed(file, CHANGES[name])
    with pytest.raises(InvalidInputError, match="not as ckptstore wrote it"):
        Store(run._objects).run("back").import_file(file, step=3)
    assert Store(run._objects).run("back").steps() == []


def test_changed_values_are_imported_as_they_are(run: Run, file: Path) -> None:
    run.save({"bias": torch.ones(2)}, step=3)
    run.export(file)
    changed(file, lambda document, tensors: tensors.update(bias=torch.full((2,), 5.0)))
    Store(run._objects).run("back").import_file(file, step=3)
    assert Store(run._objects).run("back").load()["bias"].tolist() == [5.0, 5.0]


def test_a_file_of_a_newer_version_asks_for_it(run: Run, file: Path) -> None:
    run.save({"bias": torch.ones(2)}, step=3)
    run.export(file)
    changed(file, lambda document, tensors: document.update(version=2))
    with pytest.raises(UnsupportedFormatError, match="newer ckptstore"):
        Store(run._objects).run("back").import_file(file, step=3)


# ---- a file is whole or absent


@both
def test_a_file_that_is_there_is_left_as_it_is(run: Run, file: Path, ending: str) -> None:
    file = file.with_suffix(f".{ending}")
    file.write_text("precious")
    run.save({"w": torch.ones(1)}, step=3)
    with pytest.raises(ConflictError, match="exists, and is left as it is"):
        run.export(file)
    assert file.read_text() == "precious"
    run.export(file, overwrite=True)
    assert portable.read_file(file).leaves


@both
def test_a_file_that_appears_meanwhile_is_left_as_it_is(
    run: Run, file: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file.with_suffix(f".{ending}")
    run.save({"w": torch.ones(1)}, step=3)
    monkeypatch.setattr(portable, "check_destination", lambda path, overwrite: path.write_text("quicker"))
    with pytest.raises(ConflictError):
        run.export(file)
    assert [path.read_text() for path in file.parent.iterdir()] == ["quicker"]


@both
def test_a_damaged_checkpoint_is_not_exported(run: Run, file: Path, ending: str, tmp_path: Path) -> None:
    run.save({"weight": torch.randn(500)}, step=3)
    [chunk] = (path for path in (tmp_path / "ckpts" / "chunks").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.chmod(0o600)
    chunk.write_bytes(content)
    with pytest.raises(CorruptError, match=r"weight.*Export another step; `ckptstore verify` lists all damage"):
        run.export(file.with_suffix(f".{ending}"))
    assert not any(file.parent.iterdir())


@both
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing_behind(
    run: Run, file: Path, ending: str, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise failure

    run.save({"w": torch.ones(1)}, step=3)
    monkeypatch.setattr(os, "fsync", fail)
    expected = UnavailableError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        run.export(file.with_suffix(f".{ending}"))
    assert not any(file.parent.iterdir())


@both
def test_a_file_system_without_hard_links_will_do(
    run: Run, file: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    run.save({"w": torch.ones(1)}, step=3)
    monkeypatch.setattr(os, "link", refuse)
    run.export(file.with_suffix(f".{ending}"))
    assert [path.suffix for path in file.parent.iterdir()] == [f".{ending}"]


@both
def test_others_may_read_the_file_as_the_umask_has_it(run: Run, file: Path, ending: str) -> None:
    run.save({"w": torch.ones(1)}, step=3)
    old = os.umask(0o022)
    try:
        run.export(file.with_suffix(f".{ending}"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.with_suffix(f".{ending}").stat().st_mode) == 0o644


def test_a_folder_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    run.save({"w": torch.ones(1)}, step=3)
    with pytest.raises(NotFoundError, match=r"there is no folder .*/nowhere"):
        run.export(tmp_path / "nowhere" / "model.pt")


def test_the_newest_checkpoint_is_exported_and_named(run: Run, file: Path) -> None:
    for step in (3, 30):
        run.save({"w": torch.full((1,), float(step))}, step=step)
    assert run.export(file).step == 30
    assert load_file(file)["w"] == 30
    assert run.export(file, step=3, overwrite=True).step == 3
    assert load_file(file)["w"] == 3


def test_progress_ends_at_all_the_bytes(run: Run, file: Path) -> None:
    run.save({"w": torch.randn(100, 100)}, step=3)
    seen: list[tuple[int, int]] = []
    run.export(file, progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1][0] == seen[-1][1] > 0


def test_however_many_paths_read_the_same_each_name_is_tried_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a manifest that lists one key many times would take time for each pair."""
    tried = 0

    class Counted(str):
        def __format__(self, spec: str) -> str:
            nonlocal tried
            tried += 1
            return str(self)

    manifest = store.run("run").save({}, step=1)._manifest
    path, count = Counted("a"), 200
    monkeypatch.setattr(safetensors_files, "tensors", lambda tree, lengths: [(path, None)] * count)
    assert safetensors_files.names_of(manifest) == ["a", *(f"a#{number}" for number in range(2, count + 1))]
    assert tried == count - 1


def test_what_torch_save_cannot_hold_is_refused_before_a_file_is_made(run: Run, tmp_path: Path) -> None:
    numbers = torch.arange(4.0)
    run.save({"numbers": numbers, "bits": numbers.view(torch.int32)}, step=1)
    with pytest.raises(InvalidInputError, match=r"bits \(int32\) shares memory with numbers \(float32\)"):
        run.export(tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
    run.export(tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["bits"], numbers.view(torch.int32))
