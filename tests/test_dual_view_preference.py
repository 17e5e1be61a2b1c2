"""BPC against its double sum, in float64."""

import math

import pytest
import torch

from l2rec.dual_view.preference import bpc_loss


def views(n=7, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, width, generator=generator) for _ in range(2))


def slow(s, b, tau, user=None):
    s, b = s.double().tolist(), b.double().tolist()
    user = list(range(len(s))) if user is None else user
    length = lambda x: math.sqrt(sum(v * v for v in x))
    cos = lambda x, y: sum(v * w for v, w in zip(x, y)) / (length(x) * length(y))
    total = 0.
    for one, other in ((s, b), (b, s)):
        for u in range(len(s)):
            rivals = [v for v in range(len(s)) if v == u or user[v] != user[u]]
            total += math.log(sum(math.exp(cos(one[u], other[v]) / tau) for v in rivals)) - cos(one[u], other[u]) / tau
    return total / (2 * len(s))


@pytest.mark.parametrize("tau", [.05, .1, 1.])
@pytest.mark.parametrize("user", [None, [0, 1, 2, 3, 4, 5, 6], [4, 4, 2, 9, 9, 9, 1], [3] * 7])
def test_loss_is_its_formula(tau, user):
    s, b = views()
    got = bpc_loss(s, b, tau, None if user is None else torch.tensor(user))
    assert got.item() == pytest.approx(slow(s, b, tau, user), rel=1e-4, abs=1e-6)


def test_both_directions_count_alike():
    s, b = views(seed=1)
    torch.testing.assert_close(bpc_loss(s, b), bpc_loss(b, s))
    torch.testing.assert_close(bpc_loss(s, b), bpc_loss(3 * s, .1 * b))                     # cosines: lengths do not matter
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bpc_loss(s, b), bpc_loss(s[order], b[order]))


@pytest.mark.parametrize("n, user", [(1, None), (1, [5]), (6, [5] * 6)])
def test_a_single_user_costs_nothing_and_pulls_nowhere(n, user):
    s, b = (x[:n].clone().requires_grad_() for x in views())
    value = bpc_loss(s, b, user=None if user is None else torch.tensor(user))
    value.backward()
    assert value.item() == 0 and s.grad.abs().max() == 0 and b.grad.abs().max() == 0


def test_gradients_are_those_of_the_formula():
    s, b = (x.double() for x in views(4))
    user = torch.tensor([0, 1, 1, 2])
    assert bpc_loss(s.float(), b.float(), .5, user).isfinite()
    step = 1e-3
    s = s.float().requires_grad_()
    bpc_loss(s, b.float(), .5, user).backward()
    for i in range(4):
        for j in range(5):
            up, down = s.detach().double().clone(), s.detach().double().clone()
            up[i, j] += step
            down[i, j] -= step
            slope = (slow(up, b, .5, user.tolist()) - slow(down, b, .5, user.tolist())) / (2 * step)
            assert s.grad[i, j].item() == pytest.approx(slope, abs=1e-4)


def test_half_precision_is_summed_in_single():
    s, b = views(64, 16)
    got = bpc_loss(s.bfloat16(), b.bfloat16())
    assert got.dtype == torch.float32 and got.item() == pytest.approx(bpc_loss(s.bfloat16().float(), b.bfloat16().float()).item(), rel=1e-5)


def test_views_of_length_zero_stay_finite():
    s, b = views()
    s[2] = 0
    s.requires_grad_()
    bpc_loss(s, b).backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("tau", [0., -1., float("nan")])
def test_temperatures(tau):
    with pytest.raises(ValueError, match="temperature=.*: above 0"):
        bpc_loss(*views(), tau)
