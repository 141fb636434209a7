"""`bench`: what a place can do, and what that means for the checkpoints of a training."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptstore.cli.options import Json, StorageOptions, examples
from ckptstore.cli.printing import bytes_text, print_json, print_line, print_table, progress_bar
from ckptstore.cli.target import parse_options
from ckptstore.errors import InvalidInputError
from ckptstore.objects.open import open_objects
from ckptstore.pipeline import worker_threads

if TYPE_CHECKING:
    from ckptstore.measuring import Forecast, Measured

__all__ = ["add_to"]

BAR_WIDTH = 30
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Place = Annotated[str, typer.Argument(metavar="STORE", help="A path or a URL. There need not be a store yet.")]
State = Annotated[str, typer.Option("--state", metavar="SIZE", help="Size of the state to save, such as 500MB or 8GB.")]
Failures = Annotated[float, typer.Option("--mtbf", metavar="HOURS", help="Mean time between failures of the training.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "bench",
        epilog=examples(
            "ckptstore bench s3://bucket/ckpts",
            "ckptstore bench /mnt/scratch --state 20GB --mtbf 4",
            "ckptstore bench ./ckpts --json",
        ),
    )(bench)


def bench(
    store: Place,
    state: State = "1GB",
    mtbf: Failures = 24.0,
    storage_options: StorageOptions = None,
    as_json: Json = False,
) -> int:
    """Measure what a place can do, and say how long saves and restores will take there.

    Puts some hundred MB below scratch/ in the place, gets them back, and deletes them. Forecasts are for a state that
    is all new; a save uploads only what the store lacks.
    """
    from ckptstore.measuring import forecast, interval_seconds, measure

    state_bytes = _size(state)
    if not mtbf > 0:
        raise InvalidInputError(f"--mtbf must be a number of hours above 0, not {mtbf}.")
    objects = open_objects(store, parse_options(storage_options))
    threads = worker_threads()
    with progress_bar("measuring", shown=not as_json) as progress:
        measured = measure(objects, threads=threads, progress=progress)
    forecasts = forecast(measured, state_bytes)
    intervals = [interval_seconds(each.save, 3600 * mtbf) for each in forecasts]
    if as_json:
        print_json(_document(objects.url, threads, state_bytes, mtbf, measured, forecasts, intervals))
    else:
        _print_measured(objects.url, threads, measured)
        _print_forecasts(state_bytes, mtbf, forecasts, intervals)
    return 0


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?B?)", text.strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise InvalidInputError(f"--state {text!r} is no size: give a number of bytes, or such as 500MB or 8GB.")
    return int(float(match[1]) * _UNITS[match[2]])


def _print_measured(url: str, threads: int, measured: "Measured") -> None:
    print_line(url, bold=True)
    shown = "  ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in measured.latencies.items())
    print_line(f"one small request: {shown}")
    print_line()
    fastest = max(rate for each in measured.throughput for rate in (each.put, each.get))
    rows = []
    for found in measured.throughput:
        for name, rate in (("put", found.put), ("get", found.get)):
            bar = "#" * max(1, round(BAR_WIDTH * rate / fastest))
            rows.append((str(found.requests), name, f"{bytes_text(int(rate))}/s", bar))
    print_table(("REQUESTS AT A TIME", "", "THROUGHPUT", ""), rows, right=("REQUESTS AT A TIME", "THROUGHPUT"))
    print_line()
    print_line(f"this machine, {threads} threads: hashes {bytes_text(int(measured.hashing))}/s")
    for codec in measured.processing:
        print_line(
            f"  codec {codec.codec}: encodes {bytes_text(int(codec.encode))}/s, decodes "
            f"{bytes_text(int(codec.decode))}/s, stores {codec.share:.2f} of the bytes of float32 weights"
        )
    print_line()


def _print_forecasts(state_bytes: int, mtbf: float, forecasts: "list[Forecast]", intervals: list[float]) -> None:
    print_line(f"a state of {bytes_text(state_bytes)}, all of it new", bold=True)
    rows = [
        (each.codec, _seconds(each.save), _seconds(each.restore), bytes_text(each.stored_bytes), _seconds(interval))
        for each, interval in zip(forecasts, intervals, strict=True)
    ]
    headings = ("CODEC", "SAVE", "RESTORE", "STORED", "SAVE EVERY")
    print_table(headings, rows, right=headings[1:])
    print_line()
    best = min(forecasts, key=lambda each: each.save)
    print_line(f'Store(…, codec="{best.codec}") saves fastest here{" (the default)" if best.codec == "fast" else ""}.')
    print_line(f"SAVE EVERY: loses the least time if the training fails every {mtbf:g} h, and waits for its saves.")


def _seconds(count: float) -> str:
    if count < 10:
        return f"{count:.2f} s"
    if count < 120:
        return f"{count:.0f} s"
    return f"{count / 60:.0f} min" if count < 7200 else f"{count / 3600:.1f} h"


def _document(
    url: str,
    threads: int,
    state_bytes: int,
    mtbf: float,
    measured: "Measured",
    forecasts: "list[Forecast]",
    intervals: list[float],
) -> dict[str, Any]:
    return {
        "store": url,
        "latency_seconds": measured.latencies,
        "throughput": [
            {"requests": each.requests, "put_bytes_per_second": each.put, "get_bytes_per_second": each.get}
            for each in measured.throughput
        ],
        "threads": threads,
        "hash_bytes_per_second": measured.hashing,
        "codecs": [
            {
                "codec": each.codec,
                "encode_bytes_per_second": each.encode,
                "decode_bytes_per_second": each.decode,
                "stored_share": each.share,
            }
            for each in measured.processing
        ],
        "state_bytes": state_bytes,
        "mtbf_hours": mtbf,
        "forecasts": [
            {
                "codec": each.codec,
                "save_seconds": each.save,
                "restore_seconds": each.restore,
                "stored_bytes": each.stored_bytes,
                "save_every_seconds": interval,
            }
            for each, interval in zip(forecasts, intervals, strict=True)
        ],
    }
