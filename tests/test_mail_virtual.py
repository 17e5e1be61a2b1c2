"""Virtual behaviour looked at: against plain loops, written whole or not at all, and refused where there is nothing to see."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from l2rec.data.splits import leave_last_fraction, new_users, training_fraction
from l2rec.data.synthetic import SyntheticWorld, make_world
from l2rec.mail.alignment import mmd2
from l2rec.mail.cotraining import set_up_clicks
from l2rec.mail.features import Questions, make_features
from l2rec.mail.fills import FILLS
from l2rec.mail.rankers import BaseDNN
from l2rec.mail.virtual import attribute_neighbours, code_picture, compare_virtual, deleted_behaviour, nearest_items, virtual_behaviour, write_virtual_behaviour

SLOTS, WIDTH = 5, 4
TOWER = dict(encoder=(8, 6, 6), decoder=(6, 8))
OWN = {"mail-single": TOWER, "mail-dual": TOWER, "mail-base": TOWER, "metaemb": dict(users=4, shots=1), "llae": dict(rank=2, rounds=2, length=3), "emblr": dict(length=2)}
FILLING = ["mail-none", "mail-single", "mail-dual", "mail-base", "emblr", "llae"]


@pytest.fixture(scope="module")
def world():
    """60 users, 24 of them new, one left out of training; an old and a new user like nothing before the test."""
    data = make_world(SyntheticWorld(n_users=60, n_items=150, mean_length=10, max_length=16, cold_length=5, n_groups=6)).dataset
    split = training_fraction(new_users(leave_last_fraction(data, .15, .25), .4), .9)
    rating = split.rating.copy()
    for new in (True, False):
        u = np.flatnonzero((split.new_user == new) & split.train_user)[0]
        rating[split.offsets[u]:split.valid_end[u]] = 1.
    return replace(split, rating=rating), make_features(data, split, least=2)


def made(world, fill="mail-base", hyperparameters=None, **own):
    """A model whose weights are drawn large enough to tell vectors apart, and whose fill is prepared."""
    net, _ = set_up_clicks(*world, BaseDNN, fill, 0, {"width": WIDTH, "slots": SLOTS, "hidden": (8, 4), **(hyperparameters or {})}, {**OWN.get(fill, {}), **own})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "embeddings" in name: p.normal_()
    net.fill.prepare(net.ranker, net.split, 0)
    return net


def item(net, features, i):
    """Vector of one item, float64: id, mean of its categories, brand."""
    t, (a, b) = net.ranker.embeddings, features.category_offsets[i:i + 2]
    x = t.item.weight[i].double() + t.brand.weight[features.brand[i]].double()
    return (x + t.category.weight[features.category[a:b].tolist()].double().mean(0) if b > a else x).detach().numpy()


def slow_deleted(net, features, u, liked_only=True):
    """Mean vector of the newest likes before the test, None where there is none."""
    s = net.split
    rows = [i for i in range(s.offsets[u], s.valid_end[u]) if not liked_only or s.rating[i] > 3][-SLOTS:]
    return np.mean([item(net, features, s.items[i]) for i in rows], 0) if rows else None


# --- what a fill gives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
def test_virtual_behaviour_is_what_the_ranker_reads(world, fill):
    net = made(world, fill)
    rows, vectors = virtual_behaviour(net)
    assert rows.tolist() == np.flatnonzero(world[0].new_user).tolist() and vectors.shape == (len(rows), SLOTS, WIDTH) and not vectors.requires_grad
    assert bool(vectors.any()) == (fill in FILLING)
    units, seen = Questions(*world, "test", SLOTS), []
    net.ranker.score = lambda e: seen.append(e) or torch.zeros(len(e))
    batch = units[np.flatnonzero(world[0].new_user[units.user.numpy()])]
    with torch.no_grad(): net(batch)
    e = seen[0]
    for b, u in enumerate(batch.user.tolist()):
        torch.testing.assert_close(e.behaviour[b] * e.present[b, :, None], vectors[rows.tolist().index(u)], atol=1e-6, rtol=1e-5)


def test_of_chosen_users_and_of_nobody(world):
    net = made(world)
    rows, vectors = virtual_behaviour(net)
    some, few = virtual_behaviour(net, rows[[4, 1]])
    assert some.tolist() == rows[[4, 1]].tolist()
    torch.testing.assert_close(few, vectors[[4, 1]], atol=1e-6, rtol=1e-5)
    old = np.flatnonzero(~world[0].new_user)[:3]
    assert virtual_behaviour(net, old)[1].any()                           # old users may be asked about too: what the tower would say of them
    assert virtual_behaviour(net, np.empty(0, np.int64))[1].shape == (0, SLOTS, WIDTH)


def test_nearest_items_are_a_loop(world):
    net, rng = made(world), np.random.default_rng(0)
    items = np.stack([item(net, world[1], i) for i in range(world[0].n_items)])
    vectors = rng.normal(size=(3, SLOTS, WIDTH))
    vectors[0, 0] = 7 * items[11]
    found = nearest_items(net, torch.from_numpy(vectors).float())
    for n in range(3):
        for s in range(SLOTS):
            cosine = [float(vectors[n, s] @ i / np.linalg.norm(i) / np.linalg.norm(vectors[n, s])) for i in items]
            assert cosine[found[n, s]] == pytest.approx(max(cosine), abs=1e-5)
    assert found[0, 0] == 11


# --- the file -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["mail-base", "llae"])
def test_the_file_holds_what_the_fill_gives(world, tmp_path, fill):
    net, split = made(world, fill), world[0]
    path = write_virtual_behaviour(net, tmp_path / "deep" / "virtual.parquet")
    table = pl.read_parquet(path)
    rows, vectors = virtual_behaviour(net)
    there = vectors.abs().sum(2) > 0
    assert table.columns == ["user_id", "slot", "nearest_item_id", "vector"] and [p.name for p in path.parent.iterdir()] == ["virtual.parquet"]
    assert table.height == int(there.sum()), "slots without a behaviour have no row"
    found = {(u, s): (i, v) for u, s, i, v in table.iter_rows()}
    for n, u in enumerate(rows):
        for s in range(SLOTS):
            if not there[n, s]: continue
            near, vector = found[int(split.user_id[u]), s]
            assert vector == pytest.approx(vectors[n, s].tolist()) and near == split.item_id[nearest_items(net, vectors[n:n + 1, s:s + 1])[0, 0]]
    if fill == "llae": assert there[:, :3].any() and not there[:, 3:].any() and all(near in split.item_id for near, _ in found.values())


def test_the_file_appears_whole_or_not_at_all(world, tmp_path, monkeypatch):
    net, path, write = made(world), tmp_path / "virtual.parquet", pl.DataFrame.write_parquet

    def full(table, where, **how):
        write(table.head(3), where)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(pl.DataFrame, "write_parquet", full)
        with pytest.raises(OSError, match="No space left"): write_virtual_behaviour(net, path)
        assert not path.exists()
    write_virtual_behaviour(net, path)
    before = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(pl.DataFrame, "write_parquet", full)
        with pytest.raises(OSError, match="No space left"): write_virtual_behaviour(net, path, np.flatnonzero(world[0].new_user)[:2])
    assert path.read_bytes() == before
    write_virtual_behaviour(net, path, np.flatnonzero(world[0].new_user)[:2])
    assert pl.read_parquet(path)["user_id"].n_unique() == 2 and [p.name for p in tmp_path.iterdir()] == ["virtual.parquet"]


# --- against what was deleted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("liked_only", [True, False])
def test_deleted_behaviour_is_a_loop(world, liked_only):
    net = made(world, hyperparameters=dict(liked_only=liked_only))
    users = np.random.default_rng(0).permutation(world[0].n_users)
    mean, known = deleted_behaviour(net, users)
    assert mean.shape == (len(users), WIDTH) and not mean.requires_grad and known.all() == (not liked_only)
    for n, u in enumerate(users):
        expected = slow_deleted(net, world[1], u, liked_only)
        assert bool(known[n]) == (expected is not None)
        np.testing.assert_allclose(mean[n].numpy(), np.zeros(WIDTH) if expected is None else expected, atol=1e-5)
    assert deleted_behaviour(net, users[:0])[0].shape == (0, WIDTH)


def test_deleted_behaviour_does_not_read_the_test(world):
    split, features = world
    test = np.arange(len(split.items)) >= split.valid_end[np.repeat(np.arange(split.n_users), np.diff(split.offsets))]
    other = replace(split, items=np.where(test, 0, split.items), rating=np.where(test, 6 - split.rating, split.rating))
    net = made(world)
    before = deleted_behaviour(net, np.arange(split.n_users))
    net.split = other
    after = deleted_behaviour(net, np.arange(split.n_users))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("seed", range(3))
def test_attribute_neighbours_are_a_loop(seed):
    rng = np.random.default_rng(seed)
    asked, old = rng.integers(0, 3, (7, 3)), rng.integers(0, 3, (9, 3))
    asked[0] = 0                                                          # of whom nothing is known: everybody is as near
    weights = attribute_neighbours(torch.from_numpy(asked), torch.from_numpy(old))
    for n in range(7):
        shared = [sum(a == b and a > 0 for a, b in zip(asked[n], o)) for o in old]
        best = [m for m in range(9) if shared[m] == max(shared)]
        assert weights[n].tolist() == pytest.approx([1 / len(best) if m in best else 0. for m in range(9)])
    assert weights[0].tolist() == pytest.approx([1 / 9] * 9)


@pytest.mark.parametrize("fill", FILLING)
def test_compare_virtual_is_a_loop(world, fill):
    net, (split, features) = made(world, fill), world
    found = compare_virtual(net)
    rows, vectors = virtual_behaviour(net)
    past = {u: slow_deleted(net, features, u) for u in range(split.n_users) if split.train_user[u] and not split.new_user[u]}
    past = {u: v for u, v in past.items() if v is not None}
    mean, errors, cosines = np.mean(list(past.values()), 0), {}, {}
    for n, u in enumerate(rows):
        truth = slow_deleted(net, features, u)
        if truth is None: continue
        shared = {o: sum(a == b and a > 0 for a, b in zip(features.codes[u], features.codes[o])) for o in past}
        near = [past[o] for o in past if shared[o] == max(shared.values())]
        slots = [v for v in vectors[n].double().numpy() if v.any()]
        for name, guess in (("mail", np.mean(slots, 0) if slots else np.zeros(WIDTH)), ("mean", mean), ("neighbour", np.mean(near, 0))):
            errors.setdefault(name, []).append(((guess - truth) ** 2).mean())
            cosines.setdefault(name, []).append(guess @ truth / max(np.linalg.norm(guess), 1e-12) / np.linalg.norm(truth))
    assert 0 < len(errors["mean"]) < len(rows)                            # some new users liked nothing
    for name in ("mail", "mean", "neighbour"):
        assert found[f"virtual/{name}/mse"] == pytest.approx(np.mean(errors[name]), rel=1e-4)
        assert found[f"virtual/{name}/cosine"] == pytest.approx(np.mean(cosines[name]), abs=1e-5)
        assert found[f"virtual/{name}/r2"] == pytest.approx(1 - np.mean(errors[name]) / np.mean(errors["mean"]), rel=1e-4, abs=1e-6)
    assert len(found) == 9 and found["virtual/mean/r2"] == 0


def test_nothing_to_compare(world):
    for fill in set(FILLS) - set(FILLING): assert compare_virtual(made(world, fill)) == {}, fill
    split = world[0]
    net = made(world)
    for new in (np.ones_like(split.new_user), np.zeros_like(split.new_user)):
        net.split = replace(split, new_user=new)
        assert compare_virtual(net) == {}
    net.split = replace(split, rating=np.ones_like(split.rating))         # nobody likes anything
    assert compare_virtual(net) == {}


# --- both codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", sorted(set(FILLS) - {"mail-dual", "mail-base"}))
def test_a_fill_without_two_codes_is_refused(world, fill):
    with pytest.raises(ValueError, match="no two codes to draw; use mail-dual or mail-base"): code_picture(made(world, fill), world[1])


@pytest.mark.parametrize("fill", ["mail-dual", "mail-base"])
def test_code_picture(world, fill, monkeypatch):
    net, read = made(world, fill), []
    codes = net.fill.tower.codes
    monkeypatch.setattr(net.fill.tower, "codes", lambda a, v, present, **how: read.append((a, v, present, codes(a, v, present, **how))) or read[-1][-1])
    table, value = code_picture(net, world[1], n=20)
    a, _, present, (p, q) = read[0]
    assert table["code"].to_list() == ["p"] * 20 + ["q"] * 20 and present.any(1).all() and len(a) == 20
    assert value == pytest.approx(float(mmd2(p.double(), q.double(), sigma="median")), rel=1e-3)
    both = torch.cat([p, q]).double().detach().numpy()
    values, vectors = np.linalg.eigh(np.cov(both.T))
    for name, axis in (("x", vectors[:, -1]), ("y", vectors[:, -2])):
        expected, found = (both - both.mean(0)) @ axis, table[name].to_numpy()
        np.testing.assert_allclose(found * np.sign(found @ expected), expected, atol=1e-4 * np.abs(both).max())
    again, value_again = code_picture(net, world[1], n=20)
    other, _ = code_picture(net, world[1], n=20, seed=1)
    assert table.equals(again) and value == value_again and not table.equals(other)
    attributes = net.ranker.embeddings.attribute_vectors(net.ranker.embeddings.codes[torch.from_numpy(~world[0].new_user)])
    assert all(any(torch.equal(x, y) for y in attributes) for x in a)     # of old users alone


def test_no_old_user_to_draw(world):
    net = made(world)
    split = net.split
    net.split, net.ranker.embeddings.new_user = replace(split, new_user=np.ones_like(split.new_user)), torch.ones(split.n_users, dtype=torch.bool)
    with pytest.raises(ValueError, match="old user"): code_picture(net, world[1])


def test_looking_leaves_the_model_as_it_was(world, tmp_path):
    net = made(world)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    virtual_behaviour(net), compare_virtual(net), code_picture(net, world[1], n=10), write_virtual_behaviour(net, tmp_path / "v.parquet")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
