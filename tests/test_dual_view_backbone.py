"""The backbone that is loaded, and the catalogue's tokens, against the library's own."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from l2rec.data.dataset import DataError
from l2rec.data.item_vectors import encoder_folder
from l2rec.dual_view.backbone import TokenTable, around, block_list, freeze, is_causal, keep_blocks, load_backbone, padding_token, token_table

TINY = dict(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
TEXTS = ["Nitrile gloves, box of 100.", "", "A digital caliper with a very long description " + "that goes on and on " * 30, "pH"]


def tiny(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(**TINY)).eval()
    if kind == "gpt2":
        return GPT2Model(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4)).eval()
    config, cls = {"qwen3": (Qwen3Config, Qwen3Model), "llama": (LlamaConfig, LlamaModel)}[kind]
    return cls(config(**TINY, num_key_value_heads=2, head_dim=8)).eval()


kinds = pytest.mark.parametrize("kind", ["bert", "qwen3", "llama", "gpt2"])


@pytest.fixture(scope="module")
def minilm():
    return load_backbone()


def test_minilm_computes_what_it_always_did(minilm):
    model, tokenizer = minilm
    plain = AutoModel.from_pretrained(encoder_folder("all-MiniLM-L6-v2"), dtype=torch.float32).eval()
    rows = tokenizer(["a first text", "and a second, longer one"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**rows).last_hidden_state, plain(**rows).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert model.pooler is None and model.config._attn_implementation == "eager" and not model.training
    assert not any(p.requires_grad for p in model.parameters()) and {p.device.type for p in model.parameters()} == {"cpu"}


def test_no_dropout_even_in_training_mode(minilm):
    model, tokenizer = minilm
    rows = tokenizer("a text", return_tensors="pt")
    model.train()
    try:
        with torch.no_grad():
            assert model(**rows).last_hidden_state.equal(model(**rows).last_hidden_state)
    finally:
        model.eval()


@kinds
def test_freezing_any_backbone(kind):
    model = freeze(tiny(kind))
    ids = torch.arange(8)[None]
    model.train()
    with torch.no_grad():
        assert model(input_ids=ids).last_hidden_state.equal(model(input_ids=ids).last_hidden_state)
    assert not any(p.requires_grad for p in model.parameters())


@kinds
def test_the_first_blocks_are_kept(kind):
    whole, short = tiny(kind), tiny(kind)
    keep_blocks(short, 1)
    assert len(block_list(short)) == 1 == short.config.num_hidden_layers and len(block_list(whole)) == 3
    ids = torch.arange(8)[None]
    with torch.no_grad():
        middle = whole(input_ids=ids, output_hidden_states=True).hidden_states[1]
        got = short(input_ids=ids).last_hidden_state
    if kind == "bert":
        torch.testing.assert_close(got, middle)
    else:  # a decoder norms what its last block returns
        norm = short.ln_f if kind == "gpt2" else short.norm
        torch.testing.assert_close(got, norm(middle))


@kinds
def test_which_way_a_model_looks(kind):
    assert is_causal(tiny(kind)) is (kind != "bert")


def test_settings_out_of_range(minilm):
    with pytest.raises(ValueError, match="attention='flash': 'eager' or 'sdpa'"):
        load_backbone(attention="flash")
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"blocks={n}: between 1 and 3"):
            keep_blocks(tiny("bert"), n)
    with pytest.raises(DataError, match="Did you mean all-MiniLM-L6-v2"):
        load_backbone("all-MiniLM-L6-v3")
    model = torch.nn.Linear(2, 2)
    model.config = BertConfig(**TINY)
    with pytest.raises(DataError, match="Linear has no list of 3 blocks"):
        block_list(model)


@pytest.mark.parametrize("dtype, attention", [(torch.bfloat16, "eager"), (torch.float32, "sdpa")])
def test_types_and_attention(dtype, attention):
    model, tokenizer = load_backbone(blocks=1, dtype=dtype, attention=attention)
    assert {p.dtype for p in model.parameters()} == {dtype} and model.config._attn_implementation == attention
    assert model(**tokenizer("a", return_tensors="pt")).last_hidden_state.dtype == dtype


# --- tokens -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item_tokens", [1, 5, 24, 1000])
def test_tokens_of_each_text(minilm, item_tokens):
    tokenizer = minilm[1]
    table = token_table(TEXTS, tokenizer, item_tokens)
    assert len(table) == 4
    for i, text in enumerate(TEXTS):
        words = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))[:item_tokens]
        assert table.ids[table.offsets[i] : table.offsets[i + 1]].tolist() == words and int(table.length[i]) == len(words)
    assert table.before.tolist() == [tokenizer.cls_token_id] and table.after.tolist() == [tokenizer.sep_token_id] and table.fill == tokenizer.pad_token_id


def test_the_table_moves_with_a_model_and_is_not_stored(minilm):
    table = token_table(TEXTS, minilm[1])
    assert not table.state_dict() and not list(table.parameters()) and {b.dtype for b in table.buffers()} == {torch.int64}
    assert table.to("meta").ids.is_meta


def test_no_items_and_no_tokens(minilm):
    assert len(token_table([], minilm[1])) == 0 and token_table(["", ""], minilm[1]).length.tolist() == [0, 0]
    with pytest.raises(ValueError, match="item_tokens=0: at least 1"):
        token_table(TEXTS, minilm[1], 0)


class Words:
    """A tokenizer of letters without special tokens unless told."""

    def __init__(self, pad=None, eos=None, around=False):
        self.pad_token_id, self.eos_token_id, self.around = pad, eos, around

    def __call__(self, texts, add_special_tokens=True, **_):
        one = lambda text: [7 + ord(c) % 50 for c in text]
        return {"input_ids": [one(t) for t in texts] if isinstance(texts, list) else [1, *one(texts), 2] if self.around and add_special_tokens else one(texts)}


def test_padding_falls_back_to_the_end_of_text():
    assert padding_token(Words(pad=3, eos=4)) == 3 and padding_token(Words(eos=0)) == 0
    with pytest.raises(DataError, match="Words has neither a padding token nor an end-of-text token"):
        padding_token(Words())


def test_special_tokens_are_found():
    assert around(Words(eos=1)) == ([], []) and around(Words(eos=1, around=True)) == ([1], [2])
    table = token_table(["ab"], Words(eos=9))
    assert not len(table.before) and not len(table.after) and table.fill == 9


def test_a_tokenizer_that_merges_across_special_tokens_is_refused():
    class Odd(Words):
        def __call__(self, texts, add_special_tokens=True, **_):
            return {"input_ids": [99] if add_special_tokens else [7]}
    with pytest.raises(DataError, match="cannot be tokenized one by one"):
        around(Odd(eos=1))


def test_table_by_hand():
    table = TokenTable([[5, 6], [], [7]], [1], [2, 3], fill=9)
    assert table.ids.tolist() == [5, 6, 7] and table.offsets.tolist() == [0, 2, 2, 3] and table.length.tolist() == [2, 0, 1] and table.after.tolist() == [2, 3]


@pytest.mark.parametrize("p", [0., .3, .9, .999])
def test_thinned_rows_are_rows_with_tokens_left_out(p):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 1000, n).tolist() for n in rng.integers(0, 9, 400)]
    table, items = TokenTable(rows, [7], [8], fill=3), torch.from_numpy(rng.permutation(400)[:300])
    torch.manual_seed(0)
    some = table.thinned(items, p)
    assert len(some) == 300 and some.before.tolist() == [7] and some.after.tolist() == [8] and some.fill == 3
    kept = [some.ids[a:b].tolist() for a, b in zip(some.offsets[:-1], some.offsets[1:])]
    for item, own in zip(items.tolist(), kept):
        left = iter(rows[item])
        assert all(token in left for token in own) and bool(own) == bool(rows[item])                     # in their order
    expected = sum(len(r) * (1 - p) + p ** len(r) for r in (rows[i] for i in items.tolist()) if r)       # one stays where all would go
    assert abs(sum(map(len, kept)) - expected) < 4 * (sum(map(len, rows)) * p * (1 - p)) ** .5 + 1e-9
    assert p == 0. or table.thinned(items, p).ids.tolist() != some.ids.tolist()
