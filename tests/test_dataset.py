"""The canonical folder: every rule broken once, real folders verified, and slow references for order and duplicates."""
import hashlib
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from l2rec.data.dataset import (DataError, Feature, check_interactions, content_sha256, data_home, images_sha256, make_dataset, order_by_time, positions,
                                read_dataset, tie_hash, whole_folder, write_dataset)

REAL = Path(os.environ.get("L2REC_DATA", "no-such-folder"))


def visits(**columns) -> pl.DataFrame:
    base = {"user_id": [1, 1, 2, 2, 2], "item_id": [10, 20, 10, 30, 20], "position": [0, 1, 0, 1, 2], "timestamp": [5, 6, 1, 1, 9], "rating": [1.0, 2.0, 3.0, None, 5.0]}
    return pl.DataFrame({**base, **columns})


def films() -> pl.DataFrame:
    return pl.DataFrame({"item_id": [10, 20, 30, 40], "title": ["a", "b", "c", "d"], "text": ["x", "", "z", ""], "categories": [["p"], [], ["p", "q"], []]})


def feature(n=3, dtype=np.float16) -> Feature:
    return Feature(np.arange(2 * n, dtype=dtype).reshape(n, 2), np.array([10, 20, 30][:n], dtype=np.int32))


@pytest.fixture
def folder(tmp_path) -> Path:
    made = make_dataset("club", visits(), films(), pl.DataFrame({"user_id": [1, 2], "gender": ["F", "M"]}), {"poster": feature()}, license="CC0")
    write_dataset(made, tmp_path / "club")
    return tmp_path / "club"


def spoil(folder: Path, name: str, table: pl.DataFrame | None = None, data: bytes | None = None) -> None:
    """Replace a file and correct its digest, so that the rule itself is reached."""
    if table is not None:
        table.write_parquet(folder / name)
    if data is not None:
        (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_round_trip(folder):
    read = read_dataset(folder)
    assert (read.n_users, read.n_items, read.n_interactions, read.items.height) == (2, 3, 5, 4)
    assert read.interactions.schema == {"user_id": pl.Int32, "item_id": pl.Int32, "position": pl.Int32, "timestamp": pl.Int64, "rating": pl.Float32}
    assert read.items["year"].dtype == pl.Int16 and read.users["gender"].to_list() == ["F", "M"]
    assert np.array_equal(read.features["poster"].values, feature().values) and read.manifest["license"] == "CC0"
    copy = write_dataset(read, folder.parent / "copy")
    assert copy.sha256 == read.sha256 == read_dataset(folder.parent / "copy").sha256
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_content_digest_depends_on_values_only():
    one, two = make_dataset("a", visits(), films()), make_dataset("b", visits()[::-1], films())
    assert one.sha256 == two.sha256 == content_sha256(one)
    assert make_dataset("a", visits(rating=[1.0, 2.0, 3.0, None, 4.0]), films()).sha256 != one.sha256
    assert make_dataset("a", visits(rating=[1.0, 2.0, 3.0, 0.0, 5.0]), films()).sha256 != one.sha256


def test_position_alone_suffices_and_repeats_without_time_are_legal():
    made = make_dataset("c", pl.DataFrame({"user_id": [3, 3, 3], "item_id": [1, 1, 2], "position": [0, 1, 2]}))
    assert made.interactions["timestamp"].null_count() == 3 and made.items["title"].to_list() == ["", ""]


@pytest.mark.parametrize("columns, words", [
    ({"user_id": [1, 1, None, 2, 2]}, ["user_id", "null"]),
    ({"item_id": [10, 20, 10, 30, None]}, ["item_id", "row 4", "null"]),
    ({"item_id": [10, 20, -1, 30, 20]}, ["item_id", "row 2", "negative"]),
    ({"user_id": ["a", "a", "b", "b", "b"]}, ["user_id", "String", "Int32", "dataset_from_table"]),
    ({"user_id": [1.0, 1.0, 2.0, 2.0, 2.0]}, ["user_id", "Float64", "Int32"]),
    ({"item_id": [10, 20, 10, 3_000_000_000, 20]}, ["item_id", "row 3", "does not fit"]),
    ({"rating": [1.0, 2.0, float("nan"), None, 5.0]}, ["rating", "row 2", "NaN"]),
    ({"rating": [1.0, 2.0, float("inf"), None, 5.0]}, ["rating", "row 2", "infinite"]),
    ({"rating": ["1", "2", "3", "4", "5"]}, ["rating", "String", "Float32"]),
    ({"position": [0, 1, 0, 1, 1]}, ["position", "duplicated interaction", "row 4"]),
    ({"position": [0, 1, 0, 1, 3]}, ["position", "row 4", "user 2 has position 3 where 2 is due"]),
    ({"position": [1, 2, 0, 1, 2]}, ["position", "row 0", "order_by_time"]),
    ({"item_id": [10, 20, 10, 10, 20]}, ["duplicated interaction", "row 3", "user 2, item 10, time 1"]),
    ({"timestamp": [6, 5, 1, 1, 9]}, ["timestamp", "row 1", "before"]),
])
def test_bad_interactions(columns, words):
    with pytest.raises(DataError) as caught:
        make_dataset("club", visits(**columns), films())
    assert "club" in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_missing_column_names_the_nearest():
    with pytest.raises(DataError, match="column user_id is missing; the columns are userid, .*Rename 'userid' to 'user_id'"):
        make_dataset("club", visits().rename({"user_id": "userid"}), films())
    with pytest.raises(DataError, match="position is missing.*order_by_time"):
        make_dataset("club", visits().drop("position"), films())


def test_empty_dataset():
    with pytest.raises(DataError, match="empty"):
        make_dataset("club", visits()[:0], films())


@pytest.mark.parametrize("change, words", [
    (lambda t: t[1:], "item_id 10 has no row"),
    (lambda t: pl.concat([t, t[:1]]), "the id is there already"),
    (lambda t: t.with_columns(item_id=pl.Series([10, 20, 30, -4])), "negative"),
    (lambda t: t.with_columns(title=pl.Series([1, 2, 3, 4])), "title: the type is Int64"),
    (lambda t: t.with_columns(categories=pl.Series(["p", "q", "r", "s"])), "categories: the type is String"),
])
def test_bad_items(change, words):
    with pytest.raises(DataError) as caught:
        make_dataset("club", visits(), change(films()))
    assert words in str(caught.value)


def test_unknown_user():
    with pytest.raises(DataError, match="user_id 2 has no row in .*users"):
        make_dataset("club", visits(), films(), pl.DataFrame({"user_id": [1]}))


@pytest.mark.parametrize("bad, words", [
    (Feature(feature().values, np.array([10, 20, 99], np.int32)), "row 2: unknown item"),
    (Feature(feature().values, np.array([10, 20, 20], np.int32)), "has a row already"),
    (Feature(feature().values[:2], feature().item_id), "2 rows and 3 items"),
    (Feature(feature().values.astype(np.float64), feature().item_id), "float64"),
    (Feature(feature().values[:, 0], feature().item_id), "must be float16 or float32 [n, d]"),
    (Feature(feature().values, feature().item_id.astype(np.int64)), "int64"),
    (Feature(np.array([[1, 2], [np.nan, 1], [1, 1]], np.float32), feature().item_id), "row 1: the vector holds NaN"),
])
def test_bad_features(bad, words):
    with pytest.raises(DataError) as caught:
        make_dataset("club", visits(), films(), features={"poster": bad})
    assert words in str(caught.value) and "poster" in str(caught.value)


@pytest.mark.parametrize("name", ["interactions.parquet", "items.parquet", "users.parquet", "features/poster.npy"])
@pytest.mark.parametrize("damage, word", [
    (lambda data: data[: len(data) // 2], "sha256"), (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "sha256"), (lambda data: b"<html>Sign in</html>", "HTML")])
def test_damaged_file(folder, name, damage, word):
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(DataError) as caught:
        read_dataset(folder)
    assert name in str(caught.value) and word in str(caught.value)


def test_truncated_parquet_says_so_and_is_chained(folder):
    data = (folder / "items.parquet").read_bytes()
    (folder / "items.parquet").write_bytes(data[:-50])
    with pytest.raises(DataError, match="items.parquet.*truncated"):
        read_dataset(folder)
    spoil(folder, "items.parquet", data=data[:-50])
    with pytest.raises(DataError, match="items.parquet: cannot be read as Parquet") as caught:
        read_dataset(folder)
    assert caught.value.__cause__ is not None


def test_pickled_feature_is_refused(folder):
    np.save(folder / "features/poster.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    spoil(folder, "features/poster.npy")
    with pytest.raises(DataError, match="cannot be read as a NumPy array"):
        read_dataset(folder)


def test_rules_hold_on_disk(folder):
    good = pl.read_parquet(folder / "interactions.parquet")
    for table, words in ((good.with_columns(pl.col("user_id").cast(pl.Int64)), "user_id: the type is Int64"), (good.drop("rating"), "rating is missing"),
                         (good[::-1], "not sorted"), (good.with_columns(rating=pl.lit(float("nan"), pl.Float32)), "row 0 \\(5 rows in all\\): the rating is NaN"), (good[:0], "empty")):
        spoil(folder, "interactions.parquet", table)
        with pytest.raises(DataError, match=f"interactions.parquet.*{words}"):
            read_dataset(folder)


@pytest.mark.parametrize("key", ["users", "items", "interactions", "catalogue"])
def test_counts_off(folder, key):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["statistics"][key] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"manifest.json: statistics.{key} is"):
        read_dataset(folder)


def test_missing_unlisted_and_unpaired_files(folder):
    (folder / "features/extra.npy").write_bytes(b"x")
    with pytest.raises(DataError, match="extra.npy: the file is not listed"):
        read_dataset(folder)
    (folder / "features/extra.npy").unlink()
    (folder / "features/poster.item_id.npy").unlink()
    with pytest.raises(DataError, match="poster.item_id.npy: the file is missing"):
        read_dataset(folder)
    (folder / "items.parquet").unlink()
    with pytest.raises(DataError, match="missing"):
        read_dataset(folder)
    for text, words in (("{", "cannot be read as JSON"), ("{}", "'name' is missing")):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=words):
            read_dataset(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="has no manifest.json"):
        read_dataset(folder)
    with pytest.raises(DataError, match="is not there"):
        read_dataset(folder / "nowhere")


def test_images(folder):
    (folder / "images").mkdir()
    for item, data in ((10, b"ten"), (30, b"thirty")):
        (folder / f"images/{item}.jpg").write_bytes(data)
    with pytest.raises(DataError, match="disagree on whether there are images"):
        read_dataset(folder)
    assert images_sha256(folder / "images") == hashlib.sha256(b"10.jpgten30.jpgthirty").hexdigest()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["images/*.jpg (names and bytes, in name order)"] = images_sha256(folder / "images")
    manifest["statistics"]["images"] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    copied = write_dataset(read_dataset(folder), folder.parent / "copy")
    assert read_dataset(copied.folder).manifest["statistics"]["images"] == 2
    (folder / "images/30.jpg").write_bytes(b"other")
    with pytest.raises(DataError, match="images: sha256 over names and bytes"):
        read_dataset(folder)
    read_dataset(folder, images=False)
    (folder / "images/30.jpg").rename(folder / "images/thirty.jpg")
    with pytest.raises(DataError, match="thirty.jpg: the name is no item_id"):
        read_dataset(folder, images=False)


def test_nothing_half_written(folder, tmp_path):
    with pytest.raises(DataError, match="the folder exists"):
        write_dataset(read_dataset(folder), folder)
    write_dataset(make_dataset("club", visits(), films()), folder, overwrite=True)
    assert read_dataset(folder).users is None
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "new") as aside:
        (aside / "half").write_text("x")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["club"]
    (tmp_path / ".new.999999999.partial").mkdir()  # of a process that was killed
    with whole_folder(tmp_path / "new") as aside:
        (aside / "whole").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["club", "new"]
    folder.rename(tmp_path / ".club.999999999.old")  # killed between the two renames
    with pytest.raises(DataError, match="the folder exists"):
        write_dataset(make_dataset("club", visits(), films()), folder)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot be written") as caught:
        write_dataset(make_dataset("club", visits(), films()), tmp_path / "file" / "club")
    assert isinstance(caught.value.__cause__, OSError)


def test_order_by_time_against_a_slow_reference():
    rng = np.random.default_rng(0)
    table = pl.DataFrame({"user_id": rng.integers(0, 30, 4000, dtype=np.int32), "item_id": rng.integers(0, 2000, 4000, dtype=np.int32), "timestamp": rng.integers(0, 9, 4000)})
    table = table.unique(maintain_order=True)

    def mix(user, item, seed=0):  # SplitMix64 in plain Python integers
        mask = (1 << 64) - 1
        x = ((user << 32 | item) + (seed + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        return x ^ x >> 31

    histories = defaultdict(list)
    for user, item, time in table.iter_rows():
        histories[user].append((time, mix(user, item), item))
    wanted = [(user, item, time, place) for user in sorted(histories) for place, (time, _, item) in enumerate(sorted(histories[user]))]
    assert order_by_time(table).select("user_id", "item_id", "timestamp", "position").rows() == wanted
    assert order_by_time(table.sample(fraction=1.0, shuffle=True, seed=1)).equals(order_by_time(table))
    assert not order_by_time(table, seed=1).equals(order_by_time(table))
    assert tie_hash(np.array([3], np.int32), np.array([5], np.int32), 7)[0] == mix(3, 5, 7)


def test_tied_order_is_unrelated_to_item_numbers():
    users = np.repeat(np.arange(3000, dtype=np.int32), 10)
    items = np.tile(np.arange(10, dtype=np.int32), 3000)
    ordered = order_by_time(pl.DataFrame({"user_id": users, "item_id": items, "timestamp": np.zeros(30000, np.int64)}))
    assert abs(np.corrcoef(ordered["item_id"], ordered["position"])[0, 1]) < 0.02


def test_order_by_time_refuses_missing_times():
    with pytest.raises(DataError, match="timestamp, row 1: the time is null"):
        order_by_time(pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": [1, None]}))


def test_positions_and_duplicates_against_slow_references():
    rng = np.random.default_rng(1)
    user = np.sort(rng.integers(0, 50, 500)).astype(np.int32)
    seen = defaultdict(int)
    wanted = []
    for one in user:
        wanted.append(seen[one])
        seen[one] += 1
    assert positions(user).tolist() == wanted and positions(user[:0]).tolist() == []
    for trial in range(30):
        table = pl.DataFrame({"user_id": np.sort(rng.integers(0, 6, 25)).astype(np.int32), "item_id": rng.integers(0, 12, 25, dtype=np.int32), "timestamp": rng.integers(0, 4, 25)})
        table = table.with_columns(timestamp=pl.when(pl.col("timestamp") > 0).then("timestamp")).sort("user_id", pl.col("timestamp").fill_null(0))
        table = table.with_columns(position=pl.Series(positions(table["user_id"].to_numpy())), rating=pl.lit(None, pl.Float32))
        known = [row for row in table.select("user_id", "item_id", "timestamp").rows() if row[2] is not None]
        if len(set(known)) < len(known):
            with pytest.raises(DataError, match="duplicated interaction"):
                check_interactions(table)
        else:
            check_interactions(table)


def test_data_home(monkeypatch, tmp_path):
    monkeypatch.setenv("L2REC_DATA", str(tmp_path))
    assert data_home() == tmp_path
    monkeypatch.delenv("L2REC_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_home() == tmp_path / "cache" / "l2rec"


@pytest.mark.parametrize("name, counts", [
    ("amazon-scientific", (2928, 1585, 19712)), ("amazon-beauty", (22363, 12101, 198502)), ("amazon-sports", (35598, 18357, 296337)),
    ("amazon-toys", (19412, 11924, 167597)), ("ml-100k", (943, 1682, 100000)), ("ml-1m", (6040, 3416, 999609))])
def test_real_folders(name, counts, tmp_path):
    if not (REAL / name / "manifest.json").is_file():
        pytest.skip(f"{name} is not in L2REC_DATA; set L2REC_DATA to the folder of datasets to check the real one")
    dataset = read_dataset(REAL / name)
    assert (dataset.n_users, dataset.n_items, dataset.n_interactions) == counts
    if dataset.features:
        assert write_dataset(dataset, tmp_path / name).manifest["sha256"].keys() == dataset.manifest["sha256"].keys()
        assert read_dataset(tmp_path / name).interactions.equals(dataset.interactions)
        shutil.rmtree(tmp_path / name)
