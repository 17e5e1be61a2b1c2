"""The comparators of L2Rec: later targets pair by pair, what a vector may depend on, cold items, a text encoder that learns, checkpoints."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from l2rec.data.batches import Batch, SequenceData, Targets, Windows
from l2rec.data.dataset import DataError
from l2rec.data.splits import leave_last_out, new_users, training_counts
from l2rec.dual_view.comparators import HLLMLike, LEARNLike, TextEncoder, Tower, UniSRecLike, later_mean
from l2rec.dual_view.items import ItemTexts
from l2rec.training.contracts import build
from l2rec.training.modules import RetrievalModule, fit, validate
from worlds import dataset as small_dataset

WORDS = "glove box nitrile caliper steel tape glue gel strip test scale gram cable tube".split()
CLASSES = [UniSRecLike, LEARNLike, HLLMLike]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny BERT with its tokenizer."
    folder = tmp_path_factory.mktemp("bert") / "tiny"
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["<pad>", "<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=40)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=40).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def split():
    "Items 0 to 24, of which 20 to 24 are nowhere in training."
    rng = np.random.default_rng(0)
    histories = {u: [*rng.integers(0, 20, rng.integers(2, 9)).tolist(), int(rng.integers(0, 25)), 20 + u % 5] for u in range(30)}
    return leave_last_out(small_dataset(histories))


@pytest.fixture(scope="module")
def items(split, folder):
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 9))) if i != 7 else "" for i in range(split.n_items)]
    model, tokenizer = BertModel.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)
    vectors = torch.zeros(len(texts), 16)
    for i, text in enumerate(texts):
        if text: vectors[i] = normalize(model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0), dim=0).detach()
    return ItemTexts(texts, vectors, torch.tensor([bool(t) for t in texts]), item_id=split.item_id)


def make(cls, split, items, folder, seed=0, **change):
    own = dict(encoder=folder, rank=2, chunk_tokens=40) if cls is HLLMLike else {}
    return build(cls, split, seed, items=items, **{**dict(width=8, hidden=None, dropout=0., text_dropout=0., max_length=10), **own, **change})


def stir(model, seed=1):
    "Weights far from the start."
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad and p.dim(): torch.nn.init.normal_(p, std=.4)
    return model.eval()


# --- the loss ---------------------------------------------------------------------------------------------------------------


def test_later_mean_against_loops():
    torch.manual_seed(0)
    vectors, offsets = torch.randn(11, 3), torch.tensor([0, 4, 4, 5, 11])
    for ahead in (None, 1, 2, 50):
        slow = []
        for a, b in zip(offsets[:-1], offsets[1:]): slow += [vectors[n:min(b, n + (ahead or 99))].double().mean(0) for n in range(a, b)]
        assert torch.allclose(later_mean(vectors, offsets, ahead).double(), torch.stack(slow), atol=1e-6)
    assert torch.equal(later_mean(vectors, offsets, 1), later_mean(vectors, offsets, 1)) and torch.allclose(later_mean(vectors, offsets, 1), vectors, atol=1e-6)


@pytest.mark.parametrize("ahead, prior", [(None, 0.), (2, 0.), (2, .6)])
def test_learn_loss_pair_by_pair(split, items, folder, ahead, prior):
    model = stir(make(LEARNLike, split, items, folder, ahead=ahead, prior=prior))
    popular = prior * torch.log(1 + torch.from_numpy(training_counts(split)).double())[model.trained]
    batch = Windows(split, max_length=10)[np.arange(12)]
    users = normalize(model.tower(model.head.rows(batch.history), batch)[0].double(), dim=1)
    vectors = normalize(model.head.vectors().double(), dim=1)[model.trained]
    row = {int(i): k for k, i in enumerate(model.trained.nonzero().flatten())}
    temperature, losses = max(.01, model.log_temperature.exp().item()), []
    for a, b in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist()):
        for n in range(a, b):
            p = (users[n] @ vectors.T / temperature + popular).log_softmax(0)
            losses.append(torch.stack([-p[row[int(batch.following[m])]] for m in range(n, min(b, n + (ahead or 99)))]).mean())
    slow = torch.stack(losses).mean()
    assert abs(model.loss(batch)[0] - slow) < 1e-4 * max(1, slow)
    fast = torch.autograd.grad(model.loss(batch)[0], model.head.linear.weight)[0]
    assert torch.allclose(fast, torch.autograd.grad(slow, model.head.linear.weight)[0].float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_prior_is_part_of_every_score(cls, split, items, folder):
    plain, told = (stir(make(cls, split, items, folder, prior=prior)) for prior in (0., .6))
    batch = Targets(split, "test", max_length=10)[np.arange(8)]
    counts = torch.from_numpy(training_counts(split)).float()
    popular = .6 * torch.log(1 + counts).where(counts > 0, torch.log(1 + counts[counts > 0]).mean())
    with torch.no_grad(): torch.testing.assert_close(told.scores(batch), plain.scores(batch) + plain.log_temperature.exp().clamp(min=.01) * popular)
    nobody = dataclasses.replace(batch, history=batch.history[:0], offsets=torch.zeros_like(batch.offsets), length=torch.zeros_like(batch.length))
    with torch.no_grad(): assert torch.equal(told.scores(nobody)[0].argsort(stable=True), popular.argsort(stable=True)) and not plain.scores(nobody).any()
    after, windows = stir(make(cls, split, items, folder, prior=.6, prior_in_loss=False)), Windows(split, max_length=10)[np.arange(8)]
    with torch.no_grad():
        torch.testing.assert_close(after.scores(batch), told.scores(batch))
        assert after.loss(windows)[0] == plain.loss(windows)[0] != told.loss(windows)[0]
    twin = make(cls, split, items, folder, seed=3, prior=2.)
    twin.load_state_dict(told.state_dict())
    with torch.no_grad(): torch.testing.assert_close(twin.eval().scores(batch), told.scores(batch))
    with pytest.raises(ValueError, match="prior=-1.0: at least 0"): make(cls, split, items, folder, prior=-1.)


def test_looking_one_ahead_is_unisrec(split, items, folder):
    learn, unisrec = make(LEARNLike, split, items, folder, ahead=1), make(UniSRecLike, split, items, folder)
    batch = Windows(split, max_length=10)[np.arange(20)]
    assert learn.loss(batch)[0].item() == pytest.approx(unisrec.loss(batch)[0].item(), abs=1e-5)


def test_hllm_competes_among_what_training_has_read(split, items, folder):
    model, windows = stir(make(HLLMLike, split, items, folder, negatives=2)), Windows(split, max_length=10)
    first, batch = windows[np.arange(3)], windows[np.arange(3, 6)]
    read = lambda b: {*b.history.tolist(), *b.following.tolist()}
    assert int(model.loss(batch)[1]["candidates"]) == len(read(batch)) and not model.met.any()      # evaluation remembers nothing
    model.train().loss(first)
    assert set(model.met.nonzero().flatten().tolist()) == read(first)
    with torch.no_grad(): model.encoder.model.base_model.model.encoder.layer[0].attention.self.query.lora_B["default"].weight.add_(.3)
    model.eval()
    for draw in range(3):                                                                           # remembered or drawn
        torch.manual_seed(draw)
        order = sorted(read(first) | read(batch))
        drawn = {order[k] for k in torch.randperm(len(order))[:2].tolist()}
        torch.manual_seed(draw)
        value, parts = model.loss(batch)
        fresh, rows = read(batch) | drawn, torch.tensor(order)
        raw = torch.where(torch.tensor([i in fresh for i in order])[:, None], model.read(rows), model.memory[rows])
        users = normalize(model.tower(model.vectors()[batch.history], batch)[0].double(), dim=1)
        logits = users @ normalize(model.head.rows(rows, raw), dim=1).double().T / max(.01, model.log_temperature.exp().item())
        slow = torch.nn.functional.cross_entropy(logits, torch.tensor([order.index(t) for t in batch.following.tolist()]))
        assert int(parts["candidates"]) == len(order) and abs(value - slow) < 1e-4 * max(1, slow)
        assert not torch.allclose(model.read(rows), model.memory[rows], atol=1e-3)


@pytest.mark.parametrize("prior", [0., .6])
def test_hllm_has_unisrecs_loss_once_all_is_read_by_an_encoder_that_stands_still(split, items, folder, prior):
    hllm, unisrec, windows = make(HLLMLike, split, items, folder, negatives=1, prior=prior), make(UniSRecLike, split, items, folder, prior=prior), Windows(split, max_length=10)
    unisrec.load_state_dict({n: v for n, v in hllm.state_dict().items() if not n.startswith(("encoder.", "memory", "met"))})
    batch = windows[np.arange(20)]
    hllm.loss(windows[np.arange(len(windows))])
    assert torch.equal(hllm.met, unisrec.trained) and hllm.loss(batch)[0].item() == pytest.approx(unisrec.loss(batch)[0].item(), abs=1e-4)
    hllm.loss(batch)[0].backward()
    unisrec.loss(batch)[0].backward()
    for name, p in unisrec.named_parameters():
        if name != "head.no_text": assert torch.allclose(dict(hllm.named_parameters())[name].grad, p.grad, atol=1e-4), name
    twin = make(HLLMLike, split, items, folder, seed=3, negatives=1, prior=prior)
    twin.load_state_dict(hllm.state_dict())
    assert torch.equal(twin.memory, hllm.memory) and twin.loss(batch)[0].item() == pytest.approx(hllm.loss(batch)[0].item(), abs=1e-6)


def test_what_is_drawn_gives_the_encoder_the_gradient_of_all_on_average(split, items, folder, monkeypatch):
    "One negative a step, each in its turn: the mean gradient is that of reading every candidate."
    windows = Windows(split, max_length=10)
    model = stir(make(HLLMLike, split, items, folder, negatives=99)).train()
    for p in model.encoder.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.05)
    with torch.no_grad(): model.loss(windows[np.arange(len(windows))])
    learned, batch = [p for n, p in model.named_parameters() if "lora_" in n], windows[np.arange(3)]
    count = int(model.met.sum())
    users, every = normalize(model.tower(model.item_vectors(torch.arange(split.n_items))[batch.history], batch)[0], dim=1), normalize(model.item_vectors(torch.arange(split.n_items)), dim=1)
    logits = (users @ every.T / model.log_temperature.exp().clamp(min=.01)).masked_fill(~model.met, -torch.inf)
    full = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, batch.following), learned)
    scale = max(g.abs().max() for g in full)
    for a, b in zip(torch.autograd.grad(model.loss(batch)[0], learned), full): assert torch.allclose(a, b, atol=1e-3 * scale)
    model.negatives, total = 1, [torch.zeros_like(p) for p in learned]
    for k in range(count):
        monkeypatch.setattr(torch, "randperm", lambda n, k=k: torch.arange(n).roll(-k))
        one = torch.autograd.grad(model.loss(batch)[0], learned)
        assert k or not all(torch.allclose(a, b, atol=1e-2 * scale) for a, b in zip(one, full))
        for t, g in zip(total, one): t += g / count
    for a, b in zip(total, full): assert torch.allclose(a, b, atol=1e-3 * scale)


# --- what a vector may depend on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("ids", [False, True])
def test_no_vector_knows_what_comes_later_or_who_else_is_there(cls, ids, split, items, folder):
    model = stir(make(cls, split, items, folder, ids=ids))
    targets = Targets(split, "test", max_length=10)
    together = targets[np.arange(8)]
    vectors = model.encode(together)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(8), atol=1e-5)
    assert torch.allclose(vectors, torch.cat([model.encode(targets[np.array([i])]) for i in range(8)]), atol=1e-5)
    changed = dataclasses.replace(together, target=(together.target + 1) % split.n_items)
    assert torch.equal(vectors, model.encode(changed))
    window = Windows(split, max_length=10)[np.arange(6)]
    hidden = model.tower(model.catalogue()[window.history], window)[0]
    last = window.offsets[1:] - 1
    other = dataclasses.replace(window, history=window.history.clone())
    other.history[last] = (other.history[last] + 1) % 20
    moved = (model.tower(model.catalogue()[other.history], other)[0] - hidden).abs().amax(1) > 1e-6
    assert moved.nonzero().flatten().tolist() == last.tolist()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tower_may_correct_the_aging_mean(cls, split, items, folder):
    plain, residual = (make(cls, split, items, folder, residual=on).eval() for on in (False, True))
    assert {n for n, _ in residual.named_parameters()} - {n for n, _ in plain.named_parameters()} == {"tower.aging.keep"}
    assert all(p.equal(dict(residual.named_parameters())[n]) for n, p in plain.named_parameters())
    batch, units = Windows(split, max_length=10)[np.arange(8)], Targets(split, "test", 10)
    vectors = torch.randn(len(batch.history), 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a, b = (model.tower(vectors, batch)[0] for model in (plain, residual))
    keep, unit = residual.tower.aging.keep.sigmoid().item(), normalize(vectors, dim=1)
    for start, end in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist()):
        for n in range(start, end):
            mean = sum(keep ** (n - m) * unit[m] for m in range(start, n + 1))
            torch.testing.assert_close(b[n], a[n] / 8 ** .5 + mean / mean.norm(), rtol=1e-4, atol=1e-5)
    for some in ([3], range(8)): torch.testing.assert_close(residual.encode(units[np.array(some)]).norm(dim=1), torch.ones(len(some)))
    value = residual.loss(batch)[0]
    assert value.isfinite() and torch.autograd.grad(value, residual.tower.aging.keep)[0].abs() > 0


@pytest.mark.parametrize("cls", CLASSES)
def test_other_targets_leave_the_user_where_it_is(cls, split, items, folder):
    "Items after the cut are exchanged in the data: models built from either split answer alike."
    flat = split.items.copy()
    for u in range(split.n_users): flat[split.train_end[u]:split.offsets[u + 1]] = 20 + (flat[split.train_end[u]:split.offsets[u + 1]] + 1) % 5
    other = dataclasses.replace(split, items=flat)
    users = [make(cls, s, items, folder).eval().encode(Targets(s, "validation", max_length=10)[np.arange(10)]) for s in (split, other)]
    assert torch.equal(*users)


@pytest.mark.parametrize("cls", CLASSES)
def test_cold_items_are_scored_by_their_text_alone(cls, split, items, folder):
    cold = torch.from_numpy(training_counts(split) == 0)
    assert int(cold.sum()) == 5
    model = make(cls, split, items, folder)
    data = SequenceData(split, batch_size=16, max_length=10)
    module = RetrievalModule(model, data, lr=1e-2)
    fit(module, data, max_epochs=1, progress=False)
    model.eval()
    swapped = items.texts.copy()
    a, b = cold.nonzero().flatten()[:2].tolist()
    swapped[a], swapped[b] = swapped[b], swapped[a]
    vectors = items.vectors.clone()
    vectors[[a, b]] = vectors[[b, a]]
    twin = make(cls, split, ItemTexts(swapped, vectors, items.known), folder).eval()
    twin.load_state_dict(model.state_dict())
    batch = Targets(split, "validation", max_length=10)[np.arange(10)]
    keep = torch.tensor([not ({a, b} & set(batch.history[s:e].tolist())) for s, e in zip(batch.offsets[:-1], batch.offsets[1:])])
    one, two = model.scores(batch)[keep], twin.scores(batch)[keep]
    assert one.isfinite().all() and not torch.allclose(one[:, a], one[:, b])
    two[:, [a, b]] = two[:, [b, a]]
    assert torch.allclose(one, two, atol=1e-4)                       # the score follows the text


@pytest.mark.parametrize("cls", CLASSES)
def test_words_reach_every_comparator(cls, split, items, folder):
    plain, model = make(cls, split, items, folder), make(cls, split, items, folder, words=6)
    assert plain.head.linear.in_features == 16 and model.head.linear.in_features == 22 and model.head.width == plain.head.width == 8
    loss, _ = model.loss(Windows(split, max_length=10)[np.arange(6)])
    loss.backward()
    assert loss.isfinite() and model.head.linear.weight.grad[:, 16:].abs().sum() > 0
    other = make(cls, split, ItemTexts([" ".join(reversed(text.split())) for text in items.texts], items.vectors, items.known), folder, words=6)
    assert torch.equal(other.head.words, model.head.words)           # their order is the encoder's affair


def test_items_outside_training_do_not_compete(split, items, folder):
    model = make(UniSRecLike, split, items, folder, ids=True)
    model.loss(Windows(split, max_length=10)[np.arange(20)])[0].backward()
    cold = torch.from_numpy(training_counts(split) == 0)
    assert model.head.id.weight.grad[cold].eq(0).all() and model.head.id.weight.grad[~cold].abs().sum(1).min() > 0
    assert torch.equal(model.trained, ~cold)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_new_user_ties_everything(cls, split, items, folder):
    model = make(cls, split, items, folder).eval()
    empty = Batch(torch.arange(2), torch.zeros(0, dtype=torch.long), torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    assert model.encode(empty).eq(0).all() and model.scores(empty).shape == (2, split.n_items)
    everyone = new_users(split, 1., 0)
    assert model.encode(Targets(everyone, "test", max_length=10)[np.arange(3)]).eq(0).all()
    some = Targets(split, "test", max_length=10)[np.arange(2)]
    mixed = Batch(torch.arange(3), some.history, torch.cat([some.offsets, some.offsets[-1:]]), torch.cat([some.length, torch.zeros(1, dtype=torch.long)]))
    assert torch.allclose(model.encode(mixed)[:2], model.encode(some), atol=1e-5) and model.encode(mixed)[2].eq(0).all()


def test_ids_change_nothing_but_the_items(split, items, folder):
    for cls in CLASSES:
        names = [{n for n, p in make(cls, split, items, folder, ids=ids).named_parameters() if p.requires_grad} for ids in (False, True)]
        assert names[1] - names[0] == {"head.id.weight"}


# --- the encoder that learns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [UniSRecLike, LEARNLike])
@pytest.mark.parametrize("prior", [0., .6])
def test_ids_apart_are_a_second_model_of_ids_alone(cls, prior, split, items, folder):
    """The text's half is the model without ids, to its loss; the other half reads no text; scores are means of both cosines, beside the prior and the mean temperature."""
    own = dict(residual=True, prior=prior)
    model, plain = stir(make(cls, split, items, folder, ids="apart", **own)), make(cls, split, items, folder, **own).eval()
    with torch.no_grad():
        for name in ("log_temperature", "own.log_temperature"): model.get_parameter(name).copy_(torch.tensor({"log_temperature": -2., "own.log_temperature": -1.5}[name]))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("own.")})
    asked, window = Targets(split, "test", max_length=10)[np.arange(8)], Windows(split, max_length=10)[np.arange(6)]
    ids, e = model.own.tower.newest(model.own.items.vectors()[asked.history], asked), normalize(model.own.items.id.weight, dim=1)
    texts = model.tower.newest(model.head.rows(asked.history), asked) @ normalize(model.head.vectors(), dim=1).T
    temperature = (math.exp(-2.) + math.exp(-1.5)) / 2
    torch.testing.assert_close(model.scores(asked), (texts + ids @ e.T) / 2 + (0. if model.prior is None else temperature * model.prior))
    if model.prior is None: torch.testing.assert_close(plain.scores(asked), texts)
    assert model.own.tower.aging is None and model.head.id is None
    value, parts = model.loss(window)
    alone = plain.loss(window)[0]
    (value - alone).backward()                                            # what is left is the ids' own
    assert parts["contrastive"] == value
    for name, p in plain.named_parameters(): torch.testing.assert_close(model.get_parameter(name).grad, -p.grad)
    assert model.own.items.id.weight.grad.abs().sum() > 0
    logits = normalize(model.own.tower(model.own.items.vectors()[window.history], window)[0], dim=1) @ e.T / math.exp(-1.5)
    logits = (logits if model.prior is None else logits + model.prior)[:, model.trained]
    if cls is UniSRecLike: torch.testing.assert_close(value - alone, torch.nn.functional.cross_entropy(logits, (model.trained.cumsum(0) - 1)[window.following]))
    groups = model.parameter_groups(1e-4, 1e-3, .1)
    assert next(g for g in groups if any(p is model.own.items.id.weight for p in g["params"]))["weight_decay"] == 0


def test_only_one_kind_of_ids_for_hllm(split, items, folder):
    with pytest.raises(ValueError, match="ids='apart': True or False"): make(HLLMLike, split, items, folder, ids="apart")


def test_hllm_starts_as_unisrec(split, items, folder):
    hllm, unisrec = make(HLLMLike, split, items, folder).eval(), make(UniSRecLike, split, items, folder).eval()
    unisrec.load_state_dict({n: v for n, v in hllm.state_dict().items() if not n.startswith(("encoder.", "memory", "met"))})
    batch = Targets(split, "test", max_length=10)[np.arange(9)]
    assert torch.allclose(hllm.scores(batch), unisrec.scores(batch), atol=1e-4)


def test_encoder_against_one_text_at_a_time(split, items, folder):
    model = stir(make(HLLMLike, split, items, folder))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    index = torch.tensor([3, 24, 0, 11])
    for i, fast in zip(index.tolist(), model.encoder(index)):
        hidden = model.encoder.model(input_ids=torch.tensor([tokenizer(items.texts[i])["input_ids"]])).last_hidden_state[0]
        assert torch.allclose(fast, normalize(hidden.double().mean(0), dim=0).float(), atol=1e-5)
    assert torch.equal(model.item_vectors(torch.tensor([7]))[0], model.head.rows(torch.tensor(7)))       # no text: not read


def test_what_learns_in_hllm(split, items, folder):
    for layers, blocks in ((None, {"0", "1"}), (1, {"1"}), ([0], {"0"})):
        model = make(HLLMLike, split, items, folder, layers=layers)
        names = [n for n, p in model.encoder.named_parameters() if p.requires_grad]
        assert all("lora_" in n for n in names) and {n.split("layer.")[1].split(".")[0] for n in names} == blocks
        assert {n.split("layer.")[1].split(".lora")[0].split(".", 1)[1] for n in names} == {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"}
    model = stir(make(HLLMLike, split, items, folder))
    model.train()
    model.loss(Windows(split, max_length=10)[np.arange(6)])[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if p.requires_grad and n != "head.no_text")
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_catalogue_is_kept_until_a_weight_changes(split, items, folder, monkeypatch):
    model, reads = make(HLLMLike, split, items, folder).eval(), []
    real = TextEncoder.forward
    monkeypatch.setattr(TextEncoder, "forward", lambda self, index: (reads.append(len(index)), real(self, index))[1])
    with torch.inference_mode(): first = model.catalogue()
    model.scores(Targets(split, "test", max_length=10)[np.arange(4)])
    assert reads == [24]                                             # 25 items, one without a text
    state = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in model.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    model.loss(Windows(split, max_length=10)[np.arange(6)])[0].backward()
    optimiser.step()
    model.eval()
    second = model.catalogue()
    assert len(reads) == 3 and not torch.allclose(first, second)
    model.load_state_dict(state)
    assert torch.allclose(model.catalogue(), first, atol=1e-6) and len(reads) == 4


def test_state_without_the_backbone_and_of_another_one(split, items, folder, tmp_path):
    model = stir(make(HLLMLike, split, items, folder))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)} == trained | {"head.mean", "head.turn", "memory", "met"}
    twin = make(HLLMLike, split, items, folder, seed=5).eval()
    twin.load_state_dict(model.state_dict())
    batch = Targets(split, "test", max_length=10)[np.arange(5)]
    assert torch.equal(twin.scores(batch), model.scores(batch))
    with pytest.raises(RuntimeError, match="lora_A"): twin.load_state_dict({n: v for n, v in model.state_dict().items() if "lora_A" not in n})
    torch.manual_seed(9)
    BertModel(BertModel.from_pretrained(folder).config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another encoder"): make(HLLMLike, split, items, tmp_path).load_state_dict(model.state_dict())


def test_a_decoder_as_text_encoder(split, folder, tmp_path):
    torch.manual_seed(0)
    Qwen3Model(Qwen3Config(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=40)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    items = ItemTexts([WORDS[i % len(WORDS)] for i in range(split.n_items)], torch.randn(split.n_items, 16), torch.ones(split.n_items, dtype=torch.bool))
    model = make(HLLMLike, split, items, tmp_path)
    assert model.encoder.causal and sum("lora_A" in n for n, _ in model.named_parameters()) == 8
    model.loss(Windows(split, max_length=10)[np.arange(6)])[0].backward()
    assert model.eval().catalogue().isfinite().all()


# --- in the loop, and what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_it_learns_in_the_ordinary_loop(cls, split, items, folder):
    model = make(cls, split, items, folder, ids=True)
    batch = Windows(split, max_length=10)[np.arange(20)]
    begin = model.loss(batch)[0].item()
    data = SequenceData(split, batch_size=16, max_length=10)
    module = RetrievalModule(model, data, lr=1e-2)
    fit(module, data, max_epochs=4, patience=4, progress=False)
    assert model.train().loss(batch)[0] < begin and 0 <= validate(module, data)["validation/ndcg@10"] <= 1


@pytest.mark.parametrize("cls", CLASSES)
def test_groups_hold_everything_once(cls, split, items, folder):
    model = make(cls, split, items, folder, ids=True)
    groups = model.parameter_groups(1e-4, 1e-3, .1)
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    of = {id(p): g for g in groups for p in g["params"]}
    assert of[id(model.head.id.weight)]["weight_decay"] == 0 and of[id(model.log_temperature)]["weight_decay"] == 0 and of[id(model.head.linear.weight)]["weight_decay"] == .1
    assert {g["lr"] for g in groups} == ({1e-4, 1e-3} if cls is HLLMLike else {1e-3})


@pytest.mark.parametrize("cls", CLASSES)
def test_half_precision(cls, split, items, folder):
    model = make(cls, split, items, folder)
    with torch.autocast("cpu", torch.bfloat16): value, _ = model.loss(Windows(split, max_length=10)[np.arange(6)])
    value.backward()
    assert value.isfinite() and model.head.linear.weight.grad.isfinite().all()
    assert abs(value - model.loss(Windows(split, max_length=10)[np.arange(6)])[0]) < .3


def test_one_item_for_everybody(folder):
    split = leave_last_out(small_dataset({u: [3, 3, 3, 3] for u in range(4)}))
    items = ItemTexts(["glove box"], torch.randn(1, 16), torch.tensor([True]))
    for cls in CLASSES:
        model = make(cls, split, items, folder)
        value, _ = model.loss(Windows(split, max_length=10)[np.arange(4)])
        value.backward()
        assert abs(value) < 1e-6 and model.eval().scores(Targets(split, max_length=10)[np.arange(4)]).shape == (4, 1)


def test_what_is_refused(split, items, folder):
    for cls in CLASSES:
        with pytest.raises(DataError, match="another catalogue"): make(cls, split, ItemTexts(items.texts[1:], items.vectors[1:], items.known[1:]), folder)
        long = Batch(torch.arange(1), torch.zeros(11, dtype=torch.long), torch.tensor([0, 11]), torch.tensor([11]), following=torch.zeros(11, dtype=torch.long))
        with pytest.raises(ValueError, match="longer than max_length=10"): make(cls, split, items, folder).encode(long)
        with pytest.raises(ValueError, match="temperature"): make(cls, split, items, folder, temperature=0.)
    with pytest.raises(ValueError, match="ahead=0"): make(LEARNLike, split, items, folder, ahead=0)
    with pytest.raises(ValueError, match="layers=3: the backbone has blocks 0 to 1"): make(HLLMLike, split, items, folder, layers=3)
    with pytest.raises(DataError, match="vectors of width 16"): make(HLLMLike, split, ItemTexts(items.texts, torch.randn(len(items), 5), items.known), folder)
    for wrong in (dict(blocks=0), dict(heads=0), dict(max_length=0), dict(dropout=1.)):
        with pytest.raises(ValueError): Tower(8, **wrong)
