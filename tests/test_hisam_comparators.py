"""HSTU and the ranking network on pieces against slow passes a question, and the pieces against their definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, layer_norm, silu

from l2rec.baselines.factors import factorise
from l2rec.baselines.like_rate import training_answers
from l2rec.data.batches import ClickData
from l2rec.data.dataset import DataError
from l2rec.data.splits import leave_last_fraction
from l2rec.hisam.comparators import AnswerRate, BothRates, FoldedFactors, HSTUClicks, ItemRate, KnownFactors, SemanticMLP, ngram_pieces, unigram_pieces
from l2rec.hisam.histories import Histories, HistoryData, HistoryModule, HistoryWindows, as_histories
from l2rec.hisam.tokenizer import SemanticIds
from l2rec.hisam.transformer import FeatureTransformer, HiSAM, IdTransformer, ItemSide, SemanticTransformer, forgetful
from l2rec.training.contracts import build
from l2rec.training.modules import fit
from test_hisam_transformer import ids, modalities
from worlds import random_dataset

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def split(): return leave_last_fraction(random_dataset(), .2, .2)


def made(split, cls, **more):
    model = build(cls, split, 0, **{**dict(items=ItemSide(ids(split)), width=16, max_length=6), **more}).double().eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .4)
    return model


def one_by_one(batch, answer):
    out = []
    for at, row in zip(batch.asked.tolist(), batch.row.tolist()):
        part = slice(int(batch.offsets[row]), at + 1)
        out.append(answer(batch.item[part].tolist(), batch.feedback[part].tolist(), batch.gap[part].tolist()))
    return torch.stack(out)


def slow_hstu(model, items, feedback, gaps):
    n = len(items)
    x = torch.stack([model.item.weight[i] + model.gap.weight[g] + model.feedback.weight[2 if k == n - 1 else int(f)] for k, (i, f, g) in enumerate(zip(items, feedback, gaps))])
    for layer in model.layers:
        u, v, q, k = silu(layer_norm(x, x.shape[-1:], layer.norm.weight, layer.norm.bias) @ layer.mix.weight.T + layer.mix.bias).chunk(4, -1)
        v, q, k = (y.unflatten(-1, (layer.heads, -1)) for y in (v, q, k))
        out = torch.zeros_like(v)
        for i in range(n):
            for j in range(i + 1):
                for h in range(layer.heads): out[i, h] += silu(q[i, h] @ k[j, h] + layer.bias[h, i - j]) / layer.size * v[j, h]
        av = layer_norm(out.flatten(1), x.shape[-1:], layer.norm_out.weight, layer.norm_out.bias, 1e-6)
        x = x + (av * u) @ layer.out.weight.T + layer.out.bias
    return model.head(x[-1])[0]


def slow_mlp(model, items, feedback, gaps):
    vector = lambda i: model.table.weight[model.pieces[model.offsets[i]:model.offsets[i + 1]]].mean(0) + (0 if model.item_id is None else model.item_id.weight[i])
    candidate, inputs = vector(items[-1]), []
    for sign in (1, 0):
        mine = [vector(i) for i, f in zip(items[:-1], feedback[:-1]) if f == sign]
        mean = torch.stack(mine).mean(0) if mine else torch.zeros_like(candidate)
        inputs += [mean, mean * candidate, torch.tensor([len(mine)]).double().log1p()]
    x = torch.cat([candidate + model.gap.weight[gaps[-1]], *inputs])
    for layer in model.network:
        if isinstance(layer, torch.nn.Linear): x = x @ layer.weight.T + layer.bias
        elif isinstance(layer, torch.nn.GELU): x = gelu(x, approximate="tanh")
    return x[0]


@pytest.mark.parametrize("cls, slow, more", [(HSTUClicks, slow_hstu, dict(heads=2)), (HSTUClicks, slow_hstu, dict(heads=1, layers=1)), (HSTUClicks, slow_hstu, dict(heads=4, layers=3)),
                                             (SemanticMLP, slow_mlp, dict(pieces="ngram")), (SemanticMLP, slow_mlp, dict(vocabulary=40)), (SemanticMLP, slow_mlp, dict(vocabulary=40, item_id=True))])
@pytest.mark.parametrize("part", ["train", "test"])
@torch.no_grad()
def test_windows_are_single_questions(split, cls, slow, more, part):
    model = made(split, cls, **more)
    batch = HistoryWindows(split, part, max_length=6)[np.arange(8)]
    assert torch.allclose(model(batch), one_by_one(batch, lambda *q: slow(model, *q)), atol=1e-9)
    clicks = next(iter(ClickData(split, 5, max_length=9).train_dataloader()))
    assert torch.allclose(model(clicks), one_by_one(as_histories(clicks, 6), lambda *q: slow(model, *q)), atol=1e-9)


@pytest.mark.parametrize("cls, more", [(HSTUClicks, dict(heads=2)), (SemanticMLP, dict(pieces="ngram"))])
def test_they_learn_and_refuse_longer_windows(split, cls, more):
    model, data = build(cls, split, 0, items=ItemSide(ids(split)), width=8, max_length=6, **more), HistoryData(split, 64, max_length=6)
    history = fit(HistoryModule(model, data, lr=.01), data, max_epochs=4, monitor="validation/auc", progress=False).history
    assert history["loss"][-1] < history["loss"][0]
    with pytest.raises(ValueError, match="max_length=6"): model(HistoryWindows(split, "train", max_length=12)[np.arange(len(HistoryWindows(split, "train", max_length=12)))])
    model.zero_grad()
    model.loss(HistoryWindows(split, "train", max_length=6)[np.arange(9)])[0].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("longest", [1, 2, 3, 9])
def test_ngrams_are_runs_of_codes_at_their_levels(longest):
    codes = np.random.default_rng(0).integers(0, 3, (40, 3))
    pieces, n = ngram_pieces(codes, longest)
    runs = [(a, b) for b_a in range(1, min(longest, 3) + 1) for a in range(3 - b_a + 1) for b in [a + b_a]]
    assert pieces.shape == (40, len(runs)) and set(pieces.ravel()) == set(range(n))
    for c, (a, b) in enumerate(runs):
        for i in range(40):
            for j in range(i): assert (pieces[i, c] == pieces[j, c]) == np.array_equal(codes[i, a:b], codes[j, a:b])


def test_unigram_pieces_spell_their_items_and_popular_items_get_pieces_of_their_own():
    codes = np.random.default_rng(0).integers(0, 6, (200, 4))
    counts = np.where(np.arange(200) < 10, 5_000, 1)
    pieces, offsets, n = unigram_pieces(codes, (6, 6, 6, 6), counts, 60)
    assert len(offsets) == 201 and offsets[-1] == len(pieces) and pieces.max() < n <= 60 and np.diff(offsets).min() >= 1 and np.diff(offsets).max() <= 4
    assert np.diff(offsets)[:10].mean() < np.diff(offsets)[10:].mean()
    same = unigram_pieces(codes, (6, 6, 6, 6), counts, 60)
    assert np.array_equal(pieces, same[0]) and np.array_equal(offsets, same[1])
    words = {tuple(c): tuple(pieces[a:b]) for c, a, b in zip(codes.tolist(), offsets, offsets[1:])}
    assert len(set(words.values())) == len(words)                                       # different codes, different pieces
    with pytest.raises(ValueError, match="vocabulary=20"): unigram_pieces(codes, (6,) * 4, counts, 20)


def test_pieces_and_model_are_the_same_in_every_call(split):
    """The trainer numbers equally scored pieces at random; enough of them that five calls would hardly agree by chance."""
    g = np.random.default_rng(0)
    codes, counts = g.integers(0, 64, (1_000, 4)), g.integers(0, 9, 1_000)
    first, *others = [unigram_pieces(codes, (64,) * 4, counts, 400) for _ in range(5)]
    for other in others: assert all(np.array_equal(a, b) for a, b in zip(first, other))
    one, two = (made(split, SemanticMLP, vocabulary=40) for _ in range(2))
    assert one.source == two.source and all(torch.equal(a, b) for a, b in zip(one.vectors(), two.vectors()))
    assert len({one.source, made(split, SemanticMLP, pieces="ngram").source, made(split, SemanticMLP, pieces="ngram", ngrams=1).source, ids(split).sha256}) == 4


@pytest.mark.parametrize("cls, more", [(HSTUClicks, dict(heads=2)), (SemanticMLP, dict(pieces="ngram")), (SemanticMLP, dict(vocabulary=40))])
@torch.no_grad()
def test_not_a_bit_of_an_answer_reaches_its_own_question(split, cls, more):
    """In float32, where a sum that takes the own part off again would keep its rounding."""
    model = made(split, cls, max_length=30, **more).float()
    batch = HistoryWindows(split, "train", max_length=30)[np.arange(12)]
    logits, changed = model(batch), 0
    for at in range(len(batch.item)):
        other = replace(batch, feedback=batch.feedback.clone())
        other.feedback[at] = 1 - other.feedback[at]
        after, end = model(other), int(batch.offsets[torch.searchsorted(batch.offsets, at, right=True)])
        assert torch.equal(after[:at + 1], logits[:at + 1]) and torch.equal(after[end:], logits[end:])
        changed += not torch.equal(after[at + 1:end], logits[at + 1:end])
    assert changed > len(batch.item) / 2


def test_bad_input(split):
    with pytest.raises(ValueError, match="pieces='bpe'"): made(split, SemanticMLP, pieces="bpe")
    with pytest.raises(ValueError, match="semantic ids, and there are none"): made(split, SemanticMLP, items=ItemSide())
    other = ids(split)
    with pytest.raises(DataError, match="do not belong"): made(split, SemanticMLP, items=ItemSide(SemanticIds(other.item_id + 1, other.codes, other.sizes, other.names)))
    with pytest.raises(ValueError, match="heads"): made(split, HSTUClicks, heads=3)
    with pytest.raises(ValueError, match="max_length=0"): made(split, HSTUClicks, max_length=0)
    with pytest.raises(ValueError, match="hidden"): made(split, SemanticMLP, hidden=(), vocabulary=40)


@pytest.mark.parametrize("cls", [HSTUClicks, SemanticMLP, HiSAM, IdTransformer, SemanticTransformer])
def test_frozen_questions_read_the_history_before_the_part_alone(split, cls):
    split = replace(split, timestamp=None)               # click batches carry no times
    model = made(split, cls)
    data, alone = HistoryData(split, positions=64, max_length=6), ClickData(split, batch_size=13, max_length=6)
    data.frozen = alone.frozen = True
    def logits(loader): return {(int(u), int(c)): float(z) for batch in loader for u, c, z in zip(batch.user, batch.candidate, model(batch).detach())}
    got, want = logits(data.test_dataloader()), logits(alone.test_dataloader())
    assert got.keys() == want.keys() and max(abs(got[k] - want[k]) for k in got) < 1e-10
    rating = split.rating.copy()
    for u, n in enumerate(split.valid_end): rating[n:split.offsets[u + 1]] = 6 - rating[n:split.offsets[u + 1]]
    other = HistoryData(replace(split, rating=rating), positions=64, max_length=6)
    other.frozen = True
    assert logits(other.test_dataloader()) == got        # no answer of the test is read
    other.frozen = False
    assert logits(other.test_dataloader()) != logits(HistoryData(split, positions=64, max_length=6).test_dataloader())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("cls, item, answers", [(ItemRate, True, False), (AnswerRate, False, True), (BothRates, True, True)])
def test_floors_count(split, cls, item, answers, frozen):
    model = build(cls, split, 0, item=7., answers=3., max_length=6).double()
    assert not list(model.parameters())
    label = split.rating > 3
    train = [(int(split.items[n]), bool(label[n])) for a, b in zip(split.offsets, split.train_end) for n in range(a, b)]
    mean, logit = np.mean([y for _, y in train]), lambda p: np.log(p / (1 - p))
    data, got, want = HistoryData(split, positions=64, max_length=6, questions=1), [], []
    data.frozen = frozen
    for batch in data.test_dataloader(): got += zip(batch.user.tolist(), batch.candidate.tolist(), model(batch).tolist())
    for u in range(split.n_users):
        for n in range(split.valid_end[u], split.offsets[u + 1]):
            until = split.valid_end[u] if frozen else n
            past, of_item = label[max(split.offsets[u], until - 6):until], [y for j, y in train if j == split.items[n]]
            logits = [logit((sum(of_item) + 7 * mean) / (len(of_item) + 7))] * item + [logit((past.sum() + 3 * mean) / (len(past) + 3))] * answers
            want.append((u, int(split.items[n]), sum(logits) - logit(mean) * (len(logits) - 1)))
    np.testing.assert_allclose(sorted(got), sorted(want), atol=1e-5)
    with pytest.raises(ValueError, match="all .* training labels are 1"): build(cls, replace(split, rating=np.full_like(split.rating, 5)), 0)


def test_forgetful_questions_see_any_number_of_their_oldest_items(split):
    torch.manual_seed(0)
    windows = HistoryWindows(split, "train", 6)
    batch = windows[np.arange(len(windows))]
    before = batch.asked - batch.offsets[batch.row]
    draws = torch.stack([forgetful(batch, .5).seen for _ in range(400)])
    assert (draws >= 0).all() and (draws <= before).all() and torch.equal(forgetful(batch, 0.).seen, before)
    for n in before.unique().tolist():
        kept = (draws[:, before == n] == n).double().mean().item()
        assert abs(kept - (.5 + .5 / (n + 1))) < .05                # left alone, or drawn as any length is
        if n: assert (draws[:, before == n] == 0).double().mean().item() == pytest.approx(.5 / (n + 1), abs=.05)
    again = forgetful(forgetful(batch, 1.), 1.)                     # what is hidden stays hidden
    few = replace(batch, seen=torch.zeros_like(before))
    assert not forgetful(few, 1.).seen.any() and (again.seen <= before).all()


@pytest.mark.parametrize("cls", [HSTUClicks, SemanticMLP, HiSAM, IdTransformer, SemanticTransformer, FeatureTransformer])
def test_forgetful_training(split, cls, monkeypatch):
    side = dict(items=ItemSide(modalities=modalities(split))) if cls is FeatureTransformer else {}
    model = made(split, cls, forget=.7, dropout=0., **side)
    windows = HistoryWindows(split, "train", 6)
    batch = windows[np.arange(5)]
    plain = model(batch)
    assert model.forget == .7 and torch.equal(plain, model(batch))                          # in evaluation nothing is forgotten
    model.train()
    torch.manual_seed(1)
    shorter = model(batch)
    torch.manual_seed(1)
    seen = forgetful(batch, .7).seen
    model.eval()
    torch.testing.assert_close(shorter, model(replace(batch, seen=seen)))
    first = batch.offsets[:-1][batch.row]
    for q in range(0, len(batch), 3):                                                       # each question alone, behind what it sees
        at, a, n = int(batch.asked[q]), int(first[q]), int(seen[q])
        keep = torch.tensor([*range(a, a + n), at])
        alone = Histories(batch.window[:1], batch.item[keep], batch.feedback[keep], batch.gap[keep], torch.tensor([0, n + 1]), torch.tensor([n + 1]), torch.tensor([n]))
        torch.testing.assert_close(shorter[q], model(alone)[0])
    for wrong in (-.1, 1.1):
        with pytest.raises(ValueError, match="a share, from 0 to 1"): made(split, cls, forget=wrong, **side)


OF_ITEMS = [(IdTransformer, {}), (HSTUClicks, {}), *((cls, dict(item_id=True)) for cls in (HiSAM, SemanticTransformer, FeatureTransformer, SemanticMLP))]


@pytest.mark.parametrize("cls, more", OF_ITEMS)
def test_items_that_begin_with_factors_change_the_vectors_of_items_alone(split, cls, more):
    drawn, begun = (build(cls, split, 3, items=ItemSide(ids(split), modalities(split)), width=16, max_length=6, item_start=start, **more) for start in ("random", "factors"))
    changed = [name for (name, a), b in zip(drawn.named_parameters(), begun.parameters()) if not torch.equal(a, b)]
    assert changed == [name for name, p in begun.named_parameters() if p is begun.item_vectors.weight] and len(changed) == 1
    begun.loss(HistoryWindows(split, "train", max_length=6)[np.arange(5)])[0].backward()
    assert begun.item_vectors.weight.grad.any()


@pytest.mark.parametrize("cls, more", [*OF_ITEMS, (HiSAM, {}), (FeatureTransformer, {}), (SemanticMLP, {})])
def test_vectors_of_users_are_added_to_the_logit_and_leave_the_network_as_it_was(split, cls, more):
    plain, known = (build(cls, split, 3, items=ItemSide(ids(split), modalities(split)), width=16, max_length=6, user_vector=switch, **more).eval() for switch in (False, True))
    own = dict(plain.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in known.named_parameters() if name in own)
    assert {name for name, _ in known.named_parameters()} - set(own) == {"user_vectors.user.weight", "user_vectors.item.weight", "user_vectors.gain"}
    batch = HistoryWindows(split, "train", max_length=6)[np.arange(5)]
    of_user = known.user_vectors
    torch.testing.assert_close(known(batch), plain(batch) + of_user.gain * torch.stack(
        [of_user.user.weight[u, :-1] @ of_user.item.weight[i, :-1] + of_user.user.weight[u, -1] + of_user.item.weight[i, -1] for u, i in zip(batch.user, batch.candidate)]))
    asked = next(iter(ClickData(split, 8, max_length=6).val_dataloader()))
    torch.testing.assert_close(known(asked) - plain(asked), of_user(asked.user, asked.candidate))
    known.train().loss(batch)[0].backward()
    assert of_user.user.weight.grad[batch.window].any()


@pytest.mark.parametrize("cls", [HiSAM, SemanticTransformer, FeatureTransformer, SemanticMLP])
def test_a_model_without_vectors_of_items_has_none_to_begin(split, cls):
    side = ItemSide(ids(split), modalities(split))
    assert build(cls, split, 0, items=side, width=16).item_vectors is None
    with pytest.raises(ValueError, match=f"{cls.__name__} has no vector for each item; give item_id=True"): build(cls, split, 0, items=side, width=16, item_start="factors")


def test_an_unknown_start_is_named(split):
    with pytest.raises(ValueError, match="item_start='factor': one of random, factors"): build(HSTUClicks, split, 0, width=16, item_start="factor")


@pytest.mark.parametrize("frozen", [False, True])
def test_folded_factors_are_a_ridge_regression_for_each_question(split, frozen):
    model = build(FoldedFactors, split, 0, width=3, penalty=.4, answers=2., max_length=6).double()
    batch = HistoryWindows(split, "test", max_length=6, frozen=frozen)[np.arange(7)]
    q, bias, found = model.item.numpy(), model.bias.numpy(), []
    for at, row, seen in zip(batch.asked.tolist(), batch.row.tolist(), batch.seen.tolist() if frozen else [None] * len(batch)):
        first = int(batch.offsets[row])
        history = range(first, at if seen is None else first + seen)
        items = [int(batch.item[j]) for j in history]
        square, product = np.diag([.4, .4, .4, 2.]), np.zeros(4)
        for j, i in zip(history, items):
            square, product = square + np.outer(q[i], q[i]), product + q[i] * (float(batch.feedback[j]) - model.mean - bias[i])
        i = int(batch.item[at])
        found.append(np.clip(model.mean + bias[i] + np.linalg.solve(square, product) @ q[i], .01, .99))
    assert np.allclose(model(batch).sigmoid().numpy(), found, atol=1e-8)


def test_known_factors_are_the_factorisation_of_the_training_likes(split):
    model, batch = build(KnownFactors, split, 0, width=3, penalty=.4, max_length=6), HistoryWindows(split, "test", max_length=6)[np.arange(7)]
    found = factorise(*training_answers(split), split.n_users, split.n_items, 3, .4)
    expected = np.clip(found.predict(batch.user.numpy(), batch.candidate.numpy()), .01, .99)
    assert np.allclose(model(batch).sigmoid().numpy(), expected, atol=1e-5)
    other = replace(batch, feedback=1 - batch.feedback)                                      # no history is read
    assert torch.equal(model(batch), model(other)) and not any(p.requires_grad for p in model.parameters())


def test_folded_factors_refuse_what_is_no_penalty(split):
    with pytest.raises(ValueError, match="penalty=0"): build(FoldedFactors, split, 0, width=3, penalty=0)
    with pytest.raises(ValueError, match="answers=0"): build(FoldedFactors, split, 0, width=3, penalty=1., answers=0)
