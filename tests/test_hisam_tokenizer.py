"""Semantic ids, DST and the flat tokenizers: formulas against NumPy, determinism, degenerate modalities, disk and cache."""

import json
import warnings
from functools import wraps
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from l2rec.data.dataset import DataError
from l2rec.hisam.flat_tokenizers import TOKENIZERS, load_tokenizer, make_tokenizer, semantic_ids
from l2rec.hisam.tokenizer import DST, SemanticIds, code_usage, spread_levels

SMALL = {"dst": dict(size=8, width=8, hidden=16), "rq-vae": dict(size=8, width=8, hidden=16), "rq-kmeans": dict(size=8, width=8)}
SHORT = {"dst": dict(epochs=3, batch_size=32), "rq-vae": dict(epochs=3, batch_size=32), "rq-kmeans": {}}


def items(n=120, seed=0, missing=.1, widths=(10, 14), kinds=6):
    """Modalities text and image that both show a kind."""
    g = np.random.default_rng(seed)
    kind = g.integers(kinds, size=n)
    centre = np.random.default_rng(7)
    values = {m: (2 * centre.standard_normal((kinds, d))[kind] + .5 * g.standard_normal((n, d))).astype(np.float32) for m, d in zip(("text", "image"), widths)}
    lost = g.random(n)
    present = {"text": lost >= missing / 2, "image": lost < 1 - missing / 2}
    for m in values: values[m][~present[m]] = 0
    return SimpleNamespace(names=("text", "image"), values=values, present=present, sha256=f"{n} {seed} {missing} {widths}")


def rows(modalities, index):
    return SimpleNamespace(names=modalities.names, values={m: v[index] for m, v in modalities.values.items()}, present={m: v[index] for m, v in modalities.present.items()}, sha256="rows")


def trained(kind="dst", modalities=None, seed=0, **settings):
    modalities = items() if modalities is None else modalities
    tokenizer = make_tokenizer(kind, modalities, seed, **SMALL[kind] | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = tokenizer.fit(modalities, seed=seed, **SHORT[kind])
    return tokenizer, history


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("L2REC_CACHE", str(tmp_path / "cache"))


# semantic ids

def ids(**changed):
    given = dict(item_id=np.array([2, 4, 9]), codes=np.array([[0, 1], [0, 1], [1, 0]]), sizes=(2, 2), names=("shared_1", "text_1"), source="s") | changed
    return SemanticIds(**given)


def test_ids_to_disk_and_back(tmp_path):
    path = ids().write(tmp_path / "deep" / "ids.parquet")
    back = SemanticIds.read(path)
    assert back.item_id.dtype == np.int32 and back.codes.dtype == np.int64 and back.sha256 == ids().sha256
    assert (back.names, back.sizes, back.source, back.n_tokens, back.n_items) == (("shared_1", "text_1"), (2, 2), "s", 2, 3)
    assert pl.read_parquet(path).columns == ["item_id", "level_1", "level_2"] and [p.name for p in path.parent.iterdir()] == ["ids.parquet"]


def test_ids_of_a_changed_or_foreign_file_are_refused(tmp_path):
    path = ids().write(tmp_path / "ids.parquet")
    about = pl.read_parquet_metadata(path)["l2rec.semantic_ids"]
    pl.read_parquet(path).with_columns(level_1=1 - pl.col("level_1")).write_parquet(path, metadata={"l2rec.semantic_ids": about})
    with pytest.raises(DataError, match="digest"): SemanticIds.read(path)
    pl.DataFrame({"item_id": [1]}).write_parquet(path)
    with pytest.raises(DataError, match="not a file of semantic ids"): SemanticIds.read(path)
    with pytest.raises(DataError, match="not a file of semantic ids"): SemanticIds.read(tmp_path / "none.parquet")
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not a file of semantic ids"): SemanticIds.read(path)


def test_collisions_and_digest():
    assert ids().collisions() == pytest.approx(2 / 3) and ids().collisions(1) == pytest.approx(2 / 3) and ids(codes=np.array([[0, 1], [0, 0], [1, 0]])).collisions() == 0
    assert ids(source="t").sha256 == ids().sha256 != ids(item_id=np.array([2, 4, 8])).sha256 != ids(sizes=(2, 3)).sha256


def test_ids_belong_to_their_split_only():
    ids().check_belongs(SimpleNamespace(item_id=np.array([2, 4, 9], np.int32)))
    with pytest.raises(DataError, match="row 2 is item 9 there and item 8 here"): ids().check_belongs(SimpleNamespace(item_id=np.array([2, 4, 8])))
    with pytest.raises(DataError, match="3 items.*2 items"): ids().check_belongs(SimpleNamespace(item_id=np.array([2, 4])))


@pytest.mark.parametrize("changed,what", [(dict(codes=np.array([[0, 1], [0, 2], [1, 0]])), "item 4, level text_1: code 2"), (dict(codes=np.array([[0, 1], [0, -1], [1, 0]])), "code -1"),
                                          (dict(sizes=(2,)), "sizes"), (dict(names=("a", "a")), "one name"), (dict(item_id=np.array([2, 2, 9])), "item ids"), (dict(codes=np.zeros(3)), "shape")])
def test_wrong_ids(changed, what):
    with pytest.raises(DataError, match=what): ids(**changed)


# tokenizers

@pytest.mark.parametrize("kind", TOKENIZERS)
def test_same_seed_same_ids_and_the_global_state_is_left_alone(kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, history = trained(kind)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(6)
    second, again = trained(kind)
    codes = first.encode(items())
    assert (codes == second.encode(items())).all() and history.drop("seconds").equals(again.drop("seconds"))
    assert not (codes == trained(kind, seed=1)[0].encode(items())).all()
    assert codes.shape == (120, 4) and (codes >= 0).all() and (codes < first.sizes).all() and len(first.names) == len(first.sizes) == 4


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_items_are_coded_one_by_one_as_together_and_new_items_too(kind):
    tokenizer, _ = trained(kind)
    new = items(30, seed=3)
    codes = tokenizer.encode(new)
    assert (tokenizer.encode(rows(new, np.arange(7, 12))) == codes[7:12]).all() and (tokenizer.encode(rows(new, np.arange(30)[::-1])) == codes[::-1]).all()
    assert tokenizer.encode(rows(new, np.arange(0))).shape == (0, 4)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_stands_in_a_missing_row_does_not_count(kind):
    tokenizer, _ = trained(kind)
    new = items(40, seed=3, missing=.5)
    codes = tokenizer.encode(new)
    for m in new.names: new.values[m][~new.present[m]] = np.nan
    assert (tokenizer.encode(new) == codes).all()


def test_missing_modalities_have_a_code_of_their_own():
    tokenizer, _ = trained()
    new = items(60, seed=4, missing=.6)
    codes = tokenizer.encode(new)
    for column, m in ((2, "text"), (3, "image")): assert ((codes[:, column] == 8) == ~new.present[m]).all()
    for m in new.names: new.present[m][:5] = False
    assert (tokenizer.encode(new)[:5] == tokenizer.encode(new)[0]).all() and (tokenizer.encode(new)[0, 2:] == 8).all()


def numpy_network(network, x):
    first, _, last = network
    h = x @ first.weight.detach().numpy().T.astype(np.float64) + first.bias.detach().numpy()
    h = h * .5 * (1 + torch.erf(torch.from_numpy(h) / 2 ** .5).numpy())
    return h @ last.weight.detach().numpy().T.astype(np.float64) + last.bias.detach().numpy()


@pytest.mark.parametrize("residual", ["features", "sphere"])
def test_codes_follow_the_formulas(residual):
    """Consensus, shared levels, residuals and their level in float64, item by item; wherever two codewords are not all but equally near."""
    tokenizer, _ = trained(residual=residual)
    new = items(50, seed=5, missing=.4)
    codes, guess = tokenizer.encode(new), tokenizer.reconstruct(tokenizer.encode(new))
    books = lambda q: [b.detach().numpy().astype(np.float64) for b in q.codebooks]
    sure = 0
    for i in range(50):
        z = {m: numpy_network(tokenizer.project[m].layers, new.values[m][i:i + 1].astype(np.float64))[0] for m in new.names}
        z = {m: v / np.linalg.norm(v) for m, v in z.items()}
        c = sum(z[m] for m in new.names if new.present[m][i])
        left, s, clear = c / np.linalg.norm(c), 0., True
        for l, book in enumerate(books(tokenizer.shared)):
            distance = np.sort(square := ((left - book) ** 2).sum(1))
            clear &= distance[1] - distance[0] > 1e-4
            if clear: assert codes[i, l] == square.argmin()
            s, left = s + book[codes[i, l]], left - book[codes[i, l]]
        for column, m in ((2, "text"), (3, "image")):
            base, (book,) = numpy_network(tokenizer.decode[m], s[None])[0], books(tokenizer.specific[m])
            r = z[m] - s if residual == "sphere" else numpy_network(tokenizer.code[m], new.values[m][i:i + 1].astype(np.float64) - base)[0]
            distance = np.sort(square := ((r - book) ** 2).sum(1))
            if new.present[m][i] and clear and distance[1] - distance[0] > 1e-4: assert codes[i, column] == square.argmin()
            word = book[codes[i, column]] if new.present[m][i] else tokenizer.missing[m].detach().numpy()
            expected = numpy_network(tokenizer.decode[m], (s + word)[None])[0] if residual == "sphere" else base + numpy_network(tokenizer.refine[m], word[None])[0]
            assert np.allclose(guess[m][i], expected, atol=1e-4)
        sure += clear
    assert sure > 40


def test_reconstruction_makes_the_consensus_only_where_nothing_else_can():
    """With alignment, no gradient of the reconstruction reaches the projections; without it, or on the sphere, it does."""
    modalities = items(missing=0.)
    for switches, reaches in (({}, False), ({"alignment": False}, True), ({"residual": "sphere"}, True)):
        tokenizer = make_tokenizer("dst", modalities, **SMALL["dst"], noise=0., hide=0., **switches)
        parts, _ = tokenizer.losses(*tokenizer.batch(modalities, np.arange(40)), torch.Generator().manual_seed(0))
        (parts["reconstruction"] + parts.get("from_shared", 0)).backward()
        gradient = sum(p.grad.abs().sum() for p in tokenizer.project.parameters() if p.grad is not None)
        assert (gradient > 0) == reaches


def test_decoding_from_shared_levels_says_nothing_of_specific_codes():
    tokenizer, _ = trained()
    codes = tokenizer.encode(items())
    other = codes.copy()
    other[:, 2] = (other[:, 2] + 1) % 8
    image = lambda c, n=None: tokenizer.reconstruct(c, n)["image"]
    assert image(codes).equal(image(other)) and not tokenizer.reconstruct(codes)["text"].equal(tokenizer.reconstruct(other)["text"])
    assert tokenizer.reconstruct(codes, 2)["text"].equal(tokenizer.reconstruct(other, 2)["text"]) and (image(codes, 0) == 0).all()


def test_training_lowers_reconstruction_and_finds_the_kinds():
    modalities = items(300, missing=.05)
    tokenizer = make_tokenizer("dst", modalities, size=6, specific_size=4, width=8, hidden=32)
    history = tokenizer.fit(modalities, epochs=25, batch_size=64)
    assert history["reconstruction"][-1] < .7 * history["reconstruction"][0] and history["shared_1/utilisation"][-1] == 1
    assert {"alignment", "mutual_information", "commitment", "codebook", "moved", "seconds", "text_1/perplexity"} <= set(history.columns)
    code = tokenizer.encode(modalities)[:, 0]
    g = np.random.default_rng(0).integers(6, size=300)                                                 # the kinds that `items` drew
    assert sum(np.bincount(g[code == k]).max() for k in np.unique(code)) / 300 > .8


@pytest.mark.parametrize("switches,names,logged", [
    ({"parts": "shared"}, ("shared_1", "shared_2", "shared_3", "shared_4"), {"alignment"}),
    ({"levels": (3, 0)}, ("shared_1", "shared_2", "shared_3"), {"alignment"}),
    ({"parts": "specific"}, ("text_1", "text_2", "image_1", "image_2"), set()),
    ({"parts": "specific", "residual": "sphere"}, ("text_1", "text_2", "image_1", "image_2"), set()),
    ({"levels": (0, 1)}, ("text_1", "image_1"), set()),
    ({"mutual_information": False}, ("shared_1", "shared_2", "text_1", "image_1"), {"alignment"}),
    ({"alignment": False, "uniform": .1}, ("shared_1", "shared_2", "text_1", "image_1"), {"mutual_information", "uniformity"})])
def test_switches(switches, names, logged, tmp_path):
    tokenizer, history = trained(**switches)
    codes = tokenizer.encode(items())
    assert tokenizer.names == names and codes.shape == (120, len(names)) and (codes < tokenizer.sizes).all() and history["loss"].is_finite().all()
    for levels in range(len(names) + 1): assert all(v.isfinite().all() for v in tokenizer.reconstruct(codes, levels).values())
    assert logged == {"alignment", "mutual_information", "uniformity"} & set(history.columns)
    assert (load_tokenizer(tokenizer.save(tmp_path / "t"), items()).encode(items()) == codes).all()


def test_spread_levels():
    assert spread_levels("both", (2, 1), 2) == (2, [1, 1]) and spread_levels("shared", (2, 1), 2) == (4, [0, 0]) and spread_levels("specific", (3, 1), 2) == (0, [3, 2])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_one_modality(kind):
    both = items()
    text = SimpleNamespace(names=("text",), values={"text": both.values["text"]}, present={"text": both.present["text"]}, sha256="text")
    tokenizer, history = trained(kind, text)
    assert tokenizer.encode(text).shape == (120, 3) and ("alignment" not in history.columns)
    if kind == "dst": assert history["reconstruction"][-1] < history["reconstruction"][0]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_fewer_items_than_codes_and_identical_items(kind, tmp_path):
    few = items(6, missing=0.)
    tokenizer = make_tokenizer(kind, few, **SMALL[kind])
    with pytest.warns(UserWarning, match="lowered to at most 6"): tokenizer.fit(few, **SHORT[kind])
    codes = tokenizer.encode(few)
    assert (codes < tokenizer.sizes).all() and max(tokenizer.sizes) <= 7
    assert (load_tokenizer(tokenizer.save(tmp_path / "t"), few).encode(few) == codes).all()
    same = rows(items(missing=0.), np.zeros(20, int))
    tokenizer = make_tokenizer(kind, same, **SMALL[kind])
    with pytest.warns(UserWarning, match="codebook collapse"): tokenizer.fit(same, **SHORT[kind])
    assert (tokenizer.encode(same) == tokenizer.encode(same)[0]).all()


def test_a_collapsed_codebook_is_mended_in_training():
    modalities, tokenizer = items(missing=0.), make_tokenizer("rq-vae", items(), **SMALL["rq-vae"])
    tokenizer.quantizer.start = lambda vectors, generator: [b.data.fill_(50.) for b in tokenizer.quantizer.codebooks]
    history = tokenizer.fit(modalities, epochs=4, batch_size=32)
    assert history["moved"][0] > 10 and history["flat_1/utilisation"][-1] >= .75


# bad input

@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_widths_names_and_broken_values_are_refused(kind, tmp_path):
    tokenizer, _ = trained(kind)
    folder = tokenizer.save(tmp_path / "t")
    for wrong in (items(widths=(10, 15)), SimpleNamespace(names=("text",), values=items().values, present=items().present)):
        with pytest.raises(DataError, match="made for"): tokenizer.encode(wrong)
        with pytest.raises(DataError, match="made for"): load_tokenizer(folder, wrong)
    broken = items()
    broken.values["text"][np.flatnonzero(broken.present["text"])[0], 0] = np.inf
    with pytest.raises(DataError, match="modality text.*not finite"): tokenizer.fit(broken)
    with pytest.raises(DataError, match="not 'dst'|not 'rq-vae'"): (DST if kind != "dst" else TOKENIZERS["rq-vae"]).load(folder)
    with pytest.raises(DataError, match="exists"): tokenizer.save(folder)
    (folder / "tokenizer.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="damaged"): load_tokenizer(folder)
    with pytest.raises(DataError, match="no saved tokenizer"): load_tokenizer(tmp_path / "nothing")


@pytest.mark.parametrize("settings,what", [({"parts": "all"}, "parts"), ({"levels": (0, 0)}, "levels"), ({"residual": "cube"}, "residual"), ({"noise": 1.}, "noise"), ({"hide": -1.}, "hide"),
                                           ({"sizes": 3}, "did you mean 'size'")])
def test_bad_settings(settings, what):
    with pytest.raises(ValueError, match=what): make_tokenizer("dst", items(), **settings)


def test_bad_kind_and_training():
    with pytest.raises(ValueError, match="did you mean 'rq-kmeans'"): make_tokenizer("rq-kmean", items())
    with pytest.raises(ValueError, match="epochs=0"): make_tokenizer("dst", items(), **SMALL["dst"]).fit(items(), epochs=0)
    with pytest.raises(DataError, match="3 item ids.*120 items"): semantic_ids("dst", items(), np.arange(3))
    for kind, settings, what in (("dst", dict(sample=1), "dst has no setting 'sample'"), ("rq-vae", dict(temperature=1.), "rq-vae has no setting 'temperature'"), ("rq-kmeans", dict(epochs=1), "rq-kmeans has no setting 'epochs': one of levels, size, width, sample$"),
                                 ("dst", dict(epoch=1), "did you mean 'epochs'"), ("rq-vae", dict(epoch=1), "did you mean 'epochs'"), ("dst", dict(seeds=1), "has no setting 'seeds'"), ("dst", dict(modalities_=1), "has no setting")):
        with pytest.raises(ValueError, match=what): semantic_ids(kind, items(), np.arange(120), **settings)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_numbers_of_numpy_are_numbers(kind):
    given = {**SMALL[kind], **SHORT[kind]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, _, _ = semantic_ids(kind, items(), np.arange(120), **given)
        same, _, tokenizer = semantic_ids(kind, items(), np.arange(120), **{name: np.int64(value) for name, value in given.items()}, cache=False)
    assert same.source == plain.source and np.array_equal(same.codes, plain.codes)
    assert make_tokenizer("dst", items(), levels=(np.int64(1), np.int64(2)), size=np.int32(4), specific_size=np.int64(3)).sizes[0] == 4
    with pytest.raises(DataError, match="at least one modality"): DST({})


def test_a_loss_that_explodes_is_an_error():
    huge = items()
    huge.values["text"] *= 1e30
    with pytest.raises(FloatingPointError, match="lower lr"): make_tokenizer("dst", huge, **SMALL["dst"]).fit(huge, **SHORT["dst"])


def test_code_usage():
    assert code_usage(np.array([0, 0, 1, 1, 4, 5]), 4) == (.5, pytest.approx(2.)) and code_usage(np.array([], int), 4) == (0, 0) and code_usage(np.array([4]), 4) == (0, 0)


# cache

@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_come_from_the_cache_only_where_nothing_differs(kind, monkeypatch, tmp_path):
    modalities, item_id, trainings = items(), np.arange(120) * 3, []
    fit = TOKENIZERS[kind].fit
    monkeypatch.setattr(TOKENIZERS[kind], "fit", wraps(fit)(lambda *a, **k: trainings.append(1) or fit(*a, **k)))
    ask = lambda modalities=modalities, **changed: semantic_ids(kind, modalities, item_id, **SMALL[kind] | SHORT[kind] | changed)
    first, history, _ = ask()
    again, kept, tokenizer = ask()
    assert len(trainings) == 1 and again.sha256 == first.sha256 and again.source == first.source and kept.equals(history) and (tokenizer.encode(modalities) == first.codes).all()
    assert (semantic_ids(kind, modalities, item_id + 1, **SMALL[kind] | SHORT[kind])[0].item_id == item_id + 1).all() and len(trainings) == 1
    ask(seed=1), ask(size=7), ask(items(seed=1)), ask(cache=False)
    assert len(trainings) == 5
    folder, = [p for p in (tmp_path / "cache" / "tokenizers").iterdir() if first.source[:16] in p.name]
    (folder / "tokenizer.json").write_text(json.dumps({"kind": kind}))
    with pytest.warns(UserWarning, match="damaged"): mended = ask()[0]
    assert len(trainings) == 6 and mended.sha256 == first.sha256 and ask()[0].sha256 == first.sha256 and len(trainings) == 6
