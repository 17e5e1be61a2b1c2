"""The wide product of all experts against sums written out in float64: values, gradients, precisions, what is kept, bad input."""

import numpy as np
import pytest
import torch
from l2rec.dual_view import experts
from l2rec.dual_view.experts import MANY_TOKENS, chosen_columns, expert_loop, expert_product, wide_gate
from torch.utils.checkpoint import checkpoint

LONG = MANY_TOKENS + 5


def operands(batch=3, tokens=7, d_in=10, d_out=6, number=5, rank=2, dtype=torch.float64, seed=0, sparse=False):
    draw = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    gate = torch.rand(batch, number, generator=draw, dtype=torch.float64) + .1
    if sparse: gate = gate * torch.stack([torch.randperm(number, generator=draw) < 2 for _ in range(batch)])
    return dict(x=new(batch, tokens, d_in), weight=new(d_out, d_in), bias=new(d_out), down=new(number * rank, d_in), up=new(d_out, number * rank), gate=gate.to(dtype))


def by_hand(x, weight, bias, down, up, gate, scale):
    "Token by token, expert by expert, in numpy."
    x, weight, bias, down, up, gate = (v.detach().double().numpy() for v in (x, weight, bias, down, up, gate))
    rank = len(down) // gate.shape[1]
    out = np.empty((*x.shape[:2], len(weight)))
    for b in range(len(x)):
        for n in range(x.shape[1]):
            total = weight @ x[b, n] + bias
            for e in range(gate.shape[1]):
                for r in range(e * rank, (e + 1) * rank): total = total + scale * gate[b, e] * (down[r] @ x[b, n]) * up[:, r]
            out[b, n] = total
    return torch.from_numpy(out)


def product(given, scale=1.5, **more):
    given = dict(given)
    rank = len(given["down"]) // given["gate"].shape[1]
    return expert_product(**{**given, "gate": wide_gate(given["gate"], rank)}, scale=scale, **more)


def gradients(f, given, direction):
    leaves = {name: given[name].detach().clone().requires_grad_() for name in ("x", "down", "up", "gate")}
    return dict(zip(leaves, torch.autograd.grad(f({**given, **leaves}), list(leaves.values()), direction)))


@pytest.mark.parametrize("tokens, sparse", [(7, False), (7, True), (LONG, False), (LONG, True)])
def test_value_is_the_sum_written_out(tokens, sparse):
    given = operands(tokens=tokens, sparse=sparse)
    expected = by_hand(**given, scale=1.5)
    torch.testing.assert_close(product(given), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expert_loop(**given, scale=1.5), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens, sparse", [(7, False), (7, True), (LONG, False), (LONG, True)])
def test_gradients_are_those_of_the_loop(tokens, sparse):
    given = operands(tokens=tokens, sparse=sparse)
    direction = torch.randn(3, tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = gradients(product, given, direction), gradients(lambda v: expert_loop(**v, scale=1.5), given, direction)
    theirs["gate"] = theirs["gate"] * (given["gate"] != 0)          # a gate of 0 is not chosen
    for name in ours: torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11)


def test_gradcheck_of_all_inputs():
    given = operands(batch=2, tokens=3, d_in=4, d_out=3, number=2)
    leaves = [given[name].requires_grad_() for name in ("x", "down", "up", "gate")]
    f = lambda x, down, up, gate: product(dict(x=x, weight=given["weight"], bias=given["bias"], down=down, up=up, gate=gate))
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradcheck(lambda x, down, up: expert_product(x, given["weight"], None, down, up, None, .7), leaves[:3])

    def dropped(*leaves):
        torch.manual_seed(3)
        return expert_product(leaves[0], given["weight"], given["bias"], leaves[1], leaves[2], None, 2., .4, True)
    assert torch.autograd.gradcheck(dropped, leaves[:3])


@pytest.mark.parametrize("sparse", [False, True])
def test_gathered_experts_and_all_columns_agree(sparse):
    given = operands(tokens=LONG, sparse=sparse)
    direction = torch.randn(3, LONG, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    few, everything = (gradients(lambda v, n=n: product(v, active=n), given, direction) for n in (None, 10))
    for name in few: torch.testing.assert_close(few[name], everything[name], rtol=1e-11, atol=1e-11)
    if sparse: assert chosen_columns(wide_gate(given["gate"], 2), LONG, None).shape == (3, 4)


def test_rows_may_choose_different_numbers_of_experts():
    given = operands(tokens=LONG)
    given["gate"] = torch.tensor([[1., 0, 0, 0, 0], [0, .5, 0, .5, 0], [0, 0, 0, 0, 0]], dtype=torch.float64)
    columns = chosen_columns(wide_gate(given["gate"], 2), LONG, None)
    assert columns.shape == (3, 4) and set(columns[1].tolist()) == {2, 3, 6, 7}
    torch.testing.assert_close(product(given), by_hand(**given, scale=1.5), rtol=1e-12, atol=1e-12)
    nobody = {**given, "gate": torch.zeros(3, 5, dtype=torch.float64)}
    torch.testing.assert_close(product(nobody), torch.nn.functional.linear(given["x"], given["weight"], given["bias"]))
    assert all((g == 0).all() for name, g in gradients(product, nobody, torch.ones(3, LONG, 6, dtype=torch.float64)).items() if name != "x")


def test_without_gate_it_is_one_lora():
    given = operands()
    plain = given["x"] @ (given["weight"] + 1.5 * given["up"] @ given["down"]).T + given["bias"]
    torch.testing.assert_close(expert_product(**{**given, "gate": None}, scale=1.5), plain)
    torch.testing.assert_close(product({**given, "gate": torch.ones(3, 5, dtype=torch.float64)}), plain)


@pytest.mark.parametrize("tokens", [4, LONG])
def test_shapes_other_than_batch_of_sequences(tokens):
    given = operands(tokens=tokens, sparse=True)
    flat = {**given, "x": given["x"][:, 0]}
    torch.testing.assert_close(product(flat), product(given)[:, 0])                                              # one token a row
    grid = {**given, "x": torch.stack([given["x"], given["x"]], 1)}
    torch.testing.assert_close(product(grid)[:, 1], product(given))                                             # four dimensions
    strided = {**given, "x": given["x"].transpose(0, 1).contiguous().transpose(0, 1)}
    torch.testing.assert_close(product(strided), product(given))                                                # not contiguous
    direction = torch.ones(3, 6, dtype=torch.float64)[:, None].expand(3, tokens, 6)                              # nor the gradient
    torch.testing.assert_close(gradients(product, strided, direction), gradients(product, given, direction.contiguous()))


def test_empty_batch_and_no_tokens():
    for batch, tokens in ((0, 7), (0, LONG), (2, 0)):
        given = operands(batch=max(batch, 1), tokens=tokens)
        given = {**given, "x": given["x"].new_zeros(batch, tokens, 10), "gate": given["gate"].new_ones(batch, 5)}
        found = gradients(product, given, torch.zeros(batch, tokens, 6, dtype=torch.float64))
        assert product(given).shape == (batch, tokens, 6) and (found["down"] == 0).all() and found["x"].shape == (batch, tokens, 10)


@pytest.mark.parametrize("tokens", [9, LONG])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_bfloat16(tokens, factors):
    given = operands(tokens=tokens, d_in=64, d_out=48, sparse=True)
    low = {name: v.to(factors if name in ("down", "up") else torch.float32 if name == "gate" else torch.bfloat16) for name, v in given.items()}
    y = product(low)
    assert y.dtype == torch.bfloat16
    exact = product({name: v.double() for name, v in low.items()})
    assert (y.double() - exact).abs().max() < .02 * exact.abs().max()
    direction = torch.randn(3, tokens, 48, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    ours, theirs = gradients(product, low, direction), gradients(product, {n: v.double() for n, v in low.items()}, direction.double())
    for name in ours:
        assert ours[name].dtype == low[name].dtype
        assert (ours[name].double() - theirs[name]).abs().max() < .03 * theirs[name].abs().max(), name


def test_autocast_computes_in_its_dtype_and_keeps_the_dtype_of_gradients():
    given = operands(tokens=LONG, dtype=torch.float32, sparse=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(given).dtype == torch.bfloat16
        leaves = {name: given[name].clone().requires_grad_() for name in ("x", "down", "up", "gate")}
        loss = product({**given, **leaves}).float().sum()
    loss.backward()
    expected = gradients(product, {n: v.double() for n, v in given.items()}, torch.ones(3, LONG, 6, dtype=torch.float64))
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad.double() - expected[name]).abs().max() < .03 * expected[name].abs().max(), name
    with torch.autocast("cpu", enabled=False): assert product(given).dtype == torch.float32


def test_dropout_hides_only_from_the_experts():
    given = operands(tokens=400, number=1, rank=10, dtype=torch.float32)
    given |= {"down": torch.eye(10), "up": torch.eye(6, 10), "bias": torch.zeros(6), "weight": torch.zeros(6, 10), "x": torch.ones(3, 400, 10), "gate": torch.ones(3, 1)}
    torch.manual_seed(0)
    y = product(given, 1., dropout=.25, training=True)
    values = y.unique().tolist()
    assert values == pytest.approx([0, 4 / 3]) and (y == 0).float().mean().item() == pytest.approx(.25, abs=.02)
    assert (product(given, 1., dropout=.25) == 1).all()                                    # not while evaluating
    frozen = expert_product(given["x"], torch.eye(6, 10), None, given["down"], torch.zeros(6, 10), None, 1., .9, True)
    assert (frozen == 1).all()                                                             # the backbone sees all of x


def test_only_what_is_wanted_gets_a_gradient_and_little_is_kept():
    given = operands(batch=4, tokens=128, d_in=32, d_out=32, number=8, rank=4, dtype=torch.float32, sparse=True)
    kept = []
    for name in ("down", "up"): given[name].requires_grad_()

    def keep(v):
        kept.append(v)
        return v
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v): y = product(given)
    large = [v for v in kept if v.numel() >= 4 * 128 * 8]
    assert {tuple(v.shape) for v in large} == {(4, 128, 32), (4, 128, 8)}                  # x, and t of the two experts of four ranks that a row chose
    y.sum().backward()
    assert given["x"].grad is None and given["weight"].grad is None and given["down"].grad is not None
    with torch.no_grad(): assert not product(given).requires_grad


def test_checkpointing_gives_the_same_gradients():
    given = operands(tokens=LONG, sparse=True)
    direction = torch.ones(3, LONG, 6, dtype=torch.float64)
    again = lambda v: checkpoint(lambda x, down, up, gate: product({**v, "x": x, "down": down, "up": up, "gate": gate}), v["x"], v["down"], v["up"], v["gate"], use_reentrant=False)
    torch.testing.assert_close(gradients(again, given, direction), gradients(product, given, direction))


def test_no_second_derivative():
    given = operands()
    x = given["x"].requires_grad_()
    first, = torch.autograd.grad(product(given).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): first.sum().backward()


def test_wide_gate():
    gate = torch.tensor([[1., .25], [0, 1]], requires_grad=True)
    wide = wide_gate(gate, 3)
    assert wide.tolist() == [[1, 1, 1, .25, .25, .25], [0, 0, 0, 1, 1, 1]]
    wide.sum().backward()
    assert gate.grad.tolist() == [[3, 3], [3, 3]]


def test_columns():
    gate = torch.tensor([[0., 1, 1, 0], [1, 0, 1, 0]])
    assert chosen_columns(gate, LONG, None).tolist() == [[1, 2], [0, 2]]
    assert chosen_columns(gate, MANY_TOKENS - 1, None) is None and chosen_columns(None, LONG, 2) is None
    assert chosen_columns(torch.ones(2, 4), LONG, None) is None                              # all are chosen
    assert chosen_columns(gate, LONG, 4) is None and chosen_columns(gate, LONG, 2).tolist() == [[1, 2], [0, 2]]


# --- a gate for every token -------------------------------------------------------------------------------------------------


def token_operands(batch=3, tokens=7, number=5, rank=2, sparse=False, seed=0, **sizes):
    "As `operands`, with gates Float[B, n, E]."
    given, draw = operands(batch=batch, tokens=tokens, number=number, rank=rank, seed=seed, **sizes), torch.Generator().manual_seed(seed + 100)
    gate = torch.rand(batch, tokens, number, generator=draw, dtype=torch.float64) + .1
    if sparse: gate = gate * (torch.rand(batch, tokens, number, generator=draw) < .4)
    return {**given, "gate": gate.to(given["x"].dtype)}


def token_by_token(v, scale=1.5):
    "Every token as a row of its own through `expert_loop`: [B, n, d_out], with gradient."
    given = lambda b, n: {**v, "x": v["x"][b, n][None], "gate": v["gate"][b, n][None]}
    return torch.stack([torch.stack([expert_loop(**given(b, n), scale=scale)[0] for n in range(v["x"].shape[1])]) for b in range(len(v["x"]))])


def token_product(v, scale=1.5, **more): return expert_product(**{**v, "gate": wide_gate(v["gate"], len(v["down"]) // v["gate"].shape[-1])}, scale=scale, **more)


@pytest.mark.parametrize("tokens, sparse", [(7, False), (7, True), (LONG, True)])
def test_gates_of_tokens_are_the_loop_token_by_token(tokens, sparse):
    given = token_operands(tokens=tokens, sparse=sparse)
    x, weight, bias, down, up, gate = (given[name].numpy() for name in ("x", "weight", "bias", "down", "up", "gate"))
    expected = np.stack([[weight @ x[b, n] + bias + 1.5 * sum(gate[b, n, e] * up[:, 2 * e:2 * e + 2] @ (down[2 * e:2 * e + 2] @ x[b, n]) for e in range(5)) for n in range(tokens)] for b in range(3)])
    torch.testing.assert_close(token_product(given), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(token_by_token(given), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens, sparse", [(7, False), (7, True), (LONG, True)])
def test_gradients_with_gates_of_tokens_are_those_of_the_loop(tokens, sparse):
    given = token_operands(tokens=tokens, sparse=sparse)
    direction = torch.randn(3, tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = gradients(token_product, given, direction), gradients(token_by_token, given, direction)
    theirs["gate"] = theirs["gate"] * (given["gate"] != 0)
    for name in ours: torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropout", [0., .4])
def test_gradcheck_with_gates_of_tokens(dropout):
    given = token_operands(batch=2, tokens=3, d_in=4, d_out=3, number=2)
    leaves = [given[name].requires_grad_() for name in ("x", "down", "up", "gate")]

    def f(x, down, up, gate):
        torch.manual_seed(3)
        return token_product(dict(x=x, weight=given["weight"], bias=given["bias"], down=down, up=up, gate=gate), dropout=dropout, training=True)
    assert torch.autograd.gradcheck(f, leaves)


def test_dropout_hides_the_same_elements_with_gates_of_tokens():
    given = token_operands()
    for same in (given, {**given, "gate": given["gate"][:, :1].expand(-1, 7, -1)}):
        torch.manual_seed(3)
        y = token_product(same, dropout=.4, training=True)
        torch.manual_seed(3)
        kept = experts.drop_out(torch.ones_like(given["x"]), .4)
        heard = token_by_token({**same, "x": given["x"] * kept, "weight": torch.zeros_like(given["weight"]), "bias": None})
        torch.testing.assert_close(y, given["x"] @ given["weight"].T + given["bias"] + heard, rtol=1e-12, atol=1e-12)
    assert not y.equal(token_product(same)) and token_product(same, dropout=.4).equal(token_product(same))


@pytest.mark.parametrize("tokens, sparse", [(7, False), (LONG, False), (LONG, True)])
def test_gates_of_sequences_repeated_over_tokens_are_gates_of_tokens(tokens, sparse):
    given = operands(tokens=tokens, sparse=sparse)
    repeated = lambda v: token_product({**v, "gate": v["gate"][:, None].expand(-1, tokens, -1)})
    torch.testing.assert_close(repeated(given), product(given), rtol=1e-12, atol=1e-12)
    direction = torch.randn(3, tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = gradients(repeated, given, direction), gradients(product, given, direction)
    for name in ours: torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11)


def test_gates_of_tokens_take_all_columns():
    gate = token_operands(tokens=LONG, sparse=True)["gate"]
    assert chosen_columns(wide_gate(gate, 2), LONG, None) is None and chosen_columns(wide_gate(gate, 2), LONG, 4) is None
    given = token_operands(tokens=LONG, sparse=True)
    assert token_product(given, active=4).equal(token_product(given))


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_bfloat16_with_gates_of_tokens(factors):
    given = token_operands(tokens=20, d_in=64, d_out=48, sparse=True)
    low = {name: v.to(factors if name in ("down", "up") else torch.float32 if name == "gate" else torch.bfloat16) for name, v in given.items()}
    exact, direction = {name: v.double() for name, v in low.items()}, torch.randn(3, 20, 48, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    y, expected = token_product(low), token_by_token(exact)
    assert y.dtype == torch.bfloat16 and (y.double() - expected).abs().max() < .02 * expected.abs().max()
    ours, theirs = gradients(token_product, low, direction), gradients(token_by_token, exact, direction.double())
    theirs["gate"] = theirs["gate"] * (given["gate"] != 0)
    for name in ours:
        assert ours[name].dtype == low[name].dtype
        assert (ours[name].double() - theirs[name]).abs().max() < .03 * theirs[name].abs().max(), name


def test_autocast_with_gates_of_tokens():
    given = token_operands(tokens=20, dtype=torch.float32, sparse=True)
    leaves = {name: given[name].clone().requires_grad_() for name in ("x", "down", "up", "gate")}
    with torch.autocast("cpu", torch.bfloat16): y = token_product({**given, **leaves})
    y.float().sum().backward()
    expected = gradients(token_by_token, {n: v.double() for n, v in given.items()}, torch.ones(3, 20, 6, dtype=torch.float64))
    expected["gate"] = expected["gate"] * (given["gate"] != 0)
    assert y.dtype == torch.bfloat16
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad.double() - expected[name]).abs().max() < .03 * expected[name].abs().max(), name


def test_shapes_with_gates_of_tokens():
    given = token_operands()
    grid = {**given, "x": torch.stack([given["x"], given["x"]], 1), "gate": torch.stack([given["gate"], given["gate"].flip(1)], 1)}
    torch.testing.assert_close(token_product(grid)[:, 0], token_product(given))                                  # four dimensions
    torch.testing.assert_close(token_product(grid)[:, 1], token_product({**given, "gate": given["gate"].flip(1)}))
    strided = {name: v.transpose(0, 1).contiguous().transpose(0, 1) if name in ("x", "gate") else v for name, v in given.items()}
    torch.testing.assert_close(token_product(strided), token_product(given))                                    # not contiguous
    again = lambda v: checkpoint(lambda x, down, up, gate: token_product({**v, "x": x, "down": down, "up": up, "gate": gate}), v["x"], v["down"], v["up"], v["gate"], use_reentrant=False)
    direction = torch.ones(3, 6, dtype=torch.float64)[:, None].expand(3, 7, 6)
    torch.testing.assert_close(gradients(again, given, direction), gradients(token_product, given, direction))
    for batch, tokens in ((0, 7), (2, 0)):
        empty = {**given, "x": given["x"].new_zeros(batch, tokens, 10), "gate": given["gate"].new_ones(batch, tokens, 5)}
        found = gradients(token_product, empty, torch.zeros(batch, tokens, 6, dtype=torch.float64))
        assert (found["down"] == 0).all() and found["gate"].shape == (batch, tokens, 5)


@pytest.mark.parametrize("shape, message", [((3, 6, 10), r"gate is \[3, 6, 10\], not \[3, 7, 10\]"), ((3, 7, 5), r"gate is \[3, 7, 5\], not \[3, 7, 10\]"), ((3, 1, 10), r"gate is \[3, 1, 10\]"), ((2, 7, 10), r"gate is \[2, 7, 10\]"),
                                            ((3, 7, 1, 10), r"gate is \[3, 7, 1, 10\]"), ((10,), r"gate is \[10\]")])
def test_bad_gates_of_tokens(shape, message):
    with pytest.raises(ValueError, match=message): expert_product(**{**operands(dtype=torch.float32), "gate": torch.zeros(shape)})


@pytest.mark.parametrize("wrong, message", [
    (dict(x=torch.zeros(3, 7, 9)), r"x is \[3, 7, 9\], not \[3, 7, 10\]"), (dict(down=torch.zeros(10, 9)), r"down is \[10, 9\]"), (dict(up=torch.zeros(6, 9)), r"up is \[6, 9\], not \[6, 10\]"),
    (dict(gate=torch.zeros(3, 5)), r"gate is \[3, 5\], not \[3, 10\]"), (dict(gate=torch.zeros(2, 10)), r"gate is \[2, 10\]"), (dict(bias=torch.zeros(5)), r"bias is \[5\], not \[6\]"),
    (dict(x=torch.zeros(10), gate=None), "batch dimension"), (dict(dropout=1.), "dropout=1.0"), (dict(dropout=-.1), "dropout=-0.1")])
def test_bad_input(wrong, message):
    given = operands(dtype=torch.float32)
    with pytest.raises(ValueError, match=message): expert_product(**{**given, "gate": wide_gate(given["gate"], 2), **wrong})


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_backbone_that_is_not_frozen_is_refused(name):
    given = operands()
    given[name].requires_grad_()
    with pytest.raises(ValueError, match="freeze"): product(given)
    with torch.no_grad(): product(given)


def test_public_names():
    assert {"expert_product", "expert_loop", "wide_gate"} <= set(experts.__all__)
