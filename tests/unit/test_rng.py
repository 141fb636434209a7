"""RngState: what it takes, and what does not fit."""

import random

import numpy as np
import pytest
import torch

import ckptstore


def test_it_says_what_it_holds() -> None:
    assert repr(ckptstore.RngState()) == "RngState()"
    assert repr(ckptstore.RngState(loader=torch.Generator())) == "RngState(loader=…)"


def test_only_generators_can_be_named() -> None:
    with pytest.raises(ckptstore.InvalidInputError, match=r"RngState\(seed=…\) takes a torch.Generator .* not int"):
        ckptstore.RngState(seed=3)  # type: ignore[arg-type]


def test_a_generator_that_was_not_saved_is_told_and_nothing_is_set() -> None:
    state = ckptstore.RngState().state_dict()
    random.seed(1)
    before = random.getstate()
    with pytest.raises(ckptstore.InvalidInputError, match="no state was saved of the generators loader"):
        ckptstore.RngState(loader=torch.Generator()).load_state_dict(state)
    assert random.getstate() == before


def test_a_generator_of_another_kind_is_told() -> None:
    torchs = ckptstore.RngState(g=torch.Generator()).state_dict()
    numpys = ckptstore.RngState(g=np.random.default_rng()).state_dict()
    other = ckptstore.RngState(g=np.random.Generator(np.random.MT19937())).state_dict()
    with pytest.raises(ckptstore.InvalidInputError, match="is torch's, and NumPy's was saved"):
        ckptstore.RngState(g=torch.Generator()).load_state_dict(numpys)
    for state in (torchs, other):
        with pytest.raises(ckptstore.InvalidInputError, match="is NumPy's PCG64, and another kind was saved"):
            ckptstore.RngState(g=np.random.default_rng()).load_state_dict(state)


def test_a_numpy_generator_of_another_bit_generator_goes_on_the_same() -> None:
    generator = np.random.default_rng(1)
    numpy_global = np.random.get_state()
    state = ckptstore.RngState(g=generator).state_dict()
    drawn = generator.random(), np.random.random()
    ckptstore.RngState(g=generator).load_state_dict(state)
    assert (generator.random(), np.random.random()) == drawn
    np.random.set_state(numpy_global)
