"""Every model of the list keeps its contract: retrieval models rank the catalogue, click models answer questions."""

import inspect

import numpy as np
import pytest
import torch

from l2rec.data.batches import Clicks, Targets, Windows
from l2rec.data.splits import leave_last_fraction, leave_last_out, new_users
from l2rec.data.synthetic import SyntheticWorld, make_world
from l2rec.hisam.modalities import make_modalities
from l2rec.hisam.tokenizer import SemanticIds
from l2rec.hisam.transformer import ItemSide
from l2rec.mail.features import Questions, make_features
from l2rec.training.contracts import Click, Retrieval, build
from l2rec.training.models import MODELS, model_class, model_path
from worlds import CLICK, READERS, RETRIEVAL, random_dataset, random_texts

models = pytest.mark.parametrize("name", RETRIEVAL + READERS)
clicks = pytest.mark.parametrize("name", CLICK)
SMALL = dict(sasrec=dict(width=16, max_length=5), gsasrec=dict(width=16, max_length=5, negatives=7))
SMALL["sasrec-binary"] = SMALL["sasrec"]
SMALL["unisrec"] = SMALL["learn"] = dict(width=16, hidden=None, max_length=5)
SMALL["hllm"] = dict(SMALL["unisrec"], blocks=1, item_tokens=6)
SMALL["l2rec"] = SMALL["lora"] = dict(blocks=1, max_tokens=16, item_tokens=4, max_length=5, ids=True)


@pytest.fixture(scope="module")
def split():
    return new_users(leave_last_out(random_dataset(n_users=40, seed=1)), .2)


def make(name, split, seed=0):
    return build(model_class(name), split, seed, **SMALL.get(name, {}), **(dict(items=random_texts(split)) if name in READERS else {})).eval()


def weights(model): return {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


@models
def test_shapes_and_finite_values(name, split):
    model, units = make(name, split), Targets(split, "test", 5)
    for size in (1, 7, len(units)):                       # the last users have no history
        for indices in (np.arange(size), np.arange(len(units) - size, len(units))):
            batch = units[indices]
            user, items, scores = model.encode(batch), model.catalogue(), model.scores(batch)
            assert user.shape == (size, items.shape[1]) and items.shape[0] == split.n_items and scores.shape == (size, split.n_items)
            assert user.isfinite().all() and items.isfinite().all() and scores.isfinite().all() and scores.is_floating_point()
            torch.testing.assert_close(user @ items.T, scores, rtol=1e-4, atol=1e-5)


@models
def test_half_precision_ends_before_the_scores(name, split):
    "Users and items may come out of bfloat16 layers; their product is float32, so that a catalogue does not fall into a few hundred scores."
    model, batch = make(name, split), Targets(split, "test", 5)[np.arange(9)]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(): user, items, scores = model.encode(batch), model.catalogue(), model.scores(batch)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, (user.double() @ items.double().T).float(), rtol=1e-4, atol=1e-5)
    if name in READERS: torch.testing.assert_close(items.double().norm(dim=1), torch.ones(len(items), dtype=torch.float64), rtol=0, atol=1e-6)


@models
def test_a_user_scores_alone_as_in_company(name, split):
    model, units = make(name, split), Targets(split, "test", 5)
    together = model.scores(units[np.arange(len(units))])
    alone = torch.cat([model.scores(units[np.array([i])]) for i in range(len(units))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@models
def test_nothing_is_known_about_a_user_without_history(name, split):
    model, units = make(name, split), Targets(split, "test", 5)
    new = np.flatnonzero(units.size == 0)
    scores = model.scores(units[new])
    assert len(new) > 1
    torch.testing.assert_close(scores, scores[:1].expand_as(scores))     # rows of one matrix product may differ in the last digit
    if name not in ("popularity", "l2rec", "lora"):       # L2Rec reads an empty text, the same for everybody
        assert (scores == 0).all()


@models
def test_a_loss_that_gradients_can_follow_or_none(name, split):
    model, batch = make(name, split), Windows(split, 5)[np.arange(9)]
    if not any(p.requires_grad for p in model.parameters()):
        with pytest.raises(NotImplementedError, match=f"{type(model).__name__} is not trained by gradients"):
            model.loss(batch)
        return
    value, parts = model.loss(batch)
    assert value.shape == () and value.isfinite() and parts and all(not p.requires_grad for p in parts.values())
    value.backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert not unused


@models
def test_weights_come_from_the_seed(name, split):
    state = lambda seed: torch.cat([v.float().ravel() for v in weights(make(name, split, seed)).values()])
    assert state(3).equal(state(3))
    assert state(3).equal(state(4)) == (not any(p.requires_grad for p in make(name, split).parameters()))


@models
def test_scoring_does_not_change_the_model(name, split):
    model, units = make(name, split), Targets(split, "test", 5)
    before = {k: v.clone() for k, v in weights(model).items()}
    first = model.scores(units[np.arange(5)])
    model.scores(units[np.arange(9)]).fill_(0)
    assert all(v.equal(before[k]) for k, v in weights(model).items()) and model.scores(units[np.arange(5)]).equal(first)


@pytest.fixture(scope="module")
def asked():
    dataset = make_world(SyntheticWorld(n_users=80)).dataset
    split = new_users(leave_last_fraction(dataset), .4)
    features, codes = make_features(dataset, split), np.random.default_rng(0).integers(0, 8, (split.n_items, 3))
    items = ItemSide(SemanticIds(split.item_id, codes, (8, 8, 8), ("flat_1", "flat_2", "flat_3")), make_modalities(dataset, split, text="", image="image"))
    return split, dict(features=features, items=items, width=16), Questions(split, features, "test")


def answerer(name, asked, seed=0):
    known = inspect.signature(model_class(name).from_split).parameters
    return build(model_class(name), asked[0], seed, **{k: v for k, v in asked[1].items() if k in known})


def test_every_model_keeps_one_contract():
    assert sorted(RETRIEVAL + READERS + CLICK) == sorted(MODELS) and RETRIEVAL and READERS and CLICK


@clicks
def test_click_logits_are_finite_and_a_question_alone_is_answered_as_in_company(name, asked):
    model, questions = answerer(name, asked).eval(), asked[2]
    together = model(questions[np.arange(30)])
    assert together.shape == (30,) and together.isfinite().all()
    alone = torch.cat([model(questions[np.array([i])]) for i in range(30)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@clicks
def test_click_losses_have_gradients_for_every_weight(name, asked):
    model, questions = answerer(name, asked).train(), asked[2]
    value, parts = model.loss(questions[np.arange(len(questions))])
    assert value.shape == () and value.isfinite() and parts
    if any(p.requires_grad for p in model.parameters()):
        value.backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]


@clicks
def test_click_weights_come_from_the_seed(name, asked):
    state = lambda seed: torch.cat([v.float().ravel() for v in answerer(name, asked, seed).state_dict().values()])
    assert state(3).equal(state(3))
    if any(p.requires_grad for p in answerer(name, asked).parameters()): assert not state(3).equal(state(4))


@pytest.mark.parametrize("wrong, near", [("sasrek", "sasrec"), ("item_knn", "item-knn"), ("popular", "popularity")])
def test_a_typo_in_a_name_is_answered_with_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=f"no model is called '{wrong}'; did you mean '{near}'"):
        model_path(wrong)
    with pytest.raises(ValueError, match="There are: popularity, item-knn"):
        model_class("qqqqqq")


def test_build_names_the_parameter_it_does_not_know(split):
    with pytest.raises(ValueError, match="SASRec takes no parameter 'widht'; did you mean 'width'.*It takes: width, max_length"):
        build(model_class("sasrec"), split, widht=3)
    with pytest.raises(ValueError, match="Popularity takes no parameter 'x'.*It takes: none"):
        build(model_class("popularity"), split, x=3)


def test_contracts_name_what_is_missing(split):
    class Empty(Retrieval):
        pass

    class Silent(Click):
        pass

    for call, name in ((lambda: Empty.from_split(split), "Empty.from_split"), (lambda: Empty().encode(None), "Empty.encode"), (lambda: Empty().catalogue(), "Empty.catalogue"),
                       (lambda: Silent.from_split(split), "Silent.from_split"), (lambda: Silent()(None), "Silent.forward")):
        with pytest.raises(NotImplementedError, match=name):
            call()


def test_click_loss_is_binary_cross_entropy(split):
    class Bias(Click):
        def forward(self, batch):
            return batch.candidate.float() / 10 - 1

    batch = Clicks(split)[np.arange(20)]
    value, parts = Bias().loss(batch)
    p = 1 / (1 + np.exp(1 - batch.candidate.double().numpy() / 10))
    label = batch.label.numpy()
    assert value.item() == pytest.approx(-(label * np.log(p) + (1 - label) * np.log(1 - p)).mean(), rel=1e-5) and parts["log_loss"].item() == value.item()
