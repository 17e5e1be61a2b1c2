"""Inputs of both views against loops over users, items and tokens."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from l2rec.dual_view.backbone import TokenTable, freeze
from l2rec.dual_view.views import (BehaviourProjector, behaviour_input, embedding_size, filled, item_prefixes, kept_tokens, length_chunks, newest_whole, owner_of, pool_view, room_for, semantic_input, sums, text_prefixes)


def flat(histories):
    offsets = torch.tensor([0, *np.cumsum([len(h) for h in histories])], dtype=torch.long)
    return torch.tensor([i for h in histories for i in h], dtype=torch.long), offsets


def random_table(seed, n_items=12, longest=6, before=(1,), after=(2, 3)):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(10, 99, rng.integers(0, longest + 1)).tolist() for _ in range(n_items)]
    return rows, TokenTable(rows, before, after, fill=9)


def random_histories(seed, n=15, longest=8, n_items=12):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n_items, rng.integers(0, longest + 1)).tolist() for _ in range(n)]


def slow_kept(history, rows, room):
    """Tokens of each item that are read: newest whole items, without a hole."""
    kept, left, full = [0] * len(history), room, False
    for i in reversed(range(len(history))):
        n = len(rows[history[i]])
        if full:
            continue
        if n <= left:
            kept[i], left = n, left - n
        else:
            full = True
            if left == room:
                kept[i] = room
    return kept


cases = pytest.mark.parametrize("seed, room", [(s, r) for s in range(4) for r in (1, 3, 7, 12, 1000)])


@cases
def test_kept_tokens_are_the_newest_whole_items(seed, room):
    rows, table = random_table(seed)
    histories = random_histories(seed)
    expected = [n for h in histories for n in slow_kept(h, rows, room)]
    assert kept_tokens(*flat(histories), table, room + 3).tolist() == expected


@cases
@pytest.mark.parametrize("order", ["oldest", "newest"])
def test_semantic_input_is_its_definition(seed, room, order):
    rows, table = random_table(seed)
    histories = random_histories(seed + 10)
    ids, mask = semantic_input(*flat(histories), table, room + 3, order)
    expected = []
    for h in histories:
        pieces = [rows[i][:n] for i, n in zip(h, slow_kept(h, rows, room))]
        expected.append([1, *(t for piece in (pieces if order == "oldest" else pieces[::-1]) for t in piece), 2, 3])
    assert ids.shape == mask.shape == (len(histories), max(map(len, expected)))
    for row, real, e in zip(ids, mask, expected):
        assert row[real].tolist() == e and (row[~real] == 9).all() and real.tolist() == [True] * len(e) + [False] * (ids.shape[1] - len(e))


def test_without_special_tokens():
    rows, table = random_table(3, before=(), after=())
    ids, mask = semantic_input(*flat([[0, 1], [], [2]]), table, 50)
    assert ids[0][mask[0]].tolist() == rows[0] + rows[1] and not mask[1].any() and (ids[1] == 9).all()
    ids, mask = semantic_input(*flat([[], []]), table, 50)
    assert ids.shape == (2, 1) and not mask.any()


def test_items_without_text_take_no_room():
    table = TokenTable([[5, 6], [], [7]], [1], [2])
    ids, mask = semantic_input(*flat([[0, 1, 2, 1], [1, 1]]), table, 5)
    assert ids[0].tolist() == [1, 5, 6, 7, 2] and ids[1][mask[1]].tolist() == [1, 2]


def test_one_item_in_the_catalogue():
    table = TokenTable([[5, 6, 7]], [1], [2])
    ids, mask = semantic_input(*flat([[0, 0, 0]]), table, 8)
    assert ids.tolist() == [[1, 5, 6, 7, 5, 6, 7, 2]] and mask.all()


def test_budgets_and_orders_that_make_no_sense():
    _, table = random_table(0)
    with pytest.raises(ValueError, match="max_tokens=3: 3 special tokens leave no room for an item"):
        semantic_input(*flat([[1]]), table, 3)
    with pytest.raises(ValueError, match="order='random': one of oldest, newest"):
        semantic_input(*flat([[1]]), table, 30, "random")
    with pytest.raises(ValueError, match="order='random'"):
        behaviour_input(torch.tensor([0, 1]), 3, "random")
    with pytest.raises(ValueError, match="max_items=0: at least 1"):
        behaviour_input(torch.tensor([0, 1]), 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1, 64, 500, 10**9])
def test_chunks_hold_every_row_once_and_little(seed, budget):
    length = torch.from_numpy(np.random.default_rng(seed).integers(1, 90, 60))
    chunks = length_chunks(length, budget)
    assert sorted(torch.cat(chunks).tolist()) == list(range(60))
    assert all(len(rows) * int(length[rows].max()) <= budget or len(rows) == 1 for rows in chunks)
    assert all(int(length[a].min()) >= int(length[b].max()) for a, b in zip(chunks, chunks[1:]))


def test_owners_and_sums_of_a_batch():
    histories = random_histories(5)
    history, offsets = flat(histories)
    assert owner_of(offsets, len(history)).tolist() == [n for n, h in enumerate(histories) for _ in h]
    assert sums(history, offsets).tolist() == [sum(h) for h in histories]
    assert sums(history > 3, offsets).tolist() == [sum(i > 3 for i in h) for h in histories]


# --- behaviour view ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3, 100])
@pytest.mark.parametrize("order", ["oldest", "newest"])
def test_behaviour_input_is_its_definition(most, order):
    histories = random_histories(6)
    history, offsets = flat(histories)
    index, real = behaviour_input(offsets, most, order)
    for h, row, mask in zip(histories, index, real):
        newest = h[-most:] if order == "oldest" else h[-most:][::-1]
        assert history[row[mask]].tolist() == newest and mask.tolist() == [True] * len(newest) + [False] * (index.shape[1] - len(newest))
    assert index.shape[1] == max(1, min(most, max(map(len, histories)))) and (index[~real] == 0).all()


@pytest.mark.parametrize("widths", [(16, 16), (16, 24)])
def test_projector_is_its_equation(widths):
    torch.manual_seed(0)
    projector = BehaviourProjector(*widths, hidden=10, size=.3).double()
    x = torch.randn(5, widths[0], dtype=torch.float64)
    normed = lambda v, w=1., b=0.: (v - v.mean()) / math.sqrt(((v - v.mean()) ** 2).mean() + 1e-5) * w + b
    p = {name: value.detach() for name, value in projector.named_parameters()}
    for row, got in zip(x, projector(x)):
        y = normed(row, p["read.weight"], p["read.bias"])
        inner = p["network.0.weight"] @ y + p["network.0.bias"]
        inner = torch.stack([v * .5 * (1 + math.erf(v.item() / math.sqrt(2))) for v in inner])
        z = p["network.2.weight"] @ inner + p["network.2.bias"] + (y if widths[0] == widths[1] else p["skip.weight"] @ y)
        torch.testing.assert_close(got, .3 * normed(z))
    assert projector(x).square().mean().sqrt().item() == pytest.approx(.3, rel=1e-4)


def test_embedding_size():
    model = freeze(BertModel(BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)))
    values = model.embeddings.word_embeddings.weight.double()
    assert embedding_size(model) == pytest.approx(math.sqrt((values**2).mean().item()), rel=1e-5)


# --- every prefix of a history ----------------------------------------------------------------------------------------------


def slow_slots(histories):
    """(slots, offsets, real) of lists: an empty history has one slot that is not real."""
    rows = [h or [None] for h in histories]
    return [i or 0 for row in rows for i in row], [0, *np.cumsum([len(row) for row in rows]).tolist()], [i is not None for row in rows for i in row]


@pytest.mark.parametrize("histories", [random_histories(0), [[]], [[], []], [[3]], [[], [3, 0], [], [], [0], []], [[3, 0], [1]], []], ids=str)
def test_slots(histories):
    slots, offsets, real = slow_slots(histories)
    found = filled(*flat(histories))
    assert [x.tolist() for x in found] == [slots, offsets, real] and found[2].dtype == torch.bool


def slow_text(histories, rows, before, fill, room):
    """Of each history: (tokens, slot that each token's prefix ends with), and of the batch the slots that end a prefix."""
    rows = [row or [fill] for row in rows]                                        # an item without text is one filling token
    out, ends, slot = [], [], 0
    for h in histories:
        kept, tokens, owner = slow_kept(h, rows, room), [], []
        for place, (i, n) in enumerate(zip(h, kept)):
            tokens += rows[i][:n]
            owner += [slot + place] * n
        ends += sorted(set(owner)) or [slot]                                      # an empty history has one prefix
        first = owner[0] if owner else slot
        tokens, owner = [*before, *tokens], [first] * len(before) + owner         # special tokens belong to the first item
        out.append((tokens, owner) if tokens else ([fill], [slot]))
        slot += max(1, len(h))
    return out, ends


@cases
@pytest.mark.parametrize("before", [(1,), (1, 4), ()])
def test_text_prefixes_are_their_definition(seed, room, before):
    rows, _ = random_table(seed)
    rows[5] = []                                                                  # an item without text
    table = TokenTable(rows, before, (2, 3), fill=9)
    for histories in (random_histories(seed + 10), [[]], [[], []], [random_histories(seed + 20, 1, 9)[0] + [int(np.argmax([len(r) for r in rows]))]]):
        ids, prefixes, ends = text_prefixes(*filled(*flat(histories)), table, room + len(before))
        expected, slots = slow_text(histories, rows, before, 9, room)
        assert ends.tolist() == slots and len(prefixes) == len(slots) and ids.shape == prefixes.number.shape == (len(histories), max(len(tokens) for tokens, _ in expected))
        for b, (tokens, owner) in enumerate(expected):
            n = len(tokens)
            assert prefixes.real[b].tolist() == [True] * n + [False] * (ids.shape[1] - n)
            assert ids[b].tolist() == tokens + [9] * (ids.shape[1] - n) and [slots[p] for p in prefixes.number[b, :n]] == owner


def test_text_prefixes_by_hand():
    table = TokenTable([[5, 6], [], [7], [10, 11, 12, 13, 14]], [1], [2], fill=9)
    ids, prefixes, ends = text_prefixes(*filled(*flat([[0, 1, 2], [], [1], [0, 3], [2, 0, 1]])), table, 4)
    assert ids.tolist() == [[1, 9, 7, 9], [1, 9, 9, 9], [1, 9, 9, 9], [1, 10, 11, 12], [1, 5, 6, 9]]     # no special token after; whole items; a newest item too long is cut
    assert ends.tolist() == [1, 2, 3, 4, 6, 8, 9] and [row[real].tolist() for row, real in zip(prefixes.number, prefixes.real)] == [[0, 0, 1], [2], [3, 3], [4] * 4, [5, 5, 5, 6]]


def test_nothing_after_an_item_changes_its_prefix():
    rows, table = random_table(2)
    for h in random_histories(4, n=20):
        whole, prefixes, ends = text_prefixes(*filled(*flat([h])), table, 1000)
        for n in range(1, len(h) + 1):
            part, alone, some = text_prefixes(*filled(*flat([h[:n]])), table, 1000)
            length = part.shape[1]
            assert part.equal(whole[:, :length]) and alone.number.equal(prefixes.number[:, :length]) and some.equal(ends[:n])


@pytest.mark.parametrize("most", [1, 3, 100])
@pytest.mark.parametrize("histories", [random_histories(6), [[]], [[], []], [[], [3, 0, 1, 1], []]], ids=str)
def test_item_prefixes_are_their_definition(most, histories):
    slots, offsets, _ = filled(*flat(histories))
    index, prefixes, ends = item_prefixes(offsets, most)
    expected, slot = [], 0
    for h in histories:
        n = max(1, len(h))
        expected.append(list(range(slot + max(0, n - most), slot + n)))
        slot += n
    assert ends.tolist() == [s for row in expected for s in row] and len(prefixes) == len(ends) and index.shape == prefixes.number.shape == (len(histories), max(map(len, expected)))
    for row, number, real, e in zip(index, prefixes.number, prefixes.real, expected):
        assert row[real].tolist() == e and ends[number[real]].tolist() == e and real.tolist() == [True] * len(e) + [False] * (index.shape[1] - len(e))


@pytest.mark.parametrize("seed", range(4))
def test_newest_whole_items(seed):
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, 6, rng.integers(0, 7)).tolist() for _ in range(12)]
    n, offsets = flat(histories)
    for room in (1, 2, 5, 9, 100): assert newest_whole(n, offsets, room).tolist() == [k for h in histories for k in slow_kept(range(len(h)), [[0] * m for m in h], room)]
    assert room_for(9, 2) == 7
    with pytest.raises(ValueError, match="max_tokens=2: 2 special tokens leave no room for an item"): room_for(2, 2)


def test_prefixes_need_room():
    table = TokenTable([[5, 6]], [1, 4], [2])
    with pytest.raises(ValueError, match="max_tokens=2: 2 special tokens leave no room for an item"): text_prefixes(*filled(*flat([[0]])), table, 2)
    assert text_prefixes(*filled(*flat([[0]])), table, 3)[0].tolist() == [[1, 4, 5]]                # what stands after a whole history takes no room
    with pytest.raises(ValueError, match="max_items=0: at least 1"): item_prefixes(torch.tensor([0, 1]), 0)


# --- pooling ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, 6).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    exact = hidden.double()
    mean, last = torch.stack([exact[0].mean(0), exact[1, :2].mean(0), exact[2, 0]]), torch.stack([exact[0, 3], exact[1, 1], exact[2, 0]])
    for how, expected in ((dict(pooling="mean"), mean), (dict(pooling="last"), last), (dict(pooling="cls"), exact[:, 0]), ({}, mean), (dict(causal=True), last), (dict(pooling="mean", causal=True), mean)):
        got = pool_view(hidden, mask, **how)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="pooling='middle'"):
        pool_view(hidden, mask, "middle")


@pytest.mark.parametrize("before", [[], [1]])
def test_a_catalogue_without_a_single_token(before):
    ids, prefixes, ends = text_prefixes(*filled(torch.tensor([0, 1]), torch.tensor([0, 2])), TokenTable([[], []], before, [2], fill=9), 10)
    assert ids.tolist() == [[*before, 9, 9]] and ends.tolist() == [0, 1] and len(prefixes) == 2
