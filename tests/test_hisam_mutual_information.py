"""CLUB: all pairs against a loop, the closed form for Gaussians, and which parameters each loss moves."""

import math

import pytest
import torch

from l2rec.hisam.mutual_information import CLUB


def normal_log(y, mean, log_variance):
    return sum(-.5 * ((float(a) - float(m)) ** 2 / math.exp(float(v)) + float(v) + math.log(2 * math.pi)) for a, m, v in zip(y, mean, log_variance))


def test_all_pairs_equal_the_loop():
    torch.manual_seed(0)
    club, x, y = CLUB(3, 2).double(), torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    mean, log_variance = club.gaussian(x)
    own = [normal_log(y[i], mean[i], log_variance[i]) for i in range(9)]
    pairs = [normal_log(y[j], mean[i], log_variance[i]) for i in range(9) for j in range(9)]
    assert club(x, y).item() == pytest.approx(sum(own) / 9 - sum(pairs) / 81, rel=1e-9)
    assert club.learning_loss(x, y).item() == pytest.approx(-sum(own) / 9, rel=1e-9)


def test_shuffled_has_the_mean_of_all_pairs():
    torch.manual_seed(0)
    club, x, y, g = CLUB(3, 2), torch.randn(40, 3), torch.randn(40, 2), torch.Generator().manual_seed(1)
    draws = torch.stack([club(x, y, "shuffled", g) for _ in range(1500)])
    assert abs((draws.mean() - club(x, y)).item()) < 4 * draws.std().item() / 1500 ** .5
    assert club(x, y, "shuffled", torch.Generator().manual_seed(3)).equal(club(x, y, "shuffled", torch.Generator().manual_seed(3)))


class Known(CLUB):
    """q(y|x) = N(rho x, 1 - rho^2), the true conditional."""

    def __init__(self, rho):
        super().__init__(1, 1)
        self.rho = rho

    def gaussian(self, x): return self.rho * x, torch.full_like(x, math.log(1 - self.rho ** 2))


@pytest.mark.parametrize("rho", [0., .5, -.8])
def test_the_true_conditional_gives_the_closed_form_which_bounds_the_information(rho):
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(200_000, 1, generator=g, dtype=torch.float64), torch.randn(200_000, 1, generator=g, dtype=torch.float64)
    estimate = Known(rho)(x, rho * x + (1 - rho ** 2) ** .5 * noise).item()
    assert estimate == pytest.approx(rho ** 2 / (1 - rho ** 2), abs=.02)
    assert estimate > -.5 * math.log(1 - rho ** 2) - .01


def test_learning_moves_q_only_and_the_estimate_reaches_both_sides():
    club, x, y = CLUB(3, 2), torch.randn(8, 3).requires_grad_(), torch.randn(8, 2).requires_grad_()
    club.learning_loss(x, y).backward()
    assert x.grad is None and y.grad is None and all(p.grad is not None for p in club.parameters())
    club(x, y).backward()
    assert x.grad.abs().sum() > 0 and y.grad.abs().sum() > 0


@pytest.mark.parametrize("n", [0, 1])
def test_nobody_to_compare_with(n):
    club = CLUB(3, 2)
    assert club(torch.randn(n, 3), torch.randn(n, 2)) == 0 and club.learning_loss(torch.randn(n, 3), torch.randn(n, 2)).isfinite()


def test_unknown_pairs():
    with pytest.raises(ValueError, match="pairs='some'"): CLUB(1, 1)(torch.zeros(3, 1), torch.zeros(3, 1), "some")
