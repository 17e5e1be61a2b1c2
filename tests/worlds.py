"""Small data sets for tests: ids with gaps, histories of all lengths, equal time stamps, items taken twice."""

import inspect

import numpy as np
import polars as pl
import torch

from l2rec.data.dataset import Dataset, make_dataset
from l2rec.data.splits import Split
from l2rec.dual_view.items import ItemTexts
from l2rec.training.contracts import Click, Retrieval
from l2rec.training.models import MODELS, model_class

READERS = [name for name in MODELS if issubclass(model_class(name), Retrieval) and "items" in inspect.signature(model_class(name).from_split).parameters]   # retrieval models of texts
RETRIEVAL = [name for name in MODELS if issubclass(model_class(name), Retrieval) and name not in READERS]
CLICK = [name for name in MODELS if issubclass(model_class(name), Click)]


def table(histories: dict[int, list[int]], **columns: list) -> pl.DataFrame:
    """Interactions of user -> items, in that order; further columns are flat, user after user."""
    user = [u for u, items in histories.items() for _ in items]
    return pl.DataFrame({"user_id": user, "item_id": [i for items in histories.values() for i in items],
                         "position": [p for items in histories.values() for p in range(len(items))], **columns},
                        schema_overrides={"user_id": pl.Int32, "item_id": pl.Int32, "position": pl.Int32})


def dataset(histories: dict[int, list[int]], **columns: list) -> Dataset:
    return make_dataset("small", table(histories, **columns))


def random_dataset(n_users: int = 40, n_items: int = 30, seed: int = 0, low: int = 1, high: int = 14) -> Dataset:
    """Users 3, 10, 17, ...; items 2, 7, 12, ...; times that often agree; ratings 1 to 5; an item may come again at another time."""
    rng = np.random.default_rng(seed)
    histories, time, rating = {}, [], []
    for u in range(n_users):
        pairs = []
        for t in np.sort(rng.integers(0, 60, rng.integers(low, high + 1))).tolist():
            pair = (int(rng.integers(n_items)) * 5 + 2, t)
            if pair not in pairs:
                pairs.append(pair)
        histories[7 * u + 3] = [i for i, _ in pairs]
        time += [t for _, t in pairs]
        rating += rng.integers(1, 6, len(pairs)).tolist()
    return dataset(histories, timestamp=time, rating=[float(r) for r in rating])


def ring(n_users: int = 60, n_items: int = 20, length: int = 8, seed: int = 0) -> Dataset:
    """Users who walk along a ring of items, mostly by one step: the order tells what follows."""
    rng = np.random.default_rng(seed)
    walk = (rng.integers(0, n_items, n_users)[:, None] + np.cumsum(rng.choice([1, 1, 1, 2], (n_users, length)), 1)) % n_items
    return dataset({u: row.tolist() for u, row in enumerate(walk)})


def random_texts(split: Split, seed: int = 0) -> ItemTexts:
    """Texts of a few words, one item without any, and vectors of MiniLM's width that have nothing to do with them."""
    rng = np.random.default_rng(seed)
    texts = ["", *(" ".join(rng.choice(["red", "steel", "garden", "lamp", "blue", "chair"], 3)) for _ in range(split.n_items - 1))]
    vectors = rng.normal(size=(split.n_items, 384)).astype(np.float32)
    vectors[0] = 0
    return ItemTexts(texts, torch.from_numpy(vectors), torch.tensor([bool(t) for t in texts]), item_id=split.item_id)
