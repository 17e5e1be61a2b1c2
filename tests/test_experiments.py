"""The experiment notebooks themselves, executed as people execute them: on a table of one's own, on names with typos, and by the gpu profile at tiny size."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from l2rec.data.dataset import make_dataset, write_dataset
from l2rec.data.splits import leave_last_out
from l2rec.data.table import dataset_from_table
from l2rec.dual_view.items import make_item_texts
from l2rec.dual_view.model import load_l2rec
from l2rec.training import warm
from l2rec.training.models import MODELS
from l2rec.training.plan import NotebookFailed, Run, execute, imported
from l2rec.training.recommend import recommend
from l2rec.training.records import read_record, record_path
from test_dual_view_model import encoder

ROOT = Path(__file__).resolve().parent.parent
RETRIEVAL, DUAL_VIEW, DUAL_VIEW_SEARCH = (ROOT / f'nbs/experiments/{name}.ipynb' for name in ('retrieval', 'dual_view', 'dual_view_search'))


def shop(users: int = 60, length: int = 9, items: int = 40) -> pl.DataFrame:
    "Customers who walk along a ring of articles, as a shop would export them: text ids, dates, any column names."
    rng = np.random.default_rng(0)
    at = (rng.integers(0, items, users)[:, None] + np.arange(length)) % items
    day = np.datetime64('2024-01-01') + np.arange(length)
    return pl.DataFrame({'customer': [f'c{u:03d}' for u in range(users) for _ in range(length)], 'sku': [f'article {i}' for i in at.ravel()],
                         'bought': np.tile(day.astype(str), users)})


def test_a_table_of_ones_own_becomes_ranked_lists(tmp_path):
    table, lists = tmp_path / 'orders.csv', tmp_path / 'out/lists.parquet'
    shop().write_csv(table)
    execute(RETRIEVAL, tmp_path / 'run.ipynb', dict(table=str(table), columns={'user': 'customer', 'item': 'sku', 'time': 'bought'}, model='sasrec', lr=5e-3,
                                                    batch_size=16, max_epochs=15, hyperparameters={'width': 32, 'dropout': 0.1}, recommendations=str(lists), k=3), ROOT)
    found = pl.read_parquet(lists)
    assert found.columns == ['user_id', 'item_id', 'rank', 'score', 'user', 'item']
    assert found.group_by('user_id').len()['len'].to_list() == [3] * 60
    ordered = found.sort('user_id', 'rank')
    assert (ordered['score'].diff().filter(ordered['user_id'].diff() == 0) <= 0).all()
    # the article after a customer's last one is nearly always first: the ring was learnt
    names = sorted({f'article {i}' for i in range(40)})
    last = shop().group_by('customer', maintain_order=True).last()['sku'].str.slice(8).cast(pl.Int64)
    first = [int(names[i - 1].removeprefix('article ')) for i in found.filter(pl.col('rank') == 1).sort('user_id')['item_id']]
    assert found.filter(pl.col('rank') == 1).sort('user_id')['item'].to_list() == [f'article {i}' for i in first] and found['user'].unique().sort().to_list() == shop()['customer'].unique().sort().to_list()
    assert np.mean((last.to_numpy() + 1) % 40 == np.array(first)) > .8


@pytest.mark.parametrize('given, words', [
    (dict(model='sasrce'), "did you mean 'sasrec'"),
    (dict(dataset='ml-100'), 'ml-100k'),
    (dict(model='sasrec', hyperparameters={'widht': 8}), "did you mean 'width'"),
])
def test_a_wrong_parameter_is_named(tmp_path, given, words, monkeypatch):
    monkeypatch.setenv('L2REC_DATA', str(tmp_path / 'nothing'))
    with pytest.raises(NotebookFailed) as error: execute(RETRIEVAL, tmp_path / 'run.ipynb', given, ROOT)
    assert words in str(error.value)


def run_of_the_gpu_profile(home: Path, *keys: str):
    "Make these runs of the gpu profile from home/data into home/results, each in a process of its own."
    environment = {**os.environ, 'L2REC_DATA': str(home / 'data'), 'OMP_NUM_THREADS': '1'}
    for key in keys:
        done = subprocess.run([sys.executable, '-m', 'l2rec.training.plan', 'run', '--profile', 'gpu', '--results', str(home / 'results'), key],
                              cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_gpu_profile_runs_at_tiny_size(tmp_path):
    "Search and retrieval of the gpu profile with its own parameters, on a tiny dataset under a real one's name."
    t = shop(length=12)
    write_dataset(make_dataset('ml-1m', pl.DataFrame({'user_id': np.repeat(np.arange(60), 12), 'item_id': t['sku'].str.slice(8).cast(pl.Int64), 'position': np.tile(np.arange(12), 60)})),
                  tmp_path / 'data/ml-1m')
    run_of_the_gpu_profile(tmp_path, 'search/ml-1m/sasrec/seed-0', 'retrieval/ml-1m/sasrec/seed-1')
    record = read_record(tmp_path / 'results/gpu/runs/retrieval/ml-1m/sasrec/seed-1')
    chosen = json.loads((tmp_path / 'results/gpu/runs/search/ml-1m/sasrec/seed-0/chosen.json').read_text())
    assert record.metrics['test/ndcg@10'] > .5 and record.per_user().height == 60
    assert record.provenance['parameters']['hyperparameters'] == chosen['hyperparameters'] and record.provenance['parameters']['windows'] == 'all'
    assert record.provenance['fingerprint']['needs'].keys() == {'search/ml-1m/sasrec/seed-0'}


def clubs(path: Path, name: str, users: int = 80):
    "A tiny rated dataset with attributes, under a real one's name."
    rng = np.random.default_rng(0)
    user, item = np.repeat(np.arange(users), 14), rng.integers(0, 30, users * 14)
    rating = np.where((user % 2 == item % 2) ^ (rng.random(len(user)) < .2), 5., 2.)
    write_dataset(make_dataset(name, pl.DataFrame({'user_id': user, 'item_id': item, 'position': np.tile(np.arange(14), users), 'rating': pl.Series(rating, dtype=pl.Float32)}),
                               users=pl.DataFrame({'user_id': np.arange(users), 'gender': [f'g{u % 2}' for u in range(users)], 'zip_code': [f'{u % 9}1234' for u in range(users)]})), path / name)


def test_the_gpu_profile_of_cold_start_runs_at_tiny_size(tmp_path):
    "Search and a run with the paper's widths, and what attributes can tell, as the gpu profile plans them."
    clubs(tmp_path / 'data', 'ml-1m')
    run_of_the_gpu_profile(tmp_path, 'cold_start_search/ml-1m/dcnv2/seed-0', 'cold_start/ml-1m/dcnv2+mail-base/seed-1', 'attribute_information/ml-1m/like-rate/seed-0')
    runs = tmp_path / 'results/gpu/runs'
    chosen = json.loads((runs / 'cold_start_search/ml-1m/dcnv2/seed-0/chosen.json').read_text())
    assert set(chosen) == {'', 'mail-base'} and pl.read_csv(runs / 'cold_start_search/ml-1m/dcnv2/seed-0/history.csv').height == 12     # as many trials for the one as for the other
    record = read_record(runs / 'cold_start/ml-1m/dcnv2+mail-base/seed-1')
    assert record.provenance['parameters']['hyperparameters'] == chosen['mail-base']['hyperparameters'] and record.provenance['parameters']['lr'] == chosen['mail-base']['lr']
    assert {'test/new/auc', 'test/old/gauc', 'virtual/mail/r2', 'codes/mmd'} <= record.metrics.keys() and record.per_user()['new'].sum() == 32
    assert {'step', 'log_loss', 'fill/attributes', 'fill/behaviour', 'fill/alignment'} <= set(pl.read_csv(record.path / 'steps.csv').columns)
    assert read_record(runs / 'attribute_information/ml-1m/like-rate/seed-0').metrics['rate/gender/new/auc'] > .6


def test_the_gpu_profile_of_clicks_runs_at_tiny_size(tmp_path):
    "A search of a click model, and the model at its best with what the search chose, as the gpu profile plans them."
    clubs(tmp_path / 'data', 'ml-1m')
    run_of_the_gpu_profile(tmp_path, 'click_search/ml-1m/id-transformer/seed-0', 'click_through/ml-1m/id-transformer+factors-300-user-tuned/seed-1')
    runs = tmp_path / 'results/gpu/runs'
    chosen = json.loads((runs / 'click_search/ml-1m/id-transformer/seed-0/chosen.json').read_text())
    record = read_record(runs / 'click_through/ml-1m/id-transformer+factors-300-user-tuned/seed-1')
    assert record.provenance['parameters']['hyperparameters'] == {**chosen['hyperparameters'], 'similar_start': True, 'item_start': 'factors', 'user_vector': True} and record.provenance['parameters']['lr'] == chosen['lr']
    assert record.provenance['fingerprint']['needs'].keys() == {'click_search/ml-1m/id-transformer/seed-0'} and {'test/auc', 'test_frozen/gauc'} <= record.metrics.keys() and record.per_user().height > 40


def test_the_gpu_profile_of_two_views_runs_at_tiny_size(tmp_path):
    "What texts can tell, and a searched comparator with ids, as the gpu profile plans them."
    t = shop(length=12)
    item = t['sku'].str.slice(8).cast(pl.Int64)
    things = item.unique().sort()
    write_dataset(make_dataset('amazon-beauty', pl.DataFrame({'user_id': np.repeat(np.arange(60), 12), 'item_id': item, 'position': np.tile(np.arange(12), 60)}),
                               items=pl.DataFrame({'item_id': things, 'title': [f'thing of sort {i % 7}, number {i}' for i in things]})), tmp_path / 'data/amazon-beauty')
    run_of_the_gpu_profile(tmp_path, 'text_information/amazon-beauty/l2rec/seed-0', 'dual_view_search/amazon-beauty/unisrec/seed-0', 'dual_view/amazon-beauty/unisrec+ids/seed-1')
    runs = tmp_path / 'results/gpu/runs'
    told = read_record(runs / 'text_information/amazon-beauty/l2rec/seed-0').metrics
    assert told['text/tokens'] == 8 and told['text/4/cut'] == 1 and told['text/16/cut'] == 0 and told['text/128/ndcg@10'] == pytest.approx(told['text/64/ndcg@10'])
    chosen = json.loads((runs / 'dual_view_search/amazon-beauty/unisrec/seed-0/chosen.json').read_text())
    record = read_record(runs / 'dual_view/amazon-beauty/unisrec+ids/seed-1')
    assert record.provenance['parameters']['hyperparameters'] == {**chosen['hyperparameters'], 'ids': True} and record.provenance['parameters']['lr'] == chosen['lr']
    assert record.metrics['test/ndcg@10'] > .5 and record.per_user().height == 60


@pytest.mark.parametrize('given, words', [
    (dict(variant='mail-bass'), "did you mean 'mail-base'"),
    (dict(hyperparameters={'dropuot': .1}), "did you mean 'dropout'"),
    (dict(drop=['gender', 'zip_code']), 'attribute'),
    (dict(share=1.0, variant='emblr'), 'old user'),
])
def test_a_wrong_parameter_of_cold_start_is_named(tmp_path, given, words, monkeypatch):
    clubs(tmp_path / 'data', 'ml-100k')
    monkeypatch.setenv('L2REC_DATA', str(tmp_path / 'data'))
    with pytest.raises(NotebookFailed) as error: execute(ROOT / 'nbs/experiments/cold_start.ipynb', tmp_path / 'run.ipynb', dict(dataset='ml-100k', **given), ROOT)
    assert words in str(error.value)


COLUMNS = {'user': 'customer', 'item': 'sku', 'time': 'bought', 'title': 'name'}
VIEWS = {'rank': 2, 'alpha': 4.0, 'shared': 1, 'semantic': 3, 'behaviour': 4, 'max_tokens': 20, 'item_tokens': 4, 'head_hidden': 16, 'dropout': 0.0, 'place_dropout': 0.0, 'text_dropout': 0.0}
TOWER = {'width': 16, 'hidden': 16, 'dropout': 0.0, 'text_dropout': 0.0}


@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    "A tiny encoder, orders of a shop, and what its articles are called: all but one are."
    folder = tmp_path_factory.mktemp('shelf')
    encoder(folder / 'encoder')
    shop().write_csv(folder / 'orders.csv')
    shop(items=12).write_csv(folder / 'few.csv')
    pl.DataFrame({'sku': [f'article {i}' for i in range(40)], 'name': ['' if i == 7 else f'w{i} w{i // 8}' for i in range(40)]}).write_csv(folder / 'articles.csv')
    write_dataset(dataset_from_table(folder / 'orders.csv', items=folder / 'articles.csv', **COLUMNS), folder / 'shop')
    return folder


@pytest.fixture(scope='module')
def kernels(shelf):
    "The environment in which kernels are forks of one warm interpreter, as under make, so that a dozen notebooks import torch once."
    line, libraries = shelf / 'line', imported([Run('demo', name, 'shop', 'l2rec') for name in ('dual_view', 'dual_view_search')], [], ROOT, MODELS)
    given = {'L2REC_CACHE': str(shelf / 'cache'), warm.LIBRARIES: ' '.join(libraries)}
    environment = {name: value for name, value in {**os.environ, **given}.items() if name != 'PYTEST_CURRENT_TEST'}
    server = subprocess.Popen([sys.executable, '-m', 'l2rec.training.warm', 'serve', 'sh', '-c', f'echo "${warm.ADDRESS}" > "{line}.new" && mv "{line}.new" "{line}" && cat'],
                              cwd=shelf, env=environment, stdin=subprocess.PIPE)
    while not line.exists():
        assert server.poll() is None
        time.sleep(.05)
    yield {**given, warm.ADDRESS: line.read_text().strip()}
    server.stdin.close()                                                  # `cat` ends, and the interpreter with it
    server.wait()


@pytest.fixture
def run(shelf, kernels, tmp_path):
    "Execute a notebook of two views on the shop, or on what is given instead."
    own = dict(table=str(shelf / 'orders.csv'), items_table=str(shelf / 'articles.csv'), table_columns=COLUMNS)
    def execute_on_the_shop(notebook=DUAL_VIEW, root=ROOT, **given):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv('PYTEST_CURRENT_TEST', raising=False)            # changes from test to test, and no fork is made where the environment is another one
            for name, value in kernels.items(): patch.setenv(name, value)
            data = own if notebook == DUAL_VIEW else dict(dataset=str(shelf / 'shop'))
            return execute(notebook, tmp_path / 'run.ipynb', {**data, **dict(encoder=str(shelf / 'encoder'), max_length=8, batch_size=16), **given}, root)
    return execute_on_the_shop


@pytest.mark.parametrize('model, hyperparameters', [('l2rec', VIEWS), ('lora', VIEWS), ('hllm', {**TOWER, 'rank': 2, 'item_tokens': 4})])
def test_two_views_of_a_table_of_ones_own(run, shelf, tmp_path, monkeypatch, model, hyperparameters):
    "Really trained and recorded; the lists are those of the model that is kept."
    kept, lists, place = tmp_path / 'kept', tmp_path / 'out/lists.parquet', record_path(tmp_path, 'demo', 'dual_view', 'orders', model)
    told = run(model=model, hyperparameters=hyperparameters, lr=1e-2, max_epochs=10, patience=10, every=2, record=str(place), recommendations=str(lists), k=3,
               **(dict(kept=str(kept)) if model != 'hllm' else {}))
    record, found = read_record(place), pl.read_parquet(lists)
    assert record.metrics['test/ndcg@10'] > .5 and record.per_user().height == 60 and record.metrics['parameters/trained'] < record.metrics['parameters/total']
    assert record.provenance['parameters']['model'] == model and not {'table', 'items_table', 'table_columns', 'recommendations', 'k', 'kept'} & record.provenance['parameters'].keys()
    assert "'items without a text': 1" in str(told['cells'])
    assert ("of which ask for the next, in 32 histories': " in str(told['cells'])) is (model != 'hllm')
    assert found.columns == ['user_id', 'item_id', 'rank', 'score', 'user', 'item'] and found.group_by('user_id').len()['len'].to_list() == [3] * 60
    last = dict(shop().group_by('customer', maintain_order=True).last().select('customer', pl.col('sku').str.slice(8).cast(pl.Int64)).iter_rows())
    first = found.filter(pl.col('rank') == 1)
    assert np.mean([(last[user] + 1) % 40 == int(item.removeprefix('article ')) for user, item in first.select('user', 'item').iter_rows()]) > .5
    if model == 'hllm': return
    monkeypatch.setenv('L2REC_CACHE', str(shelf / 'cache'))
    data = dataset_from_table(shelf / 'orders.csv', items=shelf / 'articles.csv', **COLUMNS)
    split = leave_last_out(data)
    again = recommend(load_l2rec(kept, split, make_item_texts(data, split, shelf / 'encoder')), split, 3, None, 8)
    assert again.drop('score').equals(found.select('user_id', 'item_id', 'rank')) and np.allclose(again['score'], found['score'], atol=1e-5)


@pytest.mark.parametrize('given, words', [
    (dict(model='ease'), ("model='ease'", 'sasrec, sasrec-binary, gsasrec, l2rec, lora, unisrec, learn, hllm')),
    (dict(model='hi-sam'), ("model='hi-sam'", 'l2rec')),
    (dict(model='unisrec', kept='kept'), ("kept='kept': unisrec", 'l2rec, lora')),
    (dict(kept=str(ROOT / 'nbs')), ('no kept model',)),
    (dict(lr=-1.0), ('ValueError: lr=-1.0',)),
    (dict(head_lr=-1.0), ('ValueError: head_lr=-1.0',)),
    (dict(items_table=''), ("items_table=''", 'l2rec reads texts')),
    (dict(windows='some', hyperparameters=VIEWS), ("windows='some': 'last' or 'all'",)),
    (dict(hyperparameters={'ids': 'apart'}), ("ids='apart'", "use fused_in='scores'")),
    (dict(table='few.csv'), ('dataset few', 'at least 20 items', '12')),
    (dict(notebook=DUAL_VIEW_SEARCH, model='ease'), ("model='ease'", 'l2rec')),
    (dict(notebook=DUAL_VIEW_SEARCH, grid={'lr': [1e-3], 'dropuot': [.1, .3]}, trials=2), ("takes 'dropuot'; did you mean 'dropout'?",)),
])
def test_a_wrong_parameter_of_two_views_is_named(run, shelf, given, words):
    with pytest.raises(NotebookFailed) as error: run(**{**given, **({'table': str(shelf / given['table'])} if 'table' in given else {})})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('notebook', [DUAL_VIEW, DUAL_VIEW_SEARCH], ids=lambda path: path.stem)
def test_a_record_outside_a_checkout_is_refused_before_the_training(run, tmp_path, notebook):
    with pytest.raises(NotebookFailed) as error: run(notebook, root=tmp_path, record='record')
    assert "record='record'" in str(error.value) and 'no l2rec checkout' in str(error.value)
    assert 'Epoch' not in (tmp_path / 'run.ipynb').read_text()


def test_a_search_of_two_views_without_learning_rates(run, tmp_path):
    "What another model takes is left out, and said to be."
    told = run(DUAL_VIEW_SEARCH, model='unisrec', grid={'heads': [1, 2], 'top_n': [1, 2]}, trials=2, hyperparameters=TOWER, max_epochs=1, record=str(tmp_path / 'record'))
    assert json.loads((tmp_path / 'record/chosen.json').read_text())['hyperparameters'].keys() == {*TOWER, 'heads'}
    assert pl.read_csv(tmp_path / 'record/history.csv').height == 2 and "unisrec does not take 'top_n'" in str(told['cells'])
