"""Co-training: the wall between tower and ranker, batches and splits at the edge, runs that are broken off, and what may not leak into a logit."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from l2rec.data.splits import leave_last_fraction, new_users
from l2rec.data.synthetic import SyntheticWorld, make_world
from l2rec.mail.attention_rankers import DIN, DMR
from l2rec.mail.cotraining import CoTraining, check_finite, set_up_clicks
from l2rec.mail.crossing_rankers import DCNv2, DeepFM
from l2rec.mail.features import Impressions, Questions, make_features
from l2rec.mail.fills import FILLS
from l2rec.mail.rankers import BaseDNN
from l2rec.training.modules import evaluate, fit, validate
from worlds import dataset

pytestmark = pytest.mark.filterwarnings("ignore")
RANKERS = {"basednn": (BaseDNN, {}), "din": (DIN, {"units": 3}), "dmr": (DMR, {"negatives": 9}), "deepfm": (DeepFM, {}), "dcnv2": (DCNv2, {})}
SMALL = dict(width=4, slots=6, hidden=(8, 4))
TOWER = dict(encoder=(8, 6, 6), decoder=(6, 8))
OWN = {"mail-single": TOWER, "mail-dual": TOWER, "mail-base": TOWER, "metaemb": dict(users=4, shots=1), "llae": dict(rank=2, rounds=2)}
ARMS = [name for name in FILLS if name.startswith("mail-")]
SECONDS = ["train_seconds", "validation_seconds"]


@pytest.fixture(scope="module")
def world():
    """150 items, 60 users with four attributes, 24 of the users new."""
    data = make_world(SyntheticWorld(n_users=60, n_items=150, mean_length=10, max_length=16, cold_length=5, n_groups=6)).dataset
    split = new_users(leave_last_fraction(data, .15, .25), .4)
    return split, make_features(data, split, least=2)


def made(world, fill="mail-base", ranker="basednn", seed=0, own=None, batch_size=64, **more):
    """A module in which one epoch is few steps, and its data."""
    cls, of_ranker = RANKERS[ranker]
    net, data = set_up_clicks(*world, cls, fill, seed, {**SMALL, **of_ranker, **more.pop("hyperparameters", {})}, {**OWN.get(fill, {}), **(own or {})}, batch_size=batch_size)
    return CoTraining(net, data, **{"lr": .01, "seed": seed, "every_steps": 1, **more}), data


def run(module, data, epochs=1, folder=None, **how):
    return fit(module, data, max_epochs=epochs, monitor="validation/auc", checkpoints=folder, progress=False, **{"patience": 100, **how})


def state(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def touched(module):
    """Names of the weights that have a gradient which is not zero."""
    return {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


def questions(world, part="train", n=None):
    units = Questions(*world, part, SMALL["slots"])
    return units[np.arange(len(units)) if n is None else np.random.default_rng(0).permutation(len(units))[:n]]


class Chosen(Impressions):
    """Training batches that the test chooses: one a list of unit numbers."""

    chosen = ()

    def train_dataloader(self):
        return DataLoader(Questions(self.split, self.features, "train", self.max_length), sampler=list(self.chosen), batch_size=None)


# --- the wall -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranker", RANKERS)
@pytest.mark.parametrize("fill", ARMS)
def test_gradients_do_not_cross(world, fill, ranker):
    module, _ = made(world, fill, ranker)
    net, batch = module.model, questions(world, n=200)
    net.fill.prepare(net.ranker, net.split, 0)
    e, old = net.ranker.embed(batch), ~net.new(batch)
    assert old.any() and not old.all()
    found = net.fill.loss(e, old, batch.label, net.ranker)                  # not even detached: the tower does that itself
    if fill == "mail-none":
        assert found is None
    else:
        found[0].backward()
        reached = touched(net.fill)
        assert not touched(net.ranker) and any("decode_behaviour" in name for name in reached) and any("encode_attributes" in name for name in reached)
        assert any("encode_behaviour" in name for name in reached) == (fill != "mail-single")
        net.zero_grad()
    value, parts = net.click_loss(net.ranker.embed(batch), batch)
    value.backward()
    assert any(name.startswith("embeddings.item") for name in touched(net.ranker)) and parts["log_loss"] > 0
    assert bool(touched(net.fill)) == (fill == "mail-none")
    assert ("match" in parts) == (ranker == "dmr")


class Watched(CoTraining):
    """Sees that each optimiser moves its own weights and nothing else: no weight, no running mean of the other side."""

    def training_step(self, batch, batch_idx):
        self.before, self.seen = (state(self.model.ranker), state(self.model.fill)), getattr(self, "seen", [])
        super().training_step(batch, batch_idx)

    def _minimise(self, optimizer, value, parts, whose, e):
        super()._minimise(optimizer, value, parts, whose, e)
        ranker, fill = state(self.model.ranker), state(self.model.fill)
        if whose == "click": assert not equal(ranker, self.before[0]) and (equal(fill, self.before[1]) or self.model.fill.trained_by == "clicks")
        else: assert equal(ranker, self.before[0]) and not equal(fill, self.before[1])
        self.before = ranker, fill
        self.seen.append(whose)


@pytest.mark.parametrize("ranker", RANKERS)
@pytest.mark.parametrize("fill", FILLS)
def test_every_ranker_with_every_fill(world, fill, ranker):
    """One training step and one evaluation; no weight moves by the other side's optimiser."""
    module, data = made(world, fill, ranker, batch_size=10_000)
    module.__class__ = Watched
    start = state(module.model)
    done = run(module, data)
    assert module.batches == 1 and done.epochs == 1
    assert module.seen == (["fill's", "click"] if fill.startswith("mail-") and fill != "mail-none" or fill == "metaemb" else ["click"])
    moved = {k for k, v in state(module.model).items() if not torch.equal(v, start[k])}
    assert any(k.startswith("ranker.embeddings") for k in moved) and (fill in ("", "dropoutnet")) == (not any(k.startswith("fill") for k in moved))
    if fill == "mail-none": assert "fill.map.weight" in moved
    found, users = evaluate(module, data)
    assert all(np.isfinite(v) for v in found.values()) and {"test/auc", "test/new/auc", "test/old/auc", "test/new/gauc", "test/new/log_loss"} <= found.keys()
    assert users["new"].sum() == len(set(users["user_id"].to_list()) & set(world[0].user_id[world[0].new_user].tolist())) > 0
    row, = module.steps
    assert row["step"] == 0 and row["log_loss"] > 0 and any(k.startswith("fill/") for k in row) == ("fill's" in module.seen)


def test_each_weight_has_one_optimiser(world):
    for fill in FILLS:
        module, _ = made(world, fill)
        held = [[id(p) for group in o.param_groups for p in group["params"]] for o in module.configure_optimizers()]
        flat = sum(held, [])
        assert len(held) == 1 + (module.model.fill.trained_by == "own") and len(flat) == len(set(flat)), fill
        assert set(flat) == {id(p) for p in module.model.parameters()}, fill


def test_click_loss_by_hand(world):
    """Binary cross-entropy of logits of the filled batch; auxiliary losses are of real behaviour."""
    module, _ = made(world, "mail-base", "dmr", hyperparameters=dict(dropout=0.))
    net, batch = module.model, questions(world, n=80)
    net.train()
    value, parts = net.click_loss(net.ranker.embed(batch), batch)
    e = net.ranker.embed(batch)
    filled = replace(e, behaviour=e.behaviour.clone(), present=e.present.clone())
    for b in range(len(batch)):
        if net.split.new_user[batch.user[b]]:
            filled.behaviour.data[b], filled.present[b] = net.fill.tower.virtual(e.attributes[b:b + 1])[0], True
    z, y = net.ranker.score(filled).detach().double(), batch.label.double()
    expected = -(y * torch.sigmoid(z).log() + (1 - y) * (1 - torch.sigmoid(z)).log()).mean()
    assert float(parts["log_loss"]) == pytest.approx(float(expected), rel=1e-5) and float(value) == pytest.approx(float(sum(parts.values())), rel=1e-6)
    match = []
    monkey = torch.randint
    try:
        torch.randint = lambda high, size, device=None: torch.arange(size[0]) % high          # the same negatives each time
        old = (~net.new(batch)).nonzero().squeeze(1)
        for e in (net.ranker.embed(batch), net.ranker.embed(Questions(*world, "train", SMALL["slots"])[np.random.default_rng(0).permutation(len(Questions(*world, "train")))[:80][old.numpy()]])):
            match.append(float(net.ranker.auxiliary(e)["match"]))
    finally: torch.randint = monkey
    assert match[0] == pytest.approx(match[1], rel=1e-5)                     # new users add nothing to it


@pytest.mark.parametrize("fill", FILLS)
def test_an_auxiliary_loss_may_use_what_score_computed(world, fill, monkeypatch):
    """DMR's match and its slopes are those of an attention over the batch before it was filled, whether it is computed anew or not; DropoutNet's view is another batch."""
    module, data = made(world, fill, "dmr", hyperparameters=dict(dropout=0.), own=dict(p=.5) if fill == "dropoutnet" else None)
    net, batch, calls, found = module.model, questions(world, n=80), [], []
    net.double().train()
    batch.label = batch.label.double()
    net.fill.prepare(net.ranker, net.split, 0)
    attend = type(net.ranker).attend
    monkeypatch.setattr(type(net.ranker), "attend", lambda self, e: calls.append(len(e)) or attend(self, e))
    auxiliary = type(net.ranker).auxiliary
    for way in (auxiliary, lambda self, e, batch: auxiliary(self, replace(e), batch)):          # a copy has no memo
        monkeypatch.setattr(type(net.ranker), "auxiliary", way)
        torch.manual_seed(3)                                                                     # the same negatives
        net.zero_grad()
        value, parts = net.click_loss(net.ranker.embed(batch), batch)
        value.backward()
        found.append((float(parts["match"]), {name: p.grad.clone() for name, p in net.ranker.named_parameters() if p.grad is not None}, len(calls)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12) and found[0][0] > 0
    assert found[0][1].keys() == found[1][1].keys() and all(torch.allclose(g, found[1][1][name], rtol=1e-9, atol=1e-14) for name, g in found[0][1].items())
    assert (found[0][2], found[1][2] - found[0][2]) == ((2, 2) if fill == "dropoutnet" else (1, 2))


# --- batches and splits at the edge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
def test_batches_without_old_and_without_new_users(world, fill):
    module, data = made(world, fill)
    units = Questions(*world, "train", SMALL["slots"])
    new = world[0].new_user[units.user.numpy()]
    data.__class__, data.chosen = Chosen, [np.flatnonzero(new)[:7], np.flatnonzero(~new)[:7], np.flatnonzero(new)[:1], np.flatnonzero(~new & (units.size > 0))[:1]]
    module.__class__, states = Watched, []
    if fill.startswith("mail-") and fill != "mail-none":                     # a tower without old rows takes a step that moves nothing
        module.__class__ = type("Counted", (CoTraining,), {"on_train_batch_end": lambda self, *a: states.append(state(self.model))})
    start = state(module.model)
    run(module, data)
    assert module.batches == 4 and all(np.isfinite(v) for row in module.steps for v in row.values())
    if states:
        tower = lambda s: {k: v for k, v in s.items() if k.startswith("fill")}
        rest = lambda s: {k: v for k, v in s.items() if not k.startswith("fill")}
        steps = [start, *states]
        assert [not equal(tower(a), tower(b)) for a, b in zip(steps, steps[1:])] == [False, True, False, True]
        assert all(not equal(rest(a), rest(b)) for a, b in zip(steps, steps[1:]))


@pytest.mark.parametrize("fill", FILLS)
def test_all_users_new(world, fill):
    split, features = world
    split = replace(split, new_user=np.ones_like(split.new_user), name="all new")
    module, data = made((split, replace(features, new_user=split.new_user)), fill)
    if fill in ("emblr", "llae", "metaemb"):
        with pytest.raises(ValueError, match="no old user has"): run(module, data)
        return
    run(module, data)
    found, users = evaluate(module, data)
    assert found["test/new/auc"] == found["test/auc"] and not any("old/" in k for k in found) and users["new"].all()
    assert users["history_length"].max() == 0 and all(np.isfinite(v) for row in module.steps for v in row.values())


@pytest.mark.parametrize("fill", FILLS)
def test_no_user_new(world, fill):
    split, features = world
    split = replace(split, new_user=np.zeros_like(split.new_user), name="none new")
    module, data = made((split, replace(features, new_user=split.new_user)), fill)
    run(module, data)
    found, users = evaluate(module, data)
    assert found["test/old/auc"] == found["test/auc"] and not any("new/" in k for k in found) and not users["new"].any()


def test_an_old_user_without_history_stays_old(world):
    """Is not filled, does not train the tower, and is measured among the old."""
    split, features = world
    rating = split.rating.copy()
    u = int(np.flatnonzero(~split.new_user)[0])
    rating[split.offsets[u]:split.train_end[u]] = 1.                        # likes nothing before the test
    world = replace(split, rating=rating, name="one likes nothing"), features
    module, data = made(world, "mail-base")
    net, batch = module.model, questions(world)
    net.eval()
    e, old = net.ranker.embed(batch), ~net.new(batch)
    empty = old & ~e.present.any(1)
    assert empty[batch.user == u].all() and (batch.user == u).any()
    assert torch.equal(net(batch)[empty], net.ranker(batch)[empty]) and torch.isfinite(net(batch)).all()
    loss, _ = net.fill.loss(e, old, batch.label, net.ranker)
    less, _ = net.fill.loss(e, old & ~empty, batch.label, net.ranker)
    assert float(loss.detach()) == float(less.detach()) > 0
    assert float(net.fill.loss(e, empty, batch.label, net.ranker)[0]) == 0
    run(module, data)
    _, users = evaluate(module, data)
    assert not users.filter(pl.col("user_id") == int(split.user_id[u]))["new"].any()


@pytest.mark.parametrize("ranker", RANKERS)
@pytest.mark.parametrize("fill", FILLS)
def test_old_users_logits_are_untouched_to_the_bit(world, fill, ranker):
    module, _ = made(world, fill, ranker)
    net, batch = module.model, questions(world, "test")
    net.fill.prepare(net.ranker, net.split, 0)
    with torch.no_grad():
        for p in net.ranker.parameters(): p.add_(.2 * torch.randn_like(p))
    net.eval()
    with torch.no_grad(): filled, plain, new = net(batch), net.ranker(batch), net.new(batch)
    assert torch.equal(filled[~new], plain[~new])
    assert torch.equal(filled[new], plain[new]) == (fill in ("", "dropoutnet"))


# --- values that are not finite, labels of one class ----------------------------------------------------------------------


class Breaks(CoTraining):
    """Breaks a weight before the third batch."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        if self.batches == 2: self.spoil(self.model)


@pytest.mark.parametrize("name, spoil, text", [
    ("mail-base", lambda n: n.ranker.embeddings.attribute.weight.data.fill_(torch.nan), "step 2: the attributes embeddings are not finite, so the fill's loss is nan"),
    ("mail-base", lambda n: n.ranker.embeddings.item.weight.data.fill_(torch.inf), "step 2: the (behaviour|target) embeddings are not finite, so the fill's loss is"),
    ("", lambda n: n.ranker.embeddings.user.weight.data.fill_(torch.nan), "step 2: the user embeddings are not finite, so the click loss is nan"),
    ("mail-single", lambda n: n.fill.tower.decode_attributes.last.bias.data.fill_(torch.nan), "step 2: the term 'attributes' of the fill's loss is nan"),
    ("mail-base", lambda n: n.fill.tower.encode_behaviour.layers[0].bias.data.fill_(torch.nan), "step 2: the term 'behaviour' of the fill's loss is nan"),
    ("mail-none", lambda n: n.fill.map.bias.data.fill_(torch.nan), "step 2: the term 'log_loss' of the click loss is nan"),
    ("metaemb", lambda n: n.fill.dense.weight.data.fill_(torch.nan), "step 2: the term '(cold|warm)' of the fill's loss is nan"),
], ids=["attributes", "items", "users", "decoder", "encoder", "linear", "metaemb"])
def test_what_is_not_finite_stops_with_step_and_name(world, name, spoil, text):
    module, data = made(world, name)
    module.__class__, module.spoil = Breaks, spoil
    with pytest.raises(FloatingPointError, match=text): run(module, data)
    assert module.batches == 2


def test_check_finite_names_the_first_term_alone(world):
    e = made(world)[0].model.ranker.embed(questions(world, n=5))
    check_finite(torch.tensor(1.), {"a": torch.tensor(torch.nan)}, 3, "click", e)                 # the sum decides
    with pytest.raises(FloatingPointError, match=r"step 3: the term 'b' of the click loss is inf .*'a': 1.0"):
        check_finite(torch.tensor(torch.inf), {"a": torch.tensor(1.), "b": torch.tensor(torch.inf)}, 3, "click", e)
    with pytest.raises(FloatingPointError, match="the term 'sum'"):
        check_finite(torch.tensor(torch.inf), {"a": torch.tensor(3e38), "b": torch.tensor(3e38)}, 0, "fill's", e)


def test_one_class_in_the_test(world):
    split, features = world
    user = np.repeat(np.arange(split.n_users), np.diff(split.offsets))
    rating = np.where(np.arange(len(user)) >= split.valid_end[user], 5., split.rating).astype(np.float32)
    module, data = made((replace(split, rating=rating), features))
    run(module, data)                                                        # training and validation know nothing of it
    with pytest.raises(ValueError, match=r"all \d+ labels are 1, .* evaluate on both classes"): evaluate(module, data)
    mixed = np.where(split.new_user[user] & (np.arange(len(user)) >= split.valid_end[user]), 5., split.rating).astype(np.float32)
    module, data = made((replace(split, rating=mixed), features))            # of the new users alone
    found, users = evaluate(module, data)
    assert not any("new/" in k for k in found) and np.isfinite(found["test/old/auc"])
    assert users.filter("new")["auc_influence"].is_nan().all() and users.filter(~pl.col("new"))["auc_influence"].is_finite().all()


def test_bad_parameters(world):
    for wrong, text in ((dict(fill_lr=0), "fill_lr=0"), (dict(lr=-1), "lr=-1"), (dict(weight_decay=-1), "weight_decay=-1")):
        with pytest.raises(ValueError, match=text): made(world, **wrong)
    with pytest.raises(ValueError, match="did you mean 'mail-base'"): made(world, "mailbase")
    with pytest.raises(ValueError, match="did you mean 'dropout'"): made(world, own={"dropoutt": .1})


# --- runs that are broken off, seeds --------------------------------------------------------------------------------------


def finished(world, fill, epochs, folder=None, stop=None, **how):
    module, data = made(world, fill, **how)
    done = run(module, data, stop or epochs, folder)
    return state(module.model), module.steps, done.history.drop(SECONDS), (done.epochs, done.best_epoch)


def same(a, b):
    return equal(a[0], b[0]) and a[1] == b[1] and a[2].equals(b[2]) and a[3] == b[3]


@pytest.mark.parametrize("fill", ["", "mail-none", "mail-base", "emblr", "llae", "dropoutnet", "metaemb"])
def test_resumed_is_never_interrupted(world, tmp_path, fill):
    ranker = "dmr" if fill == "mail-base" else "basednn"
    whole = finished(world, fill, 3, tmp_path / "whole", ranker=ranker)
    finished(world, fill, 3, tmp_path / "parts", stop=1, ranker=ranker)
    parts = finished(world, fill, 3, tmp_path / "parts", ranker=ranker)
    assert same(whole, parts) and len(whole[1]) > 10 and [row["step"] for row in whole[1]] == list(range(len(whole[1])))
    assert pl.DataFrame(parts[1], infer_schema_length=None).equals(pl.DataFrame(whole[1], infer_schema_length=None))     # steps.csv
    assert same(finished(world, fill, 3, tmp_path / "parts", ranker=ranker), whole)                                     # one that has ended does not go on


def test_every_so_many_steps(world, tmp_path):
    every = [finished(world, "mail-base", 2, tmp_path / f"{k}", every_steps=k) for k in (1, 3)]
    assert every[1][1] == every[0][1][::3] and equal(every[0][0], every[1][0])


@pytest.mark.parametrize("first, second", [("mail-base", "emblr"), ("", "dropoutnet"), ("mail-none", "mail-base"), ("mail-single", "mail-dual"), ("mail-dual", "mail-base")])
def test_a_checkpoint_of_another_fill_is_refused(world, tmp_path, first, second):
    finished(world, first, 1, tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match="belongs to another model.*remove the checkpoint"): finished(world, second, 2, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("fill", ["mail-base", "dropoutnet", "metaemb"])
def test_the_seed_decides_everything(world, fill):
    torch.manual_seed(123)
    first = finished(world, fill, 1, ranker="dmr")
    torch.manual_seed(456)
    assert same(finished(world, fill, 1, ranker="dmr"), first)
    other = finished(world, fill, 1, seed=1, ranker="dmr")
    assert not torch.equal(other[0]["ranker.embeddings.item.weight"], first[0]["ranker.embeddings.item.weight"]) and other[1] != first[1]


# --- what is measured -----------------------------------------------------------------------------------------------------


def auc(label, logit):
    pairs = [float(a > b) + .5 * float(a == b) for a in logit[label == 1] for b in logit[label == 0]]
    return sum(pairs) / len(pairs) if pairs else None


def by_hand(user, label, logit):
    found = {"auc": auc(label, logit), "log_loss": float(np.mean([np.log1p(np.exp(-z if y else z)) for y, z in zip(label, logit.astype(float))]))}
    each = [(int((user == u).sum()), auc(label[user == u], logit[user == u])) for u in sorted(set(user.tolist()))]
    both = [(n, a) for n, a in each if a is not None]
    return found | {"gauc": sum(n * a for n, a in both) / sum(n for n, _ in both), "gauc_users": len(both), "gauc_left_out": len(each) - len(both)}


@pytest.mark.parametrize("fill", ["mail-base", "llae"])
def test_metrics_of_new_and_old_users_by_hand(world, fill):
    module, data = made(world, fill, batch_size=37)
    run(module, data)
    for part, (found, loader) in {"validation": (validate(module, data), data.val_dataloader()), "test": (evaluate(module, data)[0], data.test_dataloader())}.items():
        module.model.eval()
        with torch.no_grad(): user, label, logit = (np.concatenate(x) for x in zip(*[(b.user.numpy(), b.label.numpy(), module.model(b).numpy()) for b in loader]))
        new = world[0].new_user[user]
        for prefix, rows in (("", np.ones_like(new)), ("new/", new), ("old/", ~new)):
            for name, value in by_hand(user[rows], label[rows], logit[rows]).items():
                assert found[f"{part}/{prefix}{name}"] == pytest.approx(value, abs=1e-6), (part, prefix, name)


def test_measuring_again_measures_anew(world):
    """A second evaluation is of the weights of now, and of each impression once."""
    module, data = made(world, "mail-base")
    run(module, data)
    first, users = evaluate(module, data)
    again, users_again = evaluate(module, data)
    clock = lambda found: {k: v for k, v in found.items() if not k.startswith("time/")}
    assert clock(first) == clock(again) and users.equals(users_again)
    with torch.no_grad():
        for p in module.model.ranker.parameters(): p.neg_()
    fresh = CoTraining(module.model, data)
    assert clock(evaluate(module, data)[0]) == clock(evaluate(fresh, data)[0])


# --- what a model may know ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
def test_unseen_new_users_ask_nothing_in_training(world, fill):
    split, features = world
    split = replace(split, train_user=~split.new_user, name="unseen")
    module, data = made((split, features), fill)
    seen = set()
    module.__class__ = type("Listens", (CoTraining,), {"on_train_batch_start": lambda self, batch, i: (seen.update(batch.user.tolist()), CoTraining.on_train_batch_start(self, batch, i))[0] and None})
    before = state(module.model)
    run(module, data)
    assert seen and not any(split.new_user[list(seen)])
    found, _ = evaluate(module, data)
    assert np.isfinite(found["test/new/auc"])
    after = state(module.model)
    assert torch.equal(after["ranker.embeddings.user.weight"][0], before["ranker.embeddings.user.weight"][0]) == (fill != "dropoutnet")
    if fill == "mail-none": assert torch.equal(after["fill.map.weight"], before["fill.map.weight"])          # nobody has clicked for it


@pytest.mark.parametrize("fill_in_training", [True, False])
def test_filled_in_training_or_at_inference_only(world, fill_in_training, monkeypatch):
    module, data = made(world, "mail-base", own=dict(fill_in_training=fill_in_training))
    net, seen = module.model, {True: [], False: []}
    score, split = net.ranker.score, world[0]
    unknown = lambda e: torch.stack([(u == net.ranker.embeddings.user.weight[0]).all() for u in e.user])
    monkeypatch.setattr(net.ranker, "score", lambda e: (seen[net.ranker.training].append(e.present[unknown(e)].detach().clone()), score(e))[1])
    run(module, data)
    evaluate(module, data)
    training, measuring = torch.cat(seen[True]), torch.cat(seen[False])
    assert len(training) and len(measuring) and measuring.all() and (training.all() if fill_in_training else not training.any())


@pytest.mark.parametrize("fill", FILLS)
def test_training_batches_hide_the_behaviour_of_new_users(world, fill):
    module, data = made(world, fill)
    new = world[0].new_user
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader: assert not batch.length[torch.from_numpy(new)[batch.user]].any()
    if fill == "metaemb":
        module.model.fill.prepare(module.model.ranker, world[0], 0)
        for _ in range(20):
            drawn, _ = module.model.fill.draw()
            assert not new[drawn.user.numpy()].any() and not drawn.length.any() and not len(drawn.history)


@pytest.mark.parametrize("fill", FILLS)
def test_nothing_hidden_and_nothing_later_reaches_a_logit(world, fill):
    """Everything but the candidate and, of an old user, what came before it is drawn anew; the logit is the same to the bit."""
    split, features = world
    module, data = made(world, fill, "dmr" if fill == "mail-base" else "basednn")
    run(module, data)
    net, rng = module.model.eval(), np.random.default_rng(1)
    units = Questions(*world, "test", SMALL["slots"])
    asked = rng.permutation(len(units))[:12]
    assert 0 < split.new_user[units.user[asked].numpy()].sum() < 12
    for k in asked.tolist():
        u, at = int(units.user[k]), int(units.at[k])
        free = np.ones(len(split.items), bool)
        if not split.new_user[u]: free[split.offsets[u]:at] = False
        rating, free_item = np.where(free, rng.integers(1, 6, len(free)), split.rating).astype(np.float32), free.copy()     # the answer itself is free
        free_item[at] = False
        other = replace(split, items=np.where(free_item, rng.integers(0, split.n_items, len(free)), split.items), rating=rating)
        with torch.no_grad(): assert torch.equal(net(units[np.array([k])]), net(Questions(other, features, "test", SMALL["slots"])[np.array([k])])), (u, at)


@pytest.mark.parametrize("fill", FILLS)
def test_training_does_not_read_the_test(world, fill):
    split, features = world
    user, rng = np.repeat(np.arange(split.n_users), np.diff(split.offsets)), np.random.default_rng(2)
    test = np.arange(len(user)) >= split.valid_end[user]
    other = replace(split, items=np.where(test, rng.integers(0, split.n_items, len(user)), split.items), rating=np.where(test, rng.integers(1, 6, len(user)), split.rating).astype(np.float32))
    assert same(finished(world, fill, 1), finished((other, features), fill, 1))


@pytest.mark.parametrize("fill", ["", "mail-base"])
def test_forward_is_rows_on_their_own(world, fill):
    """In evaluation a question's logit does not depend on the others of its batch."""
    module, data = made(world, fill, "din")
    run(module, data)
    net, units = module.model.eval(), Questions(*world, "test", SMALL["slots"])
    with torch.no_grad():
        whole = net(units[np.arange(len(units))])
        for k in range(0, len(units), 7): torch.testing.assert_close(net(units[np.array([k])])[0], whole[k], atol=1e-6, rtol=1e-5)


def test_a_user_without_attributes_is_filled_too(world):
    """Brand-new people with unknown codes, and with values that training never met."""
    module, _ = made(world, "mail-base")
    net, batch = module.model.eval(), questions(world, n=4)
    rows = net.ranker.embeddings.admit(torch.zeros(4, features_width(world), dtype=torch.long))
    with torch.no_grad():
        logits, plain = net(replace(batch, user=rows)), net.ranker(replace(batch, user=rows))
    assert net.new(replace(batch, user=rows)).all() and torch.isfinite(logits).all() and not torch.equal(logits, plain)


def features_width(world):
    return world[1].codes.shape[1]


def test_loss_of_the_whole_is_what_training_minimises(world):
    module, _ = made(world, "")
    net, batch = module.model.eval(), questions(world, n=30)
    value, parts = net.loss(batch)
    assert float(value.detach()) == pytest.approx(float(binary_cross_entropy_with_logits(net(batch), batch.label).detach()), rel=1e-6) and set(parts) == {"log_loss"}
