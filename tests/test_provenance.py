"""Provenance: the git state, the fingerprints of code and notebooks, and what is collected."""
import json
import subprocess
import sys
import textwrap

import pytest

from l2rec.training import provenance as p


@pytest.fixture
def checkout(tmp_path):
    """A git repository with a tiny l2rec in it."""
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\n')
    (tmp_path / 'nbs').mkdir()
    (tmp_path / '.gitignore').write_text('.work/\n')
    package = tmp_path / 'l2rec/room'
    package.mkdir(parents=True)
    for name in ('l2rec/__init__.py', 'l2rec/room/__init__.py'): (tmp_path / name).write_text('')
    (package / 'a.py').write_text('from .b import f\nimport numpy\n')
    (package / 'b.py').write_text('def f():\n    from l2rec.room.late import g\n    return g()\n')
    (package / 'late.py').write_text('def g(): return 1\n')
    git(tmp_path, 'init', '-q'); git(tmp_path, 'add', '.'); git(tmp_path, 'commit', '-qm', 'one')
    return tmp_path


def git(top, *arguments):
    subprocess.run(['git', '-C', str(top), '-c', 'user.name=x', '-c', 'user.email=x@example.org', *arguments], check=True, capture_output=True)


@pytest.mark.parametrize('file, dirty', [('results/demo/x.json', False), ('.work/x', False), ('nbs/new.ipynb', True), ('l2rec/room/b.py', True), ('settings.ini', True)])
def test_what_makes_a_tree_dirty(checkout, file, dirty):
    assert p.git_state(checkout)['git_dirty'] is False
    (checkout / file).parent.mkdir(parents=True, exist_ok=True)
    (checkout / file).write_text('changed\n')
    assert p.git_state(checkout)['git_dirty'] is dirty


def test_a_tracked_result_that_changes_makes_nothing_dirty(checkout):
    (checkout / 'results').mkdir()
    (checkout / 'results/a.json').write_text('1')
    git(checkout, 'add', '.'); git(checkout, 'commit', '-qm', 'two')
    (checkout / 'results/a.json').write_text('2')
    state = p.git_state(checkout)
    assert state['git_dirty'] is False and len(state['git_commit']) == 40


def test_without_git_and_before_the_first_commit(tmp_path, monkeypatch):
    assert p.git_state(tmp_path) == dict(git_commit=None, git_dirty=None)
    git(tmp_path, 'init', '-q')
    (tmp_path / 'a').write_text('x')
    assert p.git_state(tmp_path) == dict(git_commit=None, git_dirty=True)
    monkeypatch.setenv('PATH', '')
    assert p.git_state(tmp_path) == dict(git_commit=None, git_dirty=None)


def test_closure_follows_module_level_imports_only(checkout):
    assert list(p.code_closure(['l2rec.room.a'], checkout)) == ['l2rec.room', 'l2rec.room.a', 'l2rec.room.b']
    before = p.code_fingerprint(['l2rec.room.a'], checkout)
    (checkout / 'l2rec/room/late.py').write_text('def g(): return 2\n')
    assert p.code_fingerprint(['l2rec.room.a'], checkout) == before
    (checkout / 'l2rec/room/b.py').write_text('def f():\n    "Told."\n    # why\n    from l2rec.room.late import g\n    return g()\n')
    assert p.code_fingerprint(['l2rec.room.a'], checkout) == before
    (checkout / 'l2rec/room/b.py').write_text('def f(): return 7\n')
    assert p.code_fingerprint(['l2rec.room.a'], checkout) != before


def test_closure_survives_a_circle_and_leaves_out_registry_and_reporting(checkout):
    for name in ('training', 'reporting'): (checkout / 'l2rec' / name).mkdir()
    (checkout / 'l2rec/training/models.py').write_text('MODELS = {}\n')
    (checkout / 'l2rec/reporting/tables.py').write_text('x = 1\n')
    (checkout / 'l2rec/room/b.py').write_text('from l2rec.room import a\nfrom l2rec.training.models import MODELS\nfrom l2rec.reporting.tables import x\n')
    assert list(p.code_closure(['l2rec.room.a'], checkout)) == ['l2rec.room', 'l2rec.room.a', 'l2rec.room.b']
    assert 'l2rec.reporting.tables' in p.code_closure(['l2rec.room.a'], checkout, leave_out=())


@pytest.mark.parametrize('source, package, expected', [
    ('import l2rec.data.splits as s', '', {'l2rec.data.splits'}),
    ('from .models import M', 'l2rec.training', {'l2rec.training.models', 'l2rec.training.models.M'}),
    ('from ..data import splits', 'l2rec.training', {'l2rec.data', 'l2rec.data.splits'}),
    ('from . import models', 'l2rec.training', {'l2rec.training', 'l2rec.training.models'}),
    ('try:\n    import a\nexcept ImportError:\n    import b', '', {'a', 'b'}),
    ('class C:\n    import a\n    def f(self):\n        import b', '', {'a'}),
    ('f = lambda: __import__("a")', '', set()),
])
def test_imports(source, package, expected):
    assert p.module_imports(source, package) == expected


def test_the_digest_does_not_depend_on_the_python_version():
    """The literal was computed with Python 3.11; 3.12 and 3.13 write their trees differently in ast.dump, but must agree here."""
    source = textwrap.dedent('''
        from dataclasses import dataclass
        @dataclass
        class Scorer(object):
            "Told."
            weights: dict[str, float] = None
            async def score(self, x, /, *rest, scale=1.0, **named):
                return f"{x!r:>{scale}} of {'a' + 'b'}" if rest else (lambda: [i for i in x if i])()
        def nothing(): ...
    ''')
    assert p.source_digest(source) == 'b9c66d54232d77e3025425d506a474322cbf23ea7a3237d439f0485188ed1a11'


@pytest.mark.parametrize('first, second, same', [
    ('a = 1', 'a = 1 # one', True), ('a = 1', 'a = 2', False), ('a = 1', 'a = 1.0', False), ('a = "x"', "a = 'x'", True),
    ('def f(): return None', 'def f(): return', False), ('x = a + b', 'x = (a + b)', True), ('def f():\n "t"', 'def f():\n "u"', True),
    ('x = True', 'x = 1', False), ('x = None', 'x = ...', False), ('f(a, b)', 'f(a, b=b)', False)])
def test_what_counts_as_the_same_code(first, second, same):
    assert (p.source_digest(first) == p.source_digest(second)) is same


def notebook(*cells):
    return dict(cells=[dict(cell_type='code' if kind != 'text' else 'markdown', metadata={'tags': ['parameters']} if kind == 'parameters' else {}, source=source)
                       for kind, source in cells])


def test_notebook_fingerprint():
    base = notebook(('text', 'prose'), ('parameters', 'a = 1\nb: str = "x"'), ('code', 'print(a)'))
    same = [notebook(('text', 'other'), ('parameters', 'a = 2 # two\nb: str = "y"'), ('code', 'print( a )')),
            notebook(('parameters', 'a = 1\nb: str = "x"'), ('code', '# only a comment'), ('code', 'print(a)'))]
    other = [notebook(('parameters', 'a = 1\nb: str = "x"\nc = 1'), ('code', 'print(a)')), notebook(('parameters', 'a = 1\nb: str = "x"'), ('code', 'print(b)')),
             notebook(('parameters', 'a = 1\nb: str = "x"'), ('code', '%time\nprint(a)'))]
    digest = p.notebook_fingerprint(base)
    assert all(p.notebook_fingerprint(n) == digest for n in same) and all(p.notebook_fingerprint(n) != digest for n in other)


def test_parameters_and_imports_of_a_notebook(tmp_path):
    path = tmp_path / 'n.ipynb'
    path.write_text(json.dumps(notebook(('code', '%matplotlib inline\nimport l2rec.data.load'), ('parameters', 'a = [1, 2]\nb: int = -3\nc = 2 * 4\nprint(a)'))))
    assert p.read_parameters(path) == dict(a=[1, 2], b=-3, c='2 * 4')
    assert p.notebook_imports(path) == {'l2rec.data.load'}
    path.write_text('<html>')
    with pytest.raises(ValueError, match='n.ipynb: not a notebook'): p.read_parameters(path)


def test_collected_provenance_is_complete_and_json(checkout):
    (checkout / 'requirements.lock').write_text('numpy==1\n')
    found = p.collect_provenance(dict(epochs=3), 'abc', seed=1, parameters_trained=10, parameters_total=12, started=0.0, root=checkout)
    assert json.loads(json.dumps(found)) == found
    assert found['git_dirty'] is True and len(found['lock_sha256']) == 64 and found['versions']['python'].startswith('3.')
    assert found['threads'] >= 1 and found['peak_memory_mb'] > 10 and found['wall_seconds'] > 0 and found['device']


def test_a_run_that_touched_a_gpu_was_on_it(checkout, monkeypatch):
    import torch
    assert p.device_in_use() == 'cpu' and p.collect_provenance({}, None, root=checkout)['peak_device_memory_mb'] is None
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 3 * 2**20)
    found = p.collect_provenance({}, None, root=checkout)
    assert (found['device'], found['peak_device_memory_mb']) == ('NVIDIA H200', 3.)
    assert p.collect_provenance({}, None, device='cpu', root=checkout)['device'] == p.device_name('cpu') != 'NVIDIA H200'


def test_a_processor_with_matrix_units_says_so(monkeypatch):
    for flags, said in (('fpu amx_bf16 avx', 'Made Up with AMX'), ('fpu amx_bf161 avx', 'Made Up')):
        monkeypatch.setattr(p.Path, 'read_text', lambda path: f'processor\t: 0\nmodel name\t: Made Up\nflags\t\t: {flags}\n')
        assert p.device_name() == said


def test_no_torch_is_imported():
    code = 'import sys, l2rec.training.provenance, l2rec.training.records, l2rec.training.plan; sys.exit("torch" in sys.modules or "papermill" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
