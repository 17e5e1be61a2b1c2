"""DPMoE against equations in float64, PEFT's LoRA, and what a backbone does alone."""

import copy
import json
import math
import threading
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import (AlbertConfig, AlbertModel, BertConfig, BertForSequenceClassification, BertModel, BloomConfig, BloomModel, DebertaV2Config, DebertaV2Model, DistilBertConfig, DistilBertModel, DynamicCache, GPT2Config, GPT2Model,
                          LlamaConfig, LlamaModel, MPNetConfig, MPNetModel, OPTConfig, OPTModel, Qwen3Config, Qwen3ForCausalLM, Qwen3Model)

from l2rec.dual_view import dpmoe
from l2rec.dual_view.dpmoe import VIEWS, DPMoEConfig, DPMoEModel, Pass, Prefixes, describe_backbone, find_places, trained_share

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SMALL = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=32)
CALM = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def backbone(kind="bert", seed=0, **sizes):
    torch.manual_seed(seed)
    causal = SMALL | dict(num_key_value_heads=1, head_dim=8)      # q, k, v and o of three shapes
    config = {"bert": lambda: BertConfig(**SMALL | CALM | sizes), "qwen3": lambda: Qwen3Config(**causal | sizes), "llama": lambda: LlamaConfig(**causal | sizes)}[kind]()
    return {"bert": BertModel, "qwen3": Qwen3Model, "llama": LlamaModel}[kind](config).eval()


def wake(model, seed=1):
    """B away from zero, so that experts are heard."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "dpmoe_B" in name or "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model.eval()


def tuned(kind="bert", seed=0, sizes={}, **config):
    return wake(get_peft_model(backbone(kind, seed, **sizes), DPMoEConfig(**dict(r=4, user_width=6) | config)))


torch.manual_seed(5)
IDS, USERS = torch.randint(1, 50, (3, 7)), torch.randn(3, 6)
MASK = torch.arange(7) < torch.tensor([[7], [4], [2]])


def run(model, view="semantic", user=USERS, mask=MASK, ids=IDS):
    with model.view(view, user=user.to(next(model.parameters()).dtype) if user is not None else None, mask=mask) as routes:
        return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state, routes


# -- equations ---------------------------------------------------------------------------------------------------------

def slow_bert(model, view, scale):
    """Hidden states of a tiny BERT under DPMoE, sequence by sequence, experts one by one, in float64: every equation spelled out."""
    tuner, bert, out = model.base_model, model.base_model.model, torch.zeros(3, 7, 32, dtype=torch.float64)
    for b in range(3):
        real = MASK[b].double()
        x = bert.embeddings(input_ids=IDS[b : b + 1])[0]
        for k, block in enumerate(bert.encoder.layer):
            router = tuner.dpmoe_router["default"][view][k]
            c, u = (real[:, None] * x).sum(0) / real.sum(), USERS[b].double()
            z = router.context.weight @ c + router.user.weight @ u + router.interaction.weight @ ((router.of_context.weight @ c) * (router.of_user.weight @ u))
            best = z.argsort(descending=True)[:2].tolist()
            total = sum(math.exp(z[e]) for e in best)

            def weight(layer):
                w, r = layer.base_layer.weight.clone(), 4
                A, B = layer.dpmoe_A["default"], layer.dpmoe_B["default"]
                for j in range(2):
                    w += scale * B["shared"][:, j * r : (j + 1) * r] @ A["shared"][j * r : (j + 1) * r]
                for e in best:
                    w += scale * math.exp(z[e]) / total * B[view][:, e * r : (e + 1) * r] @ A[view][e * r : (e + 1) * r]
                return w

            own, finish, ffn = block.attention.self, block.attention.output, block.output
            q, key, v = (x @ weight(m).T + m.base_layer.bias for m in (own.query, own.key, own.value))
            heads = []
            for h in range(2):
                at = slice(16 * h, 16 * h + 16)
                score = (q[:, at] @ key[:, at].T / 4).masked_fill(~MASK[b], -torch.inf)
                heads.append(score.softmax(1) @ v[:, at])
            x = finish.LayerNorm(torch.cat(heads, 1) @ weight(finish.dense).T + finish.dense.base_layer.bias + x)
            x = ffn.LayerNorm(ffn.dense(torch.nn.functional.gelu(block.intermediate.dense(x))) + x)
        out[b] = x
    return out


@pytest.mark.parametrize("view", VIEWS)
def test_a_tiny_bert_equation_by_equation(view):
    model = tuned(alpha=6).double()
    with torch.no_grad():
        assert torch.allclose(run(model, view)[0][MASK], slow_bert(model, view, 6 / 4)[MASK], atol=1e-10)


@pytest.mark.parametrize("kind", ["bert", "qwen3", "llama"])
@pytest.mark.parametrize("settings", [dict(), dict(ffn=True, routing="dense", layers=[-1]), dict(routing="random"), dict(signals=["context"], shared=0)])
def test_each_user_is_read_through_weights_of_their_own(kind, settings):
    torch.manual_seed(3)
    model, r = tuned(kind, **settings).double(), 4
    with torch.no_grad():
        found, routes = run(model, "behaviour")
        for b in range(3):
            alone = backbone(kind).double()
            for name, k in model.base_model.places.items():
                layer, w = model.base_model.model.get_submodule(name), alone.get_submodule(name).weight
                A, B = layer.dpmoe_A["default"], layer.dpmoe_B["default"]
                for j in range(settings.get("shared", 2)):
                    w += 16 / r * B["shared"][:, j * r : (j + 1) * r] @ A["shared"][j * r : (j + 1) * r]
                for e in range(6):
                    w += 16 / r * routes.gates[k][b, e] * B["behaviour"][:, e * r : (e + 1) * r] @ A["behaviour"][e * r : (e + 1) * r]
            n = MASK[b].sum()
            assert torch.allclose(alone(input_ids=IDS[b : b + 1, :n]).last_hidden_state[0], found[b, :n], atol=1e-9)


def test_one_shared_expert_is_lora():
    ours = tuned(r=4, alpha=10, shared=1, semantic=0, behaviour=0).double()
    names = ["query", "key", "value", "attention.output.dense"]
    theirs = get_peft_model(backbone(), LoraConfig(r=4, lora_alpha=10, target_modules=names)).double().eval()
    pairs = []
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            pairs.append((dict(ours.named_parameters())[name.replace("lora_", "dpmoe_").replace("default.weight", "default.shared")], p))
    with torch.no_grad():
        for mine, lora in pairs:
            lora.copy_(mine)
    a, b = run(ours, "semantic", user=None)[0], theirs(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state
    assert len(pairs) == 16 and torch.allclose(a, b, atol=1e-12)
    for x in (a, b):
        x[MASK].sin().sum().backward()
    assert all(torch.allclose(mine.grad, lora.grad, atol=1e-12) for mine, lora in pairs)


def test_equal_gates_are_the_sum_of_the_experts():
    split, one = tuned(routing="equal", shared=2, semantic=6, r=4, alpha=4).double(), tuned(shared=1, semantic=0, behaviour=0, r=32, alpha=32).double()
    with torch.no_grad():
        for name in split.base_model.places:
            layer, wide = (m.base_model.model.get_submodule(name) for m in (split, one))
            wide.dpmoe_A["default"]["shared"].copy_(torch.cat([layer.dpmoe_A["default"][p] for p in ("shared", "semantic")]))
            wide.dpmoe_B["default"]["shared"].copy_(torch.cat([layer.dpmoe_B["default"][p] for p in ("shared", "semantic")], 1))
        assert torch.allclose(run(split)[0], run(one)[0], atol=1e-12)


def test_top_all_is_the_dense_mixture():
    top, dense = tuned(top_n=6), tuned(routing="dense")
    dense.load_state_dict(top.state_dict())
    with torch.no_grad():
        assert torch.equal(run(top)[0], run(dense)[0])


def test_a_view_without_a_pool_has_the_shared_experts_alone():
    model = tuned(semantic=0)
    with torch.no_grad():
        hidden, routes = run(model, "semantic", user=None)
        assert [g.shape for g in routes.gates] == [(3, 0), (3, 0)] and routes.balance() == 0
        assert not torch.allclose(hidden, run(model, "behaviour")[0], atol=1e-3)
        nothing = tuned(shared=0, semantic=0)
        assert torch.equal(run(nothing, "semantic", user=None)[0], backbone()(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state)


def test_a_new_adapter_changes_nothing():
    model = get_peft_model(backbone("qwen3"), DPMoEConfig(user_width=6))
    assert torch.allclose(run(model)[0], backbone("qwen3")(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state, atol=1e-6)


# -- routes ------------------------------------------------------------------------------------------------------------

def test_padding_and_neighbours_change_no_route():
    model = tuned()
    with torch.no_grad():
        hidden, routes = run(model)
        more, padded = run(model, mask=torch.nn.functional.pad(MASK, (0, 5)), ids=torch.nn.functional.pad(IDS, (0, 5), value=9))
        assert torch.allclose(more[:, :7][MASK], hidden[MASK], atol=1e-5) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(routes.gates, padded.gates))
        order = torch.tensor([2, 0, 1])
        turned = run(model, user=USERS[order], mask=MASK[order], ids=IDS[order])[1]
        assert all(torch.allclose(a[order], b, atol=1e-5) for a, b in zip(routes.gates, turned.gates))


def test_a_sequence_of_padding_alone_is_routed_by_zeros():
    mask = MASK.clone()
    mask[2] = False
    gates = run(tuned(signals=["context"]), user=None, mask=mask)[1].probabilities[0]
    assert torch.allclose(gates[2], torch.full((6,), 1 / 6)) and gates.isfinite().all()


def test_no_mask_means_that_all_tokens_are_real():
    model = tuned()
    with torch.no_grad():
        full = run(model, mask=torch.ones_like(MASK))[0]
        with model.view("semantic", user=USERS):
            assert torch.allclose(model(input_ids=IDS).last_hidden_state, full, atol=1e-6)


def test_gradients_reach_routers_users_and_the_open_view_alone():
    model, user = tuned(), USERS.clone().requires_grad_()
    hidden, routes = run(model, "semantic", user=user)
    (hidden.sin().sum() + routes.balance()).backward()
    assert user.grad.abs().sum() > 0 and routes.balance().requires_grad
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("dpmoe" in name and "behaviour" not in name), name
        assert p.grad is None or p.grad.abs().sum() > 0, name


def test_balance_is_the_mean_over_blocks():
    routes = run(tuned())[1]
    by_hand = [6 / 2 * (c.float().mean(0) * p.mean(0)).sum().item() for c, p in zip(routes.chosen, routes.probabilities)]
    assert len(by_hand) == 2 and routes.balance().item() == pytest.approx(sum(by_hand) / 2, abs=1e-6)
    assert all(run(tuned(routing=r))[1].balance() == 0 for r in ("dense", "random", "equal"))


def test_dropout_acts_in_training_only():
    model = tuned(dropout=0.5)
    with torch.no_grad():
        assert torch.equal(run(model)[0], run(model)[0]) and torch.equal(run(model)[0], run(tuned())[0])
        model.train()
        assert not torch.equal(run(model)[0], run(model)[0])


# -- state -------------------------------------------------------------------------------------------------------------

def test_views_nest_and_two_models_share_none():
    one, two = tuned(), tuned(seed=1)
    with torch.no_grad():
        semantic, behaviour, other = run(one, "semantic")[0], run(one, "behaviour")[0], run(two, "behaviour")[0]
        with one.view("semantic", user=USERS, mask=MASK) as outer:
            assert torch.equal(run(one, "behaviour")[0], behaviour)
            with two.view("behaviour", user=USERS, mask=MASK):
                assert torch.equal(two(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state, other)
                assert torch.equal(one(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state, semantic)
            with pytest.raises(RuntimeError, match="no view is open"):
                two(input_ids=IDS)
        assert outer.view == "semantic" and len(outer.gates) == 2


def test_a_view_ends_with_an_error_inside_it():
    model = tuned()
    with pytest.raises(KeyError):
        with model.view("semantic", user=USERS):
            raise KeyError
    with pytest.raises(RuntimeError, match="no view is open"):
        model(input_ids=IDS)


def test_threads_have_views_of_their_own():
    model, found, ready = tuned(), {}, threading.Barrier(2)
    expected = {view: run(model, view)[0] for view in VIEWS}

    def work(view):
        with torch.no_grad(), model.view(view, user=USERS, mask=MASK):
            ready.wait()
            found[view] = [model(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state for _ in range(5)]

    threads = [threading.Thread(target=work, args=(v,)) for v in VIEWS]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.allclose(x, expected[v], atol=1e-6) for v in VIEWS for x in found[v])


def test_a_deep_copy_is_a_model_of_its_own():
    model = tuned()
    with torch.no_grad(), model.view("semantic", user=USERS, mask=MASK):
        other = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="no view is open"):
            other(input_ids=IDS)
        before = run(model)[0]
        for p in other.base_model.dpmoe_router.parameters():
            p.neg_()
        assert torch.equal(run(model)[0], before) and not torch.equal(run(other)[0], before)


def test_the_last_pass_of_a_view_is_shown():
    model = tuned()
    with torch.no_grad(), model.view("semantic", user=USERS) as routes:
        with pytest.raises(RuntimeError, match="no routes yet"):
            routes.gates
        model(input_ids=IDS)
        first = routes.gates
        model(input_ids=IDS.flip(1) // 2)
        assert len(routes.gates) == len(first) == 2 and not torch.equal(routes.gates[0], first[0])


# -- disabled, merged, unloaded ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_is_the_backbone_to_the_bit(kind, dtype):
    model, alone = tuned(kind).to(dtype), backbone(kind).to(dtype)
    trained = [p.requires_grad for p in model.parameters()]
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).last_hidden_state, alone(input_ids=IDS).last_hidden_state)
    assert [p.requires_grad for p in model.parameters()] == trained and not torch.allclose(run(model)[0], alone(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state, atol=1e-2)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("settings", [dict(), dict(shared=0), dict(semantic=0), dict(routing="dense"), dict(layers=[1])])
def test_merged_is_the_same_user_without_extra_products(view, settings):
    model = tuned(**settings)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        one = dict(user=USERS[:1], mask=MASK[:1], ids=IDS[:1])
        found, routes = run(model, view, **one)
        model.merge_user(view, [g[0] for g in routes.gates])
        assert torch.allclose(model(input_ids=IDS[:1]).last_hidden_state, found, atol=1e-5)
        with pytest.raises(RuntimeError, match="merged for one user"):
            run(model, view)
        with pytest.raises(RuntimeError, match="merged already"):
            model.merge_user(view, routes.gates)
        model.unmerge()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and torch.equal(run(model, view, **one)[0], found)


def test_disabled_while_merged_is_the_backbone_too():
    model, alone = tuned(), backbone()(input_ids=IDS).last_hidden_state
    model.merge_user("semantic", [torch.ones(6)] * 2)
    merged = model(input_ids=IDS).last_hidden_state
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).last_hidden_state, alone) and not torch.allclose(merged, alone, atol=1e-2)
    assert torch.equal(model(input_ids=IDS).last_hidden_state, merged)


def test_bfloat16_weights_come_back_to_the_bit():
    model = tuned("qwen3").bfloat16()
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_user("semantic", [torch.tensor([0.3, 0.7, 0, 0, 0, 0])] * 2)
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.unmerge()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_gates_that_do_not_fit_are_refused():
    model = tuned()
    for gates in ([torch.ones(6)], [torch.ones(5)] * 2, [torch.ones(3, 6)] * 2):
        with pytest.raises(ValueError, match="2 blocks of 6 experts"):
            model.merge_user("semantic", gates)
    with pytest.raises(ValueError, match="merge_user"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="merge_user"):
        model.merge_and_unload()


def test_unload_gives_the_backbone_back():
    model = tuned()
    model.merge_user("semantic", [torch.ones(6)] * 2)
    plain = model.unload()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in plain.modules()) and not any("dpmoe" in n for n, _ in plain.named_parameters())
    assert torch.equal(plain(input_ids=IDS).last_hidden_state, backbone()(input_ids=IDS).last_hidden_state)


def test_one_adapter_a_model_and_none_after_deletion():
    model = tuned()
    with pytest.raises(ValueError, match="one DPMoE adapter a model"):
        model.add_adapter("second", DPMoEConfig(user_width=6))
    model.delete_adapter("default")
    assert torch.equal(model.base_model(input_ids=IDS).last_hidden_state, backbone()(input_ids=IDS).last_hidden_state)
    with pytest.raises(RuntimeError, match="deleted"):
        run(model)
    for name in ("default", "second"):                 # its hooks and routers are still there: it is not laid over them
        with pytest.raises(ValueError, match=r"carries an adapter already \(weights dpmoe_A\): unload"):
            model.add_adapter(name, DPMoEConfig(user_width=6))
    again = get_peft_model(model.base_model.unload(), DPMoEConfig(r=4, user_width=6))
    assert len(run(again)[1].gates) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")                # PEFT warns of it too, and goes on
@pytest.mark.parametrize("first, weights", [(LoraConfig(target_modules=["query"]), "lora_A"), (DPMoEConfig(user_width=6), "dpmoe_A")], ids=["lora", "dpmoe"])
def test_no_adapter_over_an_adapter(first, weights):
    plain = backbone()
    get_peft_model(plain, first)
    names = [n for n, _ in plain.named_parameters()]
    with pytest.raises(ValueError, match=f"carries an adapter already .weights {weights}"):
        get_peft_model(plain, DPMoEConfig(user_width=6))
    assert [n for n, _ in plain.named_parameters()] == names


# -- writing -----------------------------------------------------------------------------------------------------------

def writer():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SMALL | dict(num_key_value_heads=1, head_dim=8))).eval()


def test_a_text_is_written_through_the_route_of_its_prompt():
    model = wake(get_peft_model(writer(), DPMoEConfig(r=4, user_width=6)))
    how = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    with model.view("semantic", user=USERS, mask=torch.ones_like(IDS)) as routes: written = model.generate(input_ids=IDS, **how)
    gates = [g.detach() for g in routes.gates]
    for b in range(3):                                 # weights merged by that route need no view, and read anew at each step
        model.merge_user("semantic", [g[b : b + 1] for g in gates])
        alone = model.generate(input_ids=IDS[b : b + 1], **how | dict(attention_mask=torch.ones(1, 7, dtype=torch.long)), use_cache=False)
        model.unmerge()
        assert torch.equal(written.sequences[b], alone.sequences[0])
        torch.testing.assert_close(torch.stack(written.logits)[:, b], torch.stack(alone.logits)[:, 0], rtol=1e-4, atol=1e-5)
    with model.view("semantic", user=USERS.repeat_interleave(2, 0)): assert model.generate(input_ids=IDS, num_beams=2, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (3, 10)
    with model.view("semantic", user=USERS), pytest.raises(ValueError, match="6 sequences; one row each, also of the beams"): model.generate(input_ids=IDS, num_beams=2, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_a_cache_of_another_view_is_refused():
    model, cache = wake(get_peft_model(writer(), DPMoEConfig(r=4, user_width=6))), DynamicCache()
    with model.view("semantic", user=USERS): model(input_ids=IDS, past_key_values=cache)
    with model.view("semantic", user=USERS), pytest.raises(ValueError, match="not written inside this semantic view"): model(input_ids=IDS[:, :1], past_key_values=cache)
    cache = DynamicCache()
    with model.view("semantic", user=USERS):
        model(input_ids=IDS, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="past_key_values of 3 sequences, and now there are 2"): model(input_ids=IDS[:2, :1], past_key_values=cache)
    cache, one = DynamicCache(), Prefixes(torch.zeros(3, 7, dtype=torch.long) + torch.arange(3)[:, None], torch.ones(3, 7, dtype=torch.bool), 3)
    with model.view("semantic", user=USERS, prefixes=one):
        model(input_ids=IDS, past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values and prefixes"): model(input_ids=IDS[:, :1], past_key_values=cache)


def test_a_new_head_is_trained_and_saved_with_the_experts(tmp_path):
    def classifier():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**SMALL | CALM)).eval()

    for settings in (dict(task_type="SEQ_CLS"), dict(modules_to_save=["classifier"])):
        model = wake(get_peft_model(classifier(), DPMoEConfig(r=4, user_width=6, **settings)))
        head = [p for n, p in model.named_parameters() if "classifier.modules_to_save" in n]
        assert len(head) == 2 and all(p.requires_grad for p in head)
        with torch.no_grad(): head[0].add_(1.)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(classifier(), tmp_path)
        found = []
        for m in (model, again):
            with torch.no_grad(), m.view("semantic", user=USERS, mask=MASK): found.append(m(input_ids=IDS, attention_mask=MASK.long()).logits)
        assert torch.equal(*found)
        with torch.no_grad(): assert not torch.allclose(found[0], classifier()(input_ids=IDS, attention_mask=MASK.long()).logits, atol=.1)


# -- saved and loaded --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [dict(), dict(routing="equal"), dict(semantic=0, ffn=True), dict(layers=-1, target_modules=["query", "value"]), dict(target_modules=r".*attention\.self\.(query|key)")])
def test_saved_and_loaded(tmp_path, settings, lean=False):
    model = tuned(**settings)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(backbone(), tmp_path, low_cpu_mem_usage=lean)
    assert not (tmp_path / "adapter_model.bin").exists() and sum(v.numel() for v in saved.values()) == model.get_nb_trainable_parameters()[0]
    assert not any(p.requires_grad for p in again.parameters()) and PeftConfig.from_pretrained(tmp_path).peft_type == PeftType("DPMOE")
    trainable = PeftModel.from_pretrained(backbone(), tmp_path, is_trainable=True)
    assert [n for n, p in trainable.named_parameters() if p.requires_grad] == [n for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for view in VIEWS:
            assert torch.equal(run(model, view)[0], run(again, view)[0]) and torch.equal(run(model, view)[0], run(trainable, view)[0])


def test_loaded_by_way_of_the_meta_device(tmp_path):
    test_saved_and_loaded(tmp_path, dict(), lean=True)


def test_another_adapter_name_and_loading_weights_again(tmp_path):
    model = wake(get_peft_model(backbone(), DPMoEConfig(r=4, user_width=6), adapter_name="mine"))
    model.save_pretrained(tmp_path)
    other = get_peft_model(backbone(), DPMoEConfig(r=4, user_width=6))
    other.load_adapter(tmp_path / "mine", "default")
    with torch.no_grad():
        assert torch.equal(run(model)[0], run(other)[0])


def spoilt(name):
    """The backbone with other numbers in one matrix that has no experts."""
    model = backbone()
    with torch.no_grad(): model.get_parameter(name).normal_(generator=torch.Generator().manual_seed(9))
    return model


@pytest.mark.parametrize("other, words", [(lambda: backbone(seed=1), "other weights"), (lambda: backbone("qwen3"), "model type 'bert' there, 'qwen3' here"), (lambda: backbone(num_hidden_layers=3), "blocks with experts 2 there, 3 here"),
                                          (lambda: backbone(hidden_size=64), "hidden size 32 there, 64 here"), (lambda: spoilt("embeddings.word_embeddings.weight"), "other weights"), (lambda: spoilt("encoder.layer.1.output.dense.weight"), "other weights")])
def test_adapters_of_another_backbone(tmp_path, other, words):
    tuned().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(other(), tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_a_backbone_in_another_precision_is_the_same_backbone(tmp_path, seed):
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for there in dtypes:
        get_peft_model(backbone(seed=seed).to(there), DPMoEConfig(r=4, user_width=6)).save_pretrained(tmp_path)
        for here in dtypes: assert run(PeftModel.from_pretrained(backbone(seed=seed).to(here), tmp_path).to(here))[0].isfinite().all()


def test_the_first_blocks_of_a_deeper_backbone_are_another_backbone(tmp_path):
    tuned(sizes=dict(num_hidden_layers=4), layers=[0]).save_pretrained(tmp_path)
    short = backbone(num_hidden_layers=4)
    del short.encoder.layer[2:]
    with pytest.raises(ValueError, match="number of blocks 4 there, 2 here"):
        PeftModel.from_pretrained(short, tmp_path)


def test_a_description_that_lacks_something_is_compared_in_the_rest(tmp_path):
    tuned().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["backbone"]["fingerprint"], config["backbone"]["depth"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert run(PeftModel.from_pretrained(backbone(seed=1), tmp_path))[0].isfinite().all()
    with pytest.raises(ValueError, match="blocks with experts 2 there, 3 here"):
        PeftModel.from_pretrained(backbone(num_hidden_layers=3), tmp_path)


def test_a_spoilt_checkpoint(tmp_path):
    tuned().save_pretrained(tmp_path)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    router = next(k for k in whole if "router" in k)
    for spoilt, words in (({k: v for k, v in whole.items() if k != router}, "lacks 1"), (whole | {"base_model.model.x": torch.zeros(2)}, "has besides 1"), (whole | {router: torch.zeros(2, 2)}, "another shape 1")):
        save_file(spoilt, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=words):
            PeftModel.from_pretrained(backbone(), tmp_path)


def test_a_configuration_serves_several_backbones():
    config = DPMoEConfig(user_width=6)
    for kind in ("bert", "qwen3"):
        get_peft_model(backbone(kind), config)
    assert config.backbone is None and config.target_modules is None and json.dumps(config.to_dict())


# -- training ----------------------------------------------------------------------------------------------------------

def step(model, views=VIEWS):
    model.zero_grad()
    loss = 0
    for view in views:
        hidden, routes = run(model, view)
        loss = loss + hidden[MASK].sin().sum() + routes.balance()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("routing", ["learned", "random"])
def test_gradient_checkpointing_changes_no_gradient(kind, routing):
    model = tuned(kind, routing=routing).train()
    torch.manual_seed(0)
    expected = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    found = step(model)
    assert expected.keys() == found.keys() and all(torch.allclose(found[n], expected[n], rtol=1e-5, atol=1e-6) for n in found)
    assert any("router" in n for n in found) == (routing == "learned")


def test_checkpointing_by_hand_inside_a_view():
    model = tuned().train()
    expected = step(model, ["semantic"])
    model.zero_grad()
    with model.view("semantic", user=USERS, mask=MASK) as routes:
        hidden = checkpoint(lambda: model(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state, use_reentrant=False)
        (hidden[MASK].sin().sum() + routes.balance()).backward()
    assert all(torch.allclose(p.grad, expected[n], rtol=1e-5, atol=1e-6) for n, p in model.named_parameters() if p.grad is not None)


def test_reentrant_checkpointing_is_refused():
    model = tuned().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_bfloat16(kind, how):
    exact = tuned(kind)
    expected, wanted = run(exact)[0], step(exact)
    model = wake(get_peft_model(backbone(kind).bfloat16(), DPMoEConfig(r=4, user_width=6))) if how == "weights" else tuned(kind)
    if how == "weights":
        model.load_state_dict(exact.state_dict())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)      # PEFT keeps what is trained in float32
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        hidden, routes = run(model)
        found = step(model)
    assert (hidden.float() - expected)[MASK].abs().mean() < 0.05 and routes.gates[0].dtype == torch.float32
    for n in found:
        assert found[n].isfinite().all() and torch.cosine_similarity(found[n].flatten().float(), wanted[n].flatten(), 0) > 0.9, n


# -- every prefix of a sequence at once ------------------------------------------------------------------------------------

def layout(seed, batch=4, longest=4, gaps=True):
    """Random sequences of items of one to three tokens: (number [B, L], real [B, L], P, the prefix of each token as lists). A row may have no token, and then no prefix."""
    rng = np.random.default_rng(seed)
    rows, count = [], 0
    for b in range(batch):
        items = rng.integers(0 if gaps and b else 1, longest + 1)
        rows.append([count + i for i in range(items) for _ in range(rng.integers(1, 4))])
        count += items
    number = torch.from_numpy(rng.integers(-9, 99, (batch, max(map(len, rows)) + 1)))           # anything where there is no token
    for line, row in zip(number, rows): line[: len(row)] = torch.tensor(row, dtype=torch.long)
    return number, torch.arange(number.shape[1]) < torch.tensor([[len(row)] for row in rows]), count, rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_prefixes_are_loops_over_tokens(seed, dtype):
    number, real, count, rows = layout(seed)
    prefixes, x = Prefixes(number, real, count), torch.randn(*number.shape, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mean, own, newest = ([None] * count for _ in range(3))
    for b, row in enumerate(rows):
        for p in set(row):
            within, alone = [t for t, q in enumerate(row) if q <= p], [t for t, q in enumerate(row) if q == p]
            mean[p], own[p], newest[p] = (sum(x[b, t].double() for t in some) / len(some) for some in (within, alone, alone[-1:]))
    assert len(prefixes) == count
    for found, expected in ((prefixes.mean(x), mean), (prefixes.own(x), own), (prefixes.newest(x), newest), (Pass("semantic", None, None, prefixes).context(x), mean)):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-12 if dtype == torch.float64 else 1e-6)
    table = torch.randn(count, 3)
    spread = prefixes.spread(table)
    assert spread.shape == (*number.shape, 3) and all(spread[b, t].equal(table[p]) for b, row in enumerate(rows) for t, p in enumerate(row)) and spread.isfinite().all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("causal", [False, True])
def test_what_a_token_sees_token_by_token(seed, causal):
    number, real, count, rows = layout(seed)
    visible = Prefixes(number, real, count).visible(causal)
    B, L = number.shape
    assert visible.shape == (B, 1, L, L) and visible.dtype == torch.bool
    for b, row in enumerate(rows):
        for t in range(L):
            for s in range(L):
                both = t < len(row) and s < len(row)
                assert visible[b, 0, t, s] == (s == t or both and row[s] <= row[t] and (s <= t or not causal)), (b, t, s)


def test_prefixes_have_gradients_and_take_any_strides():
    number, real, count, rows = layout(1)
    prefixes, x = Prefixes(number, real, count), torch.randn(*number.shape, 3, dtype=torch.float64).requires_grad_()
    for f in (prefixes.mean, prefixes.own, prefixes.newest):
        assert torch.autograd.gradcheck(f, [x])
        torch.testing.assert_close(f(x.detach().transpose(0, 1).contiguous().transpose(0, 1)), f(x).detach())
    assert torch.autograd.gradcheck(prefixes.spread, [torch.randn(count, 2, dtype=torch.float64).requires_grad_()])


def test_no_prefix_at_all():
    none = Prefixes(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.bool), 0)
    assert len(none) == 0 and none.mean(torch.zeros(0, 3, 4)).shape == none.own(torch.zeros(0, 3, 4)).shape == none.newest(torch.zeros(0, 3, 4)).shape == (0, 4) and none.visible().shape == (0, 1, 3, 3)


def test_prefixes_of_other_shapes():
    number, real, count, _ = layout(0)
    for a, b in ((number, real[:, 1:]), (number[0], real[0]), (number[..., None], real[..., None])):
        with pytest.raises(ValueError, match=r"numbers of shape .* and real tokens of shape .*: both \[B, L\]"):
            Prefixes(a, b, count)
    B, L = number.shape
    for x in (torch.zeros(B, L + 1, 3), torch.zeros(B + 1, L, 3), torch.zeros(L, 3)):
        for f in (lambda p, x: p.mean(x), lambda p, x: p.own(x), lambda p, x: p.newest(x)):
            with pytest.raises(ValueError, match=rf"prefixes of \[{B}, {L}\] tokens: the view's input is"):
                f(Prefixes(number, real, count), x)


def slow_prefixes(model, view, start, row, users):
    """Blocks of a tiny BERT or Qwen3 over one sequence, token by token: (hidden Float[L, d] before a last norm, gates of each block by prefix). start: Float[L, d], row: prefix of each token, users: by prefix."""
    tuner, net = model.base_model, model.base_model.model
    config, d, L = tuner.peft_config["default"], start.shape[1], len(row)
    bert = net.config.model_type == "bert"
    rms = lambda norm, v: norm.weight * v / (v.square().mean() + norm.variance_epsilon).sqrt()
    x, gates, prefixes = [v for v in start], [], sorted(set(row))
    for k, block in enumerate(net.encoder.layer if bert else net.layers):
        router, route = tuner.dpmoe_router["default"][view][k], {}
        for p in prefixes:
            within = [x[t] for t in range(L) if row[t] <= p]
            c, u = sum(within) / len(within), users[p]
            z = router.context.weight @ c + router.user.weight @ u + router.interaction.weight @ ((router.of_context.weight @ c) * (router.of_user.weight @ u))
            best = z.argsort(descending=True)[: config.top_n].tolist()
            total = sum(z[e].exp() for e in best)
            route[p] = {e: z[e].exp() / total for e in best}
        gates.append({p: [float(route[p][e].detach()) if e in route[p] else 0. for e in range(getattr(config, view))] for p in prefixes})

        def through(layer, t, v):
            """One token through a matrix: its own prefix's W + dW."""
            if isinstance(layer, torch.nn.Linear): return layer(v)
            A, B, r, base = layer.dpmoe_A["default"], layer.dpmoe_B["default"], config.r, layer.base_layer
            y = base.weight @ v if base.bias is None else base.weight @ v + base.bias
            for j in range(config.shared): y = y + config.alpha / r * B["shared"][:, j * r : j * r + r] @ (A["shared"][j * r : j * r + r] @ v)
            for e, g in route[row[t]].items(): y = y + config.alpha / r * g * B[view][:, e * r : e * r + r] @ (A[view][e * r : e * r + r] @ v)
            return y

        def attended(q, key, value, size):
            """Each token over what it sees; q[t] has heads of `size`, key and value as many or one for all."""
            out = []
            for t in range(L):
                seen, heads = [s for s in range(L) if row[s] <= row[t] and (bert or s <= t)], []
                for h in range(len(q[t]) // size):
                    kv = h if len(key[t]) == len(q[t]) else 0
                    score = torch.stack([q[t][h * size : h * size + size] @ key[s][kv * size : kv * size + size] / math.sqrt(size) for s in seen]).softmax(0)
                    heads.append(sum(w * value[s][kv * size : kv * size + size] for w, s in zip(score, seen)))
                out.append(torch.cat(heads))
            return out

        if bert:
            own, finish, up, down = block.attention.self, block.attention.output, block.intermediate.dense, block.output
            q, key, value = ([through(m, t, x[t]) for t in range(L)] for m in (own.query, own.key, own.value))
            a = attended(q, key, value, d // 2)
            x = [finish.LayerNorm(through(finish.dense, t, a[t]) + x[t]) for t in range(L)]
            x = [down.LayerNorm(through(down.dense, t, torch.nn.functional.gelu(through(up, t, x[t]))) + x[t]) for t in range(L)]
        else:
            own, mlp, size = block.self_attn, block.mlp, block.self_attn.head_dim
            normed = [rms(block.input_layernorm, v) for v in x]
            angle = [t / net.config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=x[0].dtype) / size) for t in range(L)]

            def turned(v, norm, t):
                pieces, cos, sin = [], angle[t].cos(), angle[t].sin()
                for h in range(len(v) // size):
                    one = rms(norm, v[h * size : h * size + size])
                    left, right = one[: size // 2], one[size // 2 :]
                    pieces += [left * cos - right * sin, right * cos + left * sin]
                return torch.cat(pieces)
            q, key = ([turned(through(m, t, normed[t]), norm, t) for t in range(L)] for m, norm in ((own.q_proj, own.q_norm), (own.k_proj, own.k_norm)))
            a = attended(q, key, [through(own.v_proj, t, normed[t]) for t in range(L)], size)
            x = [through(own.o_proj, t, a[t]) + x[t] for t in range(L)]
            normed = [rms(block.post_attention_layernorm, v) for v in x]
            x = [through(mlp.down_proj, t, torch.nn.functional.silu(through(mlp.gate_proj, t, normed[t])) * through(mlp.up_proj, t, normed[t])) + x[t] for t in range(L)]
    return torch.stack(x) if bert else torch.stack([rms(net.norm, v) for v in x]), gates


def beginning(model, ids=None, places=None):
    """What the first block of a tiny BERT or Qwen3 reads, Float[L, d]."""
    net = model.base_model.model
    if net.config.model_type != "bert": return net.embed_tokens.weight[ids] if places is None else places
    words = net.embeddings.word_embeddings.weight[ids] if places is None else places
    return net.embeddings.LayerNorm(words + net.embeddings.position_embeddings.weight[: len(words)] + net.embeddings.token_type_embeddings.weight[0])


def hidden_by_prefix(model, prefixes, ids, user, view="semantic", causal=False):
    """(hidden [B, L, d], routes) with the mask of four dimensions that goes with the prefixes."""
    visible = prefixes.visible(causal)
    mask = torch.zeros(visible.shape, dtype=next(model.parameters()).dtype)
    with model.view(view, user=user, prefixes=prefixes) as routes:
        return model(input_ids=ids, attention_mask=mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)).last_hidden_state, routes


KINDS = pytest.mark.parametrize("kind, causal", [("bert", False), ("qwen3", True)])


@KINDS
@pytest.mark.parametrize("view, settings", [("semantic", dict(alpha=6)), ("behaviour", dict(ffn=True, shared=1, top_n=3))])
def test_every_token_goes_through_the_route_of_its_own_prefix(kind, causal, view, settings):
    number, real, count, rows = layout(7, batch=3)
    model, draw = tuned(kind, **settings).double(), torch.Generator().manual_seed(2)
    ids, user = torch.randint(1, 50, number.shape, generator=draw), torch.randn(count, 6, generator=draw, dtype=torch.float64)
    direction = torch.randn(*number.shape, 32, generator=draw, dtype=torch.float64)
    found, routes = hidden_by_prefix(model, Prefixes(number, real, count), ids, user, view, causal)
    exact = 1e-10 if kind == "bert" else 1e-5                                   # Qwen3 takes its norms and angles in float32
    expected = found.new_zeros(())
    for b, row in enumerate(rows):
        if not row: continue
        slow, gates = slow_prefixes(model, view, beginning(model, ids[b, : len(row)]), row, user)
        torch.testing.assert_close(found[b, : len(row)], slow, rtol=exact, atol=exact)
        for k, own in enumerate(gates):
            for p, g in own.items(): torch.testing.assert_close(routes.gates[k][p], torch.tensor(g, dtype=torch.float64), rtol=exact, atol=exact)
        expected = expected + (slow * direction[b, : len(row)]).sum()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad((found * direction)[real].sum(), trained.values(), allow_unused=True)
    for name, a, b in zip(trained, ours, torch.autograd.grad(expected, trained.values(), allow_unused=True)):
        assert (a is None) == (b is None), name
        if a is not None: assert b.abs().max() > 0 and (a - b).abs().max() <= 100 * exact * b.abs().max(), name


@pytest.mark.parametrize("kind, causal", [("bert", False), ("qwen3", True), ("llama", True)])
@pytest.mark.parametrize("settings", [dict(), dict(routing="dense"), dict(routing="equal"), dict(signals=["context"], user_width=None), dict(semantic=0), dict(layers=[1]), dict(ffn=True)], ids=str)
def test_later_items_change_nothing_of_earlier_prefixes(kind, causal, settings):
    number, real = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 4, 4, 5, 5, 0, 0]]), torch.tensor([[1] * 7, [1] * 5 + [0] * 2]).bool()
    model, ids = tuned(kind, **settings), IDS[:2].clone()
    user = None if "user_width" in settings else torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, before = hidden_by_prefix(model, Prefixes(number, real, 6), ids, user, causal=causal)
        other, changed = ids.clone(), None if user is None else user.clone()
        other[0, 5:], other[1, 3:] = (other[0, 5:] + 7) % 50, 9
        if user is not None: changed[[2, 5]] += 3
        second, after = hidden_by_prefix(model, Prefixes(number, real, 6), other, changed, causal=causal)
        assert torch.equal(first[0, :5], second[0, :5]) and torch.equal(first[1, :3], second[1, :3]) and not torch.allclose(first[0, 5:], second[0, 5:])
        for a, b in zip(before.gates, after.gates): assert torch.equal(a[[0, 1, 3, 4]], b[[0, 1, 3, 4]])
        alone, routes = hidden_by_prefix(model, Prefixes(number[:1, :5], real[:1, :5], 2), ids[:1, :5], None if user is None else user[:2], causal=causal)
        assert torch.allclose(alone[0], first[0, :5], atol=1e-5) and all(torch.allclose(a, b[:2], atol=1e-5) for a, b in zip(routes.gates, before.gates))


@KINDS
@pytest.mark.parametrize("view, settings", [("semantic", dict()), ("behaviour", dict(routing="dense", ffn=True)), ("semantic", dict(semantic=0))])
def test_one_prefix_a_sequence_is_the_sequence(kind, causal, view, settings):
    model = tuned(kind, **settings).double()
    user, prefixes = USERS.double(), Prefixes(torch.arange(3)[:, None].expand(3, 7), MASK, 3)
    expected, whole = run(model, view)
    found, routes = hidden_by_prefix(model, prefixes, IDS, user, view, causal)
    torch.testing.assert_close(found[MASK], expected[MASK], rtol=1e-6, atol=1e-6)
    for part in ("gates", "chosen", "probabilities"):
        for a, b in zip(getattr(routes, part), getattr(whole, part)): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(routes.balance(), whole.balance())
    gradients = lambda hidden, shown: torch.autograd.grad(hidden[MASK].sin().sum() + shown.balance(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    for a, b in zip(gradients(found, routes), gradients(expected, whole)):
        assert (a is None) == (b is None)
        if a is not None: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def step_by_prefix(model, kind):
    """Hidden states Float[2, n, d] of all tokens and gradients, both views by prefixes."""
    number, real, count, _ = layout(7, batch=3)
    draw = torch.Generator().manual_seed(2)
    ids, user = torch.randint(1, 50, number.shape, generator=draw), torch.randn(count, 6, generator=draw)
    model.zero_grad()
    loss, found = 0, []
    for view in VIEWS:
        prefixes = Prefixes(number, real, count)
        hidden, routes = hidden_by_prefix(model, prefixes, ids, user, view, kind != "bert")
        loss = loss + hidden[real].sin().sum() + prefixes.own(hidden).square().sum() + routes.balance()
        found.append(hidden[real].detach().float())
    loss.backward()
    return torch.stack(found), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("routing", ["learned", "random"])
def test_checkpointing_changes_no_gradient_of_prefixes(kind, routing):
    results = []
    for again in (False, True):
        model = tuned(kind, routing=routing, dropout=.3).train()
        if again: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        results.append(step_by_prefix(model, kind))
    (a, expected), (b, found) = results
    torch.testing.assert_close(a, b)
    assert expected.keys() == found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for n in found: torch.testing.assert_close(found[n], expected[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_prefixes_in_bfloat16(kind, how):
    exact = tuned(kind)
    expected, wanted = step_by_prefix(exact, kind)
    model = wake(get_peft_model(backbone(kind).bfloat16(), DPMoEConfig(r=4, user_width=6))) if how == "weights" else exact
    if how == "weights": model.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"): hidden, found = step_by_prefix(model, kind)
    assert (hidden - expected).abs().mean() < .05 and found.keys() == wanted.keys()
    for n in found: assert found[n].isfinite().all() and torch.cosine_similarity(found[n].flatten().float(), wanted[n].flatten(), 0) > .9, n


def test_prefixes_that_do_not_fit_the_view():
    model, prefixes = tuned(), Prefixes(torch.arange(3)[:, None].expand(3, 7), MASK, 3)
    with pytest.raises(ValueError, match="mask and prefixes: .* give one of the two"), model.view("semantic", USERS, MASK, prefixes): pass
    for user in (USERS[:2], torch.cat([USERS, USERS])):
        with pytest.raises(ValueError, match=rf"user of {len(user)} rows: the view's input has 3 prefixes"): hidden_by_prefix(model, prefixes, IDS, user)
    with pytest.raises(ValueError, match="user=None"): hidden_by_prefix(model, prefixes, IDS, None)
    with pytest.raises(ValueError, match=r"user of shape \(3, 4\)"): hidden_by_prefix(model, prefixes, IDS, USERS[:, :4])
    with pytest.raises(ValueError, match=r"prefixes of \[3, 7\] tokens: the view's input is \[3, 5, 32\]"), model.view("semantic", USERS, prefixes=prefixes): model(input_ids=IDS[:, :5])
    with pytest.raises(RuntimeError, match="no view is open"): model(input_ids=IDS)


def test_merged_and_disabled_backbones_take_the_mask_of_prefixes():
    model, prefixes = tuned(), Prefixes(torch.tensor([[0, 0, 0, 0, 0, 0, 0]]), MASK[:1], 1)
    with torch.no_grad():
        hidden, routes = hidden_by_prefix(model, prefixes, IDS[:1], USERS[:1])
        model.merge_user("semantic", [g[0] for g in routes.gates])
        assert torch.allclose(model(input_ids=IDS[:1]).last_hidden_state, hidden, atol=1e-5)
        with pytest.raises(RuntimeError, match="merged"): hidden_by_prefix(model, prefixes, IDS[:1], USERS[:1])


# -- where experts go --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("build, names", [
    (lambda: DistilBertModel(DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, hidden_dim=48)), {"attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"}),
    (lambda: MPNetModel(MPNetConfig(**SMALL)), {"attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"}),
    (lambda: OPTModel(OPTConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32)), {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}),
    (lambda: DebertaV2Model(DebertaV2Config(**SMALL | CALM)), {"attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj", "attention.output.dense"})])
def test_default_places_of_other_backbones(build, names):
    torch.manual_seed(0)
    model = build().eval()
    blocks, places = find_places(model, DPMoEConfig())
    assert len(blocks) == 2 and {n.removeprefix(blocks[k] + ".") for n, k in places.items()} == names
    assert len(find_places(model, DPMoEConfig(ffn=True))[1]) == 12
    alone = model(input_ids=IDS).last_hidden_state
    model = get_peft_model(model, DPMoEConfig(user_width=6))
    assert torch.allclose(run(model, mask=torch.ones_like(MASK))[0], alone, atol=1e-5)


@pytest.mark.parametrize("settings, words", [
    (dict(target_modules=["query", "q_proj"]), "'q_proj': no such Linear module. Linear modules of this BertModel: attention.self.query"), (dict(target_modules="nothing.*"), "nothing"), (dict(target_modules="query"), r"a string is a regular expression of whole names; for ends of names give a list, \['query'\]"),
    (dict(target_modules=[]), r"target_modules=\[\]: nothing would get experts"), (dict(target_modules=["query", "LayerNorm"]), "LayerNorm is a LayerNorm"),
    (dict(target_modules=["pooler.dense"]), "lies in no block"), (dict(target_modules=["LayerNorm"]), "is a LayerNorm"), (dict(layers=5), "blocks 0 to 1"), (dict(layers=[]), r"layers=\[\]"), (dict(layers=[0, -3]), "blocks 0 to 1"),
    (dict(user_width=None), "user_width=None")])
def test_places_that_are_not_there(settings, words):
    model = backbone()
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, DPMoEConfig(**dict(user_width=6) | settings))
    assert not any("dpmoe" in n for n, _ in model.named_parameters()) and not any(m._forward_pre_hooks for m in model.modules())


def test_places_of_bloom():
    torch.manual_seed(0)
    model = get_peft_model(BloomModel(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2)).eval(), DPMoEConfig(user_width=6))
    assert {n.split(".", 2)[2] for n in model.base_model.places} == {"self_attention.query_key_value", "self_attention.dense"} and len(run(model)[1].gates) == 2


def test_all_linear_modules_inside_blocks():
    model = tuned(target_modules="all-linear")
    assert len(model.base_model.places) == 12 and "pooler.dense" not in model.base_model.places and model.peft_config["default"].target_modules[0] == "attention.self.query"


def test_blocks_that_run_more_than_once_are_refused():
    torch.manual_seed(0)
    model = get_peft_model(AlbertModel(AlbertConfig(**SMALL | CALM, embedding_size=16)).eval(), DPMoEConfig(user_width=6, target_modules=["query", "value"]))
    with pytest.raises(ValueError, match="runs more than once in a pass, as in ALBERT"):
        run(model)


def test_a_model_without_a_transformers_configuration():
    with pytest.raises(ValueError, match="Sequential has no transformers configuration"):
        get_peft_model(torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(4, 4)])), DPMoEConfig(user_width=6, target_modules=["0"]))


def test_a_backbone_without_linear_attention():
    gpt = GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="no known names"):
        get_peft_model(gpt, DPMoEConfig(user_width=6))
    with pytest.raises(ValueError, match="is a Conv1D"):
        get_peft_model(gpt, DPMoEConfig(user_width=6, target_modules=["c_attn"]))


@pytest.mark.parametrize("layers, blocks", [(None, [0, 1]), (0, [0]), (-1, [1]), ([1, -1], [1])])
def test_layers_are_counted_as_peft_counts_them(layers, blocks):
    model = tuned(layers=layers)
    adapted = {int(n.split("layer.")[1][0]) for n, _ in model.named_parameters() if "dpmoe_A" in n}
    assert sorted(adapted) == blocks and len(run(model)[1].gates) == len(blocks)


# -- settings and counts -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, words", [
    (dict(r=0), "r=0"), (dict(dropout=1.0), "dropout=1.0"), (dict(routing="topk"), "routing 'topk'"), (dict(signals=["users"]), "did you mean 'user'"), (dict(shared=-1), "shared=-1"),
    (dict(shared=0, semantic=0, behaviour=0), "no experts at all"), (dict(top_n=7), "semantic=6"), (dict(behaviour=1), "behaviour=1"), (dict(top_n=0), "top_n=0"),
    (dict(r=4.), "r=4.0: a whole number"), (dict(r="8"), "r='8'"), (dict(top_n=2.5), "top_n=2.5"), (dict(shared=1.5), "shared=1.5"), (dict(semantic=True), "semantic=True"), (dict(user_width=-3), "user_width=-3"), (dict(alpha=0), "alpha=0"),
    (dict(layers="0"), "layers='0'"), (dict(layers=[0.]), r"layers=\[0.0\]")])
def test_bad_settings(given, words):
    with pytest.raises(ValueError, match=words):
        DPMoEConfig(**given)


@pytest.mark.parametrize("call, words", [
    (lambda m: run(m, "semantc"), "did you mean 'semantic'"), (lambda m: run(m, user=None), "user=None"), (lambda m: run(m, user=USERS[:2]), "2 rows"), (lambda m: run(m, user=USERS[:, :3]), "user of shape"),
    (lambda m: m.view("semantic", USERS, MASK[0]).__enter__(), r"mask of shape \(7,\)")])
def test_bad_inputs(call, words):
    with pytest.raises(ValueError, match=words):
        call(tuned())


def test_a_mask_of_another_shape_is_named():
    model = tuned()
    with pytest.raises(ValueError, match=r"\(3, 5\): the view's input has \(3, 7\)"), model.view("semantic", USERS, MASK[:, :5]):
        model(input_ids=IDS)


def test_registered_once_however_often():
    dpmoe.register()
    again = dpmoe.peft_type("DPMOE")
    assert again is dpmoe.DPMOE is PeftType("DPMOE") is PeftType.DPMOE and list(PeftType).count("DPMOE") == 1 and again in PeftType and again.value == "DPMOE"
    assert isinstance(tuned().base_model, DPMoEModel)


def test_counts_by_formula():
    qwen = Qwen3Config(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072, vocab_size=151_936)
    experts = 28 * 14 * 8 * ((1024 + 2048) + 2 * (1024 + 1024) + (2048 + 1024))
    routers = 28 * 2 * (6 * (1024 + 1024 + 32) + 32 * (1024 + 1024))
    trained, total = trained_share(qwen)
    assert trained == experts + routers and 0.03 < trained / total < 0.07
    assert trained_share(qwen, DPMoEConfig(routing="equal"))[0] == experts
    assert trained_share(backbone().config, DPMoEConfig(user_width=6)) == (tuned(r=8).get_nb_trainable_parameters()[0], sum(p.numel() for p in backbone().parameters()))


def test_a_description_without_numbers():
    with torch.device("meta"):
        model = BertModel(BertConfig(**SMALL))
    here = describe_backbone(model, *find_places(model, DPMoEConfig()))
    assert here["fingerprint"] is None and here["blocks"] == 2 and here["matrices"]["attention.self.query"] == [32, 32]
