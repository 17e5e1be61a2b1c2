"""ACF and the aging mean against their equations, one user and one element at a time, in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from l2rec.data.batches import Targets
from l2rec.data.splits import leave_last_out
from l2rec.dual_view.fusion import ACF, AgingMean, mean_ranks
from worlds import random_dataset

VIEWS = ("semantic", "behaviour")


def make(mode="acf", views=VIEWS, width=6):
    torch.manual_seed(0)
    fusion = ACF(width, mode, views).double()
    for p in fusion.parameters():
        nn.init.normal_(p, std=.7)
    return fusion


def inputs(n=5, width=6):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, width, dtype=torch.float64, generator=generator) for _ in range(2))


def product(weight, bias, x):
    return [sum(float(w) * v for w, v in zip(row, x)) + float(b) for row, b in zip(weight, bias)]


def normed(x, weight, bias):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(variance + 1e-5) * float(w) + float(b) for v, w, b in zip(x, weight, bias)]


def slow(fusion, s, b):
    """(h, gamma) of one user."""
    p = dict(fusion.named_parameters())
    tilde = {}
    for view, x in zip(VIEWS, (s, b)):
        if view in fusion.views:
            x = x.tolist()
            tilde[view] = [v + d for v, d in zip(x, product(p[f"project.{view}.weight"], p[f"project.{view}.bias"], x))]
    if len(tilde) == 1:
        mixed, gamma = next(iter(tilde.values())), [float("semantic" in tilde)] * len(s)
    elif fusion.mode == "concat":
        mixed, gamma = product(p["mix.weight"], p["mix.bias"], tilde["semantic"] + tilde["behaviour"]), [.5] * len(s)
    else:
        gamma = [.5] * len(s) if fusion.mode == "mean" else [1 / (1 + math.exp(-z)) for z in product(p["gate.weight"], p["gate.bias"], tilde["semantic"] + tilde["behaviour"])]
        mixed = [g * x + (1 - g) * y for g, x, y in zip(gamma, tilde["semantic"], tilde["behaviour"])]
    return normed(mixed, p["norm.weight"], p["norm.bias"]), gamma


@pytest.mark.parametrize("mode", ["acf", "mean", "concat"])
@pytest.mark.parametrize("views", [VIEWS, ("semantic",), ("behaviour",)])
def test_fusion_is_its_equation(mode, views):
    fusion, (s, b) = make(mode, views), inputs()
    h, gamma = fusion(s, b)
    for u in range(5):
        expected_h, expected_gamma = slow(fusion, s[u], b[u])
        torch.testing.assert_close(h[u], torch.tensor(expected_h, dtype=torch.float64))
        torch.testing.assert_close(gamma[u], torch.tensor(expected_gamma, dtype=torch.float64))


def test_one_view_does_not_read_the_other():
    s, b = inputs()
    assert make(views=("semantic",))(s, None)[0].equal(make(views=("semantic",))(s, b)[0])
    assert make(views=("behaviour",))(None, b)[0].equal(make(views=("behaviour",))(s, b)[0])
    assert not any("behaviour" in name or "gate" in name for name, _ in make(views=("semantic",)).named_parameters())


def test_it_starts_as_the_mean():
    torch.manual_seed(0)
    fusion, (s, b) = ACF(6).double(), inputs()
    h, gamma = fusion(s, b)
    assert (gamma == .5).all()
    plain = nn.functional.layer_norm((s + b) / 2, (6,))
    assert torch.cosine_similarity(h, plain).min() > .98


@pytest.mark.parametrize("mode", ["acf", "mean", "concat"])
def test_gradients_reach_everything(mode):
    fusion, (s, b) = make(mode), inputs()
    s.requires_grad_(), b.requires_grad_()
    fusion(s, b)[0].square().mul(torch.arange(6.)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*fusion.parameters(), s, b))


def test_equal_views_are_not_weighed():
    fusion, (s, _) = make(), inputs()
    fusion.project["behaviour"].load_state_dict(fusion.project["semantic"].state_dict())
    x = s + fusion.project["semantic"](s)
    torch.testing.assert_close(fusion(s, s)[0], fusion.norm(x))


def test_half_precision():
    fusion, (s, b) = make().to(torch.bfloat16), inputs()
    h, gamma = fusion(s.bfloat16(), b.bfloat16())
    assert h.dtype == gamma.dtype == torch.bfloat16 and h.isfinite().all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="fusion mode 'sum': one of acf, mean, concat"):
        ACF(4, "sum")
    for views in ((), ("text",)):
        with pytest.raises(ValueError, match="one or both of semantic, behaviour"):
            ACF(4, views=views)


# --- the aging mean -----------------------------------------------------------------------------------------------------------


OFFSETS = [0, 4, 4, 5, 11, 11]


def slow_mean(keep, vectors, offsets):
    """One place at a time; vectors are lists."""
    unit = lambda v: [x / math.sqrt(sum(y * y for y in v)) if any(v) else 0. for x in v]
    out = []
    for a, b in zip(offsets[:-1], offsets[1:]):
        for n in range(a, b): out.append(unit([sum(keep ** (n - m) * unit(vectors[m])[j] for m in range(a, n + 1)) for j in range(len(vectors[n]))]))
    return out


@pytest.mark.parametrize("keep", [.7, .05, .99])
def test_aging_mean_place_by_place(keep):
    vectors = 3 * torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors[4] = 0                                                           # nothing known of a history
    mean = AgingMean(keep).double()
    assert torch.sigmoid(mean.keep).item() == pytest.approx(keep, rel=1e-6)
    torch.testing.assert_close(mean(vectors, torch.tensor(OFFSETS)), torch.tensor(slow_mean(keep, vectors.tolist(), OFFSETS), dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert mean(vectors[:0], torch.tensor([0, 0])).shape == (0, 4) and mean(vectors, torch.tensor(OFFSETS))[4].tolist() == [0] * 4


def test_gradients_of_the_aging_mean():
    mean, vectors = AgingMean().double(), torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: mean(v, torch.tensor(OFFSETS)), [vectors])
    slope, = torch.autograd.grad(mean(vectors, torch.tensor(OFFSETS)).sin().sum(), mean.keep)
    value = lambda x: sum(math.sin(v) for row in slow_mean(1 / (1 + math.exp(-x)), vectors.tolist(), OFFSETS) for v in row)
    x = mean.keep.item()
    assert slope.item() == pytest.approx((value(x + 1e-5) - value(x - 1e-5)) / 2e-5, rel=1e-4)
    for k in (2, 8):
        touched, = torch.autograd.grad(mean(vectors, torch.tensor(OFFSETS))[k].sin().sum(), vectors)
        assert [bool(row.abs().sum() > 0) for row in touched] == [{2: 0, 8: 5}[k] <= n <= k for n in range(11)]


@pytest.mark.parametrize("keep, length", [(.1, 50), (.7, 400)])
def test_long_histories_and_quick_aging_have_finite_gradients(keep, length):
    mean, vectors = AgingMean(keep), torch.randn(length, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mean(vectors, torch.tensor([0, length])).sin().sum().backward()
    assert mean.keep.grad.isfinite() and mean.keep.grad != 0 and vectors.grad.isfinite().all()


def test_later_items_do_not_age_earlier_means():
    mean, vectors = AgingMean(), torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    other = vectors.clone()
    other[8:] += 5
    assert mean(vectors, torch.tensor(OFFSETS))[:8].equal(mean(other, torch.tensor(OFFSETS))[:8])


@pytest.mark.parametrize("keep", [0., 1., -.1])
def test_shares_to_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=f"keep={keep}: above 0 and below 1"): AgingMean(keep)


def test_ranks_of_the_aging_mean_one_user_at_a_time():
    split = leave_last_out(random_dataset(n_users=30, n_items=40))
    vectors, targets = torch.randn(split.n_items, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4)), Targets(split, "validation", 6)
    unit, found = [[v / math.hypot(*row) for v in row] for row in vectors.tolist()], mean_ranks(vectors, targets, .6)
    for u in range(len(targets)):
        batch = targets[np.array([u])]
        mean = [sum(.6 ** age * unit[i][e] for age, i in enumerate(reversed(batch.history.tolist()))) for e in range(5)]
        score, seen = [sum(a * b for a, b in zip(mean, row)) for row in unit], set(batch.seen.tolist())
        (target,) = batch.target.tolist()
        assert found[u] == 1 + sum(s > score[target] for i, s in enumerate(score) if i not in seen and i != target)
