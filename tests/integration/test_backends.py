"""Every backend passes the one suite: local disk, memory, and two real S3 servers."""

import threading
import uuid
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ckptstore.objects.base import Objects
from ckptstore.objects.obstore import ObstoreObjects
from ckptstore.objects.open import open_objects
from ckptstore.objects.s3 import S3Objects
from ckptstore.testing import BackendSuite
from tests.servers import S3Server


class TestLocal(BackendSuite):
    """A folder on this disk, not there yet."""

    @pytest.fixture
    def objects(self, tmp_path: Path) -> Objects:
        return open_objects(tmp_path / "above" / "store")


class TestMemory(BackendSuite):
    """The memory of this process."""

    @pytest.fixture
    def objects(self) -> Objects:
        return open_objects(f"memory://{uuid.uuid4().hex}/store")


class TestMoto(BackendSuite):
    """A prefix of a bucket of moto, through s3fs."""

    @pytest.fixture
    def objects(self, moto_s3: S3Server) -> Objects:
        return S3Objects(f"s3://{moto_s3.new_bucket()}/some/prefix/", moto_s3.storage_options)


class TestMotoThroughObstore(BackendSuite):
    """The same through obstore and s3fs."""

    @pytest.fixture
    def objects(self, moto_s3: S3Server) -> Objects:
        return ObstoreObjects(f"s3://{moto_s3.new_bucket()}/some/prefix/", moto_s3.storage_options)


class TestSeaweed(BackendSuite):
    """A whole bucket of SeaweedFS, through s3fs."""

    @pytest.fixture
    def objects(self, seaweed_s3: S3Server) -> Objects:
        return S3Objects(f"s3://{seaweed_s3.new_bucket()}", seaweed_s3.storage_options)


class TestSeaweedThroughObstore(BackendSuite):
    """The same through obstore and s3fs, with TLS, without which obstore gets only chunks."""

    @pytest.fixture
    def objects(self, seaweed_s3: S3Server, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Objects:
        monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
        monkeypatch.setenv("AWS_CA_BUNDLE", certificate[0])
        objects = ObstoreObjects(f"s3://{seaweed_s3.new_bucket()}", seaweed_s3.storage_options_of_https)
        objects.connect()
        assert objects._stores is not None and objects._stores.gets_are_protected
        return objects


class FoldersInMemory(MemoryFileSystem):  # type: ignore[misc]
    """A file system as fsspec has them (folders, `ls`), with the exclusive create that MemoryFileSystem races for."""

    protocol = "foldersinmemory"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("foldersinmemory://")))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        with self.lock:
            if mode == "create" and self._strip_protocol(path) in self.store:
                raise FileExistsError(path)
            super().pipe_file(path, value, **kwargs)


class TestOtherFsspec(BackendSuite):
    """The part that serves any other URL of fsspec's."""

    @pytest.fixture
    def objects(self) -> Objects:
        fsspec.register_implementation("foldersinmemory", FoldersInMemory, clobber=True)
        return open_objects(f"foldersinmemory://{uuid.uuid4().hex}/store")
