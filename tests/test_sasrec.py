"""SASRec against its equations written out for one user at a time, against padding, and its start."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from l2rec.baselines.gsasrec import GSASRec
from l2rec.baselines.sasrec import Packed, SASRec, pack
from l2rec.baselines.sasrec_binary import BinarySASRec
from l2rec.data.batches import Batch, Targets, Windows, padded
from l2rec.data.splits import leave_last_out, new_users
from l2rec.training.contracts import build
from worlds import random_dataset, ring


def batch_of(histories, following=None):
    length = torch.tensor([len(h) for h in histories])
    flat = lambda lists: torch.tensor([i for h in lists for i in h], dtype=torch.long)
    return Batch(torch.arange(len(histories)), flat(histories), torch.cat([torch.zeros(1, dtype=torch.long), length.cumsum(0)]), length, following=flat(following) if following else None)


def random_histories(n, longest, n_items=23, seed=0, shortest=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n_items, rng.integers(shortest, longest + 1)).tolist() for _ in range(n)]


def make(cls=SASRec, n_items=23, **network):
    torch.manual_seed(0)
    model = cls(n_items, **{"width": 12, "max_length": 7, "heads": 1, "blocks": 2, "dropout": 0., **network})
    for p in model.parameters():
        nn.init.normal_(p, std=.5)                        # far from the start, where every term counts, the biases too
    return model.eval()


# --- the equations, with loops, in float64 ----------------------------------------------------------------------------------


def normed(x, weight, bias, eps):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + eps) * weight + bias


def slow_hidden(model, history):
    """F(history): one vector a position, [n, D]. Numpy in float64; a position looks at itself and at those before."""
    p = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    n, heads = len(history), model.blocks[0].heads
    x = [p["item.weight"][item] + p["position.weight"][n - 1 - i] for i, item in enumerate(history)]
    for b in range(len(model.blocks)):
        w = lambda name: p[f"blocks.{b}.{name}"]
        q = [normed(v, w("norm_attention.weight"), w("norm_attention.bias"), 1e-5) for v in x]
        d = len(q[0]) // heads
        attended = []
        for i in range(n):
            query = w("query.weight") @ q[i] + w("query.bias")
            mixed = []
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                keys = [(w("key_value.weight") @ x[j] + w("key_value.bias"))[: heads * d][part] for j in range(i + 1)]
                values = [(w("key_value.weight") @ x[j] + w("key_value.bias"))[heads * d :][part] for j in range(i + 1)]
                weight = np.exp([float(query[part] @ k) / math.sqrt(d) for k in keys])
                mixed.append(sum(a * v for a, v in zip(weight / weight.sum(), values)))
            attended.append(q[i] + w("out.weight") @ np.concatenate(mixed) + w("out.bias"))
        x = []
        for s in attended:
            y = normed(s, w("norm_network.weight"), w("norm_network.bias"), 1e-5)
            x.append(y + w("outer.weight") @ np.maximum(w("inner.weight") @ y + w("inner.bias"), 0) + w("outer.bias"))
    return np.array([normed(v, p["norm.weight"], p["norm.bias"], 1e-8) for v in x])


networks = pytest.mark.parametrize("network", [{}, dict(heads=3), dict(blocks=1), dict(blocks=3, heads=2), dict(max_length=20)], ids=str)


@networks
def test_hidden_vectors_are_the_equations(network):
    model, histories = make(**network), random_histories(9, 7)
    hidden, _ = model.hidden(batch_of(histories))
    expected = np.concatenate([slow_hidden(model, h) for h in histories if h])
    np.testing.assert_allclose(hidden.detach().numpy(), expected, atol=2e-4)
    exact, _ = model.double().hidden(batch_of(histories))
    np.testing.assert_allclose(exact.detach().numpy(), expected, atol=1e-10)


@networks
def test_scores_are_the_newest_vector_times_the_items(network):
    model, histories = make(**network).double(), random_histories(9, 7, seed=1)
    expected = np.array([slow_hidden(model, h)[-1] @ model.item.weight.detach().numpy().T if h else np.zeros(23) for h in histories])
    np.testing.assert_allclose(model.scores(batch_of(histories)).detach().numpy(), expected, atol=1e-9)


def test_softmax_loss_is_its_formula():
    model, histories = make().double(), random_histories(6, 7, seed=2, shortest=1)
    following = random_histories(6, 7, seed=3)
    following = [(f + [1] * 7)[: len(h)] for f, h in zip(following, histories)]
    total, items = [], model.item.weight.detach().numpy()
    for h, f in zip(histories, following):
        for vector, t in zip(slow_hidden(model, h), f):
            logits = items @ vector
            total.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[t])
    value, parts = model.float().loss(batch_of(histories, following))
    assert value.item() == pytest.approx(np.mean(total), rel=1e-4) and parts["softmax"].item() == value.item()


@pytest.mark.parametrize("cls, negatives, t, name", [(BinarySASRec, 1, 0., "binary"), (GSASRec, 5, .75, "gbce"), (GSASRec, 22, 1., "gbce")])
def test_sampled_losses_are_their_formulas(cls, negatives, t, name):
    model, histories = make(cls, **(dict(negatives=negatives, t=t) if cls is GSASRec else {})), random_histories(6, 7, seed=4, shortest=1)
    following = [h[1:] + [5] for h in histories]
    flat = torch.tensor([i for f in following for i in f])
    torch.manual_seed(9)
    from l2rec.training.losses import uniform_negatives

    drawn = uniform_negatives(flat, negatives, 23)
    torch.manual_seed(9)
    value, parts = model.loss(batch_of(histories, following))
    items, hidden = model.item.weight.detach().double().numpy(), np.concatenate([slow_hidden(model, h) for h in histories])
    alpha = negatives / 22
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    log_sigma = lambda s: -np.logaddexp(0, -s)
    each = [-(beta * log_sigma(items[f] @ h) + sum(log_sigma(-(items[j] @ h)) for j in row)) / (1 + negatives) for h, f, row in zip(hidden, flat.tolist(), drawn.tolist())]
    assert value.item() == pytest.approx(np.mean(each), rel=1e-4) and parts[name].item() == value.item()


def test_negatives_are_capped_by_the_catalogue():
    assert GSASRec(23).negatives == 22 and GSASRec(1000).negatives == 256
    model = make(GSASRec, negatives=256)
    assert model.loss(batch_of([[1, 2]], [[2, 3]]))[0].isfinite()


# --- packing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_pack_places_every_history_once(seed):
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 30))
    length = rng.integers(0, width + 1, rng.integers(1, 60))
    first, rows = pack(length, width)
    taken = [slot for f, n in zip(first, length) for slot in range(f, f + n)]
    assert len(taken) == len(set(taken)) and all(0 <= s < rows * width for s in taken)
    assert all(f // width == (f + n - 1) // width for f, n in zip(first, length) if n)       # in one row
    assert rows <= max(1, math.ceil(2 * length.sum() / width))                               # no two rows half empty
    assert rows >= math.ceil(length.sum() / width)


def test_pack_at_its_ends():
    assert pack(np.array([3, 3, 3]), 3)[1] == 3 and pack(np.array([1] * 9), 3)[1] == 3 and pack(np.array([4, 2, 3, 1]), 5)[1] == 2
    with pytest.raises(ValueError, match="a history of 4 items does not fit a row of 3"):
        pack(np.array([1, 4]), 3)


def test_packed_spreads_and_collects():
    batch = batch_of(random_histories(12, 7, seed=5))
    packed, x = Packed(batch), torch.randn(len(batch.history), 4)
    assert packed.collect(packed.spread(x)).equal(x)
    owner = torch.repeat_interleave(torch.arange(12), batch.length)
    seen = packed.visible.flatten(0, 1)[packed.slot]                                         # [N, W] what each item may look at
    for n in range(len(x)):
        row = int(packed.slot[n]) // packed.width
        looked = [m for m in range(len(x)) if int(packed.slot[m]) // packed.width == row and seen[n, int(packed.slot[m]) % packed.width]]
        assert looked == [m for m in range(n + 1) if owner[m] == owner[n]]
    assert packed.from_newest.tolist() == [n - 1 - i for n in batch.length.tolist() for i in range(n)]


@networks
def test_alone_as_in_company(network):
    model, histories = make(**network).double(), random_histories(20, 7, seed=6)
    together = model.encode(batch_of(histories))
    for order in (np.arange(20), np.random.default_rng(1).permutation(20)):
        other = model.encode(batch_of([histories[i] for i in order]))
        torch.testing.assert_close(other, together[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([model.encode(batch_of([h])) for h in histories]), together, rtol=0, atol=1e-12)


def test_equal_to_an_implementation_with_padding():
    """The same network on a padded rectangle with torch's own attention: vectors and gradients agree."""
    model, histories = make(heads=2).double(), random_histories(15, 7, seed=7, shortest=1)
    batch = batch_of(histories)

    def by_padding():
        item, real = padded(batch.history, batch.offsets)
        age = (batch.length[:, None] - 1 - torch.arange(item.shape[1])).clamp(min=0)
        x = (model.item(item) + model.position(age)) * real[..., None]
        visible = (real[:, None, :] & torch.ones(item.shape[1], item.shape[1]).tril().bool()) | torch.eye(item.shape[1]).bool()
        for block in model.blocks:
            q = block.norm_attention(x)
            split = lambda t: t.unflatten(-1, (block.heads, -1)).transpose(1, 2)
            key, value = block.key_value(x).chunk(2, -1)
            attended = nn.functional.scaled_dot_product_attention(split(block.query(q)), split(key), split(value), attn_mask=visible[:, None])
            y = block.norm_network(q + block.out(attended.transpose(1, 2).flatten(2)))
            x = y + block.outer(torch.relu(block.inner(y)))
        return model.norm(x)[real]

    direction = torch.randn(len(batch.history), 12, dtype=torch.float64)
    results = []
    for vectors in (by_padding(), model.hidden(batch)[0]):
        model.zero_grad()
        (vectors * direction).sum().backward()
        results.append((vectors.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_causal():
    model, batch = make().double(), batch_of(random_histories(6, 7, seed=8, shortest=3))
    before = model.hidden(batch)[0]
    for n in (0, 5, len(batch.history) - 1):
        history = batch.history.clone()
        history[n] = (history[n] + 1) % 23
        moved = (model.hidden(Batch(batch.user, history, batch.offsets, batch.length))[0] - before).abs().amax(1) > 0
        owner = int(torch.searchsorted(batch.offsets, n, right=True)) - 1
        assert moved.tolist() == [n <= m < batch.offsets[owner + 1] for m in range(len(history))]


# --- ends of the range ------------------------------------------------------------------------------------------------------


def test_empty_histories_have_zero_vectors():
    model = make()
    for histories in ([[]], [[], []], [[], [1, 2], []], [[1], []]):
        vectors = model.encode(batch_of(histories))
        assert vectors.shape == (len(histories), 12)
        assert [bool((v == 0).all()) for v in vectors] == [not h for h in histories]
    for h in histories[:1]:
        assert model.encode(batch_of(histories))[0].equal(model.encode(batch_of([h]))[0])


def test_too_long_a_history():
    with pytest.raises(ValueError, match="a history of 8 items is longer than max_length=7 of SASRec; cut it in the batches"):
        make().encode(batch_of([[1], [2] * 8]))


@pytest.mark.parametrize("wrong, message", [(dict(width=0), "width=0"), (dict(heads=5), "width=12 is not divisible by heads=5"), (dict(blocks=0), "blocks=0"), (dict(max_length=0), "max_length=0"),
                                            (dict(dropout=1.), "dropout=1.0"), (dict(dropout=-.1), "dropout=-0.1"), (dict(heads=0), "heads=0")])
def test_parameters_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)


def test_dropout_only_in_training():
    model, batch = make(dropout=.5), batch_of(random_histories(5, 7, seed=9, shortest=1))
    assert model.hidden(batch)[0].equal(model.hidden(batch)[0])
    model.train()
    assert not model.hidden(batch)[0].equal(model.hidden(batch)[0])


# --- learning ---------------------------------------------------------------------------------------------------------------


def curve(cls, split, start=None, epochs=10, lr=1e-3, **network):
    """Mean training loss of each epoch, in batches of 64."""
    model, units, order = build(cls, split, max_length=12, **network), Windows(split, 12), np.random.default_rng(0)
    for p in model.parameters():
        if start and p.dim() > 1:
            start(p)
    optimiser, out = torch.optim.Adam(model.parameters(), lr), []
    for _ in range(epochs):
        values = []
        for part in np.array_split(order.permutation(len(units)), len(units) // 64):
            optimiser.zero_grad()
            value, _ = model.loss(units[part])
            value.backward()
            optimiser.step()
            values.append(value.item())
        out.append(np.mean(values))
    return out, model.eval()


def test_the_small_start_learns_faster_than_xavier():
    split = leave_last_out(ring(400, 200, 12, seed=1))
    small, model = curve(SASRec, split)
    xavier, _ = curve(SASRec, split, nn.init.xavier_normal_)
    assert small[0] == pytest.approx(math.log(200), abs=.3)
    assert small[-1] < xavier[-1] - .3 and small[-1] < math.log(200) - 1
    assert all(p.detach().std() < .5 for p in model.parameters())


def test_the_start_is_small_for_every_matrix():
    model = build(SASRec, leave_last_out(ring()))
    assert all(p.std().item() == pytest.approx(.02, rel=.15) for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("cls, sampling", [(SASRec, {}), (BinarySASRec, {}), (GSASRec, dict(negatives=4))])
def test_every_loss_learns_the_order_of_a_ring(cls, sampling):
    split = leave_last_out(ring(150, 20, 10))
    losses, model = curve(cls, split, epochs=60, lr=3e-3, width=32, **sampling)
    batch = Targets(split, "test", 12)[np.arange(150)]
    step = (model.scores(batch).argmax(1) - batch.history[batch.offsets[1:] - 1]) % 20
    assert (step == 1).float().mean() > .6 and losses[-1] < losses[0]


def test_new_users_train_nothing():
    split = leave_last_out(random_dataset(seed=2))
    hidden = new_users(split, .3)
    batch = Windows(hidden, 5)[np.arange(len(Windows(hidden, 5)))]
    assert not hidden.new_user[batch.user.numpy()].any()
