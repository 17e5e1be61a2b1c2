"""The clockwork of ratios, the layouts it compares, equal losses against a plain attention model, and RecTools' side played by a stand-in."""

import json
import stat
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, layer_norm

from l2rec.baselines.sasrec import SASRec
from l2rec.data.batches import SequenceData, Windows
from l2rec.data.dataset import make_dataset, read_dataset
from l2rec.data.splits import leave_last_out, new_users
from l2rec.evaluation.ranking import RankingMetrics
from l2rec.training.efficiency import (RecToolsTraining, compare_losses, first_batch, full_ranking, in_fresh_process, interleave, known_vectors, padded_hidden, ratios,
                                       rectools_weights, slots, time_to_first_batch, training_epoch, training_interactions, wall, whole_test, write_random_dataset)
from l2rec.training.modules import RetrievalModule, set_up

BENCH = Path(__file__).parent.parent / ".venv-bench/bin/python"


def small_split(n_users=40, n_items=30, seed=0):
    """Histories of 2 to 25 items."""
    rng = np.random.default_rng(seed)
    length = rng.integers(2, 26, n_users)
    user = np.repeat(np.arange(n_users), length)
    position = np.concatenate([np.arange(n) for n in length])
    return leave_last_out(make_dataset("small", pl.DataFrame({"user_id": user, "item_id": rng.integers(0, n_items, len(user)), "position": position})))


def strong(model, seed=0):
    """Weights far from their initial values, biases and norms included."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.eval()


def test_contestants_take_turns_and_the_warm_up_does_not_count():
    calls, clock = [], iter(range(100))
    times = interleave({name: lambda name=name: calls.append(name) or next(clock) for name in "abc"}, repeats=3, warm_up=2)
    assert "".join(calls) == "abc" * 5
    assert times.columns == ["a", "b", "c"] and times["a"].to_list() == [6, 9, 12]


def test_the_ratio_is_that_of_each_round_not_of_the_medians():
    times = pl.DataFrame({"a": [1.0, 10.0, 100.0], "b": [2.0, 20.0, 50.0]})
    assert ratios(times, "b", "a").tolist() == [2, 2, 0.5]
    assert np.median(ratios(times, "b", "a")) == 2


@pytest.mark.parametrize("bad", [dict(repeats=0), dict(warm_up=-1)])
def test_bad_numbers_of_rounds(bad):
    with pytest.raises(ValueError, match="at least 1 round"):
        interleave({"a": lambda: 1.0}, **bad)
    with pytest.raises(ValueError, match="nothing to measure"):
        interleave({})


def test_wall_runs_once_each_time_and_returns_seconds():
    calls = []
    run = wall(lambda: calls.append(1))
    assert run() >= 0 and run() >= 0 and len(calls) == 2


def test_known_vectors_rank_as_the_model_does_in_every_variant():
    split = small_split()
    model, data = set_up(SASRec, split, max_length=10, batch_size=8, hyperparameters={"width": 8}, eval_batch_size=7)
    strong(model)
    fixed, order = known_vectors(model, data)
    assert len(order) == len(set(order.tolist())) == (np.diff(split.offsets) >= 3).sum()
    metrics = RankingMetrics(split.n_items)
    expected = full_ranking(model, data, metrics)
    again, ranks_only = full_ranking(fixed, data, metrics), full_ranking(fixed, data, metrics, None)
    module = RetrievalModule(fixed, data)
    whole_test(module, data)
    for name in ("ndcg@10", "hr@5", "mrr@20"):
        assert again[name] == pytest.approx(expected[name], abs=1e-9) == ranks_only[name]
        assert module.measured[f"test/{name}"] == pytest.approx(expected[name], abs=1e-9)
    assert "coverage@10" in again and "coverage@10" not in ranks_only


def test_training_epoch_trains_and_is_timed():
    model, data = set_up(SASRec, small_split(), max_length=10, batch_size=8, hyperparameters={"width": 8})
    before = model.item.weight.detach().clone()
    assert training_epoch(RetrievalModule(model, data), data) > 0
    assert not torch.equal(before, model.item.weight)


@pytest.mark.parametrize("width", [12, 40])
def test_padded_rows_give_the_packed_vectors(width):
    split = small_split()
    model = strong(SASRec(split.n_items, 8, 12, heads=2))
    batch = Windows(split, 12)[np.arange(20)]
    assert torch.allclose(padded_hidden(model, batch, width), model.hidden(batch)[0], atol=1e-5)


def test_slots_count_real_positions_once():
    data = SequenceData(small_split(), batch_size=8, max_length=12)
    count = slots(data)
    assert count["real"] == sum(len(batch.history) for batch in data.train_dataloader())
    assert count["real"] <= count["packed"] <= count["padded"] == 12 * len(Windows(data.split, 12))


@pytest.mark.parametrize("window", [1, 3, 1000])
def test_training_interactions_are_what_training_sees(window):
    split = new_users(small_split(), 0.3, seed=1)
    table, known = training_interactions(split, window)
    newest = lambda u: range(max(split.offsets[u], split.train_end[u] - window - 1), split.train_end[u])
    expected = [(u, int(split.items[i]), p) for u in range(split.n_users) if not split.new_user[u] and len(newest(u)) > 1 for p, i in enumerate(newest(u))]
    assert list(zip(table["user"].tolist(), known[table["item"]].tolist(), table["position"].tolist())) == expected
    assert known.tolist() == sorted({item for _, item, _ in expected})


def reference_loss(weights, histories, length, heads=1):
    """Softmax loss of left-padded rows, written with torch's own attention from the names that RecTools uses. Padding item 0 is a class."""
    weights = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    table = weights["item_model.item_net_blocks.0.ids_emb.weight"]
    x = torch.zeros(len(histories), length, dtype=torch.long)
    y = x.clone()
    for row, h in enumerate(histories):
        x[row, length - len(h) + 1:], y[row, length - len(h) + 1:] = torch.tensor(h[:-1]), torch.tensor(h[1:])
    real = (x != 0)[..., None]
    hidden = table[x] + weights["pos_encoding_layer.pos_emb.weight"][torch.arange(length - 1, -1, -1)]
    blocked = ((x == 0)[:, None, :] | torch.ones(length, length, dtype=torch.bool).triu(1)) & ~torch.eye(length, dtype=torch.bool)
    width = table.shape[1]
    for i in range(2):
        w = {n.removeprefix(f"transformer_layers.transformer_blocks.{i}."): v for n, v in weights.items() if f"blocks.{i}." in n and "item_net" not in n}
        norm = lambda z, name: layer_norm(z, (width,), w[f"{name}.weight"], w[f"{name}.bias"])
        attention = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
        attention.load_state_dict({n.removeprefix("multi_head_attn."): v for n, v in w.items() if n.startswith("multi_head_attn.")})
        hidden = hidden * real
        q = norm(hidden, "q_layer_norm")
        hidden = q + attention(q, hidden, hidden, attn_mask=blocked.repeat_interleave(heads, 0), need_weights=False)[0]
        z = norm(hidden, "ff_layer_norm")
        hidden = z + torch.relu(z @ w["feed_forward.ff_linear_1.weight"].T + w["feed_forward.ff_linear_1.bias"]) @ w["feed_forward.ff_linear_2.weight"].T + w["feed_forward.ff_linear_2.bias"]
    hidden = layer_norm(hidden * real, (width,), weights["transformer_layers.last_layernorm.weight"], weights["transformer_layers.last_layernorm.bias"], 1e-8)
    return cross_entropy((hidden @ table.T).flatten(0, 1), y.flatten(), ignore_index=0).item()


@pytest.mark.parametrize("heads", [1, 2])
def test_transferred_weights_give_the_same_loss_on_padded_rows(heads):
    split = small_split()
    model = strong(SASRec(split.n_items + 1, 8, 12, heads=heads))
    batch = Windows(split, 12)[np.arange(20)]
    batch.history, batch.following = batch.history + 1, batch.following + 1
    ends = batch.offsets.tolist()
    histories = [[*batch.history[s:e].tolist(), batch.following[e - 1].item()] for s, e in zip(ends, ends[1:])]
    assert model.loss(batch)[0].item() == pytest.approx(reference_loss(rectools_weights(model), histories, 12, heads), abs=1e-5)


def stand_in(folder, body):
    """An 'interpreter' that answers like the worker."""
    path = Path(folder, "python")
    path.write_text(f"#!{sys.executable}\nimport json, sys\nasked = json.loads(sys.argv[-1])\nsay = lambda **v: print(json.dumps(v), flush=True)\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_blocks_of_the_other_side_are_scaled_to_the_epoch(tmp_path):
    python = stand_in(tmp_path, "say(batches_per_epoch=5)\nfor line in sys.stdin: say(seconds=asked['batches'] * .5)")
    with RecToolsTraining(python, small_split(), width=8, max_length=10, batch_size=8, batches=2) as other:
        assert other.epoch() == other.epoch() == 2.5
        process = other.process
    assert process.returncode == 0


def test_a_relative_path_of_the_other_python_works(tmp_path, monkeypatch):
    stand_in(tmp_path, "say(batches_per_epoch=5)\nsys.stdin.read()")
    monkeypatch.chdir(tmp_path)
    with RecToolsTraining("./python", small_split(), width=8, max_length=10, batch_size=8) as other:
        assert other.batches_per_epoch == 5


def test_a_block_is_at_most_an_epoch(tmp_path):
    python = stand_in(tmp_path, "say(batches_per_epoch=asked['batches'])\nsys.stdin.read()")
    split = small_split()
    with RecToolsTraining(python, split, width=8, max_length=10, batch_size=8, batches=1000) as other:
        assert other.batches == -(-len(Windows(split, 10)) // 8)
    with pytest.raises(ValueError, match="batches=0"):
        RecToolsTraining(python, split, width=8, max_length=10, batch_size=8, batches=0)


def test_a_worker_that_dies_is_told_with_its_last_words(tmp_path):
    python = stand_in(tmp_path, "sys.exit('no such library')")
    with pytest.raises(RuntimeError, match="no such library.*make bench-env"):
        RecToolsTraining(python, small_split(), width=8, max_length=10, batch_size=8).__enter__()
    python = stand_in(tmp_path, "say(batches_per_epoch=5)\nsys.stdin.readline(); sys.exit('out of memory')")
    with RecToolsTraining(python, small_split(), width=8, max_length=10, batch_size=8) as other:
        with pytest.raises(RuntimeError, match="out of memory"):
            other.epoch()


@pytest.mark.skipif(not BENCH.exists(), reason="RecTools' environment is not there; `make bench-env` makes it")
def test_losses_and_gradients_equal_those_of_rectools():
    found = compare_losses(BENCH, small_split(), width=16, max_length=12, batch_size=20)
    assert found["difference"] < 1e-5 and found["gradient_difference"] < 1e-4


@pytest.mark.parametrize("n", [10, 11, 5_000])
def test_random_datasets_have_the_size_asked_for(tmp_path, n):
    write_random_dataset(tmp_path / "random", n)
    data = read_dataset(tmp_path / "random")
    assert data.n_interactions == n and data.interactions["timestamp"].null_count() == 0


def test_first_batch_in_a_fresh_process(tmp_path):
    write_random_dataset(tmp_path / "random", 2_000)
    assert first_batch(tmp_path / "random", 10, 16)["windows"] == 16
    found = time_to_first_batch(2_000, 10, 16)
    assert found["windows"] == 16 and found["process_seconds"] > found["seconds"] > 0 and found["megabytes"] > 50
    with pytest.raises(RuntimeError, match="first_batch: .*no/such"):
        in_fresh_process("first_batch", "no/such")
    json.dumps(found)
