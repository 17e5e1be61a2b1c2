"""Item vectors: texts of items, the two ways of reading them (slowly, one by one, in float64; fast), and the cache by content."""
import json
import warnings

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from l2rec.data import item_vectors as iv
from l2rec.data.dataset import DataError
from l2rec.data.item_vectors import MINILM, cache_home, cached_vectors, encode_images, encode_texts, encoder_folder, encoder_sha256, held_vectors, item_texts, keep_vectors, pool_tokens, token_batches, vector_folder

TEXTS = ["A cowboy doll is jealous of a space toy.", "Ants.", "", "A secret agent stops a satellite weapon from falling into the wrong hands, and then another, and another after that.", "Ants.", "  \n"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("L2REC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch):
    """How many texts or pictures each call really encodes."""
    counts = []
    for name in ("_encode_texts", "_encode_images"):
        real = getattr(iv, name)
        monkeypatch.setattr(iv, name, lambda inputs, positions, *rest, real=real: (counts.append(len(positions)), real(inputs, positions, *rest))[1])
    return counts


@pytest.fixture(scope="session")
def causal(tmp_path_factory):
    """A tiny causal language model whose tokenizer has neither a padding nor an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt"
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate("<unk> a b c d e f g".split())}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit import ViTImageProcessorPil
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    torch.manual_seed(0)
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def picture(path, seed, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, channels), dtype=np.uint8).squeeze()).save(path)
    return path


# --- texts of items ---------------------------------------------------------------------------------------------------

def test_item_texts_in_order_without_blanks_and_repeats():
    items = pl.DataFrame({"item_id": [1, 2, 3, 4], "title": ["Alien", "Shoe  GOO", None, "Why?"], "categories": [["Horror", "", "SF"], [], None, []],
                          "brand": ["Scott", None, "", None], "text": ["A crew is\n hunted!", "shoe  goo, 3 oz", "", "Because"]})
    assert item_texts(items) == ["Alien. Horror, SF. Scott. A crew is hunted!", "shoe goo, 3 oz.", "", "Why? Because."]
    assert item_texts(items.select("title")) == ["Alien.", "Shoe GOO.", "", "Why?"]
    with pytest.raises(DataError, match="title, categories, brand, text"): item_texts(pl.DataFrame({"item_id": [1]}))


# --- encoding texts ---------------------------------------------------------------------------------------------------

def slowly(folder, texts, max_tokens, pooling, normalise):
    """Each text by itself, without padding, in float64."""
    from transformers import AutoModel, AutoTokenizer
    model, tokenizer, rows = AutoModel.from_pretrained(folder).double().eval(), AutoTokenizer.from_pretrained(folder), []
    for text in texts:
        if not text.strip():
            rows.append(np.zeros(model.config.hidden_size))
            continue
        with torch.inference_mode(): hidden = model(torch.tensor([tokenizer(text)["input_ids"][:max_tokens]])).last_hidden_state[0].numpy()
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        rows.append(vector / np.linalg.norm(vector) if normalise else vector)
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalise", [True, False])
def test_causal_model_without_padding_token_against_one_by_one(causal, pooling, normalise):
    texts = ["a b c d e f g", "b", "g f e", "", "unknown words a", "a " * 40]
    found = encode_texts(texts, causal, max_tokens=7, pooling=pooling, batch_tokens=16, progress=False, normalise=normalise)
    assert found.dtype == np.float32 and found.shape == (6, 16)
    np.testing.assert_allclose(found, slowly(causal, texts, 7, pooling, normalise), atol=1e-5)


def test_default_encoder_against_its_authors_library():
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(encoder_folder(MINILM)), device="cpu")
    model.max_seq_length = 128
    found = encode_texts(TEXTS, progress=False)
    wanted = model.encode(TEXTS, show_progress_bar=False)
    said = [at for at, text in enumerate(TEXTS) if text.strip()]
    np.testing.assert_allclose(found[said], wanted[said], atol=1e-5)
    assert not found[[2, 5]].any()


def test_max_tokens_cuts_the_end(causal):
    same = encode_texts(["a b c d", "a b e f"], causal, max_tokens=2, progress=False)
    assert np.array_equal(same[0], same[1])
    other = encode_texts(["a b c d", "a b e f"], causal, max_tokens=3, progress=False)
    assert np.abs(other[0] - other[1]).max() > 1e-3


def test_budget_of_a_batch_changes_nothing(causal, tmp_path, monkeypatch):
    texts = [" ".join(np.random.default_rng(k).choice(list("abcdefg"), 1 + k % 9)) for k in range(60)]
    one = encode_texts(texts, causal, max_tokens=16, batch_tokens=1, progress=False)
    monkeypatch.setenv("L2REC_CACHE", str(tmp_path / "other"))
    np.testing.assert_allclose(one, encode_texts(texts, causal, max_tokens=16, batch_tokens=1000, progress=False), atol=1e-6)


def test_no_texts_and_only_blank_ones_have_the_width():
    assert encode_texts([], progress=False).shape == (0, 384)
    blank = encode_texts(["", " "], progress=False)
    assert blank.shape == (2, 384) and not blank.any()


def test_pool_tokens_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    hidden, lengths = torch.randn(5, 7, 3, generator=generator), [7, 1, 3, 2, 6]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    for pooling, take in (("mean", lambda h: h.mean(0)), ("cls", lambda h: h[0]), ("last", lambda h: h[-1])):
        wanted = torch.stack([take(hidden[k, :n].double()) for k, n in enumerate(lengths)])
        assert torch.allclose(pool_tokens(hidden, mask, pooling).double(), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="one of mean, cls, last"): pool_tokens(hidden, mask, "max")


def test_token_batches_hold_every_text_once_within_the_budget():
    lengths = np.random.default_rng(1).integers(1, 60, 300).tolist() + [500]
    batches = list(token_batches(lengths, 128))
    assert sorted(at for batch in batches for at in batch) == list(range(301)) and batches[0] == [300]
    assert all(len(batch) * max(lengths[at] for at in batch) <= 128 for batch in batches[1:])
    assert list(token_batches([], 10)) == []
    with pytest.raises(ValueError, match="batch_tokens=0"): list(token_batches([1], 0))


# --- the cache --------------------------------------------------------------------------------------------------------

def test_only_new_texts_are_encoded_each_once_and_order_does_not_matter(causal, counted):
    first = encode_texts(["a b", "c", "a b", ""], causal, max_tokens=8, progress=False)
    again = encode_texts(["c", "d", "", "a b"], causal, max_tokens=8, progress=False)
    assert counted == [2, 1]
    assert np.array_equal(first[0], first[2]) and np.array_equal(again[[3, 0]], first[:2])
    encode_texts(["a b", "c", "d"], causal, max_tokens=8, progress=False)
    assert counted == [2, 1]


def test_settings_and_weights_are_part_of_the_key(causal, counted, tmp_path):
    import shutil
    for settings in ({}, {"max_tokens": 9}, {"pooling": "last"}, {"normalise": False}): encode_texts(["a b"], causal, **{"max_tokens": 8, "progress": False, **settings})
    assert counted == [1] * 4
    shutil.copytree(causal, tmp_path / "elsewhere" / causal.name)
    encode_texts(["a b"], tmp_path / "elsewhere" / causal.name, max_tokens=8, progress=False)
    assert counted == [1] * 4  # the same content under another path
    from safetensors.torch import load_file, save_file
    weights = tmp_path / "elsewhere" / causal.name / "model.safetensors"
    state = load_file(weights)
    save_file({name: value + .1 for name, value in state.items()}, weights, metadata={"format": "pt"})
    before, after = (encode_texts(["a b"], place, max_tokens=8, progress=False) for place in (causal, tmp_path / "elsewhere" / causal.name))
    assert counted == [1] * 5 and np.abs(before - after).max() > 1e-3
    assert encoder_sha256(causal) != encoder_sha256(tmp_path / "elsewhere" / causal.name)


def test_the_code_that_made_a_vector_is_part_of_its_key(causal, vit, counted, tmp_path, monkeypatch, home):
    def both(): encode_texts(["a b"], causal, max_tokens=8, progress=False), encode_images([picture(tmp_path / "one.png", 0)], vit, progress=False)
    both(), both()
    assert counted == [1, 1] and all(json.loads(path.read_text()).items() >= iv.made_by().items() for path in home.rglob("settings.json"))
    monkeypatch.setattr(iv, "VERSION", iv.VERSION + 1)
    both(), both()
    assert counted == [1] * 4
    real = iv.importlib.metadata.version
    monkeypatch.setattr(iv.importlib.metadata, "version", lambda name: "99.1.2" if name == "transformers" else real(name))
    both(), both()
    assert counted == [1] * 6


def test_default_place_and_its_two_variables(monkeypatch, tmp_path):
    assert cache_home() == tmp_path / "cache"
    monkeypatch.delenv("L2REC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "l2rec"


SETTINGS = {"encoder": "some/where/model", "kind": "text"}


def pieces(values, *, stop_after=None):
    """An encoder that yields one position at a time, and is interrupted after some."""
    def encode(positions):
        for n, at in enumerate(positions):
            if n == stop_after: raise KeyboardInterrupt
            yield [at], values[at : at + 1]
    return encode


def test_interrupted_work_is_kept(home):
    values, keys = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32), list("abcdef")
    with pytest.raises(KeyboardInterrupt): cached_vectors(keys, SETTINGS, pieces(values, stop_after=4))
    asked = []
    def encode(positions):
        asked.extend(positions)
        yield positions, values[positions]
    held = cached_vectors(keys, SETTINGS, encode)
    assert asked == [4, 5] and np.array_equal(np.stack([held[key] for key in keys]), values)
    assert not list(home.rglob("*.partial")) and json.loads((vector_folder(SETTINGS) / "settings.json").read_text()) == SETTINGS


def test_pieces_become_files(monkeypatch):
    monkeypatch.setattr(iv, "PIECE", 2)
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    cached_vectors(list("abcde"), SETTINGS, pieces(values))
    assert len(list(vector_folder(SETTINGS).glob("*.parquet"))) == 3
    assert {key: value.tolist() for key, value in held_vectors(vector_folder(SETTINGS), "ad").items()} == {"a": [0, 1], "d": [6, 7]}


@pytest.mark.parametrize("damage", ["cut", "text", "column", "nan"])
def test_damaged_file_costs_only_its_vectors(damage):
    values = np.ones((2, 3), np.float32)
    keep_vectors(vector_folder(SETTINGS), SETTINGS, ["a", "b"], values)
    keep_vectors(vector_folder(SETTINGS), SETTINGS, ["c"], values[:1] * 2)
    path = next(path for path in vector_folder(SETTINGS).glob("*.parquet") if pl.read_parquet(path).height == 2)
    if damage == "cut": path.write_bytes(path.read_bytes()[:100])
    elif damage == "text": path.write_text("<html>")
    elif damage == "column": pl.DataFrame({"key": ["a"]}).write_parquet(path)
    else: pl.DataFrame({"key": ["a"], "vector": pl.Series(np.float32([[1, np.nan]]), dtype=pl.Array(pl.Float32, 2))}).write_parquet(path)
    with pytest.warns(UserWarning, match="damaged"): held = cached_vectors(["a", "b", "c"], SETTINGS, lambda positions: iter([(positions, values[positions])]))
    assert held["a"].tolist() == [1] * 3 and held["c"].tolist() == [2] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(held_vectors(vector_folder(SETTINGS), "abc")) == {"a", "b", "c"}


def test_a_cache_that_cannot_be_written_costs_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("L2REC_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept"): held = cached_vectors(["a"], SETTINGS, pieces(np.ones((1, 2), np.float32)))
    assert held["a"].tolist() == [1, 1]


# --- bad input: encoders and texts ------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, message", [
    (lambda: encode_texts("a text"), "pass a list"), (lambda: encode_texts(["a", None]), r"texts\[1\] is NoneType"), (lambda: encode_texts(["a"], max_tokens=513), "at most 512"),
    (lambda: encode_texts(["a"], max_tokens=0), "max_tokens=0"), (lambda: encode_texts(["a"], pooling="max"), "one of mean, cls, last"), (lambda: encode_images([], MINILM, pooling="last"), "one of mean, cls"),
    (lambda: encode_images([], MINILM, batch_size=0), "batch_size=0")])
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_unknown_encoder_without_network(monkeypatch):
    import huggingface_hub
    def nothing(*_, **__): raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    with pytest.raises(DataError, match="Did you mean all-MiniLM-L6-v2"): encode_texts(["a"], "all-MiniLM-L12-v2")
    with pytest.raises(DataError, match="cannot be fetched"): encode_texts(["a"], "nobody/nothing")


def test_folders_that_are_no_encoders(tmp_path, causal, monkeypatch):
    import shutil
    with pytest.raises(DataError, match="no config.json"): encode_texts(["a"], tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no [*].safetensors"): encode_texts(["a"], tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"0" * 64)
    with pytest.raises(DataError, match="cannot be loaded"): encode_texts(["a"], tmp_path)
    monkeypatch.setattr(iv, "_packaged_minilm", lambda: tmp_path)
    with pytest.raises(DataError, match="is published: the file is damaged"): encode_texts(["a"])
    shutil.copytree(causal, tmp_path / "deeper")
    config = json.loads((tmp_path / "deeper" / "config.json").read_text())
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(DataError, match="weights of .* are missing"): encode_texts(["a"], tmp_path / "deeper", max_tokens=8)


# --- pictures ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pictures_against_one_by_one(vit, tmp_path, pooling):
    from transformers import AutoImageProcessor, AutoModel
    paths = [picture(tmp_path / f"{k}.png", k, mode) for k, mode in enumerate(("RGB", "RGBA", "L", "RGB", "RGB"))]
    found = encode_images(paths, vit, pooling, batch_size=2, progress=False)
    model, processor = AutoModel.from_pretrained(vit).double().eval(), AutoImageProcessor.from_pretrained(vit)
    for path, vector in zip(paths, found):
        with torch.inference_mode(): hidden = model(processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"].double()).last_hidden_state[0].numpy()
        wanted = hidden.mean(0) if pooling == "mean" else hidden[0]
        np.testing.assert_allclose(vector, wanted / np.linalg.norm(wanted), atol=1e-5)
    assert encode_images([], vit).shape == (0, 0)


def test_equal_bytes_are_encoded_once(vit, tmp_path, counted):
    a, b = picture(tmp_path / "a.png", 0), picture(tmp_path / "b.png", 1)
    (tmp_path / "copy.png").write_bytes(a.read_bytes())
    found = encode_images([a, b, tmp_path / "copy.png"], vit, progress=False)
    assert counted == [2] and np.array_equal(found[0], found[2])
    encode_images([b, a], vit, progress=False)
    assert counted == [2]


def test_convolutional_encoder(tmp_path):
    from transformers import ResNetConfig, ResNetModel
    from transformers.models.vit import ViTImageProcessorPil
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")).eval()
    model.save_pretrained(tmp_path / "net")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "net")
    paths = [picture(tmp_path / "a.png", 0), picture(tmp_path / "b.png", 1)]
    found = encode_images(paths, tmp_path / "net", progress=False)
    pixels = ViTImageProcessorPil(size={"height": 32, "width": 32})([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    with torch.inference_mode(): wanted = model.double()(pixels.double()).last_hidden_state.numpy()
    wanted = np.stack([np.mean([v[:, h, w] for h in range(v.shape[1]) for w in range(v.shape[2])], axis=0) for v in wanted])
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(DataError, match="no first token"): encode_images(paths, tmp_path / "net", "cls", progress=False)


def test_bad_pictures(vit, tmp_path):
    good, broken = picture(tmp_path / "a.png", 0), tmp_path / "b.png"
    broken.write_bytes(good.read_bytes()[:200])
    with pytest.raises(DataError, match="b.png: cannot be read as a picture"): encode_images([good, broken], vit, progress=False)
    with pytest.raises(DataError, match="missing.png: cannot be read"): encode_images([tmp_path / "missing.png"], vit, progress=False)
    with pytest.raises(DataError, match="AutoImageProcessor"): encode_images([good], MINILM, progress=False)
