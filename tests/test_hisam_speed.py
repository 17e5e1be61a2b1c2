"""Both sides of every race compute what they should: other ways of attention, stacks, labels, and scores; and the experiment runs at tiny size."""

import math
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from l2rec.hisam.attention import hierarchical_attention, reference_attention
from l2rec.hisam.speed import (Stack, flat_attention, flat_pass, kept_bytes, labels_at_once, merged_attention, one_label, random_histories, random_model, scored_by_flat_passes,
                               scored_by_own_passes, scored_from_memory, written_out_attention)
from l2rec.training.plan import execute
from l2rec.training.records import read_record

ROOT = Path(__file__).resolve().parent.parent


def strong(model, seed=0):
    """Weights far from their initial values, so that feedback, gaps and anchors matter."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("way", [written_out_attention, merged_attention])
@pytest.mark.parametrize("items, tokens", [(1, 2), (2, 1), (9, 3)])
def test_other_ways_agree_in_values_and_gradients(way, items, tokens):
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 2, items, tokens, 2, 8, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (q, k, v, k[:, :, -1:], v[:, :, -1:])]
    found, wanted = way(*inputs), reference_attention(*inputs)
    assert torch.allclose(found, wanted, atol=1e-10)
    pairs = [torch.autograd.grad(x, inputs, g, allow_unused=True) for x in (found, wanted)]
    assert all(torch.allclose(b if a is None else a, b, atol=1e-9) for a, b in zip(*pairs) if b is not None)


def test_flat_attention_is_softmax_over_all_earlier_tokens():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 3, 2, 8, dtype=torch.float64)
    a, b, c = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    weight = (a @ b.mT / math.sqrt(8)).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    assert torch.allclose(flat_attention(q, k, v).flatten(1, 2).transpose(1, 2), weight @ c, atol=1e-12)


@pytest.mark.parametrize("kind", ["anchors", "flat"])
def test_a_stack_is_its_blocks_written_out(kind):
    """Pre-norm blocks in plain operations with a dense mask over all tokens."""
    stack, x = strong(Stack(16, 2, 2, 3)).double(), torch.randn(1, 5, 3, 16, dtype=torch.float64)
    item, token = torch.arange(5).repeat_interleave(3), torch.arange(3).repeat(5)
    seen = item[:, None].eq(item) & (token <= token[:, None]) | (item < item[:, None]) & ((token == 2) | (kind == "flat"))
    h = x.view(15, 16)
    for block in stack.blocks:
        q, k, v = block.qkv(block.norm(h)).view(15, 3, 2, 8).unbind(1)
        q, k = (stack.ropes[kind].rotate(y.reshape(1, 5, 3, 2, 8), torch.arange(5), torch.arange(3)).reshape(15, 2, 8) for y in (q, k))
        weight = torch.einsum("ihd,jhd->hij", q, k).div(math.sqrt(8)).masked_fill(~seen, -math.inf).softmax(-1)
        h = h + block.out(torch.einsum("hij,jhd->ihd", weight, v).flatten(1))
        h = h + block.down(gelu(block.up(block.norm_mlp(h)), approximate="tanh"))
    assert torch.allclose(stack(x, kind).view(15, 16), h, atol=1e-6)      # turns are made in the model's single precision tables
    assert len(stack.step(x, torch.randn_like(x), kind)) == len(list(stack.parameters()))


def test_every_label_of_one_pass_equals_its_own_pass():
    model = strong(random_model(items=20, levels=2, codes=7, max_length=9, layers=3, heads=2, width=16, memory="all", positions="flat"))
    h = random_histories(model, 9)
    with torch.no_grad():
        alone = torch.cat([flat_pass(model, h.item[None, :n], h.feedback[None, :n], h.gap[None, :n]) for n in range(1, 10)])
        assert torch.allclose(model(h), alone, atol=1e-5)
    whole, parts = labels_at_once(model, h), [one_label(model, h, place) for place in range(9)]
    for i, a in enumerate(whole):
        if a is not None:
            assert torch.allclose(a, sum(torch.zeros_like(a) if p[i] is None else p[i] for p in parts) / 9, atol=1e-4)


@pytest.mark.parametrize("memory, positions", [("anchor", "hierarchical"), ("all", "flat")])
def test_ways_of_scoring_agree(memory, positions):
    model = strong(random_model(items=20, levels=2, codes=7, max_length=9, layers=2, heads=2, width=16, memory=memory, positions=positions))
    h, candidates = random_histories(model, 8), torch.tensor([[3, 3, 19, 0]])
    once = scored_from_memory(model, h, candidates)
    assert once.shape == (1, 4) and once[0, 0] == pytest.approx(float(once[0, 1]), abs=1e-6)
    assert torch.allclose(once, scored_by_own_passes(model, h, candidates), atol=1e-5)
    assert torch.allclose(once, scored_by_flat_passes(model, h, candidates), atol=1e-5) == (memory == "all")


def test_kept_bytes_counts_each_storage_once():
    x = torch.randn(100, requires_grad=True)
    assert kept_bytes(lambda: x * x) == 400
    torch.manual_seed(0)
    stack = Stack(16, 1, 2, 3)
    grow = [kept_bytes(lambda n=n: stack(torch.randn(1, n, 3, 16), "anchors")) for n in (200, 400, 800)]
    assert (grow[2] - grow[1]) == pytest.approx(2 * (grow[1] - grow[0]), rel=0.01)


def test_the_experiment_at_tiny_size(tmp_path):
    place = tmp_path / "demo/runs/attention_efficiency/synthetic/hi-sam/seed-0"
    execute(ROOT / "nbs/experiments/attention_efficiency.ipynb", tmp_path / "run.ipynb",
            dict(record=str(place), length=12, windows=2, users=3, levels=2, width=16, heads=2, layers=2, n_candidates=5, repeats=1, label_places=2, lengths=[4, 8], numbers=[1, 3]), ROOT)
    record = read_record(place)
    wanted = {"attention", "attention-merged", "attention-written-out", "stream-step", "labels", "scoring-flat-passes", "scoring-own-passes", "latency-all-tokens", "kept-all-tokens", "extend", "extend-one-user"}
    assert {name.removeprefix("ratio/") for name in record.metrics if name.startswith("ratio/")} == wanted
    assert record.metrics["bytes/memory-all-tokens"] == 3 * record.metrics["bytes/memory-anchors"]
    curve = pl.read_csv(place / "curve.csv")
    assert curve.columns == ["kind", "x", "seconds", "bytes"] and curve.height == 8 and (curve["seconds"] > 0).all()
    assert set(record.provenance["notes"]) == {f"ratio/{name}" for name in wanted}
