"""`gc`, `prune` and `tag`: a store kept small."""

from typing import TYPE_CHECKING, Annotated

import typer

from ckptstore import Store
from ckptstore.cli import options
from ckptstore.cli.printing import bytes_text, counted, print_json, print_line, print_table, printable
from ckptstore.cli.target import parse_options, resolve
from ckptstore.errors import InvalidInputError

if TYPE_CHECKING:
    from ckptstore.collecting import CollectReport, WaitingSave
    from ckptstore.pruning import PruneReport

__all__ = ["add_to"]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "gc",
        epilog=options.examples(
            "ckptstore gc ./ckpts --dry-run",
            "ckptstore gc s3://bucket/ckpts --wait",
        ),
    )(gc)
    app.command(
        "prune",
        epilog=options.examples(
            "ckptstore prune ./ckpts/lstm --keep-last 3 --keep-every 1000 --dry-run",
            "ckptstore prune s3://bucket/ckpts --all --keep-within 7d --keep-best loss",
        ),
    )(prune)
    app.command(
        "tag",
        epilog=options.examples(
            "ckptstore tag ./ckpts/lstm@300 release",
            "ckptstore tag ./ckpts/lstm@300 release --remove",
        ),
    )(tag)


def gc(
    target: options.OptionalTarget = None,
    dry_run: DryRun = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for saves that are under way, rather than leave the rest for later.")
    ] = False,
    grace: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="A save without a sign of life for so long is taken for dead.", min=0),
    ] = 600.0,
    alone: Annotated[
        bool,
        typer.Option("--alone", help="No job uses the store now: asked for on network file systems such as NFS."),
    ] = False,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Delete the chunks that no checkpoint needs any more. Other jobs may go on saving meanwhile.

    What is to go is marked first, and deleted when the saves that were under way then have ended. If some have not,
    nothing is deleted now: the next collection goes on with what this one has marked.
    """
    place = resolve(target, parse_options(storage_options))
    if place.run is not None:
        raise InvalidInputError(f"gc collects a whole store, as runs share chunks. Leave out {place.run}.")
    report = Store(place.objects).collect(dry_run=dry_run, wait=wait, grace=grace, alone=alone)
    if as_json:
        print_json(_collected(place.objects.url, report))
    else:
        _print_collected(report)
    return 0


def _collected(store: str, report: "CollectReport") -> dict[str, object]:
    def saves(several: "list[WaitingSave]") -> list[dict[str, object]]:
        names = ("run", "step", "host", "pid", "opened")
        return [{name: getattr(one, name) for name in names} for one in several]

    return {
        "store": store,
        "dry_run": report.dry_run,
        "checkpoints": report.checkpoints,
        "chunks": report.chunks,
        "chunk_bytes": report.chunk_bytes,
        "garbage": report.garbage,
        "garbage_bytes": report.garbage_bytes,
        "deleted": report.deleted,
        "deleted_bytes": report.deleted_bytes,
        "waiting": saves(report.waiting),
        "fenced": saves(report.fenced),
        "replaced": report.replaced,
        "tombstones": report.tombstones,
        "leftovers": report.leftovers,
        "unreadable": report.unreadable,
        "unknown": report.unknown,
    }


def _print_collected(report: "CollectReport") -> None:
    everything = f"{counted(report.chunks, 'chunk')} ({bytes_text(report.chunk_bytes)})"
    garbage = f"{counted(report.garbage, 'chunk')} ({bytes_text(report.garbage_bytes)})"
    print_line(f"{counted(report.checkpoints, 'checkpoint')}; {everything}, of which no checkpoint needs {garbage}")
    would = "would be " if report.dry_run else ""
    for save in report.fenced:
        print_line(f"{would}fenced: {_told(save)}, which gave no sign of life for too long")
    for save in report.waiting:
        print_line(f"under way: {_told(save)}")
    rest = (
        (report.replaced, "manifest", "of checkpoints that were saved again"),
        (report.tombstones, "trace", "of checkpoints that were deleted more than a week ago"),
        (len(report.leftovers), "unfinished file", "of writers that died"),
    )
    for count, thing, what in rest:
        if count:
            print_line(f"{would}removed: {counted(count, thing)} {what}")
    for key in report.unknown:
        print_line(f"unknown: {printable(key)} is none of the store's objects; it was left alone")
    if report.unreadable:
        print_line(f"{counted(report.unreadable, 'condemned list')} cannot be read: see ckptstore verify")
    if report.dry_run:
        print_line("nothing was changed")
    elif report.waiting:
        print_line(
            "nothing was deleted yet: these saves may need what no checkpoint does. Collect again when they have "
            "ended, or --wait."
        )
    else:
        print_line(f"deleted {counted(report.deleted, 'chunk')} ({bytes_text(report.deleted_bytes)})")
        if report.fenced:
            print_line("collect once more to delete what the fenced saves have left")


def _told(save: "WaitingSave") -> str:
    return printable(f"the save of {save.run}@{save.step} by process {save.pid} on {save.host}, since {save.opened}")


def prune(
    target: options.OptionalTarget = None,
    every_run: Annotated[bool, typer.Option("--all", help="Every run of the store, each by itself.")] = False,
    keep_last: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Keep the N newest.", show_default=False)
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Keep the first one in every N steps.", show_default=False),
    ] = None,
    keep_within: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Keep those saved within this time: 12h, 7d, 2w.", show_default=False),
    ] = None,
    keep_best: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC[:min|max]",
            help="Keep the one with the least (or greatest) value of a metric. May be given several times.",
            show_default=False,
        ),
    ] = None,
    keep_tag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TAG",
            help="Keep what has this tag, and nothing else if no other rule is given. What has any tag stays anyway.",
            show_default=False,
        ),
    ] = None,
    dry_run: DryRun = False,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Delete the checkpoints of a run that no rule keeps. Their bytes go with the next ckptstore gc.

    The rules add up. The newest checkpoint, what has a tag, and what is known to be damaged always stay.
    """
    place = resolve(target, parse_options(storage_options))
    place.refuse_step("prune takes")
    if (place.run is None) != every_run:
        raise InvalidInputError(
            "prune takes a run, STORE/RUN, or --all for every run of a store. "
            + ("Leave out one of them." if every_run else f"{place.objects.url} is a whole store.")
        )
    report = Store(place.objects).prune(
        place.run,
        keep_last=keep_last,
        keep_every=keep_every,
        keep_within=keep_within,
        keep_best=keep_best or None,
        keep_tags=keep_tag or None,
        dry_run=dry_run,
    )
    if as_json:
        print_json(_pruned(place.objects.url, report))
    else:
        _print_pruned(report)
    return 0


def _pruned(store: str, report: "PruneReport") -> dict[str, object]:
    return {
        "store": store,
        "dry_run": report.dry_run,
        "kept": [{"run": row.run, "step": row.step, "reasons": list(row.reasons)} for row in report.kept],
        "removed": [{"run": row.run, "step": row.step} for row in report.removed],
        "freed_bytes": report.freed_bytes,
    }


def _print_pruned(report: "PruneReport") -> None:
    goes = "would go" if report.dry_run else "deleted"
    rows = sorted([*report.kept, *report.removed], key=lambda row: (row.run, row.step))
    if rows:
        print_table(
            ("RUN", "STEP", "", "WHY"),
            [
                (row.run, str(row.step), "kept" if row.reasons else goes, ", ".join(row.reasons) or "no rule keeps it")
                for row in rows
            ],
            right=("STEP",),
        )
        print_line()
    print_line(f"{counted(len(report.kept), 'checkpoint')} kept, {len(report.removed)} {goes}")
    if report.removed:
        then = "would free" if report.dry_run else "frees"
        print_line(f"the next ckptstore gc {then} up to {bytes_text(report.freed_bytes)}, less what other runs need")


def tag(
    target: options.Target,
    name: Annotated[str, typer.Argument(metavar="TAG", help="The tag, such as best.", show_default=False)],
    remove: Annotated[bool, typer.Option("--remove", help="Take the tag away.")] = False,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Give a checkpoint a tag, which keeps it from being pruned: STORE/RUN@STEP."""
    place = resolve(target, parse_options(storage_options))
    run = place.require_run()
    if place.step is None:
        raise InvalidInputError(f"{run} is a whole run: name the checkpoint to tag, as in {run}@300.")
    found = Store(place.objects).run(run)
    (found.untag if remove else found.tag)(place.step, name)
    tags = found.tags().get(place.step, ())
    if as_json:
        print_json({"store": place.objects.url, "run": run, "step": place.step, "tags": list(tags)})
    else:
        print_line(f"{run}@{place.step} has {'the tags ' + ', '.join(tags) if tags else 'no tags'}")
    return 0
