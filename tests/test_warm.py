"""The warm interpreter: a fork is as good as a fresh process, and nothing outlives the command beside which it stands."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l2rec.training import warm

linux = pytest.mark.skipif(not warm.possible(), reason='forks are used on Linux only; elsewhere every start is plain (test_elsewhere_starts_are_plain)')
START = [sys.executable, '-m', 'l2rec.training.warm', 'start']
SERVE = [sys.executable, '-m', 'l2rec.training.warm', 'serve']
TOLD = '''\
import json, os, signal, sys
print(json.dumps(dict(arguments=sys.argv, main=__name__, folder=os.getcwd(), path=sys.path[0], stdin=sys.stdin.read(), x=os.environ.get("X"), is_main=sys.modules["__main__"].__dict__ is globals(),
                      interrupt=signal.getsignal(signal.SIGINT) is signal.default_int_handler, terminate=signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, group=os.getpgid(0) == os.getpid())))
'''
FORKED = 'import sys; print("forked" if "serve" in sys.orig_argv else "plain")\n'


@pytest.fixture
def home(tmp_path):
    """A folder of small modules, and `run`, which runs a command there."""
    def write(**modules):
        for name, source in modules.items(): (tmp_path / f'{name}.py').write_text(source)
    def run(command, serve=True, stdin='', libraries='', **environment):
        kept = {name: value for name, value in os.environ.items() if name not in ('MAKEFLAGS', 'OMP_NUM_THREADS', warm.ADDRESS)}
        env = {**kept, 'PYTHONPATH': str(Path(warm.__file__).parents[2]), 'TMPDIR': str(tmp_path), warm.LIBRARIES: libraries, **environment}
        return subprocess.run([*(SERVE if serve else []), *command], cwd=tmp_path, env=env, input=stdin, capture_output=True, text=True, timeout=60)
    home = tmp_path
    write.folder, write.run = home, run
    return write


def both(home, *arguments, **options):
    """The same start from a warm interpreter and without one."""
    return [home.run([*START, *arguments], serve=serve, **options) for serve in (True, False)]


@linux
def test_a_fork_finds_what_a_fresh_process_finds(home):
    home(told=TOLD, where=FORKED)
    assert [done.stdout for done in both(home, 'where')] == ['forked\n', 'plain\n']
    forked, plain = (json.loads(done.stdout) for done in both(home, 'told', 'a', '--b', stdin='typed', X='1'))
    assert forked.pop('group') and forked == {name: plain[name] for name in forked}
    assert not list(home.folder.glob('l2rec-warm-*'))


@linux
@pytest.mark.parametrize('source, status', [('', 0), ('raise SystemExit(3)', 3), ('raise SystemExit("why")', 1), ('1 / 0', 1),
                                            ('import atexit; atexit.register(print, "end"); print("begin")', 0),
                                            ('import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print("late"))).start()', 0)])
def test_status_and_last_words(home, source, status):
    home(job=source)
    forked, plain = both(home, 'job')
    assert forked.returncode == plain.returncode == status and forked.stdout == plain.stdout
    assert forked.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


@linux
def test_what_is_ignored_stays_ignored(home):
    """As under nohup."""
    home(job=FORKED + 'import os, signal, time\nos.kill(os.getpid(), signal.SIGHUP); os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.2); print("lives")')
    done = home.run(['sh', '-c', 'trap "" HUP; exec "$@"', 'sh', *SERVE, *START, 'job'], serve=False)
    assert (done.stdout, done.returncode) == ('forked\nlives\n', 0)


@linux
def test_a_killed_fork(home):
    home(job='import os; os.kill(os.getpid(), 9)')
    assert home.run([*START, 'job']).returncode == 128 + 9


@linux
def test_no_run_sees_another_one(home):
    home(library='state = []\n', job=FORKED + 'import random, os, numpy, library\nprint(library.state, os.environ.get("LEFT"), os.getcwd(), random.random(), numpy.random.random())\n'
         'library.state.append(1); os.environ["LEFT"] = "1"; os.chdir("/")')
    done = home.run(['sh', '-c', f'"{sys.executable}" -m l2rec.training.warm start job; "{sys.executable}" -m l2rec.training.warm start job'], libraries='library numpy')
    first, second = re.findall(r'forked\n(.*)\n', done.stdout)
    assert first.split()[:3] == second.split()[:3] == ['[]', 'None', str(home.folder)]
    assert first.split()[3] != second.split()[3] and first.split()[4] != second.split()[4]


@linux
def test_our_own_modules_are_read_anew(home):
    """Edited between two runs of one make: the second run executes what lies on the disk, as its fingerprint says."""
    package = home.folder / 'l2rec/baselines'
    package.mkdir(parents=True)
    for folder in (package.parent, package, package.parent / 'training'):
        folder.mkdir(exist_ok=True)
        (folder / '__init__.py').write_text('')
    (package.parent / 'training/warm.py').write_text(Path(warm.__file__).read_text())
    (package / 'adder.py').write_text('STEP = 1\n')
    home(job='from l2rec.baselines.adder import STEP\nprint("step", STEP)\nopen("l2rec/baselines/adder.py", "w").write("STEP = 10 + 1\\n")')
    start = f'"{sys.executable}" -m l2rec.training.warm start job'
    done = home.run(['sh', '-c', f'{start}; {start}'], libraries='l2rec.baselines.adder', PYTHONPATH='', PYTHONDONTWRITEBYTECODE='1')
    assert done.stdout == 'step 1\nstep 11\n', done.stderr


@linux
def test_what_a_fork_cannot_give_is_started_plainly(home):
    home(job=FORKED, threaded='import threading, time\nthreading.Thread(target=time.sleep, args=(5,), daemon=True).start()\n')
    done = home.run(['sh', '-c', f'POLARS_MAX_THREADS=1 "{sys.executable}" -m l2rec.training.warm start job'])
    assert done.stdout == 'plain\n' and done.stderr == 'a plain start, not a warm one: other environment: POLARS_MAX_THREADS\n'
    done = home.run([*START, 'job'], libraries='threaded')
    assert done.stdout == 'plain\n' and 'left a thread behind' in done.stderr
    assert home.run([*START, 'job'], libraries='no.such.library math').stdout == 'forked\n'
    assert home.run([*START, 'job'], serve=False, L2REC_WARM=str(home.folder / 'gone')).stdout == 'plain\n'


def test_elsewhere_starts_are_plain(home):
    home(job=FORKED, sitecustomize='import os\ndel os.pidfd_open\n' if hasattr(os, 'pidfd_open') else '')
    assert home.run([*START, 'job'], PYTHONPATH=f'{home.folder}:{Path(warm.__file__).parents[2]}').stdout == 'plain\n'


TRAIN = '''\
import hashlib, torch
torch.manual_seed(0)
x, w, v = (torch.randn(shape, requires_grad=True) for shape in ((600, 96), (96, 256), (256, 1)))
for _ in range(3):
    loss = ((x @ w).relu() @ v).square().mean() + (x @ x.T).logsumexp(1).mean()
    for p, step in zip((x, w, v), torch.autograd.grad(loss, (x, w, v))): p.data -= 0.01 * step
values = (x @ w).detach().numpy()
print(torch.get_num_threads(), torch.get_num_interop_threads(), hashlib.sha256(values.tobytes()).hexdigest(), hashlib.sha256((values @ values.T).tobytes()).hexdigest())
'''


@linux
def test_training_gives_the_same_bits(home):
    """By torch on two threads, and by NumPy."""
    home(job=FORKED + TRAIN)
    forked, plain = both(home, 'job', libraries='torch numpy', OMP_NUM_THREADS='2')
    assert forked.stdout.startswith('forked\n2 ') and forked.stdout.split()[1:] == plain.stdout.split()[1:]


@linux
def test_jobs_share_the_cores(home):
    home(job=FORKED + 'import os; print(os.environ["OMP_NUM_THREADS"])')
    assert home.run([*START, 'job'], MAKEFLAGS=' -j2 --jobserver-auth=3,4').stdout.split() == ['forked', str(max(1, os.cpu_count() // 2))]


def ended(number, seconds=10):
    """Whether a process is gone, or will be within some seconds."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        try: state = Path(f'/proc/{number}/stat').read_text().rpartition(')')[2].split()[0]
        except (FileNotFoundError, ProcessLookupError): return True  # gone before it was opened, or between that and the reading
        if state == 'Z': return True
        time.sleep(0.02)
    return False


def heed():
    """Let a child obey the signals that these tests may have been told to ignore, as under `nohup`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)


@linux
@pytest.mark.parametrize('who, number', [('serve', signal.SIGKILL), ('serve', signal.SIGTERM), ('serve', signal.SIGHUP), ('command', signal.SIGKILL), ('asker', signal.SIGKILL),
                                         ('asker', signal.SIGTERM), ('asker', signal.SIGINT), ('group', signal.SIGINT), ('group', signal.SIGKILL), ('parent', signal.SIGKILL)])
def test_nothing_is_left(home, who, number):
    """Whoever of them is hit, all of them end."""
    home(job='import os, time\nopen("n", "w").write(f"{os.getpid()} {os.getppid()}"); os.rename("n", "ready")\ntime.sleep(60)',
         asker='import subprocess, sys, os\nopen("command", "w").write(str(os.getpid()))\nwith subprocess.Popen(sys.argv[1:]) as child:\n    open("a", "w").write(str(child.pid)); os.rename("a", "asker")\n',
         parent='import subprocess, sys\nsubprocess.run(sys.argv[1:])\n')
    env = {**os.environ, 'PYTHONPATH': str(Path(warm.__file__).parents[2]), 'TMPDIR': str(home.folder)}
    first = subprocess.Popen([sys.executable, 'parent.py', *SERVE, sys.executable, 'asker.py', *START, 'job'], cwd=home.folder, env=env, start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed)
    while not ((home.folder / 'ready').exists() and (home.folder / 'asker').exists()): time.sleep(0.01)
    job, serve = map(int, (home.folder / 'ready').read_text().split())
    command, asker = (int((home.folder / name).read_text()) for name in ('command', 'asker'))
    if who == 'group': os.killpg(first.pid, number)
    else: os.kill(dict(serve=serve, command=command, asker=asker, parent=first.pid)[who], number)
    assert all(ended(process) for process in (job, asker, command, serve))
    first.wait(10)
    assert number == signal.SIGKILL and who in ('serve', 'group') or not list(home.folder.glob('l2rec-warm-*'))
