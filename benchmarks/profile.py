"""Where the time of a save and a restore goes: the library's functions wrapped with counters, on one thread.

One thread, so that a stage's time is its own and does not depend on what ran beside it; the stages of all threads
together therefore take longer here than a save or restore does. A stage's time is without that of the stages in it.
"""

import contextlib
import importlib
import resource
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ckptstore
from benchmarks.save import another
from benchmarks.states import STEPS, Training, raw_bytes, real_batches, state_file, work_folder
from benchmarks.timing import Report, Row, fresh

SAMPLE_BYTES = 65536
"""No sample of a plane is longer, and no plane of this state's large chunks is shorter."""

WRAPPED = {
    # "module:function" or "module:class.function" -> stage
    "ckptstore.saving:take_apart": "take the state apart",
    "ckptstore.saving:ensure_store": "storage: marker",
    "ckptstore.segments:digest": "hash (find what is new)",
    "ckptstore.performing:digest_of": "hash again (did it change?)",
    "ckptstore.performing:encode_chunk": "encode: the rest",
    "ckptstore.performing:encode_over": "encode: the rest",
    "ckptstore.codec:Sampled.encode_planes": "encode: the rest",
    "ckptstore.chunk:_checksum": "checksum of compressed planes",
    "ckptstore.codec:_sample": "encode: take samples",
    "ckptstore.codec:split": "encode: split",
    "ckptstore.objects.local:LocalObjects.put": "put: open, close, uuid",
    "ckptstore.objects.local:LocalObjects.create": "put: open, close, uuid",
    "ckptstore.objects.local:LocalObjects.list": "storage: list",
    "ckptstore.objects.local:_fsync_folder": "put: fsync of folders",
    "ckptstore.objects.local:_write_whole": "put: write",
    "ckptstore.objects.local:os.fsync": "put: fsync",
    "ckptstore.objects.local:os.replace": "put: rename, link",
    "ckptstore.objects.local:os.link": "put: rename, link",
    "ckptstore.objects.local:LocalObjects.get": "fetch: read",
    "ckptstore.catalog:newest": "read the manifest",
    "ckptstore.chunk:digest": "hash",
    "ckptstore.chunk:decode_planes": "decode: the rest",
    "ckptstore.codec:merge": "decode: merge",
    "ckptstore.restoring:match": "match destination and checkpoint",
    "ckptstore.placement:Placement.put_in_place": "hand over: load_state_dict",
}


LEAVES = {"put: fsync of folders", "checksum of compressed planes"}
"""Stages that keep the time of what they call."""


class Clock:
    """Seconds, calls and page faults by stage, each without those of the stages inside."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._in_leaf = False
        self._inner: list[tuple[float, int]] = [(0.0, 0)]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._in_leaf:
            yield
            return
        self._in_leaf = name in LEAVES
        self._inner.append((0.0, 0))
        faults_before, began = _faults(), time.perf_counter()
        try:
            yield
        finally:
            self._in_leaf = False
            took, faulted = time.perf_counter() - began, _faults() - faults_before
            inner_seconds, inner_faults = self._inner.pop()
            outer_seconds, outer_faults = self._inner[-1]
            self._inner[-1] = (outer_seconds + took, outer_faults + faulted)
            self.seconds[name] += took - inner_seconds
            self.faults[name] += faulted - inner_faults
            self.calls[name] += 1

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return wrapped


def ask(folder: Path, rounds: int) -> list[Report]:
    file = str(state_file(folder))
    real_batches(folder)
    with work_folder(folder) as work:
        ckptstore.Store(work / "store").run("lstm").save(Training.resumed(file).state(), step=STEPS)
        saves = [fresh("benchmarks.profile:of_save", file=file, work=str(work), number=n) for n in range(rounds)]
        restores = [fresh("benchmarks.profile:of_restore", work=str(work)) for _ in range(rounds)]
    return [_report("profile of save", saves), _report("profile of restore", restores)]


def of_save(file: str, work: str, number: int) -> dict[str, Any]:
    training = another(file, number)
    run = ckptstore.Store(Path(work) / "store").run("profiled")
    return _profiled(lambda: run.save(training.state(), step=training.step), training)


def of_restore(work: str) -> dict[str, Any]:
    training = Training.fresh()
    run = ckptstore.Store(Path(work) / "store").run("lstm")
    return _profiled(lambda: run.restore({"model": training.model, "optimizer": training.optimizer}), training)


def _profiled(act: Callable[[], Any], training: Training) -> dict[str, Any]:
    clock = Clock()
    _wrap_library(clock)
    with clock.stage("everything else"):
        act()
    stages = {name: [seconds, clock.calls[name], clock.faults[name]] for name, seconds in clock.seconds.items()}
    return {"stages": stages, "raw_bytes": raw_bytes(training.state_dicts())}


def _report(question: str, profiles: Sequence[dict[str, Any]]) -> Report:
    names = {name for profile in profiles for name in profile["stages"]}
    raw = profiles[0]["raw_bytes"]

    def middle(name: str, index: int) -> float:
        return float(statistics.median(profile["stages"].get(name, (0, 0, 0))[index] for profile in profiles))

    total = statistics.median(sum(stage[0] for stage in profile["stages"].values()) for profile in profiles)
    rows = []
    for name in sorted(names, key=lambda name: -middle(name, 0)):
        seconds, calls, faults = (middle(name, index) for index in range(3))
        text = f"{seconds:6.3f} s {seconds / total:4.0%}  {seconds / raw * 1e9:5.2f} ns/byte"
        rows.append(
            Row(
                name,
                f"{text}  {calls:4.0f} calls  {faults:7,.0f} page faults",
                {"seconds": seconds, "calls": calls, "page_faults": faults},
            )
        )
    return Report(
        f"{question}: one thread, fresh process, stages without what is in them", rows, f"{total:.3f} s in all"
    )


def _wrap_library(clock: Clock) -> None:
    for module in ("assembly", "performing", "segments"):
        rooms = importlib.import_module(f"ckptstore.{module}")
        for name, in_turn in (("staged", _staged), ("each", _each)):
            if hasattr(rooms, name):
                setattr(rooms, name, in_turn)
    for place, stage in WRAPPED.items():
        module, _, path = place.partition(":")
        *above, name = path.split(".")
        owner: Any = importlib.import_module(module)
        if above == ["np"] or above == ["os"]:
            owner = _Shim.put_in(owner, above[0])  # only as this module sees it
        elif above:
            owner = getattr(owner, above[0])
        if not hasattr(owner, name):
            print(f"{place} is not there any more: its time counts where it is called from")
            continue
        setattr(owner, name, clock.wrap(getattr(owner, name), stage))
    chunk, codec = importlib.import_module("ckptstore.chunk"), importlib.import_module("ckptstore.codec")
    hashing = _Shim.put_in(chunk, "blake3")
    hashing.blake3 = _timed_blake3(clock, hashing.blake3)
    codec._zstd = _timed_zstd(clock, codec._zstd)  # type: ignore[attr-defined]


class _Shim:
    """A module in the eyes of another one, with functions of its own."""

    @staticmethod
    def put_in(module: Any, name: str) -> Any:
        shim = getattr(module, name)
        if not isinstance(shim, _Shim):
            shim = _Shim(shim)
            setattr(module, name, shim)
        return shim

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _timed_blake3(clock: Clock, blake3: Any) -> Any:
    class Hasher:
        def __init__(self, *content: Any) -> None:
            self._inner = blake3(*content)
            self.hexdigest = self._inner.hexdigest
            self.digest = self._inner.digest

        def update(self, content: Any) -> None:
            with clock.stage("hash"):
                self._inner.update(content)

    return Hasher


def _timed_zstd(clock: Clock, zstd: Any) -> Any:
    class Compressor:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def compress(self, content: Any) -> Any:
            name = "encode: zstd of samples" if len(content) <= SAMPLE_BYTES else "encode: zstd"
            with clock.stage(name):
                return self._inner.compress(content)

    class Decompressor:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._inner, name)
            return clock.wrap(found, "decode: zstd") if callable(found) else found

    class Zstd:
        compressors = [Compressor(each) for each in zstd.compressors]  # noqa: RUF012
        decompressor = Decompressor(zstd.decompressor)

    return Zstd()


def _each(work: Callable[[Any], Any], items: Any, *, threads: int) -> list[Any]:
    return [work(item) for item in items]


def _staged(items: Any, stages: Any, *, done: Any = None, **_: Any) -> list[Any]:
    results = []
    for item in items:
        value = item
        for stage in stages:
            value = stage.work(value)
        results.append(value)
        if done:
            done(item)
    return results


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
