"""The rankers against slow float64 references, question by question in plain loops, and at their edges."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from l2rec.data.splits import leave_last_fraction, new_users
from l2rec.data.synthetic import SyntheticWorld, make_world
from l2rec.mail.attention_rankers import DIN, DMR
from l2rec.mail.crossing_rankers import CrossLayers, DCNv2, DeepFM, pair_products
from l2rec.mail.features import Questions, make_features
from l2rec.mail.rankers import BaseDNN, BatchNorm, Dropout, Embedded, deep_network, look_up, pooled, weighted_sum
from l2rec.training.contracts import build

RANKERS = (BaseDNN, DIN, DMR, DeepFM, DCNv2)
SMALL = dict(width=8, slots=12, hidden=(16, 8))


@pytest.fixture(scope="module")
def world():
    dataset = make_world(SyntheticWorld(n_users=120)).dataset
    split = new_users(leave_last_fraction(dataset), share=.4, seed=0)
    return dataset, split, make_features(dataset, split)


def with_context(split, features, sizes=(3, 4)):
    rng = np.random.default_rng(5)
    return replace(features, context=np.stack([rng.integers(0, n, len(split.items)) for n in sizes], 1), n_context=tuple(sizes))


def mixed(split, features, n=24):
    "Questions of old users with and without history, and of new users."
    questions = Questions(split, features, "train", max_length=20)
    return questions[np.random.default_rng(1).permutation(len(questions))[:n]]


def settled(ranker, split, features):
    "float64, larger weights, and running statistics that are not those of the start; in evaluation mode."
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in ranker.named_parameters():
            if name.startswith("embeddings") or "position" in name or "output" in name: p.normal_(0, .3, generator=generator)
    ranker = ranker.double().train()
    for _ in range(3): ranker(mixed(split, features, 64))
    return ranker.eval()


# ---------------------------------------------------------------- references

def leaky(x): return [v if v > 0 else .01 * v for v in x]


def linear(layer, x):
    w = layer.weight.tolist()
    b = layer.bias.tolist() if layer.bias is not None else [0.] * len(w)
    return [sum(a * v for a, v in zip(row, x)) + c for row, c in zip(w, b)]


def deep(network, x):
    for layer in network:
        if isinstance(layer, torch.nn.Linear): x = linear(layer, x)
        elif isinstance(layer, BatchNorm):
            x = [(v - m) / math.sqrt(s + layer.eps) * g + b for v, m, s, g, b in
                 zip(x, layer.running_mean.tolist(), layer.running_var.tolist(), layer.weight.tolist(), layer.bias.tolist())]
        elif isinstance(layer, torch.nn.LeakyReLU): x = leaky(x)
    return x


def item_vector(ranker, features, i):
    t, (a, b) = ranker.embeddings, features.category_offsets[i:i + 2]
    x = t.item.weight[i].tolist()
    for c in features.category[a:b]: x = [u + v / (b - a) for u, v in zip(x, t.category.weight[c].tolist())]
    return [u + v for u, v in zip(x, t.brand.weight[features.brand[i]].tolist())]


def question(ranker, features, batch, b):
    "user, attributes, behaviour (newest first), target, context of one question, from the tables."
    t, u = ranker.embeddings, int(batch.user[b])
    user = t.user.weight[0 if features.new_user[u] else u + 1].tolist()
    sizes = [f.n for f in features.attributes.fields]
    attributes = [t.attribute.weight[sum(sizes[:j]) + int(c)].tolist() for j, c in enumerate(features.codes[u])]
    past = batch.history[batch.offsets[b]:batch.offsets[b + 1]].tolist()
    liked = [i for i, y in zip(past, batch.feedback[batch.offsets[b]:batch.offsets[b + 1]].tolist()) if y > 0]
    items = liked[::-1][:ranker.slots]
    context = [] if features.context is None else [t.context.weight[sum(features.n_context[:j]) + int(c)].tolist() for j, c in enumerate(batch.context[b])]
    return user, attributes, items, [item_vector(ranker, features, i) for i in items], item_vector(ranker, features, int(batch.candidate[b])), context


def total(vectors, width): return [sum(v[k] for v in vectors) for k in range(width)]


def dot(a, b): return sum(x * y for x, y in zip(a, b))


def group_input(user, attributes, behaviour, target, context, width):
    return total([user, *attributes], width) + behaviour + target + (total(context, width) if context else [])


def softmax(x):
    if not x: return []
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def reference_base(ranker, features, batch, b):
    user, attributes, _, v, t, c = question(ranker, features, batch, b)
    return deep(ranker.network, group_input(user, attributes, total(v, ranker.width), t, c, ranker.width))[0]


def reference_din(ranker, features, batch, b):
    user, attributes, _, v, t, c = question(ranker, features, batch, b)
    unit, weights = ranker.activation, []
    for e in v:
        x = e + t + [p - q for p, q in zip(e, t)] + [p * q for p, q in zip(e, t)]
        weights.append(linear(unit.out, leaky(linear(unit.hidden, x)))[0])
    if ranker.softmax: weights = softmax(weights)
    interest = [sum(w * e[k] for w, e in zip(weights, v)) for k in range(ranker.width)]
    return deep(ranker.network, group_input(user, attributes, interest, t, c, ranker.width))[0]


def attentions(ranker, v, t):
    a, scores = ranker.attention, [[], []]
    d = ranker.width
    of_target = linear(a.of_target, t)
    for slot, e in enumerate(v):
        of_behaviour, bias = linear(a.of_behaviour, e), a.bias.tolist()
        for h in (0, 1):
            position, w = a.position[h, slot].tolist(), a.of_position[h].tolist()
            hidden = [of_behaviour[h * d + k] + bias[h * d + k] + sum(position[j] * w[j][k] for j in range(d)) + (of_target[k] if h else 0.) for k in range(d)]
            scores[h].append(dot(a.z[h].tolist(), [math.tanh(x) for x in hidden]) + (a.constant.item() if h else 0.))
    return scores


def weighted(weights, v, d): return [sum(w * e[k] for w, e in zip(weights, v)) for k in range(d)]


def reference_dmr(ranker, features, batch, b):
    user, attributes, _, v, t, c = question(ranker, features, batch, b)
    a, raw = attentions(ranker, v, t)
    u = leaky(linear(ranker.condense, weighted(softmax(a), v, ranker.width)))
    r = dot(u, ranker.output.weight[int(batch.candidate[b])].tolist())
    x = group_input(user, attributes, weighted(softmax(raw), v, ranker.width), t, c, ranker.width) + [r, sum(raw)]
    return deep(ranker.network, x)[0]


def reference_deepfm(ranker, features, batch, b):
    user, attributes, _, v, t, c = question(ranker, features, batch, b)
    x = [user, total(v, ranker.width), t, *attributes, *c]
    first = sum(dot(w, f) for w, f in zip(ranker.first_order.tolist(), x))
    pairs = sum(dot(x[f], x[g]) for f in range(len(x)) for g in range(f + 1, len(x)))
    return first + pairs + deep(ranker.network, [k for f in x for k in f])[0]


def reference_dcn(ranker, features, batch, b):
    user, attributes, _, v, t, c = question(ranker, features, batch, b)
    x0 = group_input(user, attributes, total(v, ranker.width), t, c, ranker.width)
    x = x0
    for layer in ranker.cross.layers: x = [p * q + r for p, q, r in zip(x0, linear(layer, x), x)]
    return linear(ranker.out, x + deep(ranker.network, x0))[0]


CASES = [(BaseDNN, reference_base, {}), (DIN, reference_din, {}), (DIN, reference_din, dict(softmax=True)), (DMR, reference_dmr, {}),
         (DeepFM, reference_deepfm, {}), (DCNv2, reference_dcn, dict(layers=2))]


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("cls, reference, hyper", CASES, ids=[f"{c.__name__}{'-'.join(['', *h])}" for c, _, h in CASES])
def test_scores_equal_the_slow_reference(world, cls, reference, hyper, context):
    _, split, features = world
    if context: features = with_context(split, features)
    ranker = settled(build(cls, split, features=features, **SMALL, **hyper), split, features)
    batch = mixed(split, features)
    with torch.no_grad(): scores = ranker(batch)
    lengths = batch.offsets.diff()
    assert (lengths == 0).any() and (lengths > 12).any()                     # no behaviour, and more than there are slots
    expected = [reference(ranker, features, batch, b) for b in range(len(batch))]
    assert np.ptp(expected) > .05
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_mean_pooling(world):
    _, split, features = world
    x, present = torch.randn(3, 5, 2, dtype=torch.float64), torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()
    for how in ("sum", "mean"):
        out = pooled(x, present, how)
        for b in range(3):
            rows = [x[b, s] for s in range(5) if present[b, s]]
            expected = sum(rows) / (len(rows) if how == "mean" else 1) if rows else torch.zeros(2, dtype=torch.float64)
            assert torch.allclose(out[b], expected)
    assert not torch.equal(*(build(BaseDNN, split, features=features, pool=p, **SMALL).eval()(mixed(split, features)) for p in ("sum", "mean")))


@pytest.mark.parametrize("shape", [(64, 7), (300,), (0, 7), (5, 1, 2)])
def test_rows_and_their_gradients_are_those_of_embedding(shape):
    """To the last bit, with rows that are read often, once and never."""
    torch.manual_seed(0)
    index, table, weight = (torch.rand(shape) ** 3 * 20).long(), torch.randn(31, 5, requires_grad=True), torch.randn(*shape, 5)
    reads = [look_up(table, index), look_up(table, index, nothing=30), torch.nn.functional.embedding(index, table)]
    assert all(r.shape == (*shape, 5) and torch.equal(r, reads[-1]) for r in reads)
    slopes = [torch.autograd.grad((r * weight).sum(), table)[0] for r in reads]
    assert torch.equal(slopes[0], slopes[-1]) and torch.equal(slopes[1], slopes[-1])


def test_weighted_sum_is_a_product_of_matrices():
    """The value, both slopes to the last bit, the slope of a slope, and weights that need none."""
    torch.manual_seed(0)
    weight, x, g = torch.rand(9, 6, requires_grad=True), torch.randn(9, 6, 4, requires_grad=True), torch.randn(9, 4)
    ways = [weighted_sum(weight, x), (weight[:, None] @ x).squeeze(1)]
    assert torch.equal(*ways)
    for a, b in zip(*(torch.autograd.grad((way * g).sum(), (weight, x)) for way in ways)): assert torch.equal(a, b)
    assert torch.equal(*(torch.autograd.grad((way * g).sum(), x)[0] for way in (weighted_sum(weight.detach(), x), weighted_sum(weight, x))))
    exact = weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(weighted_sum, exact) and torch.autograd.gradgradcheck(weighted_sum, exact)
    with torch.autocast("cpu", torch.bfloat16): half = weighted_sum(weight, x)
    (half.float() * g).sum().backward()
    assert torch.allclose(half.float(), ways[0], atol=.1) and weight.grad.dtype == x.grad.dtype == torch.float32 and x.grad.abs().sum() > 0


def test_match_against_the_whole_catalogue(world):
    _, split, features = world
    ranker = settled(build(DMR, split, features=features, negatives=10_000, match_weight=.5, **SMALL), split, features)
    batch = mixed(split, features, 40)
    e, losses = ranker.embed(batch), []
    ranker.score(e)
    for b in range(len(batch)):
        _, _, items, v, t, _ = question(ranker, features, batch, b)
        if len(items) < 2: continue
        a, _ = attentions(ranker, v, t)
        u = leaky(linear(ranker.condense, weighted(softmax(a[1:]), v[1:], ranker.width)))
        logits = [dot(u, row) for row in ranker.output.weight.tolist()]
        losses.append(math.log(sum(math.exp(x) for x in logits)) - logits[items[0]])
    assert 5 < len(losses) < 40
    assert ranker.auxiliary(e)["match"].item() == pytest.approx(.5 * sum(losses) / len(losses), rel=1e-9)
    assert ranker.auxiliary(replace(e))["match"].item() == pytest.approx(.5 * sum(losses) / len(losses), rel=1e-9)     # a copy has no memo


def test_sampled_match_masks_the_answer_among_the_negatives(world, monkeypatch):
    _, split, features = world
    ranker = settled(build(DMR, split, features=features, negatives=3, match_weight=1., **SMALL), split, features)
    questions = Questions(split, features, "train", max_length=20)
    one = questions[np.flatnonzero(questions[np.arange(len(questions))].length.numpy() == 3)[:1]]
    e = ranker.embed(one)
    answer = int(e.items[0, 0])
    other = (answer + 1) % split.n_items
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.tensor([answer, other, answer]))
    u = ranker.attend(e)[1][0]
    logits = ranker.output.weight[[answer, other]] @ u
    assert ranker.auxiliary(e)["match"].item() == pytest.approx((torch.logsumexp(logits, 0) - logits[0]).item(), rel=1e-9)


def test_the_match_needs_two_real_behaviours(world):
    _, split, features = world
    ranker = build(DMR, split, features=features, **SMALL)
    e = ranker.embed(mixed(split, features))
    one = torch.zeros_like(e.present)
    one[:, 0] = True
    virtual = replace(e, items=torch.full_like(e.items, split.n_items), present=torch.ones_like(e.present))
    for empty in (replace(e, present=one & e.present), replace(e, present=torch.zeros_like(e.present)), virtual):
        loss = ranker.auxiliary(empty)["match"]
        loss.backward(retain_graph=True)
        assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in ranker.parameters())
    assert build(DMR, split, features=features, match_weight=0., **SMALL).auxiliary(e) == {}


def test_pair_products_and_cross_layers():
    torch.manual_seed(0)
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    expected = [sum(float(x[b, f] @ x[b, g]) for f in range(5) for g in range(f + 1, 5)) for b in range(7)]
    np.testing.assert_allclose(pair_products(x).numpy(), expected, rtol=1e-12)
    cross, y = CrossLayers(4, 3).double(), torch.randn(6, 4, dtype=torch.float64)
    out = y
    for layer in cross.layers: out = y * (out @ layer.weight.T + layer.bias) + out
    assert torch.allclose(cross(y), out)


# ---------------------------------------------------------------- edges, for every ranker

@pytest.fixture(params=RANKERS, ids=lambda c: c.__name__)
def made(request, world):
    _, split, features = world
    return settled(build(request.param, split, features=features, **SMALL), split, features), split, features


@torch.no_grad()
def test_absent_slots_are_not_looked_at(made):
    ranker, split, features = made
    e = ranker.embed(mixed(split, features))
    noisy = replace(e, behaviour=torch.where(e.present[..., None], e.behaviour, 1e3 * torch.randn_like(e.behaviour)))
    assert torch.allclose(ranker.score(e), ranker.score(noisy), atol=1e-10)


@torch.no_grad()
def test_no_behaviour_at_all(made):
    ranker, split, features = made
    e = ranker.embed(mixed(split, features))
    e = replace(e, present=torch.zeros_like(e.present))
    scores = ranker.score(e)
    zero = ranker.score(replace(e, behaviour=torch.zeros_like(e.behaviour)))
    assert scores.isfinite().all() and torch.allclose(scores, zero, atol=1e-10)


def test_virtual_behaviour(made):
    ranker, split, features = made
    e = ranker.embed(mixed(split, features)).detach()
    virtual = (.3 * torch.randn_like(e.behaviour)).requires_grad_()
    filled = replace(e, behaviour=virtual, present=torch.ones_like(e.present), items=torch.full_like(e.items, split.n_items))
    scores = ranker.score(filled)
    scores.sum().backward()
    assert scores.isfinite().all() and not torch.allclose(scores, ranker.score(e)) and (virtual.grad.abs().amax(2) > 0).all()


@torch.no_grad()
def test_a_question_alone_scores_as_in_company(made):
    ranker, split, features = made
    questions = Questions(split, features, "train", max_length=20)
    pick = np.arange(0, len(questions), len(questions) // 12)
    together = ranker(questions[pick])
    alone = torch.cat([ranker(questions[pick[i:i + 1]]) for i in range(len(pick))])
    assert together.shape == (len(pick),) and torch.allclose(together, alone, atol=1e-10)


def test_a_last_batch_of_one_question_trains(made):
    ranker, split, features = made
    loss, _ = ranker.train().loss(Questions(split, features, "train")[np.array([40])])
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("cls", RANKERS, ids=lambda c: c.__name__)
def test_every_parameter_has_a_finite_gradient_that_is_not_zero(world, cls, context):
    _, split, features = world
    if context: features = with_context(split, features)
    ranker = build(cls, split, features=features, **SMALL).train()
    loss, parts = ranker.loss(mixed(split, features, 300))
    loss.backward()
    assert sum(parts.values()).item() == pytest.approx(loss.item())
    for name, p in ranker.named_parameters(): assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_forward_is_score_of_embed_and_the_data_stays_out_of_the_checkpoint(made):
    ranker, split, features = made
    batch = mixed(split, features)
    assert torch.equal(ranker(batch), ranker.score(ranker.embed(batch)))
    state = ranker.state_dict()
    assert not {"codes", "new_user", "brand_codes", "category_codes"} & {k.split(".")[-1] for k in state}
    twin = build(type(ranker), split, seed=9, features=features, **SMALL).double().eval()
    twin.load_state_dict(state)
    assert torch.equal(twin(batch), ranker(batch))


# ---------------------------------------------------------------- embeddings

def test_both_ways_to_put_items_together_agree(world):
    _, split, features = world
    ranker = build(BaseDNN, split, features=features, **SMALL)
    questions = Questions(split, features, "train", max_length=20)
    few = np.flatnonzero(questions[np.arange(len(questions))].length.numpy() > 3)[::7][:10]
    many = np.concatenate([few, np.arange(200)])
    assert len(few) * 13 < split.n_items <= len(many) * 13                                      # items that occur; the whole catalogue
    tables = [ranker.embeddings.item.weight, ranker.embeddings.category.weight, ranker.embeddings.brand.weight]
    results = []
    for pick in (few, many):
        e = ranker.embed(questions[pick])
        v, t = e.behaviour[:10], e.target[:10]
        value = (v * torch.arange(v.numel()).view_as(v)).sum() + (t * torch.arange(t.numel()).view_as(t)).sum()
        results.append([v, t, *torch.autograd.grad(value, tables)])
    for a, b in zip(*results): assert torch.allclose(a, b, rtol=1e-4, atol=1e-3) and a.any()


def test_items_without_category_or_any_brand(world):
    _, split, features = world
    bare = replace(features, category=np.zeros(0, np.int64), category_offsets=np.zeros(split.n_items + 1, np.int64), n_categories=0,
                   brand=np.zeros(split.n_items, np.int64), n_brands=1)
    some = replace(features, category=np.array([1]), category_offsets=np.minimum(np.arange(split.n_items + 1), 1))
    for f in (bare, some):
        ranker = build(BaseDNN, split, features=f, **SMALL)
        assert ranker.loss(mixed(split, f))[0].isfinite()
    whole = ranker.embeddings.item_vectors()
    assert whole.isfinite().all() and torch.allclose(whole[5:6], ranker.embeddings.item_vectors(torch.tensor([5])))
    assert build(BaseDNN, split, features=bare, **SMALL).embeddings.category is None


def test_new_users_have_one_id_vector_and_train_no_other(world):
    _, split, features = world
    ranker = build(BaseDNN, split, features=features, **SMALL)
    batch = Questions(split, features, "train")[np.arange(600)]
    ranker.loss(batch)[0].backward()
    touched = ranker.embeddings.user.weight.grad.any(1).nonzero().flatten().tolist()
    assert 0 in touched and not any(features.new_user[row - 1] for row in touched if row)


def test_strangers_are_admitted(world):
    _, split, features = world
    ranker = build(BaseDNN, split, features=features, **SMALL).eval()
    rows = ranker.embeddings.admit(torch.from_numpy(features.codes[:3]))
    assert rows.tolist() == [split.n_users, split.n_users + 1, split.n_users + 2]
    batch = mixed(split, features, 3)
    batch.user = rows
    e = ranker.embed(batch)
    assert torch.equal(e.user, ranker.embeddings.user.weight[:1].expand(3, -1))
    assert torch.equal(e.attributes, ranker.embeddings.attribute_vectors(torch.from_numpy(features.codes[:3]))) and ranker(batch).isfinite().all()
    with pytest.raises(ValueError, match=r"expected \[n, \d\]"): ranker.embeddings.admit(torch.zeros(2, 1, dtype=torch.long))


def test_a_missing_context_is_named(world):
    _, split, features = world
    ranker = build(BaseDNN, split, features=with_context(split, features), **SMALL)
    with pytest.raises(ValueError, match="2 context columns"): ranker(mixed(split, features))


def test_detach_cuts_every_tensor_and_copies_have_no_memo(world):
    _, split, features = world
    ranker = build(DMR, split, features=features, **SMALL)
    e = ranker.embed(mixed(split, features))
    ranker.score(e)
    cut = e.detach()
    assert e.memo and not cut.memo and not replace(e, present=e.present).memo
    assert not any(t.requires_grad for t in (cut.attributes, cut.behaviour, cut.target, cut.user, cut.context)) and torch.equal(cut.items, e.items)
    assert isinstance(cut, Embedded) and len(cut) == len(e)


# ---------------------------------------------------------------- parts and bad input

@pytest.mark.parametrize("p", [.1, .5, .9])
def test_dropout(p):
    torch.manual_seed(0)
    x, layer = torch.ones(999, 1001), Dropout(p)
    y = layer(x)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=3e-3) and y[y != 0].unique().item() == pytest.approx(1 / (1 - p))
    columns, rows = (y == 0).float().mean(0), (y == 0).float().mean(1)
    assert columns.std().item() == pytest.approx(math.sqrt(p * (1 - p) / 999), rel=.1) and rows.std().item() == pytest.approx(math.sqrt(p * (1 - p) / 1001), rel=.1)
    assert torch.equal(layer.eval()(x), x) and torch.equal(Dropout(0.)(x), x)
    torch.manual_seed(1); a = Dropout(p)(x)
    torch.manual_seed(1); b = Dropout(p)(x)
    assert torch.equal(a, b)
    torch.manual_seed(1)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:x.numel()].view(x.shape)
    assert torch.equal(a != 0, bits >= round(p * 2**16) - 2**15)              # integers, compared as integers


def test_deep_network_is_that_of_torch():
    torch.manual_seed(0)
    network = deep_network(6, (5, 4), 0.).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    y = x
    for layer in network:
        if isinstance(layer, torch.nn.Linear): y = y @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        elif isinstance(layer, BatchNorm): y = (y - y.mean(0)) / (y.var(0, unbiased=False) + layer.eps).sqrt()
        elif isinstance(layer, torch.nn.LeakyReLU): y = torch.where(y > 0, y, .01 * y)
    assert torch.allclose(network(x), y) and deep_network(6, (5,), out=None)(torch.randn(3, 6)).shape == (3, 5)


@pytest.mark.parametrize("cls, wrong, message", [
    (BaseDNN, dict(width=0), "width=0"), (BaseDNN, dict(slots=0), "slots=0"), (BaseDNN, dict(pool="max"), "pool='max'"), (BaseDNN, dict(dropout=1.), "dropout=1"),
    (BaseDNN, dict(hidden=()), "hidden"), (DIN, dict(units=0), "units=0"), (DMR, dict(negatives=0), "negatives=0"), (DMR, dict(match_weight=-1.), "match_weight=-1"),
    (DCNv2, dict(layers=0), "layers=0"), (DCNv2, dict(layer=2), "did you mean 'layers'"), (DIN, dict(pool="sum"), "takes no parameter 'pool'")])
def test_wrong_hyperparameters_are_named(world, cls, wrong, message):
    _, split, features = world
    with pytest.raises(ValueError, match=message): build(cls, split, features=features, **wrong)


def test_dmr_says_what_it_lacks(world):
    _, split, features = world
    ranker = build(DMR, split, features=features, **SMALL)
    e = ranker.embed(mixed(split, features))
    with pytest.raises(ValueError, match="candidate"): ranker.score(replace(e, candidate=None))
    with pytest.raises(ValueError, match="slots=13"): ranker.score(replace(e, behaviour=torch.zeros(24, 13, 8), present=torch.ones(24, 13).bool()))


def test_order_matters_to_dmr_alone(world):
    _, split, features = world
    for cls in RANKERS:
        ranker = settled(build(cls, split, features=features, **SMALL), split, features)
        with torch.no_grad():
            e = ranker.embed(mixed(split, features))
            turned = replace(e, behaviour=e.behaviour.flip(1), present=e.present.flip(1))
            assert torch.allclose(ranker.score(e), ranker.score(turned), atol=1e-10) == (cls is not DMR)


def test_din_may_begin_with_factors_of_the_training_ratings(world):
    _, split, features = world
    drawn, begun = (build(DIN, split, 3, features=features, item_start=start, **SMALL) for start in ("random", "factors"))
    assert [name for (name, a), b in zip(drawn.named_parameters(), begun.parameters()) if not torch.equal(a, b)] == ["embeddings.item.weight"]
