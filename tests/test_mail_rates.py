"""Like rates against plain loops, and what they refuse."""
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from l2rec.baselines.like_rate import shrunk
from l2rec.data.batches import Clicks
from l2rec.data.dataset import make_dataset
from l2rec.data.splits import leave_last_fraction, new_users
from l2rec.mail.features import make_features
from l2rec.mail.rates import LikeRate, information


@pytest.fixture(scope="module")
def world():
    "60 users of two clubs; each club likes half of the items, and one user in six likes everything."
    rng = np.random.default_rng(0)
    user, item = np.repeat(np.arange(60), 20), rng.integers(0, 30, 1200)
    club = np.arange(60) % 2
    liked = (club[user] == item % 2) ^ (rng.random(1200) < .2)
    rating = np.where(liked | (user % 6 == 0), 5., 2.)
    data = make_dataset("clubs", pl.DataFrame({"user_id": user, "item_id": item, "position": np.tile(np.arange(20), 60), "rating": pl.Series(rating, dtype=pl.Float32)}),
                        users=pl.DataFrame({"user_id": np.arange(60), "club": [f"club {c}" for c in club], "shoe": [f"size {s}" for s in rng.integers(0, 3, 60)]}))
    split = new_users(leave_last_fraction(data), .4, seed=1)
    return split, make_features(data, split)


def slowly(split, features, user, candidate, names, taste, item=10., value=50., own=None):
    "One question's logit from the formula, attribute by attribute, in plain loops over all training questions."
    rows = [(u, int(split.items[at]), float(split.rating[at] > 3)) for u in range(split.n_users) for at in range(split.offsets[u], split.train_end[u])]
    mean = sum(y for *_, y in rows) / len(rows)
    rate = {i: (sum(y for _, j, y in rows if j == i) + item * mean) / (sum(j == i for _, j, _ in rows) + item) for i in range(split.n_items)}
    odds, total = 1 / (mean * (1 - mean)), math.log(rate[candidate] / (1 - rate[candidate]))
    for name in names:
        k = features.attributes.names.index(name)
        code = {u: int(features.codes[u, k]) for u in range(split.n_users)}
        same = [(j, y - rate[j]) for u, j, y in rows if code[u] == code[user]]
        a = sum(d for _, d in same) / (len(same) + value)
        here = [d - a for j, d in same if j == candidate]
        total += odds * (a + sum(here) / (len(here) + taste))
    if own is not None:
        mine = [y - rate[j] for u, j, y in rows if u == user]
        total += odds * sum(mine) / (len(mine) + own)
    return total


@pytest.mark.parametrize("names, own", [((), None), (("club",), None), (("club", "shoe"), None), ((), 5.)])
def test_the_formula(world, names, own):
    split, features = world
    model = LikeRate.from_split(split, features, names, taste=7., own=own)
    batch = Clicks(split, "test")[np.arange(0, 60, 7)]
    expected = [slowly(split, features, int(u), int(c), names, 7., own=own) for u, c in zip(batch.user, batch.candidate)]
    assert np.allclose(model(batch).numpy(), expected, atol=1e-5)


def test_only_training_is_counted(world):
    split, features = world
    user = np.repeat(np.arange(split.n_users), np.diff(split.offsets))
    later = np.arange(len(user)) >= split.train_end[user]
    changed = replace(split, rating=np.where(later, 6 - split.rating, split.rating).astype(np.float32))
    batch = Clicks(split, "test")[np.arange(50)]
    for choice in (dict(attributes="all"), dict(own=5.)):
        assert torch.equal(LikeRate.from_split(split, features, **choice)(batch), LikeRate.from_split(changed, features, **choice)(batch))


def test_information_finds_the_club(world):
    found = information(*world)
    assert set(found) == {f"rate/{c}/{g}/{m}" for c in ("item", "club", "shoe", "all", "own") for g in ("new", "old") for m in ("auc", "gauc", "log_loss")}
    assert found["rate/club/new/auc"] > max(found["rate/item/new/auc"], found["rate/shoe/new/auc"]) + .1
    assert found["rate/own/new/auc"] > found["rate/item/new/auc"] and found["rate/own/new/gauc"] == pytest.approx(found["rate/item/new/gauc"])   # generosity orders nobody's own items


def test_shrunk():
    assert np.allclose(shrunk(np.array([0, 0, 2]), 3, np.array([1., 0., -1.]), 2.), [1 / 4, 0, -1 / 3])


def test_bad_input(world):
    split, features = world
    with pytest.raises(ValueError, match="no attribute is called 'clup'; there are: club, shoe"): LikeRate.from_split(split, features, ("clup",))
    with pytest.raises(ValueError, match="need a rating"): LikeRate.from_split(replace(split, rating=None), features)
    with pytest.raises(ValueError, match="training labels are 1"): LikeRate.from_split(replace(split, rating=np.full_like(split.rating, 5)), features)
