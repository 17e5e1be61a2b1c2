"""Diagnostics of semantic ids: counts by hand, the adjusted mutual information against its definition, bad input."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from l2rec.data.dataset import DataError
from l2rec.hisam.diagnostics import disentanglement, neighbours, reconstruction_by_level, usage
from l2rec.hisam.flat_tokenizers import make_tokenizer
from l2rec.hisam.tokenizer import SemanticIds

CODES = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 2], [2, 1, 2], [2, 1, 2]])
IDS = SemanticIds(np.array([10, 11, 12, 13, 14]), CODES, (4, 2, 3), ("shared_1", "shared_2", "text_1"))


def test_usage_by_hand():
    table = usage(IDS)
    assert table["level"].to_list() == ["shared_1", "shared_2", "text_1"] and table["codewords"].to_list() == [4, 2, 2] and table["without"].to_list() == [0, 0, 3]
    assert table["utilisation"].to_list() == [.5, 1, 1] and table["most_used"].to_list() == [.6, .6, .2]
    assert table["perplexity"][0] == pytest.approx(math.exp(-.6 * math.log(.6) - .4 * math.log(.4))) and table["perplexity"][2] == pytest.approx(2)
    assert table["collisions"].to_list() == [1., .8, .4]
    assert usage(IDS, (4, 2, 3))["utilisation"][2] == 1 and usage(IDS, (4, 2, 3))["without"].to_list() == [0, 0, 0]


def test_neighbours_by_prefix_then_by_levels_then_by_row():
    codes = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    ids = SemanticIds(np.arange(6) + 1, codes, (2, 2, 2), ("a", "b", "c"))
    table = neighbours(ids, list("uvwxyz"), 1, n=4)
    assert table["title"].to_list() == ["u", "z", "y", "w", "x"] and table["shared_prefix"].to_list() == [3, 3, 2, 1, 1] and table["shared_levels"].to_list() == [3, 3, 2, 2, 1]
    assert neighbours(ids, list("uvwxyz"), 6, n=1)["item_id"].to_list() == [6, 1] and len(neighbours(ids, list("uvwxyz"), 2, n=100)) == 6
    with pytest.raises(DataError, match="item 9 has no semantic id"): neighbours(ids, list("uvwxyz"), 9)
    with pytest.raises(DataError, match="2 titles.*6 items"): neighbours(ids, ["u", "v"], 1)


def test_disentanglement_against_chance_by_shuffling():
    """(MI - E MI) / (mean entropy - E MI), with the expectation by shuffling labels."""
    g = np.random.default_rng(0)
    codes = g.integers(6, size=(150, 1))
    labels = np.where(g.random(150) < .6, codes[:, 0] % 3, g.integers(3, size=150))

    def entropy(x): return -(p := np.unique(x, return_counts=True)[1] / len(x)) @ np.log(p)
    def information(a, b): return entropy(a) + entropy(b) - entropy(a * 100 + b)
    chance = np.mean([information(codes[:, 0], g.permutation(labels)) for _ in range(600)])
    expected = (information(codes[:, 0], labels) - chance) / ((entropy(codes[:, 0]) + entropy(labels)) / 2 - chance)
    table = disentanglement(SemanticIds(np.arange(150), codes, (6,), ("shared_1",)), {"topic": labels, "own": codes[:, 0], "noise": g.integers(3, size=150)})
    assert table["ami"][0] == pytest.approx(expected, abs=.01) and table["ami"][1] == pytest.approx(1) and abs(table["ami"][2]) < .05
    assert table.columns == ["level", "factor", "ami"]


def test_disentanglement_among_some_and_bad_labels():
    among = np.array([True, True, True, False, False])
    assert disentanglement(IDS, {"f": np.array([0, 0, 1, 5, 6])}, among)["ami"][1] == pytest.approx(1)
    with pytest.raises(DataError, match="factor f: 2 labels.*5 items"): disentanglement(IDS, {"f": np.zeros(2)})


def test_reconstruction_by_level_counts_what_is_left():
    g = np.random.default_rng(0)
    values = {"text": g.standard_normal((80, 6)).astype(np.float32), "image": g.standard_normal((80, 9)).astype(np.float32)}
    present = {"text": np.ones(80, bool), "image": g.random(80) < .8}
    values["image"][~present["image"]] = 0
    for m, v in values.items(): v[present[m]] -= v[present[m]].mean(0)
    modalities = SimpleNamespace(names=("text", "image"), values=values, present=present, sha256="")
    tokenizer = make_tokenizer("rq-kmeans", modalities, size=8, width=15, levels=3)
    tokenizer.fit(modalities)
    codes = tokenizer.encode(modalities)
    table = reconstruction_by_level(tokenizer, modalities, codes)
    assert table["level"].to_list() == ["none", "flat_1", "flat_2", "flat_3"] and table.row(0)[1:] == pytest.approx((1., 1.))
    assert all(table[m][3] < table[m][1] < 1 for m in values)
    guess = tokenizer.reconstruct(codes, 2)["image"].numpy()[present["image"]]
    assert table["image"][2] == pytest.approx(((guess - values["image"][present["image"]]) ** 2).sum() / (values["image"] ** 2).sum(), rel=1e-5)
