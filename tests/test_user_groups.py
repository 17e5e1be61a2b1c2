"""Metrics of new and old users against plain loops, influences against derivatives, jackknife and bootstrap."""

import math

import numpy as np
import pytest
import torch

from l2rec.evaluation.clicks import ClickMetrics
from l2rec.evaluation.user_groups import GroupClickMetrics, auc_influence, placements
from test_clicks import impressions, slow_auc

N_USERS = 30
NEW = np.arange(N_USERS) % 3 == 1  # user 4, who likes nothing, is new; user 3, who likes everything, is old


def fed(new=NEW, keep=slice(None)):
    user, logit, label = (torch.as_tensor(x[keep]) for x in impressions())
    metric = GroupClickMetrics(torch.as_tensor(new))
    for part in torch.arange(len(user)).split(64):
        metric.update(user[part], logit[part], label[part])
    return metric


def weighted_auc(weight, user, logit, label):
    """Every pair, counted with the product of its users' weights."""
    won = pairs = 0.0
    for i in np.flatnonzero(label == 1):
        for j in np.flatnonzero(label == 0):
            w = weight[user[i]] * weight[user[j]]
            pairs += w
            won += w * (1.0 if logit[i] > logit[j] else 0.5 if logit[i] == logit[j] else 0.0)
    return won / pairs


@pytest.mark.parametrize("name, new", [("new", NEW), ("old", ~NEW)])
def test_each_group_is_what_a_loop_over_it_gives(name, new):
    user, logit, label = impressions()
    values, mine = fed().compute(), new[impressions()[0]]
    assert values[f"{name}/auc"] == pytest.approx(slow_auc(logit[mine], label[mine]), abs=1e-12)
    top = bottom = left_out = users = 0
    for u in sorted(set(user[mine].tolist())):
        auc, n = slow_auc(logit[user == u], label[user == u]), (user == u).sum()
        left_out, users = left_out + math.isnan(auc), users + (not math.isnan(auc))
        if not math.isnan(auc):
            top, bottom = top + n * auc, bottom + n
    assert values[f"{name}/gauc"] == pytest.approx(top / bottom, abs=1e-12)
    assert (values[f"{name}/gauc_users"], values[f"{name}/gauc_left_out"]) == (users, left_out) and left_out >= 1
    losses = [math.log1p(math.exp(-z if y else z)) for z, y in zip(logit[mine].tolist(), label[mine])]
    assert values[f"{name}/log_loss"] == pytest.approx(np.mean(losses), abs=1e-12)


def test_the_overall_metrics_stay():
    plain = ClickMetrics()
    plain.update(*(torch.as_tensor(x) for x in impressions()))
    values, table = fed().compute(), fed().per_user()
    assert {k: values[k] for k in plain.compute()} == plain.compute()
    assert all(np.array_equal(a, table[key], equal_nan=True) for key, a in plain.per_user().items())
    assert table["new"].dtype == bool and np.array_equal(table["new"], NEW[table["user"]]) and table["auc_influence"].dtype == np.float32


def test_placements_against_every_pair():
    _, logit, label = impressions(n=80)
    slow = []
    for z, y in zip(logit, label):
        against = logit[label != y]
        wins = (z > against) if y == 1 else (z < against)
        slow.append(wins.mean() + 0.5 * (z == against).mean())
    assert placements(logit, label) == pytest.approx(slow, abs=1e-12)


def test_influence_is_the_derivative_by_a_users_weight():
    user, logit, label = impressions(n=120, n_users=8)
    users, influence = auc_influence(user, logit, label)
    assert np.array_equal(users, np.unique(user)) and influence.sum() == pytest.approx(0, abs=1e-12)
    for u in users:
        up, down = np.ones(8), np.ones(8)
        up[u], down[u] = 1 + 1e-4, 1 - 1e-4
        slope = (weighted_auc(up, user, logit, label) - weighted_auc(down, user, logit, label)) / 2e-4
        assert influence[u] == pytest.approx(slope, abs=1e-7)


def test_influence_is_of_the_users_own_group():
    user, logit, label = impressions()
    table = fed().per_user()
    for group in (NEW, ~NEW):
        mine = group[user]
        users, influence = auc_influence(user[mine], logit[mine], label[mine])
        assert table["auc_influence"][np.isin(table["user"], users)] == pytest.approx(influence, rel=1e-6)


def world(seed=3, n_users=250):
    """Two models on the same impressions of users with moods, so that a user's impressions resemble each other."""
    rng = np.random.default_rng(seed)
    user, mood = np.repeat(np.arange(n_users), rng.integers(5, 40, n_users)), rng.normal(0, 1, n_users)
    a = rng.normal(0, 1, len(user)) + mood[user]
    b = a + rng.normal(0, 0.7, len(user)) - 0.5 * mood[user]
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-a))).astype(int)
    return user, a, b, label


def fast_auc(logit, label):
    return placements(logit, label)[label == 1].mean()


def test_standard_errors_against_jackknife_and_bootstrap():
    user, a, b, label = world()
    n, rng = user.max() + 1, np.random.default_rng(0)
    rows = [np.flatnonzero(user == u) for u in range(n)]
    samples = [np.concatenate([rows[u] for u in rng.integers(0, n, n)]) for _ in range(400)]
    others = [np.flatnonzero(user != u) for u in range(n)]
    psi_a, psi_b = (auc_influence(user, z, label)[1] for z in (a, b))
    for psi, of in ((psi_a, lambda r: fast_auc(a[r], label[r])), (psi_a - psi_b, lambda r: fast_auc(a[r], label[r]) - fast_auc(b[r], label[r]))):
        error = np.sqrt((psi**2).sum())
        jackknife = np.array([of(r) for r in others])
        assert error == pytest.approx(np.sqrt((n - 1) / n * ((jackknife - jackknife.mean()) ** 2).sum()), rel=0.03)
        assert error == pytest.approx(np.std([of(r) for r in samples]), rel=0.12)


@pytest.mark.parametrize("new, absent", [(np.zeros(N_USERS, bool), "new"), (np.ones(N_USERS, bool), "old"), (np.arange(N_USERS) == 4, "new"), (np.arange(N_USERS) != 3, "old")])
def test_a_group_without_impressions_or_with_one_class_is_left_out(new, absent):
    values, table = fed(new).compute(), fed(new).per_user()
    assert not any(key.startswith(f"{absent}/") for key in values)
    assert all(math.isfinite(v) for v in values.values()) and len(values) == 10
    mine = table["new"] if absent == "new" else ~table["new"]
    assert np.isnan(table["auc_influence"][mine]).all() and np.isfinite(table["auc_influence"][~mine]).all()


def test_no_user_of_a_group_with_both_classes():
    metric = GroupClickMetrics(torch.tensor([True, True, False]))
    metric.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0.0, 1, 0, 1]), torch.tensor([0, 1, 0, 1]))
    values = metric.compute()
    assert "new/gauc" not in values and values["new/auc"] == 1 and values["new/gauc_left_out"] == 2 and values["old/gauc"] == 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_input_has_one_clear_message():
    with pytest.raises(ValueError, match="flat bool vector .* not .3,. of torch.int64"):
        GroupClickMetrics(torch.tensor([1, 2, 5]))
    metric = GroupClickMetrics(torch.tensor([True, False]))
    with pytest.raises(ValueError, match="user 2 is not among the 2 users"):
        metric.update(torch.tensor([0, 2]), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="user -1"):
        metric.update(torch.tensor([-1, 0]), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="no impression was recorded"):
        metric.compute()
    metric.update(torch.tensor([0, 1]), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="all 2 labels are 1"):
        metric.compute()


def test_it_travels_with_a_module_and_leaves_no_trace_in_checkpoints():
    module = torch.nn.ModuleDict({"metric": GroupClickMetrics(torch.tensor([True, False]))})
    assert not module.state_dict()
    metric = module.to("cpu")["metric"]
    for _ in range(2):
        metric.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 1, 1, 0]), torch.tensor([0, 1, 0, 1]))
        assert metric.compute()["new/auc"] == 1 and metric.compute()["old/auc"] == 0
        metric.reset()
