"""The kept memory against full forward passes, its ring of slots against a written-out window, and models and ids that do not belong."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from l2rec.data.dataset import DataError
from l2rec.data.splits import leave_last_fraction
from l2rec.hisam.histories import Histories
from l2rec.hisam.serving import build, extend, load_model, save_model, score
from l2rec.hisam.tokenizer import SemanticIds
from l2rec.hisam.transformer import FeatureTransformer, HiSAM, IdTransformer, ItemSide, SemanticTransformer, last_token_attention
from l2rec.training.contracts import build as made_by
from test_hisam_transformer import ids, modalities
from worlds import random_dataset

SWITCHES = [dict(), dict(layers=1), dict(layers=3), dict(memory="all"), dict(memory="all", anchor="none", positions="flat"), dict(anchor="first"), dict(anchors_see_anchors=False, layers=3),
            dict(item_id=True), dict(user_vector=True), dict(gated=True, layers=3)]
LENGTHS = (7, 0, 3, 1, 10)


@pytest.fixture(scope="module")
def split(): return leave_last_fraction(random_dataset(), .2, .2)


def made(split, cls=HiSAM, **switches):
    torch.manual_seed(0)
    model = made_by(cls, split, 0, items=ItemSide(ids(split), modalities(split)), **{**dict(width=16, heads=2, max_length=10), **switches}).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 or name == "anchor": p.normal_(0, .4)
    return model


def histories(n_items, lengths=LENGTHS, seed=0):
    g, n = torch.Generator().manual_seed(seed), sum(lengths)
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    return Histories(torch.arange(len(lengths)), torch.randint(0, n_items, (n,), generator=g), torch.randint(0, 2, (n,), generator=g).float(),
                     torch.randint(0, 9, (n,), generator=g), offsets, torch.tensor(lengths), torch.arange(0))


@torch.no_grad()
def asked_in_full(model, past, candidates, gap):
    """One full pass for each candidate of each user."""
    out = torch.empty(candidates.shape)
    for b in range(len(past.window)):
        part = slice(past.offsets[b], past.offsets[b + 1])
        for c, item in enumerate(candidates[b]):
            n = int(past.length[b])
            join = lambda x, last: torch.cat([x[part], torch.as_tensor(last, dtype=x.dtype).view(1)])
            out[b, c] = model(Histories(past.window[b:b + 1], join(past.item, item), join(past.feedback, 0), join(past.gap, gap[b]), torch.tensor([0, n + 1]), torch.tensor([n + 1]), torch.tensor([n])))
    return out


def appended(past, item, feedback, gap):
    """The histories with one item more each."""
    pieces = [[torch.cat([x[past.offsets[b]:past.offsets[b + 1]], new[b:b + 1].to(x.dtype)]) for b in range(len(past.window))] for x, new in
              ((past.item, item), (past.feedback, feedback), (past.gap, gap))]
    return Histories(past.window, *(torch.cat(p) for p in pieces), past.offsets + torch.arange(len(past.offsets)), past.length + 1, past.asked)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_scores_from_the_memory_are_those_of_full_passes_with_unequal_histories(split, switches):
    model, past = made(split, **switches), histories(split.n_items)
    candidates, gap = torch.randint(0, split.n_items, (5, 4)), torch.randint(0, 9, (5,))
    candidates[0, 0] = past.item[2]                                                      # a candidate that is in the history
    memory = build(model, past)
    assert torch.allclose(score(model, memory, candidates, gap), asked_in_full(model, past, candidates, gap), atol=1e-5)
    assert torch.allclose(score(model, memory, candidates), asked_in_full(model, past, candidates, torch.zeros(5, dtype=torch.long)), atol=1e-5)
    alone = build(model, histories(split.n_items, (7,)))
    assert torch.allclose(score(model, alone, candidates[:1], gap[:1]), asked_in_full(model, histories(split.n_items, (7,)), candidates[:1], gap), atol=1e-5)


@pytest.mark.parametrize("cls, switches", [(IdTransformer, {}), *((cls, more) for cls in (SemanticTransformer, FeatureTransformer) for more in ({}, dict(item_id=True, user_vector=True)))])
def test_comparators_are_served_too(split, cls, switches):
    model, past = made(split, cls, **switches), histories(split.n_items)
    candidates, gap = torch.randint(0, split.n_items, (5, 3)), torch.zeros(5, dtype=torch.long)
    assert torch.allclose(score(model, build(model, past), candidates), asked_in_full(model, past, candidates, gap), atol=1e-5)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_extending_one_by_one_is_building(split, switches):
    model, past = made(split, **switches), histories(split.n_items, (3, 0, 5))
    memory = build(model, past)
    for k in range(4):
        item, feedback, gap = torch.randint(0, split.n_items, (3,)), torch.tensor([1., 0., 1.]), torch.tensor([k, 2, 0])
        extend(model, memory, item, feedback, gap)
        past = appended(past, item, feedback, gap)
    whole = build(model, past)
    assert torch.equal(memory.seen, whole.seen) and memory.most == whole.most
    for a, b in zip(memory.keys + memory.values, whole.keys + whole.values): assert torch.allclose(a, b, atol=1e-5)


def test_extending_some_users_leaves_the_others(split):
    model, past = made(split), histories(split.n_items)
    memory, before = build(model, past), build(model, past)
    rows, item = torch.tensor([3, 0]), torch.tensor([4, 9])
    extend(model, memory, item, torch.ones(2), rows=rows)
    assert memory.seen.tolist() == [8, 0, 3, 2, 10]
    both = extend(model, before, torch.tensor([9, 0, 0, 4, 0]), torch.ones(5))
    candidates = torch.randint(0, split.n_items, (5, 3))
    assert torch.allclose(score(model, memory, candidates)[rows], score(model, both, candidates)[rows], atol=1e-5)
    fresh = build(model, past)
    assert torch.equal(score(model, fresh, candidates)[[1, 2]], score(model, memory, candidates)[[1, 2]])


@pytest.mark.parametrize("switches", [dict(), dict(memory="all")], ids=str)
def test_a_memory_lies_as_attention_reads_it_and_need_not(split, switches):
    """Keys with the slots along the rows and values upright, so that reading copies nothing; the same numbers in any other order give the same scores."""
    model, past = made(split, **switches), histories(split.n_items)
    memory = extend(model, build(model, past), torch.arange(5), torch.ones(5))
    assert all(k.permute(0, 3, 4, 1, 2).is_contiguous() and v.permute(0, 3, 1, 2, 4).is_contiguous() for k, v in zip(memory.keys, memory.values))
    candidates = torch.randint(0, split.n_items, (5, 3))
    found = score(model, memory, candidates)
    memory.keys, memory.values = ([x.contiguous() for x in part] for part in (memory.keys, memory.values))
    assert torch.allclose(score(model, memory, candidates), found, atol=1e-6)


@torch.no_grad()
def test_a_full_memory_drops_the_oldest_anchor_and_moves_nothing(split):
    """One layer after another, item i reads the anchors of items i-4 … i-1 as they were made."""
    model = made(split, layers=2, max_length=4)
    n, H = 9, 2
    item, feedback, gap = torch.randint(0, split.n_items, (n,)), torch.randint(0, 2, (n,)).float(), torch.randint(0, 5, (n,))
    memory = build(model, histories(split.n_items, (0, 0)))
    for i in range(n): extend(model, memory, item[i].repeat(2), feedback[i].repeat(2), gap[i].repeat(2))
    x = model.item_tokens(item[None]) + model.states(feedback[None], gap[None])
    by, first, second = model.turns(n, "cpu"), model.blocks[0], model.blocks[1]
    q, k, v = first.project(x, by, last=True)
    anchors = []
    for i in range(n):
        seen = slice(max(0, i - 4), i)
        y = last_token_attention(q[:, i:i + 1], k[:, i:i + 1], v[:, i:i + 1], k[:, seen, -1:], v[:, seen, -1:], None)
        anchors.append(first.finish(x[:, i:i + 1, -1:], y))
    mk, mv = second.keys_values(torch.cat(anchors, 1), by[:, -1:])
    for i in range(n - 4, n):
        assert torch.allclose(memory.keys[1][0, i % 4], mk[0, i], atol=1e-5) and torch.allclose(memory.values[1][1, i % 4], mv[0, i], atol=1e-5)
        assert torch.allclose(memory.keys[0][0, i % 4], k[0, i, -1:], atol=1e-5)
    assert memory.seen.tolist() == [n, n] and memory.held.tolist() == [4, 4] and memory.most == 4


def test_a_history_longer_than_the_memory_is_read_from_its_newest_items(split):
    model, long = made(split, max_length=4), histories(split.n_items, (9, 2))
    newest = Histories(long.window, long.item[[5, 6, 7, 8, 9, 10]], long.feedback[[5, 6, 7, 8, 9, 10]], long.gap[[5, 6, 7, 8, 9, 10]], torch.tensor([0, 4, 6]), torch.tensor([4, 2]), long.asked)
    candidates = torch.randint(0, split.n_items, (2, 3))
    assert torch.equal(score(model, build(model, long), candidates), score(model, build(model, newest), candidates))


def test_what_does_not_belong_together(split, tmp_path):
    model, memory = made(split), build(made(split), histories(split.n_items))
    other = made_by(HiSAM, split, 0, items=ItemSide(ids(split, seed=5)), width=16, heads=2, max_length=10)
    for wrong in (other, made(split, layers=1), made(split, max_length=9), made(split, memory="all")):
        with pytest.raises(DataError, match="another model"): score(wrong, memory, torch.zeros(5, 1, dtype=torch.long))
        with pytest.raises(DataError, match="another model"): extend(wrong, memory, torch.zeros(5, dtype=torch.long), torch.ones(5))
    for row in (-1, split.n_items):
        with pytest.raises(DataError, match=f"item row {row} "): score(model, memory, torch.full((5, 1), row))
    save_model(model, split, tmp_path / "model")
    again = load_model(tmp_path / "model", split, ItemSide(ids(split)))
    candidates = torch.randint(0, split.n_items, (5, 3))
    assert torch.equal(score(again, memory, candidates), score(model, memory, candidates)) and sorted(f.name for f in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    with pytest.raises(DataError, match="semantic ids .* of its training"): load_model(tmp_path / "model", split, ItemSide(ids(split, seed=5)))
    with pytest.raises(DataError, match="another catalogue"): load_model(tmp_path / "model", leave_last_fraction(random_dataset(n_items=29)), ItemSide(ids(split)))
    with pytest.raises(DataError, match="no model is saved"): load_model(tmp_path, split, ItemSide(ids(split)))
    with pytest.raises(DataError, match="do not belong"): load_model(tmp_path / "model", split, ItemSide(SemanticIds(ids(split).item_id + 1, ids(split).codes, ids(split).sizes, ids(split).names)))


def test_values_that_do_not_fit_change_nothing(split):
    model, past = made(split), histories(split.n_items)
    memory, whole = build(model, past), build(model, past)
    item, ones = torch.zeros(5, dtype=torch.long), torch.ones(5)
    for bad, message in ((dict(candidates=item[:3, None]), r"candidates of shape \(3, 1\).*5 users"), (dict(candidates=item), "candidates of shape"), (dict(candidates=item[:, None], gap=item[:1]), "gap of shape"),
                         (dict(candidates=item[:, None], gap=item + 99), "gap .*99.*0 .unknown. to 31")):
        with pytest.raises(DataError, match=message): score(model, memory, **bad)
    for bad, message in ((dict(item=item[:4], feedback=ones), r"item of shape \(4,\).*5 users"), (dict(item=item, feedback=ones[:2]), "feedback of shape"), (dict(item=item, feedback=ones + 1), "feedback .*1 = liked"),
                         (dict(item=item, feedback=ones / 2), "feedback .*1 = liked"), (dict(item=item, feedback=ones, gap=item + 99), "gap .*99"), (dict(item=item, feedback=ones, gap=item - 1), "gap .*-1"),
                         (dict(item=item[:2], feedback=ones[:2], rows=torch.tensor([1, 1])), "rows .*each user at most once"), (dict(item=item[:1], feedback=ones[:1], rows=torch.tensor([5])), "row 5: .*0 to 4"),
                         (dict(item=item, feedback=ones, rows=torch.tensor([1])), "item of shape")):
        with pytest.raises(DataError, match=message): extend(model, memory, **bad)
    assert torch.equal(memory.seen, whole.seen) and all(torch.equal(a, b) for a, b in zip(memory.keys + memory.values, whole.keys + whole.values))


def test_damaged_files_of_a_model(split, tmp_path):
    model, side = made(split), ItemSide(ids(split))
    def fresh(): return save_model(model, split, tmp_path / "model")
    def refused(match):
        with pytest.raises(DataError, match=match): load_model(tmp_path / "model", split, side)
    weights = (fresh() / "model.safetensors").read_bytes()
    for damage in (b"", weights[:50], weights[:-40], b"x" * 200):
        (fresh() / "model.safetensors").write_bytes(damage)
        refused("model.safetensors.*damaged")
    (fresh() / "model.safetensors").unlink()
    refused("model.safetensors.*missing")
    save_file({"other": torch.zeros(1)}, fresh() / "model.safetensors")
    refused("no weights of this model")
    about = json.loads((fresh() / "model.json").read_text())
    for text in ("", "{", "[]", "3", json.dumps({**about, "items": 3}), json.dumps({k: v for k, v in about.items() if k != "source"}), json.dumps({**about, "settings": {}}), json.dumps({**about, "tokens": "Other"}), json.dumps({**about, "settings": {**about["settings"], "width": "16"}}), json.dumps({**about, "settings": {**about["settings"], "depth": 3}}),
                 json.dumps({**about, "settings": {**about["settings"], "heads": 3}})):
        (fresh() / "model.json").write_text(text)
        refused("model.json")
    (tmp_path / "model" / "model.json").write_bytes(b"\xff\xfe{")
    refused("model.json")
    fresh(), load_model(tmp_path / "model", split, side)


@pytest.mark.parametrize("cls", [IdTransformer, FeatureTransformer])
def test_other_tokens_are_saved_and_loaded(split, cls, tmp_path):
    model = made(split, cls)
    again = load_model(save_model(model, split, tmp_path), split, ItemSide(ids(split), modalities(split)))
    past, candidates = histories(split.n_items), torch.randint(0, split.n_items, (5, 2))
    assert torch.equal(score(again, build(again, past), candidates), score(model, build(model, past), candidates))


def test_a_user_of_whom_a_model_with_vectors_of_users_knows_nothing(split, tmp_path):
    model, past = made(split, user_vector=True), histories(split.n_items)
    candidates = torch.arange(6).repeat(len(past.window), 1)
    known, nobody = score(model, build(model, past), candidates), score(model, build(model, replace(past, window=torch.full_like(past.window, -1))), candidates)
    of = model.user_vectors
    torch.testing.assert_close(known - nobody, of(past.window[:, None].expand_as(candidates), candidates) - of.gain * of.item.weight[:6, -1])
    with pytest.raises(DataError, match=f"user row {split.n_users}: one of the model's users, 0 to {split.n_users - 1}, or -1"): build(model, replace(past, window=past.window + split.n_users - int(past.window[0])))
    other = build(made(split), replace(past, window=past.window + split.n_users))              # a model without such vectors reads no user
    with pytest.raises(DataError, match="user row"): score(model, other, candidates)
    save_model(model, split, tmp_path)
    torch.testing.assert_close(score(load_model(tmp_path, split, ItemSide(ids(split))), build(model, past), candidates), known)
    with pytest.raises(DataError, match="the model has vectors of other users"): load_model(tmp_path, replace(split, user_id=split.user_id + 1), ItemSide(ids(split)))
