"""The synthetic world: what the truth says is what the data do."""
from dataclasses import fields, replace

import numpy as np
import polars as pl
import pytest
from scipy.stats import chisquare, kstest

from l2rec.data.synthetic import ATTRIBUTES, COMPONENTS, THEMES, TOPICS, SyntheticWorld, World, make_world, oracle_scores

SMALL = SyntheticWorld(n_users=300, n_items=300, n_topics=6, n_themes=3, n_looks=3, n_groups=10, mean_length=14, max_length=40)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def small() -> World:
    return make_world(SMALL)


def content(world: World) -> list[bytes]:
    d, t = world.dataset, world.truth
    arrays = [d.interactions[c].to_numpy() for c in d.interactions.columns] + [f.values for f in d.features.values()] + [f.item_id for f in d.features.values()]
    for part in (t, t.items, t.users):
        arrays += [getattr(part, f.name) for f in fields(part) if isinstance(getattr(part, f.name), np.ndarray)]
    return [a.tobytes() for a in arrays] + [d.items.write_json().encode(), d.users.write_json().encode()]


def test_same_seed_same_bytes(small):
    assert content(small) == content(make_world(SMALL))
    assert content(small) != content(make_world(replace(SMALL, seed=1)))


def test_parts_have_streams_of_their_own(small):
    more = make_world(replace(SMALL, n_users=500))
    assert more.dataset.items.equals(small.dataset.items)
    assert np.array_equal(more.dataset.features["image"].values, small.dataset.features["image"].values)
    stirred = make_world(replace(SMALL, image_noise=0.1, rating_noise=0.1))
    assert np.array_equal(stirred.truth.item, small.truth.item)


def test_canonical_dataset(world):
    d, c = world.dataset, world.truth.config
    assert d.name == "synthetic" and d.n_users == c.n_users == d.users.height and d.items.height == c.n_items
    assert 30_000 < d.n_interactions < 40_000
    assert d.interactions.schema["user_id"] == pl.Int32 and d.interactions.schema["rating"] == pl.Float32
    assert set(d.interactions["rating"].unique()) == {1, 2, 3, 4, 5}
    assert d.features["image"].values.dtype == np.float16 and d.features["image"].values.shape == (900, c.image_width)
    assert d.manifest["parameters"]["seed"] == 0
    assert set(ATTRIBUTES) <= set(d.users.columns)


def test_folder_round_trip(small, tmp_path):
    from l2rec.data.dataset import read_dataset, write_dataset

    write_dataset(small.dataset, tmp_path / "synthetic")
    again = read_dataset(tmp_path / "synthetic")
    assert again.interactions.equals(small.dataset.interactions) and again.items.equals(small.dataset.items)


def test_truth_is_aligned_with_the_rows(world):
    t, rows = world.truth, world.dataset.interactions
    assert np.array_equal(rows["user_id"].to_numpy(), t.user) and np.array_equal(rows["item_id"].to_numpy(), t.item)
    assert np.array_equal(rows["timestamp"].to_numpy() - rows["timestamp"][0], t.when - t.when[0])
    assert len(t.component) == len(t.affinity) == len(t.progress) == rows.height
    assert np.array_equal(np.bincount(t.user), t.users.length) and np.array_equal(np.diff(t.offset), t.users.length)
    assert np.corrcoef(t.affinity, rows["rating"].to_numpy())[0, 1] > 0.6


def test_time_increases_and_nobody_meets_an_item_twice_or_before_its_release(world):
    t = world.truth
    within = t.user[1:] == t.user[:-1]
    assert (np.diff(t.when)[within] > 0).all()
    assert len(np.unique(t.user.astype(np.int64) * 1000 + t.item)) == len(t.item)
    assert (t.when >= t.items.release[t.item]).all() and t.when.min() >= 0


def test_repeats_are_a_switch():
    t = make_world(replace(SMALL, repeats=True)).truth
    assert len(np.unique(t.user.astype(np.int64) * 1000 + t.item)) < len(t.item)


@pytest.mark.parametrize("shares", [(0.5, 0.4, 0.1), (0.2, 0.2, 0.6), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
def test_proportions_are_as_configured(shares):
    c = replace(SMALL, n_users=1000, **dict(zip(COMPONENTS, shares)))
    measured = np.bincount(make_world(c).truth.component, minlength=3) / len(make_world(c).truth.component)
    assert np.abs(measured - shares).max() < 0.025


def test_cold_and_missing_shares(world):
    t, c = world.truth, world.truth.config
    assert t.users.cold.mean() == c.cold_user_share and t.items.cold.mean() == c.cold_item_share
    assert np.array_equal(t.users.length < c.cold_length, t.users.cold) and t.users.length.min() == 3 and t.users.length.max() <= c.max_length
    assert abs(t.users.length[~t.users.cold].mean() - c.mean_length) < 1
    count = np.bincount(t.item, minlength=c.n_items)
    assert count[t.items.cold].mean() < 0.25 * count[~t.items.cold].mean()
    assert (~t.items.has_text).mean() == 0.05 and (~t.items.has_image).mean() == 0.1 and (t.items.has_text | t.items.has_image).all()
    assert np.array_equal((world.dataset.items["text"] != "").to_numpy(), t.items.has_text)
    assert np.array_equal(world.dataset.features["image"].item_id, np.flatnonzero(t.items.has_image))


def test_popularity_has_a_long_tail(world):
    count = np.sort(np.bincount(world.truth.item, minlength=1000))[::-1]
    assert count[:100].sum() > 2 * 0.1 * count.sum() and count[0] > 4 * np.median(count)


def nearest_centroid_accuracy(features: np.ndarray, label: np.ndarray) -> float:
    half = np.arange(len(label)) % 2 == 0
    centroid = np.stack([features[half][label[half] == k].mean(0) for k in range(label.max() + 1)])
    centroid /= np.linalg.norm(centroid, axis=1, keepdims=True)
    return float(((features[~half] @ centroid.T).argmax(1) == label[~half]).mean())


def test_what_text_and_image_tell(world):
    from sklearn.feature_extraction.text import TfidfVectorizer

    t, i = world.truth, world.truth.items
    rows = np.flatnonzero(i.has_text & i.has_image)
    text = TfidfVectorizer().fit_transform((world.dataset.items["title"] + " " + world.dataset.items["text"]).to_list()).toarray()[rows]
    place = np.full(t.config.n_items, -1)
    place[world.dataset.features["image"].item_id] = np.arange(len(world.dataset.features["image"].item_id))
    image = world.dataset.features["image"].values.astype(np.float64)[place[rows]]
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    tells = {(m, f): nearest_centroid_accuracy(x, getattr(i, f)[rows]) for m, x in (("text", text), ("image", image)) for f in ("topic", "theme", "look", "community")}
    assert tells["text", "topic"] > 0.95 and tells["text", "theme"] > 0.9 and tells["image", "topic"] > 0.7 and tells["image", "look"] > 0.7
    assert tells["text", "look"] < 0.25 and tells["image", "theme"] < 0.25       # chance 0.167
    assert tells["text", "community"] < 0.1 and tells["image", "community"] < 0.1  # chance 0.05


def test_text_carries_the_continuous_factor(world):
    """Within a topic, items with near factors share more words."""
    i, words = world.truth.items, [set(t.lower().replace(",", " ").replace(".", " ").replace(";", " ").split()) for t in world.dataset.items["text"]]
    topical = set(" ".join(w for d in TOPICS.values() for w in d.values()).split())
    near, far = [], []
    for k in range(world.truth.config.n_topics):
        rows = np.flatnonzero((i.topic == k) & i.has_text)
        x = i.shared[rows] - i.shared[rows].mean(0)
        cosine = (x @ x.T) / np.linalg.norm(x, axis=1) / np.linalg.norm(x, axis=1)[:, None]
        for a in range(len(rows)):
            for b in range(a):
                shared = len(words[rows[a]] & words[rows[b]] & topical)
                if cosine[a, b] > 0.3: near.append(shared)
                elif cosine[a, b] < -0.3: far.append(shared)
    assert np.mean(near) > np.mean(far) + 0.3


def test_words_belong_to_one_label():
    words = " ".join([w for d in TOPICS.values() for w in d.values()] + list(THEMES.values())).split()
    assert len(words) == len(set(words)) == 276


def test_factors_and_communities_are_independent(world):
    i = world.truth.items
    for one in (i.topic, i.theme, i.look):
        table = np.zeros((one.max() + 1, 20))
        np.add.at(table, (one, i.community), 1)
        assert chisquare(table.ravel(), np.full(table.size, table.mean()), ddof=one.max() + 19).pvalue > 1e-3
    assert np.array_equal(i.community[i.successors], np.repeat(i.community[:, None], 5, axis=1))
    assert (i.successors != np.arange(1000)[:, None]).all() and (np.bincount(i.successors.ravel()) == 5).all()


def test_attributes_tell_the_preference_in_part(world):
    u = world.truth.users
    logits = np.log(u.start) - np.log(u.start).mean(1, keepdims=True)
    design = np.concatenate([np.eye(len(ATTRIBUTES[name]))[value] for name, value in u.attributes.items()], axis=1)
    train = np.arange(len(logits)) % 2 == 0
    fit = np.linalg.lstsq(design[train], logits[train], rcond=None)[0]
    r2 = 1 - ((logits[~train] - design[~train] @ fit) ** 2).sum() / (logits[~train] ** 2).sum()
    assert 0.4 < r2 < 0.55  # configured: 0.5
    assert not u.effects["region"].any()
    community = np.array([np.bincount(u.community[u.attributes["occupation"] == k], minlength=20) for k in range(12)])
    assert chisquare(community.ravel(), np.outer(community.sum(1), community.sum(0)).ravel() / community.sum(), ddof=30).pvalue > 1e-3


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_attribute_signal_at_its_limits(signal):
    u = make_world(replace(SMALL, attribute_signal=signal)).truth.users
    told = np.exp(u.explained) / np.exp(u.explained).sum(1, keepdims=True)
    assert np.allclose(told, u.start) == (signal == 1.0) and (signal == 1.0 or not u.explained.any())


def slow_oracle(world: World, row: int) -> np.ndarray:
    """The formulas, item by item in plain Python."""
    t, c = world.truth, world.truth.config
    i, u, user = t.items, t.users, t.user[row]
    past = [int(x) for x in t.item[t.offset[user]:row]]
    part = {name: [0.0] * c.n_items for name in COMPONENTS}
    topic_weight = [sum(i.weight[j] for j in range(c.n_items) if i.topic[j] == k) for k in range(c.n_topics)]
    home_weight = sum(i.weight[j] for j in range(c.n_items) if i.community[j] == u.community[user])
    harmonic = lambda n: [1 / k / sum(1 / m for m in range(1, n + 1)) for k in range(1, n + 1)]
    for j in range(c.n_items):
        if j in past or i.release[j] > t.when[row]: continue
        preference = (1 - t.progress[row]) * u.start[user][i.topic[j]] + t.progress[row] * u.end[user][i.topic[j]]
        p = preference * i.weight[j] / topic_weight[i.topic[j]]
        if i.theme[j] != u.theme[user]: p *= 1 - c.theme_taste
        if i.look[j] != u.look[user]: p *= 1 - c.look_taste
        part["semantic"][j] = p
        home = i.weight[j] / home_weight if i.community[j] == u.community[user] else 0.0
        follows = sum(b * s for k, b in enumerate(harmonic(c.memory), 1) for r, s in enumerate(harmonic(c.n_successors))
                      if past and i.successors[past[-min(k, len(past))]][r] == j)
        part["behavioural"][j] = c.chain * follows + (1 - c.chain) * home if past else home
        part["noise"][j] = i.weight[j]
    return sum(u.shares[user][k] * np.array(part[name]) / sum(part[name]) for k, name in enumerate(COMPONENTS))


def test_oracle_against_plain_python(small):
    t = small.truth
    rows = np.array([0, 1, 2, t.offset[5], t.offset[7] - 1, t.offset[200] - 1, len(t.item) - 1])
    fast = oracle_scores(t, rows)
    assert np.allclose(fast, [slow_oracle(small, row) for row in rows], atol=1e-12)
    assert np.allclose(fast.sum(1), 1)
    separate = sum(oracle_scores(t, rows, (name,)) for name in COMPONENTS)
    assert np.allclose(separate, fast)


@pytest.mark.parametrize("change", [{}, dict(semantic=1.0, behavioural=0.0, noise=0.0, theme_taste=0.99, sharpness=6.0),
                                    dict(semantic=0.0, behavioural=1.0, noise=0.0, memory=3), dict(repeats=True)])
def test_histories_follow_the_oracle(change):
    """The sampler draws from the stated distribution: the randomised probability transform of what happened is uniform, in any order of the items."""
    t = make_world(replace(SMALL, n_users=400, **change)).truth
    p = oracle_scores(t, np.arange(len(t.item)))
    own = p[np.arange(len(p)), t.item]
    assert (own > 0).all()  # nothing impossible happened
    rng = np.random.default_rng(0)
    orders = {"id": np.arange(300) + np.zeros_like(p), "popularity": t.items.weight + np.zeros_like(p), "probability": p,
              "theme": (t.items.theme == t.users.theme[t.user][:, None]) + 0.0, "look": (t.items.look == t.users.look[t.user][:, None]) + 0.0}
    for name, order in orders.items():
        mine = order[np.arange(len(p)), t.item][:, None]
        transform = (p * (order < mine)).sum(1) + rng.random(len(p)) * (p * (order == mine)).sum(1)
        assert kstest(transform, "uniform").pvalue > 1e-4, name


def test_oracle_refuses_bad_arguments(small):
    with pytest.raises(ValueError, match="parts: unknown"): oracle_scores(small.truth, np.array([0]), ("magic",))
    with pytest.raises(ValueError, match="rows must lie between 0"): oracle_scores(small.truth, np.array([10**7]))


def test_neither_part_alone_explains_the_data(world):
    t = world.truth
    last = t.offset[1:] - 1
    hits = {}
    for parts in (("semantic",), ("behavioural",), COMPONENTS, ("noise",)):
        scores = oracle_scores(t, last, parts)
        hits[parts] = ((scores > scores[np.arange(len(last)), t.item[last]][:, None]).sum(1) < 10).mean()
    assert hits["noise",] < 0.5 * min(hits["semantic",], hits["behavioural",])
    assert hits[COMPONENTS] > 1.2 * max(hits["semantic",], hits["behavioural",])


def test_preference_drifts():
    still, drifting = make_world(replace(SMALL, drift=0.0)).truth.users, make_world(replace(SMALL, drift=1.0)).truth.users
    assert np.array_equal(still.start, still.end)
    assert np.abs(drifting.start - drifting.end).sum(1).mean() > 0.3 and np.allclose(drifting.end.sum(1), 1)


@pytest.mark.parametrize("bad, name", [
    (dict(n_users=0), "n_users"), (dict(n_users=10.5), "n_users"), (dict(n_users=True), "n_users"), (dict(n_items="many"), "n_items"), (dict(seed=-1), "seed"),
    (dict(n_topics=25), "n_topics"), (dict(n_themes=7), "n_themes"), (dict(drift=float("nan")), "drift"), (dict(drift=1.2), "drift"),
    (dict(semantic=0.9), "semantic \\+ behavioural \\+ noise"), (dict(cold_length=200), "cold_length"), (dict(mean_length=9.0), "mean_length"),
    (dict(max_length=500), "max_length"), (dict(n_groups=500), "n_successors"), (dict(repeats=1), "repeats"), (dict(cold_item_share=0.95), "cold_item_share"),
    (dict(missing_text_share=0.6, missing_image_share=0.6), "missing_text_share"), (dict(image_width=0), "image_width"), (dict(rating_noise=-1), "rating_noise")])
def test_bad_parameters_are_named(bad, name):
    with pytest.raises(ValueError, match=name): SyntheticWorld(**bad)


@pytest.mark.parametrize("corner", [
    dict(n_users=1), dict(n_themes=1, n_looks=1, n_topics=2), dict(cold_user_share=1.0), dict(cold_user_share=0.0, cold_item_share=0.0), dict(memory=100),
    dict(missing_text_share=0.0, missing_image_share=1.0), dict(missing_text_share=1.0, missing_image_share=0.0), dict(chain=1.0, n_successors=1),
    dict(n_users=20, n_groups=25, semantic=0.0, behavioural=1.0, noise=0.0, cold_item_share=0.0, max_length=75, mean_length=60)])
def test_corners_work(corner):
    made = make_world(replace(SMALL, **corner))
    assert made.dataset.n_interactions == len(made.truth.item) and made.truth.item.min() >= 0
    if corner.get("missing_image_share") == 1.0: assert "image" not in made.dataset.features
    p = oracle_scores(made.truth, np.arange(min(200, len(made.truth.item))))
    assert np.allclose(p.sum(1), 1)


def test_two_hundred_thousand_interactions_stay_small():
    import tracemalloc

    tracemalloc.start()
    made = make_world(SyntheticWorld(n_users=10_000, n_items=5_000, n_groups=100, mean_length=24.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.dataset.n_interactions > 200_000 and peak < 200e6
