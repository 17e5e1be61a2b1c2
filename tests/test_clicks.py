"""Click metrics against plain loops and scikit-learn, bad input, and two real processes."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.metrics import roc_auc_score

from l2rec.evaluation.clicks import ClickMetrics, group_auc


def slow_auc(logit, label):
    """Every pair of a positive and a negative, one after the other."""
    won = pairs = 0
    for z, y in zip(logit, label):
        for other, no in zip(logit, label):
            if y == 1 and no == 0:
                pairs += 1
                won += 1.0 if z > other else 0.5 if z == other else 0.0
    return won / pairs if pairs else math.nan


def impressions(n=400, n_users=30, seed=0, levels=5):
    """Users 0..n_users-1 with tied logits; user 3 likes everything, user 4 nothing."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, n_users, n)
    logit = rng.integers(-levels, levels + 1, n).astype(np.float32) / 2
    label = (rng.random(n) < 0.4).astype(np.int64)
    label[user == 3], label[user == 4] = 1, 0
    return user, logit, label


def fed(metric, order, batch=64, ids=True):
    user, logit, label = (torch.as_tensor(x) for x in impressions())
    for part in torch.as_tensor(order).split(batch):
        metric.update(user[part], logit[part], label[part].float(), part if ids else None)
    return metric


def test_metrics_agree_with_loops():
    user, logit, label = impressions()
    values = fed(ClickMetrics(), np.arange(400), ids=False).compute()
    table = fed(ClickMetrics(), np.arange(400)).per_user()
    assert values["auc"] == pytest.approx(slow_auc(logit, label), abs=1e-12)
    top = bottom = left_out = 0
    for place, u in enumerate(sorted(set(user.tolist()))):
        mine = user == u
        auc = slow_auc(logit[mine], label[mine])
        assert table["user"][place] == u and table["n"][place] == mine.sum() and table["n_positive"][place] == label[mine].sum()
        assert table["auc"][place] == pytest.approx(auc, abs=1e-12, nan_ok=True)
        likelihood = [math.log(1 / (1 + math.exp(-z))) if y else math.log(1 - 1 / (1 + math.exp(-z))) for z, y in zip(logit[mine].tolist(), label[mine])]
        assert table["log_loss"][place] == pytest.approx(-np.mean(likelihood), abs=1e-12)
        if math.isnan(auc):
            left_out += 1
        else:
            top, bottom = top + mine.sum() * auc, bottom + mine.sum()
    assert values["gauc"] == pytest.approx(top / bottom, abs=1e-12)
    assert values["gauc_left_out"] == left_out >= 2 and values["gauc_users"] == len(table["user"]) - left_out
    assert values["log_loss"] == pytest.approx((table["log_loss"] * table["n"]).sum() / 400, abs=1e-12)


@pytest.mark.parametrize("levels", [1, 3, 10_000])
def test_auc_agrees_with_scikit_learn(levels):
    _, logit, label = impressions(2_000, levels=levels)
    assert group_auc(np.zeros(2_000, int), logit, label)[3][0] == pytest.approx(roc_auc_score(label, logit), abs=1e-12)


def test_a_constant_model_is_worth_a_half():
    metric = ClickMetrics()
    metric.update(torch.tensor([1, 1, 2, 2]), torch.zeros(4), torch.tensor([0, 1, 1, 0]))
    values = metric.compute()
    assert values["auc"] == values["gauc"] == 0.5 and values["log_loss"] == pytest.approx(math.log(2))


def test_log_loss_is_stable():
    metric = ClickMetrics()
    metric.update(torch.tensor([1, 1]), torch.tensor([1e4, -1e4]), torch.tensor([1, 1]))
    metric.update(torch.tensor([1, 1]), torch.tensor([80.0, -80.0]), torch.tensor([0, 0]))
    assert metric.compute()["log_loss"] == pytest.approx((0 + 1e4 + 80 + math.exp(-80)) / 4, rel=1e-9)


def test_order_batches_and_repeats_change_no_bit():
    plain = fed(ClickMetrics(), np.arange(400), ids=False)
    other = fed(ClickMetrics(), np.r_[np.random.default_rng(1).permutation(400), [5, 5, 77]], batch=33)
    assert plain.compute() == other.compute()
    assert all(np.array_equal(a, other.per_user()[key], equal_nan=True) for key, a in plain.per_user().items())


def test_no_user_with_both_classes():
    metric = ClickMetrics()
    metric.update(torch.tensor([1, 2]), torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    values = metric.compute()
    assert math.isnan(values["gauc"]) and values["gauc_users"] == 0 and values["gauc_left_out"] == 2 and values["auc"] == 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_input_has_one_clear_message():
    metric, two = ClickMetrics(), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="no impression was recorded"):
        metric.compute()
    with pytest.raises(ValueError, match="1 of 2 logits are not finite .*sample 1"):
        metric.update(two, torch.tensor([0, math.nan]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"label holds 0\.5"):
        metric.update(two, torch.zeros(2), torch.tensor([0.5, 1]))
    with pytest.raises(ValueError, match="equally long"):
        metric.update(two, torch.zeros(3), torch.zeros(3))
    metric.update(two, torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="all 2 labels are 0"):
        metric.compute()
    metric.update(two, torch.zeros(2), torch.ones(2), torch.arange(2))
    with pytest.raises(ValueError, match="impression was given for 2 of 4 samples"):
        metric.compute()


def one_process(rank, folder):
    """A process's share of the impressions, with the repeats a distributed sampler adds."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    shared, lonely = fed(ClickMetrics(), np.r_[np.arange(rank, 400, 2), np.zeros(rank, int), 8], batch=50), ClickMetrics()
    if rank == 0:
        fed(lonely, np.arange(400), ids=False)
    out = {"shared": shared.compute(), "lonely": lonely.compute(), "loss": shared.per_user()["log_loss"].tolist()}
    (folder / f"{rank}.json").write_text(json.dumps(out))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_give_the_numbers_of_one(tmp_path):
    mp.spawn(one_process, (tmp_path,), nprocs=2)
    alone = fed(ClickMetrics(), np.arange(400))
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert first == second
    assert first["shared"] == first["lonely"] == alone.compute()
    assert first["loss"] == alone.per_user()["log_loss"].tolist()
