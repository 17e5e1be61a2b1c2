"""The fused losses against plain float64 formulas and finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from l2rec.training import losses
from l2rec.training.losses import block_rows, candidate_scores, gbce_loss, softmax_loss, uniform_negatives


def problem(n=23, n_items=37, width=5, seed=0, repeat=False):
    g = torch.Generator().manual_seed(seed)
    users, items = torch.randn(n, width, generator=g), torch.randn(n_items, width, generator=g)
    target = torch.full((n,), 3) if repeat else torch.randint(n_items, (n,), generator=g)
    return users, items, target


def gradients(function, *tensors, times=1.):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*tensors)
    (value * times).sum().backward()
    return [value.detach(), *(t.grad for t in tensors)]


def slow_softmax(users, items, target):
    """-log of the target's share, one position at a time."""
    total = 0
    for h, t in zip(users, target.tolist()):
        logits = items @ h
        total = total - logits[t] + torch.log(torch.exp(logits - logits.max()).sum()) + logits.max()
    return total / len(users)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 22, 23, 24, 1000])
def test_softmax_and_its_gradients(monkeypatch, rows, repeat):
    monkeypatch.setattr(losses, "block_rows", lambda n_items, device: rows)
    users, items, target = problem(repeat=repeat)
    expected = gradients(lambda u, i: slow_softmax(u, i, target), users.double(), items.double(), times=2.5)
    for got, want in zip(gradients(lambda u, i: softmax_loss(u, i, target), users, items, times=2.5), expected):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_softmax_against_finite_differences():
    users, items, target = (t.double() if t.is_floating_point() else t for t in problem(4, 6, 3))
    value, d_users, d_items = gradients(lambda u, i: softmax_loss(u.float(), i.float(), target), users, items)
    for tensor, gradient in ((users, d_users), (items, d_items)):
        for at in np.ndindex(*tensor.shape):
            step, old = 1e-5, tensor[at].item()
            tensor[at] = old + step
            up = slow_softmax(users, items, target)
            tensor[at] = old - step
            down = slow_softmax(users, items, target)
            tensor[at] = old
            assert gradient[at].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=1e-5)


def test_softmax_survives_large_logits():
    users, items, target = problem()
    value, d_users, d_items = gradients(lambda u, i: softmax_loss(u, i, target), users * 300, items)
    assert value.isfinite() and d_users.isfinite().all() and d_items.isfinite().all()
    assert value.item() == pytest.approx(slow_softmax((users * 300).double(), items.double(), target).item(), rel=1e-5)


def test_equal_logits_cost_the_logarithm_of_the_catalogue():
    assert softmax_loss(torch.zeros(5, 4), torch.randn(11, 4), torch.arange(5)).item() == pytest.approx(math.log(11), rel=1e-6)


def test_softmax_under_bfloat16():
    users, items, target = problem(200, 500, 32)
    want = gradients(lambda u, i: slow_softmax(u, i, target), users.double(), items.double())

    def half(u, i):
        with torch.autocast("cpu", torch.bfloat16):
            return softmax_loss(torch.nn.functional.linear(u, torch.eye(32)), i, target)      # the network hands on bfloat16

    got = gradients(half, users, items)
    assert got[0].dtype == torch.float32 and got[0].item() == pytest.approx(want[0].item(), rel=.01)
    for a, b in zip(got[1:], want[1:]):
        assert a.dtype == torch.float32 and ((a.double() - b).norm() / b.norm()).item() < .02


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("n_items, k, dense", [(37, 5, True), (640, 3, False)])
def test_candidate_scores_both_ways(monkeypatch, n_items, k, dense, rows):
    monkeypatch.setattr(losses, "block_rows", lambda n_items, device: rows)
    assert (k * 32 >= n_items) is dense
    users, items, _ = problem(n_items=n_items)
    index = torch.randint(n_items, (len(users), k))
    index[:, -1] = index[:, 0]                                             # an item twice in a row
    weight = torch.randn(len(users), k)

    def slow(u, i):
        return torch.stack([torch.stack([(u[n] * i[j]).sum() for j in index[n].tolist()]) for n in range(len(u))])

    want = gradients(slow, users.double(), items.double(), times=weight.double())
    for got, expected in zip(gradients(lambda u, i: candidate_scores(u, i, index), users, items, times=weight), want):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_items", [37, 640])
def test_candidate_scores_under_bfloat16(n_items):
    users, items, _ = problem(n_items=n_items)
    index = torch.randint(n_items, (len(users), 3))
    want = gradients(lambda u, i: torch.einsum("nd,nkd->nk", u, i[index]), users.double(), items.double())
    got = gradients(lambda u, i: candidate_scores(u.bfloat16(), i, index), users, items)
    for a, b in zip(got, want):
        assert a.dtype == torch.float32 and ((a.double() - b).norm() / b.norm()).item() < .02


@pytest.mark.parametrize("t", [0., .3, .75, 1.])
@pytest.mark.parametrize("k, n_items", [(1, 40), (5, 40), (39, 40)])
def test_gbce_is_its_formula(t, k, n_items):
    scores = torch.randn(9, 1 + k, generator=torch.Generator().manual_seed(k))
    alpha = k / (n_items - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    sigma = lambda x: 1 / (1 + math.exp(-x))
    total = 0.
    for row in scores.double().tolist():
        total -= (beta * math.log(sigma(row[0])) + sum(math.log(1 - sigma(s)) for s in row[1:])) / (1 + k)
    assert gbce_loss(scores, n_items, t).item() == pytest.approx(total / 9, rel=1e-5)


def test_uncalibrated_gbce_with_one_negative_is_binary_cross_entropy():
    scores = torch.randn(50, 2)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.tensor([1., 0.]).expand(50, 2))
    torch.testing.assert_close(gbce_loss(scores, 1000, 0.), expected)


def test_gbce_beta_at_its_ends():
    one = torch.zeros(1, 6)
    assert gbce_loss(one, 101, 0.).item() == pytest.approx(math.log(2))                          # beta = 1
    assert gbce_loss(one, 101, 1.).item() == pytest.approx(math.log(2) * (.05 + 5) / 6)          # beta = alpha = 5/100
    assert gbce_loss(torch.full((1, 6), 500.), 101, 1.).isfinite()


def test_gbce_gradient_against_finite_differences():
    scores = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: gbce_loss(s, 30, .6), scores)


def test_negatives_are_uniform_and_never_the_target():
    torch.manual_seed(0)
    n_items = 12
    for target in (0, 5, 11):
        drawn = uniform_negatives(torch.full((4000,), target), 6, n_items)
        assert drawn.shape == (4000, 6)
        counts = np.bincount(drawn.ravel().numpy(), minlength=n_items)
        assert counts[target] == 0 and len(counts) == n_items
        assert chisquare(np.delete(counts, target)).pvalue > 1e-4


def test_negatives_come_from_the_global_seed():
    target = torch.arange(10)
    torch.manual_seed(5)
    first = uniform_negatives(target, 3, 50)
    other = uniform_negatives(target, 3, 50)
    torch.manual_seed(5)
    assert uniform_negatives(target, 3, 50).equal(first) and not other.equal(first)
    assert uniform_negatives(target[:2], 4, 2).tolist() == [[1] * 4, [0] * 4]


def test_blocks_hold_a_bounded_number_of_logits():
    for n_items in (10, 3416, 12101):
        assert block_rows(n_items, torch.device("cpu")) * n_items <= 2**20
    assert block_rows(10**7, torch.device("cpu")) == 16 and block_rows(1000, torch.device("cuda")) == 2**28 // 1000


def test_errors():
    for wrong, message in ((lambda: softmax_loss(torch.zeros(0, 3), torch.zeros(4, 3), torch.zeros(0, dtype=torch.long)), "no positions"), (lambda: gbce_loss(torch.zeros(2, 2), 10, 1.1), "t=1.1"),
                           (lambda: gbce_loss(torch.zeros(2, 1), 10), "0 negatives"), (lambda: gbce_loss(torch.zeros(2, 11), 10), "10 negatives for a catalogue of 10"),
                           (lambda: uniform_negatives(torch.zeros(2, dtype=torch.long), 1, 1), "a catalogue of 1 item")):
        with pytest.raises(ValueError, match=message):
            wrong()
