"""Modalities: against a slow reference in float64, and everything that real features can have wrong with them."""
import warnings
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from l2rec.baselines.factors import item_columns
from l2rec.data.dataset import DataError, Feature, make_dataset
from l2rec.data.splits import leave_last_fraction, training_counts
from l2rec.data.synthetic import SyntheticWorld, make_world
from l2rec.hisam.modalities import Modalities, Scale, fit_scale, make_modalities

N = 30


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch): monkeypatch.setenv("L2REC_CACHE", str(tmp_path / "cache"))


def made(features=None, titles=None, folder=None):
    """Ten users; item 50 + k; the last ten items occur in test only; items 45 and 46 are in the catalogue alone."""
    rows = [(user, 50 + (user * 3 + t) % 20 if t < 8 else 70 + user, t) for user in range(10) for t in range(9)]
    table = pl.DataFrame(rows, schema=["user_id", "item_id", "position"], orient="row")
    items = pl.DataFrame({"item_id": [45, 46, *range(50, 80)]}).with_columns(title=pl.Series(titles if titles is not None else [""] * 32))
    dataset = replace(make_dataset("tiny", table, items, features=features), folder=folder)
    return dataset, leave_last_fraction(dataset, validation=0, test=.1)


def vectors(width=6, items=range(45, 80), seed=0, dtype=np.float32):
    items = [item for item in items if item not in (47, 48, 49)]
    return Feature(np.random.default_rng(seed).normal(2, 3, (len(items), width)).astype(dtype), np.array(items, np.int32)[::-1].copy())


def build(dataset, split, **choice): return make_modalities(dataset, split, **{"text": "", "image": "", "progress": False, **choice})


# --- values -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_against_a_loop_in_float64(dtype):
    text, image = vectors(6, dtype=dtype), vectors(4, items=[*range(52, 60), *range(66, 80)], seed=1, dtype=dtype)
    dataset, split = made({"words": text, "image_x": image})
    found = make_modalities(dataset, split, text="words", progress=False)
    assert found.names == ("text", "image") and found.widths == {"text": 6, "image": 4} and found.n_items == N == split.n_items
    trained = training_counts(split) > 0
    assert 0 < trained.sum() < N
    for name, feature in (("text", text), ("image", image)):
        raw = {int(item): feature.values[row].astype(np.float64) for row, item in enumerate(feature.item_id)}
        used = np.array([raw[int(item)] for row, item in enumerate(split.item_id) if trained[row] and int(item) in raw])
        centre = used.mean(0)
        width = np.sqrt(((used - centre) ** 2).mean())
        for row, item in enumerate(split.item_id):
            assert found.present[name][row] == (int(item) in raw)
            np.testing.assert_allclose(found.values[name][row], (raw[int(item)] - centre) / width if int(item) in raw else 0, atol=1e-5)
        assert found.values[name].dtype == np.float32


def test_items_outside_training_do_not_set_the_scale():
    feature = vectors()
    dataset, split = made({"image": feature})
    trained = training_counts(split) > 0
    loud = np.where(np.isin(feature.item_id, split.item_id[~trained])[:, None], feature.values * 100 + 7, feature.values).astype(np.float32)
    a, b = (build(*made({"image": f}), image="image") for f in (feature, Feature(loud, feature.item_id)))
    assert np.array_equal(a.values["image"][trained], b.values["image"][trained]) and not np.array_equal(a.values["image"], b.values["image"])


def test_not_standardised_stays_as_given():
    feature = vectors()
    dataset, split = made({"image": feature})
    found = build(dataset, split, image="image", standardise=False)
    row = int(np.flatnonzero(split.item_id == 60)[0])
    assert np.array_equal(found.values["image"][row], feature.values[feature.item_id == 60][0])


def test_angles_between_centred_items_are_kept():
    raw = np.random.default_rng(0).normal(5, 1, (40, 8))
    scaled, centred = fit_scale(raw, "text")(raw), raw - raw.mean(0)
    np.testing.assert_allclose(scaled @ scaled.T / (centred @ centred.T), 1 / np.square(centred).mean(), rtol=1e-3)


# --- texts and pictures -----------------------------------------------------------------------------------------------

def test_texts_are_encoded_and_empty_ones_are_missing():
    from l2rec.data.item_vectors import encode_texts
    titles = ["" if k % 4 == 0 else f"A film about {k} dogs" for k in range(32)]
    dataset, split = made(titles=titles)
    with pytest.warns(UserWarning, match="of 30 items have none of text"): found = make_modalities(dataset, split, progress=False)
    said = dict(zip([45, 46, *range(50, 80)], titles))
    assert found.names == ("text",) and found.widths == {"text": 384}
    assert found.present["text"].tolist() == [bool(said[int(item)]) for item in split.item_id]
    raw = encode_texts([said[int(item)] + "." if said[int(item)] else "" for item in split.item_id], progress=False)
    np.testing.assert_allclose(found.values["text"], found.scales["text"](raw) * found.present["text"][:, None], atol=1e-6)


def test_pictures_of_a_folder(tmp_path):
    import torch
    from PIL import Image
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit import ViTImageProcessorPil
    torch.manual_seed(0)
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    (tmp_path / "images").mkdir()
    for item in (50, 52, 55, 71): Image.fromarray(np.random.default_rng(item).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{item}.jpg")
    dataset, split = made(folder=tmp_path)
    with pytest.warns(UserWarning, match="26 of 30 items"): found = build(dataset, split, image=tmp_path / "vit")
    assert set(split.item_id[found.present["image"]]) == {50, 52, 55, 71} and found.widths == {"image": 16}
    with pytest.raises(DataError, match="no folder of images"): build(*made(), image=tmp_path / "vit")


# --- what is missing --------------------------------------------------------------------------------------------------

def test_an_item_without_anything_is_allowed_and_counted():
    dataset, split = made({"image": vectors(items=range(52, 75))})
    with pytest.warns(UserWarning, match="7 of 30 items have none of image"): found = build(dataset, split, image="image")
    assert (~found.anything).sum() == 7 and not found.values["image"][~found.anything].any()


def test_zero_vectors_count_as_missing():
    feature = vectors()
    feature.values[3] = 0
    with pytest.warns(UserWarning, match="1 vectors of image are zero"), pytest.warns(UserWarning, match="1 of 30 items have none"): found = build(*made({"image": feature}), image="image")
    assert found.present["image"].sum() == N - 1


def test_nothing_known_of_any_item_is_an_error():
    with pytest.raises(DataError, match="nothing is known of any item"): build(*made())
    with pytest.warns(UserWarning, match="no item of the split has it"), pytest.raises(DataError, match="nothing is known of any item"): make_modalities(*made(), progress=False)
    with pytest.raises(DataError, match="no item of training has it"): build(*made({"image": vectors(items=range(70, 80))}), image="image")


def test_a_modality_that_nobody_has_is_left_out():
    with pytest.warns(UserWarning, match="modality text: no item"): found = make_modalities(*made({"image": vectors()}), progress=False)
    assert found.names == ("image",)


# --- features with faults ---------------------------------------------------------------------------------------------

def test_constant_columns_are_dropped_and_all_constant_is_an_error():
    feature = vectors()
    feature.values[:, 2] = 5
    with pytest.warns(UserWarning, match="1 of 6 columns"): found = build(*made({"image": feature}), image="image")
    assert found.widths == {"image": 5} and found.scales["image"].columns.tolist() == [0, 1, 3, 4, 5]
    with pytest.raises(DataError, match="all 6 columns are the same"): build(*made({"image": Feature(np.ones_like(feature.values), feature.item_id)}), image="image")


def test_features_that_break_the_rules():
    dataset, split = made({"image": vectors()})
    bad = lambda feature: build(replace(dataset, features={"image": feature}), split, image="image")
    feature = vectors()
    nan = feature.values.copy()
    nan[4, 1] = np.nan
    with pytest.raises(DataError, match="NaN or infinity"): bad(Feature(nan, feature.item_id))
    with pytest.raises(DataError, match="vectors of different widths"): bad(Feature([[1., 2.], [1.]], np.int32([50, 51])))
    with pytest.raises(DataError, match="must be float16 or float32"): bad(Feature(np.array([np.ones(2), np.ones(3)], dtype=object), np.int32([50, 51])))
    with pytest.raises(DataError, match="has a row already"): bad(Feature(feature.values, np.full_like(feature.item_id, 50)))


def test_names_of_features():
    dataset, split = made({"image_a": vectors(), "image_b": vectors(seed=1), "sound": vectors(seed=2)})
    with pytest.raises(DataError, match="several features of images"): make_modalities(dataset, split, text="", progress=False)
    with pytest.raises(DataError, match="Did you mean image_a[?]"): build(dataset, split, image="imag_a")
    assert build(dataset, split, image="sound").names == ("image",)
    with pytest.warns(UserWarning):  # no text, and the one feature is not one of images
        with pytest.raises(DataError, match="nothing is known"): make_modalities(*made({"sound": vectors()}), progress=False)


# --- the form ---------------------------------------------------------------------------------------------------------

def two():
    rng = np.random.default_rng(0)
    present = {"text": rng.random(8) < .7, "image": rng.random(8) < .7}
    return {m: rng.standard_normal((8, d)).astype(np.float32) * present[m][:, None] for m, d in (("text", 4), ("image", 3))}, present


def test_rows_and_digest():
    values, present = two()
    whole = Modalities(("text", "image"), values, present)
    assert whole.rows(np.arange(8)).sha256 == whole.sha256 == Modalities(("text", "image"), two()[0], present).sha256
    assert np.array_equal(whole.rows([5, 1, 5]).values["image"], values["image"][[5, 1, 5]]) and whole.rows(present["text"]).n_items == present["text"].sum()
    assert whole.rows([]).n_items == 0
    changed = {name: x.copy() for name, x in values.items()}
    changed["image"][int(np.flatnonzero(present["image"])[0]), 0] += 1e-6
    others = [Modalities(("image", "text"), values, present), Modalities(("text", "image"), changed, present), Modalities(("text",), values, present), whole.rows([1, 0, *range(2, 8)]),
              Modalities(("text", "image"), {**values, "image": np.zeros((8, 3), np.float32)}, present), Modalities(("text", "image"), {**values, "image": np.zeros((8, 3), np.float32)}, {**present, "image": np.zeros(8, bool)})]
    assert len({whole.sha256, *(other.sha256 for other in others)}) == 7
    for wrong in ([8], [-1]):
        with pytest.raises(IndexError, match="0 to 7"): whole.rows(wrong)


@pytest.mark.parametrize("change, message", [
    (lambda v, p: v.update(image=v["image"][:5]), "present is bool"), (lambda v, p: (v.update(image=v["image"][:5]), p.update(image=p["image"][:5])), "5 rows, and modality text has 8"),
    (lambda v, p: v.update(image=v["image"].astype(float)), "must be float32"), (lambda v, p: v.update(image=v["image"][0]), "must be float32"), (lambda v, p: p.update(image=p["image"].astype(int)), "must be bool"),
    (lambda v, p: v["text"].__setitem__((slice(None), 0), np.nan), "row 0: the vector holds NaN"), (lambda v, p: v["text"].__iadd__(1), "marked absent"), (lambda v, p: v.pop("text"), "values and present")])
def test_parts_that_do_not_fit(change, message):
    values, present = two()
    assert not present["text"].all()
    change(values, present)
    with pytest.raises(DataError, match=message): Modalities(("text", "image"), values, present)


def test_no_modality():
    with pytest.raises(DataError, match="there is none"): Modalities((), {}, {})


def test_further_items_pass_through_the_same_scale():
    text, image = vectors(6), vectors(4, seed=1)
    text.values[:, 0] = 1
    dataset, split = made({"words": text, "image": image})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = make_modalities(dataset, split, text="words", progress=False)
    pick = [int(np.flatnonzero(text.item_id == item)[0]) for item in split.item_id]
    again = found.further({"text": text.values[pick], "image": image.values[pick]})
    assert again.sha256 == found.sha256
    half = found.further({"image": np.stack([image.values[0], np.zeros(4, np.float32)])})
    assert half.present["image"].tolist() == [True, False] and not half.present["text"].any() and half.values["text"].shape == (2, 5)
    with pytest.raises(DataError, match="modality sound: unknown"): found.further({"sound": image.values})
    with pytest.raises(DataError, match="at least 6 columns"): found.further({"text": text.values[:, :3]})
    with pytest.raises(DataError, match="no vectors are given"): found.further({})
    with pytest.raises(DataError, match="vectors are 5 wide"): Modalities(("text",), {"text": np.ones((1, 4), np.float32)}, {"text": np.array([True])}).further({"text": np.ones((2, 5), np.float32)})


def test_scale_needs_items():
    with pytest.raises(DataError, match="no item of training"): fit_scale(np.zeros((0, 3)), "text")
    assert isinstance(fit_scale(np.float32([[0, 1], [1, 0]]), "text"), Scale)


def test_twins_are_items_with_the_very_vectors_of_another():
    rng = np.random.default_rng(0)
    text, image = rng.standard_normal((6, 3)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float32)
    text[3], image[3] = text[1], image[1]                        # twins
    text[4] = text[0]                                            # one modality alone is not enough
    image[5] = 0.
    has_image = np.array([1, 1, 1, 1, 1, 0], bool)
    items = Modalities(("text", "image"), {"text": text, "image": image}, {"text": np.ones(6, bool), "image": has_image})
    assert items.twins.tolist() == [False, True, False, True, False, False]
    assert not items.rows(np.array([0, 1, 2])).twins.any() and items.rows(np.array([], int)).twins.shape == (0,)
    image[2] = 0.                                                # a vector of zeros is no missing vector
    text[2] = text[5]
    assert not Modalities(("text", "image"), {"text": text, "image": image}, {"text": np.ones(6, bool), "image": has_image}).twins[[2, 5]].any()


# --- taste ------------------------------------------------------------------------------------------------------------

def test_taste_is_the_item_side_of_the_factors():
    world = make_world(SyntheticWorld(n_users=80, n_items=300, mean_length=15, max_length=20))
    split = leave_last_fraction(world.dataset)
    without, found = (build(world.dataset, split, image=None, taste=taste) for taste in ("", "factors"))
    trained = training_counts(split) > 0
    assert without.names == ("image",) and found.names == ("image", "taste") and not trained.all()
    np.testing.assert_array_equal(found.values["image"], without.values["image"])
    np.testing.assert_array_equal(found.present["taste"], trained)
    columns = item_columns(split)[trained]
    columns = columns - columns.mean(0)
    np.testing.assert_allclose(found.values["taste"][trained], columns / np.sqrt((columns ** 2).mean()), atol=1e-5)
    assert not found.values["taste"][~trained].any()


def test_taste_sees_no_answer_after_the_cut():
    world = make_world(SyntheticWorld(n_users=80, n_items=120, mean_length=15, max_length=20))
    split = leave_last_fraction(world.dataset)
    later = np.arange(len(split.items)) >= np.repeat(split.train_end, np.diff(split.offsets))
    other = replace(split, rating=np.where(later, 6 - split.rating, split.rating))
    one, two = (build(world.dataset, s, image=None, taste="factors") for s in (split, other))
    assert later.any() and one.sha256 == two.sha256


def test_taste_that_cannot_be():
    dataset, split = made({"image": vectors()})
    with pytest.raises(ValueError, match="taste='factor': 'factors', or '' for none"): build(dataset, split, image=None, taste="factor")
    with pytest.raises(ValueError, match="rating"): build(dataset, split, image=None, taste="factors")
