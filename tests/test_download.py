"""Downloads against a server of our own: interrupted, changed, refused, wrong, and absent."""
import gzip
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from l2rec.data.dataset import DataError
from l2rec.data.download import fetch, read_member

BODY = gzip.compress(os.urandom(3_000_000))


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`; each behaviour is an attribute that a test sets."""

    daemon_threads = True
    body, etag, stop_after, ranges, status, asked, pause = BODY, '"v1"', None, True, 200, (), 0.0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name="reviews.json.gz"):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append((wanted, self.headers.get("If-Range")))
        start = int(wanted[6:-1]) if wanted and server.ranges else 0
        if self.headers.get("If-Range") not in (None, server.etag):
            start = 0
        body = server.body
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if start else server.status)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        end = len(body) if server.stop_after is None else min(len(body), start + server.stop_after)
        for at in range(start, end, 50_000):
            self.wfile.write(body[at : min(at + 50_000, end)])
            time.sleep(server.pause)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def get(server, tmp_path, name="reviews.json.gz", **options):
    return fetch(server.url(name), tmp_path / "raw" / name, progress=False, timeout=5, **options)


def test_whole_file_record_and_no_leftovers(server, tmp_path):
    path = get(server, tmp_path)
    assert path.read_bytes() == BODY
    assert (tmp_path / "raw/reviews.json.gz.sha256").read_text().split()[0] == hashlib.sha256(BODY).hexdigest()
    assert sorted(one.name for one in path.parent.iterdir()) == ["reviews.json.gz", "reviews.json.gz.sha256"]
    get(server, tmp_path)
    assert len(server.asked) == 1  # the second time nothing is asked


def test_resumes_after_each_broken_connection(server, tmp_path):
    server.stop_after = 1_000_000
    assert get(server, tmp_path).read_bytes() == BODY
    assert [wanted for wanted, _ in server.asked] == [None, "bytes=1000000-", "bytes=2000000-", "bytes=3000000-"]
    assert server.asked[1][1] == '"v1"'


def test_gives_up_keeps_the_part_and_goes_on_later(server, tmp_path):
    server.stop_after = 1_000_000
    with pytest.raises(DataError, match="1,000,000 bytes are kept in .*reviews.json.gz.part") as caught:
        get(server, tmp_path, attempts=1)
    assert server.url() in str(caught.value) and "put the file at" in str(caught.value)
    server.stop_after = None
    assert get(server, tmp_path, attempts=1).read_bytes() == BODY
    assert server.asked[1][0] == "bytes=1000000-"


def test_a_file_that_changed_on_the_server_starts_over(server, tmp_path):
    server.stop_after = 1_000_000
    with pytest.raises(DataError):
        get(server, tmp_path, attempts=1)
    server.body, server.etag, server.stop_after = gzip.compress(os.urandom(500_000)), '"v2"', None
    assert get(server, tmp_path).read_bytes() == server.body


def test_without_etag_a_changed_length_starts_over(server, tmp_path):
    server.etag, server.stop_after = None, 1_000_000
    with pytest.raises(DataError):
        get(server, tmp_path, attempts=1)
    server.body, server.stop_after = gzip.compress(os.urandom(4_000_000)), None
    assert get(server, tmp_path).read_bytes() == server.body


def test_a_server_without_ranges_and_a_stale_part(server, tmp_path):
    server.stop_after = 1_000_000
    with pytest.raises(DataError):
        get(server, tmp_path, attempts=1)
    server.ranges, server.stop_after = False, None
    assert get(server, tmp_path).read_bytes() == BODY
    other = tmp_path / "raw" / "other.json.gz.part"
    other.write_bytes(b"no record of its edition")
    assert get(server, tmp_path, "other.json.gz").read_bytes() == BODY


def test_killed_midway_then_resumed(server, tmp_path):
    server.pause = 0.05
    code = f"from l2rec.data.download import fetch; fetch({server.url()!r}, {str(tmp_path / 'raw/reviews.json.gz')!r}, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", code])
    part = tmp_path / "raw/reviews.json.gz.part"
    deadline = time.time() + 60
    while not (part.is_file() and part.stat().st_size > 500_000) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert 0 < kept < len(BODY) and not (tmp_path / "raw/reviews.json.gz").exists()
    server.pause = 0.0
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.asked[-1][0] == f"bytes={kept}-"


def test_digests(server, tmp_path):
    get(server, tmp_path, "a.json.gz", sha256=hashlib.sha256(BODY).hexdigest(), md5=hashlib.md5(BODY).hexdigest())
    for wrong in ({"sha256": "0" * 64}, {"md5": "0" * 32}):
        with pytest.raises(DataError, match="000 is published"):
            get(server, tmp_path, "b.json.gz", **wrong)
        with pytest.raises(DataError, match="000 is published"):
            get(server, tmp_path, "a.json.gz", **wrong)
    assert sorted(one.name for one in (tmp_path / "raw").iterdir()) == ["a.json.gz", "a.json.gz.sha256"]


def test_trust_on_first_use_notices_a_change(server, tmp_path):
    path = get(server, tmp_path)
    path.write_bytes(gzip.compress(b"another"))
    with pytest.raises(DataError, match="is recorded in .*reviews.json.gz.sha256"):
        get(server, tmp_path)


@pytest.mark.parametrize("name, body, words", [
    ("ml-100k.zip", b"<!DOCTYPE html><html>Sign in</html>", "an HTML page"), ("reviews.json.gz", b"\n <html>busy</html>", "an HTML page"),
    ("reviews.json.gz", b"PK\3\4....", "no gz file"), ("ml-100k.zip", b"PK\3\4" + b"x" * 1000, "zip file is truncated")])
def test_wrong_kind(server, tmp_path, name, body, words):
    server.body = body
    with pytest.raises(DataError, match=words):
        get(server, tmp_path, name)
    assert list((tmp_path / "raw").iterdir()) == []
    (tmp_path / "raw" / name).write_bytes(body)  # put there by hand
    with pytest.raises(DataError, match=words):
        get(server, tmp_path, name)


def test_status_and_no_network(server, tmp_path):
    server.status = 404
    with pytest.raises(DataError, match="the server answers 404") as caught:
        get(server, tmp_path)
    assert caught.value.__cause__ is not None
    with pytest.raises(DataError) as caught:
        fetch("http://127.0.0.1:9/ml-100k.zip", tmp_path / "raw/ml-100k.zip", progress=False, attempts=1)
    assert f"fetch http://127.0.0.1:9/ml-100k.zip, put the file at {tmp_path / 'raw/ml-100k.zip'}" in str(caught.value)


def test_a_place_that_cannot_be_written(server, tmp_path):
    (tmp_path / "raw").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        get(server, tmp_path)


def test_members(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("ml/u.data", b"0123456789" * 100)
    data = (tmp_path / "a.zip").read_bytes()
    assert read_member(tmp_path / "a.zip", "ml/u.data") == b"0123456789" * 100
    with pytest.raises(DataError, match="there is no ml/u.user inside"):
        read_member(tmp_path / "a.zip", "ml/u.user")
    (tmp_path / "b.zip").write_bytes(data[:-30])
    (tmp_path / "c.zip").write_bytes(data.replace(b"0123456789", b"0123456780", 1))
    for name in ("b.zip", "c.zip", "nowhere.zip"):
        with pytest.raises(DataError, match=f"{name}: cannot be read as a zip file"):
            read_member(tmp_path / name, "ml/u.data")
