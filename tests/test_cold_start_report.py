"""Cold-start tables, figures and claims from made-up records, against numbers made by hand, a bootstrap over users, and plain loops."""
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import polars as pl
import pytest

from l2rec.reporting import claims, cold_start, tables
from l2rec.training.records import read_record, record_path, write_record

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 2

@pytest.fixture(scope='session')
def made(tmp_path_factory):
    "Records of one made-up dataset and two rankers; never changed."
    return cold_start.example_cold_start_records(tmp_path_factory.mktemp('made'), 'demo', ('made-up-films',), ('basednn', 'din'), SEEDS)

@pytest.fixture(scope='session')
def runs(made): return tables.read_experiment(made, 'demo', 'cold_start')

@pytest.fixture(scope='session')
def gains(runs): return cold_start.against_alone(runs)

@pytest.fixture
def own(made, tmp_path):
    "A copy that a test may change."
    shutil.copytree(made, tmp_path / 'own')
    return tmp_path / 'own'

def row(table, **where): return table.filter(**where).row(0, named=True)

# ---- names

def test_no_torch_is_needed():
    code = 'import sys, l2rec.reporting.cold_start; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

def test_order_and_names():
    models = ['zebra', 'dcnv2', 'basednn+zoo', 'basednn+metaemb', 'basednn+mail-base', 'basednn+mail-none', 'basednn', 'dmr+llae']
    assert cold_start.cold_order(models) == ['basednn', 'basednn+mail-none', 'basednn+mail-base', 'basednn+metaemb', 'basednn+zoo', 'dmr+llae', 'dcnv2', 'zebra']
    assert cold_start.label_of('dcnv2+llae') == 'DCNv2 + LLAE' and cold_start.label_of('dmr') == 'DMR alone' and cold_start.label_of('x+y') == 'x + y'

@pytest.mark.parametrize('model, share, dropped', [('basednn+share-20', ('basednn', 20), None), ('basednn+mail-base-share-5', ('basednn+mail-base', 5), None), ('basednn', None, None),
                                                   ('basednn+mail-base', None, None), ('din+drop-zip_code', None, ('din+mail-base', 'zip_code')),
                                                   ('din+mail-dual-drop-age', None, ('din+mail-dual', 'age')), ('din+mail-base-paired', None, None)])
def test_variants(model, share, dropped): assert (cold_start.share_of(model), cold_start.dropped_of(model)) == (share, dropped)

# ---- intervals

def slow_value(table, metric, times=None):
    "A group's GAUC or log loss by a plain loop; each user counts `times` often."
    group, measure = metric.split('/')
    top = bottom = 0.
    for i, r in enumerate(table.iter_rows(named=True)):
        value = r['auc'] if measure == 'gauc' else r['log_loss']
        if r['new'] == (group == 'new') and value is not None and np.isfinite(value):
            weight = r['n'] * (1 if times is None else times[i])
            top, bottom = top + weight * value, bottom + weight
    return top / bottom

@pytest.mark.parametrize('metric', ['new/gauc', 'old/gauc', 'new/log_loss', 'old/log_loss'])
def test_influence_of_a_mean_is_its_derivative(runs, metric):
    table = runs.per_user.filter(model='din+llae', seed=1)
    table = table.with_columns(auc=pl.when(pl.col('user_id') % 7 == 0).then(float('nan')).otherwise('auc')).head(60)
    influence, mean = cold_start.influences(table, metric)
    assert mean == pytest.approx(slow_value(table, metric), abs=1e-9)
    for u in (0, 1, 2, 3, 7, 33):
        up, down = np.ones(60), np.ones(60)
        up[u], down[u] = 1 + 1e-4, 1 - 1e-4
        assert influence[u] == pytest.approx((slow_value(table, metric, up) - slow_value(table, metric, down)) / 2e-4, abs=1e-8)

def test_gauc_interval_against_a_bootstrap_over_users(runs):
    a, b = (cold_start.seeds_of(runs, 'made-up-films', m) for m in ('din+mail-base', 'din'))
    found = row(cold_start.paired(runs, 'made-up-films', 'din+mail-base', 'din'), metric='new/gauc')
    user, rng, draws = a[0]['user_id'].to_numpy(), np.random.default_rng(0), []
    weights = [{s: np.where((t['new'] & t['auc'].is_finite()).to_numpy(), t['n'].to_numpy(), 0) for s, t in m.items()} for m in (a, b)]
    auc = [{s: np.nan_to_num(t['auc'].to_numpy()) for s, t in m.items()} for m in (a, b)]
    for _ in range(2_000):   # a user is drawn with both models and all seeds
        times = np.bincount(rng.integers(0, len(user), len(user)), minlength=len(user))
        value = [[(times * w[s] * v[s]).sum() / (times * w[s]).sum() for s in w] for w, v in zip(weights, auc)]
        draws.append(np.mean(np.subtract(*value)))
    assert found['users_high'] - found['users_low'] == pytest.approx(2 * 1.96 * np.std(draws), rel=.06)
    assert np.quantile(draws, .5) == pytest.approx(found['mean'], abs=.1 * np.std(draws))

def test_one_interval_by_hand():
    found = cold_start.over_users_and_seeds(np.array([.1, .3]), np.array([5, 7, 5, 9]), np.array([.02, -.02, .04, -.04]))
    users = ((.02 + .04) ** 2 + .02 ** 2 + .04 ** 2) / 4
    seeds = .02 / 2
    df = (users + seeds) ** 2 / (users ** 2 / 2 + seeds ** 2 / 1)
    half = cold_start.stats.t.ppf(.975, df) * np.sqrt(users + seeds)
    assert (found['mean'], found['std'], found['n_seeds']) == (pytest.approx(.2), pytest.approx(np.sqrt(.02)), 2)
    assert found['ci_low'] == pytest.approx(.2 - half) and found['ci_high'] == pytest.approx(.2 + half)
    assert found['users_high'] - .2 == pytest.approx(cold_start.stats.t.ppf(.975, 2) * np.sqrt(users))
    assert found['seeds_high'] - .2 == pytest.approx(12.706 * .1, rel=1e-4)
    assert found['p'] == pytest.approx(2 * cold_start.stats.t.sf(.2 / np.sqrt(users + seeds), df))

def test_one_seed_and_no_difference():
    one = cold_start.over_users_and_seeds(np.array([.2]), np.arange(3), np.array([.1, 0, -.1]))
    assert one['std'] is None and one['seeds_low'] is None and one['ci_low'] == one['users_low'] < .2
    none = cold_start.over_users_and_seeds(np.zeros(2), np.arange(4), np.zeros(4))
    assert none['p'] == 1 and none['ci_low'] == none['ci_high'] == 0

# ---- pairs

def test_pairs_are_joined_by_seed_and_user(runs, gains):
    found = row(gains, model='din+mail-base', metric='new/auc')
    value = {(m, s): read_record(runs.records['made-up-films', m, s].path).metrics['test/new/auc'] for m in ('din', 'din+mail-base') for s in range(SEEDS)}
    each = [value['din+mail-base', s] - value['din', s] for s in range(SEEDS)]
    assert found['mean'] == pytest.approx(np.mean(each)) and found['std'] == pytest.approx(np.std(each, ddof=1)) and found['n_seeds'] == SEEDS
    new = runs.per_user.filter(pl.col('model') == 'din', 'new')
    assert found['users'] == new['user_id'].n_unique() > new.filter(seed=0).height   # another draw in each seed
    squares = {}
    for s in range(SEEDS):
        a, b = (runs.per_user.filter(model=m, seed=s).sort('user_id') for m in ('din+mail-base', 'din'))
        for u, x, y, is_new in zip(a['user_id'], a['auc_influence'], b['auc_influence'], a['new']): squares[u] = squares.get(u, 0) + (x - y if is_new else 0) / SEEDS
    error = np.sqrt(sum(v ** 2 for v in squares.values()))
    assert found['users_high'] - found['mean'] == pytest.approx(cold_start.stats.t.ppf(.975, 299) * error, rel=1e-5)

def test_only_common_seeds_are_paired(runs):
    fewer = runs.without('made-up-films', 'din', seed=1)
    assert cold_start.paired(fewer, 'made-up-films', 'din+llae', 'din')['n_seeds'].to_list() == [1] * 6
    assert cold_start.paired(runs.without('made-up-films', 'din'), 'made-up-films', 'din+llae', 'din').is_empty()

def test_another_draw_other_users_and_disagreeing_files_are_refused(runs, own):
    flipped = replace(runs, per_user=runs.per_user.with_columns(new=pl.col('new') ^ ((pl.col('model') == 'din') & (pl.col('user_id') == 3))))
    with pytest.raises(ValueError, match=r'made-up-films, seed 0: 1 users are new in only one of din\+llae and din'): cold_start.paired(flipped, 'made-up-films', 'din+llae', 'din')
    gone = replace(runs, per_user=runs.per_user.filter((pl.col('model') != 'din') | (pl.col('user_id') != 3)))
    with pytest.raises(ValueError, match='user 3 is in din.llae but not in din'): cold_start.paired(gone, 'made-up-films', 'din+llae', 'din')
    bare = replace(runs, per_user=runs.per_user.drop('auc_influence'))
    with pytest.raises(ValueError, match="no column 'auc_influence'.*GroupClickMetrics"): cold_start.against_alone(bare)
    old = read_record(record_path(own, 'demo', 'cold_start', 'made-up-films', 'din', '', 0))
    write_record(old.path, old.metrics | {'test/new/gauc': .9}, old.per_user(), None, old.provenance)
    with pytest.raises(ValueError, match=r'din, seed 0: test/new/gauc is 0\.9.*not of one run'): cold_start.against_alone(tables.read_experiment(own, 'demo', 'cold_start'))

def test_holm_is_within_dataset_and_metric(gains):
    here = gains.filter(metric='old/auc')
    assert here.height == 16 and np.allclose(here['p_holm'], cold_start.holm(here['p']))

def test_no_new_users(own):
    "All keys of a group are absent from the records: its columns are dashes, and nothing breaks."
    for path in (own / 'demo' / 'runs' / 'cold_start').rglob('seed-*'):
        old = read_record(path)
        write_record(path, {k: v for k, v in old.metrics.items() if '/new/' not in k}, old.per_user(), None, old.provenance)
    found = tables.read_experiment(own, 'demo', 'cold_start')
    gains = cold_start.against_alone(found)
    assert set(gains['metric']) == {'old/auc', 'old/gauc', 'old/log_loss'}
    assert cold_start.cold_start_table(found, gains=gains).rows[1][4] == '–' and 'no pair' in cold_start.describe_cold_start(found, gains)
    assert set(claims.judge(own, 'demo', [c for c in cold_start.MAIL_CLAIMS if c.id == 'mail-base-din'])['reason']) == {'no seed in which both have new/auc'}

# ---- tables

def test_the_main_table(runs, gains):
    table = cold_start.cold_start_table(runs, gains=gains)
    assert [r[1:3] for r in table.rows[:3]] == [('BaseDNN', 'alone'), ('BaseDNN', 'MAIL-None'), ('BaseDNN', 'MAIL-Single')] and len(table.rows) == 18
    base = next(r for r in table.rows if r[1:3] == ('DIN', 'MAIL-Base'))
    found = row(gains, model='din+mail-base', metric='new/auc')
    assert base[4].startswith(f"**{tables.number(found['other_mean'] + found['mean'])}**") and base[4].endswith(f"<br>+{tables.number(found['mean'])} {tables.bracket(found['ci_low'], found['ci_high'])}")
    assert '<br>' not in table.rows[0][4] and '±' in table.rows[0][4]
    losses = [r for r in table.rows if r[1] == 'DIN']
    assert sum(r[6].startswith('**') for r in losses) == 1 and next(r for r in losses if r[6].startswith('**'))[6] == min((r[6] for r in losses), key=lambda c: c.strip('*'))
    old = row(gains, model='din+mail-base', metric='old/auc')
    assert ('†' in base[7]) == (old['p_holm'] >= .05)
    assert table.long.columns == list(tables.LONG) and {'test/new/auc', 'difference/old/log_loss'} <= set(table.long['metric'])
    assert all(table.numeric()[4:])   # signs included
    assert r'\multicolumn{3}{c}{new users}' in tables.latex(table)

def test_the_papers_pattern(runs, gains):
    table = cold_start.pattern_table(gains)
    assert [r[:2] for r in table.rows] == [('MAIL-None', '-.0028'), ('MAIL-Single', '-.0018'), ('MAIL-Dual', '–'), ('MAIL-Base', '+.0072')]
    said = cold_start.describe_pattern(gains)
    assert 'MAIL-None is below no tower on BaseDNN and DIN' in said and 'MAIL-Base is above no tower on BaseDNN and DIN' in said
    text = cold_start.describe_cold_start(runs, gains)
    assert 'a gain for 2 and a loss for 0 of 2 rankers' in text and 'No comparator is above MAIL-Base' in text
    weak = cold_start.describe_cold_start(runs, gains, 'mail-none')
    assert 'a gain for 0 and a loss for 2 of 2 rankers' in weak and '**Above MAIL-None for new users: ' in weak and 'BaseDNN + LLAE (by .' in weak

def test_attributes_switches_virtual_and_cost(made, runs):
    dropped = cold_start.attributes_table(runs)
    assert [(r[1], r[2]) for r in dropped.rows] == [('BaseDNN + MAIL-Base', a) for a in ('age', 'gender', 'occupation')]
    assert 'lowest without age' in cold_start.describe_attributes(dropped)
    with pytest.raises(ValueError, match='no run of cold_start has a variant of MAIL-Base'): cold_start.switches_table(runs)
    virtual = cold_start.virtual_table(runs)
    assert virtual.rows[0][3].startswith('**.60') and virtual.rows[0][6].startswith('**.50') and not virtual.rows[0][4].startswith('**')   # highest cosine, lowest error
    assert 'from the mean behaviour and +.1' in cold_start.describe_virtual(runs)
    with pytest.raises(ValueError, match="no record of cold_start has a metric 'virtual/"): cold_start.virtual_table(runs.without('made-up-films', 'basednn+mail-base').without('made-up-films', 'din+mail-base'))
    cost = cold_start.cost_table(runs)
    assert cost.rows[0][3:] == ('1.00', '20.00', '50,000')   # four epochs each; the fastest seed is the first
    by_hand = (20 + 18) / 20
    assert row(cost.long, model='din+mail-base', metric='ratio/train_seconds')['mean'] == pytest.approx(by_hand)

def test_the_best_trial_of_each_arm_and_unequal_budgets(tmp_path):
    "A log in which the ranker alone had a trial more, and one of two arms chose otherwise."
    trials = [('', .001, .70), ('', .002, .74), ('', .004, .72), ('llae', .001, .69), ('llae', .002, .71), ('mail-base', .001, .73), ('mail-base', .002, .72)]
    log = [{'trial': n, 'arm': arm, 'lr': rate, 'pool': 'mean', 'validation/auc': auc, 'validation/new/auc': 0., 'epochs': 2, 'seconds': 10.} for n, (arm, rate, auc) in enumerate(trials)]
    write_record(record_path(tmp_path, 'demo', 'cold_start_search', 'films', 'dmr'), {'search/trials': 7.}, None, log, {'seed': 0, 'parameters': {'train_users': .25}, 'wall_seconds': 240., 'threads': 2})
    search = tables.read_experiment(tmp_path, 'demo', 'cold_start_search', per_user=False)
    assert [r[2:] for r in cold_start.tuning_table(search).rows] == [('alone', '.7400', '3', '30', 'lr 0.002, pool mean'), ('LLAE', '.7100', '2', '20', 'lr 0.002, pool mean'),
                                                                     ('MAIL-Base', '.7300', '2', '20', 'lr 0.001, pool mean')]
    assert cold_start.describe_tuning(search) == '- **films**: **the budgets differ**: 2 to 3 trials, trained on 25 % of the users; 1 of 2 arms chose what their ranker alone chose.'
    assert cold_start.describe_time(search) == ('The whole experiment, 1 run (1 of cold_start_search), took 4 minutes one after another, on 2 threads each; two at a time that is 2 minutes, '
                                                'without what it takes to start them.')

# ---- figures

def test_the_csv_holds_what_is_drawn(gains):
    figure, data = cold_start.cold_start_figure(gains)
    drawn = sorted(round(float(line.get_xdata()[0]), 9) for ax in figure.axes for line in ax.lines if line.get_marker() not in ('None', '', None))
    assert drawn == sorted(round(v, 9) for v in data['mean']) and [ax.get_title('left') for ax in figure.axes] == ['made-up-films, new users', 'made-up-films, old users']
    with pytest.raises(ValueError, match='no arm can be compared'): cold_start.cold_start_figure(gains.clear())

def test_the_legend_names_every_ranker_even_one_that_the_first_panel_lacks(gains):
    some = gains.filter((pl.col('other') == 'basednn') | ((pl.col('other') == 'din') & pl.col('model').str.ends_with('+mail-base') & pl.col('metric').str.starts_with('old/')))
    figure, data = cold_start.cold_start_figure(some)
    named = {text.get_text(): handle for text, handle in zip(figure.legends[0].get_texts(), figure.legends[0].legend_handles)}
    assert list(named) == ['BaseDNN', 'DIN'] and data.filter(pl.col('model').str.starts_with('din'), metric='new/auc').is_empty()
    marks = {(line.get_color(), line.get_marker()) for ax in figure.axes for line in ax.lines if line.get_marker() not in ('None', '', None)}
    assert {(handle.get_color(), handle.get_marker()) for handle in named.values()} == marks

def test_losses_by_batch(runs):
    steps = cold_start.loss_steps(runs)
    assert steps['step'].min() == 1 and set(steps['term']) == {'attributes', 'behaviour', 'alignment', 'click log loss'}
    file = pl.read_csv(runs.records['made-up-films', 'din+mail-base', 1].path / 'steps.csv')
    total = file.select(pl.sum_horizontal(pl.col('fill/attributes', 'fill/behaviour', 'fill/alignment')))['fill/attributes']
    late = np.mean([v for s, v in zip(file['step'], total) if 81 <= s + 1 <= 100])
    assert row(cold_start.loss_falls(steps), model='din+mail-base', seed=1)['fall'] == pytest.approx(1 - late / total[0])
    short = cold_start.loss_falls(steps.filter(pl.col('step') < 60))
    assert short['fall'].is_null().all() and 'no run lasted 100 batches' in cold_start.describe_losses(steps.filter(pl.col('step') < 60))
    rising = steps.with_columns(value=pl.when(pl.col('step') > 300).then(pl.col('value') * 2).otherwise('value'))
    assert 'stands more than a tenth above' in cold_start.describe_losses(rising)
    with pytest.raises(ValueError, match='steps.csv'): cold_start.loss_curves_figure(steps.clear())

def test_hidden_codes(runs):
    codes = cold_start.hidden_codes(runs)
    assert codes.select('model', 'arm').unique(maintain_order=True).rows() == [('basednn+mail-dual', 'mail-dual'), ('basednn+mail-base', 'mail-base')]   # one ranker
    p, q = (codes.filter(arm='mail-dual', code=c).select('x', 'y').to_numpy() for c in 'pq')
    radius = np.sqrt(np.mean([np.mean(np.sum((z - z.mean(0)) ** 2, 1)) for z in (p, q)]))
    assert row(cold_start.code_distances(codes), arm='mail-dual')['distance'] == pytest.approx(np.linalg.norm(p.mean(0) - q.mean(0)) / radius)
    point = codes.with_columns(x=pl.lit(0.), y=pl.lit(0.))
    assert 'undefined, one point a cloud' in cold_start.describe_codes(point)
    with pytest.raises(ValueError, match='codes.csv'): cold_start.codes_figure(codes.clear())

def test_shares(made, runs):
    found = cold_start.share_gains(runs)
    assert found['share'].to_list() == [10, 20, 40, 60, 80] and np.allclose(found['with_arm'] - found['alone'], found['gain'])
    main = row(cold_start.paired(runs, 'made-up-films', 'basednn+mail-base', 'basednn'), metric='new/auc')
    assert row(found, share=40)['gain'] == main['mean'] and found['users'].is_sorted()
    assert 'with 10 % new users and' in cold_start.describe_shares(found)
    lonely = cold_start.share_gains(runs.without('made-up-films', 'basednn+share-20'))   # no ranker alone at 20 %
    assert lonely['share'].to_list() == [10, 40, 60, 80]

# ---- claims

def test_the_ledger(made):
    ledger = claims.judge(made, 'demo', cold_start.MAIL_CLAIMS)
    said = {r['claim']: r for r in ledger.iter_rows(named=True)}
    assert len(said) == len(cold_start.MAIL_CLAIMS) == ledger.height
    for claim in ('mail-base-basednn', 'mail-base-din', 'mail-none-worse', 'mail-alignment-helps', 'mail-losses-fall'): assert said[claim]['verdict'] == 'supported', claim
    assert said['mail-base-basednn']['seeds'] == '2 pairs' and said['mail-base-basednn']['relative'] > 0
    assert said['mail-base-dmr']['reason'] == 'no record of dmr+mail-base and dmr' and said['mail-online']['reason'].startswith('needs a running service')
    assert said['mail-base-old-level-basednn']['effect'] <= 0 and said['mail-base-old-level-basednn']['threshold'] == -cold_start.MARGIN

@pytest.mark.parametrize('low, high, level, worse', [(-.0015, .0015, 'supported', 'supported'), (.0005, .0015, 'supported', 'supported'), (.003, .005, 'not supported', 'supported'),
                                                     (-.005, -.003, 'not supported', 'not supported'), (-.001, .004, 'inconclusive', 'supported'), (-.004, .001, 'inconclusive', 'inconclusive')])
def test_level_and_not_worse(runs, monkeypatch, low, high, level, worse):
    found = pl.DataFrame([{'mean': (low + high) / 2, 'other_mean': .7, 'ci_low': low, 'ci_high': high, 'users': 9, 'n_seeds': 5}])
    monkeypatch.setattr(cold_start, 'paired', lambda *_: found)
    for expected, two_sided in ((level, True), (worse, False)):
        (effect,) = cold_start.beats('din+mail-base', 'din', 'old/auc', level=two_sided)(runs)
        assert claims.verdict(effect, -cold_start.MARGIN) == expected and effect.low <= effect.value <= effect.high

def test_nothing_was_run(tmp_path):
    assert set(claims.judge(tmp_path, 'gpu', cold_start.MAIL_CLAIMS)['verdict']) == {'not testable here'}

# ---- the report notebooks

def report(name, results, profile='demo'):
    "The executed notebook's Markdown and text outputs, as one text."
    from nbclient import NotebookClient
    notebook = nbformat.read(ROOT / 'nbs' / 'report' / f'{name}.ipynb', as_version=4)
    cell = next(c for c in notebook.cells if 'parameters' in c.metadata.get('tags', ()))
    cell.source = f'profile, results = {profile!r}, {str(results)!r}'
    NotebookClient(notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(ROOT)}}).execute()
    data = [o.get('data', {}) for c in notebook.cells if c.cell_type == 'code' for o in c.outputs]
    return '\n'.join(d.get('text/markdown', d.get('text/plain', '')) for d in data)

def test_the_reports_of_a_full_set(own):
    text = report('cold_start', own)
    assert 'Not drawn: no run is under the rule "one cut in time for everybody"' in text and text.count('Not drawn') == 4   # no switches, no counts, and so no floor either
    names = {p.name for p in (own / 'demo').glob('*/*') if p.is_file()}
    for name in ('cold-start', 'cold-start-pattern', 'cold-start-attributes', 'cold-start-virtual', 'cold-start-cost'): assert {f'{name}.{s}' for s in ('csv', 'md', 'tex')} <= names
    for name in ('cold-start-auc', 'cold-start-gauc', 'loss-curves', 'codes', 'share-curve'): assert {f'{name}.{s}' for s in ('csv', 'png', 'pdf')} <= names
    text = report('claims', own)
    assert '| mail-base-basednn | MAIL, CIKM 2021 [A] | ✓ |' in text and '| sasrec-over-item-knn | this compendium [P] | – |' in text
    assert (own / 'demo' / 'claims.csv').is_file() and 'mail-online' in (own / 'demo' / 'claims.md').read_text()

def test_the_report_of_rankers_alone_with_one_seed(own):
    runs = own / 'demo' / 'runs'
    for path in (runs / 'cold_start').glob('*/*'):
        if '+' in path.name: shutil.rmtree(path)
        else: shutil.rmtree(path / 'seed-1')
    text = report('cold_start', own)
    assert 'BaseDNN alone and DIN alone' in text and 'nothing to draw' in text and 'no pair of a ranker alone and with MAIL-Base' in text
    assert {p.name for p in (own / 'demo' / 'figures').glob('*')} == set()


def counts(runs, seeds):
    "A record of counted rates: the ranker BaseDNN's own AUC less .02 for the item, and less .02 and a growing number for all attributes."
    own = {(d, s): v for d, s, v in runs.metrics.filter(model='basednn', metric='test/new/auc').select('dataset', 'seed', 'value').rows()}
    made = [(d, 'like-rate', s, f'rate/{c}/new/{m}', v - .02 - .001 * s * (c == 'all')) for (d, s), v in own.items() if s in seeds for c in ('item', 'all') for m in ('auc', 'gauc')]
    return replace(runs, experiment='attribute_information', metrics=pl.DataFrame(made, schema=['dataset', 'model', 'seed', 'metric', 'value'], orient='row'))

def test_the_floor_of_rankers_is_paired_by_seed(runs):
    table, seeds = cold_start.floor_table(runs, counts(runs, range(SEEDS))), np.arange(SEEDS)
    for dataset in runs.datasets():
        got = row(table.long, dataset=dataset, model='basednn', metric='over-all/new/auc')
        gain = .02 + .001 * seeds
        half = 12.706204736432095 * gain.std(ddof=1) / 2 ** .5           # t of one degree of freedom
        assert got['n_seeds'] == 2 and np.allclose([got['mean'], got['ci_low'], got['ci_high']], [gain.mean(), gain.mean() - half, gain.mean() + half])
        assert abs(row(table.long, dataset=dataset, model='basednn', metric='over-item/new/auc')['mean'] - .02) < 1e-9
    assert all('BaseDNN' in line.split('above the count')[1] for line in cold_start.describe_floor(table).splitlines())

def test_a_counter_that_is_missing_leaves_a_dash_and_not_a_ranker_out(runs):
    made = counts(runs, range(SEEDS))
    table = cold_start.floor_table(runs, replace(made, metrics=made.metrics.filter(~pl.col('metric').str.starts_with('rate/all/'))))
    assert {cells[1] for cells in table.rows} == {cells[1] for cells in cold_start.floor_table(runs, made).rows}
    assert all(cells[4] == cells[7] == '–' and cells[3] != '–' for cells in table.rows)

def test_a_floor_needs_common_seeds(runs):
    one = cold_start.floor_table(runs, counts(runs, [1]))
    assert one.long['ci_low'].null_count() == one.long.height and 'no ranker differs' in cold_start.describe_floor(one)
    with pytest.raises(ValueError, match='the same seeds'): cold_start.floor_table(runs, counts(runs, []))
