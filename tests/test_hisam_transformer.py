"""The two-stream transformer against a slow pass a question in float64, its switches, gradients, and bad input."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from l2rec.data.batches import ClickData
from l2rec.data.dataset import DataError
from l2rec.data.splits import leave_last_fraction
from l2rec.hisam.histories import HistoryData, HistoryModule, HistoryWindows, as_histories
from l2rec.hisam.tokenizer import SemanticIds
from l2rec.hisam.transformer import (CodeTokens, FeatureTokens, FeatureTransformer, HiSAM, IdTransformer, ItemSide, SemanticTransformer, last_token_attention)
from l2rec.training.contracts import build
from l2rec.training.modules import evaluate, fit
from worlds import random_dataset

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = dict(width=16, heads=2, dropout=0.)
SWITCHES = [dict(), dict(layers=1), dict(layers=3), dict(memory="all"), dict(memory="all", anchor="none", positions="flat"), dict(anchor="first"), dict(anchor="first", memory="all"),
            dict(anchors_see_anchors=False), dict(anchors_see_anchors=False, layers=3), dict(anchors_see_anchors=False, memory="all"), dict(positions="flat"), dict(positions="none"),
            dict(item_id=True), dict(anchor_start="sum"), dict(anchor="first", anchor_start="sum", item_id=True), dict(item_id=True, memory="all", anchor="none"), dict(gated=True), dict(gated=True, memory="all", anchor="none", positions="flat")]


@pytest.fixture(scope="module")
def split(): return leave_last_fraction(random_dataset(), .2, .2)


def ids(split, n=3, size=5, seed=0):
    return SemanticIds(split.item_id, np.random.default_rng(seed).integers(0, size, (split.n_items, n)), (size,) * n, tuple(f"level_{k}" for k in range(n)))


def modalities(split, seed=0):
    rng = np.random.default_rng(seed)
    values = {"text": rng.normal(size=(split.n_items, 6)).astype(np.float32), "image": rng.normal(size=(split.n_items, 4)).astype(np.float32)}
    return SimpleNamespace(names=("text", "image"), values=values, present={m: rng.random(split.n_items) < .8 for m in values}, sha256="f" * 64)


def made(split, seed=0, cls=HiSAM, **switches):
    """A model in float64 whose embeddings are large enough for each switch to matter."""
    model = build(cls, split, seed, items=ItemSide(ids(split), modalities(split)), **{**SMALL, **switches}).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 or name == "anchor": p.normal_(0, .4)
            elif "norm" in name and name.endswith("weight"): p.uniform_(.5, 1.5)
            else: p.normal_(0, .1)
    return model


def slow_rotate(x, item, token, n_tokens, mode):
    """Pairs of neighbouring dimensions turned one after another; x [d]."""
    d, out = len(x), x.clone()
    if mode == "none": return out
    half = d // 2 // (2 if mode == "hierarchical" else 1)
    for f in range(d // 2):
        place = (item if f < half else token) if mode == "hierarchical" else item * n_tokens + token
        angle = torch.tensor(place * 10_000. ** (-(f % half) / half), dtype=torch.float64)
        a, b = x[2 * f].clone(), x[2 * f + 1].clone()
        out[2 * f], out[2 * f + 1] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return out


def slow_logit(model, items, feedback, gaps):
    """One question: the history with feedback, the last item without; every token of every layer, and the mask as it is defined."""
    n, P = len(items), model.n_tokens
    x = []
    for i, item in enumerate(items):
        tokens = list(model.tokens(torch.tensor([item]))[0])
        if model.anchor is not None:
            a = model.anchor if model.item_id is None else model.anchor + model.item_id.weight[item]
            if model.settings["anchor_start"] == "sum": a = a + sum(tokens)
            tokens = tokens + [a] if model.place else [a] + tokens
        elif model.item_id is not None: tokens[-1] = tokens[-1] + model.item_id.weight[item]
        state = model.feedback.weight[2 if i == n - 1 else int(feedback[i])] + model.gap.weight[gaps[i]]
        x += [t + state for t in tokens]
    x = torch.stack(x)
    where = [(i, p) for i in range(n) for p in range(P)]
    offered = range(*model.offered.indices(P))
    for block in model.blocks:
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], block.norm.weight, block.norm.bias)
        q, k, v = ((y @ w.T + b).unflatten(-1, (block.heads, -1)) for w, b in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)))
        turned = [torch.stack([torch.stack([slow_rotate(z[t, h], i, p, P, model.rope.mode) for h in range(block.heads)]) for t, (i, p) in enumerate(where)]) for z in (q, k)]
        q, k = turned
        out = torch.zeros_like(v)
        for t, (i, p) in enumerate(where):
            keys = [s for s, (j, r) in enumerate(where) if (j == i and r <= p) or (j < i and r in offered and (i == n - 1 or p not in model.blind))]       # blind tokens look all the same where they are asked
            for h in range(block.heads):
                w = torch.softmax(k[keys, h] @ q[t, h] / q.shape[-1] ** .5, 0)
                out[t, h] = w @ v[keys, h]
        out = out.flatten(1)
        if model.settings["gated"]:
            g = y @ block.gate.weight.T + block.gate.bias
            out = out * g * torch.sigmoid(g)
        x = x + out @ block.out.weight.T + block.out.bias
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], block.norm_mlp.weight, block.norm_mlp.bias)
        x = x + block.down(torch.nn.functional.gelu(block.up(y), approximate="tanh"))
    return model.head(model.norm(x[-1])).squeeze()


def questions_one_by_one(model, batch):
    out = []
    for at in batch.asked.tolist():
        begin = int(batch.offsets[torch.searchsorted(batch.offsets, at, right=True) - 1])
        part = slice(begin, at + 1)
        out.append(slow_logit(model, batch.item[part].tolist(), batch.feedback[part].tolist(), batch.gap[part].tolist()))
    return torch.stack(out)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@torch.no_grad()
def test_every_position_is_the_question_asked_alone(split, switches, part):
    model = made(split, max_length=4, **switches)
    batch = HistoryWindows(split, part, max_length=4)[np.arange(2, 5)]
    assert torch.allclose(model(batch), questions_one_by_one(model, batch), atol=1e-9)


@pytest.mark.parametrize("cls", [SemanticTransformer, FeatureTransformer, IdTransformer])
@torch.no_grad()
def test_comparators_are_the_same_transformer(split, cls):
    model = made(split, cls=cls, max_length=4)
    batch = HistoryWindows(split, "validation", max_length=4)[np.arange(3, 6)]
    assert torch.allclose(model(batch), questions_one_by_one(model, batch), atol=1e-9)


@torch.no_grad()
def test_one_token_and_no_anchor_is_a_plain_causal_transformer(split):
    """The same weights in torch.nn.TransformerEncoder, question by question."""
    model = made(split, cls=IdTransformer, layers=2, max_length=6)
    model.rope = type(model.rope)(8, 1, "none")
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, 0., lambda x: torch.nn.functional.gelu(x, approximate="tanh"), batch_first=True, norm_first=True)
    plain = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    for mine, theirs in zip(model.blocks, plain.layers):
        pairs = {"self_attn.in_proj_": mine.qkv, "self_attn.out_proj.": mine.out, "linear1.": mine.up, "linear2.": mine.down, "norm1.": mine.norm, "norm2.": mine.norm_mlp}
        theirs.load_state_dict({a + b: getattr(m, b) for a, m in pairs.items() for b in ("weight", "bias")})
    batch = HistoryWindows(split, "train", max_length=6)[np.arange(5)]
    got, row = model(batch), 0
    for b in range(5):
        for at in range(int(batch.offsets[b]), int(batch.offsets[b + 1])):
            part = slice(int(batch.offsets[b]), at + 1)
            state = batch.feedback[part].long()
            state[-1] = 2
            x = model.tokens.table(batch.item[part]) + model.feedback(state) + model.gap(batch.gap[part])
            y = plain(x[None], torch.nn.Transformer.generate_square_subsequent_mask(len(x), dtype=torch.float64))
            assert torch.allclose(model.head(model.norm(y[0, -1]))[0], got[row], atol=1e-9)
            row += 1


def test_the_answer_of_a_question_and_what_follows_do_not_reach_its_logit(split):
    model = made(split, max_length=8)
    batch = HistoryWindows(split, "train", max_length=8)[np.arange(4)]
    logits = model(batch)
    for at in (0, 2, int(batch.offsets[1]), int(batch.offsets[2]) + 1):
        changed = replace(batch, feedback=batch.feedback.clone(), item=batch.item.clone())
        changed.feedback[at] = 1 - changed.feedback[at]
        after = model(changed)
        end = int(batch.offsets[torch.searchsorted(batch.offsets, at, right=True)])
        assert torch.equal(after[:at + 1], logits[:at + 1]) and torch.equal(after[end:], logits[end:])
        assert at + 1 == end or not torch.equal(after[at + 1:end], logits[at + 1:end])


@pytest.mark.parametrize("memory, reach", [("anchor", False), ("all", True)])
def test_the_target_reaches_details_of_the_history_only_through_anchors(split, memory, reach):
    """In the first layer, keys of a history item's codes get no gradient from a later item's logit but by way of its anchor."""
    model = made(split, layers=2, memory=memory)
    batch = HistoryWindows(split, "train", max_length=8)[np.arange(1)]
    w = model.window(batch)
    h, by_h, x, by, before = model._streams(w)
    details = h[:, :, :model.place].detach().requires_grad_()
    h = torch.cat([details, h[:, :, model.place:]], 2)
    memory_of = list(model.history_layers(h, by_h))
    anchors = [(k[:, :, -1:].detach(), v[:, :, -1:].detach()) if reach else (k.detach(), v.detach()) for k, v in memory_of]      # the way through anchors is cut
    layers = [(torch.cat([k[:, :, :-1], a], 2), torch.cat([v[:, :, :-1], b], 2)) if reach else (a, b) for (k, v), (a, b) in zip(memory_of, anchors)]
    for n, (mk, mv) in enumerate(layers): x = model.candidate_layer(n, x, by, mk, mv, before)
    value = model.read(x)[0, -1]
    grad = torch.autograd.grad(value, details, allow_unused=True)[0] if value.requires_grad else None
    assert (grad is not None and grad.abs().sum() > 0) == reach
    whole = model(batch)
    assert torch.autograd.grad(whole[-1], model.tokens.table.weight)[0].abs().sum() > 0


def test_blind_anchors_are_a_function_of_their_item_alone(split):
    model = made(split, anchors_see_anchors=False, layers=2)
    w = model.window(HistoryWindows(split, "train", max_length=8)[np.arange(1)])
    h, by, *_ = model._streams(w)
    last = list(model.history_layers(h, by))[-1][0]
    h2 = h.clone()
    h2[:, 0] += 1
    assert torch.equal(list(model.history_layers(h2, by))[-1][0][:, 1:], last[:, 1:])


@pytest.mark.parametrize("switches", [dict(), dict(layers=1), dict(layers=3), dict(memory="all"), dict(anchor="first")], ids=str)
def test_blind_anchors_leave_the_candidate_its_history(split, switches):
    model = made(split, anchors_see_anchors=False, **switches)
    batch = HistoryWindows(split, "train", max_length=8)[np.arange(1)]
    with torch.no_grad():
        other = replace(batch, feedback=batch.feedback.clone())
        other.feedback[0] = 1 - other.feedback[0]
        assert (model(batch)[1:] != model(other)[1:]).all() and model(batch)[0] == model(other)[0]


def test_gradients_of_windows_are_those_of_single_questions(split):
    batch = HistoryWindows(split, "train", max_length=4)[np.arange(1, 3)]
    model = made(split)
    model.loss(batch)[0].backward()
    windows = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch.nn.functional.binary_cross_entropy_with_logits(questions_one_by_one(model, batch), batch.label.double()).backward()
    for name, p in model.named_parameters(): assert torch.allclose(p.grad, windows[name], atol=1e-9), name


@torch.no_grad()
def test_click_batches_are_answered_as_windows_without_gaps(split):
    model = made(split, max_length=5)
    batch = next(iter(ClickData(split, batch_size=7, max_length=9).train_dataloader()))
    assert torch.allclose(model(batch), questions_one_by_one(model, as_histories(batch, 5)), atol=1e-9)
    alone = next(iter(ClickData(split, batch_size=1, max_length=9).val_dataloader()))
    assert model(alone).shape == (1,)


@torch.no_grad()
def test_padding_and_company_change_nothing(split):
    model, units = made(split, max_length=6), HistoryWindows(split, "test", max_length=6)
    whole = model(units[np.arange(len(units))])
    assert torch.allclose(torch.cat([model(units[np.array([k])]) for k in range(len(units))]), whole, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("switches", [dict(), dict(memory="all"), dict(anchors_see_anchors=False), dict(layers=1)], ids=str)
def test_attention_over_memory_is_what_an_item_offers_to_the_candidate(split, switches):
    """Removing the values of the items that get no weight changes nothing; rows add up to less than one and see nothing ahead."""
    model = made(split, max_length=6, **switches)
    for part in ("train", "test"):
        batch = HistoryWindows(split, part, max_length=6)[np.arange(5)]
        w = model.attention_over_memory(batch)
        place = batch.asked - batch.offsets[batch.row]
        assert w.shape == (len(batch), int(batch.length.max())) and (w >= 0).all() and (w.sum(1) < 1).all()
        assert all((w[n, p:] == 0).all() and (w[n, :p] > 0).all() for n, p in enumerate(place))


def test_last_token_attention_weights_add_up_and_see_nothing_ahead():
    q, k, v, mk, mv = (torch.randn(2, 4, n, 3, 8, dtype=torch.float64) for n in (1, 5, 5, 2, 2))
    w = last_token_attention(q, k, v, mk, mv, weights=True)
    assert w.shape == (2, 3, 4, 13) and torch.allclose(w.sum(-1), torch.ones(2, 3, 4).double())
    assert all((w[:, :, c, 2 * c:8] == 0).all() for c in range(4))
    before = torch.tensor([[0, 1, 2, 3]] * 2)
    assert torch.equal(last_token_attention(q, k, v, mk, mv, before), last_token_attention(q, k, v, mk, mv))
    assert torch.allclose(last_token_attention(q, k, v, None, None), torch.einsum("bchp,bcphd->bchd", torch.einsum("bchd,bcphd->bchp", q[:, :, 0], k).div(8 ** .5).softmax(-1), v)[:, :, None])


def test_tokens(split):
    code = ids(split)
    tokens = CodeTokens(code, 4)
    assert torch.equal(tokens(torch.tensor([[1, 2]]))[0, 1], torch.stack([tokens.table.weight[5 * l + code.codes[2, l]] for l in range(3)]))
    m = modalities(split)
    features = FeatureTokens(m, 4)
    rows = torch.tensor([[4, 1, 4], [0, 2, 2]])
    out = features(rows)
    for b in range(2):
        for c in range(3):
            for p, name in enumerate(m.names):
                r = int(rows[b, c])
                want = features.maps[p](torch.from_numpy(m.values[name][r])) if m.present[name][r] else features.missing[p]
                assert torch.allclose(out[b, c, p], want, atol=1e-6)


@pytest.mark.parametrize("cls", [HiSAM, SemanticTransformer, FeatureTransformer, IdTransformer])
def test_a_similar_start_changes_the_first_queries_and_keys_alone(split, cls):
    drawn, similar = (build(cls, split, 3, items=ItemSide(ids(split), modalities(split)), **SMALL, similar_start=s) for s in (False, True))
    width = SMALL["width"]
    for (name, a), (_, b) in zip(drawn.named_parameters(), similar.named_parameters()):
        if not name.endswith("qkv.weight"): assert torch.equal(a, b), name
        else:
            assert torch.equal(b[:width], b[width:2 * width]) and torch.equal(b[width:2 * width], 1.5 * a[width:2 * width]) and torch.equal(b[2 * width:], a[2 * width:])
    similar.loss(HistoryWindows(split, "train", max_length=8)[np.arange(5)])[0].backward()
    weight = similar.blocks[0].qkv.weight.grad
    assert not torch.equal(weight[:width], weight[width:2 * width])                        # two sets of weights from the first step on


@pytest.mark.parametrize("wrong, message", [(dict(memory="anchors"), "memory='anchors'"), (dict(anchor="middle"), "anchor='middle'"), (dict(anchor="none"), "no anchor"),
                                            (dict(anchor_start="mean"), "anchor_start='mean'"), (dict(heads=3), "heads"), (dict(layers=0), "layers"), (dict(max_length=0), "max_length"), (dict(positions="sine"), "sine"),
                                            (dict(anchor="none", memory="all", anchors_see_anchors=False), "no anchor")])
def test_switches_that_do_not_exist(split, wrong, message):
    with pytest.raises(ValueError, match=message): made(split, **wrong)


def test_item_sides_that_do_not_belong(split):
    with pytest.raises(ValueError, match="semantic ids, and there are none"): HiSAM.from_split(split, ItemSide())
    with pytest.raises(ValueError, match="modalities, and there are none"): FeatureTransformer.from_split(split, ItemSide())
    other = ids(split)
    with pytest.raises(DataError, match="do not belong"): HiSAM.from_split(split, ItemSide(SemanticIds(other.item_id + 1, other.codes, other.sizes, other.names)))
    with pytest.raises(ValueError, match="do not belong"):
        m = modalities(split)
        FeatureTransformer.from_split(split, ItemSide(modalities=SimpleNamespace(names=m.names, sha256="", values={k: v[:-1] for k, v in m.values.items()}, present={k: v[:-1] for k, v in m.present.items()})))


def test_windows_longer_than_the_model(split):
    model = made(split, max_length=3)
    with pytest.raises(ValueError, match="max_length=3"): model(HistoryWindows(split, "train", max_length=8)[np.arange(5)])


def test_training_learns_and_a_checkpoint_of_other_ids_is_refused(split, tmp_path):
    def module(seed): return HistoryModule(build(HiSAM, split, 0, items=ItemSide(ids(split, seed=seed)), width=16, heads=2, max_length=8), HistoryData(split, 64, max_length=8), lr=.01)
    done = module(0)
    history = fit(done, HistoryData(split, 64, max_length=8), max_epochs=4, monitor="validation/auc", checkpoints=tmp_path, progress=False).history
    assert history["loss"][-1] < history["loss"][0]
    values, table = evaluate(done, HistoryData(split, 64, max_length=8))
    assert {"test/auc", "test/cold/auc", "test/gauc"} <= values.keys() and table.height > 0
    with pytest.raises(ValueError, match="another model.*tokens"): fit(module(1), HistoryData(split, 64, max_length=8), max_epochs=5, monitor="validation/auc", checkpoints=tmp_path, progress=False)
