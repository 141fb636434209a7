"""What an import does, in which order: each source with its run and its step, before anything is written."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckptstore.errors import CheckpointError, InvalidInputError
from ckptstore.format import check_run_name
from ckptstore.migration import sources, steps
from ckptstore.migration.reading import step_inside
from ckptstore.migration.sources import Source
from ckptstore.portable import lightning_files

__all__ = ["Plan", "Planned", "plan"]


@dataclass(frozen=True, slots=True)
class Planned:
    """A source, and the checkpoint that it becomes."""

    source: Source
    run: str
    step: int


@dataclass(slots=True)
class Plan:
    """An import before it begins.

    Attributes:
        checkpoints: in the order of their steps.
        unreadable: the sources whose step cannot be told, as they cannot be read, and why.
        passed_over: what is left alone, each name with the reason.
    """

    checkpoints: list[Planned]
    unreadable: list[tuple[Source, CheckpointError]] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def plan(
    place: Path,
    run: str,
    *,
    step: int | None = None,
    step_from: str | None = None,
    exclude: Sequence[str] = (),
    trust: bool = False,
) -> Plan:
    """Find the checkpoints at `place` and put them in order.

    Raises:
        NotFoundError: there is nothing there.
        InvalidInputError: there is no checkpoint there, or the step of one is not clear; the text says what to pass.
        UnavailableError: it cannot be read.
    """
    check_run_name(run)
    if step is not None:
        return Plan([Planned(sources.only_source(place), run, step)])
    found, passed_over = sources.find(place, exclude)
    _refuse_trainings(found)
    ordering = _Ordering({source.name: source for source in found}, trust)
    return Plan(ordering.assigned(run, ordering.steps(step_from)), ordering.unreadable, passed_over)


@dataclass(slots=True)
class _Ordering:
    by_name: dict[str, Source]
    trust: bool
    unreadable: list[tuple[Source, CheckpointError]] = field(default_factory=list)
    numbered: set[str] = field(default_factory=set)
    """The sources whose names have their step."""

    def steps(self, step_from: str | None) -> dict[str, int]:
        """The step of each source that can be read."""
        if step_from == steps.CONTENT:
            self.numbered = {name for name in self.by_name if re.search("[0-9]", steps.stem(name))}
            return self._required(self._inside(self.by_name))
        if step_from is not None:
            named = steps.step_by_pattern(self.by_name, steps.pattern_of(step_from))
        else:
            named = steps.step_names(list(self.by_name))
        found = {name: each.step for name, each in named.items() if each.step is not None}
        self.numbered = set(found)
        epochs = [name for name, each in named.items() if each.is_epoch]
        if epochs:
            inside = self._inside(epochs)
            # Steps and epochs are not to be mixed: epochs it is, unless all files that can be read know better.
            if inside and None not in inside.values():
                found |= self._required(inside)
                for source, _ in self.unreadable:
                    found.pop(source.name, None)
            else:
                self.unreadable.clear()  # their names do; that they are damaged comes out in their turn
        return found | self._required(self._inside(name for name, each in named.items() if each.step is None))

    def assigned(self, run: str, found: dict[str, int]) -> list[Planned]:
        """Each source with its run: where several are of one step, those without a number get runs of their own."""
        planned: list[Planned] = []
        for step, names in _by_step(found).items():
            numbered = [name for name in names if name in self.numbered]
            if len(numbered) > 1:
                raise InvalidInputError(
                    f"{steps.listed(numbered)} are all step {step}. Leave out those that you do not want "
                    "(--exclude PATTERN; exclude= in Python), import them into runs of their own, or say how steps "
                    "are told (--step-from; step_from= in Python)."
                )
            first = numbered[0] if numbered else min(names)
            for name in names:
                planned.append(Planned(self.by_name[name], run if name == first else _side_run(run, name), step))
        planned.sort(key=lambda each: (each.step, each.run != run, each.source.name))
        _refuse_collisions(planned)
        return planned

    def _inside(self, names: Iterable[str]) -> dict[str, int | None]:
        """The steps that sources tell themselves; those that cannot be read are noted down."""
        found: dict[str, int | None] = {}
        for name in names:
            try:
                found[name] = step_inside(self.by_name[name], trust=self.trust)
            except CheckpointError as error:
                self.unreadable.append((self.by_name[name], error))
        return found

    def _required(self, inside: dict[str, int | None]) -> dict[str, int]:
        silent = [name for name, step in inside.items() if step is None]
        if silent:
            raise InvalidInputError(
                f"{steps.listed(silent)}: neither the name nor what is in it tells which step it is. Leave it out with "
                "--exclude (exclude= in Python), or import it by itself as STORE/RUN@STEP."
            )
        return {name: step for name, step in inside.items() if step is not None}


_OF_A_STEP = re.compile("ckpt|checkpoint|step|iter|epoch|update", re.IGNORECASE)
"""In the names of files that count steps, and not ranks or parts."""


def _refuse_trainings(found: Sequence[Source]) -> None:
    """Raise InvalidInputError if folders hold the steps of a training each, rather than a checkpoint each."""
    for source in found:
        if source.kind != "folder":
            continue
        names = [path.name for path in source.path.iterdir() if path.is_file() and sources.is_state(path)]
        names = [name for name in names if _OF_A_STEP.search(name) and not sources.SHARD.search(name)]
        try:
            told = {each.step for each in steps.step_names(names).values() if each.step is not None}
        except InvalidInputError:
            continue  # several numbers in a name, as shards have them
        if len(told) > 1:
            raise InvalidInputError(
                f"{source.path} holds files of several steps ({steps.listed(names)}), so it is a training and no "
                "checkpoint. Import each such folder into a run of its own; or leave it out with --exclude (exclude= "
                "in Python)."
            )


def _by_step(found: dict[str, int]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, step in found.items():
        names[step].append(name)
    return names


def _side_run(run: str, name: str) -> str:
    side = lightning_files.side_run(run, name)
    if len(run) > lightning_files.MAX_RUN_NAME:
        raise InvalidInputError(
            f"{name!r} is another file of a step, and would go to a run named {run}.…, which is too long: choose a "
            f"name of at most {lightning_files.MAX_RUN_NAME} letters, or leave the file out with --exclude."
        )
    return side


def _refuse_collisions(planned: Sequence[Planned]) -> None:
    seen: dict[tuple[str, int], str] = {}
    for each in planned:
        other = seen.setdefault((each.run, each.step), each.source.name)
        if other != each.source.name:
            raise InvalidInputError(
                f"{steps.listed([other, each.source.name])} would both be {each.run}@{each.step}. Leave one out with "
                "--exclude (exclude= in Python)."
            )
