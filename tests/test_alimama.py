"""Alimama's original files, small and in the exact format, against plain Python; damaged and incomplete files."""

import csv
import json

import numpy as np
import polars as pl
import pytest

from l2rec.data.alimama import DAY, FILES, TAGS, drawn, last_day, main, number_pairs, prepare, read_blocks, visible_events
from l2rec.data.dataset import DataError, make_dataset, read_dataset
from l2rec.data.load import load_dataset
from l2rec.data.splits import new_users
from l2rec.mail.cotraining import CoTraining, set_up_clicks
from l2rec.mail.features import Questions, make_features
from l2rec.training.models import model_class
from l2rec.training.modules import evaluate, fit

START = 1494000000
HEADERS = {name: ",".join(columns) + (" " if name == "user_profile.csv" else "") for name, columns in FILES.items()}


def originals(folder, seed=0, users=25, impressions=160, events=1500, span=2 * DAY):
    """The four files: advertisement 9 and users 24, 25 undescribed, brands NULL, profile fields empty, an impression twice, events of strangers."""
    rng = np.random.default_rng(seed)
    click = (rng.random(impressions) < .3).astype(int)
    raw = [f"{u},{START + t},{a},{p},{1 - c},{c}" for u, t, a, p, c in zip(rng.integers(1, users + 1, impressions), rng.integers(0, span, impressions), rng.integers(1, 10, impressions),
                                                                         rng.choice(["430548_1007", "430539_1007"], impressions), click)]
    ads = [f"{a},{a % 3 + 1},{a * 11},{a * 7},{'NULL' if a % 4 == 0 else a % 3},{a}.5" for a in range(1, 9)] + ["7777,2,1,1,5,3.0"]
    profiles = [f"{u},{u % 7},{u % 3},{u % 2 + 1},{u % 5},{'' if u % 3 else u % 2},3,0,{'' if u % 2 else u % 4}" for u in [*range(1, 24), 900]]
    log = [f"{u},{START + t},{b},{c},{m}" for u, t, b, c, m in zip(rng.integers(1, users + 6, events), rng.integers(-3 * DAY, span + DAY, events), rng.choice(TAGS, events),
                                                                 rng.integers(1, 4, events), rng.integers(0, 4, events))]
    log += log[:20] + [f"3,{START - 40 * DAY},pv,1,1", f"3,{START + 90 * DAY},pv,1,1", f"3,-5,pv,1,1", f"4,{START - 9},pv,NULL,2", f"4,{START - 8},cart,2,", f"4,{START - 7},pv,,"]
    write(folder, {"raw_sample.csv": [*raw, raw[0]], "ad_feature.csv": ads, "user_profile.csv": profiles, "behavior_log.csv": log})
    return folder


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / name).write_text("\n".join([HEADERS[name], *rows]) + "\n")


def rows_of(folder, name):
    with open(folder / name) as file:
        return [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(file)]


def slow(folder, newest, least):
    """Each user's interactions in order of time as (time, name of the item, rating), without regard to order within a second; from dictionaries alone."""
    raw, log = rows_of(folder, "raw_sample.csv"), rows_of(folder, "behavior_log.csv")
    shown = {}
    for row in raw:
        key = int(row["user"]), int(row["time_stamp"]), int(row["adgroup_id"])
        shown[key] = max(shown.get(key, 1.), 5. if row["clk"] == "1" else 1.)
    times = [t for _, t, _ in shown]
    number = lambda text: None if text in ("", "NULL") else int(text)
    events = {(int(r["user"]), int(r["time_stamp"]), number(r["cate"]), number(r["brand"])) for r in log
              if int(r["user"]) in {u for u, _, _ in shown} and min(times) - 30 * DAY <= int(r["time_stamp"]) <= max(times)}
    events = sorted((e for e in events if e[2] is not None or e[3] is not None), key=lambda e: (e[0], e[1], -1 if e[2] is None else e[2], -1 if e[3] is None else e[3]))
    seen = set()
    for user, time, _ in shown:
        seen.update([e for e in events if e[0] == user and e[1] < time][-newest:])
    count = {}
    for _, _, cate, brand in seen:
        count[cate, brand] = count.get((cate, brand), 0) + 1
    out = {(u, t, f"advertisement {a}", rating) for (u, t, a), rating in shown.items()}
    for user, time, cate, brand in seen:
        brand = None if count[cate, brand] < least and cate is not None else brand
        out.add((user, time, f"category {'unknown' if cate is None else cate}, brand {'unknown' if brand is None else brand}", 5.))
    return sorted(out)


@pytest.mark.parametrize("seed,newest,least", [(0, 100, 1), (1, 5, 1), (2, 1, 40), (3, 20, 60), (4, 100, 10**6)])
def test_the_folder_is_what_plain_python_makes(tmp_path, seed, newest, least):
    folder = prepare(originals(tmp_path / "raw", seed), tmp_path, newest=newest, least=least, progress=False)
    data = read_dataset(folder)
    named = data.interactions.join(data.items.select("item_id", "title"), on="item_id").sort("user_id", "position")
    assert sorted(named.select("user_id", "timestamp", "title", "rating").rows()) == slow(tmp_path / "raw", newest, least)
    above = data.manifest["behaviour_items_from"]
    assert above == 7778 and ((named["item_id"] >= above) == named["title"].str.starts_with("category")).all()
    second = named.select("user_id", "timestamp", event=pl.col("item_id") >= above)
    assert second.rows() == sorted(second.rows())


def test_items_and_users(tmp_path):
    data = read_dataset(prepare(originals(tmp_path / "raw"), tmp_path, progress=False))
    items = {row["title"]: row for row in data.items.iter_rows(named=True)}
    assert (items["advertisement 4"]["brand"], items["advertisement 4"]["categories"], items["advertisement 4"]["price"]) == (None, ["2"], 4.5)
    assert (items["advertisement 5"]["brand"], items["advertisement 5"]["campaign_id"], items["advertisement 5"]["customer"]) == ("2", "55", "35")
    assert items["advertisement 9"]["categories"] == [] and items["advertisement 9"]["brand"] is None and "advertisement 7777" not in items
    assert items["category 2, brand 1"]["categories"] == ["2"] and items["category 2, brand 1"]["brand"] == "1"
    assert data.items.height == data.n_items == data.manifest["statistics"]["catalogue"] and data.users["user_id"].to_list() == sorted(data.users["user_id"])
    users = {row["user_id"]: row for row in data.users.iter_rows(named=True)}
    assert 900 not in users and set(users[24].values()) == {24, None}
    assert (users[3]["pvalue_level"], users[4]["pvalue_level"], users[4]["new_user_class_level"], users[5]["new_user_class_level"]) == ("1", None, "0", None)
    assert data.users.columns == ["user_id", *FILES["user_profile.csv"][1:]]
    notes = data.manifest["preparation"]
    assert notes["doubled_impressions_merged"] == 1 and notes["users_without_profile"] == 2 and notes["advertisements_not_described"] == 1
    assert notes["events"] == 1526 and notes["events_without_category_and_brand"] == 1


def test_every_event_is_accounted_for(tmp_path):
    data = read_dataset(prepare(originals(tmp_path / "raw", 5), tmp_path, newest=7, least=1, progress=False))
    notes = data.manifest["preparation"]
    gone = sum(notes[k] for k in ("events_of_other_users", "events_of_other_kinds", "events_at_wrong_times", "events_without_category_and_brand", "events_merged", "events_that_no_question_sees"))
    assert notes["events"] - gone == (data.interactions["btag"].is_not_null()).sum() and notes["impressions"] == (data.interactions["pid"].is_not_null()).sum()


@pytest.mark.filterwarnings("ignore:dataset alimama, users")
def test_questions_are_about_advertisements(tmp_path):
    data = read_dataset(prepare(originals(tmp_path / "raw", span=8 * DAY, impressions=400), tmp_path, progress=False))
    split = new_users(last_day(data), .4)
    features = make_features(data, split)
    assert features.n_context == (3,) and set(features.attributes.names) <= set(FILES["user_profile.csv"])
    day = (data.interactions["timestamp"] - START) // DAY
    shown = data.interactions["pid"].is_not_null()
    for part, days in (("train", range(-9, 6)), ("validation", [6]), ("test", [7])):
        units = Questions(split, features, part)
        assert len(units) == (shown & day.is_in(list(days))).sum()
        batch = units[np.arange(len(units))]
        assert features.askable[batch.candidate].all() and (batch.context > 0).all() and not features.askable[batch.history].all()
        assert not batch.length[split.new_user[batch.user]].any()

@pytest.mark.filterwarnings("ignore:dataset alimama, users")
@pytest.mark.parametrize("ranker, fill", [("basednn", "mail-base"), ("dmr", "mail-base"), ("basednn", "llae")])
def test_mail_trains_on_it(tmp_path, ranker, fill):
    "The whole way: files, folder, last day as test, new users, context of the page position, co-training, metrics of both groups."
    prepare(originals(tmp_path / "raw", users=60, impressions=1500, events=6000, span=4 * DAY), tmp_path, least=1, progress=False)
    data = read_dataset(tmp_path / "alimama")
    split = new_users(last_day(data), .4)
    features = make_features(data, split)
    model, batches = set_up_clicks(split, features, model_class(ranker), fill, hyperparameters=dict(slots=10, hidden=(16, 8)),
                                   fill_hyperparameters=dict(encoder=(16, 8), decoder=(16,)) if fill == "mail-base" else {}, batch_size=128)
    module = CoTraining(model, batches)
    run = fit(module, batches, max_epochs=2, monitor="validation/auc", progress=False)
    metrics, per_user = evaluate(module, batches)
    assert run.epochs == 2 and {"test/new/auc", "test/old/auc"} <= metrics.keys() and 0 < per_user["new"].sum() < per_user.height
    assert model.ranker.n_groups == 4                                            # the context is a group of its own


def test_a_share_of_users_is_a_part_of_a_larger_one(tmp_path):
    user = np.arange(20_000)
    small, large = drawn(user, .1, 0), drawn(user, .4, 0)
    assert not (small & ~large).any() and abs(small.mean() - .1) < .01 and abs(large.mean() - .4) < .015 and drawn(user, 1., 0).all()
    assert (drawn(user, .4, 1) & large).mean() < .2
    raw = originals(tmp_path / "raw")
    whole, half = (read_dataset(prepare(raw, tmp_path, name, share, least=1, progress=False)) for name, share in (("whole", 1.), ("half", .5)))
    kept = half.interactions["user_id"].unique()
    assert 0 < len(kept) < whole.n_users
    columns = ["user_id", "position", "timestamp", "rating", "pid"]
    assert whole.interactions.filter(pl.col("user_id").is_in(kept.implode())).select(columns).equals(half.interactions.select(columns))


@pytest.mark.parametrize("seed", range(6))
def test_visible_events_are_a_loop(seed):
    rng = np.random.default_rng(seed)
    user, time = rng.integers(1, 5, 80), rng.integers(0, 40, 80)
    by, at = rng.integers(2, 6, 12), rng.integers(0, 40, 12)
    order, shown = np.lexsort((time, user)), np.lexsort((at, by))
    user, time, by, at = user[order], time[order], by[shown], at[shown]
    for newest in (1, 3, 100):
        reached = np.zeros(80, bool)
        for b, t in zip(by, at):
            reached[np.flatnonzero((user == b) & (time < t))[-newest:]] = True
        assert np.array_equal(visible_events(user, time, by, at, newest), reached)
    assert not visible_events(user, time, by[:0], at[:0], 3).any() and len(visible_events(user[:0], time[:0], by, at, 3)) == 0


def test_rare_pairs_lose_the_brand_and_no_event_its_item():
    rng = np.random.default_rng(0)
    pairs = pl.DataFrame({"cate": rng.integers(-1, 6, 300), "brand": rng.integers(-1, 50, 300), "events": rng.integers(1, 20, 300)}).unique(["cate", "brand"]).sort("cate", "brand")
    book, items = number_pairs(pairs, 10, 500)
    assert book.select("cate", "brand").equals(pairs.select("cate", "brand")) and items["item_id"].to_list() == list(range(500, 500 + items.height))
    named = {row["item_id"]: (row["category"], row["brand"]) for row in items.iter_rows(named=True)}
    for (cate, brand, events), item in zip(pairs.rows(), book["item_id"]):
        keep = brand if events >= 10 or cate < 0 else -1
        assert named[item] == (None if cate < 0 else cate, None if keep < 0 else keep)


@pytest.mark.parametrize("size", [200, 1000, 1 << 20])
def test_blocks_count_lines(tmp_path, size):
    raw = originals(tmp_path / "raw")
    line, rows = 2, []
    for at, block in read_blocks(raw / "behavior_log.csv", size=size):
        assert at == line
        line += block.height
        rows += block.rows()
    assert [tuple(v or "" for v in row) for row in rows] == [tuple(v if v != "NULL" else "" for v in row.values()) for row in rows_of(raw, "behavior_log.csv")]


@pytest.mark.parametrize("name,row,message", [
    ("raw_sample.csv", "3,1494000000,2,430548_1007,1", r"raw_sample.csv, line 163: 5 fields, and 6 are due"),
    ("raw_sample.csv", "3,1494000000,2,430548_1007,1,0,9", r"raw_sample.csv, line 163: 7 fields"),
    ("raw_sample.csv", "3,1494000000,2,430548_1007,1,1", r"raw_sample.csv, line 163, column clk: clk and nonclk"),
    ("raw_sample.csv", "3,1494000000,2,430548_1007,1,2", r"line 163, column clk"),
    ("raw_sample.csv", "3,,2,430548_1007,1,0", r"line 163, column time_stamp: a value must be here"),
    ("raw_sample.csv", "3,99999999999,2,430548_1007,1,0", r"line 163, column time_stamp"),
    ("raw_sample.csv", "-3,1494000000,2,430548_1007,1,0", r"line 163, column user.*'-3'"),
    ("raw_sample.csv", "3,1494000000,3000000000,430548_1007,1,0", r"line 163, column adgroup_id"),
    ("ad_feature.csv", "3,1,1,1,1,2.0", r"ad_feature.csv, line 11, column adgroup_id: the id must be listed once, and it is 3"),
    ("ad_feature.csv", "30,1,1,1,1,cheap", r"line 11, column price: the price must be a number, and it is 'cheap'"),
    ("ad_feature.csv", "30,one,1,1,1,1", r"line 11, column cate_id.*'one'"),
    ("user_profile.csv", "5,1,1,1,1,1,1,1,1", r"user_profile.csv, line 26, column userid: the id must be listed once"),
    ("user_profile.csv", "NULL,1,1,1,1,1,1,1,1", r"line 26, column userid: a value must be here"),
    ("user_profile.csv", "50,1,1", r"line 26: 3 fields, and 9 are due"),
    ("behavior_log.csv", "3,1494000000,view,1,1", r"behavior_log.csv, line 1528, column btag: the kind must be one of pv, cart, fav, buy, and it is 'view'"),
    ("behavior_log.csv", "3,noon,pv,1,1", r"line 1528, column time_stamp.*'noon'"),
    ("behavior_log.csv", "3,1494000000,pv,1,b7", r"line 1528, column brand.*'b7'"),
    ("behavior_log.csv", "3,1494000000,pv", r"line 1528: 3 fields, and 5 are due"),
    ("behavior_log.csv", "", r"line 1528, column user: a value must be here"),
])
def test_damaged_rows(tmp_path, name, row, message):
    raw = originals(tmp_path / "raw")
    with open(raw / name, "a") as file:
        file.write(row + "\n" + (raw / name).read_text().splitlines()[1].replace("1,", "12345,", 1) + "\n")
    with pytest.raises(DataError, match=message):
        prepare(raw, tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_bytes_that_are_no_text(tmp_path):
    raw = originals(tmp_path / "raw")
    with open(raw / "ad_feature.csv", "ab") as file:
        file.write(b"31,1,1,1,\xff\xfe,1\n")
    with pytest.raises(DataError, match="ad_feature.csv, after line 1: cannot be read.*UTF8"):
        prepare(raw, tmp_path, progress=False)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_and_headers(tmp_path, name):
    raw = originals(tmp_path / "raw")
    text = (raw / name).read_text()
    (raw / name).unlink()
    with pytest.raises(DataError, match=f"{name}: the file cannot be read.*Download the four files"):
        prepare(raw, tmp_path, progress=False)
    for start in (text.split("\n", 1)[1], "<!DOCTYPE html>\n", ""):
        (raw / name).write_text(start)
        with pytest.raises(DataError, match=f"{name}, line 1: column {FILES[name][0]} is missing.*It must be the original header"):
            prepare(raw, tmp_path, progress=False)


def test_harmless_differences(tmp_path):
    raw, plain = originals(tmp_path / "raw"), tmp_path / "other"
    plain.mkdir()
    for name in FILES:
        text = (raw / name).read_text()
        if name == "user_profile.csv":
            text = "\ufeff" + text.replace(",3,0,", ",3.0,0.0,") + "\n\n"
        if name == "ad_feature.csv":
            head, *rows = text.splitlines()
            text = "\r\n".join([f"extra,{head}", *(f"x,{row}" for row in rows)]) + "\r\n"
        if name == "behavior_log.csv":
            text = text.replace(",pv,", ",ipv,")
        (plain / name).write_text(text, newline="")
    one, two = (read_dataset(prepare(folder, tmp_path, name, progress=False)) for folder, name in ((raw, "one"), (plain, "two")))
    assert one.interactions.equals(two.interactions) and one.items.equals(two.items) and one.users.equals(two.users)


def test_empty_files(tmp_path):
    raw = originals(tmp_path / "raw")
    write(raw, {"behavior_log.csv": [], "ad_feature.csv": [], "user_profile.csv": []})
    data = read_dataset(prepare(raw, tmp_path, progress=False))
    assert data.interactions["pid"].null_count() == 0 and data.manifest["behaviour_items_from"] == 10 and data.users["age_level"].null_count() == data.n_users
    write(raw, {"raw_sample.csv": []})
    with pytest.raises(DataError, match="no impression is left"):
        prepare(raw, tmp_path, "again", progress=False)


@pytest.mark.parametrize("wrong,message", [(dict(sample_users=0), "sample_users=0"), (dict(sample_users=1.5), "sample_users=1.5"), (dict(newest=0), "newest=0"), (dict(least=0), "least=0"),
                                           (dict(tags=["view"]), "some of pv, cart, fav, buy"), (dict(tags=[]), "some of"), (dict(sample_users=1e-9), "no impression is left")])
def test_wrong_parameters(tmp_path, wrong, message):
    with pytest.raises(DataError, match=message):
        prepare(originals(tmp_path / "raw"), tmp_path, progress=False, **wrong)
    assert not (tmp_path / "alimama").exists()


def test_kinds_of_events(tmp_path):
    data = read_dataset(prepare(originals(tmp_path / "raw"), tmp_path, tags=["buy", "cart"], progress=False))
    assert set(data.interactions["btag"].drop_nulls()) == {"buy", "cart"} and data.manifest["preparation"]["events_of_other_kinds"] > 100


def test_the_strongest_of_one_second_stays(tmp_path):
    raw = originals(tmp_path / "raw")
    write(raw, {"behavior_log.csv": [f"{u},{START - 5},{tag},1,1" for u in range(1, 26) for tag in ("cart", "buy", "pv")]})
    data = read_dataset(prepare(raw, tmp_path, progress=False))
    assert set(data.interactions["btag"].drop_nulls()) == {"buy"} and data.interactions["btag"].is_not_null().sum() == data.n_users


def test_command(tmp_path, capsys):
    raw = originals(tmp_path / "raw")
    assert main([str(raw), "--home", str(tmp_path), "--sample-users", "0.8", "--least", "1"]) == 0
    assert "users" in capsys.readouterr().out and load_dataset("alimama", tmp_path).manifest["preparation"]["sample_users"] == .8
    assert main([str(raw), "--home", str(tmp_path)]) == 1 and "the folder exists" in capsys.readouterr().err
    assert main([str(raw), "--home", str(tmp_path), "--overwrite"]) == 0
    assert json.loads((tmp_path / "alimama" / "manifest.json").read_text())["preparation"]["sample_users"] == 1.


def test_last_day_needs_days(tmp_path):
    data = read_dataset(prepare(originals(tmp_path / "raw", span=DAY // 2), tmp_path, progress=False))
    one = make_dataset("one", data.interactions.filter(pl.col("timestamp") >= START).with_columns(position=pl.int_range(pl.len(), dtype=pl.Int32).over("user_id")), data.items)
    with pytest.raises(DataError, match="before the last two days"):
        last_day(one)
    with pytest.raises(DataError, match="needs a time"):
        last_day(make_dataset("bare", one.interactions.drop("timestamp"), data.items))
