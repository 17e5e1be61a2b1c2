"""Intervals and tests against simulation, enumeration and hand-worked numbers."""

import itertools
import math
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
from scipy import stats

from l2rec.evaluation.significance import (average_seeds, bootstrap_mean, bootstrap_means, compare, holm, paired_bootstrap, paired_test, seed_interval, seed_spread,
                                           slice_metrics)


@pytest.mark.parametrize("distinct", [False, True])
def test_bootstrap_means_have_the_right_spread(distinct):
    rng = np.random.default_rng(0)
    values = rng.normal(size=400) if distinct else rng.integers(0, 4, 400).astype(float)
    means = bootstrap_means(values, n=20_000, seed=1)
    assert means.mean() == pytest.approx(values.mean(), abs=4 * values.std() / math.sqrt(400 * 20_000))
    assert means.std() == pytest.approx(values.std() / math.sqrt(400), rel=0.03)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=300)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    mean, low, high = bootstrap_mean(values)
    assert mean == values.mean() and low == pytest.approx(theirs.low, abs=0.01) and high == pytest.approx(theirs.high, abs=0.01)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_covers_as_often_as_it_says(level):
    covered, trials = 0, 600
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        a = np.where(rng.random(300) < 0.3, rng.random(300), 0)
        b = np.where(rng.random(300) < 0.25, rng.random(300), 0)
        _, low, high = paired_bootstrap(a, b, n=600, seed=seed, level=level)
        covered += low <= 0.5 * (0.3 - 0.25) <= high
    assert abs(covered / trials - level) < 4 * math.sqrt(level * (1 - level) / trials)


def test_the_bootstrap_is_seeded_and_bounded():
    values = np.random.default_rng(0).random(22_363)
    start = time.perf_counter()
    assert bootstrap_mean(values, n=2_000, seed=3) == bootstrap_mean(values, n=2_000, seed=3)
    assert bootstrap_mean(values, n=500, seed=3) != bootstrap_mean(values, n=500, seed=4)
    assert time.perf_counter() - start < 30


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    a = rng.random(1_000)
    b = a - 0.01 + rng.normal(0, 0.01, 1_000)
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx((a - b).mean()) and 0.009 < low < difference < high < 0.011


@pytest.mark.parametrize("seed", range(5))
def test_permutation_is_exact_for_few_users(seed):
    difference = np.round(np.random.default_rng(seed).normal(0.3, 1, 8), 1)
    difference[0] = 0
    signs = np.array(list(itertools.product([1, -1], repeat=8)))
    expected = np.mean(np.abs((signs * difference).mean(1)) >= abs(difference.mean()) - 1e-12)
    assert paired_test(difference, np.zeros(8)) == pytest.approx(expected)


def test_large_samples_take_t():
    rng = np.random.default_rng(0)
    a, b = rng.random(2_000), rng.random(2_000)
    assert paired_test(a, b) == paired_test(a, b, "t") == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert paired_test(a, b, "permutation") == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)


@pytest.mark.parametrize("method, n", [("permutation", 12), ("permutation", 60), ("t", 200)])
def test_false_alarms_stay_at_the_level(method, n):
    alarms = [paired_test(np.random.default_rng(s).normal(size=n), np.zeros(n), method, n=999, seed=s) < 0.05 for s in range(400)]
    assert np.mean(alarms) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)


def test_equal_models_and_constant_gains():
    assert paired_test([0.1, 0.2, 0.0], [0.1, 0.2, 0.0]) == 1
    assert paired_bootstrap([0.5, 0.2], [0.5, 0.2]) == (0, 0, 0)
    assert paired_test(np.ones(1_500), np.zeros(1_500)) == 0
    assert paired_test([1.0], [0.0]) == 1


def test_holm_by_hand():
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.04, 0.001, 0.5, 0.6]) == pytest.approx([0.12, 0.004, 1, 1])
    assert holm([0.03]) == pytest.approx([0.03])
    with pytest.raises(ValueError, match=r"0\.\.1, not 1\.2"):
        holm([0.5, 1.2])
    with pytest.raises(ValueError, match="not finite"):
        holm([0.5, math.nan])


def test_seed_spread():
    assert seed_spread([1, 2, 3]) == (2, 1, 3)
    mean, std, n = seed_spread([0.5])
    assert mean == 0.5 and math.isnan(std) and n == 1


def test_seed_interval_is_that_of_the_t_test():
    values = [0.2, 0.5, 0.1, 0.9]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert seed_interval(values) == pytest.approx((np.mean(values), expected.low, expected.high))
    assert seed_interval([0.5]) == (0.5, None, None)


def table(values, users=None):
    return pl.DataFrame({"user_id": list(range(len(values)) if users is None else users), "m": values})


def test_seeds_are_averaged_by_user_id():
    mean = average_seeds([table([1.0, 2, 3]), table([7.0, 5, 3], users=[2, 1, 0])], "m")
    assert mean["user_id"].to_list() == [0, 1, 2] and mean["m"].to_list() == [2, 3.5, 5]


def test_compare_is_paired_averaged_and_adjusted():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    runs = {m: [table(base + gain + rng.normal(0, 0.2, 200)) for _ in range(3)] for m, gain in {"ref": 0, "up": 0.1, "same": 0}.items()}
    runs["up"] = [t.sample(fraction=1, shuffle=True, seed=1) for t in runs["up"]]
    result = compare(runs, "ref", "m")
    mean = {m: np.mean([t.sort("user_id")["m"].to_numpy() for t in tables], axis=0) for m, tables in runs.items()}
    assert result["model"].to_list() == ["up", "same"] and result["n_users"].to_list() == [200, 200] and result["n_seeds"].to_list() == [3, 3]
    for row in result.to_dicts():
        a, b = mean[row["model"]], mean["ref"]
        assert row["difference"] == pytest.approx((a - b).mean()) and row["p"] == paired_test(a, b)
        assert (row["difference"], row["ci_low"], row["ci_high"]) == paired_bootstrap(a, b)
    assert result["p_holm"].to_list() == holm(result["p"]).tolist()
    assert result["p_holm"][0] < 0.01


@pytest.mark.parametrize("runs, reference, message", [
    ({"a": table([1.0]), "b": table([1.0])}, "c", "reference 'c' is not among the models: a, b"),
    ({"a": table([1.0])}, "a", "no model beside"),
    ({"a": table([1.0, 2]), "b": table([1.0])}, "a", "user 1 is in a but not in b"),
    ({"a": table([1.0, 2]), "b": [table([1.0, 2]), table([1.0, 2], users=[0, 2])]}, "a", "user 1 is in run 0 but not in run 1"),
    ({"a": table([1.0, 2]), "b": table([1.0, 2], users=[4, 4])}, "a", "user 4 occurs more than once in run 0"),
    ({"a": table([1.0, 2]), "b": table([1.0, None])}, "a", "1 of 2 values of m are missing or not finite"),
    ({"a": table([1.0, 2]), "b": pl.DataFrame({"user_id": [0, 1]})}, "a", "no column 'm'; it has user_id"),
    ({"a": table([1.0, 2]), "b": []}, "a", "no run was given"),
])
def test_what_cannot_be_compared_is_refused(runs, reference, message):
    with pytest.raises(ValueError, match=message):
        compare(runs, reference, "m")


def test_bad_values_have_one_clear_message():
    with pytest.raises(ValueError, match="a has 2 users and b 1"):
        paired_bootstrap([1, 2], [1])
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="level is 95"):
        bootstrap_mean([1, 2], level=95)
    with pytest.raises(ValueError, match="at least one resample"):
        bootstrap_mean([1, 2], n=0)
    with pytest.raises(ValueError, match="method is 'wilcoxon'"):
        paired_test([1, 2], [1, 3], "wilcoxon")


def test_slices_agree_with_a_loop():
    rng = np.random.default_rng(0)
    by, value = rng.integers(1, 30, 500), rng.random(500)
    result = slice_metrics({"user": np.arange(500), "m": value}, by, edges=(1, 2, 5, 20, 40))
    assert result.columns == ["slice", "lower", "n", "m"]
    assert result["slice"].to_list() == ["1", "2-4", "5-19", "20-39", ">= 40"]
    for row, (low, high) in zip(result.to_dicts(), [(1, 2), (2, 5), (5, 20), (20, 40), (40, 99)]):
        mine = value[(by >= low) & (by < high)]
        assert row["n"] == len(mine) and (row["m"] is None if not len(mine) else row["m"] == pytest.approx(mine.mean()))


def test_slices_refuse_what_they_would_lose():
    values = {"m": [0.1, 0.2]}
    with pytest.raises(ValueError, match="1 users lie below the first edge 2"):
        slice_metrics(values, [1, 3], (2, 5))
    with pytest.raises(ValueError, match="must ascend"):
        slice_metrics(values, [1, 3], (0, 5, 5))
    with pytest.raises(ValueError, match="2 users but 3 values"):
        slice_metrics(values, [1, 3, 4], (0, 5))
    with pytest.raises(ValueError, match="2 slices, but there are 1 labels"):
        slice_metrics(values, [1, 3], (0, 5), labels=["few"])
    assert slice_metrics(values, [0.5, 3], (0, 1.5), labels=["few", "many"])["slice"].to_list() == ["few", "many"]


def test_significance_needs_no_torch():
    code = "import sys; import l2rec.evaluation.significance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
