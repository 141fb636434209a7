"""What the command line can say, checked: the options, and when to save. No torch, no ckptstore."""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 10
"""`--save-every auto` saves first after this many steps, to learn what a save costs."""


class ConfigError(Exception):
    """The options do not fit each other, the text, or the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command was given; each command looks only at its own and the first ones."""

    store: str = "./ckpts"
    storage_options: dict[str, Any] | None = None
    run: str = "lstm-bible"
    text: Sequence[Path] = ()
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    # train
    save_every: str = "200"
    mtbf: float = 24.0
    save_async: bool = False
    epochs: int = 100
    steps: int | None = None
    batch_size: int = 20
    bptt: int = 35
    lr: float = 0.001
    clip: float = 1.0
    dropout: float = 0.0
    vocab_size: int = 10_000
    embed_size: int = 300
    hidden_size: int = 500
    log: Path | None = None
    print_every: int = 50
    # evaluate, generate
    step: int | None = None
    prompt: str = "In the beginning"
    words: int = 40
    temperature: float = 0.8

    def __post_init__(self) -> None:
        above_zero = (
            "threads mtbf epochs steps batch_size bptt lr clip vocab_size embed_size hidden_size print_every words"
        )
        for name in above_zero.split():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {value}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout must be at least 0 and below 1, not {self.dropout}.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature must be at least 0, not {self.temperature}.")
        steps_between_saves(self.save_every, steps_per_epoch=1)


def parse_options(arguments: Sequence[str] | None = None) -> tuple[str, Options]:
    """Read the command line: the command, and what it was given."""
    shared = argparse.ArgumentParser(add_help=False)
    store = os.environ.get("CKPTSTORE_URL") or Options.store
    shared.add_argument(
        "--store", metavar="URL", default=store, help="path or URL; the variable CKPTSTORE_URL gives the default"
    )
    shared.add_argument("--storage-options", metavar="JSON", type=json_object, help="options of the store's backend")
    shared.add_argument("--run", metavar="NAME", default=Options.run, help="name of the run")
    shared.add_argument("--text", metavar="FILE", nargs="+", type=Path, default=(), help="text files, not the Bible")
    shared.add_argument("--device", default=Options.device, help="such as cuda")
    shared.add_argument("--threads", metavar="N", type=int, help="threads of torch, if not as many as it likes")
    shared.add_argument("--seed", metavar="N", type=int, default=Options.seed, help="of every random generator")

    parser = argparse.ArgumentParser(prog="python -m trainer", description="An LSTM language model.")
    commands = parser.add_subparsers(dest="command", required=True)
    looks: dict[str, Any] = {"parents": [shared], "formatter_class": _Help}
    train = commands.add_parser("train", help="train, from the newest checkpoint if there is one", **looks)
    evaluate = commands.add_parser("evaluate", help="print loss and perplexity on the validation text", **looks)
    generate = commands.add_parser("generate", help="let the model write on", **looks)

    add = train.add_argument
    add("--save-every", metavar="WHEN", default=Options.save_every, help="steps (200), epochs (10ep) or auto")
    add("--mtbf", metavar="HOURS", type=float, default=Options.mtbf, help="mean time between failures, for auto")
    add("--async", dest="save_async", action="store_true", help="train on while a save is written")
    add("--epochs", metavar="N", type=int, default=Options.epochs, help="times through the text, in all")
    add("--steps", metavar="N", type=int, help="stop after so many steps in all, if that is sooner")
    add("--batch-size", metavar="N", type=int, default=Options.batch_size, help="rows of text read side by side")
    add("--bptt", metavar="N", type=int, default=Options.bptt, help="words of each row in a batch")
    add("--lr", metavar="X", type=float, default=Options.lr, help="Adam's learning rate")
    add("--clip", metavar="X", type=float, default=Options.clip, help="greatest norm of the gradient")
    add("--dropout", metavar="X", type=float, default=Options.dropout, help="part of the activations set to zero")
    sizes = {
        "vocab_size": "words that the model knows",
        "embed_size": "of a word's vector",
        "hidden_size": "of the LSTM",
    }
    for name, text in sizes.items():
        add(f"--{name.replace('_', '-')}", metavar="N", type=int, default=getattr(Options, name), help=text)
    add("--log", metavar="FILE", type=Path, help="append each step's number and loss, a line of JSON each")
    add("--print-every", metavar="N", type=int, default=Options.print_every, help="steps a line, without a terminal")

    for command in (evaluate, generate):
        command.add_argument("--step", metavar="N", type=int, help="of the checkpoint, if not the newest")
    add = generate.add_argument
    add("--prompt", metavar="TEXT", default=Options.prompt, help="what the text begins with")
    add("--words", metavar="N", type=int, default=Options.words, help="how many to write")
    add("--temperature", metavar="X", type=float, default=Options.temperature, help="0 takes the likeliest word")

    given = vars(parser.parse_args(arguments))
    return given.pop("command"), Options(**given)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == ()
        return action.help if says_nothing else super()._get_help_string(action)


def json_object(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError(f'--storage-options is a JSON object, such as {{"anon": true}}; not {text!r}.')
    return options


def steps_between_saves(save_every: str, steps_per_epoch: int) -> int | None:
    """Return N for "N", N epochs' steps for "Nep", and None for "auto"."""
    match = re.fullmatch(r"([1-9][0-9]*)(ep)?", save_every)
    if match is None and save_every != "auto":
        raise ConfigError(f"--save-every is a number of steps (200), of epochs (10ep), or auto; not {save_every!r}.")
    return int(match[1]) * (steps_per_epoch if match[2] else 1) if match else None


def young_daly_seconds(save_seconds: float, failure_seconds: float) -> float:
    """Return the interval between saves that loses the least time, √(2 · save cost · mean time between failures):
    more often costs more in saves, more rarely more in work done twice.
    """
    return math.sqrt(2 * save_seconds * failure_seconds)


class SaveSchedule:
    """Says after which steps to save. `auto` goes by the clock, so its steps differ from one time to the next."""

    def __init__(self, options: Options, *, steps_per_epoch: int, start: int) -> None:
        self._steps = steps_between_saves(options.save_every, steps_per_epoch)
        self._failure_seconds = 3600 * options.mtbf
        self._warm_at = start + WARM_UP_STEPS
        self._due_at: float | None = None

    @property
    def goes_by_clock(self) -> bool:
        return self._steps is None

    def due(self, step: int) -> bool:
        if self._steps:
            return step % self._steps == 0
        return step >= self._warm_at if self._due_at is None else time.monotonic() >= self._due_at

    def saved(self, stall_seconds: float) -> None:
        """Take note of how long a save kept the training waiting."""
        self._due_at = time.monotonic() + young_daly_seconds(stall_seconds, self._failure_seconds)
