"""MovieLens in the originals' exact formats, malformed lines included."""
import zipfile
from pathlib import Path

import polars as pl
import pytest

from l2rec.data.dataset import DataError, read_dataset
from l2rec.data.movielens import ARCHIVES, OCCUPATIONS, prepare_movielens, read_movielens

GENRES = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror",
          "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]


def flags(*on):
    return "|".join("1" if genre in on else "0" for genre in GENRES)


FILES_100K = {
    "u.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n196\t302\t5\t881250949\n196\t1412\t1\t881250900\n",
    "u.genre": "".join(f"{genre}|{number}\n" for number, genre in enumerate(GENRES)) + "\n",
    "u.item": (f"242|Kolya (1996)|24-Jan-1997||http://us.imdb.com/M/title-exact?Kolya%20(1996)|{flags('Comedy')}\n"
               f"302|Misérables, Les (1995)|01-Jan-1997||http://us.imdb.com/M/title-exact?x|{flags('Drama', 'Musical')}\n"
               f"267|unknown||||{flags('unknown')}\n"
               f"1412|Land Before Time III: The Time of the Great Giving (1995) (V)|01-Jan-1995||http://us.imdb.com/M/t|{flags('Animation')}\n"),
    "u.user": "196|49|M|writer|55105\n186|39|F|executive|00000\n",
}
FILES_1M = {
    "ratings.dat": "1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978298413\n",
    "movies.dat": "661::James and the Giant Peach (1996)::Animation|Children's|Musical\n1193::One Flew Over the Cuckoo's Nest (1975)::Drama\n3952::Contender, The (2000)::Drama|Thriller\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
}


def archive(path: Path, name: str, files: dict, **changed) -> Path:
    files = {**files, **{key.replace("_", "."): value for key, value in changed.items()}}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for member, text in files.items():
            if text is not None:
                made.writestr(f"{name}/{member}", text.encode("latin-1"))
    return path


def test_100k(tmp_path):
    dataset = read_movielens("ml-100k", archive(tmp_path / "a.zip", "ml-100k", FILES_100K))
    assert dataset.n_interactions == 4 and dataset.n_users == 2 and dataset.n_items == 3 and dataset.items.height == 4
    items = {row["item_id"]: row for row in dataset.items.iter_rows(named=True)}
    assert (items[302]["title"], items[302]["year"], items[302]["categories"]) == ("Misérables, Les", 1995, ["Drama", "Musical"])
    assert (items[267]["title"], items[267]["year"]) == ("unknown", None)
    assert (items[1412]["title"], items[1412]["year"]) == ("Land Before Time III: The Time of the Great Giving", 1995)
    assert dataset.users.filter(pl.col("user_id") == 196).row(0)[1:5] == ("M", "45-49", "writer", "55105")
    mine = dataset.interactions.filter(pl.col("user_id") == 196)
    assert mine["timestamp"].to_list() == [881250900, 881250949, 881250949] and mine["rating"].dtype == pl.Float32


def test_1m(tmp_path):
    dataset = read_movielens("ml-1m", archive(tmp_path / "a.zip", "ml-1m", FILES_1M))
    assert dataset.items["title"].to_list() == ["James and the Giant Peach", "One Flew Over the Cuckoo's Nest", "The Contender"]
    assert dataset.items["categories"].to_list()[0] == ["Animation", "Children's", "Musical"]
    assert dataset.users.rows() == [(1, "F", "under 18", "K-12 student", "48067"), (2, "M", "56+", "self-employed", "70072")]
    assert len(OCCUPATIONS) == 21 and "seconds" in dataset.manifest["time"]


def test_order_does_not_depend_on_the_file(tmp_path):
    lines = [f"7\t{item}\t4\t100" for item in (242, 302, 267, 1412)]
    users = {"u_user": "7|20|F|student|1\n"}
    one = read_movielens("ml-100k", archive(tmp_path / "a.zip", "ml-100k", FILES_100K, u_data="\n".join(lines), **users))
    two = read_movielens("ml-100k", archive(tmp_path / "b.zip", "ml-100k", FILES_100K, u_data="\n".join(lines[::-1]) + "\n", **users))
    assert one.interactions.equals(two.interactions) and one.sha256 == two.sha256


@pytest.mark.parametrize("changed, words", [
    ({"u_data": "196\t242\t3\t881250949\n196\t302\t3\n"}, "u.data, line 2: 3 fields, and 4 are due"),
    ({"u_data": "196\t242\t3\t881250949\n196\tx12\t3\t1\n"}, "u.data, line 2, field item_id: 'x12'"),
    ({"u_data": "196\t242\t3\t881250949\n\n196\t302\t6\t1\n"}, "u.data, line 3, field rating: '6' is no whole number from 1 to 5"),
    ({"u_data": "196\t242\tNaN\t881250949\n"}, "line 1, field rating: 'NaN'"),
    ({"u_data": "0\t242\t3\t881250949\n"}, "line 1, field user_id: '0'"),
    ({"u_data": "196\t242\t3\t881250949\n196\t242\t3\t881250949\n"}, "duplicated interaction"),
    ({"u_data": "196\t999\t3\t881250949\n"}, "item_id 999 has no row"),
    ({"u_data": "999\t242\t3\t881250949\n"}, "user_id 999 has no row"),
    ({"u_data": ""}, "empty"),
    ({"u_item": "242|Kolya (1996)|24-Jan-1997||http|0|1\n"}, "u.item, line 1: 7 fields, and 24 are due"),
    ({"u_user": "196|old|M|writer|55105\n"}, "u.user, line 1, field age_years: 'old'"),
    ({"u_genre": None}, "there is no ml-100k/u.genre inside"),
])
def test_malformed_100k(tmp_path, changed, words):
    with pytest.raises(DataError) as caught:
        read_movielens("ml-100k", archive(tmp_path / "a.zip", "ml-100k", FILES_100K, **changed))
    assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("changed, words", [
    ({"ratings_dat": "1::1193::5::978300760\n1::661:3::978302109\n"}, "ratings.dat, line 2: 3 fields, and 4 are due"),
    ({"ratings_dat": "1::1193::5::97830x\n"}, "ratings.dat, line 1, field timestamp"),
    ({"users_dat": "1::F::2::10::48067\n2::M::56::16::70072\n"}, "users.dat, line 1, field age: 2 is none of"),
    ({"users_dat": "1::F::1::21::48067\n"}, "users.dat, line 1, field occupation: '21'"),
    ({"movies_dat": "661::James::Drama::x\n"}, "movies.dat, line 1: 4 fields"),
])
def test_malformed_1m(tmp_path, changed, words):
    with pytest.raises(DataError) as caught:
        read_movielens("ml-1m", archive(tmp_path / "a.zip", "ml-1m", FILES_1M, **changed))
    assert words in str(caught.value), str(caught.value)


def test_truncated_zip(tmp_path):
    whole = archive(tmp_path / "a.zip", "ml-1m", FILES_1M).read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="a.zip: cannot be read as a zip file"):
        read_movielens("ml-1m", tmp_path / "a.zip")


def test_prepare_refuses_another_archive_and_writes_the_right_one(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    archive(tmp_path / "raw/ml-1m.zip", "ml-1m", FILES_1M)
    with pytest.raises(DataError, match="ml-1m.zip: sha256 is"):
        prepare_movielens("ml-1m", tmp_path / "ml-1m", tmp_path / "raw", progress=False)
    assert not (tmp_path / "ml-1m").exists()
    monkeypatch.setitem(ARCHIVES, "ml-1m", {"url": ARCHIVES["ml-1m"]["url"]})
    prepare_movielens("ml-1m", tmp_path / "ml-1m", tmp_path / "raw", progress=False)
    assert read_dataset(tmp_path / "ml-1m").n_interactions == 3
