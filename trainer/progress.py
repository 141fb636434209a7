"""What the user sees: a progress bar on a terminal, plain lines anywhere else. Knows nothing of training."""

import math
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

T = TypeVar("T")


class TrainingProgress:
    def __init__(
        self, first_step: int, last_step: int, words_per_step: int, print_every: int, *, quiet: bool = False
    ) -> None:
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._last_step = last_step
        self._words_per_step = words_per_step
        self._print_every = print_every
        self._new_bytes = 0
        self._counted_step, self._counted_at = first_step, time.perf_counter()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            # The figures go before the picture where there is no room for both.
            bar = [BarColumn(bar_width=20)] if self._console.width >= 100 else []
            columns = (TextColumn("step"), MofNCompleteColumn(), *bar, TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("", total=last_step, completed=first_step)

    def __enter__(self) -> "TrainingProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, *lines: str) -> None:
        """Print lines, above the bar if there is one."""
        for line in lines:
            self._console.print(line, markup=False)

    def step(self, step: int, loss: float) -> None:
        """Show a finished step: in the bar twice a second, or every `print_every`-th in a line."""
        seconds = time.perf_counter() - self._counted_at
        if step != self._last_step and (seconds < 0.5 if self._bar else step % self._print_every):
            return
        words_per_second = (step - self._counted_step) * self._words_per_step / seconds
        self._counted_step, self._counted_at = step, time.perf_counter()
        speed = f"{words_per_second:,.0f} words/s"
        if self._bar:
            figures = f"loss {loss:.3f} ppl {math.exp(min(loss, 99)):,.1f} {speed} stored {size_text(self._new_bytes)}"
            self._bar.update(self._task, completed=step, description=figures)
        else:
            self.note(f"step {step}/{self._last_step}  loss {loss:.3f}  {perplexity_text(loss)}  {speed}")

    def saved(self, step: int, loss: float, raw_bytes: int, new_bytes: int, seconds: float) -> None:
        self._new_bytes += new_bytes
        new = (
            f"{size_text(raw_bytes)}, {size_text(new_bytes)} to write"
            if new_bytes
            else f"{size_text(raw_bytes)}, none new"
        )
        self.note(f"saved step {step} (loss {loss:.3f}): {new}, in {seconds:.2f} s")


def watched(items: Iterable[T], count: int, what: str) -> Iterable[T]:
    """Go through `items` with a bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    return track(items, what, total=count, console=console, transient=True, disable=not console.is_terminal)


def size_text(size_bytes: float) -> str:
    """Write 1234567 as 1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size_bytes < 999.5 or unit == "GB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.{1 if size_bytes < 9.95 and unit != 'bytes' else 0}f} {unit}"


def perplexity_text(loss: float) -> str:
    """The perplexity: among how many equally likely words a model of this loss would choose."""
    return f"perplexity {math.exp(loss):,.1f}" if loss < 100 else "perplexity above 1e43"
