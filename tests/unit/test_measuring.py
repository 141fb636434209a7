"""What `ckptstore bench` measures and forecasts. Times are not looked at: they are the machine's, not the code's."""

import json
import uuid
from pathlib import Path

import pytest

from ckptstore import measuring
from ckptstore.cli import main
from ckptstore.errors import UnavailableError
from ckptstore.measuring import Measured, Processing, Throughput, forecast, interval_seconds, measure
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.testing import FailingObjects, RecordingObjects


@pytest.fixture
def place() -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}")


def test_every_kind_of_request_is_measured_and_nothing_is_left_behind(place: Objects) -> None:
    recording = RecordingObjects(place)
    told: list[tuple[int, int]] = []
    found = measure(recording, threads=2, object_bytes=2**16, requests=[1, 3], progress=lambda *pair: told.append(pair))
    assert list(found.latencies) == ["create", "put", "get", "list", "delete"]
    assert [each.requests for each in found.throughput] == [1, 3]
    assert all(each.put > 0 and each.get > 0 for each in found.throughput)
    assert [each.codec for each in found.processing] == ["fast", "none"]
    assert found.processing[0].share < 0.9
    assert 1 < found.processing[1].share < 1.01
    large = [call for call in recording.calls if call.size == 2**16]
    assert sum(call.operation == "put" for call in large) == 8
    assert len({call.key for call in large}) == 8
    assert told[-1] == (16 * 2**16, 16 * 2**16)
    assert place.list("") == []
    assert all(key.startswith("scratch/") for key in recording.keys("put") + recording.keys("create"))


@pytest.mark.parametrize("fail_at", [2, 5, 40])
def test_a_place_that_fails_is_an_error_and_nothing_is_left_behind(place: Objects, fail_at: int) -> None:
    with pytest.raises(UnavailableError):
        measure(FailingObjects(place, fail_at=fail_at), threads=1, object_bytes=1024, requests=[2])
    assert place.list("") == []


def test_as_many_requests_as_a_save_makes_are_tried(place: Objects) -> None:
    place.request_threads = 6
    assert [each.requests for each in measure(place, threads=1, object_bytes=1024).throughput] == [1, 4, 6]


def test_the_slower_of_putting_and_encoding_counts() -> None:
    measured = Measured(
        latencies={"put": 0.1, "get": 0.3},
        throughput=[Throughput(1, put=50, get=100), Throughput(4, put=100, get=400)],
        hashing=1000,
        processing=[Processing("fast", encode=500, decode=250, share=0.5), Processing("none", 10_000, 10_000, 1.0)],
    )
    fast, none = forecast(measured, 1000)
    assert (fast.codec, none.codec) == ("fast", "none")
    assert fast.save == pytest.approx(1 + max(2 + 1, 500 / 100) + measuring.SAVE_REQUESTS * 0.2)
    assert fast.restore == pytest.approx(max(4, 500 / 400) + measuring.RESTORE_REQUESTS * 0.2)
    assert none.save == pytest.approx(1 + 1000 / 100 + measuring.SAVE_REQUESTS * 0.2)
    assert none.restore == pytest.approx(1000 / 400 + measuring.RESTORE_REQUESTS * 0.2)
    assert (fast.stored_bytes, none.stored_bytes) == (500, 1000)


def test_the_interval_is_that_of_young_and_daly() -> None:
    assert interval_seconds(0.6, 4 * 3600) == pytest.approx(131.45, abs=0.01)


# ---- the command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "DEFAULT_CHUNK_BYTES", 2**16)
    monkeypatch.setitem(measuring.measure.__kwdefaults__, "object_bytes", 2**16)  # type: ignore[arg-type]


def test_the_document_has_what_was_measured_and_what_follows(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tmp_path / "new"), "--state", "2.5GB", "--mtbf", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["state_bytes"] == 2_500_000_000
    assert [each["codec"] for each in document["forecasts"]] == ["fast", "none"]
    for each in document["forecasts"]:
        assert each["save_every_seconds"] == pytest.approx(interval_seconds(each["save_seconds"], 4 * 3600))
    assert {each["requests"] for each in document["throughput"]} == {1, 4}
    assert [path for path in (tmp_path / "new").rglob("*") if path.is_file()] == []


def test_people_get_a_table_with_bars(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "new"), "--state", "500 MB"]) == 0
    shown = capsys.readouterr().out
    assert "#" * 30 in shown
    assert "a state of 500 MB, all of it new" in shown
    assert "saves fastest here" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--state", "big"), "--state 'big' is no size"),
        (("--state", "0"), "--state '0' is no size"),
        (("--mtbf", "0"), "--mtbf must be a number of hours above 0"),
    ],
)
def test_sizes_and_hours_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(["bench", str(tmp_path / "new"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_to_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["bench", str(tmp_path / "file")]) == 4
    assert "is a file, but a store is a folder" in capsys.readouterr().err
