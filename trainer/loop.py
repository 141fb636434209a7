"""Train, evaluate, generate. All that has to do with saving is `Store(…).run(…)`, `run.restore` and `run.save`."""

import json
import os
import random
import time
from contextlib import ExitStack
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import ckptstore
from trainer.config import ConfigError, Options, SaveSchedule
from trainer.data import Batches, Corpus, load_corpus, tokenize
from trainer.model import LanguageModel
from trainer.progress import TrainingProgress, perplexity_text, size_text, watched
from trainer.team import JointSave, Team, joined

KEPT = ("vocab_size", "embed_size", "hidden_size", "batch_size", "bptt", "lr", "clip", "dropout", "seed")
"""The options that a run keeps from its first step to its last: with others it would be another training."""


def train(options: Options) -> None:
    """Train, alone or as one of the processes that torchrun has started."""
    with joined(options, prepare(options)) as team:
        train_in(team, options)


def train_in(team: Team, options: Options) -> None:
    device = team.device
    # This trainer draws from torch's generator only; the others are seeded as they are saved with it.
    random.seed(options.seed)
    numpy.random.seed(options.seed % 2**32)
    torch.manual_seed(options.seed)
    corpus = load_corpus(options.text, options.vocab_size)
    batches = Batches(corpus.train, options.batch_size, options.bptt)
    settings = {name: getattr(options, name) for name in KEPT}
    settings |= {"text": corpus.digest, "threads": torch.get_num_threads()}
    if team.size > 1:
        settings["processes"] = team.size

    model = build_model(settings).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    hidden = model.initial_state(options.batch_size // team.size)
    replica = team.wrapped(model)
    team.seed(options.seed)
    step, last_step = 0, options.epochs * len(batches)
    last_step = min(last_step, options.steps or last_step)

    run = open_run(options)
    began = time.perf_counter()
    try:
        # What the tree holds is filled in place; numbers come back in `checkpoint.state`.
        filled = {"model": model, "optimizer": optimizer}
        if team.size == 1:
            filled |= {"rng": ckptstore.RngState(), "hidden": list(hidden)}
        checkpoint = run.restore(filled, group=team.group)
    except ckptstore.InvalidInputError as error:
        compare_settings(run.load(only="settings"), settings, options.run)  # names the option, if that is it
        raise ConfigError(
            f"The checkpoints of run {options.run!r} do not fit this model, optimizer or batch size. Go on with the "
            f"options that the run was started with, or name another --run. {error}"
        ) from error
    notes = [f"no checkpoint in {options.store} of run {options.run}: starting anew"]
    if checkpoint:
        size, seconds = size_text(checkpoint.raw_bytes), time.perf_counter() - began
        step = checkpoint.state["step"]
        notes = [f"resumed from step {step} (verified, {size} in {seconds:.1f} s)"]
        notes += compare_settings(checkpoint.state["settings"], settings, options.run)
        saved_by = checkpoint.state["settings"].get("processes", 1)
        if team.size > 1:
            hidden = team.restore_hidden(run, step)
            notes += team.restore_rng(run, step, saved_by, options.seed)
        elif saved_by > 1:
            notes.append(f"it was saved by {saved_by} processes, now 1: the last bits may differ")
    if step >= last_step:
        notes.append(f"nothing to do: step {step} of {last_step} is done")

    schedule = SaveSchedule(options, steps_per_epoch=len(batches), start=step)
    with ExitStack() as stack:
        log = stack.enter_context(options.log.open("a", encoding="utf-8")) if options.log and team.is_first else None
        words_per_step = options.batch_size * options.bptt
        progress = stack.enter_context(
            TrainingProgress(step, last_step, words_per_step, options.print_every, quiet=not team.is_first)
        )
        progress.note(*notes)
        saver = Saver(run, schedule, progress, team, options)

        while step < last_step:
            epoch, position = divmod(step, len(batches))
            if position == 0:
                hidden = model.initial_state(options.batch_size // team.size)
            words, targets = (team.rows(part).to(device) for part in batches[position])
            model.train()
            # Detached, the gradient ends where the batch began: truncated backpropagation through time.
            logits, hidden = replica(words, (hidden[0].detach(), hidden[1].detach()))
            loss = cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            step += 1

            metrics = {"loss": team.mean(loss)}
            if log:
                log.write(json.dumps({"step": step, **metrics}) + "\n")
                log.flush()
            progress.step(step, metrics["loss"])
            if step % len(batches) == 0 and team.is_first:
                metrics["validation_loss"] = validated = validation_loss(model, corpus)
                progress.note(f"epoch {epoch + 1}: validation loss {validated:.4f}, {perplexity_text(validated)}")
            due = schedule.due(step)
            if schedule.goes_by_clock:
                due = team.first_decides(due)
            if due or step == last_step:
                state = {
                    "model": model,
                    "optimizer": optimizer,
                    "rng": ckptstore.RngState(),
                    "hidden": [hidden[0].detach(), hidden[1].detach()],
                    "step": step,
                    "epoch": step // len(batches),
                    "position": step % len(batches),
                    "settings": settings,
                }
                saver.save(state, step, metrics)
            saver.poll()
        saver.finish()


class Saver:
    """Saves, in the background if asked to; a save that fails ends the training, it never passes in silence."""

    def __init__(
        self, run: ckptstore.Run, schedule: SaveSchedule, progress: TrainingProgress, team: Team, options: Options
    ) -> None:
        self._run = run
        self._schedule = schedule
        self._progress = progress
        self._team = team
        self._options = options
        self._pending: ckptstore.PendingSave | JointSave | None = None
        self._began = 0.0

    def save(self, state: dict[str, Any], step: int, metrics: dict[str, float]) -> None:
        stalled_at = time.perf_counter()
        self.finish()  # the save before this one, should it still be under way
        self._began = time.perf_counter()
        if self._team.size > 1:
            self._pending = self._team.save(self._run, self._options, state, step=step, metrics=metrics)
        elif self._options.save_async:
            self._pending = self._run.save_async(state, step=step, metrics=metrics, overlap=state["optimizer"])
        else:
            self._report(self._run.save(state, step=step, metrics=metrics))
        self._schedule.saved(stall_seconds=time.perf_counter() - stalled_at)

    def poll(self) -> None:
        """Report the save in the background, or raise its error, if it has ended."""
        if self._pending and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in the background."""
        if self._pending:
            pending, self._pending = self._pending, None
            self._report(pending.result())

    def _report(self, saved: ckptstore.Checkpoint | None) -> None:
        if saved is None:
            return  # the first process has committed it, and tells
        seconds = time.perf_counter() - self._began
        self._progress.saved(saved.step, saved.metrics["loss"], saved.raw_bytes, saved.new_bytes, seconds)


def evaluate(options: Options) -> None:
    model, corpus, step = load_model(options)
    loss = validation_loss(model, corpus, show=True)
    print(f"step {step}: validation loss {loss:.4f}, {perplexity_text(loss)}")


def generate(options: Options) -> None:
    model, corpus, _ = load_model(options)
    generator = torch.Generator().manual_seed(options.seed)
    words = corpus.vocabulary.encode(tokenize(options.prompt))
    if not words:
        raise ConfigError(f"--prompt has no word in it: {options.prompt!r}.")
    fresh, hidden = words, model.initial_state(1)
    model.eval()
    with torch.inference_mode():
        for _ in range(options.words):
            logits, hidden = model(torch.tensor([fresh], device=options.device), hidden)
            # Number 0 is <unk>; a short text leaves numbers without a word at the end.
            scores = logits[0, -1, 1 : len(corpus.vocabulary)].cpu()
            if options.temperature == 0:
                choice = scores.argmax()
            else:
                choice = torch.multinomial((scores / options.temperature).softmax(0), 1, generator=generator)
            fresh = [1 + int(choice)]
            words += fresh
    print(corpus.vocabulary.decode(words))


def validation_loss(model: LanguageModel, corpus: Corpus, *, show: bool = False) -> float:
    """Return the mean loss a word on the validation text; draws no random numbers."""
    bptt = min(35, len(corpus.validation) - 1)
    batch_size = min(20, (len(corpus.validation) - 1) // bptt)
    batches = Batches(corpus.validation, batch_size, bptt)
    hidden = model.initial_state(batch_size)
    total = 0.0
    model.eval()
    with torch.inference_mode():
        for words, targets in watched(batches, len(batches), "evaluating") if show else batches:
            logits, hidden = model(words.to(hidden[0].device), hidden)
            total += cross_entropy(logits, targets.to(logits.device)).item()
    return total / len(batches)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def open_run(options: Options) -> ckptstore.Run:
    return ckptstore.Store(options.store, options.storage_options).run(options.run)


def load_model(options: Options) -> tuple[LanguageModel, Corpus, int]:
    """Return the model of the checkpoint asked for, the text it was trained on, and its step."""
    device = prepare(options)
    run = open_run(options)
    step = run.load(options.step, only="step")
    settings = run.load(step, only="settings")
    corpus = load_corpus(options.text, settings["vocab_size"])
    if corpus.digest != settings["text"]:
        raise ConfigError(f"Run {options.run!r} was trained on another text: give the same files as --text.")
    model = build_model(settings)
    model.load_state_dict(run.load(step, only="model"))
    return model.to(device), corpus, step


def build_model(settings: dict[str, Any]) -> LanguageModel:
    sizes = (settings[name] for name in ("vocab_size", "embed_size", "hidden_size"))
    return LanguageModel(*sizes, dropout=settings["dropout"])


def prepare(options: Options) -> torch.device:
    """Set torch up so that the same numbers go through the same kernels in the same order."""
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
        if device.type != "cpu":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {options.device} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def compare_settings(saved: dict[str, Any], given: dict[str, Any], run: str) -> list[str]:
    """Raise ConfigError if a run would go on as another one; return notes of what matters less."""
    changed = [
        name for name in given if name not in ("threads", "text", "processes") and saved.get(name) != given[name]
    ]
    texts = [f"--{name.replace('_', '-')} was {saved.get(name)}, now {given[name]}" for name in changed]
    if saved["text"] != given["text"]:
        texts.append("--text is another text now")
    if texts:
        raise ConfigError(
            f"Run {run!r} was started with other options: {'; '.join(texts)}. "
            "Go on with the same, or name another --run."
        )
    if saved["threads"] != given["threads"]:
        return [f"it was saved with {saved['threads']} threads, now {given['threads']}: the last bits may differ"]
    return []
