"""The contestants of the speed comparison compute the same thing, touch the same matrices, and are counted right."""

import pytest
import torch
from l2rec.dual_view.dpmoe import DPMoELinear
from l2rec.dual_view.speed import (MATRICES, AutomaticLinear, LoopLinear, bare_products, computed_by, padding_share, random_backbone, step, step_operations, with_experts, with_lora, with_xlora, worked)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def given():
    torch.manual_seed(0)
    ids = torch.randint(1000, (3, 70))
    mask = torch.ones(3, 70, dtype=torch.long)
    mask[1, 50:] = 0
    return {"input_ids": ids, "attention_mask": mask}, torch.randn(3, 48), torch.randn(3, 70, 48)


def backbone(**settings): return random_backbone(48, 2, 4, 128, **settings)


@pytest.mark.parametrize("kind", [LoopLinear, AutomaticLinear])
def test_other_ways_of_the_same_tuner_give_the_same_gradients(given, kind):
    inputs, user, direction = given
    model = with_experts(backbone())
    ours = step(model, inputs, direction, "semantic", user)
    theirs = step(computed_by(model, kind), inputs, direction, "semantic", user)
    assert sum(isinstance(m, kind) for m in model.modules()) == 2 * len(MATRICES)
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(ours, step(computed_by(model, DPMoELinear), inputs, direction, "semantic", user)):
        if a is not None: torch.testing.assert_close(a, b)


def test_both_views_train_shared_experts_and_their_own(given):
    inputs, user, direction = given
    model = with_experts(backbone())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for view, other in (("semantic", "behaviour"), ("behaviour", "semantic")):
        touched = {name for name, g in zip(names, step(model, inputs, direction, view, user)) if g is not None and g.abs().sum() > 0}
        assert any("shared" in n for n in touched) and any(view in n and "router" in n for n in touched) and not any(other in n for n in touched)


def test_lora_has_as_many_weights_as_the_experts_of_a_view(given):
    count = lambda model, but: sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not any(b in n for b in but))
    assert count(with_lora(backbone(), 64), ()) == count(with_experts(backbone()), ("router", "behaviour"))


def test_xlora_runs_and_trains_its_adapters(given):
    inputs, _, direction = given
    model = with_xlora(backbone, experts=3, rank=2)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    found = step(model, inputs, direction)
    assert sum("lora_A" in n for n in names) == 3 * 2 * len(MATRICES) and all(g is not None for g in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_float32(given, dtype):
    inputs = given[0]
    torch.manual_seed(1)
    model = backbone(dtype=dtype)
    real = inputs["attention_mask"].bool()
    found = {}
    for way in ("eager", "sdpa", "sdpa_float32"):
        model.set_attn_implementation(way)
        found[way] = model(**inputs).last_hidden_state[real]
        assert found[way].dtype == dtype
    assert (found["sdpa_float32"] - found["eager"]).abs().max() < (.1 if dtype == torch.bfloat16 else 1e-5)
    if dtype == torch.float32: torch.testing.assert_close(found["sdpa"], found["sdpa_float32"])


def test_bfloat16_step(given):
    inputs, user, direction = given
    model = with_experts(backbone(dtype=torch.bfloat16, attention="sdpa_float32"))
    assert all(g.isfinite().all() for g in step(model, inputs, direction.bfloat16(), "semantic", user) if g is not None)


def test_operations_are_those_that_pytorch_counts():
    model = backbone()
    run, operations = bare_products(model, 20)
    with FlopCounterMode(display=False) as counter: run()
    assert counter.get_total_flops() == operations
    weights = [m.weight for m in model.encoder.modules() if isinstance(m, nn.Linear)]
    assert operations == 2 * 2 * 20 * sum(w.numel() for w in weights) and len(weights) == 2 * 6

    x = torch.randn(3, 10, 48, requires_grad=True)
    frozen = step_operations(model, 3, 10, 0) - 12 * 3 * 10**2 * 48 * 2            # without attention
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter: torch.autograd.grad(model(inputs_embeds=x).last_hidden_state.sum(), x)
    assert counter.get_total_flops() == frozen + 12 * 3 * 10**2 * 48 * 2
    adapted = 4 * 2 * (48 + 48)
    assert step_operations(model, 3, 10, 16) - step_operations(model, 3, 10, 0) == 3 * 2 * 16 * adapted * 30


def test_padding():
    length = torch.tensor([10, 2, 2, 2])
    assert padding_share(length) == pytest.approx(1 - 16 / 40)
    assert padding_share(length, 10) == 0
    assert padding_share(torch.full((5,), 7)) == 0


def test_backbone_is_frozen_and_without_chance(given):
    model = backbone()
    assert not any(p.requires_grad for p in model.parameters())
    inputs = given[0]
    model.train()
    torch.testing.assert_close(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_worked_counts_this_process():
    import time
    assert worked(lambda: time.sleep(.05))() < .03
    assert worked(lambda: sum(range(3_000_000)))() > .005
