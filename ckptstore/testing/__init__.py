"""For people who write backends or test against one: the suite that every backend passes, a recorder, a breaker.

Needs the `[test]` extra (pytest). A backend is done when a subclass of `BackendSuite` passes; `RecordingObjects` counts
calls, so that tests need no clock; `FailingObjects` fails, or dies, at the n-th call.
"""

from ckptstore.testing.suite import BackendSuite
from ckptstore.testing.wrappers import Call, FailingObjects, RecordingObjects

__all__ = ["BackendSuite", "Call", "FailingObjects", "RecordingObjects"]
