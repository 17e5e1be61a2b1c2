"""From two files to scores for brand-new users: the notebook as people run it, and each mistake in the files as one clear error."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from l2rec.data.dataset import DataError
from l2rec.mail.brand_new import (admit_users, candidate_rows, check_output, describe_attributes, estimate, ranker_class, read_attribute, read_features, read_likes,
                                  read_population, score_items, score_table, set_apart, virtual_items, write_example, write_whole)
from l2rec.mail.cotraining import set_up_clicks
from l2rec.mail.features import Questions
from l2rec.mail.fills import FILLS, fill_parameters
from l2rec.training.plan import NotebookFailed, execute

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs/experiments/mail_your_data.ipynb"
COLOURS = ("red", "green", "blue")
COLUMNS = dict(user="client", item="sku", clicked="bought", time="seen")
SMALL = dict(hyperparameters={"width": 8, "slots": 6, "hidden": [32, 16], "dropout": 0.1},
             fill_hyperparameters={"encoder": [16, 8, 8], "decoder": [8, 16], "sigma": "median", "reduction": "relative"})


def club(folder: Path, n: int = 150, fresh: int = 15, items: int = 30, length: int = 10, seed: int = 0) -> tuple[Path, Path]:
    "Clients who buy articles of their own colour and no others; the last `fresh` have seen none. Colours differ, ages say nothing."
    rng = np.random.default_rng(seed)
    colour = np.arange(n) % 3
    old = np.repeat(np.arange(n - fresh), length)
    item = np.concatenate([rng.choice(items, length, replace=False) for _ in range(n - fresh)])
    name = [f"client-{u:03d}" for u in range(n)]
    users = pl.DataFrame({"client": name, "team": [COLOURS[c] for c in colour], "age": rng.integers(18, 80, n), "vip": rng.random(n) < .5,
                          "planet": "Earth", "e-mail": [f"{u}@home" for u in name]})
    users = users.with_columns(team=pl.when(pl.col("client") == name[-1]).then(pl.lit("violet")).otherwise("team"),
                               age=pl.when(pl.col("client") == name[-2]).then(None).otherwise("age"))
    seen = pl.DataFrame({"client": [name[u] for u in old], "sku": [f"{COLOURS[i % 3]} no. {i}" for i in item],
                         "bought": np.where(item % 3 == colour[old], "yes", "no"), "seen": np.arange(len(old)) + 1_700_000_000})
    paths = folder / "clients.csv", folder / "sales.csv"
    users.filter(pl.col("client") != name[0]).write_csv(paths[0])                                       # the first bought things and is not listed
    seen.sample(fraction=1., shuffle=True, seed=seed).write_csv(paths[1])
    return paths


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return club(tmp_path_factory.mktemp("club"))


@pytest.fixture(scope="module")
def population(files):
    return read_population(*files, **COLUMNS)


@pytest.fixture(scope="module")
def split(population):
    return set_apart(population.dataset)


def test_two_files_become_scores_for_brand_new_users(files, tmp_path):
    "The whole notebook: what attributes decide is found, in the ids of the files."
    out, virtual = tmp_path / "new/scores.parquet", tmp_path / "new/virtual.parquet"
    run = execute(NOTEBOOK, tmp_path / "run.ipynb", dict(users=str(files[0]), interactions=str(files[1]), **COLUMNS, **SMALL, lr=.01, fill_lr=.01, max_epochs=12, batch_size=64, k=4,
                                                         output=str(out), virtual=str(virtual)), ROOT)
    scores, told = pl.read_parquet(out), str(run["cells"])
    assert scores.columns == ["user", "item", "rank", "score"] and scores["score"].is_between(0, 1).all()
    assert scores["user"].unique().sort().to_list() == [f"client-{u:03d}" for u in range(135, 150)] and scores.group_by("user").len()["len"].unique().to_list() == [4]
    assert (scores["score"].diff().filter(scores["user"] == scores["user"].shift(1)) <= 0).all()
    first = scores.filter(pl.col("user") != "client-149")                                               # she is violet, which nobody else is
    own = first["user"].str.slice(7).cast(pl.Int64).map_elements(lambda u: COLOURS[u % 3], pl.String)
    assert (first["item"].str.extract(r"^(\w+)") == own).mean() > .95
    assert "the attributes help" in told and "planet" in told and "e-mail" in told and "15 brand-new users" in told
    slots = pl.read_parquet(virtual)
    assert slots.columns == ["user", "slot", "nearest_item", "vector"] and slots.height == 15 * 6
    assert sorted(path.name for path in out.parent.iterdir()) == ["scores.parquet", "virtual.parquet"]


def test_an_error_of_the_notebook_comes_before_the_training(files, tmp_path):
    with pytest.raises(NotebookFailed) as error:
        execute(NOTEBOOK, tmp_path / "run.ipynb", dict(users=str(files[0]), interactions=str(files[1]), **{**COLUMNS, "item": "sk"}, output=str(tmp_path / "scores.parquet")), ROOT)
    assert "sales.csv: column sk is missing" in str(error.value) and "Did you mean 'sku'?" in str(error.value)
    assert not (tmp_path / "scores.parquet").exists()


def test_the_population_is_what_the_files_say(population, files):
    "Counted again with plain sets; likes, order and ids as written."
    users, sales = pl.read_csv(files[0]), pl.read_csv(files[1])
    data, listed, met = population.dataset, set(users["client"]), set(sales["client"])
    name = dict(zip(data.users["user_id"], data.users["source_id"]))
    assert {name[u] for u in population.brand_new.tolist()} == listed - met and population.without_row == len(met - listed) == 1
    assert set(name.values()) == listed and dict(population.facts.iter_rows())["interactions"] == sales.height
    item = dict(data.items.select("item_id", "source_id").iter_rows())
    for client in ("client-007", "client-100"):
        user = next(u for u, n in name.items() if n == client)
        mine, theirs = data.interactions.filter(pl.col("user_id") == user).sort("position"), sales.filter(pl.col("client") == client).sort("seen")
        assert [item[i] for i in mine["item_id"]] == theirs["sku"].to_list() and (mine["rating"] > 3).to_list() == (theirs["bought"] == "yes").to_list()


def test_groups_set_apart_do_not_meet(population, split):
    asked = {part: np.diff(split.bounds(part), axis=0)[0] for part in ("train", "validation", "test")}
    whole, apart = np.diff(split.offsets), ~split.train_user
    assert apart.sum() == 2 * round(.1 * split.n_users) and split.new_user[apart].all() and not asked["train"][apart].any()
    assert (((asked["validation"] == whole) ^ (asked["test"] == whole))[apart]).all()
    made_new = split.new_user & split.train_user
    assert made_new.sum() == round(.4 * split.train_user.sum()) and (asked["train"] == whole)[made_new].all()
    assert (set_apart(population.dataset).new_user == split.new_user).all() and (set_apart(population.dataset, seed=1).new_user != split.new_user).any()
    with pytest.raises(ValueError, match="apart=1"): set_apart(population.dataset, apart=1)


def test_attributes_are_accounted_for(population, split, files):
    features, left_out = read_features(population, split, kinds={"vip": "category"})
    assert sorted(left_out["column"]) == ["e-mail", "planet"] and features.attributes.names == ("team", "age", "vip")
    assert "e-mail" in read_features(population, split, prefix={"e-mail": 9})[0].attributes.names      # client-00, client-01, ...
    table = {row["attribute"]: row for row in describe_attributes(features, population).to_dicts()}
    assert table["age"]["kind"] == "number" and "below" in table["age"]["values"] and table["age"]["brand-new: missing"] == 1
    assert table["team"]["values"] == "blue; green; red" and (table["team"]["brand-new: missing"], table["team"]["brand-new: not in the book"]) == (0, 1)
    unlisted = np.setdiff1d(split.user_id, population.dataset.users["user_id"].to_numpy())
    assert len(unlisted) == 1 and not features.codes[split.user_id == unlisted[0]].any()


@pytest.mark.parametrize("fill", FILLS)
def test_scores_are_those_of_the_model_and_of_no_batch(population, split, fill):
    "Against one question at a time; users of equal attributes agree; every fill takes admitted users; training goes on afterwards."
    features, _ = read_features(population, split)
    given = {k: v for k, v in SMALL["fill_hyperparameters"].items() if k in fill_parameters(fill)}
    if fill == "llae": given = {}
    model, _ = set_up_clicks(split, features, ranker_class("basednn"), fill, hyperparameters=SMALL["hyperparameters"], fill_hyperparameters={**given, **({"shots": 2} if fill == "metaemb" else {})})
    model.fill.prepare(model.ranker, split, 0)
    codes = np.repeat(features.attributes.encode(population.dataset.users, population.brand_new)[:3], 2, 0)
    rows, which = admit_users(model, codes)
    scores = score_items(model, rows, np.arange(5), batch_size=4)
    assert scores.shape == (len(rows), 5) and (which[::2] == which[1::2]).all() and (model.ranker.embeddings.codes[rows].numpy()[which] == codes).all()
    assert np.allclose(scores, [[score_items(model, rows[[r]], np.array([i]))[0, 0] for i in range(5)] for r in range(len(rows))], atol=1e-5)
    assert (virtual_items(model, population, split, rows, which[:2])["nearest"] == "").all() == (fill in ("", "dropoutnet", "metaemb"))
    model.train()
    model.loss(Questions(split, features, "train", 6)[np.arange(8)])[0].backward()


def test_lists_hold_the_best_candidates_in_the_order_given(population, split):
    items = candidate_rows(population, split, ["blue no. 2", "red no. 0", "blue no. 2", "green no. 1"])
    assert len(items) == 3
    scores, which = np.array([[.1, .9, .9], [.5, .2, .3]], np.float32), np.arange(len(population.brand_new)) % 2
    table = score_table(population, split, scores, which, items, k=2)
    assert table.rows()[:2] == [("client-135", "red no. 0", 1, pytest.approx(.9)), ("client-135", "green no. 1", 2, pytest.approx(.9))]
    assert table["item"][2:4].to_list() == ["blue no. 2", "green no. 1"] and score_table(population, split, scores, which, items, k=0).height == 3 * len(which)


def test_the_estimate_is_the_auc_of_users_set_apart(population, split):
    "Against a loop over pairs; the interval of users who agree has no width."
    features, _ = read_features(population, split)
    judge = np.flatnonzero(split.new_user & (split.valid_end < split.offsets[1:]))
    per_user = pl.DataFrame({"user_id": split.user_id[judge], "new": True, "auc_influence": pl.Series(np.zeros(len(judge)), dtype=pl.Float32)})
    table, verdict = estimate(split, features, {"test/new/auc": .99, "test/new/log_loss": .1}, per_user)
    at = np.concatenate([np.arange(split.offsets[u], split.offsets[u + 1]) for u in judge])
    inside = np.concatenate([np.arange(a, b) for a, b, t in zip(*split.bounds("train"), split.train_user) if t])
    liked, mean = split.rating > 3, (split.rating[inside] > 3).mean()
    rate = [mean + (liked[inside][split.items[inside] == i] - mean).sum() / ((split.items[inside] == i).sum() + 10) for i in range(split.n_items)]
    score = np.array(rate)[split.items[at]]
    pairs = np.sign(np.round(score[liked[at]][:, None] - score[~liked[at]][None], 6))
    assert table["AUC"][1] == pytest.approx((pairs + 1).mean() / 2, abs=1e-4)
    assert table["low"][0] == table["high"][0] == .99 and table["AUC"][2] > .9 and "the attributes help" in verdict and table.height == 3
    assert "do not use" in estimate(split, features, {"test/new/auc": .01, "test/new/log_loss": .1}, per_user)[1]


# --- files with mistakes ----------------------------------------------------------------------------------------------

def changed(files, folder: Path, users=lambda t: t, sales=lambda t: t) -> tuple[Path, Path]:
    paths = folder / "clients.csv", folder / "sales.csv"
    for path, file, change in zip(paths, files, (users, sales)): change(pl.read_csv(file, infer_schema=False)).write_csv(path)
    return paths


MISTAKES = {
    "user twice": (dict(users=lambda t: pl.concat([t, t[3:4]])), {}, ["clients.csv, column client, row 149", "'client-004' has a row already"]),
    "no user id": (dict(users=lambda t: t.with_columns(client=pl.when(pl.col("client") == "client-009").then(None).otherwise("client"))), {}, ["clients.csv, column client, row 8", "the id is missing"]),
    "no users": (dict(users=lambda t: t[:0]), {}, ["clients.csv", "nobody to score"]),
    "no interactions": (dict(sales=lambda t: t[:0]), {}, ["sales.csv", "nothing to learn from"]),
    "rating not a number": (dict(sales=lambda t: t.with_columns(bought=pl.Series(["5", "good", *["1"] * (t.height - 2)]))), dict(clicked="", rating="bought"), ["sales.csv, column bought, row 1", "no number"]),
    "rating missing": (dict(sales=lambda t: t.with_columns(bought=pl.Series([None, *["1"] * (t.height - 1)]))), {}, ["sales.csv, column bought, row 0", "missing"]),
    "a click that is none": (dict(sales=lambda t: t.with_columns(bought=pl.Series(["yes", "2", *["no"] * (t.height - 2)]))), {}, ["column bought, row 1", "neither 1 nor 0"]),
    "only likes": (dict(sales=lambda t: t.filter(pl.col("bought") == "yes")), {}, ["sales.csv, column bought", "every row is a click", "not liked are needed"]),
    "only high ratings": (dict(sales=lambda t: t.with_columns(bought=pl.Series(["4", *["5"] * (t.height - 1)]))), dict(clicked="", rating="bought"), ["every rating is above 3", "from 4 to below 5"]),
    "nothing rated": ({}, dict(clicked="", rating=""), ["sales.csv", "client, sku, bought, seen"]),
    "misspelt column": ({}, dict(time="sen"), ["sales.csv: column sen is missing", "'seen'"]),
    "misspelt users_key": ({}, dict(users_key="clint"), ["clients.csv: column clint is missing", "'client'"]),
    "misspelt attribute": ({}, dict(attributes=["teem"]), ["clients.csv: column teem is missing", "'team'"]),
    "id as attribute": ({}, dict(attributes=["client"]), ["column client", "names one user"]),
    "no kind": ({}, dict(kinds={"age": "numeric"}), ["column age", "'number' or 'category'"]),
    "no number": (dict(users=lambda t: t.with_columns(age=pl.when(pl.col("client") == "client-009").then(pl.lit("old")).otherwise("age"))), {}, ["clients.csv, column age, row 8", "'old' is no number"]),
    "nobody is brand-new": (dict(users=lambda t: t[:100]), {}, ["clients.csv", "nobody is brand-new", "Add those who are to be scored"]),
    "nobody is old": (dict(users=lambda t: t.with_columns(client="x" + pl.col("client"))), {}, ["clients.csv", "none of the users has an interaction", "'xclient-001'"]),
    "bought twice": (dict(sales=lambda t: pl.concat([t, t[5:6]])), {}, ["sales.csv, column client, sku, seen, row 1350", "duplicates='first'"]),
    "duplicates": ({}, dict(duplicates="last"), ["duplicates='last'"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_files_is_one_clear_error(files, tmp_path, mistake):
    change, options, words = MISTAKES[mistake]
    with pytest.raises(DataError) as error: read_population(*changed(files, tmp_path, **change), **{**COLUMNS, **options})
    for word in words: assert word in str(error.value)


def test_files_that_are_all_right_are_read(files, tmp_path):
    "Ids that are numbers in one file only, duplicates by choice, Parquet with types, another name of the key, and likes by a threshold."
    guest = changed(files, tmp_path, lambda t: pl.concat([t.with_columns(client=pl.col("client").str.slice(7).str.strip_chars_start("0")), t[:1].with_columns(client=pl.lit("guest"))]),
                    lambda t: pl.concat([t, t[5:6]]).with_columns(client=pl.col("client").str.slice(7).str.strip_chars_start("0").replace("", "0")))
    found = read_population(*guest, **COLUMNS, duplicates="first")
    assert found.dataset.users.filter(pl.col("user_id").is_in(found.brand_new))["source_id"].to_list()[-1] == "guest" and len(found.brand_new) == 16
    typed = tmp_path / "clients.parquet", tmp_path / "sales.parquet"
    pl.read_csv(files[0]).rename({"client": "id"}).with_columns(pl.col("id").str.slice(7).cast(pl.Int32), born=pl.date(1990, 1, 1)).write_parquet(typed[0])
    pl.read_csv(files[1]).with_columns(pl.col("client").str.slice(7).cast(pl.Int32), stars=pl.when(pl.col("bought") == "yes").then(4.5).otherwise(2)).write_parquet(typed[1])
    found = read_population(*typed, user="client", item="sku", rating="stars", above=4, time="seen", users_key="id")
    split = set_apart(found.dataset)
    features, left_out = read_features(found, split)
    assert len(found.brand_new) == 15 and found.dataset.users["source_id"].dtype == pl.Int64 and set(left_out["column"]) == {"born", "planet", "e-mail"}
    assert features.attributes.names == ("team", "age", "vip") and (found.dataset.interactions["rating"] > 3).mean() == pytest.approx(1 / 3, abs=.05)


def test_numbers_and_categories_are_told_apart():
    column = lambda values: pl.Series("x", [str(v) for v in values])
    assert read_attribute(column(range(31)), "t").dtype == pl.Float64 and read_attribute(column(list(range(30)) * 2), "t").dtype == pl.String
    assert read_attribute(column([f"{v:05d}" for v in range(40)]), "t").dtype == pl.String and read_attribute(column(range(40)), "t", "category").dtype == pl.String
    assert read_attribute(column(["-1.5", "", "2e3"]), "t", "number").to_list() == [-1.5, None, 2000.]
    assert read_likes(pl.DataFrame({"c": [True, False]}), "t", clicked="c").to_list() == read_likes(pl.DataFrame({"c": [1., 0.]}), "t", clicked="c").to_list() == [True, False]


def test_too_few_users_and_one_sided_judges_are_named(files, tmp_path):
    few = changed(files, tmp_path, sales=lambda t: t.filter(pl.col("client") < "client-005"))
    with pytest.raises(DataError, match="5 users have interactions, too few"): set_apart(read_population(*few, **COLUMNS).dataset)
    single = changed(files, tmp_path, sales=lambda t: t.filter((pl.col("client") < "client-012").or_(pl.col("bought") == "yes")))
    with pytest.raises(DataError, match=r"drawn to (judge|choose the epoch) like all of their"):
        for seed in range(9): set_apart(read_population(*single, **COLUMNS).dataset, apart=.02, seed=seed)


def test_candidates_rankers_and_outputs_are_checked(population, split, files, tmp_path):
    with pytest.raises(DataError, match="Did you mean 'red no. 3'"): candidate_rows(population, split, ["red no 3"])
    with pytest.raises(ValueError, match="sasrec.*basednn, dmr, din, deepfm, dcnv2"): ranker_class("sasrec")
    with pytest.raises(DataError, match="end in .parquet"): check_output("scores.csv")
    copy = write_whole(pl.DataFrame({"a": [1]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="one of the inputs"): check_output(copy, files[0], copy)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(DataError, match="a folder has this name"): check_output(tmp_path / "folder.parquet")
    check_output(tmp_path / "deep/er/out.parquet", *files, "")
    with pytest.raises(pl.exceptions.PolarsError): write_whole(pl.LazyFrame({"a": ["x"]}).select(pl.col("a").cast(pl.Int64)), copy)
    assert pl.read_parquet(copy)["a"].to_list() == [1] and not list(tmp_path.glob(".partial*"))


def test_the_example_has_what_it_promises(tmp_path):
    paths = write_example(tmp_path, n_users=200, n_items=150)
    found = read_population(paths["users"], paths["interactions"], "customer", "article", time="time", items=paths["items"], title="title", categories="categories")
    assert len(found.brand_new) == 20 and found.without_row == 3 and (found.dataset.items["title"] != "").any()
    unmet = pl.read_csv(paths["items"])["article"].to_list()
    met = set(pl.read_csv(paths["interactions"])["article"])
    if lost := [a for a in unmet if a not in met]:
        with pytest.raises(DataError, match="nobody has met item"): candidate_rows(found, set_apart(found.dataset), lost[:1])
