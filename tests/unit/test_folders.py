"""Folders of other libraries as states: what comes back is what was there, and nothing leaves the folder."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import ckptstore
from ckptstore.portable import read_folder, write_folder
from tests.strategies import assert_same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint" / "below").mkdir(parents=True)
    return tmp_path / "checkpoint"


def through_a_store(folder: Path, tmp_path: Path) -> Path:
    """Save the folder, and write it again elsewhere."""
    run = ckptstore.Store(tmp_path / "store").run("folders")
    run.save(read_folder(folder), step=1)
    write_folder(run.load(1), tmp_path / "again")
    return tmp_path / "again"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TENSORS = {
    "float32": torch.randn(3, 4),
    "bfloat16": torch.randn(5).bfloat16(),
    "float8": torch.randn(8).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 3),
    "last": torch.arange(100_000),
}


def test_a_safetensors_file_comes_back_byte_by_byte(folder: Path, tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt", "ä": "ö"})
    safetensors.torch.save_file({}, folder / "empty.safetensors")
    assert contents(through_a_store(folder, tmp_path)) == contents(folder)


def test_its_tensors_are_tensors_of_the_state(folder: Path) -> None:
    safetensors.torch.save_file(TENSORS, folder / "model.safetensors")
    assert_same(
        dict(sorted(read_folder(folder)["model.safetensors"]["tensors"].items())), dict(sorted(TENSORS.items()))
    )


def test_tensors_are_stored_once_whatever_file_they_are_in(folder: Path, tmp_path: Path) -> None:
    large = {f"layer{number}": torch.randn(100, 1000) for number in range(4)}
    run = ckptstore.Store(tmp_path / "store").run("folders")
    safetensors.torch.save_file(large, folder / "model.safetensors")
    first = run.save(read_folder(folder), step=1)
    (folder / "model.safetensors").unlink()
    safetensors.torch.save_file(dict(list(large.items())[:2]), folder / "model-00001-of-00002.safetensors")
    safetensors.torch.save_file(dict(list(large.items())[2:]), folder / "model-00002-of-00002.safetensors")
    torch.save(large, folder / "pytorch_model.bin")
    assert run.save(read_folder(folder), step=2).new_bytes < first.new_bytes / 100


def test_a_file_of_torch_save_comes_back_with_what_it_held(folder: Path, tmp_path: Path) -> None:
    model = torch.nn.LSTM(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 2, 3))[0].sum().backward()
    optimizer.step()
    held = {
        "optimizer": optimizer.state_dict(),
        "model": model.state_dict(),
        "numpy": np.random.RandomState(1).get_state(),
    }
    torch.save(held, folder / "optimizer.pt")
    again = through_a_store(folder, tmp_path)
    assert isinstance(read_folder(folder)["optimizer.pt"]["torch"], dict)
    assert_same(read_folder(again), read_folder(folder))


class Code:
    """What only code can make."""

    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Code, "ran", True)


def test_files_that_are_nothing_of_that_come_back_byte_by_byte_and_no_code_runs(folder: Path, tmp_path: Path) -> None:
    torch.save(Code(), folder / "training_args.bin")
    (folder / "pickle.bin").write_bytes(pickle.dumps(Code()))
    (folder / "below" / "config.json").write_text("{}")
    (folder / "nothing").touch()
    with zipfile.ZipFile(folder / "other.zip", "w") as other:
        other.writestr("text", "text")
    again = through_a_store(folder, tmp_path)
    assert contents(again) == contents(folder)
    assert not Code.ran


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda content: content[:-1], id="cut"),
        pytest.param(lambda content: content + b"x", id="longer"),
        pytest.param(lambda content: content[:5], id="no header"),
        pytest.param(lambda content: b"\xff" * 8 + content[8:], id="huge header"),
        pytest.param(lambda content: content.replace(b'"F32"', b'"F99"'), id="unknown dtype"),
        pytest.param(lambda content: content.replace(b"[0,", b"[4,"), id="hole"),
        pytest.param(lambda content: content.replace(b"[100]", b"[101]"), id="other shape"),
        pytest.param(lambda content: content.replace(b"[100]", b'["a"]'), id="no shape"),
    ],
)
def test_a_strange_safetensors_file_comes_back_byte_by_byte(folder: Path, tmp_path: Path, change: Any) -> None:
    content = safetensors.torch.save({"tensor": torch.randn(100)})
    assert change(content) != content
    (folder / "model.safetensors").write_bytes(change(content))
    assert isinstance(read_folder(folder)["model.safetensors"], bytes)
    assert contents(through_a_store(folder, tmp_path)) == contents(folder)


@pytest.mark.parametrize("name", ["../outside", "/outside", "below/../../outside", "", "..", "nul\0", 7])
def test_a_name_that_leads_out_of_the_folder_is_refused_before_a_file_is_written(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ckptstore.CorruptError, match="No file was written"):
        write_folder({"good": b"1", name: b"2"}, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


HEADER = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'


@pytest.mark.parametrize(
    "content",
    [
        "text",
        {},
        {"header": HEADER},
        {"header": HEADER.decode(), "tensors": {"a": torch.zeros(2, dtype=torch.uint8)}},
        {"header": HEADER, "tensors": {"a": torch.zeros(3, dtype=torch.uint8)}},
        {"header": HEADER, "tensors": {"a": torch.zeros(2, dtype=torch.int8)}},
        {"header": HEADER, "tensors": {"a": None}},
        {"header": HEADER, "tensors": {}},
        {"header": b"[" * 100_000, "tensors": {}},
    ],
    ids=range(9),
)
def test_what_cannot_be_a_file_is_refused_and_the_old_folder_stays(tmp_path: Path, content: Any) -> None:
    write_folder({"old": b"old"}, tmp_path / "folder")
    with pytest.raises(ckptstore.CorruptError):
        write_folder({"file": content}, tmp_path / "folder")
    assert contents(tmp_path) == {"folder/old": b"old"}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_folder({"old": b"old", "both": b"old"}, tmp_path / "folder")
    write_folder({"new": b"new", "both": b"new"}, tmp_path / "folder")
    assert contents(tmp_path) == {"folder/new": b"new", "folder/both": b"new"}


def test_a_folder_that_is_not_there_or_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ckptstore.NotFoundError):
        read_folder(tmp_path / "none")
    with pytest.raises(ckptstore.InvalidInputError, match="no files"):
        read_folder(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ckptstore.UnavailableError):
        write_folder({"file": b""}, tmp_path / "file" / "folder")
