"""The router against plain Python, its four modes, and the balance loss."""

import itertools
import math

import pytest
import torch

from l2rec.dual_view.router import SIGNALS, Router, balance_loss, top_gates

SUBSETS = [s for k in (1, 2, 3) for s in itertools.combinations(SIGNALS, k)]


def slow_route(router, c, u):
    """Logits, gates and probabilities of one sequence in plain Python numbers."""
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    rows = lambda layer, x: [dot(w, x) for w in layer.weight.tolist()]
    z = [0.0] * router.experts
    if "context" in router.signals:
        z = [a + b for a, b in zip(z, rows(router.context, c))]
    if "user" in router.signals:
        z = [a + b for a, b in zip(z, rows(router.user, u))]
    if "interaction" in router.signals:
        both = [a * b for a, b in zip(rows(router.of_context, c), rows(router.of_user, u))]
        z = [a + b for a, b in zip(z, rows(router.interaction, both))]
    kept = sorted(range(len(z)), key=lambda e: -z[e])[: router.top_n]
    total, kept_total = sum(math.exp(x) for x in z), sum(math.exp(z[e]) for e in kept)
    return [math.exp(z[e]) / kept_total if e in kept else 0.0 for e in range(len(z))], [math.exp(x) / total for x in z], set(kept)


@pytest.mark.parametrize("signals", SUBSETS)
@pytest.mark.parametrize("mode, top_n", [("learned", 1), ("learned", 2), ("learned", 5), ("dense", 2)])
def test_routes_as_written_out(signals, mode, top_n):
    torch.manual_seed(0)
    router = Router(7, 4, 5, top_n, signals, interaction_width=3, mode=mode).double()
    c, u = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    route = router(c, u)
    for b in range(6):
        gates, probabilities, kept = slow_route(router, c[b].tolist(), u[b].tolist())
        assert route.gates[b].tolist() == pytest.approx(gates, abs=1e-12) and route.probabilities[b].tolist() == pytest.approx(probabilities, abs=1e-12)
        assert set(route.chosen[b].nonzero().flatten().tolist()) == kept


def test_gradients_of_gates_and_probabilities():
    torch.manual_seed(0)
    router = Router(4, 3, 5, 2, interaction_width=2).double()
    inputs = torch.randn(2, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, u: router(c, u).gates, inputs) and torch.autograd.gradcheck(lambda c, u: router(c, u).probabilities, inputs)
    router(*inputs).gates[:, 0].sum().backward()
    assert all(p.grad is not None for p in router.parameters())


def test_top_one_is_a_choice_without_a_gradient():
    z = torch.randn(4, 6, requires_grad=True)
    route = top_gates(z, 1)
    assert route.gates.sum(1).eq(1).all() and route.gates.max(1).values.eq(1).all()
    route.gates.square().sum().backward()
    assert z.grad.abs().max() == 0


def test_all_chosen_is_the_dense_mixture():
    torch.manual_seed(0)
    learned = Router(6, 6, 4, 4)
    dense = Router(6, 6, 4, 1, mode="dense")
    dense.load_state_dict(learned.state_dict())
    c, u = torch.randn(3, 6), torch.randn(3, 6)
    assert all(torch.equal(a, b) for a, b in zip(learned(c, u), dense(c, u))) and dense(c, u).chosen.all()


def test_random_routes_follow_torch_and_are_even():
    router = Router(3, None, 6, 2, mode="random")
    c = torch.randn(3000, 3)
    torch.manual_seed(1)
    first, second = router(c), router(c)
    torch.manual_seed(1)
    assert torch.equal(router(c).gates, first.gates) and not torch.equal(first.gates, second.gates)
    assert first.gates[first.chosen].eq(0.5).all() and first.chosen.sum(1).eq(2).all() and not list(router.parameters())
    assert (first.chosen.float().mean(0) - 1 / 3).abs().max() < 0.05 and first.probabilities.sub(1 / 6).abs().max() < 1e-7


def test_equal_routes_use_everybody_fully():
    router = Router(3, None, 4, 9, mode="equal")
    route = router(torch.randn(2, 3))
    assert route.gates.eq(1).all() and route.chosen.all() and not list(router.parameters())


def test_single_expert():
    route = Router(3, 2, 1, 1)(torch.randn(4, 3), torch.randn(4, 2))
    assert route.gates.eq(1).all() and balance_loss(route.probabilities, route.chosen) == 1


@pytest.mark.parametrize("how", ["weights", "inputs", "autocast"])
def test_low_precision_decides_in_float32(how):
    torch.manual_seed(0)
    router, c, u = Router(32, 16, 6), torch.randn(64, 32), torch.randn(64, 16)
    exact = router(c, u)
    if how == "weights":
        router = router.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        route = router(*((c.bfloat16(), u.bfloat16()) if how == "inputs" else (c, u)))
    assert route.gates.dtype == torch.float32 and (route.probabilities - exact.probabilities).abs().max() < 0.02
    if how == "autocast":
        assert torch.equal(route.gates, exact.gates)


def test_sequences_are_routed_apart():
    torch.manual_seed(0)
    router, c, u = Router(8, 8, 6), torch.randn(5, 8), torch.randn(5, 8)
    assert torch.allclose(torch.cat([router(c[b : b + 1], u[b : b + 1]).gates for b in range(5)]), router(c, u).gates, atol=1e-6)
    assert router(c[:0], u[:0]).gates.shape == (0, 6)


def test_signals_that_are_left_out_are_not_read():
    torch.manual_seed(0)
    c, u = torch.randn(4, 8), torch.randn(4, 8)
    router = Router(8, None, 6, signals=("context",))
    assert torch.equal(router(c).gates, router(c, u).gates)
    router = Router(8, 8, 6, signals=("user",))
    assert torch.equal(router(c, u).gates, router(torch.zeros_like(c), u).gates)


def slow_balance(probabilities, chosen):
    B, E = len(probabilities), len(probabilities[0])
    n = sum(map(sum, chosen)) / B
    return E / n * sum(sum(row[e] for row in chosen) / B * sum(row[e] for row in probabilities) / B for e in range(E))


def test_balance_as_written_out_and_its_bounds():
    torch.manual_seed(0)
    route = top_gates(torch.randn(9, 5, dtype=torch.float64), 2)
    assert balance_loss(route.probabilities, route.chosen).item() == pytest.approx(slow_balance(route.probabilities.tolist(), route.chosen.int().tolist()))
    even = torch.eye(6, dtype=torch.bool)
    assert balance_loss(torch.randn(6, 6).softmax(1), even).item() == pytest.approx(1)      # even load, whatever the probabilities
    collapsed = torch.tensor([[1.0, 1, 0, 0, 0, 0]]).expand(8, -1)
    assert balance_loss(collapsed / 2, collapsed.bool()).item() == pytest.approx(3)


def test_balance_moves_probability_from_the_crowded_to_the_idle():
    z = torch.zeros(8, 4, requires_grad=True)
    chosen = torch.tensor([[True, True, False, False]]).expand(8, -1)
    balance_loss(z.softmax(1), chosen).backward()
    assert (z.grad[:, :2] > 0).all() and (z.grad[:, 2:] < 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_balance_of_nobody_is_zero(shape):
    assert balance_loss(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)) == 0


@pytest.mark.parametrize("given, words", [
    (dict(experts=3, top_n=4), "top_n=4 experts a sequence of a pool of 3"), (dict(experts=0), "experts=0"), (dict(top_n=0), "top_n=0"), (dict(mode="dens"), "did you mean 'dense'"),
    (dict(signals=("user", "contex")), "did you mean 'context'"), (dict(signals=()), "at least one of context, user, interaction"), (dict(user_width=None), "user_width=None"),
    (dict(interaction_width=0), "interaction_width=0"), (dict(experts=3, top_n=4, mode="random"), "pool of 3")])
def test_bad_settings(given, words):
    with pytest.raises(ValueError, match=words):
        Router(**dict(width=4, user_width=4, experts=6) | given)


@pytest.mark.parametrize("c, u, words", [((3, 4), None, "user=None"), ((3, 5), (3, 4), r"context of shape \(3, 5\)"), ((3, 4), (2, 4), r"Float\[3, 4\]"), ((3, 4), (3, 5), "user of shape")])
def test_bad_inputs(c, u, words):
    with pytest.raises(ValueError, match=words):
        Router(4, 4, 6)(torch.zeros(c), None if u is None else torch.zeros(u))
