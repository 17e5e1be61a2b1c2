"""Tables of one's own: names of columns, kinds of ids and times, and every way to get it wrong."""
from datetime import date, datetime, timezone

import polars as pl
import pytest

from l2rec.data.dataset import DataError, read_dataset, write_dataset
from l2rec.data.table import dataset_from_table

LOANS = "reader,book,date,stars\nada,moby,2024-01-05,4\nada,emma,2024-02-11,\nben,emma,2024-01-20,5\nada,dune,2024-03-02,3.5\nben,dune,2024-01-09,1\n"
BOOKS = "book,name,blurb,note,subjects,author,year\nmoby,Moby-Dick,A whale.,,sea | classic,Melville,1851\nemma,Emma,A matchmaker.,Witty.,classic,Austen,1815\ndune,Dune,,,,,\nsolaris,Solaris,,,sci-fi,Lem,1961\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "loans.csv").write_text(LOANS)
    (tmp_path / "books.csv").write_text(BOOKS)
    (tmp_path / "readers.csv").write_text("reader,town\nada,London\nben,Cork\ncleo,Rome\n")
    return tmp_path


def history(dataset, user):
    rows = dataset.interactions.join(dataset.users.select("user_id", user="source_id"), on="user_id").join(dataset.items.select("item_id", item="source_id"), on="item_id")
    return rows.filter(pl.col("user") == user).sort("position")["item"].to_list()


def test_csv_with_items_and_users(files):
    made = dataset_from_table(files / "loans.csv", user="reader", item="book", time="date", rating="stars", items=files / "books.csv", title="name", text=["blurb", "note"],
                              categories="subjects", brand="author", year="year", users=files / "readers.csv")
    assert made.name == "loans" and (made.n_users, made.n_items, made.items.height, made.users.height) == (2, 3, 4, 3)
    assert history(made, "ada") == ["moby", "emma", "dune"] and history(made, "ben") == ["dune", "emma"]
    items = {row["source_id"]: row for row in made.items.iter_rows(named=True)}
    assert items["emma"]["text"] == "A matchmaker. Witty." and items["moby"]["categories"] == ["sea", "classic"] and items["dune"]["categories"] == []
    assert items["dune"]["year"] is None and items["solaris"]["year"] == 1961 and items["moby"]["brand"] == "Melville"
    assert made.users.filter(pl.col("source_id") == "cleo")["town"].to_list() == ["Rome"]
    assert made.interactions["rating"].null_count() == 1
    assert read_dataset(write_dataset(made, files / "canonical").folder).interactions.equals(made.interactions)


def test_without_time_the_rows_are_the_order(files):
    made = dataset_from_table(files / "loans.csv", user="reader", item="book")
    assert history(made, "ben") == ["emma", "dune"] and made.interactions["timestamp"].null_count() == 5


@pytest.mark.parametrize("times", [[300, 100, 200], [300.0, 100.0, 200.0], [date(2024, 1, 3), date(2024, 1, 1), date(2024, 1, 2)],
                                   [datetime(2024, 1, 3, 5), datetime(2024, 1, 1, 9), datetime(2024, 1, 1, 10)], ["2024-01-03", "2024-01-01", "2024-01-01 00:01"],
                                   ["2024-01-01T10:00:02Z", "2024-01-01T10:00:00.5Z", "2024-01-01 10:00:01"]])
def test_kinds_of_times(tmp_path, times):
    pl.DataFrame({"u": [7, 7, 7], "i": [30, 10, 20], "t": times}).write_parquet(tmp_path / "t.parquet")
    made = dataset_from_table(tmp_path / "t.parquet", user="u", item="i", time="t")
    assert history(made, 7) == [10, 20, 30]
    assert made.items["source_id"].dtype == pl.Int64


def test_time_zone_counts(tmp_path):
    stamps = pl.Series([datetime(2024, 1, 1, 12, tzinfo=timezone.utc)]).dt.convert_time_zone("Asia/Tokyo")
    pl.DataFrame({"u": [1], "i": [1], "t": stamps}).write_parquet(tmp_path / "t.parquet")
    assert dataset_from_table(tmp_path / "t.parquet", user="u", item="i", time="t").interactions["timestamp"].to_list() == [1704110400]


def test_numbers_in_a_csv_are_numbers_and_tsv_works(tmp_path):
    (tmp_path / "t.tsv").write_text("u\ti\n10\t007\n9\t7\n")
    made = dataset_from_table(tmp_path / "t.tsv", user="u", item="i")
    assert made.users["source_id"].to_list() == [9, 10] and made.items["source_id"].to_list() == ["007", "7"]


@pytest.mark.parametrize("text, options, words", [
    (LOANS, {"item": "books"}, "column books is missing; the columns are reader, book, date, stars. Did you mean 'book'?"),
    (LOANS.replace("ben,emma", ",emma"), {}, "loans.csv, column reader, row 2: the id is missing"),
    (LOANS.replace("ben,emma", "ben,  "), {}, "loans.csv, column book, row 2: the id is empty"),
    (LOANS.replace("2024-01-20", "20.01.2024"), {"time": "date"}, "column date, row 2: the time cannot be read"),
    (LOANS.replace("2024-01-20", "2024-01-20T10:00:00+02:00"), {"time": "date"}, "column date, row 2: the time cannot be read"),
    (LOANS.replace("2024-01-20", ""), {"time": "date"}, "column date, row 2: the time is missing"),
    (LOANS.replace(",3.5", ",good"), {"rating": "stars"}, "column stars, row 3: the rating is no number"),
    (LOANS.replace(",3.5", ",NaN"), {"rating": "stars"}, "column stars, row 3: the rating is NaN"),
    (LOANS + "ada,moby,2024-01-05,2\n", {"time": "date"}, "row 5: duplicated interaction"),
    (LOANS + "ada,moby\n,,,,,,", {}, "cannot be read as a table"),
    ("reader,book,date\n", {}, "empty"),
    ("", {}, "cannot be read as a table"),
    (LOANS, {"duplicates": "last"}, "duplicates='last' is out of range"),
    (LOANS, {"items": "books.csv", "title": "title"}, "books.csv: column title is missing"),
    (LOANS.replace("ben,emma", "ben,ulysses"), {"items": "books.csv"}, "column book, row 2: the id has no row in"),
])
def test_bad_tables(files, monkeypatch, text, options, words):
    monkeypatch.chdir(files)
    (files / "loans.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        dataset_from_table("loans.csv", **{"user": "reader", "item": "book", **options})
    assert words in str(caught.value), str(caught.value)


def test_bad_item_tables(files):
    for text, words in ((BOOKS + "emma,Again,,,,,\n", "books.csv, column book, row 4: the id is there already"), (BOOKS.replace("1815", "long ago"), "column year, row 1: the year")):
        (files / "books.csv").write_text(text)
        with pytest.raises(DataError, match=words):
            dataset_from_table(files / "loans.csv", user="reader", item="book", items=files / "books.csv", year="year")
    (files / "books.csv").write_text("book,name\n1,One\n2,Two\n")
    with pytest.raises(DataError, match="item ids are String in the interactions and Int64 in the items table"):
        dataset_from_table(files / "loans.csv", user="reader", item="book", items=files / "books.csv")


def test_doubled_rows_can_be_merged_on_request(files):
    (files / "loans.csv").write_text(LOANS + "ada,moby,2024-01-05,2\n")
    made = dataset_from_table(files / "loans.csv", user="reader", item="book", time="date", rating="stars", duplicates="first")
    assert made.n_interactions == 5 and 2.0 not in made.interactions["rating"].to_list()


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="the file is not there"):
        dataset_from_table(tmp_path / "no.csv", user="u", item="i")
    with pytest.raises(DataError, match="the file is not there"):
        dataset_from_table(tmp_path / "no.parquet", user="u", item="i")
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match="files of this kind are not read"):
        dataset_from_table(tmp_path / "a.xlsx", user="u", item="i")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="cannot be read as a table") as caught:
        dataset_from_table(tmp_path / "a.parquet", user="u", item="i")
    assert caught.value.__cause__ is not None
    pl.DataFrame({"u": [1.0, None], "i": [1, 2]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="column u, row 1: the id is missing"):
        dataset_from_table(tmp_path / "b.parquet", user="u", item="i")
    pl.DataFrame({"u": [1.0, 2.0], "i": [1, 2]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="column u: the type is Float64; ids must be whole numbers or texts"):
        dataset_from_table(tmp_path / "b.parquet", user="u", item="i")
