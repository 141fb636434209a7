"""What STORE[/RUN[@STEP]] on the command line means, and which places are asked to find out."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckptstore
from ckptstore.cli import target
from ckptstore.cli.target import STORE_VARIABLE, parse_options, resolve, resolve_new
from ckptstore.errors import InvalidInputError, NotFoundError, UnavailableError
from ckptstore.format import MARKER_KEY, split_run
from ckptstore.objects.base import Objects
from ckptstore.objects.memory import MemoryObjects


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and no default store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STORE_VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places that were opened, in order."""
    places: list[str] = []

    def opened(place: str, options: object = None) -> Objects:
        places.append(str(place))
        return MemoryObjects(f"memory://{uuid.uuid4().hex}")

    monkeypatch.setattr(target, "open_objects", opened)
    return places


def make_store(place: str | Path, run: str = "lstm") -> None:
    ckptstore.Store(place).run(run).save({"weight": torch.zeros(3)}, step=7)


def found(text: str | None) -> tuple[str, str | None, int | None]:
    place = resolve(text)
    return place.objects.url, place.run, place.step


def test_a_folder_that_is_a_store_is_the_store(here: Path) -> None:
    make_store("ckpts")
    for text in ("ckpts", "./ckpts", "./ckpts/", str(here / "ckpts"), f"file://{here}/ckpts"):
        assert found(text) == (str(here / "ckpts"), None, None), text


def test_what_follows_a_store_is_a_run(here: Path) -> None:
    make_store("ckpts")
    assert found("ckpts/lstm") == (str(here / "ckpts"), "lstm", None)
    assert found("./ckpts/lstm/") == (str(here / "ckpts"), "lstm", None)


def test_what_follows_the_run_is_a_step(here: Path) -> None:
    make_store("ckpts")
    assert found("ckpts/lstm@7") == (str(here / "ckpts"), "lstm", 7)


def test_urls_are_split_like_paths() -> None:
    url = f"memory://{uuid.uuid4().hex}/ckpts"
    make_store(url)
    assert found(url) == (url, None, None)
    assert found(f"{url}/lstm@7") == (url, "lstm", 7)


def test_a_store_right_below_the_scheme_has_runs_too() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    make_store(url)
    assert found(f"{url}/lstm") == (url, "lstm", None)


def test_a_store_inside_a_store_is_meant_before_a_run_of_that_name(here: Path) -> None:
    make_store("ckpts", run="inner")
    make_store("ckpts/inner")
    assert found("ckpts/inner") == (str(here / "ckpts" / "inner"), None, None)


def test_the_variable_names_the_default_store(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store("elsewhere/ckpts")
    monkeypatch.setenv(STORE_VARIABLE, "elsewhere/ckpts")
    store = str(here / "elsewhere" / "ckpts")
    assert found(None) == (store, None, None)
    assert found("lstm") == (store, "lstm", None)
    assert found("lstm@7") == (store, "lstm", 7)


def test_without_the_variable_the_current_folder_is_the_default_store(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store("ckpts")
    monkeypatch.chdir("ckpts")
    assert found(None) == (str(here / "ckpts"), None, None)
    assert found("lstm@7") == (str(here / "ckpts"), "lstm", 7)


def test_a_folder_here_that_is_a_store_is_meant_before_a_run_of_the_default_store(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store("default", run="lstm")
    make_store("lstm")
    monkeypatch.setenv(STORE_VARIABLE, "default")
    assert found("lstm") == (str(here / "lstm"), None, None)


def test_a_file_with_the_name_of_a_run_is_not_in_the_way(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store("ckpts")
    (here / "lstm").write_text("notes")
    monkeypatch.setenv(STORE_VARIABLE, "ckpts")
    assert found("lstm") == (str(here / "ckpts"), "lstm", None)


def test_a_path_is_never_taken_for_a_run_of_the_default_store(monkeypatch: pytest.MonkeyPatch) -> None:
    make_store("ckpts")
    monkeypatch.setenv(STORE_VARIABLE, "ckpts")
    with pytest.raises(NotFoundError, match=r"other/lstm is not a ckptstore store, and neither is .*/other"):
        resolve("other/lstm")


def test_a_store_whose_marker_is_lost_is_still_found(here: Path) -> None:
    make_store("ckpts")
    (here / "ckpts" / MARKER_KEY).unlink()
    assert found("ckpts") == (str(here / "ckpts"), None, None)
    assert found("ckpts/lstm@7") == (str(here / "ckpts"), "lstm", 7)


def test_runs_of_another_program_are_no_store(here: Path) -> None:
    (here / "project" / "runs" / "lstm").mkdir(parents=True)
    (here / "project" / "runs" / "lstm" / "events.out.tfevents").write_bytes(b"tensorboard")
    for text in ("project", "./project", "project/lstm"):
        with pytest.raises(NotFoundError):
            resolve(text)


def test_no_store_anywhere_says_what_to_give() -> None:
    with pytest.raises(NotFoundError, match=r"CKPTSTORE_URL is not set, and the current folder is not a store\. Give"):
        resolve(None)
    with pytest.raises(NotFoundError, match=r"no store at .*/lstm, and lstm cannot be a run either"):
        resolve("lstm")
    with pytest.raises(NotFoundError, match="Give STORE, STORE/RUN or STORE/RUN@STEP, where STORE holds a file"):
        resolve("./lstm")


def test_a_default_store_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_VARIABLE, "memory://nothing-here")
    with pytest.raises(NotFoundError, match="CKPTSTORE_URL names memory://nothing-here, which is not"):
        resolve("lstm")


def test_a_store_with_something_strange_behind_it_says_what_is_wrong() -> None:
    make_store("ckpts")
    with pytest.raises(InvalidInputError, match="the step must be a whole number"):
        resolve("ckpts/lstm@newest")
    with pytest.raises(InvalidInputError, match="cannot be the name of a run"):
        resolve("ckpts/a run")


def test_a_place_that_cannot_be_read_is_never_called_missing(here: Path) -> None:
    (here / "notes.txt").write_text("no folder")
    with pytest.raises(UnavailableError, match="is a file"):
        resolve("./notes.txt")


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("s3://bucket", ["s3://bucket"]),
        ("s3://bucket/", ["s3://bucket"]),
        ("s3://bucket/ckpts/lstm@3", ["s3://bucket/ckpts/lstm@3", "s3://bucket/ckpts"]),
        ("memory://name", ["memory://name"]),
        ("/ckpts", ["/ckpts"]),
        ("/", ["/"]),
        ("file:///ckpts", ["file:///ckpts"]),
        ("./lstm", ["./lstm", "."]),
        ("lstm", ["lstm", "."]),
        (None, ["."]),
    ],
)
def test_only_the_place_and_the_folder_above_it_are_asked(
    text: str | None, places: list[str], asked: list[str]
) -> None:
    with pytest.raises(NotFoundError):
        resolve(text)
    assert asked == places


def test_with_the_variable_a_name_is_looked_for_here_and_there_alone(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORE_VARIABLE, "s3://bucket/ckpts")
    with pytest.raises(NotFoundError):
        resolve("lstm@3")
    assert asked == ["lstm@3", "s3://bucket/ckpts"]


@pytest.mark.parametrize("ask", [resolve, resolve_new])
@pytest.mark.parametrize("place", ["s3://user:hunter2@bucket", "s3://user:hunter2@bucket/lstm@3"])
def test_credentials_in_a_url_are_not_shown(ask: Callable[[str], object], place: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ask(place)
    assert "hunter2" not in str(caught.value)


def test_a_new_checkpoint_may_be_in_a_store_that_is_not_there_yet(here: Path) -> None:
    place = resolve_new("./new/pretrained@0")
    assert (place.objects.url, place.run, place.step) == (str(here / "new"), "pretrained", 0)
    assert not (here / "new").exists()


def test_a_new_checkpoint_without_a_slash_goes_to_the_default_store(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError, match="no default store"):
        resolve_new("pretrained@0")
    make_store("ckpts")
    monkeypatch.setenv(STORE_VARIABLE, "ckpts")
    place = resolve_new("pretrained@0")
    assert (place.objects.url, place.run, place.step) == (str(here / "ckpts"), "pretrained", 0)


def test_new_checkpoints_may_have_no_step_yet(here: Path) -> None:
    place = resolve_new("./new/lstm")
    assert (place.objects.url, place.run, place.step) == (str(here / "new"), "lstm", None)


def test_a_whole_store_is_not_taken_for_a_run_beside_it() -> None:
    make_store("ckpts")
    with pytest.raises(InvalidInputError, match="is a whole store"):
        resolve_new("./ckpts")


@pytest.mark.parametrize("text", ["s3://bucket@3", "s3://bucket", "/lstm@3", "/lstm", "ckpts/@3", "ckpts/lstm@-1"])
def test_a_new_checkpoint_needs_a_store_and_a_run(text: str) -> None:
    with pytest.raises(InvalidInputError):
        resolve_new(text)


@pytest.mark.parametrize(
    "text", ["lstm@", "lstm@x", "lstm@-1", "lstm@1.5", "lstm@3@4", "lstm@²", f"lstm@{2**63}", "@3"]
)
def test_a_step_is_a_whole_number(text: str) -> None:
    with pytest.raises(InvalidInputError):
        split_run(text)


def test_storage_options_are_a_json_object() -> None:
    assert parse_options('{"profile": "team"}') == {"profile": "team"}
    assert parse_options(None) is None


@pytest.mark.parametrize("text", ['{"secret": "hunter2"', '["hunter2"]', "hunter2"])
def test_storage_options_that_make_no_sense_are_not_shown(text: str) -> None:
    with pytest.raises(InvalidInputError, match="must be a JSON object") as caught:
        parse_options(text)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_whole_store_is_no_run_and_a_step_is_not_always_wanted() -> None:
    make_store("ckpts")
    with pytest.raises(InvalidInputError, match="Name a run in it"):
        resolve("ckpts").require_run()
    with pytest.raises(InvalidInputError, match="Leave out @7"):
        resolve("ckpts/lstm@7").refuse_step("du adds up")
