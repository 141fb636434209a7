"""`report` and `ui`: a store as a page to look at."""

import atexit
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ckptstore import retention
from ckptstore.cli import options
from ckptstore.cli.printing import bytes_text, counted, print_json, print_line, printable, progress_bar
from ckptstore.cli.target import Target, parse_options, resolve
from ckptstore.errors import InvalidInputError
from ckptstore.pipeline import worker_threads
from ckptstore.whole_files import check_destination, write_whole

__all__ = ["add_to"]

KEEP_LAST = 10
"""What a prune is planned with, if nothing else is said."""

KeepLast = Annotated[
    int | None,
    typer.Option(
        "--keep-last", metavar="N", min=1, help="Show what a prune would keep: the N newest.", show_default="10"
    ),
]
KeepEvery = Annotated[
    int | None,
    typer.Option(
        "--keep-every", metavar="STEPS", min=1, help="... the first in every so many steps.", show_default=False
    ),
]
KeepWithin = Annotated[
    str | None,
    typer.Option("--keep-within", metavar="TIME", help="... those of the last 12h, 7d, 2w.", show_default=False),
]
KeepBest = Annotated[
    list[str] | None,
    typer.Option("--keep-best", metavar="METRIC[:max]", help="... that with the best value.", show_default=False),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "report",
        epilog=options.examples(
            "ckptstore report ./ckpts -o report.html",
            "ckptstore report s3://bucket/ckpts/lstm -o lstm.html --drift",
            "ckptstore report ./ckpts --keep-last 3 --keep-best loss",
        ),
    )(report)
    app.command("ui", epilog=options.examples("ckptstore ui ./ckpts", "ckptstore ui s3://bucket/ckpts --port 8080"))(ui)


def report(
    target: options.OptionalTarget = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write (- for standard output)."),
    ] = Path("report.html"),
    drift: Annotated[
        bool, typer.Option("--drift", help="Read the chunks that changed, to show how far each tensor moved.")
    ] = False,
    keep_last: KeepLast = None,
    keep_every: KeepEvery = None,
    keep_within: KeepWithin = None,
    keep_best: KeepBest = None,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Write a store, or a run, as one page to look at in a browser.

    The page needs no network and no server. It shows the runs with what they cost and share; of a run the metrics, the
    bytes, which tensors changed, and what a prune would keep. From manifests alone, unless --drift is given.
    """
    from ckptstore import report as reports

    place = resolve(target, parse_options(storage_options))
    place.refuse_step("report shows")
    to_stdout = str(output) == "-"
    if to_stdout and as_json:
        raise InvalidInputError("the page and the JSON document cannot both go to standard output.")
    if not to_stdout:
        check_destination(output, overwrite=True)
    rules, text = _rules(keep_last, keep_every, keep_within, keep_best)
    with progress_bar("comparing", shown=drift and not as_json, of_bytes=False) as progress:
        facts = reports.make(
            place.objects, place.run, rules, text, drift=drift, threads=worker_threads(), progress=progress
        )
    content = reports.render(facts, whole=place.run is None).encode()
    if to_stdout:
        sys.stdout.write(content.decode())
        return 0
    write_whole(output, lambda temporary: temporary.write_bytes(content), overwrite=True)
    checkpoints = sum(len(run.checkpoints) for run in facts.runs)
    if as_json:
        print_json(
            {
                "store": place.objects.url,
                "run": place.run,
                "file": str(output),
                "file_bytes": len(content),
                "runs": len(facts.runs),
                "checkpoints": checkpoints,
            }
        )
    else:
        what = f"{counted(len(facts.runs), 'run')}, {counted(checkpoints, 'checkpoint')}"
        print_line(f"wrote {printable(output)}: {what}, {bytes_text(len(content))}")
    return 0


def ui(
    target: options.OptionalTarget = None,
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 is any that is free.")] = 0,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
    keep_last: KeepLast = None,
    keep_every: KeepEvery = None,
    keep_within: KeepWithin = None,
    keep_best: KeepBest = None,
    storage_options: options.StorageOptions = None,
) -> int:
    """Show the report as a live page, which follows what is saved. For this machine alone; Ctrl-C ends it.

    It listens on 127.0.0.1, below an address that nobody can guess. On another machine, forward the port: ssh -L
    8080:localhost:8080 HOST ckptstore ui STORE --port 8080 --no-open.
    """
    from ckptstore import report as reports
    from ckptstore.report.serving import LiveReport

    place = resolve(target, parse_options(storage_options))
    place.refuse_step("ui shows")
    rules, text = _rules(keep_last, keep_every, keep_within, keep_best)

    def page(state: str) -> str:
        facts = reports.make(place.objects, place.run, rules, text)
        return reports.render(facts, whole=place.run is None, live=state)

    try:
        live = LiveReport(place.objects, page, port=port)
    except OSError as error:
        raise InvalidInputError(f"port {port} cannot be listened on: {error.strerror}. Give another --port.") from error
    with contextlib.closing(live):
        live.prepare()  # what fails is told here
        _serve(place, live.url, open_browser=open_browser)
        with contextlib.suppress(KeyboardInterrupt):  # how it is to be ended
            live.run()
    return 0


def _serve(place: Target, url: str, *, open_browser: bool) -> None:
    print_line(f"{printable(place.objects.url)} is shown at {url} (Ctrl-C ends it)")
    sys.stdout.flush()
    if open_browser:
        _open(url)


def _open(url: str) -> None:
    """Send the browser there by a page that only we can read: other users of the machine see command lines."""
    import webbrowser

    with tempfile.NamedTemporaryFile("w", prefix="ckptstore-", suffix=".html", delete=False) as page:
        page.write(f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={url}"><title>ckptstore</title>')
    atexit.register(Path(page.name).unlink, missing_ok=True)
    webbrowser.open(Path(page.name).as_uri())


def _rules(
    last: int | None, every: int | None, within: str | None, best: list[str] | None
) -> tuple[retention.Rules, str]:
    """The rules, and what a user would type for them."""
    if last is None and every is None and within is None and not best:
        last = KEEP_LAST
    rules = retention.rules(
        keep_last=last, keep_every=every, keep_within=within, keep_best=best or None, keep_tags=None
    )
    words = [
        *([f"--keep-last {last}"] if last is not None else []),
        *([f"--keep-every {every}"] if every is not None else []),
        *([f"--keep-within {within}"] if within is not None else []),
        *(f"--keep-best {each}" for each in best or ()),
    ]
    return rules, " ".join(words)
