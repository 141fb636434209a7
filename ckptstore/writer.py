"""Who writes an object, and when: for people who read it. No decision rests on either."""

import os
import socket
from datetime import UTC, datetime

from ckptstore._version import __version__
from ckptstore.manifest import Writer


def this_writer() -> Writer:
    """Describe this process, for people who look for a job that died."""
    return Writer(host=socket.gethostname(), pid=os.getpid(), version=__version__)


def now_text() -> str:
    """The time as manifests write it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
