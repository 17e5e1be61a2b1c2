"""Index gathers against loops over lists; sampling with workers, processes and resumption."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from l2rec.data.batches import Batch, ClickData, Clicks, SeededBatches, SequenceData, Targets, Windows, padded, training_windows, window_index
from l2rec.data.splits import global_time, leave_last_fraction, leave_last_out, new_users, training_fraction, with_validation
from worlds import dataset, random_dataset


def equal(a, b):
    """Whether two batches hold the same."""
    return all((x is None and y is None) or x.equal(y) for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in fields(a)))


def pieces(values, offsets):
    return [values[a:b].tolist() for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())]


@pytest.mark.parametrize("seed", range(5))
def test_window_index_is_a_loop(seed):
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 50, 20)
    end = start + rng.integers(0, 6, 20)
    index, offsets = window_index(torch.from_numpy(start), torch.from_numpy(end))
    assert pieces(index, offsets) == [list(range(a, b)) for a, b in zip(start, end)]


def test_window_index_of_nothing():
    none = torch.zeros(0, dtype=torch.long)
    index, offsets = window_index(none, none)
    assert index.tolist() == [] and offsets.tolist() == [0]
    index, offsets = window_index(torch.tensor([3, 5]), torch.tensor([3, 5]))
    assert index.tolist() == [] and offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_padded_is_a_loop(shape):
    length = [3, 0, 1, 5]
    values = torch.randn(sum(length), *shape)
    out, real = padded(values, torch.tensor([0, 3, 3, 4, 9]), fill=7)
    assert out.shape == (4, 5, *shape) and real.sum() == 9
    at = 0
    for b, n in enumerate(length):
        for i in range(5):
            assert real[b, i] == (i < n)
            assert torch.equal(out[b, i], values[at + i] if i < n else torch.full(shape, 7.))
        at += n


def test_padded_empty_histories():
    out, real = padded(torch.zeros(0, dtype=torch.long), torch.tensor([0, 0, 0]))
    assert out.shape == (2, 1) and not real.any()


@pytest.mark.parametrize("max_length", [1, 2, 3, 7, 50])
def test_training_windows_are_a_loop(max_length):
    split = training_fraction(new_users(leave_last_out(random_dataset(n_users=60, seed=1)), .2), .7)
    expected = {"last": [], "all": []}
    for u in range(split.n_users):
        if split.new_user[u] or not split.train_user[u]:
            continue
        start, end, newest = int(split.offsets[u]), int(split.train_end[u]) - 1, True
        while end > start:
            window = (u, max(start, end - max_length), end)
            expected["all"].append(window)
            if newest:
                expected["last"].append(window)
            end, newest = end - max_length, False
    for windows in ("last", "all"):
        assert list(zip(*(a.tolist() for a in training_windows(split, max_length, windows)))) == expected[windows]


@pytest.mark.parametrize("cut", [leave_last_out, global_time, lambda d: leave_last_fraction(d, .3, .1), lambda d: with_validation(leave_last_out(d))])
@pytest.mark.parametrize("max_length", [1, 3, 50])
def test_all_windows_predict_every_training_interaction_once(cut, max_length):
    split = cut(random_dataset(n_users=50, seed=2))
    _, start, end = training_windows(split, max_length, "all")
    predicted = sorted(p + 1 for a, b in zip(start, end) for p in range(a, b))
    assert predicted == [p for a, b in zip(*split.bounds("train")) for p in range(a + 1, b)]
    assert (end - start <= max_length).all() and (end > start).all()


def test_windows_hold_each_item_and_what_follows():
    split = leave_last_out(random_dataset(n_users=50, seed=3))
    units = Windows(split, 4, "all")
    user, start, end = training_windows(split, 4, "all")
    chosen = np.random.default_rng(0).permutation(len(units))[:17]
    batch = units[chosen]
    assert len(batch) == 17 and batch.user.tolist() == user[chosen].tolist()
    assert pieces(batch.history, batch.offsets) == [split.items[start[w] : end[w]].tolist() for w in chosen]
    assert pieces(batch.following, batch.offsets) == [split.items[start[w] + 1 : end[w] + 1].tolist() for w in chosen]
    assert batch.length.tolist() == batch.offsets.diff().tolist() and batch.target is None


@pytest.mark.parametrize("max_length", [1, 3, 100])
@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("cut", [leave_last_out, lambda d: leave_last_fraction(d, .3, .4), lambda d: global_time(d, .2, .4)])
def test_targets_are_a_loop(cut, part, max_length):
    split = new_users(cut(random_dataset(n_users=50, n_items=6, seed=4)), .3)       # few items: many targets repeat
    units = Targets(split, part, max_length)
    batch = units[np.arange(len(units))]
    assert sorted(batch.user.tolist()) == [u for u, (a, b) in enumerate(zip(*split.bounds(part))) if b > a]
    assert units.size.tolist() == batch.length.tolist() == batch.offsets.diff().tolist()
    for b, u in enumerate(batch.user.tolist()):
        first, last = (int(x[u]) for x in split.bounds(part))
        before = [] if split.new_user[u] else split.items[split.offsets[u] : first].tolist()
        assert batch.history[batch.offsets[b] : batch.offsets[b + 1]].tolist() == before[-max_length:]
        assert sorted(batch.seen[batch.seen_row == b].tolist()) == sorted(before)
        assert sorted(batch.target[batch.target_row == b].tolist()) == sorted(set(split.items[first:last].tolist()))
    if cut is not leave_last_out:
        assert len(batch.target) < sum(int(b - a) for a, b in zip(*split.bounds(part)))


def test_targets_come_longest_history_first():
    units = Targets(new_users(leave_last_out(random_dataset(n_users=50)), .2), "test", 100)
    assert (np.diff(units.size) <= 0).all()


def test_a_batch_is_the_same_alone_and_in_company():
    units = Targets(leave_last_fraction(random_dataset(seed=5), .2, .3), "test", 4)
    together = units[np.arange(9)]
    for b in range(9):
        alone = units[np.array([b])]
        assert alone.user[0] == together.user[b] and alone.history.tolist() == pieces(together.history, together.offsets)[b]
        assert alone.target.tolist() == together.target[together.target_row == b].tolist()


def test_batch_moves_with_its_length_on_the_host():
    batch = Targets(leave_last_out(random_dataset()))[np.arange(3)]
    away = batch.to("meta")
    assert {f.name: getattr(away, f.name).device.type for f in fields(away) if getattr(away, f.name) is not None} == {
        "user": "meta", "history": "meta", "offsets": "meta", "length": "cpu", "target": "meta", "target_row": "meta", "seen": "meta", "seen_row": "meta"}
    assert away.following is None and equal(batch.to("cpu"), batch)
    click = Clicks(leave_last_out(random_dataset()))[np.arange(3)].to("meta")
    assert click.label.device.type == "meta" and click.length.device.type == "cpu" and len(click) == 3
    assert all(t.dtype == torch.int64 for t in (batch.user, batch.history, batch.offsets, batch.length, batch.target, batch.target_row, batch.seen, batch.seen_row))


# --- order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, size", [(10, 3), (9, 3), (1, 5), (100, 1)])
def test_every_index_once_an_epoch(n, size):
    for shuffle in (True, False):
        order = SeededBatches(n, size, shuffle)
        batches = list(order)
        assert len(batches) == len(order) and all(len(b) == size for b in batches[:-1])
        assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert np.concatenate(list(SeededBatches(n, size, False))).tolist() == list(range(n))


def test_seed_and_epoch_decide_the_order():
    def epoch(seed, k):
        order = SeededBatches(50, 8, seed=seed)
        order.set_epoch(k)
        return np.concatenate(list(order)).tolist()

    assert epoch(0, 3) == epoch(0, 3)
    assert len({tuple(epoch(s, k)) for s in range(3) for k in range(3)}) == 9
    going = SeededBatches(50, 8, seed=1)
    seen = []
    for k in range(4):
        going.set_epoch(k)
        seen.append(np.concatenate(list(going)).tolist())
    assert seen[3] == epoch(1, 3)                    # a run resumed at epoch 3 goes on as the one never stopped


@pytest.mark.parametrize("n, size, world", [(100, 7, 2), (20, 3, 3), (7, 7, 2), (64, 8, 4)])
def test_processes_share_the_batches(n, size, world):
    for shuffle in (True, False):
        orders = [SeededBatches(n, size, shuffle, 5, rank, world) for rank in range(world)]
        batches = [list(o) for o in orders]
        assert [len(b) for b in batches] == [len(o) for o in orders]
        flat = [int(i) for b in batches for part in b for i in part]
        assert len(flat) == len(set(flat))
        if shuffle:
            assert len({len(b) for b in batches}) == 1                         # else one process would wait for the other forever
            assert len(flat) > n - world * size
            whole = list(SeededBatches(n, size, True, 5))
            assert all(batches[k % world][k // world].tolist() == whole[k].tolist() for k in range(world * len(batches[0])))
        else:
            assert sorted(flat) == list(range(n))                              # evaluation leaves nobody out


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", [SequenceData, ClickData])
def test_batches_are_the_same_for_any_number_of_workers(kind):
    split = leave_last_out(random_dataset(n_users=50))
    found = []
    for workers in (0, 1, 3):
        data = kind(split, batch_size=9, seed=3, num_workers=workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        found.append([*loader, *data.val_dataloader(), *data.test_dataloader()])
    for other in found[1:]:
        assert len(other) == len(found[0]) and all(equal(a, b) for a, b in zip(found[0], other))


def test_data_module_uses_its_parameters():
    split = leave_last_out(random_dataset(n_users=50))
    data = SequenceData(split, batch_size=9, max_length=3, windows="all", eval_batch_size=11)
    train, test = list(data.train_dataloader()), list(data.test_dataloader())
    assert sum(len(b) for b in train) == len(training_windows(split, 3, "all")[0]) and max(len(b) for b in train) == 9
    assert max(int(b.length.max()) for b in train + test) == 3 and [len(b) for b in test][0] == 11
    assert sorted(u for b in test for u in b.user.tolist()) == np.flatnonzero(split.valid_end < split.offsets[1:]).tolist()


# --- clicks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("max_length", [2, 100])
def test_clicks_are_a_loop(part, max_length):
    split = training_fraction(new_users(leave_last_fraction(random_dataset(seed=6), .2, .3), .3), .6)
    units = Clicks(split, part, max_length, above=2.5)
    batch = units[np.arange(len(units))]
    expected = []
    for u in range(split.n_users):
        if part == "train" and not split.train_user[u]:
            continue
        for at in range(*(int(b[u]) for b in split.bounds(part))):
            before = [] if split.new_user[u] else list(range(max(int(split.offsets[u]), at - max_length), at))
            expected.append((u, split.items[at], float(split.rating[at] > 2.5), split.items[before].tolist(), [float(r > 2.5) for r in split.rating[before]]))
    found = list(zip(batch.user.tolist(), batch.candidate.tolist(), batch.label.tolist(), pieces(batch.history, batch.offsets), pieces(batch.feedback, batch.offsets)))
    assert found == expected and batch.length.tolist() == [len(e[3]) for e in expected]
    assert batch.label.dtype == batch.feedback.dtype == torch.float32


# --- errors ---------------------------------------------------------------------------------------------------------------


def test_errors():
    split = leave_last_out(random_dataset())
    for wrong, message in ((lambda: training_windows(split, 0), "max_length=0"), (lambda: training_windows(split, 3, "lats"), "windows='lats'"), (lambda: Targets(split, "test", 0), "max_length=0"),
                           (lambda: Targets(split, "tets"), "part='tets'"), (lambda: SeededBatches(5, 0), "batch_size=0"), (lambda: Clicks(replace(split, rating=None)), "need a rating"),
                           (lambda: Clicks(with_validation(split), "validation"), "no interaction in validation"),
                           (lambda: Targets(with_validation(split), "validation"), "no user has a validation target"),
                           (lambda: Windows(leave_last_out(dataset({1: [1, 2, 3]}))), "no user has two visible training interactions")):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="nothing to learn from"):
        Windows(new_users(split, 1.))


def test_batch_without_targets_has_a_size():
    none = torch.zeros(0, dtype=torch.long)
    assert len(Batch(none, none, torch.zeros(1, dtype=torch.long), none)) == 0
