"""Tables, figures and claims from records that the tests write themselves, against numbers made by hand."""
import subprocess
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from l2rec.reporting import claims, figures, tables
from l2rec.training.records import RecordError, record_path, write_record

USERS = 40

def record(results, dataset, model, seed, values, experiment='retrieval', users=None, **more):
    "One record whose ndcg@10 of each user is `values` (Float[U])."
    values = np.asarray(values, np.float32)
    users = np.arange(len(values)) if users is None else users
    per_user = pl.DataFrame({'user_id': np.asarray(users, np.int32), 'history_length': (3 + np.arange(len(values)) % 4).astype(np.int32),
                             'target_popularity': (1. + np.arange(len(values))).astype(np.float32), 'ndcg@10': values, 'seen_kept/ndcg@10': values / 2})
    mean = float(values.astype(np.float64).mean())
    metrics = {'test/ndcg@10': mean, 'test_seen_kept/ndcg@10': mean / 2, 'test/coverage@10': .25, 'time/train_seconds': 2. + seed} | more
    return write_record(record_path(results, 'demo', experiment, dataset, model, seed=seed), metrics, per_user,
                        pl.DataFrame({'epoch': [0, 1, 2], 'validation/ndcg@10': [.1, .3, .2]}) if model == 'sasrec' else None, {'seed': seed})

@pytest.fixture
def results(tmp_path):
    "Two datasets; sasrec clearly best with seeds 0 and 1, popularity with one seed; item-knn the worst."
    base = np.linspace(.1, .5, USERS)
    for dataset, shift in (('a', 0.), ('b', .1)):
        record(tmp_path, dataset, 'popularity', 0, base + shift)
        record(tmp_path, dataset, 'item-knn', 0, base - .05 + shift)
        for seed in (0, 1): record(tmp_path, dataset, 'sasrec', seed, base + .2 + .02 * seed + shift + .01 * (np.arange(USERS) % 3))
    return tmp_path

@pytest.fixture
def runs(results): return tables.read_experiment(results, 'demo', 'retrieval')

def cell(table, model, group, label='NDCG@10'):
    row = next(r for r in table.rows if r[0] == model)
    return row[table.columns.index((group, label))]

# ---- reading

def test_no_torch_is_needed():
    code = 'import sys, l2rec.reporting.tables, l2rec.reporting.figures, l2rec.reporting.claims; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

def test_missing_records_name_the_make_command(tmp_path):
    with pytest.raises(tables.MissingRecords, match=r"'search'.*make reproduce PROFILE=cpu"): tables.read_experiment(tmp_path, 'cpu', 'search')

def test_a_variant_is_a_model_of_its_own(results):
    write_record(record_path(results, 'demo', 'retrieval', 'a', 'sasrec', 'wide', 0), {'test/ndcg@10': .5},
                 pl.DataFrame({'user_id': pl.Series(range(USERS), dtype=pl.Int32), 'history_length': [3] * USERS, 'target_popularity': [1.] * USERS, 'ndcg@10': [.5] * USERS}))
    found = tables.read_experiment(results, 'demo', 'retrieval')
    assert found.models() == ['popularity', 'item-knn', 'sasrec', 'sasrec+wide']
    assert ('a', 'sasrec+wide', 0) in found.records
    assert tables.missing_runs(found) == ['b/sasrec+wide/seed-0']

def test_order_is_floors_then_losses_then_names():
    assert tables.model_order(['zebra', 'sasrec', 'ease', 'sasrec+b', 'gsasrec', 'alpha', 'popularity', 'sasrec']) == [
        'popularity', 'ease', 'gsasrec', 'sasrec', 'sasrec+b', 'alpha', 'zebra']

@pytest.mark.parametrize('value, text', [(.05312, '.0531'), (0., '.0000'), (-.0031, '-.0031'), (.99999, '1.0000'), (1., '1.00'), (99.5, '99.50'), (12345.6, '12,346'),
                                         (None, '–'), (float('nan'), '–'), (float('inf'), '–')])
def test_numbers(value, text): assert tables.number(value) == text

# ---- the long table

def test_mean_std_and_seeds_by_hand(runs):
    long = tables.summarise(runs, ['test/ndcg@10', 'test/coverage@10'])
    row = long.row(by_predicate=(pl.col('dataset') == 'a') & (pl.col('model') == 'sasrec') & (pl.col('metric') == 'test/ndcg@10'), named=True)
    by_seed = [.3 + .2 + .02 * s + .01 * np.mean(np.arange(USERS) % 3) for s in (0, 1)]
    assert row['mean'] == pytest.approx(np.mean(by_seed), abs=1e-6)
    assert row['std'] == pytest.approx(.02 / np.sqrt(2), abs=1e-6)   # two values that are .02 apart
    assert row['n_seeds'] == 2 and row['ci_low'] < row['mean'] < row['ci_high']
    half = (row['ci_high'] - row['ci_low']) / 2
    values = np.linspace(.1, .5, USERS) + .01 * (np.arange(USERS) % 3)
    assert half == pytest.approx(1.96 * values.std() / np.sqrt(USERS), rel=.1)   # the normal approximation
    assert long.filter(model='popularity')['std'].is_null().all()
    assert long.filter(metric='test/coverage@10')['ci_low'].is_null().all()
    assert long.columns == ['dataset', 'model', 'metric', 'mean', 'std', 'n_seeds', 'ci_low', 'ci_high']

def test_two_files_that_disagree_are_refused(results):
    record(results, 'a', 'ease', 0, np.full(USERS, .3), **{'test/ndcg@10': .4})
    with pytest.raises(ValueError, match=r"a/ease: test/ndcg@10 is 0.4.*'ndcg@10'.*0.3"):
        tables.summarise(tables.read_experiment(results, 'demo', 'retrieval'), ['test/ndcg@10'])

def test_different_users_are_refused(results):
    record(results, 'a', 'ease', 0, np.full(USERS, .3), users=np.arange(USERS) + 1)
    with pytest.raises(ValueError, match='a: 2 users are not in both.*ease'):
        tables.against_best(tables.read_experiment(results, 'demo', 'retrieval'), 'test/ndcg@10')

# ---- marks

def test_best_second_and_plain(runs):
    table = tables.retrieval_table(runs, shown=('ndcg@10',))
    assert cell(table, 'sasrec', 'a').startswith('**') and '±' in cell(table, 'sasrec', 'a')
    assert cell(table, 'popularity', 'a').startswith('<u>.3000</u><br>[') and '±' not in cell(table, 'popularity', 'a')
    assert cell(table, 'item-knn', 'a').startswith('.2500<br>[')
    assert '†' not in ''.join(''.join(row) for row in table.rows)   # every difference is constant over the users
    assert [row[1] for row in table.rows] == ['1', '1', '2']

def test_dagger_where_the_test_cannot_tell(results):
    own = np.random.default_rng(0)
    record(results, 'a', 'ease', 0, np.linspace(.1, .5, USERS) + .215 + own.normal(0, .1, USERS))
    found = tables.read_experiment(results, 'demo', 'retrieval')
    tests = tables.against_best(found, 'test/ndcg@10').filter(dataset='a')
    loser = ({'ease', 'sasrec'} - {tests['best'][0]}).pop()
    assert tests.filter(model=loser)['p_holm'].item() >= .05 > tests.filter(model='popularity')['p_holm'].item()
    table = tables.retrieval_table(found, shown=('ndcg@10',))
    assert '†' in cell(table, loser, 'a') and '†' not in cell(table, tests['best'][0], 'a') and '†' not in cell(table, loser, 'b')

def test_equal_models_are_both_bold(tmp_path):
    for model in ('ease', 'sasrec'): record(tmp_path, 'a', model, 0, np.linspace(0, .5, USERS))
    table = tables.retrieval_table(tables.read_experiment(tmp_path, 'demo', 'retrieval'), shown=('ndcg@10',))
    assert cell(table, 'ease', 'a').startswith('**') and cell(table, 'sasrec', 'a').startswith('**')

def test_one_model_alone(tmp_path):
    record(tmp_path, 'a', 'popularity', 0, np.linspace(0, .5, USERS))
    found = tables.read_experiment(tmp_path, 'demo', 'retrieval')
    assert len(tables.retrieval_table(found).rows) == 1
    assert 'popularity has the highest NDCG@10, .2500' in tables.describe_retrieval(found)

# ---- holes in the grid

def test_a_partial_grid_is_drawn_and_said(runs):
    partial = runs.without('b', 'sasrec', seed=1).without('b', 'popularity')
    assert tables.missing_runs(partial) == ['b/popularity/seed-0', 'b/sasrec/seed-1']
    table = tables.retrieval_table(partial, shown=('ndcg@10',))
    assert cell(table, 'popularity', 'b') == '–' and '±' not in cell(table, 'sasrec', 'b')
    assert next(r for r in table.rows if r[0] == 'sasrec')[1] == '1–2'
    assert 'of 8 combinations of dataset, model and seed, 2 have no record: b/popularity, b/sasrec.' in table.markdown()
    assert 'have no record' in tables.latex(table)
    assert tables.missing_note(runs.without('b', 'sasrec'))[0].count('b/sasrec (2)') == 1
    assert tables.missing_note(runs) == []
    for by in ('history_length', 'target_popularity'): assert figures.slices_figure(partial, by)[1].filter(dataset='b')['model'].n_unique() == 2

# ---- files

def test_files_are_whole_and_the_same_bytes(runs, tmp_path):
    written = []
    for name in ('one', 'two'):
        paths = tables.write_table(tables.retrieval_table(runs), tmp_path / name)
        for i, made in enumerate((figures.slices_figure(runs, 'history_length'), figures.accuracy_time_figure(runs), figures.training_curves_figure(runs))):
            paths += figures.save_figure(*made, f'figure-{i}', tmp_path / name)
        ledger = claims.judge(tmp_path, 'demo')
        paths += claims.write_ledger(ledger, tmp_path / name, 'demo')
        written.append({p.name: p.read_bytes() for p in paths})
    assert written[0] == written[1] and len(written[0]) == 3 + 9 + 2
    assert not list((tmp_path / 'one').rglob('.partial*'))

def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'table.csv'
    path.write_text('old')
    def broken(aside):
        aside.write_text('ha')
        raise OSError(28, 'No space left on device')
    with pytest.raises(RecordError, match=r'table\.csv: not written, the disk is full'): tables.write_whole(path, broken)
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['table.csv']

def test_csv_has_the_agreed_columns(runs, tmp_path):
    csv = pl.read_csv(tables.write_table(tables.slices_table(runs), tmp_path / 't')[0])
    assert csv.columns == ['dataset', 'model', 'metric', 'mean', 'std', 'n_seeds', 'ci_low', 'ci_high']

def test_latex_escapes_and_groups(runs):
    text = tables.latex(tables.retrieval_table(runs, shown=('ndcg@10',)))
    assert r'\multicolumn{1}{c}{a} & \multicolumn{1}{c}{b}' in text and r'95 \% interval' in text and r'\textbf{' in text
    assert tables.to_latex('a_b & **.1**† ± 2') == r'a\_b \& \textbf{.1}$^\dagger$ $\pm$ 2'
    body = text[text.index(r'\midrule'):text.index(r'\bottomrule')]
    assert {line.count('&') for line in body.splitlines()[1:]} == {3}

# ---- slices, figures

def test_slices_against_a_slow_reference(runs):
    found = tables.slices(runs, 'history_length', parts=4)
    length = 3 + np.arange(USERS) % 4
    for part in found.filter(dataset='a', model='popularity').iter_rows(named=True):
        inside = np.flatnonzero(length == 3 + part['slice'])
        assert part['users'] == len(inside) == 10
        assert part['mean'] == pytest.approx(np.linspace(.1, .5, USERS)[inside].mean(), abs=1e-6)

@pytest.mark.parametrize('values', [[3] * 50, [3] * 40 + [4] * 3 + list(range(5, 12)), list(range(100)), [1, 2]])
def test_slice_edges_cover_everybody_and_split_no_tie(values):
    values = np.array(values)
    edges = tables.slice_edges(values)
    assert edges[0] == values.min() and (np.diff(edges) > 0).all() and len(edges) <= 5
    assert (np.bincount(np.searchsorted(edges, values, side='right') - 1, minlength=len(edges)) > 0).all()

def test_the_csv_holds_what_is_drawn(runs):
    figure, data = figures.accuracy_time_figure(runs)
    drawn = sorted((round(float(line.get_xdata()[0]), 6), round(float(line.get_ydata()[0]), 6)) for ax in figure.axes for line in ax.lines)
    assert drawn == sorted((round(r['seconds'], 6), round(r['mean'], 6)) for r in data.iter_rows(named=True))
    assert data.filter(dataset='a', model='sasrec')['seconds'].item() == 2   # of the faster seed

def test_training_time_is_an_epoch_of_the_fastest_seed_times_the_mean_number_of_epochs(tmp_path):
    values = np.linspace(.1, .5, USERS)
    for seed, (seconds, epochs) in enumerate([(40., 4), (90., 6), (30., 2)]): record(tmp_path, 'a', 'sasrec', seed, values, **{'time/train_seconds': seconds, 'time/epochs': epochs})
    record(tmp_path, 'a', 'ease', 0, values, **{'time/train_seconds': 3., 'time/epochs': 0})   # solved, not trained
    runs = tables.read_experiment(tmp_path, 'demo', 'retrieval')
    assert tables.training_seconds(runs).rows() == [('a', 'ease', 3., 1), ('a', 'sasrec', 40., 3)]   # 10 seconds times 4 epochs
    assert tables.training_seconds(replace(runs, metrics=runs.metrics.filter(~pl.col('metric').str.starts_with('time/')))).is_empty()

def test_training_curves_mark_the_best_epoch(runs):
    data = figures.training_curves(runs)
    assert data.filter('best')['epoch'].to_list() == [1] * 4 and set(data['model']) == {'sasrec'}
    assert 'Every run had passed its best epoch' in figures.describe_training(data)
    none = runs.without('a', 'sasrec').without('b', 'sasrec')
    with pytest.raises(ValueError, match="has a column 'validation/ndcg@10'"): figures.training_curves_figure(none)

def test_a_model_looks_the_same_in_every_figure():
    few, many = figures.model_styles(['sasrec', 'ease']), figures.model_styles(['ease', 'new', 'sasrec', 'gsasrec', 'other'])
    assert few['sasrec'] == many['sasrec'] and few['ease'] == many['ease']
    looks = [(s['color'], s['marker']) for s in figures.model_styles(list(tables.EXAMPLE_STRENGTH) + [f'm{i}' for i in range(20)]).values()]
    assert len(set(looks)) == len(looks)

@pytest.mark.parametrize('seed', range(5))
def test_labels_never_overlap(seed):
    wish = np.random.default_rng(seed).random(9) ** 3
    placed = figures.spread(wish, .08, 0., 1.)
    assert np.diff(np.sort(placed)).min() >= .08 - 1e-9 and placed.min() >= 0 and placed.max() <= 1 + 1e-9
    assert (np.argsort(placed) == np.argsort(wish)).all()

# ---- texts

def test_floors_above_a_trained_model_are_named(results):
    record(results, 'a', 'gsasrec', 0, np.linspace(.1, .5, USERS) - .02)
    found = tables.read_experiment(results, 'demo', 'retrieval')
    above = tables.floors_above(found)
    assert above.select('dataset', 'floor', 'model').rows() == [('a', 'popularity', 'gsasrec')]
    assert above['difference'].item() == pytest.approx(.02, abs=1e-6)
    assert '**gsasrec is below the floor popularity (by .0200' in tables.describe_retrieval(found)
    assert 'No floor stands above a trained model' in tables.describe_retrieval(found).splitlines()[1]

# ---- search and efficiency

def test_search_and_efficiency(tmp_path):
    tables.example_records(tmp_path, 'demo', seeds=1)
    search = tables.search_table(tables.read_experiment(tmp_path, 'demo', 'search', per_user=False))
    assert search.rows[1][:5] == ('made-up-books', 'sasrec', '.0600', '3', '310')
    assert search.long.filter(model='sasrec', metric='best/learning_rate')['mean'].item() == .001
    assert 'Every searched model had 3 trials' in tables.describe_search(search)
    write_record(record_path(tmp_path, 'demo', 'search', 'made-up-books', 'sasrec-binary'), {'validation/ndcg@10': .04, 'search/trials': 9, 'search/seconds': 60},
                 provenance={'parameters': {'best': '{"dim": 32}'}})
    unequal = tables.search_table(tables.read_experiment(tmp_path, 'demo', 'search', per_user=False))
    assert 'The budgets differ' in tables.describe_search(unequal) and len(unequal.rows) == 3
    efficiency = tables.efficiency_table(tables.read_experiment(tmp_path, 'demo', 'efficiency', per_user=False))
    assert efficiency.rows[0] == ('full-ranking', 'made-up-films', '×', '1.21', '1', 'ranking every test user / the bare matrix product and top-k')
    assert 'full-ranking on made-up-films 1.21 ×' in tables.describe_efficiency(efficiency)

def test_two_machines_have_no_mean_of_their_ratios(tmp_path):
    "A row for each, whatever seeds each of them measured; one machine's seeds are averaged."
    for seed, (device, ratio) in enumerate((('Plain', 2.), ('Plain with AMX', 4.), ('Plain', 3.))):
        write_record(record_path(tmp_path, 'demo', 'efficiency', 'made-up-films', 'sasrec', '', seed), {'ratio/step': ratio, 'seconds/step': .5 + seed, 'gflops/ceiling': 100. + seed},
                     provenance={'seed': seed, 'device': device, 'threads': 2, 'notes': {'ratio/step': f'said by {seed}'}})
    runs = tables.read_experiment(tmp_path, 'demo', 'efficiency', per_user=False)
    table = tables.efficiency_table(runs, more={'gflops': 'GFLOP/s'})
    assert [c[1] for c in table.columns] == ['measure', 'dataset', 'machine', 'unit', 'value', 'runs', 'what is divided by what']
    assert [r[:6] for r in table.rows] == [(what, 'made-up-films', f'Plain{amx}, 2 threads', unit, value, n) for what, unit, values in (('step', '×', ('4.00', '2.50')), ('step', 's', ('1.50', '1.50')), ('ceiling', 'GFLOP/s', ('101', '101')))
                                           for amx, value, n in ((' with AMX', values[0], '1'), ('', values[1], '2'))]
    assert [r[6] for r in table.rows] == ['said by 1', 'said by 0', '', '', '', '']
    assert table.long.columns == list(tables.LONG) and not table.long.select('dataset', 'model', 'metric').is_duplicated().any() and table.long['model'][0] == 'sasrec on Plain with AMX, 2 threads'
    assert tables.describe_efficiency(table) == '- **Plain with AMX, 2 threads**: step on made-up-films 4.00 ×.\n- **Plain, 2 threads**: step on made-up-films 2.50 ×.'
    only_one = tables.efficiency_table(runs.without('made-up-films', 'sasrec', 1))
    assert 'machine' not in [c[1] for c in only_one.columns] and only_one.rows[0][3:5] == ('2.50', '2') and only_one.long['model'][0] == 'sasrec'

# ---- claims

@pytest.mark.parametrize('low, high, threshold, said', [(.01, .03, 0, 'supported'), (-.03, -.01, 0, 'not supported'), (-.01, .01, 0, 'inconclusive'), (0., .02, 0, 'inconclusive'),
                                                        (-.02, 0., 0, 'not supported'), (.01, .03, .02, 'inconclusive'), (.01, .02, .02, 'not supported')])
def test_verdicts(low, high, threshold, said): assert claims.verdict(claims.Effect('d', (low + high) / 2, low, high), threshold) == said

def test_the_ledger(results):
    ledger = claims.judge(results, 'demo')
    knn = ledger.filter(claim='sasrec-over-item-knn', dataset='a').row(0, named=True)
    assert knn['verdict'] == 'supported' and knn['users'] == USERS and knn['seeds'] == '2 against 1'
    assert knn['effect'] == pytest.approx(.25 + .01 + .01 * np.mean(np.arange(USERS) % 3), abs=1e-6)
    assert knn['relative'] == pytest.approx(knn['effect'] / .25, rel=1e-5)
    absent = ledger.filter(claim='gbce-over-binary')
    assert set(absent['verdict']) == {'not testable here'} and 'no record of gsasrec and sasrec-binary' in absent['reason'][0]
    reverse = claims.Claim('reverse', 'nobody', 'The floor wins.', 'P', 'retrieval', claims.better('item-knn', 'sasrec'))
    assert set(claims.judge(results, 'demo', [reverse])['verdict']) == {'not supported'}

def test_a_ledger_without_records_says_so(tmp_path):
    ledger = claims.judge(tmp_path, 'gpu')
    assert set(ledger['verdict']) == {'not testable here'} and ledger.height == len(claims.CLAIMS)
    assert "no records of the experiment 'retrieval'" in claims.ledger_markdown(ledger, 'gpu')
