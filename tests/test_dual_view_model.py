"""L2Rec whole: one user at a time in float64, what may not leak, every switch, training that stops and goes on, models that are kept."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from l2rec.baselines.sasrec import SASRec
from l2rec.data.batches import Batch, Targets, Windows
from l2rec.data.dataset import DataError
from l2rec.data.splits import leave_last_out, new_users, training_counts
from l2rec.dual_view.items import ItemTexts
from l2rec.dual_view.model import DualViewModule, L2Rec, ViewRoutes, catalogue_sha256, draw_cuts, load_l2rec, save_l2rec, set_up_dual_view
from l2rec.training.contracts import build
from l2rec.training.modules import evaluate, fit, set_up, validate
from worlds import random_dataset, ring

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [f"w{i}" for i in range(40)]
VIEWS = ("semantic", "behaviour")
WIDTH = 16                                                              # of the tiny backbones


def encoder(folder, kind="bert", seed=0, positions=64):
    """A folder with a tiny random backbone and a tokenizer of words."""
    torch.manual_seed(seed)
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"] if kind == "bert" else ["[UNK]", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *WORDS, "a"])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny = dict(vocab_size=50, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=positions)
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        model, named = BertModel(BertConfig(**tiny)), dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    else:
        model, named = Qwen3Model(Qwen3Config(**tiny, num_key_value_heads=1, head_dim=8)), dict(eos_token="<end>")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **named).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: encoder(tmp_path_factory.mktemp(kind), kind) for kind in ("bert", "qwen3")}


@pytest.fixture(scope="module", autouse=True)
def each_backbone_is_read_once():
    """Copies of a backbone in place of reading its folder for every model."""
    from l2rec.dual_view import model

    read = functools.lru_cache(None)(model.load_backbone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load_backbone", lambda *given, **named: (copy.deepcopy(read(*given, **named)[0]), read(*given, **named)[1]))
        yield


def texts_of(split, width=12, seed=0, without=(3,), fused_in=None):
    """Vectors of `width`, or of the backbone's where the views are fused among the items."""
    if fused_in == "items": width = WIDTH
    rng = np.random.default_rng(seed)
    texts = ["" if i in without else " ".join(rng.choice(WORDS, rng.integers(1, 6))) for i in range(split.n_items)]
    vectors = torch.from_numpy(rng.standard_normal((split.n_items, width)).astype(np.float32))
    known = torch.tensor([bool(t) for t in texts])
    return ItemTexts(texts, vectors * known[:, None], known)


@pytest.fixture(scope="module")
def split():
    return leave_last_out(ring(40, 15, 8))


SMALL = dict(rank=2, alpha=4., shared=1, semantic=3, behaviour=4, max_tokens=20, item_tokens=4, max_length=7, width=None, head_hidden=None, dropout=0., place_dropout=0., text_dropout=0.)
readings = pytest.mark.parametrize("reading", ["prefixes", "whole"])


def make(split, folder, kind="bert", shaken=True, items=None, **settings):
    model = build(L2Rec, split, 0, items=items or texts_of(split, fused_in=settings.get("fused_in")), encoder=folder[kind], **{**SMALL, **settings})
    if shaken:
        generator = torch.Generator().manual_seed(5)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data += .1 * torch.randn(p.shape, generator=generator)
    return model


def batch_of(histories, following=None):
    length = torch.tensor([len(h) for h in histories])
    flat = lambda lists: torch.tensor([i for h in lists for i in h], dtype=torch.long)
    return Batch(torch.arange(len(histories)), flat(histories), torch.cat([torch.zeros(1, dtype=torch.long), length.cumsum(0)]), length, following=flat(following) if following else None)


def random_histories(n=9, longest=7, n_items=15, seed=0, shortest=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n_items, rng.integers(shortest, longest + 1)).tolist() for _ in range(n)]


# --- cuts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [1, 2, 5, 100])
def test_cuts_are_prefixes_with_the_item_after(cuts):
    histories = random_histories(20, 9, shortest=1)
    following = [h[1:] + [99] for h in histories]
    torch.manual_seed(cuts)
    cut = draw_cuts(batch_of(histories, following), cuts)
    count = np.bincount(cut.user, minlength=20)
    assert count.tolist() == [min(cuts, len(h)) for h in histories] and len(cut.following) == len(cut) == count.sum()
    seen = set()
    for u, s, e, target, n in zip(cut.user.tolist(), cut.offsets[:-1], cut.offsets[1:], cut.following.tolist(), cut.length.tolist()):
        prefix = cut.history[s:e].tolist()
        assert prefix == histories[u][: len(prefix)] and n == len(prefix) >= 1 and target == following[u][len(prefix) - 1]
        seen.add((u, n))
    assert len(seen) == len(cut)                                          # no position twice


def test_cuts_are_uniform():
    batch = batch_of([list(range(5))] * 4000, [list(range(1, 6))] * 4000)
    torch.manual_seed(0)
    count = np.bincount(draw_cuts(batch, 1).length, minlength=6)[1:]
    assert abs(count / 4000 - .2).max() < .03
    pairs = draw_cuts(batch, 2).length.reshape(-1, 2)
    assert (pairs[:, 0] < pairs[:, 1]).all() and len({tuple(p) for p in pairs.tolist()}) == 10


# --- the whole pass, one user at a time ---------------------------------------------------------------------------------------


def aging_mean(model, vectors, history):  # of the model, or of the answer of one of its views
    """The mean of item vectors of length 1 that count less the older they are, itself of length 1; nothing of nothing."""
    keep, total = torch.sigmoid(model.aging.keep), vectors.new_zeros(vectors.shape[1])
    for age, i in enumerate(reversed(history)): total = total + keep.to(vectors.dtype) ** age * vectors[i] / vectors[i].norm()
    return total / total.norm() if history else total


def fused(model, views):
    """The user vector without the aging mean, of both views of one user as the backbone gives them; and the views where they were fused."""
    if model.settings.fused_in == "items":
        text, way = views["semantic"] - model.items.mean, model.items.linear
        x = [sum(text[i] * model.items.turn[i, j] for i in range(len(text))) for j in range(len(text))]
        s = torch.stack([sum(w * y for w, y in zip(row, x)) + b for row, b in zip(way.weight, way.bias)])
        if model.items.network is not None: s = s + model.items.network(torch.stack(x))
        views = {"semantic": s, "behaviour": model.readout(views["behaviour"])}
        views = {view: x / ((x * x).sum() / len(x) + 1e-6).sqrt() for view, x in views.items()}
    h = model.fusion(views["semantic"][None], views["behaviour"][None])[0][0]
    return (model.readout(h) if model.settings.fused_in == "backbone" else h), views


def apart(model, views, history):
    """The user vector of two views of one user that answer apart, each among the items of its own head."""
    answers = []
    for view, to in zip(VIEWS, (model.text_answer, model)):
        own, x = to.items.vectors(), views[view]
        x = x + to.fusion.project[view].weight @ x + to.fusion.project[view].bias
        x = (x - x.mean()) / (((x - x.mean()) ** 2).mean() + to.fusion.norm.eps).sqrt() * to.fusion.norm.weight + to.fusion.norm.bias
        if own.shape[1] != len(x): x = to.readout.weight @ x + to.readout.bias
        if model.settings.residual and not (view == "behaviour" and model.settings.ids == "apart"): x = x / math.sqrt(own.shape[1]) + aging_mean(to, own, history)
        answers.append(x / x.norm())
    return torch.cat(answers) / math.sqrt(2)


def slow_pass(model, items, history):
    """(h, semantic, behaviour, gates of both views) of one user who is read whole, without batch, chunk or padding."""
    s = model.settings
    vectors = model.items.vectors()
    D = vectors.shape[1]
    user = sum((vectors[i] / vectors[i].norm() for i in history), vectors.new_zeros(D)) * math.sqrt(D) / max(1, len(history))
    words = lambda i: [int(w[1:]) + (4 if not model.causal else 2) for w in items.texts[i].split()][: s.item_tokens]
    room = s.max_tokens - (0 if model.causal else 2)
    kept, newest = [], list(reversed(history))
    for i in newest:
        if sum(map(len, kept)) + len(words(i)) > room:
            break
        kept.append(words(i))
    kept = kept if s.order == "newest" else kept[::-1]
    ids = [t for piece in kept for t in piece]
    ids = torch.tensor([ids if model.causal else [2, *ids, 3]])
    taken = newest[: model.places]
    places = model.projector(vectors[taken if s.order == "newest" else taken[::-1]])[None] if history else vectors.new_zeros(1, 1, WIDTH)
    pool = lambda h: h[0, -1] if model.causal else h[0].mean(0)
    out, gates = [], []
    for view, given in (("semantic", {"input_ids": ids}), ("behaviour", {"inputs_embeds": places})):
        with model.backbone.view(view, user=user[None]) as routes:
            hidden = model.backbone(**given).last_hidden_state
            newest = 0 if s.order == "newest" and not model.causal else -1            # the place of the newest item
            out.append(pool(hidden) if view == "semantic" else hidden[0, newest])
        gates.append([g[0] for g in routes.gates])
    views = {view: x.to(vectors.dtype) for view, x in zip(VIEWS, out)}
    if s.fused_in == "scores": return apart(model, views, history), *views.values(), gates
    h, views = fused(model, views)
    return h / math.sqrt(D) + aging_mean(model, vectors, history) if s.residual else h, *(views[v] for v in VIEWS), gates


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("how", [{}, dict(order="newest"), dict(max_length=3, max_tokens=9), dict(chunk_tokens=8), dict(chunk_tokens=10**6), dict(width=10, ids=True), dict(residual=False), dict(fused_in="items"), dict(fused_in="items", width=10, head_hidden=6),
                                 dict(fused_in="scores", ids=True), dict(fused_in="scores", width=10, head_hidden=6), dict(fused_in="scores", residual=False, order="newest"), dict(fused_in="scores", ids="apart"), dict(fused_in="scores", ids="apart", width=10)], ids=str)
def test_the_pass_is_that_of_one_user_at_a_time(split, folders, kind, how):
    items = texts_of(split, fused_in=how.get("fused_in"))
    model, histories = make(split, folders, kind, items=items, reading="whole", **how).double().eval(), random_histories(shortest=1)
    histories = [h for h in histories if any(items.texts[i] for i in h[-2:])]
    with torch.no_grad():
        out = model.represent(batch_of(histories))
        for u, history in enumerate(histories):
            h, semantic, behaviour, gates = slow_pass(model, items, history)
            for got, expected in ((out["semantic"][u], semantic), (out["behaviour"][u], behaviour), (out["h"][u], h)):
                torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
            for view, expected in zip(VIEWS, gates):
                for block, g in enumerate(expected):
                    torch.testing.assert_close(out["routes"][view].gates[block][u], g.to(out["routes"][view].gates[block].dtype), rtol=1e-4, atol=1e-5)


@readings
@pytest.mark.parametrize("fused_in", ["backbone", "scores"])
def test_encode_and_catalogue_have_length_one(split, folders, reading, fused_in):
    model, batch = make(split, folders, reading=reading, fused_in=fused_in).eval(), batch_of(random_histories())
    users, items = model.encode(batch), model.catalogue()
    torch.testing.assert_close(users.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(items.norm(dim=1), torch.ones(split.n_items))
    assert not users.requires_grad and model.scores(batch).shape == (9, split.n_items)


def test_views_that_answer_apart_score_by_the_mean_of_their_cosines(split, folders):
    model, batch = make(split, folders, fused_in="scores").eval(), batch_of(random_histories(shortest=1))
    with torch.no_grad():
        answers, unit = model.represent(batch)["answers"], torch.nn.functional.normalize
        cosines = [unit(answers[view], dim=1) @ unit(to.items.vectors(), dim=1).T for view, to in zip(VIEWS, (model.text_answer, model))]
    torch.testing.assert_close(model.scores(batch), sum(cosines) / 2)


@readings
@pytest.mark.parametrize("fused_in", ["backbone", "items", "scores"])
def test_a_prior_is_part_of_every_score_and_of_the_loss(split, folders, reading, fused_in):
    plain, told = (make(split, folders, fused_in=fused_in, reading=reading, bpc_weight=0., balance_weight=0., prior=prior).eval() for prior in (0., .6))
    counts = torch.from_numpy(training_counts(split)).float()
    popular, answers = .6 * torch.log(1 + counts).where(counts > 0, torch.log(1 + counts[counts > 0]).mean()), [to for to in (told.text_answer, told) if to is not None]
    histories = batch_of(random_histories(shortest=1))
    for to, temperature in zip(answers, (.2, .1)): to.log_temperature.data.fill_(math.log(temperature))
    with torch.no_grad(): torch.testing.assert_close(told.scores(histories), plain.scores(histories) + (.15 if len(answers) == 2 else .2) * popular)
    asked = batch_of([[i] for i in (1, 2, 5, 7, 2, 9)], [[i] for i in (4, 4, 6, 1, 8, 0)])
    with torch.no_grad():
        value, parts = told.loss(asked)
        out, unit, slow = told.represent(asked), torch.nn.functional.normalize, 0.
        for to, h in zip(answers, out["answers"].values() if len(answers) == 2 else [out["h"]]):
            logits = unit(h.double(), dim=1) @ unit(to.items.vectors().double(), dim=1).T / to.log_temperature.double().exp() + popular.double()
            slow += torch.nn.functional.cross_entropy(logits.masked_fill(~told.trained, -torch.inf), asked.following)
        assert value.item() == pytest.approx(slow.item(), rel=1e-4) and parts["contrastive"].item() == value.item()
        after = make(split, folders, fused_in=fused_in, reading=reading, bpc_weight=0., balance_weight=0., prior=.6, prior_in_loss=False).eval()
        after.load_state_dict(told.state_dict())
        plain.load_state_dict({name: v for name, v in told.state_dict().items() if name != "prior"})
        assert after.scores(histories).equal(told.scores(histories)) and after.loss(asked)[0] == plain.loss(asked)[0]


def test_a_prior_among_the_batchs_targets_is_refused(split, folders):
    with pytest.raises(ValueError, match="prior=0.5: with targets='batch'"): make(split, folders, targets="batch", prior=.5)
    assert make(split, folders, targets="batch", prior=.5, prior_in_loss=False).prior is not None
    with pytest.raises(ValueError, match="prior=-0.5: at least 0"): make(split, folders, prior=-.5)


def test_one_view_that_answers_apart_is_that_view(split, folders):
    for view in VIEWS:
        one, plain = (make(split, folders, views=(view,), fused_in=fused_in) for fused_in in ("scores", "backbone"))
        assert one.text_answer is None and one.scores(batch_of([[1, 2], [5]])).equal(plain.scores(batch_of([[1, 2], [5]])))


def test_ids_apart_leave_the_texts_to_the_semantic_view(split, folders):
    """The behaviour view's answer does not depend on any text, nor the semantic view's item vectors on any id; and one view of ids is that half of the model."""
    own, histories = dict(fused_in="scores", ids="apart", adapter="none"), batch_of(random_histories(shortest=1))
    model, other = (make(split, folders, items=texts_of(split, seed=seed, without=without), **own).eval() for seed, without in ((0, (3,)), (1, (2, 5))))
    first, second = model.represent(histories), other.represent(histories)
    assert first["answers"]["behaviour"].equal(second["answers"]["behaviour"]) and not torch.allclose(first["answers"]["semantic"], second["answers"]["semantic"], atol=1e-3)
    D = model.items.width
    torch.testing.assert_close(model.catalogue()[:, D:], other.catalogue()[:, D:])
    assert not torch.allclose(model.catalogue()[:, :D], other.catalogue()[:, :D], atol=1e-3)
    with torch.no_grad(): model.items.id.weight.normal_()
    assert model.text_answer.items.id is None
    torch.testing.assert_close(make(split, folders, items=texts_of(split), **own).catalogue()[:, :D], model.catalogue()[:, :D])
    assert [type(head).__name__ for head in model.item_heads()] == ["ItemHead"]
    alone = make(split, folders, items=texts_of(split), **{**own, "views": ("behaviour",)}, shaken=False).eval()
    alone.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("text_answer")})
    torch.testing.assert_close(alone.encode(histories), torch.nn.functional.normalize(model.represent(histories)["answers"]["behaviour"], dim=-1))
    assert alone.item_heads() == [] and alone.tokens is None


def test_views_that_answer_apart_have_losses_of_their_own(split, folders):
    """Its loss is the sum of both; and where nothing is shared in the backbone, no gradient of one view's loss reaches the other's weights."""
    torch.manual_seed(0)
    batch = Windows(split, 7)[np.arange(8)]
    for targets in ("catalogue", "batch"):
        model = make(split, folders, fused_in="scores", shared=0, bpc_weight=0., balance_weight=0., targets=targets)
        value, parts = model.loss(batch)
        out, unit = model.represent(batch, every=True), torch.nn.functional.normalize
        target = batch.following[out["at"]]
        rivals = torch.unique(target) if targets == "batch" else model.trained.nonzero().flatten()
        each = {}
        for view, to in zip(VIEWS, (model.text_answer, model)):
            logits = unit(out["answers"][view], dim=1) @ unit(to.items.vectors(), dim=1)[rivals].T / to.log_temperature.exp()
            each[view] = torch.nn.functional.cross_entropy(logits, torch.searchsorted(rivals, target))
        torch.testing.assert_close(value, each["semantic"] + each["behaviour"])
        assert parts["contrastive"].item() == value.item()
        own = {view: {name for name, p in model.named_parameters() if p.requires_grad and (g := torch.autograd.grad(each[view], p, retain_graph=True, allow_unused=True)[0]) is not None and g.abs().max() > 0} for view in VIEWS}
        assert own["semantic"] and own["behaviour"] and not own["semantic"] & own["behaviour"]
        assert {name.split(".")[0] for name in own["semantic"]} == {"text_answer", "backbone"}


@readings
@pytest.mark.parametrize("fused_in", ["backbone", "scores"])
def test_alone_as_in_company(split, folders, reading, fused_in):
    model, histories = make(split, folders, reading=reading, fused_in=fused_in).eval(), random_histories(12, seed=2)
    together = model.encode(batch_of(histories))
    torch.testing.assert_close(torch.cat([model.encode(batch_of([h])) for h in histories]), together, rtol=1e-4, atol=1e-5)
    order = np.random.default_rng(0).permutation(12)
    torch.testing.assert_close(model.encode(batch_of([histories[i] for i in order])), together[order], rtol=1e-4, atol=1e-5)


@readings
def test_tokens_left_out_in_training_alone(split, folders, reading):
    model, batch = make(split, folders, reading=reading, token_dropout=.5, item_tokens=8, max_tokens=60), batch_of(random_histories(shortest=2))
    plain = make(split, folders, reading=reading, item_tokens=8, max_tokens=60)
    read, whole = [], model.backbone.forward
    model.backbone.forward = lambda **given: (read.append(given), whole(**given))[1]
    def tokens(model_or_plain):
        read.clear()
        with torch.no_grad(): out = model_or_plain.represent(batch)
        return out, [given["input_ids"] for given in read if "input_ids" in given]
    torch.manual_seed(0)
    (first, some), (second, _) = tokens(model), tokens(model)
    assert not first["semantic"].allclose(second["semantic"]) and first["behaviour"].equal(second["behaviour"])
    model.eval(), plain.eval()
    out, full = tokens(model)
    assert sum(x.numel() for x in some) < sum(x.numel() for x in full)
    with torch.no_grad(): torch.testing.assert_close(out["h"], plain.represent(batch)["h"])


# --- leaks ------------------------------------------------------------------------------------------------------------------


@readings
@pytest.mark.parametrize("kind, how", [("bert", {}), ("qwen3", {}), ("bert", dict(fused_in="scores"))])
def test_targets_and_later_items_change_nothing(split, folders, kind, how, reading):
    model = make(split, folders, kind, reading=reading, **how).eval()
    targets = Targets(split, "test", 7)
    batch = targets[np.arange(10)]
    other = Batch(batch.user, batch.history, batch.offsets, batch.length, target=(batch.target + 3) % 15, target_row=batch.target_row, following=batch.history.flip(0))
    first, second = model.represent(batch), model.represent(other)
    assert first["h"].equal(second["h"]) and first["user"].equal(second["user"])
    for view in VIEWS:
        for part in ("gates", "chosen", "probabilities"):
            assert all(a.equal(b) for a, b in zip(getattr(first["routes"][view], part), getattr(second["routes"][view], part)))


def test_the_rest_of_a_training_window_changes_nothing(split, folders):
    model = make(split, folders, reading="whole").eval()
    histories = random_histories(12, 7, shortest=3)
    cut = lambda hs: (torch.manual_seed(4), draw_cuts(batch_of(hs, [h[1:] + [0] for h in hs]), 1))[1]
    length = cut(histories).length.tolist()
    changed = [h[:n] + [(i + 5) % 15 for i in h[n:]] for h, n in zip(histories, length)]
    assert changed != histories and any(a != b for a, b in zip(cut(histories).following.tolist(), cut(changed).following.tolist()))
    first, second = model.represent(cut(histories)), model.represent(cut(changed))
    assert first["h"].equal(second["h"])
    assert all(a.equal(b) for view in VIEWS for a, b in zip(first["routes"][view].gates, second["routes"][view].gates))


@readings
def test_an_item_of_the_history_does_change_something(split, folders, reading):
    model = make(split, folders, reading=reading).eval()
    first, second = model.represent(batch_of([[1, 2, 4]])), model.represent(batch_of([[1, 5, 4]]))
    assert not torch.allclose(first["h"], second["h"]) and not torch.allclose(first["routes"]["behaviour"].probabilities[0], second["routes"]["behaviour"].probabilities[0])


# --- loss -------------------------------------------------------------------------------------------------------------------


def slow_loss(model, batch):
    """Parts of the loss for windows of one input each, which have one cut."""
    s = model.settings
    with torch.no_grad():
        out = model.represent(batch)
        users, items = (torch.nn.functional.normalize(x.double(), dim=1) for x in (out["h"], model.items.vectors()))
        tau, target = model.log_temperature.double().exp(), batch.following
        rivals = model.trained.nonzero().flatten().tolist() if s.targets == "catalogue" else sorted(set(target.tolist()))
        total = 0.
        for u, t in zip(users, target.tolist()):
            logits = {i: float(u @ items[i] / tau) for i in rivals}
            total += math.log(sum(math.exp(v) for v in logits.values())) - logits[t]
        balance = []
        for view in VIEWS:
            for p, chosen in zip(out["routes"][view].probabilities, out["routes"][view].chosen):
                f = chosen.double().mean(0)
                balance.append(float(p.shape[1] * (f * p.double().mean(0)).sum() / s.top_n))
        half = len(balance) // 2
    return total / len(users), (np.mean(balance[:half]) + np.mean(balance[half:])) / 2


@readings
@pytest.mark.parametrize("targets", ["catalogue", "batch"])
def test_loss_is_its_parts(split, folders, targets, reading):
    model = make(split, folders, targets=targets, reading=reading)
    model.trained[[11, 12]] = False                                           # as if training never met them: no negatives
    batch = batch_of([[i] for i in (1, 2, 5, 7, 2, 9)], [[i] for i in (4, 4, 6, 1, 8, 0)])
    value, parts = model.loss(batch)
    contrastive, balance = slow_loss(model, batch)
    assert parts["contrastive"].item() == pytest.approx(contrastive, rel=1e-4) and parts["balance"].item() == pytest.approx(balance, rel=1e-4)
    assert value.item() == pytest.approx(contrastive + .1 * parts["bpc"].item() + .01 * balance, rel=1e-4) and parts["total"].item() == value.item()


def test_the_share_of_questions_asked_is_told(split, folders):
    """All where both views have room, the newest places that both have read where one has not, one of each window where histories are read whole."""
    batch = Windows(split, 7)[np.arange(8)]
    asked = lambda **how: make(split, folders, **how).loss(batch)[1]["asked"].item()
    assert asked(max_tokens=64) == 1 and asked(reading="whole", cuts=1) == pytest.approx(8 / len(batch.history))
    assert asked(max_length=3, max_tokens=64) == pytest.approx(24 / len(batch.history))
    short = make(split, folders, max_tokens=9)
    assert asked(max_tokens=9) == pytest.approx(len(short.represent(batch, every=True)["h"]) / len(batch.history)) and asked(max_tokens=9) < 1


@readings
def test_the_same_target_everywhere(split, folders, reading):
    model = make(split, folders, targets="batch", bpc_weight=0., balance_weight=0., reading=reading)
    value, parts = model.loss(batch_of([[1], [2], [5]], [[4], [4], [4]]))
    value.backward()
    assert value.item() == 0 and list(parts) == ["contrastive", "total", "asked"]
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
    assert make(split, folders, reading=reading).loss(batch_of([[1], [2]], [[4], [4]]))[0].isfinite()


def test_a_catalogue_of_one_item(folders):
    one = leave_last_out(random_dataset(6, 1, low=3, high=6, seed=1))
    model = make(one, folders, items=texts_of(one, without=()))
    assert model.loss(Windows(one, 7)[np.arange(2)])[1]["contrastive"].abs() < 1e-5 and model.scores(batch_of([[0]])).shape == (1, 1)


@readings
@pytest.mark.parametrize("kind, how", [("bert", {}), ("qwen3", {}), ("bert", dict(fused_in="scores"))])
def test_what_is_trained_gets_a_gradient_and_what_is_frozen_none(split, folders, kind, how, reading):
    model = make(split, folders, kind, ids=True, width=10, routing="dense", reading=reading, **how)
    model.loss(Windows(split, 7)[np.arange(30)])[0].backward()
    for name, p in model.named_parameters():
        inside = name.startswith("backbone.") and "dpmoe" not in name
        assert p.requires_grad is not inside, name
        assert (p.grad is None) if inside else (p.grad is not None and p.grad.isfinite().all()), name
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if p.requires_grad)


def test_the_user_signal_does_not_train_the_items(split, folders):
    model = make(split, folders)
    batch = batch_of([[1, 2], [4]])
    assert not model.user_signal(model.items.rows(batch.history), batch.offsets, torch.ones(3, dtype=torch.bool)).requires_grad


@readings
def test_the_user_signal_is_a_mean_of_directions(split, folders, reading):
    model, draw = make(split, folders, reading=reading), torch.Generator().manual_seed(0)
    vectors, real = torch.randn(6, 12, generator=draw), torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)
    vectors[3] = 0                                                           # of an empty history
    got, unit = model.user_signal(vectors, torch.tensor([0, 3, 4, 6]), real), [math.sqrt(12) * v / v.norm() for v in vectors]
    expected = [unit[0], (unit[0] + unit[1]) / 2, (unit[0] + unit[1] + unit[2]) / 3, vectors[3], unit[4], (unit[4] + unit[5]) / 2]
    torch.testing.assert_close(got, torch.stack(expected if reading == "prefixes" else [expected[2], expected[3], expected[5]]))


@readings
@pytest.mark.parametrize("routing", ["dense", "random", "equal"])
def test_other_routings_have_no_balance_to_lose(split, folders, routing, reading):
    value, parts = make(split, folders, routing=routing, reading=reading).loss(Windows(split, 7)[np.arange(10)])
    assert value.isfinite() and parts["balance"] == 0


def test_balance_is_over_the_batch_not_the_pieces():
    p, chosen = torch.tensor([[.9, .1], [.1, .9]]), torch.tensor([[True, False], [False, True]])
    piece = lambda row: ViewRoutes([p[row : row + 1]], [chosen[row : row + 1]], [p[row : row + 1]], True)
    assert ViewRoutes.joined([piece(0), piece(1)], torch.tensor([1, 0])).balance() == pytest.approx(1.) and piece(0).balance() == pytest.approx(1.8)


@readings
@pytest.mark.parametrize("adapter", ["dpmoe", "lora"])
def test_checkpointing_changes_memory_not_results(split, folders, adapter, reading):
    results = []
    for checkpointing in (False, True):
        model = make(split, folders, adapter=adapter, checkpointing=checkpointing, reading=reading)
        torch.manual_seed(0)
        value, _ = model.loss(Windows(split, 7)[np.arange(12)])
        value.backward()
        results.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@readings
def test_bfloat16_autocast(split, folders, reading):
    model, units = make(split, folders, reading=reading), Windows(split, 7)
    torch.manual_seed(0)
    exact = model.loss(units[np.arange(12)])[0]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = model.loss(units[np.arange(12)])
    value.backward()
    assert value.item() == pytest.approx(exact.item(), rel=.05) and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --- switches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [dict(adapter="lora"), dict(adapter="none"), dict(shared=0), dict(semantic=0), dict(behaviour=0), dict(signals=("context",)), dict(signals=("user",)), dict(fusion="mean"),
                                 dict(fusion="concat"), dict(views=("semantic",)), dict(views=("behaviour",)), dict(ids=True), dict(ffn=True), dict(layers=[1]), dict(top_n=3), dict(dropout=.2, text_dropout=.2, adapter_dropout=.2),
                                 dict(place_dropout=.5), dict(residual=False), dict(head_hidden=8), dict(pooling="mean", behaviour_pooling="last"), dict(pooling="last", behaviour_pooling="mean"), dict(attention="sdpa"), dict(blocks=1),
                                 dict(bpc_weight=0., balance_weight=0.), dict(targets="batch"), dict(width=10), dict(reading="whole", adapter="lora"), dict(reading="whole", semantic=0), dict(reading="whole", views=("semantic",)),
                                 dict(reading="whole", views=("behaviour",)), dict(reading="whole", pooling="cls", behaviour_pooling="last"), dict(reading="whole", order="newest"), dict(reading="whole", cuts=3),
                                 dict(reading="whole", targets="batch"), dict(pooling="newest", behaviour_pooling="auto"),
                                 dict(fused_in="scores"), dict(fused_in="scores", reading="whole", cuts=2), dict(fused_in="scores", targets="batch", width=10, ids=True), dict(fused_in="scores", views=("semantic",)), dict(fused_in="scores", ids="apart"), dict(fused_in="scores", targets="batch", width=10, ids="apart"), dict(ids="apart", views=("behaviour",))], ids=str)
def test_every_switch_trains_and_ranks(split, folders, how):
    model = make(split, folders, shaken=False, **how)
    value, parts = model.loss(Windows(split, 7)[np.arange(10)])
    value.backward()
    one = len(how.get("views", VIEWS)) == 1
    assert value.isfinite() and ("bpc" in parts) is (not one and how.get("bpc_weight", 1) > 0) and ("balance" in parts) is (how.get("adapter", "dpmoe") == "dpmoe" and how.get("balance_weight", 1) > 0)
    model.eval()
    batch = Targets(split, "test", 7)[np.arange(6)]
    assert model.scores(batch).isfinite().all() and model.encode(batch).equal(model.encode(batch))
    assert set(model.represent(batch)["routes"]) == (set(how.get("views", VIEWS)) if how.get("adapter", "dpmoe") == "dpmoe" else set())


def test_lora_is_as_large_as_dpmoe(split, folders):
    size = lambda **how: sum(p.numel() for name, p in make(split, folders, shaken=False, **how).named_parameters() if p.requires_grad and name.startswith("backbone."))
    for how in ({}, dict(ffn=True), dict(views=("semantic",)), dict(rank=4)):
        a_rank = size(**{**how, "adapter": "lora", "shared": 1, "semantic": 0, "behaviour": 0, "rank": 1})
        assert abs(size(**how, adapter="lora") - size(**how)) <= a_rank / 2 + 1
    assert size(adapter="none") == 0


def test_a_view_that_is_not_used_has_no_parameters(split, folders):
    names = [name for name, _ in make(split, folders, shaken=False, views=("semantic",)).named_parameters()]
    assert not any("behaviour" in name or "projector" in name for name in names)
    assert make(split, folders, shaken=False, views=("behaviour",)).tokens is None


@readings
def test_before_training_the_backbone_is_the_frozen_one(split, folders, reading):
    batch = batch_of(random_histories())
    first, second = (make(split, folders, shaken=False, adapter=adapter, reading=reading).eval().represent(batch) for adapter in ("dpmoe", "none"))
    torch.testing.assert_close(first["semantic"], second["semantic"])


@readings
def test_dropout_only_in_training(split, folders, reading):
    model, batch = make(split, folders, adapter_dropout=.5, reading=reading), batch_of(random_histories())
    assert not model.represent(batch)["h"].equal(model.represent(batch)["h"])
    model.eval()
    assert model.represent(batch)["h"].equal(model.represent(batch)["h"])


# --- people and items at the ends -------------------------------------------------------------------------------------------


@readings
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_an_empty_history_has_one_defined_vector(split, folders, kind, reading):
    model = make(split, folders, kind, reading=reading).eval()
    alone = model.encode(batch_of([[]]))
    vectors = model.encode(batch_of([[], [1, 2], [], [4]]))
    assert alone.isfinite().all() and vectors[0].equal(vectors[2])
    torch.testing.assert_close(vectors[:1], alone, rtol=1e-4, atol=1e-5)
    hidden = new_users(split, .5)
    assert model.scores(Targets(hidden, "test", 7)[np.arange(40)]).isfinite().all()


@readings
def test_a_history_of_items_without_text(split, folders, reading):
    model = make(split, folders, reading=reading).eval()
    out = model.represent(batch_of([[3, 3], [3]]))
    assert out["h"].isfinite().all() and not torch.allclose(out["behaviour"][0], out["behaviour"][1] + 1)


@readings
def test_cold_items_have_vectors_from_text_alone(split, folders, reading):
    items = texts_of(split)
    order = torch.randperm(split.n_items, generator=torch.Generator().manual_seed(0))
    moved = ItemTexts([items.texts[i] for i in order], items.vectors[order], items.known[order])
    first, second = (make(split, folders, items=one, shaken=False, reading=reading) for one in (items, moved))
    torch.testing.assert_close(first.catalogue()[order], second.catalogue(), rtol=1e-4, atol=1e-5)
    histories, place = random_histories(), torch.argsort(order)
    users = (model.eval().encode(batch_of(h)) for model, h in ((first, histories), (second, [place[h].tolist() if h else [] for h in histories])))
    torch.testing.assert_close(*users, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(make(split, folders, items=items, ids=True).catalogue(), make(split, folders, items=items).catalogue())


@readings
def test_histories_longer_than_the_position_table(split, tmp_path, reading):
    short = {"bert": encoder(tmp_path, positions=5)}
    with pytest.raises(ValueError, match="max_tokens=20: the backbone has 5 positions"):
        make(split, short)
    model = make(split, short, max_tokens=5, max_length=50, residual=False, reading=reading).eval()
    long = [[1, 2, 4, 5, 6, 7, 8, 9], [4, 4, 4, 5, 6, 7, 8, 9]]
    same = model.represent(batch_of(long))["behaviour"]
    assert model.places == 5 and model.encode(batch_of(long)).isfinite().all()
    with torch.no_grad():
        model.user_signal = lambda vectors, offsets, real: vectors.new_zeros(len(real) if reading == "prefixes" else 2, 12)      # the router still reads the whole history
        same = model.represent(batch_of(long))["behaviour"]
    torch.testing.assert_close(same[0], same[1])


@pytest.mark.parametrize("wrong, message", [(dict(cuts=0), "cuts=0: at least 1"), (dict(max_tokens=0), "max_tokens=0"), (dict(rank=0), "rank=0"), (dict(bpc_weight=-1.), "bpc_weight=-1.0: at least 0"),
                                            (dict(fused_in="text"), "fused_in.*'text'"),
                                            (dict(ids="own"), "ids='own': False, True .* or 'apart'"),
                                            (dict(ids="apart"), "ids='apart': .*not with fused_in='backbone'; use fused_in='scores', or ids=True"),
                                            (dict(ids="apart", views=("semantic",)), "ids='apart': it is the behaviour view that reads ids alone"),
                                            (dict(targets="all"), "targets 'all'"), (dict(adapter="loar"), "did you mean 'lora'"), (dict(views=("semantics",)), "did you mean 'semantic'"), (dict(views=()), "views"),
                                            (dict(fusion="sum"), "fusion mode 'sum'"), (dict(top_n=9), "top_n=9"), (dict(dropout=1.), "dropout=1.0"), (dict(text_dropout=1.), "text_dropout=1.0"), (dict(temperature=0.), "temperature=0.0"),
                                            (dict(routing="rando"), "did you mean 'random'"), (dict(attention="flash"), "attention='flash'"), (dict(dtype="bfloat"), "did you mean 'bfloat16'"), (dict(chunk_tokens=0), "chunk_tokens=0"), (dict(layers=[7]), "layers"),
                                            (dict(place_dropout=1.), "place_dropout=1.0"), (dict(token_dropout=1.), "token_dropout=1.0"), (dict(reading="prefix"), "did you mean 'prefixes'"), (dict(order="newest"), "order='newest': prefixes begin with the oldest item; .* reading='whole'"),
                                            (dict(pooling="cls"), "pooling 'cls': one of auto, newest, mean, last"), (dict(behaviour_pooling="cls"), "behaviour_pooling 'cls': one of")])
def test_settings_out_of_range(split, folders, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(split, folders, **wrong)


def test_texts_of_other_items(split, folders):
    other = leave_last_out(ring(40, 12, 8))
    with pytest.raises(DataError, match="another catalogue"):
        make(split, folders, items=texts_of(other))
    with pytest.raises(ValueError, match="fused_in='items': .*width 12 and the backbone's are 16 wide"):
        make(split, folders, items=texts_of(split), fused_in="items")
    with pytest.raises(ValueError, match="an empty batch"):
        make(split, folders).encode(batch_of([[1]]).__class__(*(x[:0] for x in (torch.arange(1), torch.arange(1))), torch.zeros(1, dtype=torch.long), torch.arange(0)))


# --- training ---------------------------------------------------------------------------------------------------------------


def module_of(split, folders, how=None, **training):
    model, data = set_up(L2Rec, split, 0, {"items": texts_of(split), "encoder": folders["bert"], **{k: v for k, v in SMALL.items() if k != "max_length"}, **(how or {})}, 7, batch_size=16)
    return DualViewModule(model, data, ks=(5, 10), **{"lr": 3e-3, **training}), data


@pytest.mark.parametrize("fused_in", ["backbone", "scores"])
def test_groups_hold_every_parameter_once(split, folders, fused_in):
    module, _ = module_of(split, folders, dict(ids=True, fused_in=fused_in))
    groups, names = module.model.parameter_groups(1., 2., .5), {id(p): name for name, p in module.model.named_parameters()}
    seen = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(seen) == sum(p.requires_grad for p in module.model.parameters())
    for name, (lr, decay) in seen.items():
        assert lr == (1. if name.startswith("backbone.") else 2.), name
        assert (decay == 0.) == (dict(module.model.named_parameters())[name].dim() < 2 or name.endswith("items.id.weight")), name
    assert seen["log_temperature"] == (2., 0.)


def test_training_learns_and_leaves_the_backbone_alone(split, folders):
    module, data = module_of(split, folders, head_lr=1e-2)
    frozen = {name: p.clone() for name, p in module.model.named_parameters() if not p.requires_grad}
    before, _ = evaluate(module, data)
    run = fit(module, data, max_epochs=8, patience=8, progress=False)
    after, per_user = evaluate(module, data)
    assert run.history["loss"][-1] < run.history["loss"][0] - .2 and after["test/ndcg@10"] > before["test/ndcg@10"] and per_user.height == 40
    assert all(p.equal(frozen[name]) for name, p in module.model.named_parameters() if name in frozen)
    assert validate(module, data)["validation/ndcg@10"] == pytest.approx(run.history["validation/ndcg@10"].max(), abs=1e-6)


def test_an_interrupted_run_goes_on_to_the_same_end(split, folders, tmp_path):
    whole, data = module_of(split, folders, warmup=1.)
    complete = fit(whole, data, max_epochs=3, progress=False)
    fit(module_of(split, folders, warmup=1.)[0], data, max_epochs=2, checkpoints=tmp_path, progress=False)
    resumed = module_of(split, folders, warmup=1.)[0]
    run = fit(resumed, data, max_epochs=3, checkpoints=tmp_path, progress=False)
    assert run.history["loss"].to_list() == pytest.approx(complete.history["loss"].to_list(), rel=1e-5)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("model.") for name in stored} == {name for name, p in whole.model.named_parameters() if p.requires_grad} | {"items.mean", "items.turn"}


def test_weights_of_another_model_are_refused(split, folders):
    module, _ = module_of(split, folders)
    state = module.state_dict()
    with pytest.raises(ValueError, match="belong to another model: 1 are missing"):
        module.load_state_dict({name: value for name, value in state.items() if name != "model.log_temperature"})
    with pytest.raises(ValueError, match="0 are missing .*, 1 are not of it"):
        module.load_state_dict({**state, "model.beyond": torch.zeros(1)})
    module.load_state_dict(state)


def test_warm_up(split, folders):
    module, data = module_of(split, folders, warmup=2.)
    rates = []
    step = module.on_train_batch_start
    module.on_train_batch_start = lambda batch, index: (step(batch, index), rates.append(module.trainer.optimizers[0].param_groups[0]["lr"]))[0]
    fit(module, data, max_epochs=3, progress=False)
    steps = 2 * 3                                                              # 40 windows in batches of 16: three a step
    assert rates == pytest.approx([3e-3 * min(1., (n + 1) / steps) for n in range(9)])


@pytest.mark.parametrize("wrong, message", [(dict(warmup=-1), "warmup=-1"), (dict(head_lr=0.), "head_lr=0.0"), (dict(lr=0.), "lr=0.0")])
def test_training_parameters_out_of_range(split, folders, wrong, message):
    with pytest.raises(ValueError, match=message):
        module_of(split, folders, **wrong)


def test_one_way_to_set_up(folders, monkeypatch):
    dataset = ring(30, 12, 7)
    named = dataset.items.with_columns(title=dataset.items["item_id"].cast(str))
    import polars as pl
    from l2rec.data.dataset import make_dataset
    dataset = make_dataset("titled", dataset.interactions, named.select("item_id", pl.concat_str(pl.lit("w"), "title").alias("title")))
    split = leave_last_out(dataset)
    monkeypatch.setenv("L2REC_CACHE", folders["bert"] + "-cache")
    model, data = set_up_dual_view(L2Rec, dataset, split, 1, {k: v for k, v in SMALL.items() if k != "max_length"}, max_length=6, encoder=folders["bert"], max_tokens=16, batch_size=8)
    assert model.settings.max_length == data.max_length == 6 and model.items.width == 16 and model.source
    module = DualViewModule(model, data, ks=(5, 10))
    fit(module, data, max_epochs=1, progress=False)
    model, data = set_up_dual_view(SASRec, dataset, split, 1, dict(width=8), max_length=6, batch_size=8)
    assert isinstance(model, SASRec)
    fit(DualViewModule(model, data, ks=(5, 10), warmup=1.), data, max_epochs=1, progress=False)


# --- kept models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, dict(adapter="lora"), dict(adapter="none"), dict(ids=True, views=("behaviour",), signals=("context",)), dict(fused_in="scores", ids=True), dict(fused_in="scores", ids="apart"), dict(ids="apart", views=("behaviour",)), dict(fused_in="scores", words=4), dict(prior=.5), dict(target_modules=["query", "value"], layers=[0])], ids=str)
def test_kept_models_are_the_same(split, folders, tmp_path, how):
    model, batch = make(split, folders, **how).eval(), batch_of(random_histories())
    folder = save_l2rec(model, tmp_path / "model")
    again = load_l2rec(folder, split, texts_of(split))
    assert again.encode(batch).equal(model.encode(batch)) and again.catalogue().equal(model.catalogue()) and not again.training
    assert vars(again.settings) == vars(model.settings)
    stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert trained <= stored < trained + 50_000 and sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    save_l2rec(model, folder)                                                  # replaced, nothing beside it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_kept_models_are_the_same_where_axes_are_found_the_other_way(split, folders, tmp_path, monkeypatch):
    from l2rec.dual_view import items
    model, batch, found = make(split, folders, fused_in="scores", words=4).eval(), batch_of(random_histories()), items.axes
    folder = save_l2rec(model, tmp_path / "model")
    monkeypatch.setattr(items, "axes", lambda *args: (lambda mean, turn: (mean, -turn))(*found(*args)))
    again = load_l2rec(folder, split, texts_of(split))
    assert torch.allclose(again.encode(batch), model.encode(batch), atol=1e-5) and torch.allclose(again.catalogue(), model.catalogue(), atol=1e-5)


def test_words_in_every_item_head_and_not_among_fused_items(split, folders):
    model = make(split, folders, fused_in="scores", words=4)
    assert [head.words.shape[1] for head in model.item_heads()] == [4, 4] and len(make(split, folders).item_heads()) == 1
    assert model.items.linear.in_features == 16 and model.items.width == make(split, folders, fused_in="scores").items.width == 12
    loss, _ = model.loss(batch_of([[1, 2, 4], [5, 6]], [[2, 4, 7], [6, 8]]))
    loss.backward()
    assert all(head.linear.weight.grad[:, 12:].abs().sum() > 0 for head in model.item_heads())
    with pytest.raises(ValueError, match="words=4: with fused_in='items'"): make(split, folders, fused_in="items", words=4)


def test_kept_models_refuse_what_is_not_theirs(split, folders, tmp_path):
    model = make(split, folders)
    folder = save_l2rec(model, tmp_path / "model")
    other = leave_last_out(ring(40, 12, 8))
    with pytest.raises(DataError, match="another catalogue"):
        load_l2rec(folder, other, texts_of(other))
    with pytest.raises(DataError, match="another catalogue"):
        load_l2rec(folder, split, texts_of(split, seed=1))
    with pytest.raises(DataError, match="another backbone"):
        load_l2rec(folder, split, texts_of(split), encoder(tmp_path / "other", seed=3))
    with pytest.raises(DataError, match="no model of save_l2rec"):
        load_l2rec(tmp_path / "nowhere", split, texts_of(split))
    about = json.loads((folder / "l2rec.json").read_text())
    about["settings"]["head_hidden"] = 8
    (folder / "l2rec.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="does not fit the settings"):
        load_l2rec(folder, split, texts_of(split))
    about["settings"]["experts_of_tomorrow"] = 1
    (folder / "l2rec.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="does not know: experts_of_tomorrow"):
        load_l2rec(folder, split, texts_of(split))


@pytest.mark.parametrize("name", ["heads.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:9])], ids=["lost", "cut"])
def test_a_kept_model_in_part(split, folders, tmp_path, name, spoil):
    folder = save_l2rec(make(split, folders), tmp_path / "model")
    spoil(folder / name)
    with pytest.raises(DataError, match=f"not all of a model of save_l2rec .*{name}"):
        load_l2rec(folder, split, texts_of(split))


def test_experts_of_named_matrices(split, folders):
    model, all_four = make(split, folders, target_modules=["query", "value"]), make(split, folders)
    adapted = lambda m: sorted({name.split(".dpmoe_A")[0].rpartition(".")[2] for name, _ in m.named_parameters() if "dpmoe_A" in name})
    assert adapted(model) == ["query", "value"] and adapted(all_four) == ["dense", "key", "query", "value"]
    assert sorted({name.split(".lora_A")[0].rpartition(".")[2] for name, _ in make(split, folders, adapter="lora", target_modules=["key"]).named_parameters() if "lora_A" in name}) == ["key"]
    with pytest.raises(ValueError, match="target_modules 'q_proj': no such Linear module"): make(split, folders, target_modules=["q_proj"])


def test_no_room_for_a_single_token(split, folders):
    with pytest.raises(ValueError, match="max_tokens=2: 2 special tokens leave no room for an item"): make(split, folders, max_tokens=2, reading="whole")
    with pytest.raises(ValueError, match="max_tokens=1: 1 special tokens leave no room for an item"): make(split, folders, max_tokens=1)
    make(split, folders, max_tokens=2)                                         # prefixes are read without the special token at the end


def test_catalogue_digest():
    a, b = leave_last_out(ring(40, 15, 8)), leave_last_out(random_dataset(40, 15, low=4))
    items = texts_of(a)
    other = ItemTexts(items.texts, items.vectors + 1e-6, items.known)
    assert catalogue_sha256(a, items) == catalogue_sha256(a, other) != catalogue_sha256(b, items)


def test_items_that_training_does_not_meet_are_no_negatives(split, folders):
    from l2rec.data.splits import training_fraction

    few = training_fraction(split, .05)
    model = make(few, folders, items=texts_of(split))
    assert model.trained.equal(torch.from_numpy(training_counts(few) > 0)) and not model.trained.all()
    model.loss(Windows(few, 7)[np.arange(2)])[0].backward()
    ids = make(few, folders, items=texts_of(split), ids=True)
    ids.loss(Windows(few, 7)[np.arange(2)])[0].backward()
    assert ids.items.id.weight.grad[~ids.trained].abs().max() == 0 < ids.items.id.weight.grad[ids.trained].abs().min(1).values.max()
