"""Full ranking against slow loops in float64, bad input, and two real processes."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from l2rec.evaluation.ranking import RankingMetrics, rank_batch, rank_targets, rows_within, top_items


def slow_rank(scores, target, row, seen, targets_of_row):
    """Expected rank by one comparison after the other."""
    greater = ties = 0
    for item, score in enumerate(scores[row].tolist()):
        if item == target or (item in seen.get(row, ()) and item not in targets_of_row[row]):
            continue
        greater += score > scores[row, target].item()
        ties += score == scores[row, target].item()
    return 1 + greater + ties / 2


def problem(n_rows, n_items, seed, levels=None, many=False, dtype=torch.float32):
    """Random scores (few `levels` make many ties), targets and seen items."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_rows, n_items, generator=g, dtype=torch.float64)
    if levels:
        scores = torch.randint(levels, (n_rows, n_items), generator=g).double()
    scores = scores.to(dtype)
    row = torch.randint(n_rows, (3 * n_rows,), generator=g) if many else torch.arange(n_rows)
    target = torch.randint(n_items, (len(row),), generator=g)
    pair = torch.unique(row * n_items + target)[torch.randperm(len(torch.unique(row * n_items + target)), generator=g)] if many else row * n_items + target
    seen_row = torch.randint(n_rows, (5 * n_rows,), generator=g)
    seen = torch.randint(n_items, (5 * n_rows,), generator=g)
    both = torch.randperm(len(pair), generator=g)[: len(pair) // 2]  # half of the targets were seen before
    return scores, pair % n_items, pair // n_items, torch.cat([seen, pair[both] % n_items]), torch.cat([seen_row, pair[both] // n_items])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("n_rows, n_items", [(1, 1), (2, 7), (37, 53)])
def test_ranks_agree_with_a_loop(n_rows, n_items, levels, many, dtype):
    scores, target, row, seen, seen_row = problem(n_rows, n_items, 0, levels, many, dtype)
    targets_of_row = {r: set(target[row == r].tolist()) for r in range(n_rows)}
    for removed in (False, True):
        left_out = {r: set(seen[seen_row == r].tolist()) for r in range(n_rows)} if removed else {}
        expected = [slow_rank(scores, int(t), int(r), left_out, targets_of_row) for t, r in zip(target, row)]
        given = (seen, seen_row) if removed else ()
        assert rank_targets(scores.clone(), target, row, *given).tolist() == expected


def test_ranks_do_not_need_contiguous_scores():
    scores, target, row, seen, seen_row = problem(11, 29, 1)
    other = scores.T.contiguous().T
    ranks, top = rank_batch(other, target, row, seen, seen_row, k=4)
    same, top_too = rank_batch(scores, target, row, seen, seen_row, k=4)
    assert torch.equal(ranks, same) and torch.equal(top, top_too)


def test_a_constant_model_is_worth_the_middle():
    ranks = rank_targets(torch.zeros(4, 101), torch.tensor([0, 50, 100, 7]), torch.arange(4))
    assert ranks.tolist() == [51] * 4


def test_more_than_one_chunk():
    scores, target, row, *_ = problem(64, 9_000, 2)
    expected = 1 + (scores > scores[row, target][:, None]).sum(1)
    assert torch.equal(rank_targets(scores, target, row).long(), expected)


@pytest.mark.parametrize("n_items, k", [(1, 1), (5, 5), (40, 1), (97, 3), (1_000, 7), (1_003, 20), (4_001, 10)])
@pytest.mark.parametrize("levels", [None, 2])
def test_top_items_are_the_best(n_items, k, levels):
    scores, *_, seen, seen_row = problem(9, n_items, 3, levels)
    expected = scores.clone()
    expected[seen_row, seen] = -torch.inf
    top = top_items(scores, k, seen, seen_row)
    for row in range(9):
        best = sorted((v for v in expected[row].tolist() if v > -math.inf), reverse=True)[:k]
        items = [i for i in top[row].tolist() if i >= 0]
        assert [expected[row, i].item() for i in items] == best and len(set(items)) == len(best)
        assert top[row, len(best):].tolist() == [-1] * (k - len(best))
        assert not set(items) & set(seen[seen_row == row].tolist())


def test_a_seen_target_stays_in_the_list():
    scores = torch.tensor([[3., 2, 1]])
    ranks, top = rank_batch(scores, torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0, 0]), k=3)
    assert ranks.tolist() == [1] and top.tolist() == [[0, 2, -1]]


def test_huge_finite_scores_are_legal():
    scores = torch.full((2, 50), 3e38)
    assert rank_targets(scores, torch.tensor([0, 1]), torch.arange(2)).tolist() == [25.5, 25.5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(value):
    scores = torch.zeros(3, 8)
    scores[1, 6] = scores[2, 0] = value
    with pytest.raises(ValueError, match="2 of 24 scores are not finite .*batch row 1, item row 6"):
        rank_targets(scores, torch.tensor([0]), torch.tensor([0]))


def test_opposite_infinities_do_not_cancel():
    with pytest.raises(ValueError, match="not finite"):
        rank_targets(torch.tensor([[math.inf, -math.inf, 0.]]), torch.tensor([2]), torch.tensor([0]))


ONE, ZERO = torch.tensor([1]), torch.tensor([0])


@pytest.mark.parametrize("arguments, message", [
    ((torch.zeros(2, 3, dtype=torch.long), ONE, ZERO), "floating matrix"),
    ((torch.zeros(3), ONE, ZERO), "floating matrix"),
    ((torch.zeros(2, 3), torch.tensor([3]), ZERO), r"target holds 3, but must lie in 0\.\.2"),
    ((torch.zeros(2, 3), torch.tensor([-1]), ZERO), "target holds -1"),
    ((torch.zeros(2, 3), ONE, torch.tensor([2])), "target_row holds 2"),
    ((torch.zeros(2, 3), torch.tensor([1., 2.]), ZERO), "flat integer"),
    ((torch.zeros(2, 3), torch.tensor([1, 2]), ZERO), "target has 2 entries but target_row 1"),
    ((torch.zeros(2, 3), torch.tensor([2, 2]), torch.tensor([1, 1])), "item row 2 is a target of batch row 1 more than once"),
    ((torch.zeros(2, 3), ONE, ZERO, ZERO), "go together"),
    ((torch.zeros(2, 3), ONE, ZERO, torch.tensor([4]), ZERO), "seen holds 4"),
    ((torch.zeros(2, 3), ONE, ZERO, torch.tensor([1, 2]), ZERO), "seen has 2 entries but seen_row 1"),
    ((torch.zeros(2, 3), ONE, ZERO, None, None, 4), r"k is 4, but must lie in 1\.\.3"),
    ((torch.zeros(2, 3), ONE, ZERO, None, None, 0), "k is 0"),
])
def test_bad_input_has_one_clear_message(arguments, message):
    with pytest.raises(ValueError, match=message):
        rank_batch(*arguments)


def test_rows_within_keeps_to_the_bound():
    assert rows_within(1_000_000, 1_000) == 125
    with pytest.raises(ValueError, match="at least 8000"):
        rows_within(1_000, 1_000)


def slow_metrics(ranks, k):
    """One user's metrics from the list of their ranks."""
    hits = [r for r in ranks if r <= k]
    ideal = sum(1 / math.log2(1 + i) for i in range(1, min(len(ranks), k) + 1))
    return {f"hr@{k}": float(bool(hits)), f"recall@{k}": len(hits) / len(ranks), f"mrr@{k}": 1 / min(hits) if hits else 0.0,
            f"ndcg@{k}": min(1.0, sum(1 / math.log2(1 + r) for r in hits) / ideal)}


def recorded(metric, seed=0, n_users=40, n_items=60, order=None, batch=7, with_top=True):
    """Feed a metric with fractional ranks of one to four targets a user, in batches."""
    rng = np.random.default_rng(seed)
    ranks = [rng.choice(np.arange(2, 2 * n_items) / 2, rng.integers(1, 5), replace=False) for _ in range(n_users)]
    top = torch.as_tensor(np.stack([rng.permutation(n_items)[:20] for _ in range(n_users)]))
    top[:, 18:] = -1
    for part in torch.as_tensor(np.arange(n_users) if order is None else order).split(batch):
        row = torch.cat([torch.full((len(ranks[u]),), i) for i, u in enumerate(part.tolist())])
        shuffle = torch.randperm(len(row))
        rank = torch.as_tensor(np.concatenate([ranks[u] for u in part.tolist()]))
        metric.update(1000 - part, rank[shuffle], row[shuffle], top[part] if with_top else None)
    return ranks, top


def test_metrics_agree_with_a_loop():
    metric = RankingMetrics(60, popularity=torch.arange(60))
    ranks, top = recorded(metric)
    expected = [{key: v for k in (5, 10, 20) for key, v in slow_metrics(r.tolist(), k).items()} for r in ranks]
    per_user, means = metric.per_user(), metric.compute()
    assert per_user["user"].tolist() == sorted(1000 - u for u in range(40))
    for key in expected[0]:
        assert np.allclose(per_user[key][::-1], [e[key] for e in expected], rtol=0, atol=1e-12)
        assert means[key] == pytest.approx(np.mean([e[key] for e in expected]), abs=1e-12)
        assert means[key] == per_user[key].mean()
    for k in (5, 10, 20):
        shown = [i for r in top[:, :k].tolist() for i in r if i >= 0]
        assert means[f"coverage@{k}"] == len(set(shown)) / 60
        usual = sum(i * i for i in range(60)) / sum(range(60))
        assert means[f"popularity_lift@{k}"] == pytest.approx(np.mean(shown) / usual, abs=1e-12)


def test_order_batches_and_repeats_change_no_bit():
    plain, other = RankingMetrics(60), RankingMetrics(60)
    recorded(plain)
    recorded(other, order=np.r_[np.random.default_rng(9).permutation(40), [3, 3, 17]], batch=11)
    assert plain.compute() == other.compute()
    assert all(np.array_equal(a, other.per_user()[key]) for key, a in plain.per_user().items())


def test_ndcg_never_exceeds_one():
    metric = RankingMetrics(100, ks=(5,))
    metric.update(torch.tensor([0]), torch.full((9,), 5.0), torch.zeros(9, dtype=torch.long))
    assert metric.compute()["ndcg@5"] == 1


def test_perfect_ranking_of_several_targets_is_one():
    scores = torch.tensor([[9., 8, 7, 1, 0, 2]])
    row = torch.zeros(3, dtype=torch.long)
    metric = RankingMetrics(6, ks=(2, 5))
    metric.update(torch.tensor([4]), rank_targets(scores, torch.tensor([1, 0, 2]), row), row)
    values = metric.compute()
    assert values["ndcg@2"] == values["ndcg@5"] == values["recall@5"] == 1 and values["recall@2"] == pytest.approx(2 / 3)


def test_reset_forgets_and_catalogue_smaller_than_the_cut_off():
    metric = RankingMetrics(6, ks=(20,))
    ranks, top = rank_batch(torch.randn(3, 6), torch.tensor([1, 2, 3]), torch.arange(3), k=6)
    metric.update(torch.arange(3), ranks, torch.arange(3), top)
    assert metric.compute()["coverage@20"] == metric.compute()["hr@20"] == 1
    metric.reset()
    metric.update(torch.tensor([8]), torch.tensor([30.0]), torch.tensor([0]))
    assert metric.compute() == {"hr@20": 0, "recall@20": 0, "ndcg@20": 0, "mrr@20": 0}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_updates_have_one_clear_message():
    metric, row = RankingMetrics(60), torch.tensor([0])
    with pytest.raises(ValueError, match="no user was recorded"):
        metric.compute()
    with pytest.raises(ValueError, match="no user was recorded"):
        metric.per_user()
    with pytest.raises(ValueError, match="user 6 has no target"):
        metric.update(torch.tensor([5, 6]), torch.ones(1), row)
    with pytest.raises(ValueError, match="ranks has 2 entries"):
        metric.update(torch.tensor([5]), torch.ones(2), row)
    with pytest.raises(ValueError, match="target_row holds 3"):
        metric.update(torch.tensor([5]), torch.ones(1), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"top has shape \(1, 10\)"):
        metric.update(torch.tensor([5]), torch.ones(1), row, torch.zeros(1, 10, dtype=torch.long))
    metric.update(torch.tensor([5]), torch.ones(1), row)
    metric.update(torch.tensor([6]), torch.ones(1), row, torch.zeros(1, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="for 1 of 2 users"):
        metric.compute()
    metric = RankingMetrics(60)
    metric.update(torch.tensor([5, 5]), torch.ones(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="user 5 occurs twice with different numbers of targets"):
        metric.compute()
    with pytest.raises(ValueError, match="ks is"):
        RankingMetrics(60, ks=(0, 5))
    with pytest.raises(ValueError, match="popularity must hold"):
        RankingMetrics(60, popularity=torch.ones(59))


def one_process(rank, folder):
    """A process's share of the users; a third set is known to the second process only."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    shared, lonely = RankingMetrics(60, popularity=torch.arange(60)), RankingMetrics(60)
    recorded(shared, order=np.r_[np.arange(rank, 40, 2), np.zeros(rank, int), 8], batch=5)  # users 0 and 8 are met repeatedly
    if rank == 1:
        recorded(lonely)
    out = {"shared": shared.compute(), "lonely": lonely.compute(), "ndcg": shared.per_user()["ndcg@10"].tolist(), "rows": len(shared.user)}
    (folder / f"{rank}.json").write_text(json.dumps(out))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_give_the_numbers_of_one(tmp_path):
    mp.spawn(one_process, (tmp_path,), nprocs=2)
    alone = RankingMetrics(60, popularity=torch.arange(60))
    recorded(alone)
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert first["shared"] == second["shared"] == alone.compute()
    assert first["ndcg"] == second["ndcg"] == alone.per_user()["ndcg@10"].tolist()
    assert first["lonely"] == second["lonely"] == {k: v for k, v in alone.compute().items() if "lift" not in k}
    assert first["rows"] == 5  # a process has its own share back after computing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; run `pytest tests/test_ranking.py` on a machine with one")
def test_a_gpu_gives_the_ranks_of_the_cpu():
    scores, target, row, seen, seen_row = problem(300, 3_416, 5, many=True)
    here = rank_batch(scores.clone(), target, row, seen, seen_row, k=20)
    there = rank_batch(scores.cuda(), *(x.cuda() for x in (target, row, seen, seen_row)), k=20)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
