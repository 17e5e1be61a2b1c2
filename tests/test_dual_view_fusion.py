"""ACF against its equations, one user and one element at a time, in float64."""

import math

import pytest
import torch
from torch import nn

from l2rec.dual_view.fusion import ACF

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
