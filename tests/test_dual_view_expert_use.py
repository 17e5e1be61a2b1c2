"""Use of experts by groups against counting by hand, and the permutation test against all permutations."""

import itertools

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from l2rec.data.splits import history_length, leave_last_out
from l2rec.data.synthetic import SyntheticWorld, make_world
from l2rec.dual_view.expert_use import (UserRoutes, expert_files, expert_use, fusion_use, length_groups, pairs_of, planted_groups, usage_difference, usage_differences,
                                        user_routes)

WORLD = make_world(SyntheticWorld(n_users=40, n_items=140, mean_length=10, max_length=15, seed=0))
SPLIT = leave_last_out(WORLD.dataset)


class Routes:
    """Two blocks of four experts; who goes where depends on the user alone, so that it can be counted by hand."""

    def __init__(self, user, shift):
        first, second = (user + shift) % 4, (user * 3 + shift + 1) % 4
        second = torch.where(first == second, (second + 1) % 4, second)
        gate = torch.zeros(len(user), 4)
        rows = torch.arange(len(user))
        gate[rows, first], gate[rows, second] = 0.75, 0.25
        self.gates = [gate, gate.flip(1)]
        self.chosen = [g > 0 for g in self.gates]


class Model(nn.Module):
    """What `user_routes` needs of a model, without a backbone."""

    def __init__(self, views=("semantic", "behaviour"), gate=True):
        super().__init__()
        self.weight, self.views, self.lengths = nn.Parameter(torch.zeros(1)), views, []
        self.settings, self.fusion = type("Settings", (), {"max_length": 5}), nn.Module()
        self.fusion.gate = nn.Linear(1, 1) if gate else None

    def represent(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        self.autocast = torch.is_autocast_enabled("cpu")
        self.lengths += batch.length.tolist()
        gamma = (batch.user.float() / 100)[:, None] + torch.tensor([[-0.1, 0.1]])
        return {"gamma": gamma, "routes": {v: Routes(batch.user, k) for k, v in enumerate(self.views)}}


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_users_come_in_order_whatever_the_batches(batch_size):
    model = Model().train()
    routes = user_routes(model, SPLIT, batch_size=batch_size)
    assert model.training and np.array_equal(routes.user, np.arange(40)) and max(model.lengths) == 5
    for k, view in enumerate(("semantic", "behaviour")):
        by_hand = Routes(torch.arange(40), k)
        assert np.array_equal(routes.gates[view], torch.stack(by_hand.gates, 1).numpy()) and np.array_equal(routes.chosen[view], torch.stack(by_hand.chosen, 1).numpy())
    assert routes.gamma == pytest.approx(np.arange(40) / 100, abs=1e-6)


@pytest.mark.parametrize("precision, autocast", [(None, False), ("bf16-mixed", True)])
def test_routes_are_found_in_the_precision_of_training(precision, autocast):
    model = Model()
    expert_files(model, WORLD.dataset, SPLIT, shuffles=9, precision=precision)
    assert model.autocast == autocast


def test_the_length_of_histories_can_be_given():
    model = Model()
    user_routes(model, SPLIT, max_length=3)
    assert max(model.lengths) == 3


def test_use_as_counted_by_hand():
    routes, groups = user_routes(Model(), SPLIT), {"all": np.ones(40, bool), "few": np.arange(40) < 7, "nobody": np.zeros(40, bool)}
    table = expert_use(routes, groups)
    assert table.columns == ["view", "block", "expert", "group", "users", "chosen", "gate"] and table.height == 2 * 2 * 4 * 2 and set(table["group"]) == {"all", "few"}
    for view, block, expert, group, users, chosen, gate in table.rows():
        inside = [u for u in range(40) if groups[group][u]]
        own = [float(routes.gates[view][u, block, expert]) for u in inside]
        assert users == len(inside) and chosen == pytest.approx(sum(g > 0 for g in own) / users) and gate == pytest.approx(sum(own) / users)
    assert expert_use(routes).equals(table.filter(pl.col("group") == "all"))


def test_views_without_routes_have_no_rows():
    class Empty(Model):
        def represent(self, batch):
            out = super().represent(batch)
            out["routes"]["semantic"].gates = [torch.zeros(len(batch), 0)] * 2
            return out

    assert set(expert_use(user_routes(Empty(), SPLIT))["view"]) == {"behaviour"}
    assert expert_use(user_routes(Model(views=()), SPLIT)).height == 0


def exact(gates, first):
    """Distance, and the share of all ways to pick the first group that are at least as far apart."""
    gates = gates / gates.sum(1, keepdims=True)
    n, k = len(gates), int(first.sum())
    apart = lambda rows: 0.5 * np.abs(gates[list(rows)].mean(0) - gates[[u for u in range(n) if u not in rows]].mean(0)).sum()
    found = apart(set(np.flatnonzero(first)))
    return found, np.mean([apart(set(rows)) >= found - 1e-12 for rows in itertools.combinations(range(n), k)])


@pytest.mark.parametrize("seed, push", [(0, 0.0), (1, 0.0), (2, 0.2), (3, 0.4)])
def test_permutations_drawn_agree_with_all_of_them(seed, push):
    rng = np.random.default_rng(seed)
    gates, first = rng.dirichlet(np.ones(3), 12), np.arange(12) < 5
    gates[first] = (1 - push) * gates[first] + push * np.eye(3)[0]
    distance, p = usage_difference(gates.astype(np.float32), first, ~first, shuffles=4000)
    wanted, share = exact(gates, first)
    assert distance == pytest.approx(wanted, abs=1e-6) and p == pytest.approx(share, abs=0.03)


def test_bounds_of_the_distance_and_order_of_the_groups():
    first = np.arange(20) < 8
    apart = np.where(first[:, None], np.eye(4)[0], np.eye(4)[3])
    assert usage_difference(apart, first, ~first) == (1.0, 0.001) and usage_difference(apart, ~first, first) == (1.0, 0.001)
    same = np.full((20, 4), 1.0)                              # a fixed split: every gate is 1
    assert usage_difference(same, first, ~first) == (0.0, 1.0)
    assert usage_difference(apart[:10], first[:10], np.arange(10) == 9)[0] == 1.0      # users of neither group do not count


def test_p_values_of_equal_groups_are_uniform():
    rng, p = np.random.default_rng(0), []
    for _ in range(200):
        p.append(usage_difference(rng.dirichlet(np.ones(4), 20), np.arange(20) < 10, np.arange(20) >= 10, shuffles=99, seed=int(rng.integers(1 << 30)))[1])
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.1 and 0.4 < np.mean(p) < 0.6


@pytest.mark.parametrize("first, second, words", [([1, 0, 0], [0, 0, 0], "1 and 0 users"), ([1, 1, 0], [0, 1, 1], "1 users are in both")])
def test_groups_that_can_not_be_compared(first, second, words):
    with pytest.raises(ValueError, match=words):
        usage_difference(np.ones((3, 2)), np.array(first, bool), np.array(second, bool))


def test_differences_in_every_block():
    routes = user_routes(Model(), SPLIT)
    first = np.arange(40) < 15
    table = usage_differences(routes, {"a / b": (first, ~first), "a / nobody": (first, np.zeros(40, bool))}, shuffles=99)
    assert table.columns == ["view", "block", "groups", "distance", "p"] and table.height == 4 and set(table["groups"]) == {"a / b"}
    for view, block, _, distance, p in table.rows():
        assert (distance, p) == usage_difference(routes.gates[view][:, block], first, ~first, 99)


def test_fusion_gates_of_users():
    table = fusion_use(user_routes(Model(), SPLIT), SPLIT)
    assert np.array_equal(table["user_id"], SPLIT.user_id) and np.array_equal(table["history_length"], history_length(SPLIT)) and np.allclose(table["gate"], np.arange(40) / 100)
    assert fusion_use(user_routes(Model(gate=False), SPLIT), SPLIT).height == 0


def test_groups_are_halves_of_all_users():
    for groups in (length_groups(SPLIT), planted_groups(WORLD.truth, SPLIT)):
        for a, b in pairs_of(groups).values():
            assert a.dtype == bool and len(a) == 40 and np.array_equal(a, ~b)
    theme = planted_groups(WORLD.truth, SPLIT)["first themes"]
    assert np.array_equal(theme, WORLD.truth.users.theme[SPLIT.user_id] < 3)


def test_files_of_a_record():
    files = expert_files(Model(), WORLD.dataset, SPLIT, shuffles=9)
    assert set(files) == {"experts.csv", "differences.csv", "fusion.csv"} and {"all", "first themes", "below 10 items"} <= set(files["experts.csv"]["group"])
    assert set(expert_files(Model(views=()), WORLD.dataset, SPLIT)) == {"fusion.csv"} and set(expert_files(Model(gate=False), WORLD.dataset, SPLIT, shuffles=9)) == {"experts.csv", "differences.csv"}
    assert expert_files(nn.Linear(1, 1), WORLD.dataset, SPLIT) == {}


def test_validation_and_models_without_views():
    assert len(user_routes(Model(), SPLIT, "validation").user) == 40
    with pytest.raises(ValueError, match="Linear has no views"):
        user_routes(nn.Linear(1, 1), SPLIT)


def test_routes_can_be_made_by_hand():
    routes = UserRoutes(np.array([1, 3]), {"semantic": np.ones((2, 1, 2), np.float32)}, {"semantic": np.ones((2, 1, 2), bool)}, None)
    assert expert_use(routes)["users"].to_list() == [2, 2]
