"""Click-through tables, figures and claims from made-up records, against numbers made by hand, finite differences, a bootstrap over users and plain loops."""
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import polars as pl
import pytest
from scipy import stats

from l2rec.reporting import claims, click_through, tables
from l2rec.training.records import read_record, record_path, write_record

ROOT = Path(__file__).resolve().parent.parent
SEEDS, FILMS = 2, 'made-up-films'

@pytest.fixture(scope='session')
def made(tmp_path_factory):
    "Records of one made-up dataset (and the made-up world of the tokenizers); never changed."
    return click_through.example_click_records(tmp_path_factory.mktemp('made'), 'demo', (FILMS,), SEEDS)

@pytest.fixture(scope='session')
def runs(made): return tables.read_experiment(made, 'demo', 'click_through')

@pytest.fixture(scope='session')
def gains(runs): return click_through.hisam_minus(runs, click_through.main_models(runs))

@pytest.fixture(scope='session')
def tokens(made): return click_through.tokenizer_runs(made, 'demo')

@pytest.fixture
def own(made, tmp_path):
    "A copy that a test may change."
    shutil.copytree(made, tmp_path / 'own')
    return tmp_path / 'own'

def row(table, **where): return table.filter(**where).row(0, named=True)

def rewritten(path, metrics=None, per_user=None, files=None):
    "Write a record again with other metrics, users or files."
    old = read_record(path)
    write_record(path, old.metrics if metrics is None else metrics(old.metrics), old.per_user() if per_user is None else per_user(old.per_user()), None, old.provenance, files)

# ---- names

def test_no_torch_is_needed():
    code = 'import sys, l2rec.reporting.click_through; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

def test_order_and_names():
    models = ['zebra', 'hi-sam+history-200', 'hi-sam+history-25', 'hi-sam+zoo', 'semantic-mlp', 'hi-sam+item-id', 'hi-sam+rq-vae', 'hi-sam', 'din', 'hi-sam+levels-6']
    assert click_through.click_order(models) == ['hi-sam', 'hi-sam+rq-vae', 'hi-sam+item-id', 'hi-sam+levels-6', 'hi-sam+history-25', 'hi-sam+history-200', 'hi-sam+zoo', 'din', 'semantic-mlp', 'zebra']
    assert [click_through.name_of(m) for m in ('hi-sam+codes-64', 'din', 'din+shortened', 'hi-sam+zoo', 'zebra')] == ['64 codes a level', 'DIN', 'DIN + shortened', 'Hi-SAM + zoo', 'zebra']
    assert click_through.size_of('hi-sam+levels-2') == ('levels', 2) and click_through.size_of('din+levels-2') is None and click_through.size_of('hi-sam+levels') is None

@pytest.mark.parametrize('text, said', [('Alien (1979)', 'Alien (1979)'), ('Dr. Strangelove or: How I Learned to Stop Worrying and Love the Bomb (1963)', 'Dr. Strangelove or: How I… (1963)'),
                                        ('a' * 60, 'a' * 39 + '…'), ('one two three four five six seven eight nine', 'one two three four five six seven eight…')])
def test_titles_are_cut_at_words(text, said): assert click_through.shortened_title(text) == said

# ---- what a user contributes

def slow_value(table, metric, times):
    "A group's GAUC or log loss by a plain loop; user i counts `times[i]` often."
    group, _, measure = metric.rpartition('/')
    top = bottom = 0.
    for t, r in zip(times, table.iter_rows(named=True)):
        value = r['auc'] if measure == 'gauc' else r['log_loss']
        if (not group or r['cold'] == (group == 'cold')) and value is not None and np.isfinite(value): top, bottom = top + t * r['n'] * value, bottom + t * r['n']
    return top / bottom

@pytest.mark.parametrize('metric', ['gauc', 'log_loss', 'cold/gauc', 'warm/gauc', 'cold/log_loss', 'warm/log_loss'])
def test_contribution_to_a_mean_is_its_derivative(runs, metric):
    table = runs.per_user.filter(model='din', seed=1).with_columns(auc=pl.when(pl.col('user_id') % 7 == 0).then(float('nan')).otherwise('auc')).head(60)
    influence, mean, inside = click_through.contributions(table, metric)
    ones = np.ones(60)
    assert mean == pytest.approx(slow_value(table, metric, ones), abs=1e-9) and not influence[~inside].any()
    for u in (0, 1, 2, 3, 7, 33):
        step = 1e-4 * (np.arange(60) == u)
        assert influence[u] == pytest.approx((slow_value(table, metric, ones + step) - slow_value(table, metric, ones - step)) / 2e-4, abs=1e-8)

def test_contribution_to_an_auc_is_the_records_own(runs):
    table = runs.per_user.filter(model='din', seed=0).with_columns(influence_cold_items=pl.when(pl.col('user_id') < 5).then(None).otherwise('influence_cold_items'))
    cold = table['cold'].to_numpy()
    assert np.array_equal(click_through.contributions(table, 'auc')[0], table['influence'].to_numpy())
    assert np.array_equal(click_through.contributions(table, 'cold/auc')[0], np.where(cold, table['influence_group'].to_numpy(), 0))
    influence, mean, inside = click_through.contributions(table, 'cold_items/auc')
    assert mean is None and not influence[:5].any() and not inside[:5].any() and np.isfinite(influence).all()

# ---- pairs

def test_pairs_are_joined_by_seed_and_user(runs, gains):
    found = row(gains, model='din', metric='cold/auc')
    value = {(m, s): runs.records[FILMS, m, s].metrics['test/cold/auc'] for m in ('hi-sam', 'din') for s in range(SEEDS)}
    each = [value['hi-sam', s] - value['din', s] for s in range(SEEDS)]
    assert found['mean'] == pytest.approx(np.mean(each)) and found['std'] == pytest.approx(np.std(each, ddof=1)) and found['other_mean'] == pytest.approx(np.mean([value['din', s] for s in range(SEEDS)]))
    total, users = {}, set()
    for s in range(SEEDS):
        a, b = (runs.per_user.filter(model=m, seed=s).sort('user_id') for m in ('hi-sam', 'din'))
        for u, x, y, cold in zip(a['user_id'], a['influence_group'], b['influence_group'], a['cold']):
            total[u] = total.get(u, 0) + (x - y if cold else 0) / SEEDS
            if cold: users.add(u)
    error = np.sqrt(sum(v ** 2 for v in total.values()))
    assert found['users'] == len(users) and found['users_high'] - found['mean'] == pytest.approx(stats.t.ppf(.975, len(total) - 1) * error, rel=1e-5)

def test_cold_minus_warm_is_the_difference_of_both_gains(runs, gains):
    found = click_through.cold_minus_warm(runs, FILMS, 'din', 'gauc')
    cold, warm = (row(gains, model='din', metric=f'{g}/gauc') for g in ('cold', 'warm'))
    assert found['mean'] == pytest.approx(cold['mean'] - warm['mean'])
    a, b = ([t for _, t in sorted(click_through.seeds_of(runs, FILMS, m).items())] for m in ('hi-sam', 'din'))
    rng, draws, n = np.random.default_rng(0), [], a[0].height
    for _ in range(1_500):   # a user is drawn with both models and all seeds
        times, each = np.bincount(rng.integers(0, n, n), minlength=n), []
        for x, y in zip(a, b):
            w = [times * x['n'].to_numpy() * (x['cold'].to_numpy() == c) for c in (True, False)]
            each.append(np.subtract(*[(v * (x['auc'] - y['auc']).to_numpy()).sum() / v.sum() for v in w]))
        draws.append(np.mean(each))
    assert found['users_high'] - found['users_low'] == pytest.approx(2 * 1.96 * np.std(draws), rel=.08)

def test_only_common_seeds_are_paired_and_holm_is_within_dataset_and_metric(runs, gains):
    fewer = click_through.paired(runs.without(FILMS, 'din', seed=1), FILMS, 'hi-sam', 'din')
    assert set(fewer['n_seeds']) == {1} and fewer['std'].is_null().all() and (fewer['ci_low'] == fewer['users_low']).all()
    assert click_through.paired(runs.without(FILMS, 'din'), FILMS, 'hi-sam', 'din').is_empty()
    here = gains.filter(metric='warm/gauc')
    assert here.height == 6 and np.allclose(here['p_holm'], click_through.holm(here['p']))

def test_other_questions_other_users_and_disagreeing_files_are_refused(runs, own):
    def changed(**columns): return replace(runs, per_user=runs.per_user.with_columns(**columns))
    odd = (pl.col('model') == 'din') & (pl.col('user_id') == 3)
    with pytest.raises(ValueError, match=f'{FILMS}, seed 0: 1 users are cold in only one of hi-sam and din'): click_through.paired(changed(cold=pl.col('cold') ^ odd), FILMS, 'hi-sam', 'din')
    with pytest.raises(ValueError, match='1 users have another number of likes'): click_through.paired(changed(n_positive=pl.col('n_positive') + odd), FILMS, 'hi-sam', 'din')
    with pytest.raises(ValueError, match='user 3 is in hi-sam but not in din'): click_through.paired(replace(runs, per_user=runs.per_user.filter(~odd)), FILMS, 'hi-sam', 'din')
    with pytest.raises(ValueError, match="din: per_user.parquet has no column 'influence_group'.*HistoryModule"):
        click_through.paired(changed(influence_group=pl.when(pl.col('model') != 'din').then('influence_group')), FILMS, 'hi-sam', 'din')
    with pytest.raises(ValueError, match="has test/cold_items/auc, but per_user.parquet has no 'influence_cold_items'"): click_through.paired(replace(runs, per_user=runs.per_user.drop('influence_cold_items')), FILMS, 'din')
    rewritten(record_path(own, 'demo', 'click_through', FILMS, 'din', '', 0), lambda m: m | {'test/gauc': .9})
    with pytest.raises(ValueError, match=r'din, seed 0: test/gauc is 0\.9.*not of one run'): click_through.paired(tables.read_experiment(own, 'demo', 'click_through'), FILMS, 'din')

# ---- tables

def test_the_main_table(runs, gains):
    table = click_through.click_through_table(runs, gains=gains)
    assert [r[1] for r in table.rows] == ['Hi-SAM', 'id Transformer', 'DIN', 'flat-id Transformer', 'feature Transformer', 'HSTU-like', 'semantic-id MLP'] and len(table.columns) == 10
    found, din = row(gains, model='din', metric='auc'), table.rows[2]
    assert din[3].startswith(tables.number(found['other_mean'])) and f"<br>{click_through.signed(found['mean'])}" in din[3] and tables.bracket(found['ci_low'], found['ci_high']) in din[3]
    assert '<br>' not in table.rows[0][3] and table.rows[0][3].startswith('**') and all(table.numeric()[2:]) and not table.notes
    assert table.long.columns == list(tables.LONG) and {'test/cold/log_loss', 'hi-sam-minus/cold_items/auc'} <= set(table.long['metric'])
    assert r'\multicolumn{2}{c}{cold users}' in tables.latex(table)

def test_no_cold_users(own):
    "All keys of a group are absent: the columns go, a note says so, the claims cannot be tested, and nothing breaks."
    for path in (own / 'demo' / 'runs' / 'click_through').rglob('seed-*'):
        rewritten(path, lambda m: {k: v for k, v in m.items() if '/cold' not in k}, lambda t: t.with_columns(cold=pl.lit(False), influence_group='influence', influence_cold_items=pl.lit(None, pl.Float64)))
    found = tables.read_experiment(own, 'demo', 'click_through')
    # the warm group is everybody now
    for key, record in found.records.items(): record.metrics.update({f'test/warm/{m}': record.metrics[f'test/{m}'] for m in click_through.MEASURES})
    gains = click_through.hisam_minus(found, click_through.main_models(found))
    table = click_through.click_through_table(found, gains=gains)
    assert [c for c in table.columns[3:]] == [('all users', 'AUC'), ('all users', 'GAUC'), ('warm users', 'AUC'), ('warm users', 'GAUC')]
    assert f'cold users and cold items of {FILMS}' in table.notes[0]
    assert 'Cold and warm users cannot be compared' in click_through.describe_click_through(found, gains)
    assert [ax.get_title('left') for ax in click_through.gains_figure(gains)[0].axes] == ['all users', 'warm users']
    (effect,) = click_through.gains_more_when_cold('din')(found)
    assert effect.value is None and effect.reason == 'no seed in which both have cold and warm users'
    (effect,) = click_through.beats('hi-sam', 'id-transformer', 'cold_items/auc')(found)
    assert effect.reason == 'no seed in which both have cold_items/auc'

def test_the_paragraph_names_who_is_above(runs, gains):
    lower = gains.with_columns(mean=pl.when(model='din').then(-.02).otherwise('mean'), ci_low=pl.when(model='din').then(-.03).otherwise('ci_low'), ci_high=pl.when(model='din').then(-.01).otherwise('ci_high'))
    said = click_through.describe_click_through(runs, lower)
    assert '**below DIN -.0200 [-.0300, -.0100]**' in said and 'larger for cold than for warm users against' in said
    alone = click_through.within(runs, ['hi-sam'])
    assert 'No other model was run on it' in click_through.describe_click_through(alone, click_through.hisam_minus(alone, ['hi-sam']))
    assert 'no record of Hi-SAM' in click_through.describe_click_through(runs.without(FILMS, 'hi-sam'), gains.clear())

def test_shortened_histories(runs):
    short = click_through.shortened_runs(runs)
    assert click_through.main_models(short) == ['hi-sam', 'id-transformer', 'din'] and click_through.ablations(short) == []
    assert short.per_user['cold'].mean() > .5 > runs.per_user.filter(model='hi-sam')['cold'].mean()
    assert len(click_through.click_through_table(short, 'click-through-shortened').rows) == 3
    assert click_through.shortened_runs(click_through.within(runs, ['hi-sam', 'din'])) is None
    assert not any('shortened' in m for m in (*click_through.ablations(runs), *click_through.main_models(runs)))

def test_the_ablation_and_the_sizes(runs):
    table = click_through.ablation_table(runs)
    assert [r[1] for r in table.rows] == ['Hi-SAM', *click_through.PARTS.values()]
    parts = click_through.hisam_minus(runs, click_through.ablations(runs))
    said = click_through.describe_ablation(parts)
    assert 'the variant *anchor first*' in said and 'Not distinguishable from Hi-SAM: ' in said and 'no anchors (all tokens)' in said.split('Not distinguishable')[1]
    with pytest.raises(ValueError, match='no run of click_through is a variant of Hi-SAM with a part'): click_through.ablation_table(click_through.within(runs, ['hi-sam', 'din']))
    sizes = click_through.sizes_table(runs)
    assert [r[1:3] for r in sizes.rows] == [('levels', '2'), ('levels', '4 (Hi-SAM)'), ('levels', '6'), ('codes a level', '64'), ('codes a level', '64 (Hi-SAM)'), ('codes a level', '512'),
                                           ('items of history', '25'), ('items of history', '50'), ('items of history', '100 (Hi-SAM)'), ('items of history', '200')]
    unknown = replace(runs, metrics=runs.metrics.filter(~pl.col('metric').str.ends_with('utilisation')))
    assert [r[2] for r in click_through.sizes_table(unknown).rows[:3]] == ['2', '6', 'Hi-SAM']
    assert 'levels: ' in click_through.describe_sizes(sizes)
    with pytest.raises(ValueError, match='another size'): click_through.sizes_table(click_through.within(runs, ['hi-sam', 'din']))

def test_cost_and_search(made, runs):
    cost = click_through.cost_table(runs)
    seconds = [runs.records[FILMS, m, s].metrics['time/train_seconds'] for m in ('din', 'hi-sam') for s in range(SEEDS)]
    assert row(cost.long, model='din', metric='ratio/train_seconds')['mean'] == pytest.approx(min(seconds[:SEEDS]) / min(seconds[SEEDS:]))
    assert cost.rows[0][3] == '1.00' and cost.columns[-1] == ('memory', 'peak mb') and 'Cheapest: DIN' in click_through.describe_cost(cost)
    bare = replace(runs, metrics=runs.metrics.filter(~pl.col('metric').str.starts_with('time/')))
    with pytest.raises(ValueError, match='time/train_seconds'): click_through.cost_table(bare)
    search = click_through.click_search_table(tables.read_experiment(made, 'demo', 'click_search', per_user=False))
    assert search.rows[2] == (FILMS, 'DIN', '.7100', '2', '110', 'lr 0.002, dropout 0.2') and 'every search had 2 trials' in click_through.describe_click_search(search)

def test_a_search_of_several_variants_and_without_files(tmp_path):
    path = record_path(tmp_path, 'demo', 'click_search', 'x', 'hi-sam')
    write_record(path, {'validation/auc': .7}, None, None, {}, {'chosen.json': {'': {'lr': .001, 'hyperparameters': {'pool': 'mean'}}, 'rq-vae': {'lr': .002, 'hyperparameters': {}}}})
    write_record(record_path(tmp_path, 'demo', 'click_search', 'x', 'din'), {'validation/auc': .6}, None, [{'trial': 0}, {'trial': 1}, {'trial': 2}], {})
    table = click_through.click_search_table(tables.read_experiment(tmp_path, 'demo', 'click_search', per_user=False))
    assert [(r[1], r[3], r[5]) for r in table.rows] == [('Hi-SAM', '–', 'lr 0.001, pool mean'), ('flat RQ-VAE ids', '–', 'lr 0.002'), ('DIN', '3', '–')]

# ---- what the runs were given

def given(path, search=True, **parameters):
    "Write the parameters into every record of click_through under `path`; without a search, remove those of click_search."
    for folder in (path / 'demo' / 'runs' / 'click_through').glob('*/*/seed-*'):
        old = read_record(folder)
        write_record(folder, old.metrics, old.per_user(), None, {**old.provenance, 'parameters': {**old.provenance['parameters'], **parameters}}, {p.name: pl.read_csv(p) for p in folder.glob('*.csv') if p.name != 'history.csv'})
    if not search: shutil.rmtree(path / 'demo' / 'runs' / 'click_search')
    return tables.read_experiment(path, 'demo', 'click_through')

def test_shortened_users_and_models_without_a_search_are_told(own, runs):
    assert click_through.given_notes(runs, runs.models()) == [] and click_through.untuned(runs, FILMS, ['din', 'hi-sam+no-mi']) == []
    found = given(own, False, cold_share=.2, split='x, 0.2 of the users shortened to 7 (seed 0)', lr=.001, hyperparameters={'dropout': .1})
    gains = click_through.hisam_minus(found, click_through.main_models(found))
    shortened, tuned = click_through.click_through_table(found, gains=gains).notes
    assert f'on {FILMS}, 20 % of the users were made cold' in shortened and 'the newest 7 interactions at most, 6 for training and one for validation' in shortened
    assert tuned == f'**Not tuned**: on {FILMS} no search was made for any model. They ran with lr 0.001 and dropout 0.1.'
    said = click_through.describe_click_through(found, gains)
    assert 'Its histories are shortened: 20 %' in said and '**Not tuned**: no model had a search on it' in said
    assert any('Shortened' in note for note in click_through.ablation_table(found).notes) and any('Not tuned' in note for note in click_through.sizes_table(found).notes)

def test_one_model_without_a_search_stands_in_the_ledger(own):
    shutil.rmtree(own / 'demo' / 'runs' / 'click_search' / FILMS / 'din')
    found = tables.read_experiment(own, 'demo', 'click_through')
    assert click_through.untuned(found, FILMS, click_through.main_models(found)) == ['din'] and click_through.untuned(found, FILMS, ['zebra']) == []
    assert [n for n in click_through.click_through_table(found).notes] == [f'**Not tuned**: on {FILMS} no search was made for DIN.']
    (din,), (hstu,) = (click_through.beats('hi-sam', m)(found) for m in ('din', 'hstu'))
    assert din.seeds == f'{SEEDS} pairs, DIN not tuned' and hstu.seeds == f'{SEEDS} pairs' and click_through.pairs(found, FILMS, ('hi-sam',), 1) == '1 pair'
    shutil.rmtree(own / 'demo' / 'runs' / 'click_search')
    assert click_through.gains_more_when_cold('hstu')(found)[0].seeds == f'{SEEDS} pairs, not tuned'

def test_a_run_of_a_plan_is_tuned_if_it_needed_a_search_and_not_because_one_was_made_since(runs):
    def marked(model, needs): return {k: replace(r, provenance={**r.provenance, 'fingerprint': {'needs': needs}}) for k, r in runs.records.items() if k[1] == model}
    found = replace(runs, records=runs.records | marked('hstu', {}) | marked('din', {f'click_search/{FILMS}/din/seed-0': 'a digest'}) | marked('semantic-mlp', {f'search/{FILMS}/semantic-mlp/seed-0': 'a digest'}))
    assert click_through.untuned(found, FILMS, click_through.main_models(found)) == ['hstu', 'semantic-mlp']

def test_tuned_runs_take_the_bare_names_and_leave_other_data_sets_behind(runs):
    other = {('elsewhere', m, s): r for (_, m, s), r in runs.records.items() if m in ('hi-sam', 'hstu')}
    wide = replace(runs, records=runs.records | other, metrics=pl.concat([runs.metrics, runs.metrics.filter(pl.col('model').is_in(['hi-sam', 'hstu'])).with_columns(dataset=pl.lit('elsewhere', runs.metrics.schema['dataset']))]))
    best = click_through.tuned_runs(wide)
    assert best.datasets() == [FILMS] and best.models() == ['hi-sam', 'hstu'] and set(best.keys()) == {(FILMS, m, s) for m in ('hi-sam', 'hstu') for s in range(SEEDS)}
    assert click_through.paired(best, FILMS, 'hi-sam', 'hstu', ['gauc']).drop('model', 'other').equals(click_through.paired(runs, FILMS, 'hi-sam+tuned', 'hstu+tuned', ['gauc']).drop('model', 'other'))
    assert click_through.tuned_runs(best) is None and not {'hi-sam+tuned', 'hi-sam+tuned-gated-no-rope'} & set(click_through.ablations(runs))

def test_a_model_by_content_alone_stands_for_itself_and_the_others_stand_as_they_are(runs):
    how = click_through.CONTENT
    assert click_through.tuned_names(runs) == {'hi-sam': {'': 'hi-sam+tuned', how: f'hi-sam+tuned-{how}'}, 'hstu': {'': 'hstu+tuned'}} and click_through.tuned_runs(runs, 'something else') is None
    best = click_through.tuned_runs(runs, how)
    assert click_through.main_models(best) == ['hi-sam', 'hstu']
    assert click_through.paired(best, FILMS, 'hi-sam', 'hstu', ['gauc']).drop('model', 'other').equals(click_through.paired(runs, FILMS, f'hi-sam+tuned-{how}', 'hstu+tuned', ['gauc']).drop('model', 'other'))
    table = click_through.content_table(runs)
    gain = table.long.filter(metric='content-minus/streaming/gauc').row(0, named=True)
    assert len(table.rows) == 1 and gain['mean'] == pytest.approx(click_through.paired(runs, FILMS, f'hi-sam+tuned-{how}', 'hi-sam+tuned', ['gauc'])['mean'].item())
    with pytest.raises(ValueError, match='that reads by content alone'): click_through.content_table(click_through.within(runs, ['hi-sam+tuned', 'hstu+tuned']))

def test_cold_questions_are_counted_by_a_loop(runs):
    table = runs.per_user.filter(model='hi-sam', seed=0)
    before = [r['history_length'] + i for r in table.iter_rows(named=True) if r['cold'] for i in range(r['n'])]
    said = click_through.cold_questions(runs, FILMS)
    assert f"{table['cold'].sum()} of 240 users are cold, with {len(before):,} of 4,800 questions" in said
    assert f'{100 * np.mean([b < 10 for b in before]):.1f} % of these questions have fewer than ten interactions before them (median {np.median(before):.0f})' in said
    assert click_through.cold_questions(replace(runs, per_user=runs.per_user.with_columns(cold=pl.lit(False))), FILMS) == '' == click_through.cold_questions(runs, 'none')

def test_the_only_model_is_not_the_best_and_doubtful_differences_have_a_dagger(runs, gains):
    alone = click_through.within(runs, ['hi-sam'])
    assert not any('**' in cell for r in click_through.click_through_table(alone).rows for cell in r)
    said = click_through.describe_click_through(runs, gains.with_columns(p_holm=pl.when(model='din').then(.2).otherwise('p_holm')))
    assert 'DIN +' in said and re.search(r'DIN \+\.\d+† \[', said) and 'does not stand after the correction' in said and '†' not in click_through.describe_click_through(runs, gains.with_columns(p_holm=pl.lit(0.)))
    crossed = gains.with_columns((pl.when((pl.col('model') == 'din') & (pl.col('metric') == 'gauc')).then(-pl.col(c)).otherwise(c)).alias(c) for c in ('mean', 'ci_low', 'ci_high'))
    crossed = crossed.with_columns(ci_low=pl.min_horizontal('ci_low', 'ci_high'), ci_high=pl.max_horizontal('ci_low', 'ci_high'))
    assert 'above by AUC and below by GAUC in the comparison with DIN' in click_through.describe_click_through(runs, crossed)

def test_what_a_variant_changes_besides(runs):
    (note,) = click_through.ablation_table(runs).notes
    assert all(f'*{click_through.PARTS[v]}*' in note for v in ('no-alignment', 'no-anchors', 'anchor-first')) and 'by construction' in note
    assert click_through.ablation_table(click_through.within(runs, ['hi-sam', 'hi-sam+no-mi'])).notes == ()
    assert 'anchor first*' in (said := click_through.describe_ablation(click_through.hisam_minus(runs, click_through.ablations(runs)))) and '(it has a memory without any content of the items' in said
    (note,) = click_through.sizes_table(runs).notes
    assert note == '**Number and kind of levels change together**: 2 levels are 2 shared and none of one modality; 4 levels (Hi-SAM) are 2 shared and 2 of one modality; 6 levels are 2 shared and 4 of one modality.'
    assert 'said of their kind' in click_through.describe_sizes(click_through.sizes_table(runs)) and click_through.sizes_table(click_through.within(runs, ['hi-sam', 'hi-sam+codes-64'])).notes == ()

# ---- frozen histories, floors

def test_frozen_runs_are_the_same_runs_asked_otherwise(runs, own):
    still = click_through.frozen_runs(runs)
    assert still.keys() == runs.keys() and click_through.frozen_runs(still) is None
    for key in (still.keys()[0], still.keys()[-1]):
        old, new = runs.records[key].metrics, still.records[key].metrics
        assert all(new[k] == old[k.replace('test/', 'test_frozen/')] for k in new if k.startswith('test/')) and not any(k.startswith('test_frozen/') for k in new)
        assert new['time/train_seconds'] == old['time/train_seconds'] and new['test/auc'] != old['test/auc']
        table = dict(still.metrics.filter(dataset=key[0], model=key[1], seed=key[2]).select('metric', 'value').rows())
        assert table['test/gauc'] == old['test_frozen/gauc'] and not any(k.startswith('test_frozen/') for k in table)
    users = runs.per_user.filter(model='din', seed=0)
    assert still.per_user.filter(model='din', seed=0)['auc'].equals(users['frozen/auc'].alias('auc'), null_equal=True) and 'frozen/auc' not in still.per_user.columns
    rewritten(record_path(own, 'demo', 'click_through', FILMS, 'din', '', 0), lambda m: {k: v for k, v in m.items() if not k.startswith('test_frozen/')})
    some = click_through.frozen_runs(tables.read_experiment(own, 'demo', 'click_through'))
    assert (FILMS, 'din', 0) not in some.keys() and (FILMS, 'din', 1) in some.keys() and some.per_user.filter(model='din', seed=0).is_empty()

def test_what_is_said_of_frozen_histories(runs):
    still = click_through.frozen_runs(runs)
    gains = click_through.hisam_minus(still, click_through.main_models(still))
    r = row(gains, model='din', metric='gauc')
    for s in range(SEEDS): assert runs.records[FILMS, 'din', s].metrics['test_frozen/gauc'] == still.records[FILMS, 'din', s].metrics['test/gauc']
    assert r['mean'] == pytest.approx(np.mean([runs.records[FILMS, 'hi-sam', s].metrics['test_frozen/gauc'] - runs.records[FILMS, 'din', s].metrics['test_frozen/gauc'] for s in range(SEEDS)]))
    said = click_through.describe_frozen(runs, still, gains)
    mean = lambda part: tables.number(np.mean([runs.records[FILMS, 'hstu', s].metrics[f'{part}/gauc'] for s in range(SEEDS)]))
    assert f'{mean("test")} and {mean("test_frozen")} for HSTU-like' in said and 'Frozen, by GAUC Hi-SAM is above' in said
    table = click_through.click_through_table(still, 'click-through-frozen', gains, answers=click_through.FROZEN)
    assert 'no question of the test sees an answer of it' in table.caption and 'accumulate' not in table.caption
    (effect,) = click_through.frozen(click_through.beats('hi-sam', 'din', 'gauc'))(runs)
    assert effect.value == pytest.approx(r['mean'])
    (none,) = click_through.frozen(click_through.beats('hi-sam', 'din', 'gauc'))(still)
    assert none.value is None and none.reason == 'no record was asked with frozen histories'

def test_floors_stand_last_and_are_neither_tuned_nor_timed(own):
    for floor in click_through.FLOORS:
        for seed in range(SEEDS):
            shutil.copytree(record_path(own, 'demo', 'click_through', FILMS, 'din', '', seed), record_path(own, 'demo', 'click_through', FILMS, floor, '', seed))
    found = tables.read_experiment(own, 'demo', 'click_through')
    models = click_through.main_models(found)
    assert models[-len(click_through.FLOORS):] == list(click_through.FLOORS) and models[0] == 'hi-sam' and click_through.untuned(found, FILMS, models) == []
    table = click_through.click_through_table(found)
    assert [r[1] for r in table.rows[-len(click_through.FLOORS):]] == list(click_through.FLOORS.values()) and table.caption.endswith('The last rows are counted or solved, and not trained.')
    assert not set(click_through.FLOORS) & set(click_through.cost_table(found).long['model'])
    (equal,) = click_through.beats('both-rates', 'item-rate')(found)
    assert equal.value == 0.

@pytest.mark.parametrize('table_of, short, changed, without, said, part, way, measure', [
    (click_through.factors_table, 'factors', 'hi-sam+item-id-factors', 'hi-sam+item-id', 'Hi-SAM, item id added', 'test', 'streaming', 'auc'),
    (click_through.taste_table, 'taste', 'hi-sam+taste', 'hi-sam', 'Hi-SAM', 'test_frozen', 'frozen', 'gauc')])
def test_a_changed_model_against_itself_without(runs, table_of, short, changed, without, said, part, way, measure):
    table = table_of(runs)
    assert {cells[:2] for cells in table.rows} == {(d, said) for d in runs.datasets()}
    for dataset in runs.datasets():
        mean = {m: click_through.mean_of(runs, dataset, m, f'{part}/{measure}')[0] for m in (without, changed)}
        assert row(table.long, dataset=dataset, model=changed, metric=f'{short}-minus/{way}/{measure}')['mean'] == pytest.approx(mean[changed] - mean[without])

def test_longer_histories_against_the_same_start(own, runs):
    with pytest.raises(ValueError, match='no run of click_through is one that begins with factors and reads 300 items'): click_through.long_table(click_through.within(runs, ['hi-sam', 'din']))
    for seed in range(SEEDS):
        for other, variant in (('din', 'factors'), ('hstu', 'factors-300')): shutil.copytree(record_path(own, 'demo', 'click_through', FILMS, other, '', seed), record_path(own, 'demo', 'click_through', FILMS, 'din', variant, seed))
    found = tables.read_experiment(own, 'demo', 'click_through')
    table = click_through.long_table(found)
    assert [cells[1] for cells in table.rows if cells[0] == FILMS] == ['Hi-SAM, item id, begun with factors', 'DIN, factors']
    mean = {m: click_through.mean_of(found, FILMS, m, 'test/auc')[0] for m in ('din', 'hstu')}
    gain = row(table.long, dataset=FILMS, model='din+factors-300', metric='longer-minus/streaming/auc')['mean']
    assert gain == pytest.approx(mean['hstu'] - mean['din'])
    claims = {c.id: c for c in click_through.HISAM_CLAIMS}
    assert [e.value for e in claims['longer-din'].measure(found) if e.dataset == FILMS] == pytest.approx([gain])

def test_a_change_that_one_data_set_lacks(own):
    """Asked on FILMS alone; of two models one has no run without the change to subtract."""
    for seed in range(SEEDS):
        for dataset, model, variant in (('made-up-books', 'hi-sam', ''), (FILMS, 'item-rate', 'taste')):
            shutil.copytree(record_path(own, 'demo', 'click_through', FILMS, 'hstu', '', seed), record_path(own, 'demo', 'click_through', dataset, model, variant, seed))
    found = tables.read_experiment(own, 'demo', 'click_through')
    assert len(found.datasets()) == 2
    assert [cells[:2] for cells in click_through.taste_table(found).rows] == [(FILMS, 'Hi-SAM'), (FILMS, 'like rate of the item')]
    alone = click_through.taste_table(click_through.within(found, ['hstu', 'item-rate+taste']))
    assert [cells[:2] for cells in alone.rows] == [(FILMS, 'like rate of the item')] and not alone.long['metric'].str.starts_with('taste-minus').any()
    assert click_through.describe_changed(alone) == ''

def test_forgetful_training_against_itself_without(own, runs):
    with pytest.raises(ValueError, match='no run of click_through is one with forgetful training'): click_through.forget_table(click_through.within(runs, ['hi-sam', 'din']))
    for seed in range(SEEDS):
        for better, model in (('hi-sam', 'din'), ('semantic-mlp', 'hstu')):       # as if forgetting made DIN a Hi-SAM
            shutil.copytree(record_path(own, 'demo', 'click_through', FILMS, better, '', seed), record_path(own, 'demo', 'click_through', FILMS, model, 'forget', seed))
    found = tables.read_experiment(own, 'demo', 'click_through')
    found = click_through.within(found, ['din', 'hstu', 'din+forget', 'hstu+forget'])
    table = click_through.forget_table(found)
    assert [r[1] for r in table.rows] == ['DIN', 'HSTU-like'] and [h[0] for h in table.columns[3:]] == ['answers streaming'] * 3 + ['answers frozen'] * 3
    for way, part in (('streaming', 'test'), ('frozen', 'test_frozen')):
        for column in click_through.CHANGED_SHOWN:
            for better, model in (('hi-sam', 'din'), ('semantic-mlp', 'hstu')):
                mean = lambda m: np.mean([runs.records[FILMS, m, s].metrics[f'{part}/{column}'] for s in range(SEEDS)])
                assert row(table.long, model=f'{model}+forget', metric=f'forget-minus/{way}/{column}')['mean'] == pytest.approx(mean(better) - mean(model))
                assert row(table.long, model=f'{model}+forget', metric=f'test/{way}/{column}')['mean'] == pytest.approx(mean(better))
    said = click_through.describe_changed(table)
    gains = [row(table.long, model=f'{m}+forget', metric='forget-minus/frozen/gauc') for m in ('din', 'hstu')]
    low, high = (choose(g['mean'] for g in gains) for choose in (min, max))
    up, down = sum(g['ci_low'] > 0 for g in gains), sum(g['ci_high'] < 0 for g in gains)
    assert up and f'frozen GAUC from {click_through.signed(low)} to {click_through.signed(high)} (interval above zero for {up} of 2 models, below for {down})' in said
    (effect,) = click_through.frozen(click_through.beats('hstu+forget', 'hstu', 'auc'))(found)
    assert effect.value == pytest.approx(row(table.long, model='hstu+forget', metric='forget-minus/frozen/auc')['mean'])
    assert 'din+forget' not in click_through.main_models(found)

# ---- the tokenizer

def test_a_tokenizer_on_another_split_gives_way(own):
    "Where both experiments describe a tokenizer, it is that of the experiment tokenizer on the same split, that of click_through on another."
    given(own, split='shortened', cold_share=.2)
    for split, experiment in (('shortened', 'tokenizer'), ('full', 'click_through')):
        write_record(record_path(own, 'demo', 'tokenizer', FILMS, 'hi-sam', '', 0), {'tokenizer/collisions': .5}, None, None, {'seed': 0, 'parameters': {'split': split}})
        tokens = click_through.tokenizer_runs(own, 'demo')
        assert {r.path.parents[2].name for k, r in tokens.records.items() if k[:2] == (FILMS, 'hi-sam')} == {experiment}
        table = click_through.tokenizer_table(tokens)
        assert row(table.long, dataset=FILMS, model='hi-sam', metric='tokenizer/collisions')['mean'] == (.5 if experiment == 'tokenizer' else pytest.approx(.01))
        assert any(n.startswith('**Whose**') and 'on made-up-world of the experiment tokenizer: ' in n for n in table.notes) and any(f'on {FILMS}, 20 % of the users were shortened' in n for n in table.notes)

def test_collisions_that_no_tokenizer_avoids(own):
    assert not any('Twins' in n for n in click_through.tokenizer_table(click_through.tokenizer_runs(own, 'demo')).notes)
    path = record_path(own, 'demo', 'tokenizer', 'made-up-world', 'hi-sam', '', 0)
    write_record(path, read_record(path).metrics | {'tokenizer/twins': .005}, None, None, {}, {f: pl.read_csv(path / f) for f in ('codes.csv', 'tokenizer.csv')})
    tokens = click_through.tokenizer_runs(own, 'demo')
    assert any(n.endswith('so collisions cannot be fewer: .0050 on made-up-world.') for n in click_through.tokenizer_table(tokens).notes)
    films, world = click_through.describe_tokenizer(tokens).splitlines()
    assert '; 0.50 % have the very vectors of another item, and no tokenizer can tell these apart.' in world and 'very vectors' not in films

def test_the_tokenizers_of_both_experiments(made, tokens):
    assert tokens.datasets() == [FILMS, 'made-up-world'] and 'hi-sam+no-alignment' not in {m for d, m, _ in tokens.keys() if d == 'made-up-world'}
    table = click_through.tokenizer_table(tokens)
    lowest = min(np.mean([tokens.records[FILMS, 'hi-sam', s].metrics[f'tokenizer/shared_{i}/utilisation'] for s in range(SEEDS)]) for i in (1, 2))
    assert table.rows[0][:2] == (FILMS, 'DST') and table.rows[0][3].split(' ')[0] == tables.number(lowest)
    assert row(table.long, dataset=FILMS, model='hi-sam', metric='tokenizer/collisions')['mean'] == pytest.approx(.01)
    said = click_through.describe_tokenizer(tokens)
    assert 'no sign of collapse in DST (' in said and '**fewer than 90 % of the codes in use in RQ-VAE (' in said and '**2 % of the items or more collide in RQ-VAE (' in said
    with pytest.raises(tables.MissingRecords): click_through.tokenizer_runs(made, 'gpu')

def test_codes_in_use(own):
    path = record_path(own, 'demo', 'tokenizer', 'made-up-world', 'hi-sam', '', 0)
    full = pl.read_csv(path / 'codes.csv')
    write_record(path, read_record(path).metrics, None, None, {}, {'codes.csv': full.filter(pl.col('items') > 0)})   # unused codes left out
    tokens = click_through.tokenizer_runs(own, 'demo')
    use = click_through.code_use(tokens).filter(dataset='made-up-world', model='hi-sam')
    for level in full['level'].unique(): assert use.filter(level=level)['items'].to_list() == sorted(full.filter(level=level)['items'], reverse=True)
    figure, drawn = click_through.codebooks_figure(click_through.code_use(tokens))
    assert len([ax for ax in figure.axes if ax.lines]) == 6 and set(drawn['model']) == {'hi-sam', 'hi-sam+rq-vae', 'hi-sam+rq-kmeans'}
    unused = full.filter(pl.col('items') == 0).height
    assert f'DST leaves {unused} of 256 codes unused' in click_through.describe_codebooks(use) and not use['lacks'].any()
    more = pl.concat([full, pl.DataFrame({'level': ['image_1'], 'code': [64], 'items': [900]}, schema=full.schema)])   # one code more: that of items without an image
    write_record(path, read_record(path).metrics, None, None, {}, {'codes.csv': more})
    use = click_through.code_use(click_through.tokenizer_runs(own, 'demo')).filter(dataset='made-up-world', model='hi-sam')
    assert use.filter('lacks').select('level', 'place', 'items').rows() == [('image_1', 1, 900)] and 'the first code of image 1 is that of the 900 items without an image' in click_through.describe_codebooks(use)
    with pytest.raises(ValueError, match='codes.csv'): click_through.codebooks_figure(drawn.clear())

def test_training_of_the_tokenizer(tokens):
    training = click_through.tokenizer_training(tokens)
    file = pl.read_csv(tokens.records[FILMS, 'hi-sam', 1].path / 'tokenizer.csv')
    mine = training.filter(dataset=FILMS, model='hi-sam', seed=1)
    assert np.allclose(mine.filter(term='utilisation')['value'], [min(r) for r in file.select(pl.col('^.*/utilisation$')).rows()]) and np.allclose(mine.filter(term='mutual_information')['value'], file['mutual_information'])
    assert training.filter(model='hi-sam+rq-vae', term='mutual_information').is_empty()
    assert 'Without its term, the MI estimate ends at' in click_through.describe_training(training) and 'below zero' not in click_through.describe_training(training)
    lower = training.with_columns(value=pl.when((pl.col('term') == 'mutual_information') & (pl.col('epoch') < 15)).then(-.5).otherwise('value'))
    assert 'In 50 % of its epochs the MI estimate is below zero (least -0.5)' in click_through.describe_training(lower)
    with pytest.raises(ValueError, match='tokenizer.csv'): click_through.tokenizer_training_figure(training.clear())

def test_disentanglement_and_neighbours(tokens, runs):
    table = click_through.disentanglement_table(tokens)
    assert [r[2] for r in table.rows[:4]] == ['shared 1', 'shared 2', 'text 1', 'image 1'] and [c[1] for c in table.columns[4:]] == ['topic', 'theme', 'look']
    assert table.rows[2][5].startswith('<u>**') and 'DST: 4 of 4 levels tell most' in click_through.describe_disentanglement(tokens)
    (world,) = [e for e in click_through.every_run(click_through.told_apart, '')(tokens) if e.dataset == 'made-up-world']
    leads = []
    for s in range(SEEDS):
        own = {(l, f): v for l, f, v in pl.read_csv(tokens.records['made-up-world', 'hi-sam', s].path / 'disentanglement.csv').rows()}
        leads.append(min(own[l, w] - max(v for (k, f), v in own.items() if k == l and f != w) for l, w in (('shared_1', 'topic'), ('shared_2', 'topic'), ('text_1', 'theme'), ('image_1', 'look'))))
    assert (world.low, world.high) == (pytest.approx(min(leads)), pytest.approx(max(leads)))
    with pytest.raises(ValueError, match='disentanglement.csv'): click_through.disentanglement_table(runs)
    assert click_through.neighbours_table(tokens).rows[0] == (FILMS, 'Solaris (1972)', 'Stalker (1979) (3)<br>Alien (1979) (2)')
    with pytest.raises(ValueError, match='neighbours.csv'): click_through.neighbours_table(click_through.within(tokens, ['hi-sam+rq-vae']))

# ---- figures

def test_the_csv_holds_what_is_drawn(gains):
    figure, data = click_through.gains_figure(gains)
    drawn = sorted(round(float(x), 9) for ax in figure.axes for line in ax.lines if line.get_marker() not in ('None', '', None) for x in line.get_xdata())
    assert drawn == sorted(round(v, 9) for v in data['mean']) and [ax.get_title('left') for ax in figure.axes] == ['all users', 'cold users', 'warm users', 'cold items (own scale)']
    assert figure.axes[0].get_xlim() == figure.axes[2].get_xlim() != figure.axes[3].get_xlim()
    with pytest.raises(ValueError, match='no model can be compared with Hi-SAM'): click_through.gains_figure(gains.clear())

def test_attention_over_anchors(runs):
    data = click_through.anchor_attention(runs)
    assert data['seed'].unique().to_list() == [0]
    figure, drawn = click_through.attention_figure(data, users=1, most=4)
    assert drawn.height == 5 and drawn['weight'].sum() == pytest.approx(1) and drawn['rank'].to_list() == [1, 2, 3, 4, None] and drawn['title'][4] == 'all the rest'
    user = data.filter(user='100')
    said = click_through.describe_attention(user)
    assert f"most weight on *{user['title'][0]}*" in said and f"{100 * user['weight'].sum():.0f} % in all, {100 * user.filter('liked')['weight'].sum() / user['weight'].sum():.0f} % of it on the {user['liked'].sum()} liked ones" in said
    assert click_through.describe_attention(drawn).count('\n') == 0
    with pytest.raises(ValueError, match='attention.csv'): click_through.attention_figure(data.clear())

def test_feedback_in_numbers_and_no_target(own):
    path = record_path(own, 'demo', 'click_through', FILMS, 'hi-sam', '', 0)
    rewritten(path, files={'attention.csv': pl.DataFrame({'user': [7, 7], 'rank': [1, 2], 'title': ['a', 'b'], 'feedback': [1, 0], 'weight': [.75, .25]})})
    data = click_through.anchor_attention(tables.read_experiment(own, 'demo', 'click_through'))
    assert data['liked'].to_list() == [True, False] and click_through.attention_figure(data)[1].height == 2
    assert click_through.describe_attention(data) == f'- **{FILMS}**, user 7: most weight on *a* (liked, 75 %); the 2 listed items have 100 % in all, 75 % of it on the 1 liked ones. Spread evenly over a full history of 100, 2 items would have 2 %.'
    assert 'Spread' not in click_through.describe_attention(data.with_columns(max_length=pl.lit(None, pl.Int64)))

def test_latency(made):
    speed = tables.read_experiment(made, 'demo', 'attention_efficiency', per_user=False)
    curves = click_through.latency_curves(speed)
    assert {(a, u) for a, u in curves.select('axis', 'unit').rows()} == {('step', 'seconds'), ('step', 'bytes'), ('candidates', 'seconds')}   # the kept bytes do not change with the candidates
    assert set(curves.filter(axis='candidates')['series']) == {'anchors', 'all tokens'}
    said = click_through.describe_latency(curves)
    assert 'training step, memory at 300 items of history: flat 5.0 times as much as anchors; grows with the power 1.00 (anchors) and 1.00 (flat)' in said
    odd = curves.with_columns(x=pl.lit(0.), axis=pl.lit('x'))   # no logarithm, no known axis
    assert click_through.latency_figure(odd)[0].axes[0].get_yscale() == 'linear' and 'grows' not in click_through.describe_latency(odd)
    with pytest.raises(ValueError, match='curve.csv'): click_through.latency_figure(curves.clear())

# ---- claims

def test_the_ledger(made):
    ledger = claims.judge(made, 'demo', click_through.HISAM_CLAIMS)
    said = {(r['claim'], r['dataset']): r for r in ledger.iter_rows(named=True)}
    assert len({c.id for c in click_through.HISAM_CLAIMS}) == len(click_through.HISAM_CLAIMS) == ledger['claim'].n_unique()
    for claim in ('hi-sam-over-din', 'hi-sam-over-hstu-gauc', 'hi-sam-cold-items', 'hi-sam-anchor-last', 'hi-sam-no-collapse', 'hi-sam-few-collisions'):
        assert said[claim, FILMS]['verdict'] == 'supported', claim
    cold = click_through.cold_minus_warm(tables.read_experiment(made, 'demo', 'click_through'), FILMS, 'hstu')
    assert said['hi-sam-cold-hstu', FILMS]['effect'] == pytest.approx(cold['mean']) and said['hi-sam-cold-hstu', FILMS]['ci_low'] == pytest.approx(cold['ci_low'])
    assert said['hi-sam-disentangled', 'made-up-world']['verdict'] == 'supported' and said['hi-sam-disentangled', 'made-up-world']['seeds'] == f'{SEEDS} runs'
    rounds = [1 - 1 / v for v in pl.read_csv(record_path(made, 'demo', 'attention_efficiency', FILMS, 'hi-sam') / 'history.csv').filter(ratio='latency-all-tokens')['value']]
    latency = said['hi-sam-latency', FILMS]
    assert latency['effect'] == pytest.approx(np.mean(rounds)) and latency['threshold'] == .35 and latency['verdict'] == 'supported' and latency['seeds'] == '5 rounds'
    marks = {c.id: c.mark for c in click_through.HISAM_CLAIMS}
    assert {m for c, m in marks.items() if c.startswith('hi-sam-cold-')} == {'P'} and {c for c, m in marks.items() if m == 'A'} == {'hi-sam-online'}
    assert all('before the test' in c.statement for c in click_through.HISAM_CLAIMS if c.id.startswith('hi-sam-cold-') and c.id != 'hi-sam-cold-items')
    assert said['hi-sam-online', '']['reason'].startswith('needs a running service')

@pytest.mark.parametrize('use, verdict', [((.95, .9), 'supported'), ((.95, .8), 'inconclusive'), ((.85, .8), 'not supported')])
def test_a_collapse_is_a_matter_of_every_run(use, verdict):
    metrics = pl.DataFrame([{'dataset': 'x', 'model': 'hi-sam', 'seed': s, 'metric': f'tokenizer/shared_{i}/utilisation', 'value': v if i == 1 else 1.} for s, v in enumerate(use) for i in (1, 2)])
    runs = tables.Runs('demo', 'click_through', metrics, pl.DataFrame(), {})
    claim = next(c for c in click_through.HISAM_CLAIMS if c.id == 'hi-sam-no-collapse')
    (effect,) = claim.measure(runs)
    assert claims.verdict(effect, claim.threshold) == verdict and effect.seeds == '2 runs'

def test_nothing_was_run(tmp_path):
    assert set(claims.judge(tmp_path, 'gpu', click_through.HISAM_CLAIMS)['verdict']) == {'not testable here'}

# ---- the report notebook

def report(results, profile='demo'):
    "The executed notebook's Markdown and text outputs, as one text."
    from nbclient import NotebookClient
    notebook = nbformat.read(ROOT / 'nbs' / 'report' / 'click_through.ipynb', as_version=4)
    cell = next(c for c in notebook.cells if 'parameters' in c.metadata.get('tags', ()))
    cell.source = f'profile, results = {profile!r}, {str(results)!r}'
    NotebookClient(notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(ROOT)}}).execute()
    data = [o.get('data', {}) for c in notebook.cells if c.cell_type == 'code' for o in c.outputs]
    return '\n'.join(d.get('text/markdown', d.get('text/plain', '')) for d in data)

def test_the_report_of_a_full_set(own):
    text = report(own)
    assert 'Not drawn' not in text and 'Nothing of this part' not in text
    names = {p.name for p in (own / 'demo').glob('*/*') if p.is_file()}
    for name in ('click-through', 'click-through-shortened', 'click-through-tuned', 'click-through-tuned-frozen', 'click-through-content', 'click-through-tuned-content', 'click-through-tuned-content-frozen', 'click-through-ablation', 'click-through-sizes', 'tokenizer', 'disentanglement', 'code-neighbours', 'click-through-cost', 'attention-efficiency', 'click-search'):
        assert {f'{name}.{s}' for s in ('csv', 'md', 'tex')} <= names, name
    for name in ('click-through-auc', 'click-through-shortened-auc', 'click-through-ablation-auc', 'codebooks', 'tokenizer-training', 'anchor-attention', 'latency'):
        assert {f'{name}.{s}' for s in ('csv', 'png', 'pdf')} <= names, name

def test_the_report_of_two_models_with_one_seed_and_no_further_files(own):
    runs = own / 'demo' / 'runs'
    for experiment in ('tokenizer', 'attention_efficiency', 'click_search'): shutil.rmtree(runs / experiment)
    for path in (runs / 'click_through').glob('*/*'):
        if path.name not in ('hi-sam', 'din'): shutil.rmtree(path)
        else:
            shutil.rmtree(path / 'seed-1')
            rewritten(path / 'seed-0', lambda m: {k: v for k, v in m.items() if k.startswith('test/')})
    text = report(own)
    assert text.count('Not drawn') == 22 and 'By AUC it is above DIN' in text and "no run record of the experiment 'attention_efficiency'" in text and 'over users only where there is one seed' in text
    assert {p.name for p in (own / 'demo').glob('*/*') if p.is_file()} == {f'click-through.{s}' for s in ('csv', 'md', 'tex')} | {f'click-through-auc.{s}' for s in ('csv', 'png', 'pdf')}
