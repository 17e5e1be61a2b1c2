"""Windows against a loop over users, batches, shortened users, and metrics of cold and warm users and items against their definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from l2rec.data.batches import ClickData, Clicks
from l2rec.data.splits import few_interactions, leave_last_fraction, new_users, training_counts, training_fraction
from l2rec.evaluation.clicks import group_auc
from l2rec.evaluation.user_groups import auc_influence
from l2rec.hisam.histories import GAPS, ColdMetrics, Histories, HistoryData, HistoryModule, HistoryWindows, LengthBatches, as_histories, gap_buckets, shortened
from l2rec.training.contracts import Click
from l2rec.training.modules import evaluate, fit, validate
from worlds import dataset, random_dataset

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def split(): return leave_last_fraction(random_dataset(n_users=50, high=25), .15, .25)


class Bias(Click):
    """One number an item, one a liked item before."""

    def __init__(self, n_items):
        super().__init__()
        self.bias = torch.nn.Embedding(n_items, 1)

    def forward(self, batch): return self.bias(batch.candidate)[:, 0]


def test_gaps_against_a_loop(split):
    got, want = gap_buckets(split.timestamp, split.offsets), []
    for a, b in zip(split.offsets, split.offsets[1:]):
        for n in range(a, b): want.append(0 if n == a else 1 + int(np.floor(np.log2(1 + split.timestamp[n] - split.timestamp[n - 1]))))
    assert got.tolist() == want and got.max() < GAPS
    assert not gap_buckets(None, split.offsets).any() and gap_buckets(np.array([7]), np.array([0, 1])).tolist() == [0]
    assert gap_buckets(np.array([0, 2**62]), np.array([0, 2])).tolist() == [0, GAPS - 1]
    assert gap_buckets(np.array([5, 3, 3]), np.array([0, 0, 3, 3])).tolist() == [0, 0, 1]


def slow_windows(split, part, max_length, questions=None):
    """(user, history and chunk positions, asked positions) of every window, newest first within a user."""
    out, most = [], max_length + 1
    for u in range(split.n_users):
        first, last = (int(b[u]) for b in split.bounds(part))
        if part == "train" and not split.train_user[u]: continue
        chunk = 1 if split.new_user[u] else questions or (most if part == "train" else max(1, most // 4))
        while last > first:
            ask = max(first, last - chunk)
            begin = ask if split.new_user[u] else max(int(split.offsets[u]), ask - (0 if part == "train" and questions is None else most - chunk))
            out.append((u, list(range(begin, last)), list(range(ask, last))))
            last = ask
    return out


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("max_length, questions", [(1, None), (4, None), (6, 2), (8, 9), (100, None)])
@pytest.mark.parametrize("change", [None, "new", "fraction"])
def test_windows_against_a_loop(split, part, max_length, questions, change):
    s = {"new": lambda: new_users(split, .3), "fraction": lambda: training_fraction(split, .4), None: lambda: split}[change]()
    windows, gap = HistoryWindows(s, part, max_length, questions=questions), gap_buckets(s.timestamp, s.offsets)
    want = slow_windows(s, part, max_length, questions)
    assert len(windows) == len(want)
    batch = windows[np.arange(len(windows))]
    index = np.concatenate([w[1] for w in want])
    assert batch.window.tolist() == [w[0] for w in want] and batch.item.tolist() == s.items[index].tolist() and batch.length.tolist() == [len(w[1]) for w in want]
    assert batch.feedback.tolist() == (s.rating[index] > 3).tolist()
    hidden = np.repeat(s.new_user, np.diff(s.offsets))
    assert batch.gap.tolist() == np.where(hidden, 0, gap)[index].tolist()
    assert index[batch.asked.numpy()].tolist() == [n for w in want for n in w[2]] and batch.asked.diff().gt(0).all()
    assert batch.user.tolist() == [w[0] for w in want for _ in w[2]] and torch.equal(batch.candidate, batch.item[batch.asked]) and len(batch) == len(batch.label)
    assert batch.length.max() <= max_length + 1
    single = Clicks(s, part, max_length)
    assert sorted(zip(batch.user.tolist(), batch.candidate.tolist())) == sorted(zip(single.user.tolist(), single.items[single.at].tolist()))


def test_bad_windows(split):
    with pytest.raises(ValueError, match="max_length=0"): HistoryWindows(split, max_length=0)
    with pytest.raises(ValueError, match="questions=9"): HistoryWindows(split, max_length=4, questions=9)
    with pytest.raises(ValueError, match="need a rating"): HistoryWindows(replace(split, rating=None))
    with pytest.raises(ValueError, match="no interaction in train"): HistoryWindows(replace(split, train_user=np.zeros(split.n_users, bool)))
    with pytest.raises(ValueError, match="positions=0"): HistoryData(split, 0)


@pytest.mark.parametrize("most", [None, 1, 3])
def test_click_batches_as_windows(split, most):
    for batch in (next(iter(ClickData(split, 13, max_length=5).train_dataloader())), Clicks(new_users(split, 1.), "test", 5)[np.arange(4)]):
        got = as_histories(batch, most)
        assert len(got) == len(batch) == len(got.window) and torch.equal(got.user, batch.user) and torch.equal(got.candidate, batch.candidate) and torch.equal(got.label, batch.label)
        assert torch.equal(got.length, got.offsets.diff()) and not got.gap.any()
        for b in range(len(batch)):
            part, mine = slice(batch.offsets[b], batch.offsets[b + 1]), slice(got.offsets[b], got.offsets[b + 1] - 1)
            keep = slice(max(0, len(batch.history[part]) - most) if most else 0, None)
            assert torch.equal(got.item[mine], batch.history[part][keep]) and torch.equal(got.feedback[mine], batch.feedback[part][keep])


def test_batches_hold_similar_lengths_and_every_window_once_and_repeat_themselves():
    size = np.random.default_rng(0).integers(1, 40, 300)
    batches = LengthBatches(size, 100, seed=3)
    def epoch(n):
        batches.set_epoch(n)
        return [b.tolist() for b in batches]
    first = epoch(0)
    assert sorted(sum(first, [])) == list(range(300)) and len(first) == len(batches) == len(epoch(1)) and epoch(0) == first != epoch(1)
    assert all(len(b) * size[b].max() <= 100 or len(b) == 1 for b in first)
    shares = [list(LengthBatches(size, 100, True, 3, rank, 3)) for rank in range(3)]
    assert len({len(s) for s in shares}) == 1 and len({int(i) for s in shares for b in s for i in b}) == sum(len(b) for s in shares for b in s)
    evaluation = [list(LengthBatches(size, 100, False, 0, rank, 3)) for rank in range(3)]
    assert sorted(int(i) for s in evaluation for b in s for i in b) == list(range(300)) and [len(s) for s in evaluation] == [len(LengthBatches(size, 100, False, 0, r, 3)) for r in range(3)]
    assert [b.tolist() for b in LengthBatches(np.array([500]), 100)] == [[0]]


@pytest.mark.parametrize("keep", [1, 3, 9])
def test_shortened_users_keep_their_newest_interactions_and_all_questions(split, keep):
    less = shortened(split, .5, keep, seed=1)
    longer = lambda s: s.valid_end - s.offsets[:-1]
    cut = longer(less) < longer(split)
    assert (longer(less)[cut] == keep).all() and cut.sum() <= 25 and (longer(split) > keep).sum() >= cut.sum() > 0
    for u in range(split.n_users):
        a, b = slice(less.offsets[u], less.offsets[u + 1]), slice(split.offsets[u + 1] - (less.offsets[u + 1] - less.offsets[u]), split.offsets[u + 1])
        assert all(np.array_equal(getattr(less, k)[a], getattr(split, k)[b]) for k in ("items", "rating", "timestamp"))
        assert less.offsets[u + 1] - less.valid_end[u] == split.offsets[u + 1] - split.valid_end[u]
        assert less.offsets[u] <= less.train_end[u] <= less.valid_end[u]
        if not cut[u] and longer(split)[u] > keep: assert less.train_end[u] - less.offsets[u] == split.train_end[u] - split.offsets[u]
    assert np.array_equal(shortened(split, .5, keep, seed=1).items, less.items) and "shortened" in less.name and less.items.dtype == split.items.dtype
    HistoryWindows(less, "train"), HistoryWindows(less, "test")
    bare = shortened(replace(split, rating=None, timestamp=None), .5)
    assert bare.rating is None and bare.timestamp is None
    for wrong in (dict(share=0), dict(share=1.5), dict(share=.5, keep=0)):
        with pytest.raises(ValueError): shortened(split, **wrong)


def test_metrics_of_slices_against_their_definition():
    rng = np.random.default_rng(0)
    user, item, label = rng.integers(0, 9, 400), rng.integers(0, 20, 400), rng.integers(0, 2, 400)
    logit = np.round(rng.normal(size=400) + label, 1).astype(np.float32)
    cold_user, cold_item = rng.random(9) < .4, rng.random(20) < .3
    metrics = ColdMetrics(torch.from_numpy(cold_user), torch.from_numpy(cold_item))
    for _ in range(2):
        metrics.reset()
        for part in np.array_split(np.arange(400), 7): metrics.update(*(torch.from_numpy(x[part]) for x in (user, logit, label, item)))
        got = metrics.compute()
    auc = lambda mine: group_auc(np.zeros(mine.sum(), int), logit[mine], label[mine])[3][0]
    slices = {"": np.ones(400, bool), "cold/": cold_user[user], "warm/": ~cold_user[user], "cold_items/": cold_item[item], "warm_items/": ~cold_item[item]}
    for name, mine in slices.items():
        _, n, _, each = group_auc(user[mine], logit[mine], label[mine])
        both = np.isfinite(each)
        assert got[f"{name}auc"] == pytest.approx(auc(mine)) and got[f"{name}gauc"] == pytest.approx((each[both] * n[both]).sum() / n[both].sum()) and f"{name}log_loss" in got
    table = metrics.per_user()
    assert table["user"].tolist() == np.unique(user).tolist() and table["cold"].tolist() == cold_user[np.unique(user)].tolist()
    for column, mine in (("influence", slices[""]), ("influence_cold_items", slices["cold_items/"])):
        users, want = auc_influence(user[mine], logit[mine], label[mine])
        assert table[column][np.isin(table["user"], users)] == pytest.approx(want, abs=1e-6)
    for group in (True, False):
        mine = cold_user[user] == group
        assert table["influence_group"][table["cold"] == group] == pytest.approx(auc_influence(user[mine], logit[mine], label[mine])[1], abs=1e-6)


def test_slices_without_questions_are_left_out():
    metrics = ColdMetrics(torch.zeros(3, dtype=torch.bool), torch.zeros(4, dtype=torch.bool))
    metrics.update(torch.tensor([0, 0, 2]), torch.tensor([.1, .2, .3]), torch.tensor([0., 1., 0.]), torch.tensor([0, 1, 3]))
    got, table = metrics.compute(), metrics.per_user()
    assert not any(k.startswith(("cold/", "cold_items/")) for k in got) and got["warm/auc"] == got["auc"] == got["warm_items/auc"] == .5
    assert np.isnan(table["influence_cold_items"]).all() and table["user"].tolist() == [0, 2]


def test_module_measures_and_a_second_test_starts_afresh(split):
    data = HistoryData(split, 64, max_length=6)
    module = HistoryModule(Bias(split.n_items), data, cold=6, lr=.1)
    fit(module, data, max_epochs=2, monitor="validation/auc", progress=False)
    assert {"validation/auc", "validation/gauc"} <= validate(module, data).keys()
    (values, table), (again, other) = evaluate(module, data), evaluate(module, data)
    time = "time/rank_seconds"
    assert {k: v for k, v in values.items() if k != time} == {k: v for k, v in again.items() if k != time} and table.equals(other)
    assert np.array_equal(table["cold"].to_numpy(), few_interactions(split, 6)[np.searchsorted(split.user_id, table["user_id"].to_numpy())])
    assert table["n"].sum() == (split.offsets[1:] - split.valid_end).sum() and "test/cold/auc" in values and "test/warm_items/auc" in values
    singles = ClickData(split, 50, max_length=6)                   # the same weights, asked one by one by another data module
    module_too = HistoryModule(module.model, singles, cold=6)
    assert evaluate(module_too, singles)[0]["test/auc"] == pytest.approx(values["test/auc"])
    assert (training_counts(split) < 6).sum() == int(module.test_metrics.cold_item.sum())


def test_a_batch_moves_as_a_whole(split):
    batch = HistoryWindows(split, "test", 5)[np.arange(4)]
    moved = batch.to("meta")
    assert moved.item.device.type == "meta" and moved.length.device.type == "cpu" and isinstance(moved, Histories) and len(moved) == len(batch)


def test_users_with_one_interaction():
    s = leave_last_fraction(dataset({1: [5], 2: [6, 7]}, rating=[4., 2., 5.]), 0., .5)
    batch = HistoryWindows(s, "train")[np.arange(2)]
    assert batch.length.tolist() == [1, 1] and batch.label.tolist() == [1., 0.]


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("max_length, questions", [(1, None), (4, 3), (100, None)])
@pytest.mark.parametrize("change", [None, "new"])
def test_frozen_windows_against_a_loop(split, part, max_length, questions, change):
    here = new_users(split, share=.3) if change else split
    windows = HistoryWindows(here, part, max_length, questions=questions, frozen=True)
    batch, got = windows[np.random.default_rng(0).permutation(len(windows))], []
    gaps, label = gap_buckets(here.timestamp, here.offsets), (here.rating > 3).astype(float)
    for at, row, seen in zip(batch.asked.tolist(), batch.row.tolist(), batch.seen.tolist()):
        first = int(batch.offsets[row])
        got.append((int(batch.window[row]), batch.item[at].item(), batch.feedback[at].item(), batch.gap[at].item(), batch.item[first:first + seen].tolist(), batch.feedback[first:first + seen].tolist()))
    want, (begin, end) = [], here.bounds(part)
    for u in range(here.n_users):
        past = slice(begin[u] if here.new_user[u] else max(here.offsets[u], begin[u] - max_length), begin[u])
        for n in range(begin[u], end[u]):
            want.append((u, here.items[n], label[n], 0 if here.new_user[u] else gaps[begin[u]], here.items[past].tolist(), label[past].tolist()))
    assert sorted(got) == sorted(want)
    one_by_one = Clicks(here, part, max_length, frozen=True)
    alone = one_by_one[np.arange(len(one_by_one))]
    cut = lambda x: [x[a:b].tolist() for a, b in zip(alone.offsets, alone.offsets[1:])]
    assert sorted((u, i, y, h, f) for u, i, y, _, h, f in want) == sorted(zip(alone.user.tolist(), alone.candidate.tolist(), alone.label.tolist(), cut(alone.history), cut(alone.feedback)))


def test_training_questions_are_never_frozen(split):
    for cls in (HistoryWindows, Clicks):
        with pytest.raises(ValueError, match="frozen=True: of validation or test"): cls(split, "train", frozen=True)
    data = HistoryData(split)
    data.frozen = True
    assert next(iter(data.train_dataloader())).seen is None and next(iter(data.test_dataloader())).seen is not None
