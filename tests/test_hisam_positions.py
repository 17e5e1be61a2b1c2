"""Hierarchical rotary positions against plain cosines and sines, and what their scores may depend on."""

import math

import pytest
import torch

from l2rec.hisam.positions import HierarchicalRoPE, turn


def plain(x, item, token, base=10_000.0):
    """One vector, its pairs turned one by one with Python's own cosine and sine."""
    d, out = len(x), list(x)
    for f in range(d // 2):
        n, g = (item, f) if f < d // 4 else (token, f - d // 4)
        a = n * base ** (-g / (d // 4))
        out[2 * f], out[2 * f + 1] = x[2 * f] * math.cos(a) - x[2 * f + 1] * math.sin(a), x[2 * f] * math.sin(a) + x[2 * f + 1] * math.cos(a)
    return out


def test_every_pair_turns_as_written_out():
    torch.manual_seed(0)
    x, item, token = torch.randn(2, 3, 4, 2, 8, dtype=torch.float64), torch.tensor([[0, 5, 299], [7, 8, 1000]]), torch.tensor([0, 1, 2, 5])
    found = HierarchicalRoPE(8).rotate(x, item, token)
    for b in range(2):
        for c in range(3):
            for p in range(4):
                for h in range(2):
                    assert found[b, c, p, h].tolist() == pytest.approx(plain(x[b, c, p, h].tolist(), int(item[b, c]), int(token[p])), abs=1e-12)


@pytest.mark.parametrize("mode", ["hierarchical", "flat"])
def test_scores_depend_on_differences_only(mode):
    torch.manual_seed(0)
    rope, q, k = HierarchicalRoPE(16, 6, mode), *torch.randn(2, 1, 1, 1, 3, 16, dtype=torch.float64)
    one = lambda x, i, p: rope.rotate(x, torch.tensor([i]), torch.tensor([p]))[0, 0, 0]
    score = lambda i, p, j, t: (one(q, i, p) * one(k, j, t)).sum(-1)
    assert torch.allclose(score(9, 3, 4, 1), score(209, 5, 204, 3), atol=1e-10)
    assert not torch.allclose(score(9, 3, 4, 1), score(9, 3, 5, 1), atol=1e-3)
    assert not torch.allclose(score(9, 3, 4, 1), score(9, 3, 4, 2), atol=1e-3)


def test_the_two_subspaces_are_orthogonal():
    torch.manual_seed(0)
    rope, x = HierarchicalRoPE(16), torch.randn(1, 1, 1, 2, 16)
    start = rope.rotate(x, torch.tensor([3]), torch.tensor([2]))
    later = rope.rotate(x, torch.tensor([90]), torch.tensor([2])) - start
    inside = rope.rotate(x, torch.tensor([3]), torch.tensor([4])) - start
    assert later[..., 8:].eq(0).all() and inside[..., :8].eq(0).all()
    assert later[..., :8].abs().min() > 0 and float((later * inside).sum()) == 0


def test_each_half_has_the_full_range_of_frequencies():
    rope = HierarchicalRoPE(16, base=100.0)
    angles = rope.angles(torch.tensor([1]), torch.tensor([1]))[0, 0]
    assert angles[:4].tolist() == pytest.approx([1, 100**-0.25, 0.1, 100**-0.75]) and torch.equal(angles[:4], angles[4:])


def test_flat_positions_number_all_tokens_in_one_line():
    rope, x = HierarchicalRoPE(8, 3, "flat"), torch.randn(1, 4, 3, 1, 8)
    line = HierarchicalRoPE(8, 1, "flat").rotate(x.view(1, 12, 1, 1, 8), torch.arange(12), torch.zeros(1, dtype=torch.long))
    assert torch.equal(rope.rotate(x, torch.arange(4), torch.arange(3)).view(1, 12, 1, 1, 8), line)


def test_no_positions_leave_vectors_alone():
    x = torch.randn(1, 2, 3, 1, 5)
    rope = HierarchicalRoPE(5, mode="none")
    assert rope.rotate(x, torch.arange(2), torch.arange(3)) is x and rope.table(torch.arange(2), torch.arange(3)) is None


def test_lengths_are_kept_and_gradients_turn_back():
    torch.manual_seed(0)
    x = torch.randn(1, 5, 2, 1, 8, dtype=torch.float64, requires_grad=True)
    rope = HierarchicalRoPE(8)
    y = rope.rotate(x, torch.arange(5), torch.arange(2))
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1))
    back, = torch.autograd.grad((y * y.detach()).sum(), x)
    assert torch.allclose(back, x, atol=1e-12)


def test_half_precision_keeps_its_dtype_and_its_angles():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 1, 1, 16)
    at = torch.tensor([1999]), torch.tensor([5])
    half = HierarchicalRoPE(16).rotate(x.bfloat16(), *at)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), HierarchicalRoPE(16).rotate(x, *at), atol=0.05)
    assert turn(x, HierarchicalRoPE(16).table(*at, torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("given, words", [(dict(head_width=6), "multiple of 4"), (dict(head_width=0), "head_width=0"), (dict(head_width=3, mode="flat"), "multiple of 2"),
                                          (dict(head_width=8, mode="rotary"), "hierarchical, flat, none"), (dict(head_width=8, base=1.0), "base=1.0"), (dict(head_width=8, n_tokens=0), "n_tokens=0")])
def test_bad_settings(given, words):
    with pytest.raises(ValueError, match=words):
        HierarchicalRoPE(**given)
