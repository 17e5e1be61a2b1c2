"""Names, shelves and preparing: once, whole, and with a clear word when it cannot be."""
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from l2rec.data.dataset import DataError, make_dataset, write_dataset
from l2rec.data.load import KNOWN, alone, known_names, load_dataset, main, prepare

REAL = Path(os.environ.get("L2REC_DATA", "no-such-folder"))


def shelve(home: Path, name: str) -> None:
    write_dataset(make_dataset(name, pl.DataFrame({"user_id": [1, 1], "item_id": [5, 6], "position": [0, 1]})), home / name)


def originals(home: Path) -> None:
    """The two files of amazon-beauty in miniature, where a user without network would put them."""
    raw = home / "raw" / "amazon-beauty"
    raw.mkdir(parents=True)
    lines = [{"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": time} for user, item, time in (("A1", "B1", 1), ("A1", "B2", 2), ("A2", "B2", 1))]
    (raw / "reviews_Beauty_5.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    (raw / "meta_Beauty.json.gz").write_bytes(gzip.compress(b"{'asin': 'B1', 'title': 'Rose Water'}\n"))


def test_shelf_path_and_environment(tmp_path, monkeypatch):
    shelve(tmp_path, "mine")
    assert load_dataset("mine", tmp_path).n_interactions == 2
    assert load_dataset(tmp_path / "mine").sha256 == load_dataset(str(tmp_path / "mine")).sha256
    monkeypatch.setenv("L2REC_DATA", str(tmp_path))
    assert load_dataset("mine").name == "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("L2REC_DATA")
    assert load_dataset("mine", tmp_path / "elsewhere").name == "mine"  # a folder of that name right here
    assert "mine" in known_names(tmp_path) and set(KNOWN) <= set(known_names(tmp_path))


@pytest.mark.parametrize("typo, near", [("ml100k", "ml-100k"), ("amazon-beuty", "amazon-beauty"), ("syntetic", "synthetic"), ("amazon2023-Boks", "amazon2023-Books"), ("mine2", "mine")])
def test_typo(tmp_path, typo, near):
    shelve(tmp_path, "mine")
    with pytest.raises(DataError, match=near):
        load_dataset(typo, tmp_path)


def test_what_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match="Known: .*ml-1m"):
        load_dataset("qqqq", tmp_path)
    (tmp_path / "loans.csv").write_text("a,b\n")
    for name in ("loans.csv", tmp_path / "loans.csv"):
        with pytest.raises(DataError, match="dataset_from_table"):
            load_dataset(name, tmp_path)
    with pytest.raises(DataError, match="is not there"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="made in memory"):
        prepare("synthetic", tmp_path)


def test_scientific_has_no_original(tmp_path):
    with pytest.raises(DataError, match="no public original.*amazon-scientific"):
        load_dataset("amazon-scientific", tmp_path)


def test_prepared_once_from_files_put_there(tmp_path):
    originals(tmp_path)
    dataset = load_dataset("amazon-beauty", tmp_path, progress=False)
    assert dataset.n_interactions == 3 and dataset.items["title"].to_list() == ["Rose Water", ""]
    for file in (tmp_path / "raw/amazon-beauty").iterdir():
        file.unlink()
    assert load_dataset("amazon-beauty", tmp_path).sha256 == dataset.sha256


def test_a_failed_preparing_leaves_nothing(tmp_path):
    originals(tmp_path)
    path = tmp_path / "raw/amazon-beauty/reviews_Beauty_5.json.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="truncated"):
        load_dataset("amazon-beauty", tmp_path, progress=False)
    assert not (tmp_path / "amazon-beauty").exists() and not list(tmp_path.glob(".*.partial"))


def test_two_processes_prepare_once(tmp_path):
    originals(tmp_path)
    code = f"from pathlib import Path; from l2rec.data.load import load_dataset; print(load_dataset('amazon-beauty', Path({str(tmp_path)!r}), progress=False).sha256)"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    with alone(tmp_path / "lock"):
        pass


def test_a_shelf_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written.*L2REC_DATA"):
        load_dataset("ml-100k", tmp_path / "file" / "shelf")


def test_command_line(tmp_path, capsys):
    shelve(tmp_path, "mine")
    assert main(["mine", "--home", str(tmp_path)]) == 0
    assert "1 users, 2 items, 2 interactions" in capsys.readouterr().out
    assert main(["mien", "--home", str(tmp_path)]) == 1
    assert "Did you mean mine" in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-m", "l2rec.data.load", "mine", "--home", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and "sha256" in done.stdout, done.stderr


def test_synthetic_by_name():
    pytest.importorskip("l2rec.data.synthetic", reason="export the notebooks first: make export")
    first, again, other = load_dataset("synthetic"), load_dataset("synthetic"), load_dataset("synthetic-seed7")
    assert first.sha256 == again.sha256 != other.sha256


def test_importing_the_loader_imports_no_source():
    code = "import sys, l2rec.data.load; print([name for name in sys.modules if name.startswith('l2rec.data.')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["['l2rec.data.dataset',", "'l2rec.data.load']"]


def test_real_shelf():
    if not (REAL / "ml-100k" / "manifest.json").is_file():
        pytest.skip("ml-100k is not in L2REC_DATA; set L2REC_DATA to the folder of datasets to load the real one")
    assert load_dataset("ml-100k").n_interactions == 100_000
