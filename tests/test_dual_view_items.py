"""The item side of L2Rec: texts and rows, axes against an eigendecomposition written out, head and losses against slow float64 ones."""

import dataclasses
import math

import numpy as np
import polars as pl
import pytest
import torch

from l2rec.data.dataset import DataError, make_dataset
from l2rec.data.splits import leave_last_out
from l2rec.dual_view.items import COLDEST, ItemHead, ItemIds, ItemTexts, axes, beside_prior, cosine_in_batch, cosine_softmax, inverse_temperature, learned_temperature, make_item_texts, popularity_prior, word_vectors
from worlds import table


def texts(n=30, d=12, missing=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g) * torch.linspace(3, .1, d)[:, None]
    vectors = torch.randn(n, d, generator=g) @ mix + torch.randn(d, generator=g) * 5
    known = torch.ones(n, dtype=torch.bool)
    known[list(missing)] = False
    vectors[~known] = 0
    return ItemTexts([f"item {i}" if known[i] else "" for i in range(n)], vectors, known)


@pytest.fixture(scope="module")
def shop():
    items = pl.DataFrame({"item_id": [2, 4, 5, 9], "title": ["Nitrile gloves", "Digital caliper", None, "Never bought"], "categories": [["Lab"], ["Tools", "Measuring"], [], ["Other"]],
                          "text": ["Nitrile gloves, box of 100.", None, None, "A thing."]}, schema_overrides={"item_id": pl.Int32})
    return make_dataset("shop", table({0: [5, 4, 2], 1: [2, 5, 4, 4]}), items)


# --- texts ------------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_split(shop):
    split = leave_last_out(shop)
    items = make_item_texts(shop, split)
    assert split.item_id.tolist() == [2, 4, 5] and items.texts == ["Lab. Nitrile gloves, box of 100.", "Digital caliper. Tools, Measuring.", ""]
    assert items.known.tolist() == [True, True, False] and items.vectors[2].eq(0).all() and torch.allclose(items.vectors[:2].norm(dim=1), torch.ones(2), atol=1e-5)
    assert len(items) == 3 and items.width == 384 and items.vectors.dtype == torch.float32
    items.check_belongs(split)


def test_columns_choose_what_is_read(shop):
    split = leave_last_out(shop)
    short = make_item_texts(shop, split, columns=["title"])
    assert short.texts == ["Nitrile gloves.", "Digital caliper.", ""] and short.sha256 != make_item_texts(shop, split).sha256
    assert short.sha256 == make_item_texts(shop, split, columns=["title"]).sha256 and len(short.sha256) == 64


def test_clear_errors_about_texts(shop):
    split = leave_last_out(shop)
    with pytest.raises(DataError, match="did you mean 'title'"): make_item_texts(shop, split, columns=["titel"])
    bare = make_dataset("bare", table({0: [5, 4, 2]}), pl.DataFrame({"item_id": [2, 4, 5], "title": [None, "", "  "]}, schema_overrides={"item_id": pl.Int32, "title": pl.String}))
    with pytest.raises(DataError, match="no item of the split has a text"): make_item_texts(bare, leave_last_out(bare))
    with pytest.raises(DataError, match="no item of the split has a text"): make_item_texts(shop, split, columns=[])
    with pytest.raises(DataError, match="another catalogue"): make_item_texts(shop, split).check_belongs(dataclasses.replace(split, item_id=split.item_id + 1))
    with pytest.raises(DataError, match="another catalogue"): texts(4).check_belongs(split)
    texts(3).check_belongs(split)                                    # ids unknown: only the number can be checked
    with pytest.raises(DataError, match="no item has a text"): ItemTexts(["", ""], torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(DataError, match="2 texts, 3 vectors"): ItemTexts(["a", "b"], torch.zeros(3, 3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(DataError, match="row 1 is not finite"): ItemTexts(["a", "b"], torch.tensor([[0., 1.], [0., torch.nan]]), torch.ones(2, dtype=torch.bool))


def test_the_digest_knows_texts_and_vectors():
    one = texts()
    vectors = one.vectors.clone()
    vectors[3, 0] += 1e-3
    other = ["item 0!"] + one.texts[1:]
    assert len({one.sha256, ItemTexts(other, one.vectors, one.known).sha256, ItemTexts(one.texts, vectors, one.known).sha256}) == 3


# --- axes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0., .5, 1.])
def test_axes_against_numpy(power):
    items = texts(40, 10, missing=(3, 8))
    mean, turn = axes(items.vectors, items.known, power)
    x = items.vectors.double().numpy()[items.known.numpy()]
    centred = x - x.mean(0)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    slow = centred @ vt.T * (s / np.sqrt(len(x))) ** -power
    slow /= np.sqrt((slow ** 2).mean())
    fast = ((items.vectors - mean) @ turn)[items.known].double().numpy()
    assert np.abs(np.abs(fast) - np.abs(slow)).max() < 1e-4          # an axis may point either way
    assert abs((fast ** 2).mean() - 1) < 1e-4


def test_whitened_axes_are_equally_loud_and_power_zero_keeps_angles():
    items = texts(200, 6)
    white = (items.vectors - axes(items.vectors, items.known, 1.)[0]) @ axes(items.vectors, items.known, 1.)[1]
    assert torch.allclose(white.T @ white / 200, torch.eye(6), atol=1e-3)
    mean, turn = axes(items.vectors, items.known, 0.)
    gram = turn.T @ turn
    assert torch.allclose(gram, torch.eye(6) * gram[0, 0], atol=1e-4)
    with pytest.raises(ValueError, match="whiten=1.5"): axes(items.vectors, items.known, 1.5)


@pytest.mark.parametrize("power", [0., .5, 1.])
def test_few_items_and_silent_axes(power):
    few = texts(4, 12)                                               # fewer items than columns
    assert torch.isfinite(axes(few.vectors, few.known, power)[1]).all()
    x = (few.vectors - axes(few.vectors, few.known, power)[0]) @ axes(few.vectors, few.known, power)[1]
    assert x.abs().max() < 20 and abs(x.square().mean() - 1) < 1e-3
    one = ItemTexts(["a"], torch.randn(1, 5), torch.tensor([True]))
    head = ItemHead(one, 3, whiten=power)
    assert head.text.eq(0).all() and torch.equal(head.vectors()[0], head.linear.bias)


# --- words ------------------------------------------------------------------------------------------------------------------

BOX = "glove box nitrile caliper steel tape glue gel strip test scale gram".split()


def worded(n=40, missing=(), seed=0):
    rng = np.random.default_rng(seed)
    lines = ["" if i in missing else ", ".join(rng.choice(BOX, rng.integers(2, 9))).title() + f" once{i}" for i in range(n)]
    return ItemTexts(lines, torch.from_numpy(rng.standard_normal((n, 6)).astype(np.float32)) * torch.tensor([[bool(line)] for line in lines]), torch.tensor([bool(line) for line in lines]))


def slow_words(texts, width):
    "Cosines of all pairs from the definition in float64, [I, I]."
    counts = [{w: line.lower().replace(",", "").split().count(w) for w in set(line.lower().replace(",", "").split())} for line in texts]
    have = {w: sum(w in c for c in counts) for c in counts for w in c}
    kept = sorted(w for w, n in have.items() if n >= 2)
    table = np.array([[(1 + np.log(c[w])) * (1 + np.log((1 + len(texts)) / (1 + have[w]))) if w in c else 0. for w in kept] for c in counts])
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    u, s, _ = np.linalg.svd(unit(table), full_matrices=False)
    x = unit(u[:, :width] * s[:width])
    return x @ x.T, len(kept)


@pytest.mark.parametrize("width", [1, 5, 11])
def test_words_against_their_definition(width):
    items = worded(missing=(4,))
    x, (cosines, kept) = word_vectors(tuple(items.texts), width), slow_words(items.texts, width)
    assert x.shape == (40, width) and x.dtype == torch.float32 and kept == 12          # what stands in one text alone does not count
    assert np.abs((x @ x.T).numpy() - cosines).max() < 1e-5
    assert x[4].eq(0).all() and torch.allclose(x[items.known].norm(dim=1), torch.ones(39), atol=1e-5)


def test_words_that_cannot_be_had_are_told():
    with pytest.raises(ValueError, match="words=12: below 12, as there are 40 texts and 12 words"): word_vectors(tuple(worded().texts), 12)
    with pytest.raises(ValueError, match="words=0: at least 1"): word_vectors(tuple(worded().texts), 0)
    with pytest.raises(ValueError, match="no word stands in two of the 2 texts; use words=0"): word_vectors(("a thing", "another"), 1)
    with pytest.raises(ValueError, match="words=50"): ItemHead(worded(), words=50)


@pytest.mark.parametrize("hidden", [None, 7])
def test_a_head_with_words_is_the_head_of_vectors_and_words(hidden):
    items = worded(missing=(2, 5))
    together = dataclasses.replace(items, vectors=torch.cat([torch.nn.functional.normalize(items.vectors, dim=1), word_vectors(tuple(items.texts), 5)], 1), sha256="")
    torch.manual_seed(0)
    plain = ItemHead(together, 8, hidden)
    torch.manual_seed(0)
    head = ItemHead(items, 8, hidden, words=5)
    assert head.vectors().equal(plain.vectors()) and head.width == 8 and ItemHead(items, words=5).width == items.width
    index = torch.tensor([[0, 2], [7, 5]])
    assert torch.allclose(head.rows(index, 3 * items.vectors[index]), head.rows(index), atol=1e-5)       # a length says nothing
    with pytest.raises(ValueError, match="words: a text vector alone"): head.read(items.vectors[:1])
    assert head.to(torch.bfloat16).vectors().dtype == torch.bfloat16


@pytest.mark.parametrize("words", [0, 5])
def test_axes_that_point_the_other_way_elsewhere(words, monkeypatch):
    "Another machine may find each axis with the other sign; what was trained on these is put on these."
    items = worded(missing=(3,))
    head = ItemHead(items, 6, hidden=7, words=words).eval()
    found = axes(items.vectors, items.known, .5)
    monkeypatch.setattr("l2rec.dual_view.items.axes", lambda *args: (lambda mean, turn: (mean, -turn))(*axes(*args)))
    there = ItemHead(items, 6, hidden=7, words=words).eval()
    there.load_state_dict(head.state_dict())
    assert words or there.turn.equal(found[1])
    assert not torch.allclose(there.vectors(), head.vectors(), atol=.1)
    there.place(items)
    assert torch.allclose(there.vectors(), head.vectors(), atol=1e-6)


# --- head -------------------------------------------------------------------------------------------------------------------


def slow_vector(head, items, i):
    "One item's vector in float64, from the definition."
    w = {k: v.detach().double().numpy() for k, v in [*head.named_parameters(), *head.named_buffers()]}
    x = (items.vectors[i].double().numpy() - w["mean"]) @ w["turn"] if items.known[i] else w["no_text"]
    out = w["linear.weight"] @ x + w["linear.bias"]
    if head.network is not None:
        a = w["network.0.weight"] @ x + w["network.0.bias"]
        gelu = np.array([v * .5 * (1 + float(torch.erf(torch.tensor(v / 2 ** .5, dtype=torch.float64)))) for v in a])
        out = out + w["network.2.weight"] @ gelu + w["network.2.bias"]
    return out if head.id is None else out + w["id.weight"][i]


@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("ids", [False, True])
def test_head_against_its_definition(hidden, ids):
    torch.manual_seed(1)
    items = texts(15, 8, missing=(2, 5))
    head = ItemHead(items, 6, hidden=hidden, ids=ids).eval()
    torch.nn.init.normal_(head.no_text)
    every = head.vectors().detach().double().numpy()
    assert every.shape == (15, 6) and max(np.abs(every[i] - slow_vector(head, items, i)).max() for i in range(15)) < 1e-4
    index = torch.tensor([[3, 2], [14, 3]])
    assert torch.allclose(head.rows(index), head.vectors()[index], atol=1e-6)


def test_items_without_text_share_one_learned_vector():
    items = texts(10, 8, missing=(2, 5))
    head, transductive = ItemHead(items, 6), ItemHead(items, 6, ids=True)
    assert torch.equal(*head.rows(torch.tensor([2, 5]))) and torch.equal(head.rows(torch.tensor(2)), head.linear.bias)
    head.rows(torch.tensor([2])).sum().backward()
    assert head.no_text.grad.abs().sum() > 0
    assert not torch.equal(*transductive.rows(torch.tensor([2, 5])))


def test_ids_start_small_and_are_all_that_is_added():
    items = texts(200, 16)
    torch.manual_seed(0)
    inductive = ItemHead(items, 8)
    torch.manual_seed(0)
    transductive = ItemHead(items, 8, ids=True)
    added = (transductive.vectors() - inductive.vectors()).detach()
    assert torch.allclose(added, transductive.id.weight, atol=1e-6) and .015 < added.std() < .025
    assert {n for n, _ in transductive.named_parameters()} - {n for n, _ in inductive.named_parameters()} == {"id.weight"}


def test_ids_of_their_own_are_the_ids_alone():
    torch.manual_seed(0)
    ids = ItemIds(200, 8)
    assert len(ids) == 200 and ids.width == 8 and set(ids.state_dict()) == {"id.weight"} and .015 < ids.vectors().std() < .025
    index = torch.tensor([[3, 199], [0, 3]])
    assert ids.rows(index).equal(ids.vectors()[index]) and ids.rows(index).shape == (2, 2, 8)
    ids.rows(index[0]).sum().backward()
    assert ids.id.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [3, 199]
    with pytest.raises(ValueError, match="width=0: at least 1"): ItemIds(200, 0)


def test_vectors_of_a_learning_encoder_go_the_same_way():
    items = texts(12, 8, missing=(4,))
    head = ItemHead(items, 5, hidden=6)
    index = torch.tensor([0, 4, 7])
    assert torch.allclose(head.rows(index, items.vectors[index]), head.rows(index), atol=1e-5)
    raw = items.vectors[index].clone().requires_grad_()
    head.rows(index, raw).square().sum().backward()
    assert raw.grad[0].abs().sum() > 0 and raw.grad[1].abs().sum() == 0          # an item without text reads nothing


def test_head_defaults_dropout_and_state():
    items = texts(12, 8)
    head = ItemHead(items, dropout=.5)
    assert head.width == 8 and head.source == items.sha256
    assert not torch.equal(head.vectors(), head.vectors()) and torch.equal(head.eval().vectors(), head.vectors())
    assert set(head.state_dict()) == {"no_text", "mean", "turn", "linear.weight", "linear.bias"}
    low = head.to(torch.bfloat16).vectors()
    assert low.dtype == torch.bfloat16 and low.isfinite().all()
    for wrong in (dict(width=0), dict(hidden=0), dict(dropout=1.), dict(whiten=-1.), dict(ids="apart")):
        with pytest.raises(ValueError): ItemHead(items, **wrong)


# --- losses -----------------------------------------------------------------------------------------------------------------


def slow_loss(users, items, tau, target):
    unit = lambda x: x.double() / x.double().norm(dim=1, keepdim=True)
    return torch.nn.functional.cross_entropy(unit(users) @ unit(items).T / tau, target)


def leaves(*shapes, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(s).requires_grad_() for s in shapes]


def test_cosine_softmax_against_float64():
    users, items = leaves((9, 5), (20, 5))
    log_tau = learned_temperature(.3)
    target = torch.randint(20, (9,))
    value = cosine_softmax(users, items, log_tau, target)
    got = torch.autograd.grad(value, (users, items, log_tau))
    slow = slow_loss(users, items, log_tau.double().exp(), target)
    want = torch.autograd.grad(slow, (users, items, log_tau))
    assert abs(value - slow) < 1e-5 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))


def test_only_items_among_compete():
    users, items = leaves((9, 5), (20, 5))
    among = torch.arange(20) % 3 > 0
    target = torch.tensor([1, 2, 4, 4, 19, 7, 8, 10, 11])
    tau = torch.tensor(.3).log()
    rows = among.nonzero().flatten()
    slow = slow_loss(users, items[rows], .3, torch.tensor([rows.tolist().index(t) for t in target.tolist()]))
    value = cosine_softmax(users, items, tau, target, among)
    grad, = torch.autograd.grad(value, items)
    assert abs(value - slow) < 1e-5 and grad[~among].eq(0).all() and grad[among].abs().amax(1).min() > 0
    with pytest.raises(ValueError, match="not among"): cosine_softmax(users, items, tau, target - 1, among)


def test_a_prior_stands_beside_the_cosine():
    users, items = leaves((9, 5), (20, 5))
    log_tau, among, counts = learned_temperature(.3), torch.arange(20) % 3 > 0, torch.arange(20) ** 2
    target, prior = torch.tensor([1, 2, 4, 4, 19, 7, 8, 10, 11]), popularity_prior(counts, .7)
    assert [prior[n].item() for n in (1, 19)] == pytest.approx([.7 * math.log(2), .7 * math.log(362)])
    unit, rows = lambda x: x.double() / x.double().norm(dim=1, keepdim=True), among.nonzero().flatten().tolist()
    assert prior[0].item() == pytest.approx(prior[1:].mean().item())                            # of a new item nothing is known
    logits = unit(users) @ unit(items).T / log_tau.double().exp() + torch.cat([prior[:1].double(), .7 * torch.log(1 + counts[1:].double())])
    slow = -torch.stack([logits[k, t] - logits[k, rows].logsumexp(0) for k, t in enumerate(target.tolist())]).mean()
    value = cosine_softmax(users, items, log_tau, target, among, prior)
    got, want = (torch.autograd.grad(v, (users, items, log_tau)) for v in (value, slow))
    assert abs(value - slow) < 1e-5 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))
    tau = log_tau.detach().exp()
    scores = beside_prior(unit(users).float(), tau) @ beside_prior(unit(items).float(), prior).T
    assert torch.allclose(scores / tau, logits.float(), atol=1e-4)


def test_no_prior_is_nothing_at_all():
    users, items = leaves((4, 5), (6, 5))
    assert not popularity_prior(torch.zeros(3), 1.).any() and popularity_prior(torch.arange(6), 0.) is None and beside_prior(users, None) is users
    with pytest.raises(ValueError, match="prior=-0.1: at least 0"): popularity_prior(torch.arange(6), -.1)


def test_temperature_has_a_floor():
    users, items = leaves((4, 5), (6, 5))
    target = torch.arange(4)
    cold = torch.tensor(-20., requires_grad=True)
    value = cosine_softmax(users, items, cold, target)
    assert abs(value - slow_loss(users, items, COLDEST, target)) < 1e-3 and value.isfinite()
    assert inverse_temperature(cold).item() == pytest.approx(1 / COLDEST)
    for wrong in (0., -1.):
        with pytest.raises(ValueError, match="temperature"): learned_temperature(wrong)
    with pytest.raises(ValueError, match="no positions"): cosine_softmax(users[:0], items, cold, target[:0])


def test_in_batch_counts_each_distinct_target_once():
    users, vectors = leaves((7, 5), (30, 5))
    target = torch.tensor([4, 20, 4, 9, 9, 4, 0])
    tau = torch.tensor(.2).log()
    distinct = [0, 4, 9, 20]
    slow = slow_loss(users, vectors[distinct], .2, torch.tensor([distinct.index(t) for t in target.tolist()]))
    value = cosine_in_batch(users, vectors[target], tau, target)
    assert abs(value - slow) < 1e-5
    got, want = (torch.autograd.grad(v, (users, vectors)) for v in (value, slow))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))
    order = torch.tensor([6, 2, 0, 1, 5, 3, 4])
    assert torch.allclose(cosine_in_batch(users[order], vectors[target[order]], tau, target[order]), value, atol=1e-6)


def test_all_the_same_target_is_no_question():
    users, vector = leaves((5, 4), (1, 4))
    log_tau = learned_temperature(.07)
    value = cosine_in_batch(users, vector.expand(5, -1), log_tau, torch.full((5,), 3))
    value.backward()
    assert value == 0 and users.grad.abs().max() == 0 and vector.grad.abs().max() == 0 and log_tau.grad == 0


def test_a_catalogue_of_one_item():
    one = ItemTexts(["a"], torch.randn(1, 5), torch.tensor([True]))
    head, users = ItemHead(one, 4, ids=True), torch.randn(3, 4)
    assert cosine_softmax(users, head.vectors(), learned_temperature(.07), torch.zeros(3, dtype=torch.long)) == 0
