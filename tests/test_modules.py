"""Training that may be killed, and evaluation against numbers worked out by hand."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from l2rec.baselines.sasrec import SASRec
from l2rec.data.batches import ClickData, SequenceData, Targets
from l2rec.data.splits import leave_last_fraction, leave_last_out, new_users, training_counts, with_validation
from l2rec.training.contracts import Click, Retrieval, build
from l2rec.training.modules import ClickModule, RetrievalModule, evaluate, fit, set_up, validate
from l2rec.training.models import MODELS, model_class
from worlds import dataset, random_dataset, ring

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = dict(width=8, dropout=.3)
SECONDS = ["train_seconds", "validation_seconds"]


@pytest.fixture(scope="module")
def split():
    return leave_last_out(ring(40, 15, 7))


def parts(split, seed=0, lr=3e-3, cls=SASRec, hyperparameters=SMALL, **batches):
    model, data = set_up(cls, split, seed, hyperparameters, **{"max_length": 6, "batch_size": 8, **batches})
    return RetrievalModule(model, data, seed=seed, lr=lr), data


def trained(split, folder=None, epochs=4, **how):
    keys = ("seed", "lr", "cls", "hyperparameters", "num_workers", "max_length", "batch_size", "windows")
    module, data = parts(split, **{k: v for k, v in how.items() if k in keys})
    done = fit(module, data, max_epochs=epochs, checkpoints=folder, progress=False, **{"patience": 100, **{k: v for k, v in how.items() if k not in keys}})
    return {k: v.clone() for k, v in module.model.state_dict().items()}, done


def same(a, b):
    """Whether two fits agree bit for bit, clocks apart."""
    return (all(a[0][k].equal(b[0][k]) for k in a[0]) and a[1].history.drop(SECONDS).equals(b[1].history.drop(SECONDS))
            and (a[1].epochs, a[1].best_epoch) == (b[1].epochs, b[1].best_epoch))


# --- a run that is killed -------------------------------------------------------------------------------------------------

DRIVER = """
import os, random, signal, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from pathlib import Path
from test_modules import leave_last_out, ring, trained
torch.set_num_threads(1)
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir()


def run(name):
    weights, done = trained(leave_last_out(ring(40, 15, 7)), folder / name, epochs=12)
    torch.save(weights, folder / f"{name}.pt")
    done.history.write_parquet(folder / f"{name}.parquet")
    (folder / f"{name}.txt").write_text(f"{done.epochs} {done.best_epoch}")


def child(name, seconds=None):
    "Whether a process that does the run came to its end before it was killed."
    pid = os.fork()
    if not pid:
        try:
            run(name)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status): sys.exit("the run failed")
    return os.WIFEXITED(status)


begin = time.perf_counter()
assert child("whole")
whole, rng, stopped = time.perf_counter() - begin, random.Random(seed), []
for _ in range(6):
    if child("killed", rng.uniform(.1, .5) * whole): break
    stopped.append(sorted(p.name for p in (folder / "killed").glob("*")) if (folder / "killed").exists() else [])
assert child("killed")
print("stopped", sum("last.ckpt" in s for s in stopped), "of", len(stopped), stopped, flush=True)
"""


def test_a_killed_run_ends_as_the_one_never_killed(tmp_path):
    here = Path(__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path / "runs"), "3"], env=env, capture_output=True, text=True, timeout=300, cwd=here.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped 0 of" not in done.stdout, done.stdout                       # at least one run went on from a checkpoint
    read = lambda name: (torch.load(tmp_path / "runs" / f"{name}.pt", weights_only=True), pl.read_parquet(tmp_path / "runs" / f"{name}.parquet").drop(SECONDS), (tmp_path / "runs" / f"{name}.txt").read_text())
    whole, killed = read("whole"), read("killed")
    assert all(whole[0][k].equal(killed[0][k]) for k in whole[0])
    assert whole[1].equals(killed[1]) and whole[1].height == 12 and whole[2] == killed[2]


@pytest.mark.parametrize("how", [{}, dict(every=2), dict(windows="all", max_length=2)], ids=str)
def test_resumed_after_any_epoch(split, tmp_path, how):
    whole = trained(split, tmp_path / "whole", 5, **how)
    for stop in (2, 3):
        trained(split, tmp_path / str(stop), stop, **how)
        assert same(trained(split, tmp_path / str(stop), 5, **how), whole)


@pytest.mark.parametrize("how", [dict(patience=1), dict(patience=2, every=2)], ids=str)
def test_a_run_that_has_ended_does_not_go_on(split, tmp_path, how):
    """Killed between the end of training and the writing of its record, it finds nothing left to do."""
    whole = trained(split, tmp_path / "run", 40, lr=.05, **how)
    assert whole[1].epochs < 40
    assert same(trained(split, tmp_path / "run", 40, lr=.05, **how), whole)
    full = trained(split, tmp_path / "full", 3)
    assert same(trained(split, tmp_path / "full", 3), full)


def test_half_a_checkpoint_beside_is_ignored(split, tmp_path):
    whole = trained(split, tmp_path / "whole")
    trained(split, tmp_path / "run", 2)
    for name in ("last", "best"):
        whole_file = (tmp_path / "run" / f"{name}.ckpt").read_bytes()
        (tmp_path / "run" / f"{name}.ckpt.partial").write_bytes(whole_file[: len(whole_file) // 2])
    assert same(trained(split, tmp_path / "run"), whole)
    trained(split, tmp_path / "fresh", 1)
    (tmp_path / "fresh" / "last.ckpt").rename(tmp_path / "fresh" / "last.ckpt.partial")
    assert same(trained(split, tmp_path / "fresh"), whole)


def test_a_failure_while_saving_leaves_the_checkpoint_before(split, tmp_path, monkeypatch):
    from l2rec.training import modules

    whole = trained(split, tmp_path / "whole")
    trained(split, tmp_path / "run", 2)
    before, calls = (tmp_path / "run" / "last.ckpt").read_bytes(), []

    def full(*paths):
        calls.append(paths)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(modules.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            trained(split, tmp_path / "run")
    assert calls and (tmp_path / "run" / "last.ckpt").read_bytes() == before
    assert same(trained(split, tmp_path / "run"), whole)


@pytest.mark.parametrize("other, message", [
    (dict(hyperparameters=dict(width=16)), "width|item.weight"), (dict(cls=model_class("gsasrec")), "'model': 'SASRec'.*'model': 'GSASRec'"),
    (dict(max_length=5), "position.weight")], ids=["width", "model", "max_length"])
def test_checkpoint_of_another_model(split, tmp_path, other, message):
    trained(split, tmp_path, 1)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=f"(?s)belongs to another model.*({message}).*remove the checkpoint"):
        trained(split, tmp_path, 2, **other)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_checkpoint_of_other_data(split, tmp_path):
    trained(split, tmp_path, 1)
    for other, message in ((leave_last_out(ring(40, 16, 7)), "items"), (leave_last_fraction(ring(40, 15, 7), .2, .2), "leave-last-fraction"), (new_users(split, .1), "new users 0.1")):
        with pytest.raises(ValueError, match=f"belongs to another model.*{message}"):
            trained(other, tmp_path, 2)


# --- stopping and choosing ------------------------------------------------------------------------------------------------


class Scripted(Retrieval):
    """A model whose validation rises and falls as told: after step k its target scores `plan[k]` among others between 0 and -1."""

    def __init__(self, n_items, plan):
        super().__init__()
        self.step, self.plan, self.n = torch.nn.Parameter(torch.zeros(1)), plan, n_items

    def encode(self, batch):
        out = torch.zeros(len(batch), self.n) + torch.linspace(0, -1, self.n)
        if batch.target is not None:
            out[batch.target_row, batch.target] = self.plan[round(-self.step.item() * 10)]
        return out

    def catalogue(self):
        return torch.eye(self.n)

    def loss(self, batch):
        return self.step.sum(), {}


def scripted(split, plan):
    data = SequenceData(split, batch_size=1000)                          # one step an epoch
    module = RetrievalModule(Scripted(split.n_items, plan), data, lr=.1)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=.1)
    return module, data


def test_early_stopping_restores_the_best_weights(split):
    plan = [0, -.9, -.4, .1, -.2, -.5, -.9, .1, .1, .1]                       # after epoch 3 the best; validations after epochs 1, 2, ...
    module, data = scripted(split, plan)
    done = fit(module, data, max_epochs=9, patience=3, progress=False)
    assert done.epochs == 6 and done.best_epoch == 2 and done.history["epoch"].to_list() == list(range(6))
    assert module.model.step.item() == pytest.approx(-.3)
    curve = done.history["validation/ndcg@10"].to_list()
    assert int(np.argmax(curve)) == 2 and curve[2] == 1
    assert validate(module, data)["validation/ndcg@10"] == 1


def test_patience_counts_validations(split):
    plan = [0, -.5, .1, .1, -.4, .1, -.2, .1, .1, .1, .1]
    module, data = scripted(split, plan)
    done = fit(module, data, max_epochs=10, patience=2, every=2, progress=False)
    assert done.epochs == 6 and module.model.step.item() == pytest.approx(-.2) and done.best_epoch == 1
    assert done.history["validation/ndcg@10"].is_null().to_list() == [True, False] * 3


def test_all_epochs_without_early_stopping(split):
    _, done = trained(split, epochs=3)
    assert done.epochs == 3 and done.seconds == done.history["train_seconds"].sum() > 0 and (done.history["validation_seconds"] > 0).all()


class Breaks(Scripted):
    def loss(self, batch):
        value = self.step.sum() * (math.nan if self.step.item() < -.15 else 1)
        return value, {"softmax": value.detach(), "regulariser": torch.tensor(7.)}


def test_the_loss_of_an_epoch_is_the_mean_over_its_units(split):
    """As Lightning would add it up, batch after batch, the last one smaller; handed to its log once an epoch."""
    class Watched(RetrievalModule):
        def training_step(self, batch, batch_idx):
            value = super().training_step(batch, batch_idx)
            if batch_idx == 0: seen.append([])
            seen[-1].append((value.detach(), len(batch)))
            return value

        def log(self, name, *args, **kwargs):
            calls.append(name)
            return super().log(name, *args, **kwargs)
    seen, calls = [], []
    model, data = set_up(SASRec, split, 0, SMALL, max_length=5, batch_size=7)
    done = fit(Watched(model, data), data, max_epochs=3, patience=9, progress=False)
    assert len({n for _, n in seen[0]}) == 2 and calls.count("loss") == len(seen) == 3
    for batches, logged in zip(seen, done.history["loss"]):
        total = torch.tensor(0.)
        for value, n in batches: total = total + value * n
        assert logged == float(total / sum(n for _, n in batches))


def test_a_loss_that_is_not_finite_stops_with_step_and_terms(split):
    data = SequenceData(split, batch_size=1000)
    module = RetrievalModule(Breaks(split.n_items, [0] * 9), data, lr=.1)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=.1)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2 .*'softmax': nan.*'regulariser': 7.0.*smaller lr than 0.1"):
        fit(module, data, max_epochs=5, progress=False)


def test_parameters_out_of_range(split):
    model, data = set_up(SASRec, split, 0, SMALL)
    for wrong in (dict(lr=0), dict(lr=-1.), dict(weight_decay=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            RetrievalModule(model, data, **wrong)
    for wrong in (dict(max_epochs=0), dict(patience=0), dict(every=0)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0: at least 1"):
            fit(RetrievalModule(model, data), data, **wrong)
    with pytest.raises(ValueError, match="every=5 must not exceed max_epochs"):
        fit(RetrievalModule(model, data), data, max_epochs=2, every=5, progress=False)


def test_nothing_to_train(split):
    module, data = parts(split, cls=model_class("popularity"), hyperparameters={})
    done = fit(module, data)
    assert (done.epochs, done.history.height) == (0, 0) and done.seconds == module.model.build_seconds > 0


# --- seeds ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in MODELS if "sasrec" in n])
def test_the_seed_decides_everything(split, name):
    cls = model_class(name)
    torch.manual_seed(123)
    first = trained(split, epochs=2, cls=cls, seed=1)
    torch.manual_seed(456)
    assert same(first, trained(split, epochs=2, cls=cls, seed=1))
    other = trained(split, epochs=2, cls=cls, seed=2)
    assert not any(first[0][k].equal(other[0][k]) for k in ("item.weight", "position.weight", "blocks.0.inner.weight"))


def test_workers_change_nothing(split):
    assert same(trained(split, epochs=2), trained(split, epochs=2, num_workers=2))


def test_checkpoints_change_nothing(split, tmp_path):
    assert same(trained(split, epochs=2), trained(split, tmp_path, 2))


# --- measuring ------------------------------------------------------------------------------------------------------------


class Planted(Retrieval):
    """Fixed scores of every user row, some of them tied."""

    def __init__(self, split, levels=5):
        super().__init__()
        self.register_buffer("table", torch.from_numpy(np.random.default_rng(0).integers(0, levels, (split.n_users, split.n_items)).astype(np.float32)))

    def encode(self, batch):
        return self.table[batch.user]

    def catalogue(self):
        return torch.eye(self.table.shape[1])


def by_hand(split, table, part, removed, ks=(5, 10, 20)):
    """user row -> metric -> value, with lists and loops."""
    out = {}
    for u, (a, b) in enumerate(zip(*split.bounds(part))):
        if a == b:
            continue
        targets = set(split.items[a:b].tolist())
        seen = set() if split.new_user[u] or not removed else set(split.items[split.offsets[u] : a].tolist()) - targets
        left = [i for i in range(split.n_items) if i not in seen]
        ranks = sorted(1 + sum(table[u][i] > table[u][t] for i in left) + sum(table[u][i] == table[u][t] for i in left if i != t) / 2 for t in targets)
        out[u] = {}
        for k in ks:
            inside = [r for r in ranks if r <= k]
            ideal = sum(1 / math.log2(2 + i) for i in range(min(k, len(ranks))))
            out[u] |= {f"hr@{k}": float(bool(inside)), f"recall@{k}": len(inside) / len(ranks), f"ndcg@{k}": min(1., sum(1 / math.log2(1 + r) for r in inside) / ideal), f"mrr@{k}": 1 / inside[0] if inside else 0.}
    return out


@pytest.fixture(scope="module")
def world():
    return new_users(leave_last_fraction(random_dataset(n_users=40, n_items=25, seed=3), .2, .3), .2)


def test_validation_and_test_metrics_by_hand(world):
    data = SequenceData(world, eval_batch_size=7)
    module = RetrievalModule(Planted(world), data)
    table = module.model.table.tolist()
    found = validate(module, data)
    expected = by_hand(world, table, "validation", True)
    assert set(found) == {f"validation/{m}@{k}" for m in ("hr", "recall", "ndcg", "mrr") for k in (5, 10, 20)}
    for name, value in found.items():
        assert value == pytest.approx(np.mean([e[name.split("/")[1]] for e in expected.values()]), abs=1e-6)
    found, users = evaluate(module, data)
    removed, kept = by_hand(world, table, "test", True), by_hand(world, table, "test", False)
    for metric in ("hr", "recall", "ndcg", "mrr"):
        for k in (5, 10, 20):
            for where, hand in (("test", removed), ("test_seen_kept", kept)):
                assert found[f"{where}/{metric}@{k}"] == pytest.approx(np.mean([e[f"{metric}@{k}"] for e in hand.values()]), abs=1e-6)
    assert {k for k in found if "coverage" in k or "lift" in k} == {f"test/{m}@{k}" for m in ("coverage", "popularity_lift") for k in (5, 10, 20)} and found["time/rank_seconds"] > 0
    assert users["user_id"].to_list() == [int(world.user_id[u]) for u in removed]
    for row, u in zip(users.iter_rows(named=True), removed):
        for name, value in removed[u].items():
            assert row[name] == pytest.approx(value, abs=1e-6) and row[f"seen_kept/{name}"] == pytest.approx(kept[u][name], abs=1e-6)


def test_columns_of_the_users(world):
    data = SequenceData(world, eval_batch_size=7)
    found, users = evaluate(RetrievalModule(Planted(world), data), data)
    assert users.columns[:3] == ["user_id", "history_length", "target_popularity"]
    assert users.schema["user_id"] == pl.Int32 and users.schema["history_length"] == pl.Int32 and users.schema["target_popularity"] == pl.Float32
    counts = training_counts(world)
    for user, length, popularity in users.select("user_id", "history_length", "target_popularity").iter_rows():
        u = int(np.searchsorted(world.user_id, user))
        assert length == (0 if world.new_user[u] else world.valid_end[u] - world.offsets[u])
        assert popularity == pytest.approx(counts[world.items[world.valid_end[u] : world.offsets[u + 1]]].mean(), rel=1e-6)
    for name in users.columns[3:]:
        where = "test_seen_kept/" + name.removeprefix("seen_kept/") if name.startswith("seen_kept/") else f"test/{name}"
        assert found[where] == pytest.approx(users[name].mean(), abs=1e-6)


@pytest.mark.parametrize("size", [1, 1000])
def test_batch_size_changes_no_metric(world, size):
    values = []
    for eval_batch_size in (7, size):
        data = SequenceData(world, eval_batch_size=eval_batch_size)
        found, users = evaluate(RetrievalModule(Planted(world), data), data)
        values.append(({k: v for k, v in found.items() if not k.startswith("time/")}, users))
    assert values[0][0] == values[1][0] and values[0][1].equals(values[1][1])


def test_measuring_twice_counts_nobody_twice(world):
    data = SequenceData(world)
    module = RetrievalModule(Planted(world), data)
    first, again = evaluate(module, data), evaluate(module, data)
    assert first[1].equals(again[1]) and all(first[0][k] == again[0][k] for k in first[0] if not k.startswith("time/"))
    assert validate(module, data) == validate(module, data)


def test_counting_models_read_whole_histories():
    split = leave_last_out(ring(10, 80, 70))
    for name, length in (("item-knn", 70), ("popularity", 70), ("ease", 70), ("sasrec", 50)):
        _, data = set_up(model_class(name), split)
        assert data.max_length == length
    assert Targets(split, "test", 70).size.max() == 69


def test_choices_are_made_without_the_test(split):
    """Other test items: the same training, the same choice, the same weights."""
    items = split.items.copy()
    items[split.valid_end] = (items[split.valid_end] + 3) % split.n_items
    assert same(trained(split, epochs=3), trained(replace(split, items=items), epochs=3))


PROCESSES = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import lightning as L, torch
from test_modules import Planted, RetrievalModule, SequenceData, leave_last_fraction, new_users, random_dataset
torch.set_num_threads(1)
world = new_users(leave_last_fraction(random_dataset(n_users=41, n_items=25, seed=3), .2, .3), .2)


class Reports(RetrievalModule):
    def on_test_epoch_end(self):
        super().on_test_epoch_end()
        users = {k: v.tolist() for k, v in self.removed.per_user().items()}
        with open(f"{sys.argv[1]}-{self.trainer.world_size}-{self.global_rank}.json", "w") as file: json.dump([self.measured, users], file)


for devices in (2, 1):
    data = SequenceData(world, eval_batch_size=5)
    trainer = L.Trainer(accelerator="cpu", devices=devices, strategy="ddp_fork" if devices == 2 else "auto", logger=False, enable_progress_bar=False, enable_model_summary=False,
                        use_distributed_sampler=False)
    trainer.test(Reports(Planted(world), data), datamodule=data, verbose=False)
"""


def test_two_processes_measure_what_one_does(tmp_path):
    here = Path(__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROCESSES, str(tmp_path / "out")], env=env, capture_output=True, text=True, timeout=240, cwd=here.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    one, first, second = (json.loads((tmp_path / f"out-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert one == first == second and len(one[1]["user"]) > 20


# --- clicks ---------------------------------------------------------------------------------------------------------------


class Taste(Click):
    """A logit for each item and one for the feedback given before."""

    @classmethod
    def from_split(cls, split):
        return cls(split.n_items)

    def __init__(self, n_items):
        super().__init__()
        self.item, self.before = torch.nn.Embedding(n_items, 1), torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        row = torch.repeat_interleave(torch.arange(len(batch)), batch.length)
        mean = torch.zeros(len(batch)).index_add_(0, row, batch.feedback) / batch.length.clamp(min=1)
        return self.item(batch.candidate)[:, 0] + self.before * (mean - .5)


def test_clicks_are_trained_and_measured(tmp_path):
    rng = np.random.default_rng(0)
    histories = {u: rng.permutation(12)[:9].tolist() for u in range(60)}
    good = [5. if (i % 2) ^ (rng.random() < .05) else 1. for items in histories.values() for i in items]
    split = leave_last_fraction(dataset(histories, rating=good), .2, .3)

    def run(folder, epochs):
        data = ClickData(split, batch_size=32)
        module = ClickModule(build(Taste, split, 1), data, lr=.1)
        done = fit(module, data, max_epochs=epochs, monitor="validation/auc", checkpoints=folder, progress=False, patience=50)
        return {k: v.clone() for k, v in module.model.state_dict().items()}, done, module, data

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    assert same(run(tmp_path / "parts", 4)[:2], whole[:2])
    _, _, module, data = whole
    found, users = evaluate(module, data)
    assert found["test/auc"] > .9 and validate(module, data)["validation/auc"] > .9
    label, logit, who = (np.concatenate([v.numpy() for v in values]) for values in zip(*[(b.label, module.model(b).detach(), b.user) for b in data.test_dataloader()]))
    pairs = [(p > n) + .5 * (p == n) for p in logit[label == 1] for n in logit[label == 0]]
    assert found["test/auc"] == pytest.approx(np.mean(pairs), abs=1e-9)
    assert found["test/log_loss"] == pytest.approx(np.mean(np.logaddexp(0, np.where(label == 1, -1, 1) * logit.astype(np.float64))), rel=1e-6)
    assert users["user_id"].to_list() == split.user_id[np.unique(who)].tolist() and users["history_length"].to_list() == (split.valid_end - split.offsets[:-1])[np.unique(who)].tolist()
    assert users.columns[:2] == ["user_id", "history_length"] and {"auc", "log_loss", "n"} <= set(users.columns)
