"""The plan: what is read, what is stale, what the makefile says. Nothing is executed here; tests/test_make.py does that."""
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from l2rec.training import plan as p
from l2rec.training.records import record_path, write_record

MODELS = {'adder': 'l2rec.baselines.adder:Adder', 'halver': 'l2rec.baselines.halver:Halver'}
GIVEN = 'profile = "demo"\ndataset = "d"\nmodel = "adder"\nseed = 0\nrecord = ""\n'


def notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell_type='code', metadata={'tags': ['parameters']} if i == 0 else {}, source=source, outputs=[], execution_count=None) for i, source in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A compendium of two experiments, one report and two models."""
    monkeypatch.setenv('L2REC_DATA', str(tmp_path / 'data'))
    (tmp_path / 'settings.ini').write_text('')
    for name in ('adder', 'halver'):
        (tmp_path / 'l2rec/baselines').mkdir(parents=True, exist_ok=True)
        (tmp_path / f'l2rec/baselines/{name}.py').write_text('STEP = 1\n')
    notebook(tmp_path / 'nbs/experiments/search.ipynb', GIVEN + 'trials = 6')
    notebook(tmp_path / 'nbs/experiments/retrieval.ipynb', GIVEN + 'variant = ""\nsearch_record = ""\nepochs = 5\nwidths = [32, 64]', 'print(epochs)')
    notebook(tmp_path / 'nbs/report/retrieval.ipynb', 'profile = "demo"')
    return tmp_path


SEARCH = '[[demo.run]]\nexperiment = "search"\ndataset = "d"\nmodel = "adder"\n'
RETRIEVAL = '[[demo.run]]\nexperiment = "retrieval"\ndataset = ["d"]\nmodel = ["adder"]\nseed = [0, 1]\nneeds = "search"\n'
REPORT = '[[demo.report]]\nnotebook = "retrieval"\nneeds = ["retrieval"]\ntables = ["main"]\nfigures = ["curve"]\n'
ALL = SEARCH + RETRIEVAL + REPORT


def planned(home, text):
    (home / 'nbs/experiments/plan.toml').write_text(text)
    return p.read_plan('demo', home, MODELS)


def work(home, text=ALL):
    return p.Work(planned(home, text), home, home / 'results', MODELS)


def make_records(w, value=1.0):
    """Records as the plan would leave them, without running anything."""
    for run in w.plan.runs:
        write_record(run.folder(w.results), {'m': value, 'time/train_seconds': time.time()}, provenance=dict(fingerprint=w.fingerprint(run)))


def test_products_and_order(home):
    plan = planned(home, '[[demo.run]]\nexperiment = "retrieval"\ndataset = ["d", "e"]\nmodel = ["adder", "halver"]\nvariant = ["", "wide"]\nseed = [0, 1]\n')
    assert len(plan.runs) == len({run.key for run in plan.runs}) == 16
    assert plan.runs[0].key == 'retrieval/d/adder/seed-0' and plan.runs[3].key == 'retrieval/d/adder+wide/seed-1'


@pytest.mark.parametrize('text, message', [
    (SEARCH.replace('dataset', 'datset'), "key 'datset' is unknown. Did you mean 'dataset'"),
    (SEARCH.replace('dataset = "d"', ''), 'dataset is missing'),
    (SEARCH.replace('"search"', '"serch"'), "experiment 'serch' is unknown. Did you mean 'search'"),
    (SEARCH.replace('"adder"', '"addr"'), "model 'addr' is unknown. Did you mean 'adder'"),
    (SEARCH + 'parameters = {trails = 3}\n', "parameter 'trails' is unknown. Did you mean 'trials'"),
    (SEARCH + 'parameters = {seed = 3}\n', "'seed' is given by the plan itself"),
    (SEARCH + 'variant = "wide"\n', "declares no parameter 'variant'"),
    (SEARCH + 'seed = [-1]\n', 'a seed is an integer >= 0'),
    (SEARCH.replace('"d"', '"a/b"'), "dataset 'a/b'"),
    (SEARCH + 'needs = "retrieval"\n', "declares no parameter 'retrieval_record'"),
    (RETRIEVAL, 'needs search/d/adder/seed-0, which demo does not plan'),
    (SEARCH + SEARCH, 'is planned twice'),
    (SEARCH + REPORT, "experiment 'retrieval' is unknown"),
    (ALL.replace('notebook =', 'notebok ='), "Did you mean 'notebook'"),
    (ALL.replace('tables', 'table'), "Did you mean 'tables'"),
    (SEARCH.replace('demo.run', 'demo.runs'), "Did you mean 'run'"),
    (SEARCH.replace('demo', 'dmo'), "profile 'demo' is unknown. Did you mean 'dmo'"),
    ('[[demo.run]', 'plan.toml'),
])
def test_a_mistake_in_the_plan_is_named(home, text, message):
    with pytest.raises(p.PlanError) as error: planned(home, text)
    assert message in str(error.value)


def test_nothing_is_stale_until_something_changes(home):
    w = work(home)
    assert set(w.stale().values()) == {'missing'}
    make_records(w)
    assert w.stale() == {}


@pytest.mark.parametrize('change, stale', [
    (lambda home: (home / 'l2rec/baselines/adder.py').write_text('# told\nSTEP = 1\n'), {}),
    (lambda home: (home / 'l2rec/baselines/halver.py').write_text('STEP = 2\n'), {}),
    (lambda home: (home / 'l2rec/baselines/adder.py').write_text('STEP = 2\n'), dict.fromkeys(['search/d/adder/seed-0', 'retrieval/d/adder/seed-0', 'retrieval/d/adder/seed-1'], 'its code changed')),
    (lambda home: notebook(home / 'nbs/experiments/search.ipynb', GIVEN + 'trials = 7 # one more'), {'search/d/adder/seed-0': 'trials was 6, is 7'}),
    (lambda home: notebook(home / 'nbs/experiments/search.ipynb', GIVEN + 'trials = 6', 'print(1)'), {'search/d/adder/seed-0': 'its notebook changed'}),
])
def test_only_what_depends_on_a_change_is_stale(home, change, stale):
    make_records(work(home))
    change(home)
    assert work(home).stale() == stale


def test_data_are_compared_only_where_they_are_known(home):
    manifest = home / 'data/d/manifest.json'
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"sha256": {"interactions.parquet": "1"}, "notes": "a"}')
    make_records(work(home))
    manifest.write_text('{"sha256": {"interactions.parquet": "1"}, "notes": "b"}')
    assert work(home).stale() == {}
    manifest.write_text('{"sha256": {"interactions.parquet": "2"}}')
    assert set(work(home).stale().values()) == {'its data changed'}
    manifest.unlink()
    assert work(home).stale() == {}


def test_a_search_counts_by_its_choice(home):
    w = work(home)
    folder = record_path(home / 'results', 'demo', 'search', 'd', 'adder')
    def search(lr, metric):
        return write_record(folder, {'m': metric}, provenance=dict(fingerprint=w.fingerprint(w.plan.runs[0])), files={'chosen.json': dict(lr=lr)})
    make_records(w)
    search(0.1, 1.0)
    for run in w.plan.runs[1:]: write_record(run.folder(w.results), {'m': 1}, provenance=dict(fingerprint=w.fingerprint(run)))
    search(0.1, 2.0)
    assert w.stale() == {}
    search(0.2, 2.0)
    assert w.stale() == dict.fromkeys(['retrieval/d/adder/seed-0', 'retrieval/d/adder/seed-1'], 'a run that it needs changed')


def test_a_record_by_hand_or_damaged_is_stale(home):
    w = work(home)
    make_records(w)
    first, second, third = (run.folder(w.results) for run in w.plan.runs)
    (first / 'provenance.json').write_text('{}')
    (second / 'metrics.json').write_text('{"m":')
    assert list(w.stale().values()) == ['made by hand, not by the plan', 'missing']


WHY = 'only the wording of an error message changed'


@pytest.mark.parametrize('change', [
    lambda home: (home / 'l2rec/baselines/adder.py').write_text('STEP = 2\n'),
    lambda home: notebook(home / 'nbs/experiments/search.ipynb', GIVEN + 'trials = 6', 'print(1)'),
    lambda home: notebook(home / 'nbs/experiments/search.ipynb', GIVEN + 'trials = 6\nfewer = False'),
], ids=['code', 'notebook', 'a parameter more'])
def test_what_is_accepted_is_current_and_says_so(home, change):
    make_records(work(home))
    kept = {run.key: (run.folder(home / 'results') / 'metrics.json').read_bytes() for run in work(home).plan.runs}
    change(home)
    stale = list(work(home).stale())
    assert p.accept(work(home), '', WHY) == stale and work(home).stale() == {} and p.accept(work(home), '', WHY) == []
    for run in work(home).plan.runs:
        provenance = json.loads((run.folder(home / 'results') / 'provenance.json').read_text())
        assert (run.folder(home / 'results') / 'metrics.json').read_bytes() == kept[run.key]
        assert ([note['why'] for note in provenance['accepted']] == [WHY]) if run.key in stale else 'accepted' not in provenance


@pytest.mark.parametrize('change, stale', [
    (lambda home: notebook(home / 'nbs/experiments/search.ipynb', GIVEN + 'trials = 7'), {'search/d/adder/seed-0': 'trials was 6, is 7'}),
    (lambda home: notebook(home / 'nbs/experiments/retrieval.ipynb', GIVEN + 'variant = ""\nsearch_record = ""\nepochs = 5', 'print(epochs)'), dict.fromkeys(['retrieval/d/adder/seed-0', 'retrieval/d/adder/seed-1'], 'a parameter is gone')),
    (lambda home: (home / 'data/d/manifest.json').write_text('{"sha256": {"interactions.parquet": "2"}}'), dict.fromkeys(['search/d/adder/seed-0', 'retrieval/d/adder/seed-0', 'retrieval/d/adder/seed-1'], 'its data changed')),
], ids=['another value', 'a parameter less', 'data'])
def test_what_may_have_moved_the_numbers_is_never_accepted(home, change, stale):
    (home / 'data/d').mkdir(parents=True)
    (home / 'data/d/manifest.json').write_text('{"sha256": {"interactions.parquet": "1"}}')
    make_records(work(home))
    (home / 'l2rec/baselines/adder.py').write_text('STEP = 2\n')          # which alone would be accepted
    change(home)
    kept = {run.key: (run.folder(home / 'results') / 'provenance.json').read_bytes() for run in work(home).plan.runs}
    assert not set(p.accept(work(home), '', WHY)) & set(stale)
    for key in stale: assert (work(home).find(key).folder(home / 'results') / 'provenance.json').read_bytes() == kept[key]
    assert set(work(home).stale()) == set(stale)


def test_accepting_takes_a_reason_a_choice_and_what_was_needed_as_they_are(home):
    make_records(work(home))
    for why in (None, '', 'it is fine'):
        with pytest.raises(p.PlanError, match='say why'): p.accept(work(home), '', why)
    # the plan gives the new parameter a value of its own: the record was made with another
    notebook(home / 'nbs/experiments/search.ipynb', GIVEN + 'trials = 6\nfewer = False')
    told = work(home, ALL.replace('model = "adder"\n', 'model = "adder"\nparameters = {fewer = true}\n', 1))
    assert p.accept(told, '', WHY) == [] and told.stale()['search/d/adder/seed-0'] == 'its notebook changed'
    # a search that chooses something else now
    notebook(home / 'nbs/experiments/search.ipynb', GIVEN + 'trials = 6')
    w = work(home)
    write_record(w.plan.runs[0].folder(w.results), {'m': 1.}, provenance=dict(fingerprint=w.fingerprint(w.plan.runs[0])), files={'chosen.json': dict(lr=.2)})
    assert set(w.stale().values()) == {'a run that it needs changed'} and p.accept(w, '', WHY) == []


def test_makefile_lists_stale_runs_only_and_those_behind_them(home):
    w = work(home)
    make_records(w)
    text = p.makefile_text(w, w.stale(), {})
    assert '@$(PLAN)' not in text and 'table-main: results/demo/reports/retrieval.ipynb' in text
    text = p.makefile_text(w, {'search/d/adder/seed-0': 'missing'}, {})
    rules = [line for line in text.splitlines() if line.startswith('results') and ':' in line]
    assert [rule.partition(': ')[2].count('FORCE') for rule in rules] == [1, 0, 0, 0]
    assert text.count('run --profile demo retrieval') == 2 and text.count('report --profile demo retrieval') == 1


def test_makefile_is_written_only_when_it_differs(home):
    w, said = work(home), []
    path = p.write_makefile(w, say=said.append)
    stat = path.stat()
    time.sleep(0.02)
    assert p.write_makefile(w, say=said.append).stat().st_mtime_ns == stat.st_mtime_ns
    assert said[0] == 'demo: 3 of 3 records and 1 of 1 report to make'
    with pytest.raises(p.PlanError, match="'table-man' is unknown. Did you mean 'table-main'"): p.write_makefile(w, 'table-man')


def test_what_a_run_killed_in_its_last_instant_left_is_removed(home):
    """Its record is up to date, so nothing of it will be run again; what lies beside a stale one stays, for that run must know of it."""
    w = work(home)
    make_records(w)
    done, stale = (w.plan.runs[i].folder(w.results) for i in (0, 2))
    (stale / 'metrics.json').unlink()
    left = [folder.with_name(f'.partial-{folder.name}-77') for folder in (done, stale)]
    for path in left: path.mkdir()
    whole = {path.name: path.read_bytes() for path in done.iterdir()}
    with p.locked(p.lock_of(w, 'another run')): p.write_makefile(w, say=lambda line: None)
    assert [path.exists() for path in left] == [False, True] and whole == {path.name: path.read_bytes() for path in done.iterdir()}


def test_what_is_left_beside_is_told_by_its_whole_name(tmp_path):
    names = {'seed-1': ('.partial-seed-1-12', '.partial-seed-1-old'), 'main.md': ('.partial-31-main.md', '.partial-main.md-31'),
             'dual-main.md': ('.partial-5-dual-main.md',), 'seed-11': ('.partial-seed-11-12',)}
    for name in sum(names.values(), ()): (tmp_path / name).write_text('')
    for final, left in names.items(): assert {path.name for path in p.left_beside(tmp_path / final)} == set(left)


def test_a_results_folder_with_a_space(home):
    w = p.Work(planned(home, ALL), home, home / 'my results', MODELS)
    with pytest.raises(p.PlanError, match='space'): p.makefile_text(w, w.stale(), {})


def test_what_a_notebook_is_given(home):
    w = work(home)
    run = w.plan.runs[1]
    given = p.given_parameters(w, run, home / 'results/x', home / '.work/c')
    assert given == dict(profile='demo', dataset='d', model='adder', variant='', seed=0, record='results/x', search_record='results/demo/runs/search/d/adder/seed-0')


def test_work_begun_under_another_fingerprint_is_not_resumed(tmp_path):
    folder = tmp_path / 'w'
    p.prepare(folder, dict(code='1'))
    (folder / 'checkpoint').write_text('x')
    p.prepare(folder, dict(code='1'))
    assert (folder / 'checkpoint').exists()
    p.prepare(folder, dict(code='2'))
    assert not (folder / 'checkpoint').exists()


def test_sweep_takes_only_its_own(tmp_path):
    for name in ('.partial-seed-1-77', '.partial-.partial-seed-1-77-78', '.partial-seed-11-77', 'seed-1', 'seed-11'): (tmp_path / name).mkdir()
    assert p.sweep(tmp_path / 'seed-1')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.partial-seed-11-77', 'seed-1', 'seed-11']
    assert not p.sweep(tmp_path / 'seed-1')


def test_lock_waits(tmp_path):
    events = []
    def other():
        with p.locked(tmp_path / 'l'): events.append('second')
    with p.locked(tmp_path / 'l'):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.1)
        events.append('first')
    thread.join()
    assert events == ['first', 'second']


@pytest.mark.parametrize('flags, threads', [(' -j2 --jobserver-auth=3,4', '4'), ('-j 16', '1'), ('', None), ('n', None), ('kj', None)])
def test_threads_are_shared_among_jobs(monkeypatch, flags, threads):
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setenv('MAKEFLAGS', flags)
    p.warm.share_threads()
    assert os.environ.pop('OMP_NUM_THREADS', None) == threads


def test_an_executed_notebook_keeps_no_trace_of_the_machine(monkeypatch):
    monkeypatch.setenv('L2REC_DATA', '/data/sets')
    text = ['read /data/sets/ml-1m\n', 'in /home/ada/l2rec/results/x/.partial-seed-0-7\n', '10 %\r50 %\r100 %\n', '/tmp/ipykernel_3/1.py:2: UserWarning']
    cells = [dict(cell_type='markdown', metadata={'papermill': {}}, source='# Title'),
             dict(cell_type='code', metadata={'tags': ['parameters'], 'papermill': {'start_time': '2026'}, 'execution': {}}, source=['a = 1'], execution_count=3,
                  outputs=[dict(output_type='stream', name='stdout', text=text),
                           dict(output_type='display_data', metadata={}, data={'image/png': '/home/ada/l2rec/', 'application/vnd.jupyter.widget-view+json': {}})])]
    folders = [('/home/ada/l2rec/results/x/.partial-seed-0-7', 'results/x/seed-0'), ('/home/ada/l2rec/', ''), ('/data/sets', '$L2REC_DATA')]
    found = p.clean_executed(dict(cells=cells, metadata={'papermill': {}, 'widgets': {}}), folders)
    assert found['cells'][1]['outputs'][0]['text'] == 'read $L2REC_DATA/ml-1m\nin results/x/seed-0\n100 %\n<tmp>/cell.py:2: UserWarning'.replace('<tmp>', '/tmp')
    assert found['cells'][1]['outputs'][1]['data'] == {'image/png': '/home/ada/l2rec/'}
    assert found['cells'][1]['metadata'] == {'tags': ['parameters']} and set(found['metadata']) == {'kernelspec', 'language_info'}


def test_reports(home):
    w = work(home)
    report = w.plan.reports[0]
    with pytest.raises(p.PlanError, match='reads 2 records, of which 2 are missing, first retrieval/d/adder/seed-0'): p.make_report(w, report)
    make_records(w)
    now = p.report_fingerprint(w.plan, report, home, w.results)
    p.keep(report.path(w.results), json.dumps(dict(cells=[], metadata=dict(l2rec=now))))
    assert w.stale_reports() == {'retrieval': 'main.csv is missing'}
    for path in report.artefacts(w.results):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('x')
    assert w.stale_reports() == {}
    make_records(w, 2.0)
    assert w.stale_reports() == {'retrieval': 'its records changed'}


def test_the_command_says_one_line(home):
    """An error that a user can mend is one line and status 1."""
    (home / 'nbs/experiments/plan.toml').write_text(ALL)
    done = subprocess.run([sys.executable, '-m', 'l2rec.training.plan', 'run', 'search/d/sasrc/seed-0'], cwd=home, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': os.path.dirname(os.path.dirname(os.path.dirname(p.__file__)))})
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr
