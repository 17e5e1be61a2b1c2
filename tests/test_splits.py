"""Cut points against slow loops, leaks, ties, and floors on real data."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import polars as pl
import pytest

from l2rec.data.batches import Targets, Windows, training_windows
from l2rec.data.dataset import DataError
from l2rec.data.splits import (describe, few_interactions, global_time, history_length, leave_last_fraction, leave_last_out, new_users,
                               training_counts, training_fraction, with_validation)
from worlds import dataset, random_dataset

PROTOCOLS = {"leave-last-out": leave_last_out, "fraction": lambda d: leave_last_fraction(d, .2, .3), "global time": lambda d: global_time(d, .2, .15)}
protocols = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def parts(split):
    """user id -> three lists of item ids."""
    cut = lambda u, part: split.item_id[split.items[slice(*(int(b[u]) for b in split.bounds(part)))]].tolist()
    return {int(split.user_id[u]): tuple(cut(u, part) for part in ("train", "validation", "test")) for u in range(split.n_users)}


def rows(data):
    """user id -> [(item, time)], by the position column alone."""
    out = {}
    for user, item, _, time in data.interactions.sort("position").select("user_id", "item_id", "position", "timestamp").iter_rows():
        out.setdefault(user, []).append((item, time))
    return out


@pytest.mark.parametrize("seed", range(4))
def test_leave_last_out_is_a_loop_over_users(seed):
    data = random_dataset(seed=seed)
    expected = {}
    for user, history in rows(data).items():
        items = [i for i, _ in history]
        expected[user] = (items[:-2], items[-2:-1], items[-1:]) if len(items) >= 3 else (items, [], [])
    assert parts(leave_last_out(data)) == expected


@pytest.mark.parametrize("seed, validation, test", [(0, .1, .1), (1, .2, .3), (2, 0, .5), (3, .45, .45), (4, .05, .9)])
def test_fraction_is_a_loop_over_users(seed, validation, test):
    data = random_dataset(seed=seed)
    expected = {}
    for user, history in rows(data).items():
        items, n = [i for i, _ in history], len(history)
        n_test = min(math.ceil(n * Fraction(str(test))), n - 1)
        n_valid = min(math.ceil(n * Fraction(str(validation))), n - 1 - n_test)
        expected[user] = (items[: n - n_test - n_valid], items[n - n_test - n_valid : n - n_test], items[n - n_test :])
    split = leave_last_fraction(data, validation, test)
    assert parts(split) == expected
    assert (split.train_end > split.offsets[:-1]).all()


@pytest.mark.parametrize("seed, validation, test", [(0, .1, .1), (1, .2, .3), (2, 0, .5), (3, .3, .01)])
def test_global_time_is_a_loop_over_interactions(seed, validation, test):
    data = random_dataset(seed=seed)
    times = sorted(t for history in rows(data).values() for _, t in history)
    n = len(times)
    instant = lambda share: times[min(math.floor(n * (1 - Fraction(str(share)))), n - 1)]
    first, second = instant(Fraction(str(validation)) + Fraction(str(test))), instant(test)
    expected = {user: ([i for i, t in h if t < first], [i for i, t in h if first <= t < second], [i for i, t in h if t >= second]) for user, h in rows(data).items()}
    assert parts(global_time(data, validation, test)) == expected


def test_equal_times_fall_on_one_side_of_a_global_cut():
    data = dataset({1: [1, 2, 3, 4], 2: [1, 2, 3, 5], 3: [5, 4, 1]}, timestamp=[1, 5, 5, 9, 5, 6, 6, 9, 1, 5, 9])
    split = global_time(data, .3, .3)
    side = {}
    for part in ("train", "validation", "test"):
        for a, b in zip(*split.bounds(part)):
            for time in split.timestamp[a:b].tolist():
                assert side.setdefault(time, part) == part
    assert side == {1: "train", 5: "validation", 6: "test", 9: "test"}


@protocols
def test_numbering_of_items_changes_nothing(protocol):
    data = random_dataset(seed=5)
    ids = data.items["item_id"].to_numpy()
    other = np.random.default_rng(0).permutation(ids)
    renamed = replace(data, interactions=data.interactions.with_columns(pl.col("item_id").replace_strict(ids, other, return_dtype=pl.Int32)))
    back = dict(zip(other.tolist(), ids.tolist()))
    old, new = protocol(data), protocol(renamed)
    assert {u: tuple([back[i] for i in part] for part in cut) for u, cut in parts(new).items()} == parts(old)
    for name in ("offsets", "train_end", "valid_end", "user_id"):
        assert np.array_equal(getattr(old, name), getattr(new, name))
    assert {back[i]: int(n) for i, n in zip(new.item_id.tolist(), training_counts(new))} == dict(zip(old.item_id.tolist(), training_counts(old).tolist()))


@protocols
def test_row_order_of_the_table_changes_nothing(protocol):
    data = random_dataset(seed=6)
    shuffled = replace(data, interactions=data.interactions.sample(fraction=1, shuffle=True, seed=1))
    old, new = protocol(data), protocol(shuffled)
    assert parts(old) == parts(new) and np.array_equal(old.timestamp, new.timestamp) and np.array_equal(old.rating, new.rating)


def swapped(split, at):
    """The same cuts over other items from the positions `at` on: whatever still agrees cannot have read them."""
    items = split.items.copy()
    items[at] = (items[at] + 1 + np.random.default_rng(3).integers(0, split.n_items - 1, len(at))) % split.n_items
    assert (items[at] != split.items[at]).all()
    return replace(split, items=items)


def between(start, end):
    return np.concatenate([np.arange(a, b) for a, b in zip(start, end)])


@protocols
def test_training_reads_nothing_held_out(protocol):
    split = protocol(random_dataset(seed=7))
    other = swapped(split, between(split.train_end, split.offsets[1:]))
    assert np.array_equal(training_counts(split), training_counts(other))
    for max_length, windows in ((3, "last"), (3, "all"), (50, "last")):
        assert all(np.array_equal(a, b) for a, b in zip(training_windows(split, max_length, windows), training_windows(other, max_length, windows)))
        a, b = (Windows(s, max_length, windows)[np.arange(len(Windows(s, max_length, windows)))] for s in (split, other))
        assert a.history.equal(b.history) and a.following.equal(b.following)


@protocols
@pytest.mark.parametrize("part", ["validation", "test"])
def test_no_history_reaches_its_target_or_later(protocol, part):
    split = protocol(random_dataset(seed=8))
    other = swapped(split, between(split.bounds(part)[0], split.offsets[1:]))
    a, b = (Targets(s, part, 50)[np.arange(len(Targets(s, part, 50)))] for s in (split, other))
    assert a.history.equal(b.history) and a.seen.equal(b.seen) and a.seen_row.equal(b.seen_row) and a.user.equal(b.user)


def test_global_time_trains_on_nothing_after_its_first_target():
    split = global_time(random_dataset(n_users=80, seed=9), .2, .2)
    when = {part: split.timestamp[between(*split.bounds(part))] for part in ("train", "validation", "test")}
    assert when["train"].max() < when["validation"].min() and when["validation"].max() < when["test"].min()


@protocols
def test_new_users_are_hidden_everywhere(protocol):
    split = new_users(protocol(random_dataset(seed=10)), .4, seed=2)
    assert split.new_user.sum() == round(.4 * split.n_users)
    other = swapped(split, np.concatenate([np.arange(split.offsets[u], split.valid_end[u]) for u in np.flatnonzero(split.new_user)]))
    assert np.array_equal(training_counts(split), training_counts(other))
    assert not split.new_user[training_windows(split, 5, "all")[0]].any()
    a, b = (Targets(s, "test", 50)[np.arange(len(Targets(s, "test", 50)))] for s in (split, other))
    assert a.history.equal(b.history) and a.seen.equal(b.seen) and a.target.equal(b.target)
    new = split.new_user[a.user.numpy()]
    assert (a.length.numpy()[new] == 0).all() and not np.isin(a.seen_row.numpy(), np.flatnonzero(new)).any()
    assert set(np.flatnonzero(np.subtract(*split.bounds("test")[::-1]) > 0)) == set(a.user.tolist())       # nobody's targets are lost
    assert (history_length(split)[split.new_user] == 0).all() and few_interactions(split, 1)[split.new_user].all()


@pytest.mark.parametrize("choose, flag", [(new_users, "new_user"), (training_fraction, "train_user")])
def test_shares_are_nested_and_seeded(choose, flag):
    split = leave_last_out(random_dataset(n_users=101, low=3))
    chosen = {share: getattr(choose(split, share, 4), flag) for share in (.01, .1, .25, .5, 1.)}
    for share, who in chosen.items():
        assert who.sum() == max(1, round(share * 101))
    ordered = list(chosen.values())
    assert all((small <= large).all() for small, large in zip(ordered, ordered[1:]))
    assert np.array_equal(getattr(choose(split, .25, 4), flag), chosen[.25]) and not np.array_equal(getattr(choose(split, .25, 5), flag), chosen[.25])


def test_the_two_choices_of_users_are_not_the_same_users():
    split = leave_last_out(random_dataset(n_users=101, low=3))
    assert not np.array_equal(new_users(split, .5, 0).new_user, training_fraction(split, .5, 0).train_user)


def test_training_fraction_trains_on_the_chosen_alone_and_evaluates_all():
    whole = leave_last_out(random_dataset(n_users=60, seed=11))
    split = training_fraction(whole, .3, 1)
    count = np.zeros(split.n_items, int)
    for u in np.flatnonzero(split.train_user):
        for i in split.items[split.offsets[u] : split.train_end[u]]:
            count[i] += 1
    assert training_counts(split).tolist() == count.tolist()
    assert set(training_windows(split, 5)[0]) <= set(np.flatnonzero(split.train_user))
    assert len(Targets(split)) == len(Targets(whole)) and Targets(split)[np.arange(len(Targets(split)))].history.equal(Targets(whole)[np.arange(len(Targets(whole)))].history)


def test_with_validation_joins_and_keeps_the_test():
    split = leave_last_fraction(random_dataset(seed=12), .2, .2)
    joined = with_validation(split)
    assert parts(joined) == {u: (a + b, [], c) for u, (a, b, c) in parts(split).items()}
    assert training_counts(joined).sum() == (split.valid_end - split.offsets[:-1]).sum()
    with pytest.raises(ValueError, match="no user has a validation target"):
        Targets(joined, "validation")


def test_short_users():
    split = leave_last_out(dataset({1: [1], 2: [1, 2], 3: [1, 2, 3]}))
    assert parts(split) == {1: ([1], [], []), 2: ([1, 2], [], []), 3: ([1], [2], [3])}
    assert Targets(split)[np.arange(1)].user.tolist() == [2]
    assert training_windows(split)[0].tolist() == [1]                       # one interaction predicts nothing
    assert parts(leave_last_fraction(dataset({1: [1], 2: [1, 2]}), .5, .4)) == {1: ([1], [], []), 2: ([1], [], [2])}


def test_nobody_has_three():
    with pytest.raises(DataError, match="at least 3 interactions.*longest history has 2"):
        leave_last_out(dataset({1: [1, 2], 2: [3]}))


def test_history_length_and_few_interactions():
    split = leave_last_out(random_dataset(seed=13))
    for part, minus in (("validation", 2), ("test", 1)):
        n = np.diff(split.offsets)
        expected = np.where(n >= 3, n - minus, n)
        assert history_length(split, part).tolist() == expected.tolist()
        assert few_interactions(split, 5, part).tolist() == (expected < 5).tolist()


def test_describe_counts_by_loop():
    split = global_time(random_dataset(seed=14), .3, .3)
    cut, known = parts(split), set(split.item_id[training_counts(split) > 0].tolist())
    for k, row in enumerate(describe(split).iter_rows(named=True)):
        items = [i for part in cut.values() for i in part[k]]
        assert (row["users"], row["interactions"], row["items"], row["on_unseen_items"]) == (sum(bool(p[k]) for p in cut.values()), len(items), len(set(items)), sum(i not in known for i in items))


def test_rating_and_time_are_kept_or_left_out_whole():
    full = leave_last_out(random_dataset())
    assert len(full.rating) == len(full.timestamp) == len(full.items)
    gaps = dataset({1: [1, 2, 3]}, rating=[1., None, 2.])
    assert leave_last_out(gaps).rating is None and leave_last_out(gaps).timestamp is None


@pytest.mark.parametrize("validation, test, message", [(-.1, .1, "validation=-0.1"), (.1, 0, "test=0"), (.1, 1., "test=1.0"), (.5, .5, "leave no training data"), (float("nan"), .1, "validation=nan")])
@pytest.mark.parametrize("cut", [leave_last_fraction, global_time])
def test_fractions_out_of_range(cut, validation, test, message):
    with pytest.raises(ValueError, match=message):
        cut(random_dataset(), validation, test)


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan")])
@pytest.mark.parametrize("choose", [new_users, training_fraction])
def test_shares_out_of_range(choose, share):
    with pytest.raises(ValueError, match=f"share={share}"):
        choose(leave_last_out(random_dataset()), share)


def test_other_bad_input():
    split = leave_last_out(random_dataset())
    with pytest.raises(ValueError, match="below=0"):
        few_interactions(split, 0)
    with pytest.raises(ValueError, match="part='tset'.*'test'"):
        split.bounds("tset")
    with pytest.raises(DataError, match="needs a time stamp.*leave_last_out"):
        global_time(dataset({1: [1, 2, 3]}))
    with pytest.raises(DataError, match="user 4: time goes back after position 1"):
        good = dataset({3: [1, 2], 4: [1, 2, 3]}, timestamp=[1, 2, 3, 4, 9])
        global_time(replace(good, interactions=good.interactions.with_columns(timestamp=pl.Series([1, 2, 3, 9, 4]))))
    with pytest.raises(DataError, match="no interactions"):
        leave_last_out(replace(random_dataset(), interactions=random_dataset().interactions.clear()))
