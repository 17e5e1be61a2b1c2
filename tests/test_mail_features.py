"""Codes, questions and behaviour slots against loops over lists; attribute tables as they come."""

import json
import warnings
from dataclasses import replace
from datetime import date

import numpy as np
import polars as pl
import pytest
import torch

from l2rec.data.batches import Clicks
from l2rec.data.dataset import DataError, make_dataset
from l2rec.data.splits import global_time, leave_last_fraction, leave_last_out, new_users, training_fraction
from l2rec.hisam.histories import shortened
from l2rec.mail.features import Attributes, Field, Impressions, Question, Questions, behaviour_slots, fit_attributes, fit_field, make_features
from worlds import dataset, random_dataset


def people(ids, seed=0):
    """A table of users with a category, a number, a truth value and a postal code; some values missing."""
    rng = np.random.default_rng(seed)
    n = len(ids)
    return pl.DataFrame({"user_id": pl.Series(ids, dtype=pl.Int32), "town": rng.choice(["Cork", "Galway", "Sligo"], n).tolist(),
                         "age": [None if rng.random() < .1 else int(a) for a in rng.integers(18, 80, n)], "member": (rng.random(n) < .5).tolist(),
                         "zip_code": [f"{z:05d}" for z in rng.integers(0, 99999, n)]})


def world(seed=0, **about):
    """A random dataset with users, categories, brands, and a context column."""
    base = random_dataset(n_users=80, seed=seed, high=20)
    rng = np.random.default_rng(seed)
    ids = base.items["item_id"]
    items = pl.DataFrame({"item_id": ids, "categories": [[str(c) for c in rng.choice(list("abcde"), rng.integers(0, 4))] for _ in ids],
                          "brand": rng.choice(["x", "y", "z", None], len(ids)).tolist()}, schema_overrides={"brand": pl.String})
    interactions = base.interactions.with_columns(place=pl.Series(rng.choice(["top", "side", "foot"], base.n_interactions)), page=pl.Series(rng.integers(1, 4, base.n_interactions)))
    return make_dataset("small", interactions, items, people(base.interactions["user_id"].unique().sort().to_list(), seed), **about)


# ---- one attribute


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [1, 5])
def test_category_codes_are_a_loop(seed, least):
    rng = np.random.default_rng(seed)
    values = [None if v == "" else v for v in rng.choice(["", "a", "b", "c", "d"], 60, p=[.1, .5, .3, .07, .03]).tolist()]
    field = fit_field(pl.Series("v", values, dtype=pl.String), "category", least=least)
    common = sorted(v for v in set(values) - {None} if values.count(v) >= least)
    assert field.values == ("unknown", *common) and field.n == 1 + len(common)
    asked = [*values, "new", "", "  ", " a "]
    cleaned = [v.strip() if v else v for v in asked]
    assert field.encode(pl.Series("v", asked, dtype=pl.String)).tolist() == [1 + common.index(v) if v in common else 0 for v in cleaned]


def test_a_value_called_unknown_is_unknown():
    field = fit_field(pl.Series("v", ["unknown"] * 9 + ["a"] * 9), "category")
    assert field.values == ("unknown", "a") and field.encode(pl.Series(["unknown", "a"])).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_bins_have_equal_shares(seed):
    values = np.random.default_rng(seed).normal(size=1000)
    field = fit_field(pl.Series("v", values), "number", bins=8)
    code = field.encode(pl.Series("v", values))
    assert field.n == 9 and np.abs(np.bincount(code)[1:] - 125).max() <= 1
    for value, k in zip(values, code):
        assert (k == 1 or field.edges[k - 2] <= value) and (k == 8 or value < field.edges[k - 1])
    assert field.encode(pl.Series("v", [-99., 99., None, float("nan"), float("inf")])).tolist() == [1, 8, 0, 0, 0]


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt16, pl.Int64, pl.Float32, pl.String])
def test_few_numbers_have_a_bin_each(dtype):
    field = fit_field(pl.Series("v", [1, 1, 2, 2, 7, 7] * 3).cast(dtype), "number")
    assert field.encode(pl.Series("v", [1, 2, 7, 0, 5, 9]).cast(dtype)).tolist() == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bins,least", [(2, 1), (4, 5), (10, 5), (10, 20)])
def test_no_bin_is_nearly_empty(seed, bins, least):
    values = np.random.default_rng(seed).geometric(.3, 90).astype(float)
    field = fit_field(pl.Series("v", values), "number", bins=bins, least=least)
    code = field.encode(pl.Series("v", values)) if field.edges else np.ones(90, int)
    assert np.bincount(code)[1:].min() >= least and field.n - 1 <= max(bins, len(np.unique(values)))
    assert list(field.edges) == sorted(set(field.edges))


def test_kinds_of_columns():
    table = pl.DataFrame({"user_id": range(12), "truth": [True, False] * 6, "colour": pl.Series(["r", "g", "b"] * 4, dtype=pl.Categorical), "number": list(range(12)),
                          "code": [3, 5] * 6, "text": [str(30 + i) for i in range(12)], "zip_code": ["12345", "12999", "22222"] * 4})
    made = fit_attributes(table, np.arange(12), least=2, bins=3, kinds={"code": "category", "text": "number"})
    assert made.names == ("truth", "colour", "number", "code", "text", "zip_code")
    assert [field.values[1:] for field in made.fields] == [("false", "true"), ("b", "g", "r"), ("below 4", "4 to below 8", "8 and above"), ("3", "5"),
                                                           ("below 34", "34 to below 38", "38 and above"), ("1", "2")]
    codes = made.encode(table, np.array([0, 11]))
    assert codes.dtype == np.int64 and codes.tolist() == [[2, 3, 1, 1, 1, 1], [1, 1, 3, 2, 3, 2]]


# ---- all attributes


def test_users_without_a_row_and_other_orders():
    table = people(range(50))
    made = fit_attributes(table, np.arange(50))
    codes = made.encode(table, np.arange(50, dtype=np.int32))
    asked = np.array([7, 999, 3, 7], dtype=np.int32)
    assert made.encode(table.sample(fraction=1., shuffle=True, seed=1), asked).tolist() == [codes[7].tolist(), [0] * 4, codes[3].tolist(), codes[7].tolist()]
    assert made.encode(table, np.zeros(0, np.int32)).shape == (0, 4) and made.encode(None, asked).tolist() == [[0] * 4] * 4
    assert made.encode(table.with_columns(pl.col("user_id").cast(pl.Int64)), asked).tolist() == made.encode(table, asked).tolist()


def test_only_the_given_users_define_the_books():
    table = people(range(60)).with_columns(town=pl.Series(["Cork"] * 20 + ["Galway"] * 20 + ["Rome"] * 20))
    made = fit_attributes(table, np.arange(40), columns=["town"])
    assert made.fields[0].values == ("unknown", "Cork", "Galway")
    assert made.encode(table, np.array([0, 39, 59])).tolist() == [[1], [2], [0]]


def test_ids_are_texts():
    table = people(range(20)).with_columns(user_id=pl.Series([f"u{i}" for i in range(20)]))
    made = fit_attributes(table, table["user_id"].to_numpy(), columns=["town", "member"])
    assert made.encode(table, np.array(["u3", "nobody"]))[1].tolist() == [0, 0] and (made.encode(table, np.array(["u3"])) > 0).all()
    with pytest.raises(DataError, match="user_id.*Write ids in one way"):
        made.encode(table, np.array([3]))


def test_json_round_trip():
    table = people(range(80))
    made = fit_attributes(table, np.arange(80))
    back = Attributes.from_json(made.to_json())
    assert back == made and np.array_equal(back.encode(table, np.arange(80)), made.encode(table, np.arange(80)))
    assert isinstance(json.loads(made.to_json()), dict)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"attributes": [{"name": "a"}]}', '{"attributes": 3}'])
def test_json_of_something_else(text):
    with pytest.raises(DataError, match="no attributes written by"):
        Attributes.from_json(text)


# ---- bad tables


@pytest.mark.parametrize("change,arguments,message", [
    (None, {}, "no table of users"),
    (lambda t: t, dict(columns=["gendr"]), "column gendr is missing"),
    (lambda t: t, dict(columns=["membr"]), "Did you mean 'member'"),
    (lambda t: t, dict(prefix={"zip_cod": 1}), "Did you mean 'zip_code'"),
    (lambda t: t, dict(kinds={"agee": "number"}), "Did you mean 'age'"),
    (lambda t: t, dict(kinds={"age": "numeric"}), "'category' or 'number'"),
    (lambda t: t, dict(prefix={"zip_code": -1}), "prefix"),
    (lambda t: t, dict(bins=1), "at least 2 bins"),
    (lambda t: t.drop("user_id"), {}, "column user_id is missing"),
    (lambda t: t.with_columns(user_id=pl.lit(3, pl.Int32)), {}, "row 1.*has a row already"),
    (lambda t: t.select("user_id", x=pl.lit("same")), {}, "no attribute is usable among x"),
    (lambda t: t.select("user_id"), {}, "no attribute is usable"),
    (lambda t: t.select("user_id", x=pl.col("user_id").cast(pl.String)), {}, "no attribute is usable"),
    (lambda t: t.with_columns(user_id=pl.col("user_id") + 1000), {}, "none of the 60 users"),
    (lambda t: t.with_columns(born=date(2000, 1, 1)), dict(columns=["born"]), "column born: the type is Date"),
    (lambda t: t, dict(columns=["town"], kinds={"town": "number"}), "column town, row 0.*no number"),
])
@pytest.mark.filterwarnings("ignore:users")
def test_bad_tables(change, arguments, message):
    with pytest.raises(DataError, match=message):
        table = change(people(range(60))) if change else None
        fit_attributes(table, np.arange(60), **arguments).encode(table, np.arange(60))


def test_columns_left_out_are_named():
    table = people(range(60)).with_columns(born=date(2000, 1, 1), country=pl.lit("IE"), nothing=pl.lit(None), name=pl.Series([f"n{i}" for i in range(60)]), flag=pl.lit(1.))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = fit_attributes(table, np.arange(60))
    assert made.names == ("town", "age", "member", "zip_code")
    for name, warning in zip(("born", "country", "nothing", "name", "flag"), caught, strict=True):
        assert f"column {name} is left out" in str(warning.message)


def test_one_value_or_nothing_is_an_attribute():
    table = pl.DataFrame({"user_id": range(20), "vip": ["yes", None] * 10})
    assert fit_attributes(table, np.arange(20)).encode(table, np.arange(4)).tolist() == [[1], [0], [1], [0]]


def test_a_new_table_with_wrong_columns():
    made = fit_attributes(people(range(60)), np.arange(60))
    with pytest.raises(DataError, match="column age is missing.*Rename 'ages' to 'age'"):
        made.encode(people(range(5)).rename({"age": "ages"}), np.arange(5))
    with pytest.raises(DataError, match="new.csv, column age, row 1: the value is no number"):
        made.encode(people(range(3)).with_columns(age=pl.Series(["20", "old", ""])), np.arange(3), "new.csv")
    typed = people(range(3)).with_columns(pl.col("age").cast(pl.String), pl.col("member").cast(pl.String))
    assert np.array_equal(made.encode(typed, np.arange(3)), made.encode(people(range(3)), np.arange(3)))


# ---- features of a split


@pytest.mark.parametrize("seed", range(3))
def test_features_are_loops(seed):
    data = world(seed)
    split = new_users(leave_last_fraction(data), .4, seed)
    features = make_features(data, split, context=["place", "page"], least=1, kinds={"page": "category"})
    items = {row["item_id"]: row for row in data.items.iter_rows(named=True)}
    names = sorted({c for i in split.item_id for c in items[i]["categories"]})
    brands = [items[i]["brand"] for i in split.item_id]
    kept = sorted(b for b in set(brands) - {None} if brands.count(b) >= 2)
    assert features.n_categories == len(names) and features.n_brands == 1 + len(kept) and features.n_items == split.n_items and features.n_users == split.n_users
    for row, item in enumerate(split.item_id):
        a, b = features.category_offsets[row:row + 2]
        assert features.category[a:b].tolist() == sorted(names.index(c) for c in set(items[item]["categories"]))
        assert features.brand[row] == (1 + kept.index(brands[row]) if brands[row] in kept else 0)
    assert features.category_offsets[-1] == len(features.category) and features.category.dtype == features.brand.dtype == features.codes.dtype == np.int64
    assert features.askable.all() and features.n_context == (4, 4)
    for (place, page), code in zip(data.interactions.select("place", "page").rows(), features.context, strict=True):
        assert features.context_fields[0].values[code[0]] == place and features.context_fields[1].values[code[1]] == str(page)
    assert np.array_equal(features.new_user, split.new_user)


def test_context_book_is_of_training_alone():
    data = dataset({1: [1, 2, 3, 4], 2: [1, 2, 3, 4]}, rating=[5.] * 8)
    data = make_dataset("small", data.interactions.with_columns(place=pl.Series(["a", "b", "c", "d"] * 2)), users=pl.DataFrame({"user_id": [1, 2], "sex": ["F", "M"]}))
    split = leave_last_out(data)
    assert make_features(data, split, context=["place"], least=1).context[:, 0].tolist() == [1, 2, 0, 0] * 2
    half = training_fraction(split, .5)
    lone = pl.DataFrame({"user_id": [1, 2], "sex": ["F", "M"]})
    with pytest.raises(DataError, match="no attribute is usable"), pytest.warns(UserWarning, match="tells nobody apart"):
        make_features(make_dataset("small", data.interactions, users=lone), half, least=1)


@pytest.mark.filterwarnings("ignore:dataset small")
def test_items_without_anything():
    data = random_dataset(seed=3)
    data = make_dataset("small", data.interactions, users=people(data.interactions["user_id"].unique().to_list()))
    features = make_features(data, leave_last_out(data))
    assert features.n_categories == 0 and len(features.category) == 0 and not features.category_offsets.any() and features.n_brands == 1 and not features.brand.any()
    assert features.context is None and features.n_context == ()


def test_the_manifest_names_the_context():
    data = world()
    split, told = leave_last_out(data), replace(data, manifest={**data.manifest, "context": ["place"]})
    features = make_features(told, split, least=1)
    assert [f.name for f in features.context_fields] == ["place"] and (features.context == make_features(data, split, context=["place"], least=1).context).all()
    assert make_features(told, split, context=[]).context is None and make_features(data, split).context is None
    for wrong in ("place", [1]):
        with pytest.raises(DataError, match="manifest: context=.*a list of names"):
            make_features(replace(data, manifest={**data.manifest, "context": wrong}), split)
    with pytest.raises(DataError, match="column plce is missing"):
        make_features(replace(data, manifest={**data.manifest, "context": ["plce"]}), split)


def test_features_of_bad_data():
    data = world()
    split = leave_last_out(data)
    with pytest.raises(DataError, match="no table of users"):
        make_features(make_dataset("bare", data.interactions), split)
    with pytest.raises(DataError, match="column plce is missing.*'place'"):
        make_features(data, split, context=["plce"])
    with pytest.raises(DataError, match="Make the split of this dataset"):
        make_features(data, leave_last_out(random_dataset(n_users=10)))


def test_features_of_a_split_with_shortened_histories():
    data = world()
    whole = leave_last_fraction(data)
    short = shortened(whole, .5, 3)
    assert len(short.items) < len(whole.items)
    assert (make_features(data, short).codes == make_features(data, whole).codes).all()
    with pytest.raises(DataError, match="the context of a question cannot be found.*context=\\[\\]"):
        make_features(data, short, context=["place"])


# ---- questions


def slow_questions(data, split, part, max_length, liked_only, askable):
    """Every question as a tuple, from the table alone."""
    out = []
    for u, user in enumerate(split.user_id):
        rows = data.interactions.filter(pl.col("user_id") == user).sort("position")
        item = [int(np.flatnonzero(split.item_id == i)[0]) for i in rows["item_id"]]
        like = [r > 3 for r in rows["rating"]]
        first, last = (int(e[u] - split.offsets[u]) for e in split.bounds(part))
        for k in range(first, last):
            if (part == "train" and not split.train_user[u]) or not askable[item[k]]:
                continue
            past = [(i, float(l)) for i, l in zip(item[:k], like[:k]) if l or not liked_only][-max_length:]
            out.append((u, item[k], float(like[k]), [] if split.new_user[u] else past, rows["place"][k]))
    return out


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("liked_only", [True, False])
@pytest.mark.parametrize("max_length", [1, 4, 100])
@pytest.mark.parametrize("cut", [leave_last_fraction, global_time])
def test_questions_and_slots_are_loops(part, liked_only, max_length, cut):
    data = world(5, behaviour_items_from=110)
    split = training_fraction(new_users(cut(data), .3), .8)
    features = make_features(data, split, context=["place"], least=1)
    assert 0 < features.askable.sum() < split.n_items
    units = Questions(split, features, part, max_length, liked_only=liked_only)
    expected = slow_questions(data, split, part, max_length, liked_only, features.askable)
    assert len(units) == len(expected)
    order = np.random.default_rng(0).permutation(len(units))
    batch = units[order]
    assert isinstance(batch, Question) and len(batch) == len(order) and torch.equal(batch.length, batch.offsets.diff())
    items, present = behaviour_slots(batch, 6)
    for b, k in enumerate(order):
        user, item, label, past, place = expected[k]
        a, z = batch.offsets[b:b + 2].tolist()
        assert (batch.user[b], batch.candidate[b], batch.label[b]) == (user, item, label)
        assert list(zip(batch.history[a:z].tolist(), batch.feedback[a:z].tolist())) == past
        assert features.context_fields[0].values[batch.context[b, 0]] == place
        newest = [i for i, liked in reversed(past) if liked][:6]
        assert items[b].tolist() == newest + [0] * (6 - len(newest)) and present[b].tolist() == [True] * len(newest) + [False] * (6 - len(newest))


def test_without_choice_questions_are_clicks():
    data = world(2)
    split = new_users(leave_last_fraction(data), .4)
    features = make_features(data, split)
    plain, asked = Clicks(split, "test", 5), Questions(split, features, "test", 5, liked_only=False)
    for name in ("user", "candidate", "label", "history", "feedback", "offsets", "length"):
        assert torch.equal(getattr(plain[np.arange(len(plain))], name), getattr(asked[np.arange(len(asked))], name))
    assert asked[np.arange(3)].context is None


def test_slots_keep_dislikes_when_asked():
    data = world(2)
    split = leave_last_fraction(data)
    batch = Questions(split, make_features(data, split), liked_only=False)[np.arange(30)]
    items, present = behaviour_slots(batch, 50, liked_only=False)
    for b in range(30):
        a, z = batch.offsets[b:b + 2].tolist()
        assert items[b][present[b]].tolist() == batch.history[a:z].tolist()[::-1]


def test_slots_of_no_history():
    data = world(2)
    split = new_users(leave_last_fraction(data), 1.)
    features = make_features(data, split)
    batch = Questions(split, features)[np.arange(8)]
    for liked_only in (True, False):
        items, present = behaviour_slots(batch, 3, liked_only)
        assert items.tolist() == [[0] * 3] * 8 and not present.any() and items.dtype == torch.long
    assert behaviour_slots(Questions(split, features)[np.zeros(0, np.int64)], 3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="slots=0"):
        behaviour_slots(batch, 0)


def test_nothing_to_ask():
    data = world(2, behaviour_items_from=0)
    split = leave_last_fraction(data)
    with pytest.raises(ValueError, match="only occurs as behaviour"):
        Questions(split, make_features(data, split))
    with pytest.raises(ValueError, match="clicks need a rating"):
        bare = make_dataset("bare", data.interactions.drop("rating"), data.items, data.users)
        Questions(leave_last_out(bare), make_features(bare, leave_last_out(bare)))


def test_data_module_shuffles_training_alone():
    data = world(4)
    split = new_users(leave_last_fraction(data), .4)
    features = make_features(data, split, context=["place"])
    module = Impressions(split, features, batch_size=32, max_length=7, seed=3)
    for loader, part in ((module.train_dataloader(), "train"), (module.val_dataloader(), "validation"), (module.test_dataloader(), "test")):
        user = torch.cat([batch.user for batch in loader])
        assert len(user) == len(Questions(split, features, part)) and bool((user.diff() >= 0).all()) == (part != "train")
    batch = next(iter(loader))
    moved = batch.to("meta")
    assert moved.context.device.type == moved.history.device.type == "meta" and moved.length.device.type == "cpu" and isinstance(moved, Question)
    assert batch.length.max() <= 7


def test_field_is_plain():
    assert Field("a", ("unknown", "x")).encode(pl.Series("a", [None, "x"])).tolist() == [0, 1]


@pytest.mark.parametrize("liked_only", [True, False])
@pytest.mark.parametrize("part", ["validation", "test"])
def test_frozen_questions_read_what_was_liked_before_the_part_alone(liked_only, part):
    data = world()
    split = new_users(leave_last_fraction(data, .2, .2), share=.3)
    units = Questions(split, make_features(data, split), part, 4, liked_only=liked_only, frozen=True)
    batch, (begin, end), at = units[np.arange(len(units))], split.bounds(part), 0
    for u in range(split.n_users):
        past = [] if split.new_user[u] else [(int(i), r > 3) for i, r in zip(split.items[split.offsets[u]:begin[u]], split.rating[split.offsets[u]:begin[u]]) if r > 3 or not liked_only][-4:]
        for n in range(begin[u], end[u]):
            mine = slice(int(batch.offsets[at]), int(batch.offsets[at + 1]))
            assert (int(batch.user[at]), int(batch.candidate[at])) == (u, split.items[n])
            assert list(zip(batch.history[mine].tolist(), batch.feedback[mine].bool().tolist())) == past
            at += 1
    assert at == len(batch)
