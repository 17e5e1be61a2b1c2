"""L2Rec over every prefix of a history: each by hand in float64, each as if it were alone, what is asked in the loss and what is not."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from test_dual_view_dpmoe import beginning, slow_prefixes
from test_dual_view_model import VIEWS, aging_mean, batch_of, each_backbone_is_read_once, folders, fused, make, random_histories, split, texts_of  # noqa: F401 (fixtures among them)
from transformers import OPTConfig, OPTModel

from l2rec.data.batches import Batch, Windows
from l2rec.dual_view.dpmoe import DPMoEConfig, Prefixes
from l2rec.dual_view.expert_use import user_routes
from l2rec.dual_view.items import ItemTexts
from l2rec.dual_view.model import load_l2rec, save_l2rec

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = pytest.mark.parametrize("kind", ["bert", "qwen3"])
ROOM = dict(max_tokens=40)                                                  # for seven items of at most four tokens


def prefixes_of(histories):
    """(every prefix as a history, place of its end in the flat batch)."""
    return [h[: n + 1] for h in histories for n in range(len(h))]


def exchanged(histories, keep, tokens, n_items=15):
    """Other items, of as many tokens each, after the first `keep` of every history."""
    other = {i: next(j for k in range(1, n_items + 1) if tokens[j := (i + k) % n_items] == tokens[i]) for i in range(n_items)}
    return [h[:keep] + [other[i] for i in h[keep:]] for h in histories]


# --- by hand ----------------------------------------------------------------------------------------------------------------


def slow_represent(model, items, history):
    """What `represent(every=True)` says of one history, by place: {k: dict(h, semantic, behaviour, user, gates)}. Loops over items, tokens and experts."""
    s, vectors = model.settings, model.items.vectors()
    D, users, total = vectors.shape[1], [], vectors.new_zeros(vectors.shape[1])
    for n, i in enumerate(history):
        total = total + math.sqrt(D) * vectors[i] / vectors[i].norm()
        users.append(total / (n + 1))
    special = 2 if model.causal else 4
    words = lambda i: [int(w[1:]) + special for w in items.texts[i].split()][: s.item_tokens] or [1]        # one filling token without a text
    before, kept = [] if model.causal else [2], {}
    for k in reversed(range(len(history))):
        room = s.max_tokens - len(before) - sum(map(len, kept.values()))
        if len(words(history[k])) > room:
            if not kept: kept[k] = words(history[k])[:room]
            break
        kept[k] = words(history[k])
    told = sorted(kept)
    ids, row = [*before, *(t for k in told for t in kept[k])], [told[0]] * len(before) + [k for k in told for _ in kept[k]]
    places = list(range(len(history)))[-model.places :]
    out = {}
    reads = (("semantic", beginning(model.backbone, torch.tensor(ids)), row), ("behaviour", beginning(model.backbone, places=torch.stack([model.projector(vectors[history[k]]) for k in places])), places))
    for view, start, owner in reads:
        hidden, gates = slow_prefixes(model.backbone, view, start, owner, users)
        for k in sorted(set(owner)):
            own = [x for x, p in zip(hidden, owner) if p == k]
            out.setdefault(k, {})[view] = own[-1] if model.causal else sum(own) / len(own)
            out[k][view + " gates"] = [torch.tensor(g[k], dtype=vectors.dtype) for g in gates]
    for k in sorted(set(told) & set(places)):
        h, views = fused(model, out[k])
        out[k] |= views | {"h": h / math.sqrt(D) + aging_mean(model, vectors, history[: k + 1]) if s.residual else h, "user": users[k]}
    return {k: one for k, one in out.items() if "h" in one}


@pytest.mark.parametrize("kind, how", [("bert", dict()), ("qwen3", dict()), ("bert", dict(max_length=3, max_tokens=9)), ("qwen3", dict(max_length=4, max_tokens=7, residual=False)), ("bert", dict(max_tokens=3)),
                                       ("bert", dict(chunk_tokens=12, ids=True, width=10, ffn=True, top_n=3, residual=False)), ("qwen3", dict(chunk_tokens=8, width=10, shared=2)), ("bert", dict(fused_in="items")), ("qwen3", dict(fused_in="items", width=10, head_hidden=6))], ids=str)
def test_every_prefix_by_hand(split, folders, kind, how):
    items = texts_of(split, fused_in=how.get("fused_in"))
    model = make(split, folders, kind, items=items, **how).double().eval()
    histories = [[], [3], *random_histories(4, 5, shortest=2, seed=3), [5, 3, 3, 9], []]
    with torch.no_grad():
        out = model.represent(batch_of(histories), every=True)
        expected, at, first = [], [], 0
        for h in histories:
            found = slow_represent(model, items, h) if h else {}
            at += [first + k for k in sorted(found)]
            expected += [found[k] for k in sorted(found)]
            first += len(h)
    assert out["at"].tolist() == at and {len(x) for x in (out["h"], out["user"], out["gamma"], *(out[v] for v in VIEWS))} == {len(at)}
    for part in ("user", *VIEWS, "h"): torch.testing.assert_close(out[part].double(), torch.stack([e[part] for e in expected]), rtol=1e-4, atol=1e-5, msg=lambda m: f"{part}: {m}")
    for view in VIEWS:
        for block, gates in enumerate(out["routes"][view].gates): torch.testing.assert_close(gates.double(), torch.stack([e[view + " gates"][block] for e in expected]), rtol=1e-4, atol=1e-5)
        assert all(c.equal(g != 0) for c, g in zip(out["routes"][view].chosen, out["routes"][view].gates))


# --- alone as in a longer history -------------------------------------------------------------------------------------------


def same(first, second, rows=slice(None), rtol=1e-4, atol=1e-5):
    """That two of what `represent` gives say the same, the second at some of its rows."""
    for part in ("h", "gamma", "user", *VIEWS):
        assert (first[part] is None) == (second[part] is None)
        if first[part] is not None: torch.testing.assert_close(first[part], second[part][rows], rtol=rtol, atol=atol, msg=lambda m: f"{part}: {m}")
    assert first["routes"].keys() == second["routes"].keys()
    for view in first["routes"]:
        for part in ("gates", "chosen", "probabilities"):
            for a, b in zip(getattr(first["routes"][view], part), getattr(second["routes"][view], part)): torch.testing.assert_close(a, b[rows], rtol=rtol, atol=atol)


@KINDS
@pytest.mark.parametrize("how", [dict(), dict(adapter="lora"), dict(adapter="none"), dict(width=10, ids=True, head_hidden=6), dict(chunk_tokens=1), dict(chunk_tokens=30), dict(attention="sdpa"), dict(ffn=True, routing="dense", layers=[1]),
                                 dict(semantic=0, signals=("context",)), dict(views=("semantic",)), dict(views=("behaviour",)), dict(residual=False, fusion="concat"), dict(pooling="mean", behaviour_pooling="mean"), dict(pooling="last"),
                                 dict(fused_in="items"), dict(fused_in="items", views=("semantic",), width=10)], ids=str)
def test_every_prefix_as_if_it_were_alone(split, folders, kind, how):
    model = make(split, folders, kind, **{**ROOM, **how}).eval()
    histories = [*random_histories(7, seed=4), [], [3], [3, 3, 8]]                                 # unequal lengths, nobody's, items without text
    with torch.no_grad():
        out, parts = model.represent(batch_of(histories), every=True), prefixes_of(histories)
        assert out["at"].tolist() == list(range(sum(map(len, histories)))) and len(out["h"]) == len(parts)
        same(model.represent(batch_of(parts)), out)
        for k in (0, len(parts) // 2, len(parts) - 1): same(model.represent(batch_of([parts[k]])), out, slice(k, k + 1))
        newest, some = model.represent(batch_of(histories)), [b for b, h in enumerate(histories) if h]
        ends = np.cumsum([len(h) for h in histories])[some] - 1
        torch.testing.assert_close(newest["h"][some], out["h"][ends], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode(batch_of(histories)), torch.nn.functional.normalize(newest["h"], dim=1))


@KINDS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_later_items_change_nothing_to_the_bit(split, folders, kind, attention):
    model = make(split, folders, kind, attention=attention, **ROOM).eval()
    histories = random_histories(10, 7, shortest=4, seed=5)
    with torch.no_grad():
        first = model.represent(batch_of(histories), every=True)
        length, start = [len(h) for h in histories], np.cumsum([0, *(len(h) for h in histories)])
        for keep in (1, 3):
            changed = exchanged(histories, keep, model.tokens.length.tolist())
            second = model.represent(batch_of(changed), every=True)
            before = [start[b] + k for b, n in enumerate(length) for k in range(min(keep, n))]
            after = [start[b] + k for b, n in enumerate(length) for k in range(keep, n) if changed[b][k] != histories[b][k]]
            for part in ("h", "user", *VIEWS):
                assert first[part][before].equal(second[part][before]), part
                assert len(after) > 10 and (first[part][after] != second[part][after]).any(1).all(), part
            for view in VIEWS:
                for a, b in zip(first["routes"][view].gates, second["routes"][view].gates): assert a[before].equal(b[before])


@KINDS
def test_no_gradient_flows_back_from_earlier_prefixes(split, folders, kind):
    """To what is after them, that is."""
    model = make(split, folders, kind, **ROOM).eval()
    batch = batch_of([[1, 2, 4, 5], [7], [6, 8, 3]])
    vectors = model.items.rows(batch.history).detach().requires_grad_()
    out = model.represent(batch, vectors, True)
    for k in (0, 1, 2, 4, 5, 6):
        gradient, = torch.autograd.grad(out["h"][k].sum() + sum(g[k].sum() for view in VIEWS for g in out["routes"][view].gates), vectors, retain_graph=True)
        own = range({0: 0, 1: 0, 2: 0, 4: 4, 5: 5, 6: 5}[k], k + 1)
        assert [bool(row.abs().sum() > 0) for row in gradient] == [n in own for n in range(8)]


@KINDS
@pytest.mark.parametrize("adapter", ["dpmoe", "lora", "none"])
def test_one_item_or_none_is_read_alike_in_both_readings(split, folders, kind, adapter):
    whole, prefixes = (make(split, folders, kind, adapter=adapter, reading=reading).eval() for reading in ("whole", "prefixes"))
    with torch.no_grad(): a, b = (model.represent(batch_of([[1], [5], [], [9]])) for model in (whole, prefixes))
    for part in ("behaviour", "user", *(("semantic", "h") if kind == "qwen3" else ())): torch.testing.assert_close(a[part], b[part], rtol=1e-5, atol=1e-6)       # Qwen3 has no special tokens, so both read the same text
    if adapter == "dpmoe": torch.testing.assert_close(a["routes"]["behaviour"].gates, b["routes"]["behaviour"].gates, rtol=1e-5, atol=1e-6)


# --- budgets, empty histories, items without text -----------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("max_length, max_tokens", [(7, 12), (2, 40), (3, 9), (1, 40), (7, 3), (7, 6)])
def test_prefixes_that_have_no_room_are_left_out(split, folders, kind, max_length, max_tokens):
    model = make(split, folders, kind, max_length=max_length, max_tokens=max_tokens).eval()
    histories, at, start = random_histories(12, 7, seed=6), [], 0
    length, room = model.tokens.length.clamp(min=1).tolist(), max_tokens - (kind == "bert")
    for h in histories:
        told = [k for k in range(len(h)) if sum(length[i] for i in h[k:]) <= room or k == len(h) - 1]
        at += [start + k for k in told if k >= len(h) - max_length]
        start += len(h)
    with torch.no_grad():
        out = model.represent(batch_of(histories), every=True)
        newest = model.represent(batch_of(histories))
    assert out["at"].tolist() == at and out["h"].isfinite().all()
    ends = np.cumsum([len(h) for h in histories]) - 1
    some = [b for b, h in enumerate(histories) if h]
    assert set(ends[some]) <= set(at)
    torch.testing.assert_close(newest["h"][some], out["h"][np.searchsorted(at, ends[some])], rtol=1e-4, atol=1e-5)


def test_what_has_no_room_counts_in_the_user_signal_alone(split, folders):
    model = make(split, folders, max_length=2, max_tokens=9, residual=False).eval()
    with torch.no_grad():
        a, b = (model.represent(batch_of([h])) for h in ([1, 2, 4, 5, 6], [9, 7, 8, 5, 6]))
        assert not a["user"].allclose(b["user"]) and not a["h"].allclose(b["h"])
        model.user_signal = lambda vectors, offsets, real: vectors.new_zeros(len(real), 12)
        a, b = (model.represent(batch_of([h]))["h"] for h in ([1, 2, 4, 5, 6], [9, 7, 8, 5, 6]))
        assert a.equal(b) and not a.allclose(model.represent(batch_of([[1, 2, 4, 6, 5]]))["h"])


@KINDS
def test_empty_histories_alone_and_among_others(split, folders, kind):
    model = make(split, folders, kind, **ROOM).eval()
    with torch.no_grad():
        alone, none = model.represent(batch_of([[], []])), model.represent(batch_of([[], []]), every=True)
        assert alone["h"].isfinite().all() and alone["h"][0].equal(alone["h"][1]) and (alone["user"] == 0).all()
        assert none["at"].tolist() == [] and none["h"].shape == (0, 12) and all(len(g) == 0 for view in VIEWS for g in none["routes"][view].gates)
        batch = batch_of([[], [1, 2], [], [3], []])
        among, every = model.represent(batch), model.represent(batch, every=True)
        for row in (0, 2, 4): torch.testing.assert_close(among["h"][row], alone["h"][0], rtol=1e-4, atol=1e-5)
        assert every["at"].tolist() == [0, 1, 2]
        torch.testing.assert_close(every["h"][1:], among["h"][[1, 3]], rtol=1e-4, atol=1e-5)
        vectors = model.items.rows(batch.history)
        for given in (False, True): same(model.represent(batch, vectors, given), every if given else among, rtol=0, atol=0)
    if kind == "bert":                                                             # nothing but [CLS], and one place of zeros
        hidden, _ = slow_prefixes(model.backbone, "semantic", beginning(model.backbone, torch.tensor([2])), [0], [torch.zeros(12)])
        torch.testing.assert_close(alone["semantic"][0], hidden[0].detach(), rtol=1e-4, atol=1e-5)
    hidden, _ = slow_prefixes(model.backbone, "behaviour", beginning(model.backbone, places=torch.zeros(1, 16)), [0], [torch.zeros(12)])
    torch.testing.assert_close(alone["behaviour"][0], hidden[0].detach(), rtol=1e-4, atol=1e-5)


def test_histories_of_items_without_text(split, folders):
    items = texts_of(split, without=(3, 4, 11))
    for kind in ("bert", "qwen3"):
        model = make(split, folders, kind, items=items, ids=True).eval()
        with torch.no_grad():
            out = model.represent(batch_of([[3], [4], [3, 4], [4, 4]]), every=True)
            torch.testing.assert_close(out["semantic"][0], slow_represent(model, items, [3])[0]["semantic"], rtol=1e-4, atol=1e-5)
        assert out["at"].tolist() == list(range(6)) and out["h"].isfinite().all() and not out["behaviour"][0].allclose(out["behaviour"][1])


# --- loss -------------------------------------------------------------------------------------------------------------------


def slow_parts(model, out, following, user):
    """Parts of the loss over rows of `represent`, in float64 and with gradient."""
    s, unit = model.settings, lambda x: x.double() / x.double().norm(dim=-1, keepdim=True)
    h, items, tau = unit(out["h"]), unit(model.items.vectors()), model.log_temperature.double().exp().clamp(min=.01)
    rivals = model.trained.nonzero().flatten().tolist() if s.targets == "catalogue" else sorted(set(following))
    rows = [(x @ items[rivals].T / tau).logsumexp(0) - x @ items[t] / tau for x, t in zip(h, following)]
    semantic, behaviour, bpc = unit(out["semantic"]), unit(out["behaviour"]), []
    for one, other in ((semantic, behaviour), (behaviour, semantic)):
        for k, x in enumerate(one):
            among = [j for j in range(len(one)) if j == k or user[j] != user[k]]
            bpc.append((other[among] @ x / s.bpc_temperature).logsumexp(0) - other[k] @ x / s.bpc_temperature)
    balance = []
    for view in VIEWS:
        for p, chosen in zip(out["routes"][view].probabilities, out["routes"][view].chosen):
            load = [sum(bool(c) for c in chosen[:, e]) / len(p) for e in range(p.shape[1])]
            balance.append(sum(f * p.double()[:, e].mean() for e, f in enumerate(load)) * p.shape[1] / s.top_n)
    return sum(rows) / len(rows), sum(bpc) / len(bpc), sum(balance) / len(balance)


def windows(users=(0, 1, 2, 1, 1, 3), seed=7):
    """Training windows, some of the same user."""
    histories = random_histories(len(users), 6, shortest=1, seed=seed)
    rng = np.random.default_rng(seed)
    following = [h[1:] + [int(rng.integers(15))] for h in histories]
    batch = batch_of(histories, following)
    return Batch(torch.tensor(users), batch.history, batch.offsets, batch.length, following=batch.following), histories, [t for row in following for t in row], [u for u, h in zip(users, histories) for _ in h]


@KINDS
@pytest.mark.parametrize("targets", ["catalogue", "batch"])
def test_loss_asks_every_prefix_as_if_it_were_alone(split, folders, kind, targets):
    """Values and gradients of all that is trained, against a batch in which every prefix is a history of its own."""
    model = make(split, folders, kind, targets=targets, bpc_weight=.3, balance_weight=.2, ids=True, width=10, **ROOM).double()
    model.trained[[11, 12]] = False
    batch, histories, following, user = windows()
    if targets == "catalogue": following = [t if t not in (11, 12) else 1 for t in following]
    batch.following = torch.tensor(following)
    value, parts = model.loss(batch)
    contrastive, bpc, balance = slow_parts(model, model.represent(batch_of(prefixes_of(histories))), following, user)
    expected = contrastive + .3 * bpc + .2 * balance
    for name, slow in dict(contrastive=contrastive, bpc=bpc, balance=balance, total=expected).items(): assert parts[name].item() == pytest.approx(slow.item(), rel=1e-4), name
    assert value.item() == parts["total"].item() and not any(p.requires_grad for p in parts.values())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, a, b in zip(trained, torch.autograd.grad(value, trained.values()), torch.autograd.grad(expected, trained.values())):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-7, name
        assert a.abs().sum() > 0 or name == "items.no_text", name


@pytest.mark.parametrize("targets", ["catalogue", "batch"])
def test_places_outside_the_budget_are_not_asked(split, folders, targets):
    model = make(split, folders, targets=targets, max_length=3, max_tokens=10, bpc_weight=.3, balance_weight=.2)
    batch, histories, following, user = windows(seed=8)
    with torch.no_grad():
        out = model.represent(batch, every=True)
        at = out["at"].tolist()
        outside = [n for n in range(len(following)) if n not in at]
        assert outside and len(at) > len(histories)
        value, parts = model.loss(batch)
        slow = slow_parts(model, out, [following[n] for n in at], [user[n] for n in at])
        for name, expected in zip(("contrastive", "bpc", "balance"), slow): assert parts[name].item() == pytest.approx(expected.item(), rel=1e-4), name
        assert value.item() == pytest.approx(slow[0].item() + .3 * slow[1].item() + .2 * slow[2].item(), rel=1e-4)
        for places, equal in ((outside, True), (at[:1], False)):
            other = batch.following.clone()
            other[places] = (other[places] + 1) % 15
            again = model.loss(Batch(batch.user, batch.history, batch.offsets, batch.length, following=other))[0]
            assert torch.isclose(again, value, rtol=1e-6) == equal


def test_rows_of_one_user_are_no_negatives_of_each_other(split, folders):
    model = make(split, folders, **ROOM)
    batch, histories, following, user = windows()
    of_one = lambda users: Batch(torch.tensor(users), batch.history, batch.offsets, batch.length, following=batch.following)
    with torch.no_grad():
        assert model.loss(of_one([5] * 6))[1]["bpc"] == 0
        several, one_each = (model.loss(of_one(users))[1]["bpc"] for users in ([0, 1, 2, 1, 1, 3], range(6)))
        assert 0 < several < one_each


@KINDS
@pytest.mark.parametrize("adapter", ["dpmoe", "lora", "none"])
def test_gradients_reach_what_is_trained(split, folders, kind, adapter):
    model = make(split, folders, kind, adapter=adapter, width=10, head_hidden=6, routing="dense" if adapter == "dpmoe" else "learned", **ROOM)
    model.loss(Windows(split, 7)[np.arange(20)])[0].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in trained.values()), [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    for part in ("projector.", "items.linear", "items.network", "items.no_text", "fusion.gate", "readout.", "log_temperature", "aging.keep", *dict(dpmoe=("dpmoe_router", "dpmoe_A", "dpmoe_B"), lora=("lora_A", "lora_B"), none=())[adapter]):
        assert any(part in name for name in trained), part


@pytest.mark.parametrize("adapter", ["dpmoe", "lora"])
def test_checkpointing_with_dropout_changes_nothing(split, folders, adapter):
    results = []
    for checkpointing in (False, True):
        model = make(split, folders, "qwen3", adapter=adapter, checkpointing=checkpointing, dropout=.2, place_dropout=.3, text_dropout=.2, adapter_dropout=.3, **ROOM)
        torch.manual_seed(0)
        value, parts = model.loss(windows()[0])
        value.backward()
        results.append([value.detach(), *parts.values(), *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@KINDS
@pytest.mark.parametrize("reading", ["prefixes", "whole"])
@pytest.mark.parametrize("dtype, autocast", [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_a_bfloat16_backbone(split, folders, kind, reading, dtype, autocast):
    """Whether the weights are held in bfloat16, the products are computed in it, or both: about the same loss and gradients; what is trained is float32."""
    exact, low = (make(split, folders, kind, dtype=held, reading=reading, **ROOM) for held in ("float32", dtype))
    batch, wanted, found = windows()[0], {}, {}
    for model, got, cast in ((exact, wanted, False), (low, found, autocast)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast): got["loss"] = model.loss(batch)[0]
        got["loss"].backward()
        got.update((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
    assert low.frozen_dtype == getattr(torch, dtype) and {p.dtype for p in low.parameters() if p.requires_grad} == {torch.float32}
    assert found["loss"].dtype == torch.float32 and found["loss"].item() == pytest.approx(wanted["loss"].item(), rel=.05)
    assert found.keys() == wanted.keys() and all(g.isfinite().all() for g in found.values() if g is not None)
    for part in ("dpmoe_A", "dpmoe_B", "projector", "items.linear"):
        assert torch.cosine_similarity(*(torch.cat([g[n].flatten() for n in wanted if part in n]) for g in (found, wanted)), 0) > .9, part
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast): assert low.eval().encode(batch).isfinite().all()


# --- what is refused, what is kept ------------------------------------------------------------------------------------------


def test_what_is_refused(split, folders):
    whole, model = make(split, folders, reading="whole"), make(split, folders)
    with pytest.raises(ValueError, match="every=True: with reading='whole' a history has one vector; build the model with reading='prefixes'"): whole.represent(batch_of([[1, 2]]), every=True)
    with pytest.raises(ValueError, match="an empty batch"): model.represent(Batch(*(torch.zeros(n, dtype=torch.long) for n in (0, 0, 1, 0))), every=True)
    with pytest.raises(ValueError, match="max_tokens=1: 1 special tokens leave no room"): make(split, folders, max_tokens=1).represent(batch_of([[1, 2]]))


def test_the_reading_is_kept(split, folders, tmp_path):
    batch = batch_of(random_histories())
    for reading in ("prefixes", "whole"):
        model = make(split, folders, reading=reading).eval()
        again = load_l2rec(save_l2rec(model, tmp_path / reading), split, texts_of(split))
        assert again.settings.reading == reading and again.encode(batch).equal(model.encode(batch))


def test_routes_of_users_are_those_of_their_whole_histories(split, folders):
    model = make(split, folders).eval()
    routes = user_routes(model, split, max_length=7, batch_size=9)
    start, end = split.offsets[:-1], split.bounds("test")[0]
    with torch.no_grad(): out = model.represent(batch_of([split.items[max(a, b - 7):b].tolist() for a, b in zip(start, end)]))
    for view in VIEWS: np.testing.assert_allclose(routes.gates[view], torch.stack(out["routes"][view].gates, 1).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(routes.gamma, out["gamma"].mean(1).numpy(), rtol=1e-4, atol=1e-5)


def test_a_new_items_text_is_all_that_matters(split, folders):
    """The rows of the catalogue may be turned: nothing but texts and vectors tells items apart."""
    items, turn = texts_of(split), np.random.default_rng(1).permutation(15)
    turned = ItemTexts([items.texts[i] for i in turn], items.vectors[turn], items.known[turn])
    place, histories = np.argsort(turn), random_histories(shortest=1)
    with torch.no_grad(): a, b = (make(split, folders, items=given, **ROOM).eval().represent(batch_of(h), every=True) for given, h in ((items, histories), (turned, [place[h].tolist() for h in histories])))
    same(a, b)


# --- backbones that are different -----------------------------------------------------------------------------------------------


def tiny_opt():
    torch.manual_seed(0)
    return OPTModel(OPTConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32)).eval()


@pytest.mark.parametrize("B", [1, 3])
def test_a_network_that_flattens_its_tokens_keeps_their_gates(B):
    model = get_peft_model(tiny_opt(), DPMoEConfig(r=2, user_width=6, ffn=True)).eval()
    for p in model.parameters():
        p.data += .1
    u, ids, mask = torch.randn(B, 6), torch.randint(50, (B, 1)), torch.ones(B, 1).long()
    with torch.no_grad():
        with model.view("semantic", user=u, prefixes=Prefixes(torch.arange(B)[:, None], torch.ones(B, 1).bool(), B)):
            first = model(input_ids=ids, attention_mask=mask).last_hidden_state
        with model.view("semantic", user=u):
            second = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(first, second)


def test_a_backbone_that_takes_no_mask_of_pairs_is_refused(split, folders, tmp_path):
    tiny_opt().save_pretrained(tmp_path)
    for file in Path(folders["qwen3"]).glob("token*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match="OPTModel takes no mask of pairs of tokens.*reading='whole'"):
        make(split, {"opt": str(tmp_path)}, "opt")
    assert make(split, {"opt": str(tmp_path)}, "opt", reading="whole").encode(batch_of([[1, 2]])).isfinite().all()
