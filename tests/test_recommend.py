"""Lists of recommendations against a loop over users."""

import numpy as np
import polars as pl
import pytest
import torch

from l2rec.data.splits import leave_last_out, new_users
from l2rec.training import recommend as recommending
from l2rec.training.contracts import Retrieval, build
from l2rec.training.models import model_class
from l2rec.training.recommend import recommend, with_own_ids, write_recommendations
from worlds import RETRIEVAL, dataset, random_dataset


class Recorder(Retrieval):
    """Scores that depend on the whole history that is read, and a note of it."""

    def __init__(self, n_items):
        super().__init__()
        self.weight, self.read = torch.nn.Parameter(torch.randn(n_items, n_items, generator=torch.Generator().manual_seed(1))), {}

    def scores(self, batch):
        out = torch.zeros(len(batch), len(self.weight))
        for b, u in enumerate(batch.user.tolist()):
            self.read[u] = batch.history[batch.offsets[b] : batch.offsets[b + 1]].tolist()
            for age, i in enumerate(reversed(self.read[u])):
                out[b] += self.weight[i] * .9**age
        assert batch.length.tolist() == batch.offsets.diff().tolist()
        return out


@pytest.fixture()
def split():
    return new_users(leave_last_out(random_dataset(n_users=30, n_items=12, seed=1)), .2)


@pytest.mark.parametrize("keep_seen", [False, True])
@pytest.mark.parametrize("k, batch_size, max_length", [(3, 7, 50), (12, 512, 4), (100, 1, 50)])
def test_lists_are_a_loop_over_users(split, keep_seen, k, batch_size, max_length):
    model = Recorder(split.n_items)
    found = recommend(model, split, k, max_length=max_length, keep_seen=keep_seen, batch_size=batch_size)
    expected = []
    for u in range(split.n_users):
        whole = [] if split.new_user[u] else split.items[split.offsets[u] : split.offsets[u + 1]].tolist()
        read = whole[-max_length:]
        assert model.read[u] == read                                     # validation and test included: there is nothing left to measure
        score = sum((model.weight[i].detach().double() * .9**age for age, i in enumerate(reversed(read))), torch.zeros(split.n_items, dtype=torch.float64)).numpy()
        left = [i for i in np.argsort(-score, kind="stable") if keep_seen or i not in whole][:k]
        expected += [(int(split.user_id[u]), int(split.item_id[i]), rank + 1, float(score[i])) for rank, i in enumerate(left)]
    shown = {u: [r for r in expected if r[0] == u] for u in split.user_id.tolist()}
    for (user,), rows in found.group_by("user_id", maintain_order=True):
        want = shown.pop(user)
        assert rows["rank"].to_list() == list(range(1, len(want) + 1))
        np.testing.assert_allclose(rows["score"], [r[3] for r in want], atol=1e-5)
        if len(set(round(r[3], 6) for r in want)) == len(want):          # a new user's scores all tie: any order is right
            assert rows["item_id"].to_list() == [r[1] for r in want]
        assert rows["item_id"].n_unique() == len(want)
    assert not any(shown.values())
    assert found["user_id"].to_list() == [r[0] for r in expected]


def test_types():
    found = recommend(Recorder(12), leave_last_out(random_dataset(n_items=12)), 3)
    assert found.schema == {"user_id": pl.Int32, "item_id": pl.Int32, "rank": pl.Int32, "score": pl.Float32}


def test_a_user_who_has_seen_nearly_all_gets_a_short_list():
    split = leave_last_out(dataset({5: [1, 2, 3, 4], 6: [1, 2, 3], 9: [4, 3, 2, 1]}))
    found = recommend(Recorder(4), split, 2)
    assert found.select("user_id", "item_id", "rank").rows() == [(6, 4, 1)]
    assert recommend(Recorder(4), split, 9, keep_seen=True)["user_id"].to_list() == [5] * 4 + [6] * 4 + [9] * 4
    assert recommend(Recorder(4), split, 2, users=[5]).is_empty()


def test_chosen_users_in_the_order_asked_for(split):
    whole, model = recommend(Recorder(split.n_items), split, 3, keep_seen=True), Recorder(split.n_items)
    wanted = split.user_id[[7, 2, 20]]
    some = recommend(model, split, 3, users=wanted, keep_seen=True)
    assert some["user_id"].to_list() == np.repeat(wanted, 3).tolist() and set(model.read) == {7, 2, 20}
    for u in wanted:
        assert some.filter(pl.col("user_id") == u).equals(whole.filter(pl.col("user_id") == u))


@pytest.mark.parametrize("user", [4, -1, 10**6])
def test_unknown_user(split, user):
    with pytest.raises(ValueError, match=f"user {user} is not in the data"):
        recommend(Recorder(split.n_items), split, users=[3, user])


@pytest.mark.parametrize("k", [0, -2])
def test_k_out_of_range(split, k):
    with pytest.raises(ValueError, match=f"k={k}: at least 1"):
        recommend(Recorder(split.n_items), split, k)


@pytest.mark.parametrize("name", RETRIEVAL)
def test_every_model_recommends(split, name):
    model = build(model_class(name), split).train()
    found = recommend(model, split, 4)
    seen = {u: set(split.item_id[split.items[a:b]].tolist()) if not n else set() for u, a, b, n in zip(split.user_id.tolist(), split.offsets[:-1], split.offsets[1:], split.new_user)}
    assert all(item not in seen[user] for user, item in found.select("user_id", "item_id").iter_rows()) and found["score"].is_finite().all()
    assert found.equals(recommend(model, split, 4))                      # without dropout


def test_the_file_appears_whole_or_not_at_all(split, tmp_path, monkeypatch):
    table, path = recommend(Recorder(split.n_items), split, 3), tmp_path / "new" / "lists.parquet"
    assert write_recommendations(table, path) == path and pl.read_parquet(path).equals(table)
    assert [p.name for p in path.parent.iterdir()] == ["lists.parquet"]
    before = path.read_bytes()

    def interrupted(*_):
        raise OSError("killed before the file took its place")

    monkeypatch.setattr(recommending.os, "replace", interrupted)
    with pytest.raises(OSError, match="killed"):
        write_recommendations(table.head(1), path)
    assert path.read_bytes() == before


def test_ids_of_ones_own_tables_stand_beside_the_canonical_ones(tmp_path):
    from l2rec.data.table import dataset_from_table
    rows = [(f"u{u}", f"é{(u + p) % 6}", p) for u in range(5) for p in range(4)]
    pl.DataFrame(rows, schema=["who", "what", "day"], orient="row").write_csv(tmp_path / "o.csv")
    data = dataset_from_table(tmp_path / "o.csv", user="who", item="what", time="day")
    split = leave_last_out(data)
    plain = recommend(Recorder(split.n_items), split, 2)
    table = with_own_ids(plain, data)
    assert table.columns == [*plain.columns, "user", "item"] and table.select(plain.columns).equals(plain)
    seen = {(who, what) for who, what, _ in rows}
    assert table["user"].unique().sort().to_list() == [f"u{u}" for u in range(5)] and not seen & set(zip(table["user"], table["item"]))
    assert with_own_ids(plain, random_dataset(n_items=12)).equals(plain)           # a dataset that knows no other ids
