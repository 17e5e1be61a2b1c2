"""Projection to the sphere, symmetric InfoNCE and uniformity against loops in float64."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from l2rec.hisam.alignment import Projection, info_nce, uniformity


def points(n, seed, width=5):
    return normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def slow_info_nce(a, b, tau):
    """Item by item, each direction written out."""
    n, total = len(a), 0.
    for i in range(n):
        ab = [math.exp(float(a[i] @ b[j]) / tau) for j in range(n)]
        ba = [math.exp(float(a[j] @ b[i]) / tau) for j in range(n)]
        total -= math.log(ab[i] / sum(ab)) + math.log(ba[i] / sum(ba))
    return total / (2 * n)


@pytest.mark.parametrize("n,tau", [(2, .1), (7, .5), (20, 1.)])
def test_info_nce_is_the_formula(n, tau):
    a, b = points(n, 1), points(n, 2)
    assert info_nce(a, b, tau).item() == pytest.approx(slow_info_nce(a, b, tau), rel=1e-10)
    assert info_nce(a, b, torch.tensor(tau, dtype=torch.float64)).item() == pytest.approx(slow_info_nce(a, b, tau), rel=1e-10)
    assert torch.allclose(info_nce(a, b, tau), info_nce(b, a, tau))


def test_info_nce_sees_only_rows_that_have_both():
    a, b, present = points(9, 1), points(9, 2), torch.arange(9) % 2 == 0
    expected = info_nce(a[present], b[present])
    a[~present], b[~present] = float("nan"), float("nan")
    assert info_nce(a, b, present=present).equal(expected)


@pytest.mark.parametrize("n", [0, 1])
def test_info_nce_of_nothing_to_tell_apart_is_zero_and_moves_nothing(n):
    a = points(n, 1).requires_grad_()
    loss = info_nce(a, points(n, 2))
    loss.backward()
    assert loss == 0 and (a.grad == 0).all()
    assert info_nce(points(5, 1), points(5, 2), present=torch.zeros(5, dtype=torch.bool)) == 0


def test_uniformity_is_the_mean_over_pairs():
    z = points(12, 3)
    pairs = [math.exp(-2 * float((z[i] - z[j]).square().sum())) for i in range(12) for j in range(i)]
    assert uniformity(z).item() == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-9)
    assert uniformity(z[:1]) == 0 and abs(uniformity(z[:1].expand(4, -1)).item()) < 1e-9


def test_projection_lies_on_the_sphere_and_checks_width():
    project = Projection(6, 4, 8)
    z = project(torch.randn(10, 6))
    assert z.shape == (10, 4) and torch.allclose(z.norm(dim=1), torch.ones(10))
    assert project(torch.zeros(0, 6)).shape == (0, 4) and project(torch.zeros(2, 6)).isfinite().all()
    with pytest.raises(ValueError, match="width 7.*width 6"): project(torch.randn(3, 7))


@pytest.mark.parametrize("call,what", [(lambda: Projection(0), "d_in"), (lambda: Projection(3, 0), "width"), (lambda: info_nce(points(3, 1), points(3, 2), 0.), "temperature"),
                                       (lambda: info_nce(points(3, 1), points(4, 2)), "shape")])
def test_bad_input(call, what):
    with pytest.raises(ValueError, match=what): call()
