"""Records: whole or not at all, finite, and read back as they were written."""
import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest

from l2rec.training import records as r

USERS = pl.DataFrame({'user_id': [3, 5], 'ndcg@10': [0.5, 1.0]}, schema={'user_id': pl.Int32, 'ndcg@10': pl.Float32})


@pytest.fixture
def place(tmp_path):
    return r.record_path(tmp_path, 'demo', 'retrieval', 'synthetic', 'sasrec', 'wide', 2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(place):
    history = [dict(epoch=1, loss=2.5, note=None), dict(epoch=2, loss=2.0, note='best')]
    r.write_record(place, {'test/ndcg@10': np.float32(0.25), 'time/epochs': 2}, USERS, history, dict(seed=2), files={'chosen.json': dict(lr=0.1), 'trials.csv': [dict(a=1)]})
    assert names(place) == ['chosen.json', 'history.csv', 'metrics.json', 'per_user.parquet', 'provenance.json', 'trials.csv']
    record = r.read_record(place)
    assert (record.profile, record.experiment, record.dataset, record.model, record.variant, record.seed) == ('demo', 'retrieval', 'synthetic', 'sasrec', 'wide', 2)
    assert record.metrics == {'test/ndcg@10': 0.25, 'time/epochs': 2.0} and record.provenance == dict(seed=2)
    assert record.per_user().equals(USERS) and record.history()['loss'].to_list() == [2.5, 2.0]


def test_an_older_record_is_replaced_as_a_whole(place):
    r.write_record(place, {'a': 1}, USERS)
    r.write_record(place, {'a': 2})
    assert names(place) == ['metrics.json', 'provenance.json'] and names(place.parent) == ['seed-2']


def test_replacement_without_exchange_and_its_repair(place, monkeypatch):
    monkeypatch.setattr(r, 'exchange', lambda first, second: False)
    r.write_record(place, {'a': 1})
    r.write_record(place, {'a': 2})
    assert r.read_record(place).metrics == {'a': 2} and names(place.parent) == ['seed-2']
    os.rename(place, r.aside(place, 'old')) # killed between the two steps
    r.restore(place)
    assert r.read_record(place).metrics == {'a': 2}
    r.aside(place, 'old').mkdir() # killed before the last removal
    r.restore(place)
    assert names(place.parent) == ['seed-2']


@pytest.mark.parametrize('value, message', [(float('nan'), "'test/x' is nan"), (float('inf'), "'test/x' is inf"), ('high', "'test/x' is no number"), (None, "'test/x' is no number")])
def test_a_bad_metric_is_named_and_the_old_record_stays(place, value, message):
    r.write_record(place, {'a': 1})
    with pytest.raises(ValueError, match=message): r.write_record(place, {'a': 2, 'test/x': value})
    assert r.read_record(place).metrics == {'a': 1} and names(place.parent) == ['seed-2']


@pytest.mark.parametrize('arguments, message', [
    (dict(metrics={}), 'no metrics'),
    (dict(metrics={'a': 1}, per_user=pl.DataFrame({'user': [1]})), 'no column user_id'),
    (dict(metrics={'a': 1}, per_user=pl.DataFrame({'user_id': [1, 1]})), 'names a user twice'),
    (dict(metrics={'a': 1}, files={'../x.json': {}}), 'a name is made of'),
    (dict(metrics={'a': 1}, files={'metrics.json': {}}), 'usual files'),
    (dict(metrics={'a': 1}, files={'x.pkl': {}}), 'a record holds'),
    (dict(metrics={'a': 1}, provenance=dict(loss=float('nan'))), 'not JSON compliant'),
])
def test_bad_arguments_write_nothing(place, arguments, message):
    with pytest.raises(ValueError, match=message): r.write_record(place, **arguments)
    assert not place.parent.exists()


@pytest.mark.parametrize('code, words', [(errno.ENOSPC, 'the disk is full'), (errno.EACCES, 'this user may not write'), (errno.EROFS, 'read-only')])
def test_a_disk_that_fails_in_the_middle(place, monkeypatch, code, words):
    r.write_record(place, {'a': 1})
    calls = []
    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2: raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(r.RecordError, match=words): r.write_record(place, {'a': 2}, USERS)
    assert r.read_record(place).metrics == {'a': 1} and names(place.parent) == ['seed-2']


def test_a_real_write_that_does_not_fit(tmp_path):
    """The operating system itself refuses the bytes: a limit on file sizes, as a full disk would."""
    code = ('import resource, sys, polars as pl\nfrom l2rec.training.records import *\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n'
            'try: write_record(sys.argv[1], {"a": 1}, pl.DataFrame({"user_id": list(range(9999))}))\nexcept RecordError as error: print(error)')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'seed-0')], capture_output=True, text=True)
    assert 'not written, the file would be larger than is allowed' in done.stdout, done.stderr
    assert names(tmp_path) == []


def test_killed_at_random_moments(tmp_path):
    """A process that writes records in a loop is killed: there is a whole record each time."""
    place = r.record_path(tmp_path, 'demo', 'retrieval', 'synthetic', 'sasrec')
    code = ('import sys, polars as pl\nfrom l2rec.training.records import *\nusers, i = pl.DataFrame({"user_id": list(range(500))}), 0\n'
            'while True:\n    i += 1\n    write_record(sys.argv[1], {"i": i}, users.with_columns(pl.lit(i).alias("i")))\n    print(i, flush=True)')
    for wait in (0.0, 0.01, 0.023, 0.05):
        child = subprocess.Popen([sys.executable, '-c', code, str(place)], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.wait()
        record = r.read_record(place)
        assert record.per_user()['i'].unique().to_list() == [record.metrics['i']]


def test_names():
    for bad in ('', 'a/b', 'a+b', '.hidden', 'a b', 'a:b', 'ä', 3, None):
        with pytest.raises(ValueError, match='model'): r.record_path('results', 'demo', 'e', 'd', bad)
    for bad in (-1, 1.0, True, '0'):
        with pytest.raises(ValueError, match='seed'): r.record_path('results', 'demo', 'e', 'd', 'm', seed=bad)


def test_tables(tmp_path):
    for model, seed, extra in (('a', 0, {}), ('a', 1, {'only': 3.0}), ('b', 0, {})):
        r.write_record(r.record_path(tmp_path, 'demo', 'retrieval', 'd', model, seed=seed), {'m': seed + 0.5, **extra}, USERS if model == 'a' else None)
    (tmp_path / 'demo/runs/retrieval/d/a/.partial-seed-2-1').mkdir()
    table = r.read_records(tmp_path, 'demo', 'retrieval')
    assert table.columns == ['dataset', 'model', 'variant', 'seed', 'metric', 'value'] and table.height == 4
    assert table.filter(metric='only').rows() == [('d', 'a', '', 1, 'only', 3.0)]
    users = r.read_per_user(tmp_path, 'demo', 'retrieval')
    assert users.height == 4 and users.columns[:5] == ['dataset', 'model', 'variant', 'seed', 'user_id']


def test_what_is_missing_or_damaged_is_named(tmp_path, place):
    with pytest.raises(r.RecordError, match='no records'): r.read_records(tmp_path, 'demo', 'retrieval')
    with pytest.raises(r.RecordError, match='no metrics.json'): r.read_record(place)
    r.write_record(place, {'a': 1})
    with pytest.raises(r.RecordError, match='no per-user metrics'): r.read_record(place).per_user()
    (place / 'metrics.json').write_text('{"a": 1')
    with pytest.raises(r.RecordError, match='metrics.json: not readable'): r.read_records(tmp_path, 'demo', 'retrieval')
    with pytest.raises(r.RecordError, match="not a record's place"): r.read_record(tmp_path)
