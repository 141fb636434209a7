"""Azure Blob Storage, as Azurite has it: what every backend has to do, and what goes wrong with this one."""

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.testing import BackendSuite

# Azurite's own account, which Microsoft's documentation has printed.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
SECONDS = 60

# aiohttp advises adlfs how to send large bodies.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


def azurite() -> str | None:
    installed = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    return str(installed) if installed.exists() else shutil.which("azurite-blob")


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The storage_options of a running Azurite."""
    program = azurite()
    if program is None:
        pytest.skip("Azurite is an npm package, and there was no npm to install it with")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("azurite")
    command = [program, "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--location", str(folder)]
    place = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};"
    with subprocess.Popen(
        [*command, "--blobPort", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    ) as process:
        try:
            deadline = time.monotonic() + SECONDS
            while not _listens(port):
                assert process.poll() is None and time.monotonic() < deadline, "Azurite does not start"
                time.sleep(0.1)
            yield {"connection_string": f"{place}BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT};"}
        finally:
            process.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def container(options: dict[str, Any]) -> str:
    import adlfs

    name = f"test-{uuid.uuid4().hex[:20]}"
    adlfs.AzureBlobFileSystem(**options).mkdir(name)
    return name


class TestAzurite(BackendSuite):
    """A prefix of a container."""

    @pytest.fixture
    def objects(self, options: dict[str, Any], container: str) -> Objects:
        return open_objects(f"abfs://{container}/some/prefix", options)


def test_a_store_there_is_saved_to_restored_pruned_and_collected(options: dict[str, Any], container: str) -> None:
    store = ckptstore.Store(f"abfs://{container}/ckpts", options)
    for step in range(3):
        store.run("run").save({"x": torch.randn(300, 300), "step": step}, step=step)
    x = torch.zeros(300, 300)
    checkpoint = store.run("run").restore({"x": x})
    assert checkpoint is not None
    assert (checkpoint.step, bool(x.any())) == (2, True)
    store.prune(keep_last=1)
    assert store.collect(grace=0).deleted == 2
    assert store.verify().ok
    assert all(finding.level == "ok" for finding in store.examine())


@pytest.mark.parametrize(
    "ask",
    [
        lambda objects: objects.get("x"),
        lambda objects: objects.list(""),
        lambda objects: objects.children(""),
        lambda objects: objects.create("x", b"1"),
        lambda objects: objects.delete("x"),
    ],
    ids=["get", "list", "children", "create", "delete"],
)
def test_an_absent_container_is_an_error_and_no_empty_store(
    options: dict[str, Any], ask: Callable[[Objects], object]
) -> None:
    with pytest.raises(ckptstore.UnavailableError, match="The container 'absent' does not exist"):
        ask(open_objects("abfs://absent/ckpts", options))


def test_credentials_that_are_refused_are_named_and_not_printed(options: dict[str, Any], container: str) -> None:
    wrong = options["connection_string"].replace(KEY, KEY[::-1].lstrip("=") + "==")
    with pytest.raises(ckptstore.UnavailableError, match="credentials are wrong") as caught:
        open_objects(f"abfs://{container}/ckpts", {"connection_string": wrong}).get("x")
    assert KEY[::-1][5:20] not in str(caught.value)
    assert "RequestId" not in str(caught.value)
