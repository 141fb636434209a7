"""A store that a web server hands out, to read from: `https://host/folder`, through fsspec.

What is there the server's own pages of links tell, as nginx (`autoindex on`), Apache and `python -m http.server` make
them; sizes and times a HEAD of each file. Where a server shows no such pages, nothing passes for an empty store.
"""

import asyncio
import builtins
import re
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from typing import Any, NoReturn
from urllib.parse import unquote, urldefrag, urljoin

from ckptstore.errors import UnavailableError
from ckptstore.format import MARKER_KEY
from ckptstore.objects.base import Bytes, ObjectInfo
from ckptstore.objects.remote import FsspecObjects

__all__ = ["HttpObjects", "is_http"]

HEADS_AT_A_TIME = 16
SORTED = re.compile(r"(C=[NMSD];?&?)?(O=[AD])?")
"""The links by which Apache shows the same page in another order."""
OF_EMPTY_FOLDERS = ("index of", "directory listing")
"""What servers write above a page of links, also if there are none."""


def is_http(url: str) -> bool:
    """Tell whether this URL is one of a web server."""
    return url.partition("://")[0] in ("http", "https")


class HttpObjects(FsspecObjects):
    """The files below a URL of a web server."""

    def create(self, key: str, content: Bytes) -> bool:
        """Refuse."""
        self._refuse()

    def put(self, key: str, content: Bytes) -> None:
        """Refuse."""
        self._refuse()

    def delete(self, key: str) -> None:
        """Refuse."""
        self._refuse()

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        """Walk the pages of links, from the first one on."""
        with self._explained("list", prefix):
            keys = [key for key in self._walk_links("", prefix) if not key.endswith("/") and key.startswith(prefix)]
            return sorted(self._rows(keys), key=lambda row: row.key)

    def children(self, prefix: str) -> builtins.list[str]:
        """Take the folders of one page of links that have files below them."""
        with self._explained("list", prefix):
            below = {key[len(prefix) :] for key in self._walk_links("", prefix) if key.startswith(prefix)}
            return sorted({key.partition("/")[0] for key in below if "/" in key and not key.endswith("/")})

    def _walk_links(self, folder: str, prefix: str) -> Iterator[str]:
        """Every key below `folder` that may start with `prefix`; folders end in a slash."""
        links = self._links(folder)
        if not folder and MARKER_KEY not in links and self.get(MARKER_KEY) is not None:
            raise OSError("the server shows no page with the files of a folder, so what is there cannot be told")
        for key in links:
            if key.endswith("/") and (key.startswith(prefix) or prefix.startswith(key)):
                yield key
                yield from self._walk_links(key, prefix)
            elif not key.endswith("/"):
                yield key

    def _links(self, folder: str) -> builtins.list[str]:
        """The keys that the page of a folder links to. What is no such page raises, as it must not pass for empty."""
        from fsspec.asyn import sync

        connection = self._connected()
        start = f"{connection.root}/"
        text: str = sync(connection.fs.loop, _page, connection.fs, f"{start}{folder}")
        page = _Links()
        page.feed(text)
        keys = set()
        for link in page.found:
            place, _, query = urldefrag(urljoin(f"{start}{folder}", link)).url.partition("?")
            if query and place == f"{start}{folder}" and not SORTED.fullmatch(query):
                raise OSError(f"{place} shows what is in it in several pages ({link}), which cannot be read")
            key = unquote(place.removeprefix(start)) if place.startswith(start) else ""
            if not query and key.startswith(folder) and "/" not in key[len(folder) :].rstrip("/") and key != folder:
                keys.add(key)
        if not keys and not any(word in text.lower() for word in OF_EMPTY_FOLDERS):
            raise OSError(f"{start}{folder} is a page, and none with the files of a folder")
        return sorted(keys)

    def _rows(self, keys: Sequence[str]) -> builtins.list[ObjectInfo]:
        from fsspec.asyn import sync

        connection = self._connected()
        return sync(connection.fs.loop, _heads, connection.fs, connection.root, keys)  # type: ignore[no-any-return]

    def _file_system(self) -> tuple[Any, str]:
        import fsspec

        options = {**self._options, "use_listings_cache": False}
        return fsspec.filesystem(self._protocol, **options), self._url

    def _refuse(self) -> NoReturn:
        raise UnavailableError(
            f"{self.url} is a web server's, from which a store can be read only. Write to it where its files are, by a "
            "path or the URL of a bucket."
        )

    def _told(self, error: BaseException) -> str:
        text = super()._told(error)
        return f"the server has no {text}" if isinstance(error, FileNotFoundError) else text

    def _advice(self, action: str, error: BaseException) -> str:
        return "Check the URL, the network and, for a server that asks for a name, storage_options, then try again."


class _Links(HTMLParser):
    """What a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: builtins.list[str] = []

    def handle_starttag(self, tag: str, attrs: builtins.list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


async def _page(fs: Any, url: str) -> str:
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **fs.kwargs) as answer:
        if answer.status == 404:
            raise FileNotFoundError(url)
        answer.raise_for_status()
        if not answer.url.path.endswith("/"):
            raise OSError(f"{url} leads elsewhere, to {answer.url}: to a page for logging in?")
        if "html" not in answer.headers.get("Content-Type", ""):
            raise OSError(f"{url} is no page with the files of a folder")
        return str(await answer.text(errors="replace"))


async def _heads(fs: Any, root: str, keys: Sequence[str]) -> builtins.list[ObjectInfo]:
    session = await fs.set_session()
    turns = asyncio.Semaphore(HEADS_AT_A_TIME)

    async def head(key: str) -> ObjectInfo:
        async with (
            turns,
            # As it is: of a body that is compressed on its way the length would be another.
            session.head(
                fs.encode_url(f"{root}/{key}"), headers={"Accept-Encoding": "identity"}, **fs.kwargs
            ) as answer,
        ):
            answer.raise_for_status()
            return ObjectInfo(key, _size(answer.headers, key), _modified(answer.headers))

    return builtins.list(await asyncio.gather(*map(head, keys)))


def _size(headers: Mapping[str, str], key: str) -> int:
    if "Content-Length" not in headers:
        raise OSError(f"the server does not say how long {key} is")
    return int(headers["Content-Length"])


def _modified(headers: Mapping[str, str]) -> float:
    told = headers.get("Last-Modified")
    return parsedate_to_datetime(told).timestamp() if told else 0.0
