"""Amazon 2014 and 2023 in the originals' exact formats: content, malformed lines, k-core, and memory."""
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from l2rec.data.amazon import CATEGORIES_2023, EDITIONS, fetch_and_prepare, k_core, line_blocks, prepare_amazon, read_reviews
from l2rec.data.dataset import DataError, read_dataset, tie_hash


def review_2014(user, item, time, rating=5.0, **more):
    record = {"reviewerID": user, "asin": item, "reviewerName": "Andrea", "helpful": [3, 4], "reviewText": "Very oily \"and\" creamy.\u2028Good {x}.", "overall": rating,
              "summary": "Don't waste", "unixReviewTime": time, "reviewTime": "01 30, 2014", **more}
    return json.dumps(record)


def review_2023(user, item, time, rating=5.0, **more):
    return json.dumps({"rating": rating, "title": "Good", "text": "I like it.", "images": [{"small_image_url": "https://x/y.jpg"}], "asin": item + "V", "parent_asin": item,
                       "user_id": user, "timestamp": time, "helpful_vote": 0, "verified_purchase": True, **more})


META_2014 = [
    "{'asin': 'B1', 'title': \"Rose Water & Aloe\", 'price': 3.5, 'imUrl': 'http://x/a.jpg', 'related': {'also_bought': ['B2', 'B3']}, 'salesRank': {'Beauty': 10}, "
    "'brand': 'Heritage', 'categories': [['Beauty', 'Skin Care'], ['Beauty', 'Gifts']], 'description': 'A mist &amp; a toner.\\nFine.'}",
    "{'asin': 'B2', 'categories': [['Beauty']], 'description': ''}",
    "{'asin': 'ZZ', 'title': 'Nobody reviewed me', 'categories': [['Beauty']]}",
]
META_2023 = [
    json.dumps({"main_category": "Books", "title": "Emma", "average_rating": 4.4, "rating_number": 9, "features": ["Classic", "Unabridged"], "description": ["A matchmaker."],
                "price": None, "images": [], "videos": [], "store": "Jane Austen (Author)", "categories": ["Books", "Literature"],
                "details": {"Publisher": "Penguin (May 6, 2003)", "Best Sellers Rank": {"Books": 3}}, "parent_asin": "B1", "bought_together": None}),
    json.dumps({"title": None, "features": [], "description": [], "price": "from 5.99", "store": None, "categories": [], "details": {}, "parent_asin": "B2"}),
]


def write(path: Path, lines, newline=True) -> Path:
    path.write_bytes(gzip.compress(("\n".join(lines) + ("\n" if newline else "")).encode()))
    return path


def prepare(tmp_path, reviews, metadata=None, edition="2014", **options):
    meta = write(tmp_path / "meta.gz", metadata) if metadata else None
    manifest = prepare_amazon("a", write(tmp_path / "reviews.gz", reviews), meta, tmp_path / "a", edition, progress=False, **options)
    return read_dataset(tmp_path / "a"), manifest["preparation"]


def named(dataset) -> list[tuple]:
    rows = dataset.interactions.join(dataset.users.select("user_id", user="source_id"), on="user_id").join(dataset.items.select("item_id", item="source_id"), on="item_id")
    return rows.sort("user", "position").select("user", "item", "timestamp", "rating").rows()


def test_2014(tmp_path):
    lines = [review_2014("A1", "B2", 1391040000), review_2014("A2", "B1", 1391040000, 3.0), review_2014("A1", "B1", 1390003200, 4.0), review_2014("A2", "B3", 1300000000)]
    dataset, about = prepare(tmp_path, lines, META_2014)
    assert named(dataset) == [("A1", "B1", 1390003200, 4.0), ("A1", "B2", 1391040000, 5.0), ("A2", "B3", 1300000000, 5.0), ("A2", "B1", 1391040000, 3.0)]
    items = {row["source_id"]: row for row in dataset.items.iter_rows(named=True)}
    assert items["B1"]["title"] == "Rose Water & Aloe" and items["B1"]["text"] == "A mist & a toner.\nFine." and items["B1"]["brand"] == "Heritage"
    assert items["B1"]["categories"] == ["Beauty", "Skin Care", "Gifts"] and items["B3"]["categories"] == [] and "ZZ" not in items
    assert about["items_with_metadata"] == 2 and about["malformed_reviews_left_out"] == 0


def test_2023(tmp_path):
    lines = [review_2023("AE", "B1", 1588687728923), review_2023("AE", "B2", 1588687728100, 1.0), review_2023("AE", "B1", 1588687728950, 2.0), review_2023("AF", "B2", 1600000000000)]
    dataset, about = prepare(tmp_path, lines, META_2023, "2023")
    assert named(dataset) == [("AE", "B2", 1588687728, 1.0), ("AE", "B1", 1588687728, 5.0), ("AF", "B2", 1600000000, 5.0)]  # milliseconds order, seconds are stored
    assert about["doubled_reviews_merged"] == 1
    first = dataset.items.row(0, named=True)
    assert (first["title"], first["text"], first["brand"], first["year"]) == ("Emma", "A matchmaker. Classic Unabridged", "Jane Austen (Author)", 2003)
    assert dataset.items.row(1, named=True)["title"] == ""
    assert prepare_amazon("b", tmp_path / "reviews.gz", tmp_path / "meta.gz", tmp_path / "b", "2023", text_characters=8, progress=False)
    assert read_dataset(tmp_path / "b").items["text"][0] == "A matchm"


def test_ties_within_a_day_follow_the_hash(tmp_path):
    lines = [review_2014("A1", f"B{number}", 1391040000) for number in range(9)]
    one, _ = prepare(tmp_path, lines)
    expected = sorted(range(1, 10), key=lambda item: int(tie_hash(np.array([1], np.int32), np.array([item], np.int32))[0]))
    assert one.interactions["item_id"].to_list() == expected != sorted(expected)


@pytest.mark.parametrize("bad, words", [
    ('{"reviewerID": "A9", "asin": "B1", "overall": 5.0, "unixRev', "Unterminated string"),
    ("", "Expecting value"),
    ("[1, 2]", "the line is no JSON object"),
    (review_2014("A9", "B1", 1) + review_2014("A9", "B2", 1), "Extra data"),
    (json.dumps({"reviewerID": "A9", "overall": 5.0, "unixReviewTime": 1}), "the field asin is missing"),
    (review_2014("A9", "", 1), "the field asin is ''"),
    (review_2014(None, "B1", 1), "the field reviewerID is None"),
    (review_2014("A9", "B1", "yesterday"), "the field unixReviewTime is 'yesterday'"),
    (review_2014("A9", "B1", 1, "five"), "the field overall is 'five'"),
    (review_2014("A9", "B1", 1, float("nan")), "the field overall is nan"),
])
def test_malformed_reviews(tmp_path, bad, words):
    good = [review_2014(f"A{number}", f"B{number % 3}", 1391040000 + number) for number in range(6)]
    lines = good[:4] + [bad] + good[4:]
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, lines)
    assert "reviews.gz, line 5: " in str(caught.value) and words in str(caught.value) and "malformed='skip'" in str(caught.value), str(caught.value)
    assert not (tmp_path / "a").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["reviews.gz"]
    dataset, about = prepare(tmp_path, lines, malformed="skip")
    assert dataset.n_interactions == 6 and about["malformed_reviews_left_out"] == 1


def test_line_numbers_across_blocks(tmp_path):
    lines = [review_2014(f"A{number}", "B1", 1391040000) for number in range(300)]
    path = write(tmp_path / "r.gz", lines, newline=False)
    blocks = list(line_blocks(path, size=1000, progress=False))
    assert len(blocks) > 50 and b"".join(block for _, block in blocks).decode().splitlines(keepends=False)[:1] == [lines[0]]
    for first, block in blocks:
        assert read_reviews(path, first, block, EDITIONS["2014"])[0]["user"].to_list()[0] == f"A{first - 1}"


@pytest.mark.parametrize("bad, words", [("{'asin': 'B1', 'title': 'cut", "line 2"), ("{'title': 'no asin'}", "the field asin is missing"), ("__import__('os').system('x')", "line 2")])
def test_malformed_metadata(tmp_path, bad, words):
    reviews = [review_2014("A1", "B1", 1391040000), review_2014("A1", "B2", 1391040001)]
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, reviews, [META_2014[1], bad])
    assert "meta.gz, line 2" in str(caught.value) and words in str(caught.value)
    dataset, about = prepare(tmp_path, reviews, [META_2014[1], bad], malformed="skip")
    assert about["malformed_metadata_left_out"] == 1 and about["items_with_metadata"] == 1


def test_truncated_and_wrong_files(tmp_path):
    path = write(tmp_path / "reviews.gz", [review_2014(f"A{number}", "B1", number) for number in range(2000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="reviews.gz: the gzip file is truncated"):
        prepare_amazon("a", path, None, tmp_path / "a", "2014", progress=False)
    for data in (b"<html>", whole[:500] + b"garbage" + whole[600:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match="reviews.gz: cannot be read as gzip"):
            prepare_amazon("a", path, None, tmp_path / "a", "2014", progress=False)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="holds no review"):
        prepare_amazon("a", path, None, tmp_path / "a", "2014", progress=False)
    assert [one.name for one in tmp_path.iterdir()] == ["reviews.gz"]


def test_k_core_against_a_slow_reference(tmp_path):
    rng = np.random.default_rng(3)
    rows = sorted({(f"A{user}", f"B{item}") for user, item in zip(rng.integers(0, 60, 420), rng.integers(0, 60, 420))})
    kept = list(rows)
    while True:
        users, items = Counter(user for user, _ in kept), Counter(item for _, item in kept)
        fewer = [(user, item) for user, item in kept if users[user] >= 5 and items[item] >= 5]
        if len(fewer) == len(kept):
            break
        kept = fewer
    assert 0 < len(kept) < len(rows)
    dataset, about = prepare(tmp_path, [review_2014(user, item, 1391040000) for user, item in rows], k_core=5)
    assert sorted((user, item) for user, item, _, _ in named(dataset)) == kept and about["k_core"] == 5
    assert dataset.users["user_id"].to_list() == list(range(1, dataset.n_users + 1)) and dataset.items["item_id"].to_list() == list(range(1, dataset.n_items + 1))
    with pytest.raises(DataError, match="no interaction is left after the 50-core"):
        prepare_amazon("b", tmp_path / "reviews.gz", None, tmp_path / "b", "2014", k_core=50, progress=False)
    assert k_core([(np.zeros(0, np.int32), np.zeros(0, np.int32))], 0, 5)[0].tolist() == []


def test_options_out_of_range(tmp_path):
    for options in ({"edition": "2018"}, {"edition": "2014", "k_core": 0}, {"edition": "2014", "malformed": "ignore"}):
        with pytest.raises(DataError, match="out of range"):
            prepare_amazon("a", tmp_path / "r.gz", None, tmp_path / "a", progress=False, **options)
    with pytest.raises(DataError, match="no category 'Book'.*amazon2023-Books"):
        fetch_and_prepare("amazon2023-Book", tmp_path / "a", tmp_path / "raw")
    assert len(CATEGORIES_2023) == 34


MEMORY = """
import resource, sys
from pathlib import Path
from l2rec.data.amazon import prepare_amazon
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
prepare_amazon("big", Path(sys.argv[1]), None, Path(sys.argv[2]), "2023", progress=False)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """300,000 reviews with 1.2 kB of text each: over 350 MB as text, of which only a part may ever be in memory."""
    rng = np.random.default_rng(0)
    filler = "I like it. " * 100
    with gzip.open(tmp_path / "Big.jsonl.gz", "wt", compresslevel=1) as file:
        for user, item, time in zip(rng.integers(0, 80_000, 300_000), rng.integers(0, 9_000, 300_000), rng.integers(1_300_000_000, 1_690_000_000, 300_000)):
            file.write(f'{{"rating": 5.0, "text": "{filler}", "parent_asin": "B{item:09d}", "user_id": "AE{user:026d}", "timestamp": {time}000}}\n')
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "Big.jsonl.gz", tmp_path / "big"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 300, f"peak memory grew by {done.stdout} MB"
    assert read_dataset(tmp_path / "big").n_interactions > 299_000
