"""The trainer killed for real: SIGKILL at three moments, one of them within a save, then equal to the last bit.

On a disk and on SeaweedFS, through the trainer's own command line.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

import ckptstore
from ckptstore.objects.open import open_objects
from tests.servers import S3Server
from tests.tiny_trainer import write_tiny_text

STEPS, SAVE_EVERY = 60, 7
PATIENCE_SECONDS = 600  # on a machine that others keep busy
MODEL = {"vocab-size": 60, "embed-size": 48, "hidden-size": 200, "batch-size": 4, "bptt": 8, "dropout": 0.2}


class Training:
    """One run of the trainer in a store, started as often as needed."""

    def __init__(self, folder: Path, name: str, url: str, options: dict[str, Any] | None, *more: str) -> None:
        self.name, self.url, self.options = name, url, options
        self.log = folder / f"{name}.jsonl"
        model = [part for key, value in MODEL.items() for part in (f"--{key}", str(value))]
        storage = ["--storage-options", json.dumps(options)] if options else []
        self.command = [
            *(sys.executable, "-m", "trainer", "train", "--run", name, "--store", url, *storage),
            *("--text", str(folder / "text.txt"), "--log", str(self.log), "--threads", "1"),
            *("--steps", str(STEPS), "--epochs", "100", "--save-every", str(SAVE_EVERY), *model, *more),
        ]

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self) -> str:
        process = self.start()
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, output
        return output

    def kill_after(self, step: int) -> None:
        """Kill it once it has logged `step`, and there is a checkpoint to go on from."""
        objects = open_objects(self.url, self.options)
        process = self.start()
        try:
            wait_for(lambda: self.last_step() >= step and objects.list(f"runs/{self.name}/"), process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()

    def kill_in_a_save(self) -> bool:
        """Kill it while a session stands; True if that save never committed."""
        objects = open_objects(self.url, self.options)
        before = {row.key for row in objects.list("sessions/")}  # of saves that were killed earlier
        process = self.start()
        try:
            wait_for(lambda: any(row.key not in before for row in objects.list("sessions/")), process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        [session] = {row.key for row in objects.list("sessions/")} - before or {""}
        save_id = session.removeprefix("sessions/").removesuffix(".json")
        return bool(session) and not any(save_id in row.key for row in objects.list("runs/"))

    def last_step(self) -> int:
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def losses(self) -> dict[int, float]:
        """The loss of each step; where a step was done twice, both must be the same."""
        found: dict[int, float] = {}
        for line in self.log.read_text().split("\n")[:-1]:
            if line.endswith("}") and line.startswith("{"):
                entry = json.loads(line)
                assert found.setdefault(entry["step"], entry["loss"]) == entry["loss"]
        return found

    def digest(self) -> str:
        """BLAKE3 over weights, Adam's state and the generators."""
        state = ckptstore.Store(self.url, self.options).run(self.name).load(STEPS)
        hasher = blake3()
        for part in ("model", "optimizer", "rng", "hidden"):
            add(hasher, state[part])
        return hasher.hexdigest()


def wait_for(condition: Any, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def add(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        hasher.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "tobytes"):
        hasher.update(value.tobytes())
    elif isinstance(value, dict):
        for key, below in value.items():
            hasher.update(repr(key).encode())
            add(hasher, below)
    elif isinstance(value, list | tuple):
        for below in value:
            add(hasher, below)
    else:
        hasher.update(repr(value).encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_text(tmp_path / "text.txt", words=6000)
    return tmp_path


def check(folder: Path, url: str, options: dict[str, Any] | None, *more: str) -> None:
    unbroken = Training(folder, "unbroken", url, options, *more)
    unbroken.finish()
    broken = Training(folder, "broken", url, options, *more)
    choose = random.Random(os.urandom(8))
    first = choose.randint(8, 20)
    broken.kill_after(first)
    within = any(broken.kill_in_a_save() for _ in range(5))  # until one is met in the act
    broken.kill_after(min(broken.last_step() + choose.randint(2, 9), STEPS - 2))
    output = broken.finish()
    assert "resumed from step" in output
    assert broken.losses() == unbroken.losses()
    assert len(broken.losses()) == STEPS
    assert broken.digest() == unbroken.digest()
    assert ckptstore.Store(url, options).verify().ok
    assert within, "no save was met in the act, in five tries"


@pytest.mark.parametrize("more", [(), ("--async",)], ids=["sync", "async"])
def test_on_a_disk(folder: Path, more: tuple[str, ...]) -> None:
    check(folder, str(folder / "store"), None, *more)


def test_on_seaweedfs(folder: Path, seaweed_s3: S3Server) -> None:
    check(folder, f"s3://{seaweed_s3.new_bucket()}/some/prefix", seaweed_s3.storage_options)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, through_s3fs: None) -> Iterator[list[str]]:
    """Every request that s3fs makes, by the name of S3's operation."""
    import s3fs

    requests: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def counting(self: Any, method: str, *arguments: Any, **keywords: Any) -> Any:
        requests.append(method)
        return await call(self, method, *arguments, **keywords)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counting)
    yield requests


@pytest.mark.parametrize("server", ["moto_s3", "seaweed_s3"])
def test_the_same_state_again_takes_at_most_twelve_requests(
    request: pytest.FixtureRequest, server: str, counted: list[str]
) -> None:
    s3: S3Server = request.getfixturevalue(server)
    run = ckptstore.Store(f"s3://{s3.new_bucket()}/prefix", s3.storage_options).run("run")
    model = torch.nn.Linear(600, 600)
    state = {"model": model, "rng": ckptstore.RngState()}
    run.save(state, step=1)
    counted.clear()
    assert run.save(state, step=2).new_bytes == 0
    assert 0 < len(counted) <= 12
    assert counted.count("put_object") == 2  # the session and the manifest; no chunk
    fresh = torch.nn.Linear(600, 600)
    assert run.restore({"model": fresh}) is not None
    assert torch.equal(fresh.weight, model.weight)


def test_credentials_are_written_nowhere(seaweed_s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    bucket = seaweed_s3.new_bucket()
    run = ckptstore.Store(f"s3://{bucket}", seaweed_s3.storage_options).run("run")
    with caplog.at_level(0):
        run.save({"x": torch.ones(3)}, step=1, metadata={"by": "me"})
    secret, key = seaweed_s3.storage_options["secret"], seaweed_s3.storage_options["key"]
    client = seaweed_s3.client()
    for row in client.list_objects_v2(Bucket=bucket)["Contents"]:
        content = client.get_object(Bucket=bucket, Key=row["Key"])["Body"].read()
        assert secret.encode() not in content
        assert key.encode() not in content
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("ckptstore")]
    assert not any(secret in text or key in text for text in ours)
    assert secret not in repr(run)
