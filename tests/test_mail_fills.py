"""Fills and comparators: slow references in float64, what each may read, what each may train, and that state travels in a strict checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.linalg import solve_sylvester
from torch.nn.functional import binary_cross_entropy_with_logits

from l2rec.data.splits import leave_last_fraction, new_users, training_fraction
from l2rec.data.synthetic import SyntheticWorld, make_world
from l2rec.mail.comparators import LLAE, DropoutNet, EmbLR, MetaEmb, llae, meta_loss, one_hot, ridge, some, standing_still, sylvester, training_behaviour, training_pair, unit_rows
from l2rec.mail.features import Questions, make_features
from l2rec.mail.fills import FILLS, Fill, LinearFill, NoFill, TowerFill, distinct, make_fill, with_behaviour
from l2rec.mail.rankers import BaseDNN
from l2rec.training.contracts import build
from worlds import dataset

SMALL = dict(encoder=(16, 8, 8), decoder=(8, 16))
SLOTS = 12


@pytest.fixture(scope="module")
def world():
    return make_world(SyntheticWorld(n_users=150, n_items=150, max_length=30, n_groups=10, attribute_signal=.9)).dataset


@pytest.fixture(scope="module")
def split(world):
    return training_fraction(new_users(leave_last_fraction(world), .4), .9)


@pytest.fixture(scope="module")
def features(world, split):
    return make_features(world, split)


@pytest.fixture
def ranker(split, features):
    return build(BaseDNN, split, features=features, width=6, slots=SLOTS, hidden=(16, 8), dropout=.2)


@pytest.fixture
def asked(split, features, ranker):
    """A batch of training questions as vectors, who is new, and the batch."""
    questions = Questions(split, features, "train", max_length=SLOTS)
    batch = questions[np.random.default_rng(0).permutation(len(questions))[:200]]
    return ranker.embed(batch), ranker.embeddings.new_user[batch.user], batch


def made(name, ranker, features, **more):
    return make_fill(name, ranker, features, **(SMALL if FILLS[name][0].endswith("TowerFill") else {}), **more)


def has_gradient(module):
    return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


# ---------------------------------------------------------------- the interface

def test_distinct_names_one_question_for_each_row():
    profile = torch.tensor([7, 3, 7, 0, 3])
    first, which = distinct(profile)
    assert len(first) == 3 and torch.equal(profile[first][which], profile)


def test_a_profile_is_shared_by_those_with_the_same_attributes(split, features, ranker):
    tables = ranker.embeddings
    codes = [tuple(row) for row in features.codes.tolist()]
    ranks = {row: k for k, row in enumerate(sorted(set(codes)))}
    assert 1 < len(ranks) < split.n_users and tables.profile.tolist() == [ranks[row] for row in codes]
    tables.admit(torch.tensor([codes[3], codes[0]]))
    assert tables.profile[-2:].tolist() == [ranks[codes[3]], ranks[codes[0]]]


def test_with_behaviour_changes_the_given_rows_only(asked):
    e, _, _ = asked
    rows, virtual = torch.tensor([3, 8]), torch.randn(2, SLOTS, 6, requires_grad=True)
    out = with_behaviour(e, rows, virtual)
    rest = torch.ones(len(e), dtype=torch.bool)
    rest[rows] = False
    assert torch.equal(out.behaviour[rows], virtual) and out.present[rows].all() and torch.equal(out.items, e.items)
    assert torch.equal(out.behaviour[rest], e.behaviour[rest]) and torch.equal(out.present[rest], e.present[rest])
    out.behaviour.sum().backward()
    assert (virtual.grad == 1).all()
    with pytest.raises(ValueError, match="5 slots of width 6 for a ranker of 12 slots of width 6"):
        with_behaviour(e, rows, virtual[:, :5])


@pytest.mark.parametrize("name", FILLS)
def test_every_fill_leaves_old_users_alone_and_works_without_new_or_old(name, split, features, ranker, asked):
    e, new, batch = asked
    fill = made(name, ranker, features)
    fill.prepare(ranker, split, 0)
    none = torch.zeros_like(new)
    assert fill.fill(e, none, batch.user) is e
    out = fill.fill(e, new, batch.user)
    for value in ("attributes", "target", "context", "behaviour", "present", "user", "items"):
        assert torch.equal(getattr(out, value)[~new], getattr(e, value)[~new]), value
    everybody = fill.fill(e, ~none, batch.user)
    assert torch.isfinite(ranker.score(everybody)).all()
    for old in (~new, none, ~none):
        found = fill.loss(e.detach(), old, batch.label, ranker)
        assert (found is None) == (fill.trained_by != "own")
        if found is not None:
            found[0].backward()
            assert torch.isfinite(found[0])
            assert not has_gradient(ranker)
    assert (fill.trained_by == "nothing") == (not list(fill.parameters()))


@pytest.mark.parametrize("name", FILLS)
def test_gradients_of_the_click_loss(name, split, features, ranker, asked):
    """They reach the ranker, and of a fill only what the clicks train."""
    e, new, batch = asked
    fill = made(name, ranker, features)
    fill.prepare(ranker, split, 0)
    binary_cross_entropy_with_logits(ranker.score(fill.fill(fill.view(e, ~new), new, batch.user)), batch.label).backward()
    assert has_gradient(ranker) and has_gradient(fill) == (fill.trained_by == "clicks")


@pytest.mark.parametrize("name", FILLS)
def test_state_travels_in_a_strict_checkpoint(name, split, features, ranker, asked):
    e, new, batch = asked
    fill = made(name, ranker, features).eval()
    shapes = {k: v.shape for k, v in fill.state_dict().items()}
    assert not any(k.startswith("ranker") or "embeddings" in k for k in shapes)
    fill.prepare(ranker, split, 0)
    assert {k: v.shape for k, v in fill.state_dict().items()} == shapes
    torch.manual_seed(99)
    other = made(name, ranker, features).eval()
    other.fill(e, new, batch.user)
    other.load_state_dict(fill.state_dict(), strict=True)
    a, b = fill.fill(e, new, batch.user), other.fill(e, new, batch.user)
    assert torch.equal(a.behaviour, b.behaviour) and torch.equal(a.present, b.present) and torch.equal(a.user, b.user)


def test_users_of_no_split_can_be_admitted(split, features, ranker, asked):
    e, new, batch = asked
    known = batch.user[new][:5]
    for name in FILLS:
        fill = made(name, ranker, features).eval()
        fill.prepare(ranker, split, 0)
        before = fill.fill(e, new, batch.user)
        admitted = ranker.embeddings.admit(ranker.embeddings.codes[known])
        user = batch.user.clone()
        user[new.nonzero()[:5, 0]] = admitted
        after = fill.fill(e, new, user)
        assert torch.equal(before.behaviour, after.behaviour) and torch.equal(before.user, after.user), name


def test_names_and_parameters(ranker, features):
    with pytest.raises(ValueError, match="did you mean 'mail-base'"):
        make_fill("mailbase", ranker, features)
    with pytest.raises(ValueError, match="did you mean 'sigma'"):
        make_fill("mail-base", ranker, features, sigmas=1.)
    with pytest.raises(ValueError, match="terms is what makes the fill 'mail-dual'"):
        make_fill("mail-dual", ranker, features, terms=("attributes",))
    with pytest.raises(ValueError, match="takes no parameter 'p'"):
        make_fill("", ranker, features, p=.5)
    assert isinstance(make_fill("", ranker, features), NoFill) and issubclass(NoFill, Fill)
    assert [make_fill(f"mail-{arm}", ranker, features, **SMALL).tower.terms for arm in ("single", "dual", "base")] == [("attributes",), ("attributes", "behaviour"), ("attributes", "behaviour", "alignment")]


@pytest.mark.parametrize("name, wrong, text", [("mail-base", dict(rows=1), "rows=1"), ("emblr", dict(l2=0), "l2=0"), ("emblr", dict(length=13), "length=13"), ("llae", dict(length=0), "length=0"),
                                               ("dropoutnet", dict(p=1.5), "p=1.5"), ("metaemb", dict(shots=0), "shots=0"), ("metaemb", dict(alpha=2), "alpha=2")])
def test_bad_parameters(name, wrong, text, ranker, features):
    with pytest.raises(ValueError, match=text):
        made(name, ranker, features, **wrong)


# ---------------------------------------------------------------- MAIL's arms

def test_linear_fill_is_a_loop(ranker, features, asked):
    e, new, batch = asked
    fill = LinearFill(ranker, features)
    out = fill.fill(e, new, batch.user)
    m, b = fill.map.weight.detach().double(), fill.map.bias.detach().double()
    for row in new.nonzero().squeeze(1).tolist():
        expected = (m @ e.attributes[row].detach().double().flatten() + b).view(SLOTS, 6)
        torch.testing.assert_close(out.behaviour[row].detach().double(), expected, atol=1e-6, rtol=1e-5)
    assert not b.any()


@pytest.mark.parametrize("read_only", [True, False])
def test_linear_fill_reads_or_trains_the_attributes(read_only, ranker, features, asked):
    e, new, batch = asked
    fill = LinearFill(ranker, features, read_only=read_only)
    fill.fill(e, new, batch.user).behaviour[new].sum().backward()
    gradient = ranker.embeddings.attribute.weight.grad
    assert fill.map.weight.grad.any() and (gradient is None or not gradient.any()) == read_only


def test_tower_fill_is_the_tower_row_by_row(ranker, features, asked):
    e, new, batch = asked
    fill = TowerFill(ranker, features, **SMALL)                      # in training mode: dropout must not act
    out = fill.fill(e, new, batch.user)
    for row in new.nonzero().squeeze(1).tolist():
        torch.testing.assert_close(out.behaviour[row], fill.tower.virtual(e.attributes[row:row + 1])[0], atol=1e-6, rtol=1e-5)


def test_fill_at_inference_only(ranker, features, asked):
    e, new, batch = asked
    fill = TowerFill(ranker, features, fill_in_training=False, **SMALL)
    assert fill.train().fill(e, new, batch.user) is e
    assert fill.eval().fill(e, new, batch.user).present[new].all()


def test_the_tower_is_trained_on_old_rows_that_have_a_behaviour(ranker, features, asked, monkeypatch):
    e, new, batch = asked
    for rows in (None, 20):
        fill, read = TowerFill(ranker, features, rows=rows, **SMALL), []
        monkeypatch.setattr(fill.tower, "loss", lambda a, v, present: read.append((a, v, present)) or (torch.zeros(()), {}))
        fill.loss(e, ~new, batch.label, ranker)
        a, v, present = read[0]
        able = ~new & e.present.any(1)
        assert len(a) == (int(able.sum()) if rows is None else 20) and present.any(1).all()
        if rows is None: assert torch.equal(v, e.behaviour[able]) and torch.equal(a, e.attributes[able])
        else: assert all(any(torch.equal(x, y) for y in e.behaviour[able]) for x in v)


# ---------------------------------------------------------------- what closed forms read

def slow_behaviour(split, liked_only):
    sets = {}
    for u in range(split.n_users):
        if split.train_user[u] and not split.new_user[u]:
            got = {int(split.items[i]) for i in range(split.offsets[u], split.train_end[u]) if not liked_only or split.rating[i] > 3}
            if got: sets[u] = got
    return sets


@pytest.mark.parametrize("liked_only", [True, False])
def test_training_behaviour_is_a_loop(split, liked_only):
    matrix, rows = training_behaviour(split, liked_only)
    expected = slow_behaviour(split, liked_only)
    assert rows.tolist() == sorted(expected) and set(matrix.data) == {1.}
    assert [set(np.flatnonzero(r).tolist()) for r in matrix.toarray()] == [expected[u] for u in rows]


def test_an_item_liked_twice_counts_once():
    twice = leave_last_fraction(dataset({0: [4, 4, 4, 9, 4], 1: [4, 9, 4, 9]}, timestamp=list(range(9)), rating=[5.] * 9))
    matrix, _ = training_behaviour(twice)
    assert set(matrix.data) == {1.} and matrix.nnz == 3


def test_one_hot():
    codes = np.array([[0, 2], [1, 0]])
    assert one_hot(codes, np.array([0, 2]), 5).toarray().tolist() == [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]]


@pytest.mark.parametrize("cls", [EmbLR, LLAE])
def test_closed_forms_see_training_segments_of_old_users_only(cls, split, features, ranker):
    def state(changed):
        fill = cls(ranker, features)
        fill.prepare(ranker, changed, 0)
        return fill.state_dict()
    before, user = state(split), np.repeat(np.arange(split.n_users), np.diff(split.offsets))
    unseen = split.new_user[user] | ~split.train_user[user] | (np.arange(len(user)) >= split.train_end[user])
    rng = np.random.default_rng(0)
    items, rating = split.items.copy(), split.rating.copy()
    items[unseen], rating[unseen] = rng.integers(0, split.n_items, unseen.sum()), rng.integers(1, 6, unseen.sum())
    after = state(replace(split, items=items, rating=rating))
    assert unseen.any() and all(torch.equal(before[k], after[k]) for k in before)
    rating[~unseen] = 6 - rating[~unseen]
    moved = state(replace(split, items=items, rating=rating))
    assert not torch.equal(before["weight"], moved["weight"])


@pytest.mark.parametrize("cls", [EmbLR, LLAE, MetaEmb])
def test_nobody_to_learn_from(cls, split, features, ranker):
    nobody = replace(split, new_user=np.ones_like(split.new_user))
    with pytest.raises(ValueError, match="no old user has"):
        cls(ranker, features).prepare(ranker, nobody, 0)
    with pytest.raises(ValueError, match="need a rating"):
        cls(ranker, features).prepare(ranker, replace(split, rating=None), 0)


@pytest.mark.parametrize("name", ["emblr", "llae"])
def test_nothing_is_filled_before_prepare(name, ranker, features, asked):
    e, new, batch = asked
    out = make_fill(name, ranker, features).fill(e, new, batch.user)
    assert torch.equal(out.present, e.present)


# ---------------------------------------------------------------- EmbLR

@pytest.mark.parametrize("l2", [.5, 30.])
def test_ridge_is_least_squares_on_augmented_rows(l2):
    rng = np.random.default_rng(0)
    s, y = one_hot(rng.integers(0, 4, (50, 2)), np.array([0, 4]), 8), rng.normal(size=(50, 3)) + 5
    design = np.vstack([np.hstack([s.toarray(), np.ones((50, 1))]), np.hstack([np.sqrt(l2) * np.eye(8), np.zeros((8, 1))])])
    expected = np.linalg.lstsq(design, np.vstack([y, np.zeros((8, 3))]), rcond=None)[0]
    np.testing.assert_allclose(ridge(s, y, l2), expected, atol=1e-10)


def test_emblr_predicts_the_mean_behaviour(split, features, ranker, asked):
    e, new, batch = asked
    fill = EmbLR(ranker, features, l2=2.)
    fill.prepare(ranker, split, 0)
    likes, items = slow_behaviour(split, True), ranker.embeddings.item_vectors().detach().double().numpy()
    users, start = sorted(likes), ranker.embeddings.attribute_start.numpy()
    k = ranker.embeddings.attribute.num_embeddings
    hot = np.zeros((len(users), k + 1))
    for r, u in enumerate(users): hot[r, [*(features.codes[u] + start), k]] = 1
    mean = np.stack([items[sorted(likes[u])].mean(0) for u in users])
    design = np.vstack([hot, np.sqrt(2.) * np.eye(k, k + 1)])
    weight = np.linalg.lstsq(design, np.vstack([mean, np.zeros((k, 6))]), rcond=None)[0]
    out, length = fill.fill(e, new, batch.user), max(1, round(np.mean([min(len(likes[u]), SLOTS) for u in users])))
    assert int(fill.filled) == length and (out.present[new].sum(1) == length).all()
    for row in new.nonzero()[:20, 0].tolist():
        expected = weight[[*(features.codes[batch.user[row]] + start), k]].sum(0)
        np.testing.assert_allclose(out.behaviour[row, :length].detach().numpy(), np.tile(expected, (length, 1)), atol=1e-6)
    with torch.no_grad(): ranker.embeddings.item.weight.mul_(3)
    before = fill.weight.clone()
    fill.prepare(ranker, split, 1)
    assert not torch.equal(before, fill.weight)                       # refitted to embeddings that moved


# ---------------------------------------------------------------- LLAE

def problem(n=40, k=6, i=15, seed=0):
    """Users with two attributes of three values (so that codes add up to one) and random likes; one item that nobody likes."""
    rng = np.random.default_rng(seed)
    x = (rng.random((n, i)) < .35).astype(float)
    x[:, 3] = 0
    x[np.arange(n), rng.integers(4, i, n)] = 1
    return sparse.csr_array(x), one_hot(rng.integers(0, k // 2, (n, 2)), np.array([0, k // 2]), k)


@pytest.mark.parametrize("weight", [.01, 1., 100.])
def test_sylvester_is_scipys_where_the_equation_has_one_solution(weight):
    rng = np.random.default_rng(0)
    s, x = rng.normal(size=(30, 5)), sparse.csr_array((rng.random((30, 12)) < .4).astype(float))
    a, c = s.T @ s, s.T @ rng.normal(size=(30, 12))
    expected = solve_sylvester(a, weight * (x.T @ x).toarray(), c)
    np.testing.assert_allclose(sylvester(a, x, c, weight), expected, atol=1e-7)
    np.testing.assert_allclose(sylvester(a, x, c, weight, start=expected + .1 * rng.normal(size=c.shape)), expected, atol=1e-7)


def test_sylvester_gives_the_solution_of_least_norm():
    x, s = problem()
    a, c = (s.T @ s).toarray(), (s.T @ x).toarray()
    big = np.kron(a, np.eye(15)) + np.kron(np.eye(6), (x.T @ x).toarray())         # row-major vec(W)
    expected = (np.linalg.pinv(big, rcond=1e-10) @ c.ravel()).reshape(6, 15)
    assert np.linalg.matrix_rank(a) < 6 and np.linalg.matrix_rank(x.toarray()) < 15
    np.testing.assert_allclose(sylvester(a, x, c), expected, atol=1e-7)


def test_sylvester_says_when_it_does_not_get_there():
    x, s = problem()
    with pytest.raises(ValueError, match="did not reach"):
        sylvester((s.T @ s).toarray(), x, (s.T @ x).toarray(), 1e6, rounds=2)


@pytest.mark.parametrize("encoder", [.3, 1., 20.])
def test_llae_solves_its_normal_equations(encoder):
    x, s = problem()
    w, _ = llae(x, s, encoding=encoder, penalty=0, corrupt=0)
    x, s = unit_rows(x).toarray().T, s.toarray().T                                  # columns are users, as in the paper
    left, right = s @ s.T @ w + encoder * w @ x @ x.T, (1 + encoder) * s @ x.T
    np.testing.assert_allclose(left, right, atol=1e-6 * np.abs(right).max())


def slow_llae(x, s, encoder, beta, rank, rounds, noisy):
    """The alternation as the authors' code writes it, with SciPy's solver; a touch of ridge stands for the least norm."""
    unit = lambda m: m / np.maximum(np.linalg.norm(m, axis=0), 1e-300)
    x, noisy, u, values = unit(x), unit(noisy), 0, []
    for _ in range(rounds):
        w = solve_sylvester(s @ s.T + beta * u + 1e-9 * np.eye(len(s)), encoder * noisy @ noisy.T + 1e-9 * np.eye(len(x)), s @ x.T + encoder * s @ noisy.T)
        v, sigma, _ = np.linalg.svd(w)
        u = np.eye(len(s)) - v[:, :rank] @ v[:, :rank].T
        values.append(((x - w.T @ s) ** 2).sum() + encoder * ((w @ noisy - s) ** 2).sum() + beta * (sigma[rank:] ** 2).sum())
    return w, values


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("corrupt", [0., .3])
def test_llae_is_the_authors_alternation(rank, corrupt):
    x, s = problem()
    w, values = llae(x, s, encoding=2., penalty=.5, rank=rank, corrupt=corrupt, seed=4)
    noisy = x.copy()
    noisy.data = noisy.data * (np.random.default_rng(4).random(noisy.nnz) >= corrupt)
    expected, slow = slow_llae(x.toarray().T, s.toarray().T, 2., .5 * 40, rank, 5, noisy.toarray().T)
    np.testing.assert_allclose(values, slow, rtol=1e-5)
    np.testing.assert_allclose(w, expected, atol=1e-4)
    assert (np.diff(values) <= 1e-9 * values[0]).all()


def test_llae_is_where_gradient_descent_ends():
    x, s = problem(n=25, i=8)
    w, values = llae(x, s, penalty=0, corrupt=0)
    xt, st = torch.from_numpy(unit_rows(x).toarray().T), torch.from_numpy(s.toarray().T)
    guess = torch.zeros(6, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(20_000):
        value = ((xt - guess.T @ st) ** 2).sum() + ((guess @ xt - st) ** 2).sum()
        slope, = torch.autograd.grad(value, guess)
        with torch.no_grad(): guess -= .01 * slope
    np.testing.assert_allclose(w, guess.detach().numpy(), atol=1e-6)                # from zero, so of least norm too
    np.testing.assert_allclose(values, [value.item()], rtol=1e-9)


@pytest.mark.parametrize("wrong", [dict(encoding=-1.), dict(penalty=-1.), dict(rank=0), dict(rounds=0), dict(corrupt=1.)])
def test_llae_bad_parameters(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        llae(*problem(), **wrong)


@pytest.mark.parametrize("length", [None, 5])
def test_llae_fills_the_best_items(length, split, features, ranker, asked):
    e, new, batch = asked
    fill = LLAE(ranker, features, length=length)
    fill.prepare(ranker, split, 0)
    w, start = fill.weight.double().numpy(), ranker.embeddings.attribute_start.numpy()
    np.testing.assert_allclose(w, llae(*training_pair(ranker, split, 3.))[0], atol=1e-6)
    out, vectors, n = fill.fill(e, new, batch.user), ranker.embeddings.item_vectors(), length or SLOTS
    for row in new.nonzero()[:40, 0].tolist():
        score = w[features.codes[batch.user[row]] + start].sum(0)
        best = np.argsort(-score, kind="stable")[:n]
        best = best[score[best] > 1e-6]
        assert out.items[row, :len(best)].tolist() == best.tolist() and (out.items[row, n:] == split.n_items).all()
        assert out.present[row].sum() == (out.items[row] < split.n_items).sum()
        torch.testing.assert_close(out.behaviour[row, :len(best)], vectors[best])
    out.behaviour[new].sum().backward()
    assert ranker.embeddings.item.weight.grad.any()


def test_llae_leaves_a_user_of_whom_nothing_is_predicted_empty(split, features, ranker, asked):
    e, new, batch = asked
    fill = LLAE(ranker, features)
    fill.prepare(ranker, split, 0)
    fill.weight[ranker.embeddings.attribute_start] = 0                # as if no old user had an unknown attribute
    user, row = batch.user.clone(), int(new.nonzero()[0, 0])
    user[row] = ranker.embeddings.admit(torch.zeros(1, features.codes.shape[1], dtype=torch.long))
    out = fill.fill(e, new, user)
    assert not out.present[row].any() and not out.behaviour[row].any() and (out.items[row] == split.n_items).all()


# ---------------------------------------------------------------- DropoutNet

def test_dropoutnet_makes_the_right_rows_new(features, ranker, asked):
    e, new, _ = asked
    fill = DropoutNet(ranker, features, p=1.)
    out = fill.view(e, ~new)
    unknown = ranker.embeddings.user.weight[0]
    assert not out.present[~new].any() and not out.behaviour[~new].any() and (out.items[~new] == ranker.embeddings.n_items).all()
    assert (out.user == unknown).all() and torch.equal(out.attributes, e.attributes) and torch.equal(out.target, e.target)
    for value in ("behaviour", "present", "items", "user"):
        assert torch.equal(getattr(out, value)[new], getattr(e, value)[new])
    out.user.sum().backward()
    assert ranker.embeddings.user.weight.grad[0].any() and not ranker.embeddings.user.weight.grad[1:].any()


def test_dropoutnet_drops_whole_questions_with_probability_p_and_none_in_evaluation(features, ranker, asked):
    e, new, _ = asked
    fill, able = DropoutNet(ranker, features, p=.25), e.present.any(1) & ~new
    torch.manual_seed(0)
    gone = 0
    for _ in range(50):
        out = fill.view(e, ~new)
        dropped = able & ~out.present.any(1)
        assert torch.equal(out.present[able & ~dropped], e.present[able & ~dropped]) and torch.equal(out.user[able & ~dropped], e.user[able & ~dropped])
        gone += int(dropped.sum())
    share, n = gone / (50 * int(able.sum())), 50 * int(able.sum())
    assert abs(share - .25) < 4 * (.25 * .75 / n) ** .5
    assert fill.eval().view(e, ~new) is e


# ---------------------------------------------------------------- MetaEmb

@pytest.fixture
def meta(split, features, ranker):
    """In float64, embeddings large enough to matter, and a long inner step."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in ranker.embeddings.parameters(): p.mul_(60)
        for m in ranker.modules():
            if isinstance(m, torch.nn.BatchNorm1d): m.running_mean.normal_(); m.running_var.uniform_(.5, 2)
    fill = MetaEmb(ranker.double(), features, users=6, shots=2, step=.7)
    fill.prepare(ranker, split, 0)
    return fill.double()


def drawn(fill, ranker):
    question, second = fill.draw()
    with torch.no_grad(): asked = ranker.embed(question)
    return question, second, asked


def test_meta_gradient_is_that_of_finite_differences(meta, ranker):
    torch.manual_seed(3)
    question, second, asked = drawn(meta, ranker)

    def value():
        phi = meta.generate(asked.attributes[::4])
        return meta_loss(ranker, phi, some(asked, ~second), question.label[~second], some(asked, second), question.label[second], meta.step, meta.alpha)[0]

    with standing_still(ranker):
        value().backward()
        weight, slope = meta.dense.weight, meta.dense.weight.grad.clone()
        numeric = torch.zeros_like(slope)
        for index in range(weight.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad(): weight.view(-1)[index] += sign * 1e-5
                ends.append(value().item())
                with torch.no_grad(): weight.view(-1)[index] -= sign * 1e-5
            numeric.view(-1)[index] = (ends[0] - ends[1]) / 2e-5
    assert slope.abs().max() > 1e-4
    torch.testing.assert_close(slope, numeric, atol=1e-8, rtol=1e-5)


def test_meta_loss_is_a_loop_over_users_and_of_second_order(meta, ranker):
    question, second, asked = drawn(meta, ranker)
    with standing_still(ranker):
        phi = meta.generate(asked.attributes[::4])
        value, cold, warm = meta_loss(ranker, phi, some(asked, ~second), question.label[~second], some(asked, second), question.label[second], .7, .1)
        slope, = torch.autograd.grad(value, meta.dense.weight)
        total, first_order = [], []
        for u in range(len(phi)):
            rows, mine = torch.arange(4 * u, 4 * u + 4), meta.generate(asked.attributes[4 * u:4 * u + 1])
            at = lambda p, where: binary_cross_entropy_with_logits(ranker.score(replace(some(asked, where), user=p.expand(2, -1))), question.label[where].double())
            a = at(mine, rows[:2])
            step, = torch.autograd.grad(a, mine, create_graph=True)
            total.append(.1 * a + .9 * at(mine - .7 * step, rows[2:]))
            first_order.append(.1 * a + .9 * at(mine - .7 * step.detach(), rows[2:]))
        torch.testing.assert_close(value, torch.stack(total).mean())
        torch.testing.assert_close(slope, torch.autograd.grad(torch.stack(total).mean(), meta.dense.weight, retain_graph=True)[0])
        other, = torch.autograd.grad(torch.stack(first_order).mean(), meta.dense.weight)
    assert not torch.allclose(slope, other, rtol=1e-3)


def test_only_the_generator_is_trained_and_the_ranker_stands_still(meta, ranker):
    ranker.train()
    ranker.network[0].eval()
    modes, state = [m.training for m in ranker.modules()], {k: v.clone() for k, v in ranker.state_dict().items()}
    meta.loss(None, None, None, ranker)[0].backward()
    assert has_gradient(meta) and all(p.grad is None and p.requires_grad for p in ranker.parameters())
    assert modes == [m.training for m in ranker.modules()] and all(torch.equal(v, state[k]) for k, v in ranker.state_dict().items())


def test_metaemb_draws_disjoint_training_questions_of_old_users(meta, split):
    seen = {}
    for u in range(split.n_users):
        if split.train_user[u] and not split.new_user[u]:
            rows = range(split.offsets[u], split.train_end[u])
            seen[u] = sorted((int(split.items[i]), float(split.rating[i] > 3)) for i in rows)
    for _ in range(20):
        question, second = meta.draw()
        assert not len(question.history) and not question.offsets.any() and not question.length.any() and len(question.offsets) == len(question) + 1
        users = question.user.view(-1, 4)
        assert (users == users[:, :1]).all() and len(set(users[:, 0].tolist())) == len(users) == 6
        assert second.view(-1, 4).tolist() == [[False, False, True, True]] * 6
        for u, pairs in zip(users[:, 0].tolist(), zip(question.candidate.view(-1, 4).tolist(), question.label.view(-1, 4).tolist())):
            left = list(seen[u])
            for pair in zip(*pairs): left.remove(pair)                # each question at most as often as it occurs


def test_metaemb_replaces_the_id_of_new_users(split, features, ranker, asked):
    e, new, batch = asked
    fill = MetaEmb(ranker, features)
    out = fill.fill(e, new, batch.user)
    expected = torch.tanh(e.attributes.flatten(1) @ fill.dense.weight.T) / 5
    torch.testing.assert_close(out.user[new], expected[new])
    assert torch.equal(out.present, e.present) and torch.equal(out.behaviour, e.behaviour)
    with pytest.raises(ValueError, match="call prepare"):
        fill.loss(None, None, None, ranker)
    with pytest.raises(ValueError, match="shots=500: no old user has 1000"):
        MetaEmb(ranker, features, shots=500).prepare(ranker, split, 0)
