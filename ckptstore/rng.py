"""The state of the random number generators, as a leaf of a checkpoint."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ckptstore.errors import InvalidInputError

__all__ = ["RngState"]


class RngState:
    """Python's, NumPy's and torch's random generators, saved and restored like a module.

        run.save({"model": model, "rng": ckptstore.RngState()}, step=step)
        run.restore({"model": model, "rng": ckptstore.RngState()})

    Holds no state itself: `state_dict` reads the generators of this process, `load_state_dict` sets them. Those of CUDA
    are included for each device, once CUDA is in use.

    Args:
        generators: further ones by name, each a `torch.Generator` or a `numpy.random.Generator`, such as the one that
            a DataLoader was given: `RngState(loader=generator)`.

    Raises:
        InvalidInputError: one of `generators` is neither.
    """

    def __init__(self, **generators: "torch.Generator | np.random.Generator") -> None:
        for name, generator in generators.items():
            given: Any = generator
            if not isinstance(given, torch.Generator | np.random.Generator):
                raise InvalidInputError(
                    f"RngState({name}=…) takes a torch.Generator or numpy.random.Generator, not {type(given).__name__}."
                )
        self._generators = generators

    def __repr__(self) -> str:
        names = ", ".join(f"{name}=…" for name in self._generators)
        return f"RngState({names})"

    def state_dict(self) -> dict[str, Any]:
        """The generators' states: dicts, arrays and tensors."""
        version, words, gauss = random.getstate()
        numpy_state: Any = np.random.get_state(legacy=False)
        state = {
            "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
            "numpy": {
                "bit_generator": numpy_state["bit_generator"],
                "state": {name: _array(value) for name, value in numpy_state["state"].items()},
                "has_gauss": int(numpy_state["has_gauss"]),
                "gauss": float(numpy_state["gauss"]),
            },
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state_all()
        if self._generators:
            state["generators"] = {name: _get(generator) for name, generator in self._generators.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the generators.

        Raises:
            InvalidInputError: `state` lacks one of the named generators, or has it of another kind.
        """
        saved = state.get("generators", {})
        missing = [name for name in self._generators if name not in saved]
        if missing:
            raise InvalidInputError(f"no state was saved of the generators {', '.join(missing)}.")
        python = state["python"]
        random.setstate((python["version"], tuple(int(word) for word in python["words"]), python["gauss"]))
        np.random.set_state(dict(state["numpy"]))
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            # With fewer devices than before, those that there are.
            for device, value in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
                torch.cuda.set_rng_state(value.cpu(), device)
        for name, generator in self._generators.items():
            _set(name, generator, saved[name])


def _array(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else int(value)


def _get(generator: "torch.Generator | np.random.Generator") -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return dict(generator.bit_generator.state)


def _set(name: str, generator: "torch.Generator | np.random.Generator", state: Any) -> None:
    if isinstance(generator, torch.Generator):
        if not isinstance(state, torch.Tensor):
            raise InvalidInputError(f"the generator {name!r} is torch's, and NumPy's was saved under that name.")
        generator.set_state(state.cpu())
        return
    kind = type(generator.bit_generator).__name__
    if not isinstance(state, Mapping) or state.get("bit_generator") != kind:
        raise InvalidInputError(
            f"the generator {name!r} is NumPy's {kind}, and another kind was saved under that name."
        )
    generator.bit_generator.state = dict(state)
