"""A store behind a web server: read as any other, and never taken for an empty one."""

import functools
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.cli import main
from ckptstore.objects.open import open_objects

RUN = "a=b+c,1"


class Quiet(SimpleHTTPRequestHandler):
    """Files, and pages of links to them, without a word."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class WithoutPages(Quiet):
    """A server as most are: files, and 404 for a folder."""

    def list_directory(self, path: Any) -> None:
        self.send_error(404)


def serving(folder: Path, handler: type[SimpleHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def store(tmp_path: Path) -> ckptstore.Store:
    store = ckptstore.Store(tmp_path / "ckpts", codec="small")
    for step in (1, 2, 3):
        x = torch.arange(30_000, dtype=torch.float32) + step / 1e4
        store.run(RUN).save({"x": x, "step": step}, step=step, metrics={"loss": 1 / step})
    store.run(RUN).tag(2, "best")
    store.run("other").save({"y": 1}, step=1)
    return store


@pytest.fixture
def url(tmp_path: Path, store: ckptstore.Store) -> Iterator[str]:
    yield from serving(tmp_path, Quiet)


@pytest.fixture
def url_without_pages(tmp_path: Path, store: ckptstore.Store) -> Iterator[str]:
    yield from serving(tmp_path, WithoutPages)


def test_the_listing_is_that_of_the_folder(tmp_path: Path, url: str) -> None:
    here, there = open_objects(tmp_path / "ckpts"), open_objects(f"{url}/ckpts")
    for prefix in ("", "runs/", f"runs/{RUN}/", "chunks/", "tags/", "nothing/", f"runs/{RUN}/{2:020d}.", "run"):
        ours = [(row.key, row.size, int(row.modified)) for row in here.list(prefix)]
        assert [(row.key, row.size, int(row.modified)) for row in there.list(prefix)] == ours
    for prefix in ("", "runs/", "chunks/", "nothing/"):
        assert there.children(prefix) == here.children(prefix)


def test_checkpoints_are_restored_verified_and_listed(url: str) -> None:
    published = ckptstore.Store(f"{url}/ckpts")
    run = published.run(RUN)
    x = torch.zeros(30_000)
    checkpoint = run.restore({"x": x})
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state["step"]) == (3, 3)
    assert torch.equal(x, torch.arange(30_000, dtype=torch.float32) + 3 / 1e4)
    assert (run.steps(), run.tags(), published.runs()) == ([1, 2, 3], {2: ("best",)}, [RUN, "other"])
    assert published.verify().ok
    assert main(["ls", f"{url}/ckpts"]) == 0


def test_a_damaged_file_is_noticed(tmp_path: Path, store: ckptstore.Store, url: str) -> None:
    [ref, *_] = store.run(RUN).checkpoint(3)._manifest.chunks
    path = tmp_path / "ckpts" / ref.key
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ckptstore.CorruptError, match="step 3 of run"):
        ckptstore.Store(f"{url}/ckpts").run(RUN).load(3)


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.run("new").save({"x": 1}, step=1),
        lambda store: store.run(RUN).delete(1),
        lambda store: store.run(RUN).tag(1, "best"),
        lambda store: store.collect(),
        lambda store: store.prune(keep_last=1),
    ],
    ids=["save", "delete", "tag", "collect", "prune"],
)
def test_nothing_can_be_changed_there(
    store: ckptstore.Store, url: str, change: Callable[[ckptstore.Store], object]
) -> None:
    with pytest.raises(ckptstore.UnavailableError, match="can be read only"):
        change(ckptstore.Store(f"{url}/ckpts"))
    assert store.run(RUN).steps() == [1, 2, 3]


def test_a_server_that_shows_no_pages_is_an_error_and_no_first_start(url_without_pages: str) -> None:
    run = ckptstore.Store(f"{url_without_pages}/ckpts").run(RUN)
    with pytest.raises(ckptstore.UnavailableError, match="the server has no http"):
        run.restore({"x": torch.zeros(30_000)})


def test_a_page_of_something_else_is_an_error_and_no_first_start(tmp_path: Path, url: str) -> None:
    (tmp_path / "ckpts" / "index.html").write_text("<a href='news.html'>news</a>")
    with pytest.raises(ckptstore.UnavailableError, match=r"no page with the files|none with the files"):
        ckptstore.Store(f"{url}/ckpts").run(RUN).restore({"x": torch.zeros(30_000)})


@pytest.mark.parametrize(
    "page",
    ["<form>Log in</form>", "<a href='/login'>Log in</a>", "", "<a href='?page=2'>next</a> <a href='a=b+c,1/'>a</a>"],
)
@pytest.mark.parametrize("folder", ["runs", f"runs/{RUN}"])
def test_a_page_that_is_no_listing_is_an_error_and_no_empty_folder(
    tmp_path: Path, url: str, folder: str, page: str
) -> None:
    (tmp_path / "ckpts" / folder / "index.html").write_text(page)
    with pytest.raises(ckptstore.UnavailableError, match=r"none with the files of a folder|in several pages"):
        ckptstore.Store(f"{url}/ckpts").run(RUN).restore({"x": torch.zeros(30_000)})


class Redirecting(Quiet):
    """Sends who asks for a folder of runs somewhere else."""

    def do_GET(self) -> None:
        if self.path.endswith("/runs/"):
            self.send_response(302)
            self.send_header("Location", "/ckpts/ckptstore.json")
            self.end_headers()
        else:
            super().do_GET()


def test_a_folder_that_leads_elsewhere_is_an_error(tmp_path: Path, store: ckptstore.Store) -> None:
    for url in serving(tmp_path, Redirecting):
        with pytest.raises(ckptstore.UnavailableError, match="leads elsewhere"):
            ckptstore.Store(f"{url}/ckpts").run(RUN).restore({"x": torch.zeros(30_000)})


def test_a_place_where_nothing_is_is_an_error_and_no_first_start(url: str) -> None:
    with pytest.raises(ckptstore.UnavailableError, match="nowhere"):
        ckptstore.Store(f"{url}/nowhere").run(RUN).restore({"x": torch.zeros(30_000)})


def test_links_to_other_places_are_not_followed(tmp_path: Path, url: str) -> None:
    place = tmp_path / "ckpts" / "runs"
    place.joinpath("index.html").write_text(
        f"<a href='{RUN}/'>a</a> <a href='../../ckpts/'>up</a> <a href='/'>top</a> <a href='?C=N;O=D'>sort</a>"
        "<a href='http://127.0.0.1:9/ckpts/runs/x/'>elsewhere</a>"
    )
    assert ckptstore.Store(f"{url}/ckpts").runs() == [RUN]
