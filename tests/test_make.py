"""`make reproduce` on the real Makefile: stale runs only, in parallel, after changes, after kill -9. The experiments are tiny, without torch."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from l2rec.training import plan

ROOT = Path(__file__).resolve().parent.parent
KEYS = ('search/tiny/adder/seed-0', 'retrieval/tiny/adder/seed-0', 'retrieval/tiny/adder/seed-1', 'retrieval/tiny/halver/seed-0')
GIVEN = 'profile = "demo"\ndataset = "tiny"\nmodel = "adder"\nseed = 0\nrecord = ""\ncheckpoints = ""\n'
TRAIN = '''\
import json, os, time
from pathlib import Path
from l2rec.training.records import write_record

step = Path(checkpoints) / "step"
step.parent.mkdir(parents=True, exist_ok=True)
done = int(step.read_text()) if step.exists() else 0
for i in range(done + 1, 4):  # three "epochs"; each leaves a checkpoint
    time.sleep(0.1)
    Path(f"{step}.new").write_text(str(i)); os.replace(f"{step}.new", step)
'''
PLAN = '''
[[demo.run]]
experiment = "search"
dataset = "tiny"
model = "adder"
parameters = { trials = 3 }

[[demo.run]]
experiment = "retrieval"
dataset = "tiny"
model = "adder"
seed = [0, 1]
needs = "search"

[[demo.run]]
experiment = "retrieval"
dataset = "tiny"
model = "halver"
parameters = { epochs = 5 }

[[demo.report]]
notebook = "retrieval"
needs = ["retrieval"]
tables = ["main"]
'''


def notebook(path, *cells, prose='What this is.'):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(id='text', cell_type='markdown', metadata={}, source=prose)] + [
        dict(id=f'c{i}', cell_type='code', metadata={'tags': ['parameters']} if i == 0 else {}, source=source, outputs=[], execution_count=None)
        for i, source in enumerate(cells)]
    kernel = dict(display_name='python3', language='python', name='python3')
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))


def experiments(home, value='0.01 * epochs', epochs=4, prose='What this is.'):
    """Write the notebooks of the miniature."""
    notebook(home / 'nbs/experiments/search.ipynb', GIVEN + 'trials = 6', TRAIN + 'write_record(record, {"m": trials, "time/s": time.time()}, files={"chosen.json": dict(lr=0.1)})')
    notebook(home / 'nbs/experiments/retrieval.ipynb', GIVEN + f'search_record = ""\nepochs = {epochs}',
             TRAIN + f'assert not search_record or (Path(search_record) / "chosen.json").exists()\nwrite_record(record, {{"m": {value}, "done": done}})', prose=prose)
    notebook(home / 'nbs/report/retrieval.ipynb', 'profile = "demo"', textwrap.dedent('''
        from pathlib import Path
        from l2rec.training.records import read_records
        table = read_records("results", profile, "retrieval")
        top = Path("results") / profile / "tables"
        top.mkdir(parents=True, exist_ok=True)
        for suffix in ("csv", "md", "tex"): (top / f"main.{suffix}").write_text(table.write_csv())'''))
    (home / 'nbs/experiments/plan.toml').write_text(PLAN)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A miniature compendium with the real Makefile and the real plan, in a folder with a space, made once by `make -j2`."""
    home = tmp_path_factory.mktemp('make') / 'my compendium'
    home.mkdir()
    for name in ('Makefile', 'settings.ini', 'pyproject.toml', 'requirements.lock'): shutil.copy(ROOT / name, home)
    shutil.copytree(ROOT / 'l2rec', home / 'l2rec', ignore=shutil.ignore_patterns('__pycache__', 'baselines', 'reporting', 'evaluation'))
    (home / 'l2rec/baselines').mkdir()
    (home / 'l2rec/baselines/__init__.py').write_text('')
    for name in ('adder', 'halver'): (home / f'l2rec/baselines/{name}.py').write_text('STEP = 1\n')
    (home / 'l2rec/training/models.py').write_text('MODELS = {"adder": "l2rec.baselines.adder:Adder", "halver": "l2rec.baselines.halver:Halver"}\n')
    experiments(home)
    listed = make(home, '-n', 'reproduce').stdout
    assert [key for key in KEYS if f'run --profile demo {key}' in listed] == list(KEYS) and not (home / 'results').exists()
    done = make(home, '-j2', 'reproduce')
    assert done.stdout.count(' … ') == 5 and '[1/4] search tiny adder seed-0 …' in done.stdout, done.stdout + done.stderr
    return home


@pytest.fixture
def home(made, tmp_path):
    """A copy of the finished miniature, elsewhere: records do not know where they lie."""
    return Path(shutil.copytree(made, tmp_path / 'copy', symlinks=True))


def command(*arguments):
    return ['make', 'STAMP=', f'VENV={sys.prefix}', *arguments]


def environment(home):
    kept = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MAKELEVEL', 'PYTHONPATH', 'PROFILE') and not k.startswith('PYTEST')}
    return {**kept, 'L2REC_DATA': str(home / 'data'), 'PYTHONDONTWRITEBYTECODE': '1'}


def make(home, *arguments, status=0):
    done = subprocess.run(command(*arguments), cwd=home, env=environment(home), capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def ran(done):
    """Keys of the runs, and names of the reports, that really ran."""
    return {' '.join(match.split()) for match in re.findall(r'^\[ ?\d+/\d+\] (.+?) … \d+ s$', done.stdout, re.M)}


def titles(*keys):
    return {key.replace('/', ' ') for key in keys}


def records(home):
    """The metrics of every record, each of which must be whole."""
    found = {}
    for folder in (home / 'results').glob('demo/runs/*/*/*/seed-*'):
        key = str(folder.relative_to(home / 'results/demo/runs'))
        found[key] = json.loads((folder / 'metrics.json').read_text())
        assert json.loads((folder / 'provenance.json').read_text())['fingerprint']['parameters'] is not None
        assert json.loads((folder / 'notebook.ipynb').read_text())['nbformat'] == 4
    return found


def left_behind(home):
    """Staging folders and unfinished work."""
    return [*(home / 'results').rglob('.partial-*'), *(path for path in (home / '.work').glob('demo/*') if path.name not in ('locks', 'reports'))]


def test_all_is_there_and_nothing_beside_it(made):
    assert set(records(made)) == set(KEYS)
    assert sorted(path.name for path in (made / 'results/demo/tables').iterdir()) == ['main.csv', 'main.md', 'main.tex']
    executed = (made / 'results/demo/runs/retrieval/tiny/adder/seed-1/notebook.ipynb').read_text()
    assert str(made) not in executed and 'search_record = \\"results/demo/runs/search/tiny/adder/seed-0\\"' in executed
    assert not [path for path in left_behind(made) if path.is_dir() and list(path.rglob('step'))] and not list((made / 'results').rglob('.partial-*'))


def test_a_second_make_does_nothing(home):
    before = {path: path.stat().st_mtime_ns for path in (home / 'results').rglob('*')}
    for target in ('reproduce', 'table-main'):
        done = make(home, target)
        assert 'nothing to do: 4 records and 1 report are up to date' in done.stdout and not ran(done)
    assert before == {path: path.stat().st_mtime_ns for path in (home / 'results').rglob('*')}
    for path in (home / 'results').rglob('*'): os.utime(path, (0, 0)) # as after a git clone: ages say nothing
    os.utime(home / 'results/demo/runs/search/tiny/adder/seed-0/metrics.json')
    assert 'plan run' not in make(home, '-n', 'reproduce').stdout


def test_prose_reruns_nothing(home):
    experiments(home, prose='What this is, told better.')
    for path in (home / 'l2rec/baselines/adder.py', home / 'l2rec/training/records.py'): path.write_text('# Told better.\n' + path.read_text())
    assert 'nothing to do' in make(home, 'reproduce').stdout


@pytest.mark.parametrize('change, expected', [
    (lambda home: (home / 'l2rec/baselines/halver.py').write_text('STEP = 2\n'), {KEYS[3]}),
    (lambda home: (home / 'nbs/experiments/plan.toml').write_text(PLAN.replace('epochs = 5', 'epochs = 6')), {KEYS[3]}),
    (lambda home: experiments(home, epochs=7), {KEYS[1], KEYS[2]}),
    (lambda home: experiments(home, value='0.02 * epochs'), {KEYS[1], KEYS[2], KEYS[3]}),
], ids=('module of one model', 'parameter in the plan', 'default parameter', 'notebook'))
def test_a_change_reruns_what_depends_on_it(home, change, expected):
    change(home)
    listed = make(home, '-n', 'reproduce').stdout
    assert {key for key in KEYS if f'run --profile demo {key}' in listed} == expected
    if 'epochs = 6' in (home / 'nbs/experiments/plan.toml').read_text(): # one of them is really run
        assert ran(make(home, 'reproduce')) == titles(*expected) | {'report retrieval'}
        assert 'nothing to do' in make(home, 'reproduce').stdout


def test_a_search_that_chooses_the_same_reruns_nothing_behind_it(home):
    (home / 'nbs/experiments/plan.toml').write_text(PLAN.replace('trials = 3', 'trials = 4'))
    listed = make(home, '-n', 'reproduce').stdout
    assert sum(f'run --profile demo {key}' in listed for key in KEYS) == 3 # nobody knows yet what it will choose
    done = make(home, 'reproduce')
    assert ran(done) == titles(KEYS[0]) and done.stdout.count('up to date') == 2 # and the report, whose records did not move, is not even asked


def test_one_table(home):
    shutil.rmtree(home / 'results/demo/tables')
    assert ran(make(home, 'table-main')) == {'report retrieval'}
    assert (home / 'results/demo/tables/main.csv').is_file()
    assert "Did you mean 'table-main'?" in make(home, 'table-mian', status=2).stderr


def test_a_notebook_that_fails(home):
    before = records(home)
    experiments(home, value='1 / 0')
    done = make(home, '-k', 'reproduce', status=2)
    line = next(line for line in done.stderr.splitlines() if 'ZeroDivisionError' in line)
    kept = re.search(r'\(the notebook as it stood: (\S+)\)', line)[1]
    assert 'ZeroDivisionError' in (home / kept).read_text() and 'Traceback' not in done.stderr
    assert records(home) == before and not list((home / 'results').rglob('.partial-*'))


def test_a_results_folder_that_cannot_be_written(home):
    shutil.rmtree(home / 'results')
    (home / 'results').write_text('a file')
    done = make(home, 'reproduce', status=2)
    assert 'not written, a file stands where a folder should be' in done.stderr and 'Traceback' not in done.stderr


def test_kill_9_at_random_moments(home):
    """Every record is a whole old one or a whole new one, at any moment, and a restart finishes."""
    experiments(home, value='0.5 * epochs')
    (home / 'nbs/experiments/plan.toml').write_text(PLAN.replace('trials = 3', 'trials = 10'))
    started = time.time()
    make(home, '-j2', 'reproduce')
    whole = time.time() - started                                     # of a round that nobody kills, on this machine
    allowed, moments, kills, i = {key: {found['m']} for key, found in records(home).items()}, random.Random(20), 0, 0
    while kills < 4 and i < 20: # each round makes all of retrieval stale, and the search too
        i += 1
        experiments(home, value=f'{i} * epochs')
        (home / 'nbs/experiments/plan.toml').write_text(PLAN.replace('trials = 3', f'trials = {3 + i}'))
        for key in KEYS: allowed[key].add(3 + i if 'search' in key else i * (5 if 'halver' in key else 4))
        child = subprocess.Popen(command('-j2', 'reproduce'), cwd=home, env=environment(home), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.time()
        try:
            child.wait(moments.uniform(.2, .9) * whole)
            whole = min(whole, time.time() - started) # it was there sooner: checkpoints, or a machine that is less busy now
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            kills += 1
        now = records(home)
        assert set(now) == set(KEYS) and all(now[key]['m'] in allowed[key] for key in KEYS)
    assert kills == 4, f'{kills} kills in {i} rounds, and a whole round takes {whole:.1f} s'
    make(home, '-j2', 'reproduce')
    assert {key: found['m'] for key, found in records(home).items()} == dict(zip(KEYS, (3 + i, 4 * i, 4 * i, 5 * i))) and not list((home / 'results').rglob('.partial-*'))
    assert 'nothing to do' in make(home, 'reproduce').stdout


def test_a_killed_run_goes_on_from_its_checkpoint(home):
    """The notebook says at which step it began; after a kill behind the first step it is not 0."""
    experiments(home, value='0.04 * epochs')
    step = home / '.work/demo/retrieval/tiny/halver/seed-0/checkpoints/step'
    child = subprocess.Popen([sys.executable, '-m', 'l2rec.training.plan', 'run', KEYS[3]], cwd=home, env=environment(home), start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not step.exists() and time.time() < deadline: time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    make(home, 'reproduce')
    assert records(home)[KEYS[3]]['done'] >= 1


def test_a_fork_makes_the_record_that_a_plain_start_makes(home):
    """Under make every run is a fork of the warm interpreter; `plan run` by hand starts it plainly."""
    experiments(home, value='0.03 * epochs')
    notebook(home / 'nbs/experiments/search.ipynb', GIVEN + 'trials = 6', 'import os, sys\nimport numpy as np\nfrom l2rec.training.records import write_record\nprint(os.getcwd() in sys.path, np.eye(2))',
             'import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()', 'write_record(record, {"m": np.arange(trials).sum()}, files={"chosen.json": dict(lr=0.1)})',
             'import json; from pathlib import Path; _ = Path(f"forked-{os.getpid()}").write_text(str("serve" in sys.orig_argv))')
    make(home, 'reproduce')
    folder = home / 'results/demo/runs' / KEYS[0]
    forked = {name: (folder / name).read_text() for name in ('metrics.json', 'notebook.ipynb')}
    shutil.rmtree(folder)
    subprocess.run([sys.executable, '-m', 'l2rec.training.plan', 'run', KEYS[0]], cwd=home, env=environment(home), check=True)
    assert forked == {name: (folder / name).read_text() for name in forked} and 'image/png' in forked['notebook.ipynb']
    assert sorted(path.read_text() for path in home.glob('forked-*')) == ['False', 'True']


def processes_in(home):
    """Processes that work in a folder."""
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        try: found += [process.name] * (os.readlink(process / 'cwd') == str(home))
        except OSError: continue
    return found


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_make_leaves_no_process(home, number):
    """Ctrl-C reaches the whole group, `kill` and `kill -9` only make itself."""
    experiments(home, value='0.07 * epochs')
    child = subprocess.Popen(command('-j2', 'reproduce'), cwd=home, env=environment(home), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list((home / '.work/demo').glob('retrieval/**/step')) and time.time() < deadline: time.sleep(0.01)
    os.killpg(child.pid, number) if number == signal.SIGINT else child.send_signal(number)
    said = child.communicate(timeout=60)[1]
    deadline = time.time() + 20
    while processes_in(home) and time.time() < deadline: time.sleep(0.05)
    assert child.returncode != 0 and not processes_in(home)
    assert number != signal.SIGINT or 'stopped; the next make goes on from its checkpoint' in said


def test_help_is_the_default_and_clean_keeps_results(home):
    assert 'reproduce' in make(home).stdout
    make(home, 'clean')
    assert set(records(home)) == set(KEYS) and not (home / '.work').exists() and not (home / '.make').exists()


def test_an_old_python_is_refused(home):
    old = home / 'old-python'
    old.write_text('#!/bin/sh\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(['make', f'PYTHON={old}', f'VENV={home / "none"}', 'env'], cwd=home, env=environment(home), capture_output=True, text=True)
    assert done.returncode == 2 and 'Python >= 3.11 is needed' in done.stderr


def heard_through(temporary, folder, monkeypatch):
    """The transport that a kernel finds itself reached by when temporary files are kept in `temporary`."""
    notebook(folder / 'source.ipynb', 'from ipykernel.kernelapp import IPKernelApp\nprint(IPKernelApp.instance().transport)')
    monkeypatch.setattr(tempfile, 'tempdir', str(temporary))
    cells = plan.execute(folder / 'source.ipynb', folder / 'output.ipynb', {}, folder)['cells']
    assert not list(temporary.iterdir())  # neither a connection file nor a socket is left
    return ''.join(''.join(output['text']) for cell in cells for output in cell.get('outputs', ())).strip()


def test_kernels_need_no_free_port(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(dir='/tmp') as short:
        assert heard_through(Path(short), tmp_path, monkeypatch) == 'ipc'


def test_a_temporary_folder_too_deep_for_socket_files_gets_ports(tmp_path, monkeypatch):
    (deep := tmp_path / ('deep' * 25)).mkdir()
    assert heard_through(deep, tmp_path, monkeypatch) == 'tcp'
