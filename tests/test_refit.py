"""A refit trains for as many epochs as it is told to, as `fit` would, and goes on where it was killed."""

import pytest
import torch

from l2rec.data.splits import leave_last_out, with_validation
from l2rec.data.synthetic import SyntheticWorld, make_world
from l2rec.training.models import model_class
from l2rec.training.modules import RetrievalModule, fit, set_up
from l2rec.training.refit import refit


@pytest.fixture(scope="module")
def split(): return leave_last_out(make_world(SyntheticWorld(n_users=120, n_items=120, n_groups=10, max_length=20, mean_length=12)).dataset)


def module(split, seed=0):
    model, data = set_up(model_class("sasrec"), split, seed, {"width": 16, "dropout": .2}, batch_size=32)
    return RetrievalModule(model, data, lr=1e-3, seed=seed), data


def weights(module): return {name: value.clone() for name, value in module.model.state_dict().items()}


def test_it_takes_the_steps_that_fit_takes(split, tmp_path):
    one, data = module(split)
    fit(one, data, max_epochs=3, patience=9, checkpoints=tmp_path, progress=False)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    two, data = module(split)
    done = refit(two, data, 3, progress=False)
    assert done.epochs == 3 and done.best_epoch == 2
    for name, value in weights(two).items(): assert torch.equal(value, last[f"model.{name}"]), name


def test_it_learns_from_validation_items_which_fit_never_sees(split):
    one, data = module(with_validation(split))
    refit(one, data, 2, progress=False)
    two, data = module(split)
    refit(two, data, 2, progress=False)
    assert any(not torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values()))


def test_a_killed_refit_goes_on(split, tmp_path):
    joined = with_validation(split)
    one, data = module(joined)
    straight = refit(one, data, 4, progress=False)
    two, data = module(joined)
    refit(two, data, 2, checkpoints=tmp_path, progress=False)
    three, data = module(joined)
    resumed = refit(three, data, 4, checkpoints=tmp_path, progress=False)
    assert resumed.epochs == straight.epochs == 4 and resumed.history["loss"].to_list() == straight.history["loss"].to_list()
    for name, value in weights(three).items(): assert torch.equal(value, weights(one)[name]), name


def test_no_epochs_are_refused(split):
    one, data = module(split)
    with pytest.raises(ValueError, match="epochs=0"): refit(one, data, 0)
