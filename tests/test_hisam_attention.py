"""Memory-anchor attention against its definition: values, gradients, masks, degenerate sizes and bad input."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from l2rec.hisam import attention
from l2rec.hisam.attention import Sight, hierarchical_attention, memory_visible, own_visible, reference_attention


def case(seed=0, b=2, s=2, c=9, p=3, h=2, d=4, t=9, m=1, size=1.0, dtype=torch.float64):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, b, s, c, p, h, d, dtype=dtype)
    mk, mv = torch.randn(2, b, t, m, h, d, dtype=dtype)
    return [x.clone().requires_grad_() for x in (q * size, k, v, mk, mv)], torch.randn(b, s, c, p, h, d, dtype=dtype)


def agree(given, g, tolerance=1e-10, **how):
    fast, slow = hierarchical_attention(*given, **how), reference_attention(*given, **how)
    assert fast.shape == slow.shape and fast.dtype == given[0].dtype
    assert torch.allclose(fast.double(), slow, atol=tolerance, rtol=tolerance)
    for a, b in zip(torch.autograd.grad(fast, given, g), torch.autograd.grad(slow, given, g.double(), allow_unused=True)):
        b = torch.zeros_like(a) if b is None else b
        assert torch.allclose(a.double(), b.double(), atol=tolerance * max(1, float(b.abs().max())), rtol=tolerance)


@pytest.mark.parametrize("n_items, n_tokens", [(1, 1), (3, 2), (4, 3)])
def test_the_mask_is_the_written_out_rule(n_items, n_tokens):
    """key (j, q) is visible to query (i, p) if j = i and q <= p, or j < i and q is the anchor, the last token."""
    own, past = own_visible(n_tokens), memory_visible(1, n_items, n_tokens, n_items, 1)[0]
    for i, p, j, q in itertools.product(range(n_items), range(n_tokens), range(n_items), range(n_tokens)):
        rule = (j == i and q <= p) or (j < i and q == n_tokens - 1)
        found = bool(own[p, q]) if j == i else q == n_tokens - 1 and bool(past[i, p, j])
        assert found == rule


def test_the_whole_is_softmax_over_the_rule_token_by_token():
    """A loop over single queries, on keys of all tokens, with the last token of each item as its anchor."""
    (q, k, v, *_), _ = case(b=1, s=1, c=4)
    q, k, v = (x[:, 0].detach() for x in (q, k, v))
    found = hierarchical_attention(q, k, v, k[:, :, -1:], v[:, :, -1:])
    for i, p, h in itertools.product(range(4), range(3), range(2)):
        keys = [(i, t) for t in range(p + 1)] + [(j, 2) for j in range(i)]
        weight = [math.exp(float(q[0, i, p, h] @ k[0, j, t, h]) / 2) for j, t in keys]
        wanted = sum(w * v[0, j, t, h] for w, (j, t) in zip(weight, keys)) / sum(weight)
        assert torch.allclose(found[0, i, p, h], wanted, atol=1e-12)


@pytest.mark.parametrize("size", [1.0, 60.0])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("looks", [None, [True, True, False], [False, False, False]])
@pytest.mark.parametrize("mode", ["causal", "counts", "all"])
@pytest.mark.parametrize("padded", [False, True])
def test_equal_to_the_definition(size, m, looks, mode, padded):
    t = 9 if mode == "causal" else 5
    given, g = case(m=m, t=t, size=size)
    before = {"causal": "causal", "counts": torch.randint(0, t + 1, (2, 9)), "all": None}[mode]
    real = torch.arange(t) < torch.tensor([[t], [2]]) if padded else None
    agree(given, g, 1e-9, before=before, real=real, memory_for=None if looks is None else torch.tensor(looks))


@pytest.mark.parametrize("size", [1.0, 200.0])
def test_many_tiles_and_many_heads_in_float32(size):
    given, g = case(b=24, s=1, c=70, p=4, h=3, d=8, t=70, size=size, dtype=torch.float32)
    sight = Sight(given[0], 72, 70, 4, 70, 1, "causal", None)
    assert len({h.start for h, _, _ in sight.tiles}) > 1 and len({i.start for _, i, _ in sight.tiles}) > 1
    agree(given, g, 2e-3 if size > 1 else 1e-5)


def test_gradients_by_finite_differences():
    given, _ = case(b=1, s=2, c=3, p=2, h=1, d=2, t=3)
    assert torch.autograd.gradcheck(lambda *x: hierarchical_attention(*x), given)


def test_scores_beyond_what_exponentials_bear():
    """All visible scores far below zero and hidden ones far above: no overflow, no division of zero by zero."""
    q = torch.full((1, 3, 1, 1, 4), 100.0, requires_grad=True)
    k = (-torch.ones(1, 3, 1, 1, 4)).requires_grad_()
    mk = torch.tensor([-1.0, 5.0, 5.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 1, 4).clone().requires_grad_()
    v, mv = torch.arange(3.0).view(1, 3, 1, 1, 1).expand_as(mk), 10 + torch.arange(3.0).view(1, 3, 1, 1, 1).expand_as(mk)
    for real in (None, torch.tensor([[True, False, False]])):
        out = hierarchical_attention(q, k, v, mk, mv, real=real)
        assert torch.allclose(out, reference_attention(q, k, v, mk, mv, real=real).float(), atol=1e-4)
        assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.sum(), [q, k, mk]))
    assert torch.allclose(hierarchical_attention(q, k, v, mk, mv, real=torch.tensor([[False, False, False]])), v)


def test_hidden_memory_may_hold_anything_and_learns_nothing():
    (q, k, v, mk, mv), g = case(t=9)
    real = torch.arange(9) < 4
    real = real.expand(2, 9)
    out = hierarchical_attention(q, k, v, mk, mv, None, real)
    changed = [torch.where(real[..., None, None, None], x, 7.0) for x in (mk, mv)]
    assert torch.equal(out, hierarchical_attention(q, k, v, *changed, None, real))
    assert all(x[:, 4:].eq(0).all() and x[:, :4].ne(0).any() for x in torch.autograd.grad(out, [mk, mv], g))


def test_one_token_an_item_is_causal_attention():
    (q, k, v, *_), _ = case(s=1, c=20, p=1, dtype=torch.float32)
    q, k, v = (x[:, 0] for x in (q, k, v))
    wanted = scaled_dot_product_attention(*(x[:, :, 0].transpose(1, 2) for x in (q, k, v)), is_causal=True)
    assert torch.allclose(hierarchical_attention(q, k, v, k, v)[:, :, 0].transpose(1, 2), wanted, atol=1e-5)


def test_all_tokens_as_memory_is_causal_attention_over_tokens():
    (q, k, v, *_), _ = case(s=1, c=7, p=3, dtype=torch.float32)
    q, k, v = (x[:, 0] for x in (q, k, v))
    line = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    found = hierarchical_attention(q, k, v, k, v).flatten(1, 2).transpose(1, 2)
    assert torch.allclose(found, scaled_dot_product_attention(*line, is_causal=True), atol=1e-5)


def test_streams_are_independent_queries():
    given, _ = case(s=3)
    whole = hierarchical_attention(*given)
    for s in range(3):
        assert torch.allclose(whole[:, s], hierarchical_attention(*(x[:, s] for x in given[:3]), *given[3:]), atol=1e-12)


def test_counts_of_the_position_are_causal():
    given, _ = case()
    counts = torch.arange(9).expand(2, 9)
    assert torch.allclose(hierarchical_attention(*given), hierarchical_attention(*given, counts), atol=1e-12)


def test_details_of_history_are_reachable_only_through_the_memory():
    (q, k, v, *_), _ = case(s=1, c=6)
    q, k, v = (x[:, 0] for x in (q, k, v))
    out = hierarchical_attention(q, k, v, k[:, :, -1:], v[:, :, -1:])
    for x in torch.autograd.grad(out[:, 4].sum(), [k, v]):
        assert x[:, :4, :2].eq(0).all() and x[:, :4, 2].ne(0).any() and x[:, 4].ne(0).any() and x[:, 5].eq(0).all()


def test_any_strides():
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 3, 2, 4, requires_grad=True)
    q, k, v = qkv.unbind(3)
    agree([q, k, v, k[:, :, -1:], v[:, :, -1:]], torch.randn(2, 3, 5, 2, 4).permute(0, 2, 1, 3, 4), 1e-5)


@pytest.mark.parametrize("t, c", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_see_and_nobody_to_see_it(t, c):
    given, g = case(t=t, c=c)
    out = hierarchical_attention(*given, None)
    assert out.shape == (2, 2, c, 3, 2, 4) and torch.allclose(out, reference_attention(*given, None))
    assert [x.shape for x in torch.autograd.grad(out, given, g, allow_unused=True) if x is not None] == [x.shape for x in given][: 5 if c else 1]


def test_half_precision_is_computed_in_float32():
    given, _ = case(c=20, t=20, dtype=torch.float32)
    half = [x.detach().bfloat16() for x in given]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hierarchical_attention(*half)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, hierarchical_attention(*(x.float() for x in half)).bfloat16())


def test_what_is_kept_grows_linearly(monkeypatch):
    def kept(t):
        given, _ = case(b=1, s=1, c=t, t=t, dtype=torch.float32)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            hierarchical_attention(*given)
        return sum(sizes), Sight(given[0], 2, t, 3, t, 1, "causal", None).largest

    (saved, tile), (saved_4, tile_4) = kept(200), kept(800)
    assert saved_4 <= 4.01 * saved and tile_4 <= max(4.01 * tile, 1 << 18)


def test_it_cannot_be_differentiated_twice():
    given, _ = case(c=3, t=3)
    out = hierarchical_attention(*given)
    first, = torch.autograd.grad(out, given[0], torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_nan_is_not_hidden():
    given, _ = case(dtype=torch.float32)
    q = given[0].detach().clone()
    q[0, 0, 3] = math.nan
    out = hierarchical_attention(q, *given[1:])
    assert out[0, 0, 3].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("change, words", [
    (dict(q=(2, 9, 3)), "q has shape"), (dict(k=(2, 2, 9, 4, 2, 4)), "k has shape"), (dict(mk=(2, 9, 1, 3, 4)), "mk has shape"), (dict(mv=(2, 8, 1, 2, 4)), "mv has shape"),
    (dict(mk=(2, 8, 1, 2, 4), mv=(2, 8, 1, 2, 4)), "as many memory items"), (dict(before="Causal"), "'Causal'"), (dict(before=torch.zeros(9, 2)), "before has shape"),
    (dict(real=torch.ones(2, 8, dtype=torch.bool)), "real is"), (dict(real=torch.ones(2, 9)), "real is torch.float32"), (dict(memory_for=torch.ones(2, dtype=torch.bool)), "memory_for is"),
])
def test_bad_shapes_are_named(change, words):
    given, _ = case()
    call = dict(zip(("q", "k", "v", "mk", "mv"), given)) | {name: torch.zeros(x) if isinstance(x, tuple) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=words):
        hierarchical_attention(**call)


def test_the_safe_limit_leaves_room_in_float32():
    """Weights of the backward pass may reach exp(2 * limit) where hidden."""
    assert math.exp(2 * attention.largest_safe_score) < torch.finfo(torch.float32).max / 1e3
