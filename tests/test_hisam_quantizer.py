"""Residual quantisation against brute force in float64, its gradients, k-means, reset and limit."""

import numpy as np
import pytest
import torch

from l2rec.hisam.quantizer import ResidualQuantizer, k_means, nearest


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def brute_force(x, books):
    """Greedy residual quantisation, every distance written out: codes, and what is left."""
    left, codes = np.array(x, np.float64), np.zeros((len(x), len(books)), int)
    for l, book in enumerate(books):
        for i in range(len(left)):
            codes[i, l] = np.argmin([((left[i] - word) ** 2).sum() for word in book])
            left[i] -= book[codes[i, l]]
    return codes, left


@pytest.mark.parametrize("sizes", [(7,), (5, 9), (4, 1, 6)])
def test_codes_are_those_of_brute_force(sizes):
    torch.manual_seed(0)
    quantizer, x = ResidualQuantizer(len(sizes), sizes, 6).double(), torch.randn(60, 6, dtype=torch.float64, generator=generator())
    codes, left = brute_force(x.numpy(), [b.detach().numpy() for b in quantizer.codebooks])
    quantised = quantizer(x)
    assert (quantizer.encode(x).numpy() == codes).all() and (quantised.codes.numpy() == codes).all()
    assert np.allclose(x - quantizer.decode(quantised.codes).detach(), left) and np.allclose(quantised.values.detach(), x - left)
    assert quantised.norms[-1].item() == pytest.approx((left ** 2).sum(1).mean())


def test_nearest_in_blocks_and_of_ties():
    x, book = torch.randn(50, 3, generator=generator()), torch.randn(8, 3, generator=generator(1))
    assert nearest(x, book, block=7).equal(nearest(x, book)) and nearest(x[:0], book).shape == (0,)
    assert nearest(torch.zeros(1, 2), torch.tensor([[2., 0.], [1., 0.], [-1., 0.]])).item() == 1


def test_losses_and_gradients_are_as_written():
    torch.manual_seed(1)
    quantizer, x = ResidualQuantizer(2, 4, 3).double(), torch.randn(10, 3, dtype=torch.float64).requires_grad_()
    quantised = quantizer(x)
    residual, codebook = x.detach(), 0.
    for l, book in enumerate(quantizer.codebooks):
        word = book[quantised.codes[:, l]].detach()
        codebook, residual = codebook + (residual - word).square().sum(1).mean(), residual - word
    assert quantised.codebook.item() == pytest.approx(codebook.item()) and quantised.commitment.item() == pytest.approx(codebook.item())
    assert quantizer.loss(quantised).item() == pytest.approx(1.25 * codebook.item())
    quantised.values.square().sum().backward()                                             # straight through: as if values were x
    assert torch.allclose(x.grad, 2 * quantised.values.detach()) and all(b.grad is None for b in quantizer.codebooks)
    x.grad = None
    quantizer(x).codebook.backward()
    assert x.grad is None or (x.grad == 0).all()
    book, codes = quantizer.codebooks[0], quantised.codes[:, 0]
    expected = torch.stack([2 * (book[k] - x.detach()[codes == k]).sum(0) / 10 if (codes == k).any() else torch.zeros(3, dtype=torch.float64) for k in range(4)])
    assert torch.allclose(book.grad, expected.detach())
    for b in quantizer.codebooks: b.grad = None
    quantizer(x).commitment.backward()
    assert all(b.grad is None or (b.grad == 0).all() for b in quantizer.codebooks) and x.grad.abs().sum() > 0


def test_k_means_finds_separate_groups_and_repeats():
    centre = torch.tensor([[0., 0.], [10., 0.], [0., 10.], [10., 10.]])
    x = centre.repeat_interleave(25, 0) + .1 * torch.randn(100, 2, generator=generator())
    found = k_means(x, 4, generator=generator(5))
    expected = torch.stack([x[k * 25:(k + 1) * 25].mean(0) for k in range(4)])
    assert torch.cdist(expected, found).min(1).values.max() < 1e-4
    assert k_means(x, 4, generator=generator(5)).equal(found)
    assert k_means(x, 3, generator=generator(5), sample=5).shape == (3, 2)


@pytest.mark.parametrize("x", [torch.zeros(5, 3), torch.ones(1, 3), torch.randn(4, 3, generator=generator())])
def test_k_means_of_fewer_distinct_vectors_than_codewords(x):
    found = k_means(x, 8, generator=generator())
    assert found.shape == (8, 3) and found.isfinite().all() and torch.cdist(x, found).min(1).values.max() < 1e-6
    with pytest.raises(ValueError, match="no vectors"): k_means(x[:0], 2)


def test_start_uses_every_codeword_and_reset_mends_a_collapse():
    torch.manual_seed(0)
    x, quantizer = torch.randn(400, 4, generator=generator()), ResidualQuantizer(2, 16, 4)
    quantizer.start(x, generator())
    assert [len(quantizer.encode(x)[:, l].unique()) for l in (0, 1)] == [16, 16]
    with torch.no_grad(): quantizer.codebooks[0][3:] = 100.
    moved = quantizer.reset(x)
    assert moved[0].tolist() == list(range(3, 16)) and len(quantizer.encode(x)[:, 0].unique()) == 16
    kept = quantizer.codebooks[0].detach().clone()
    assert not len(quantizer.reset(x)[0]) and quantizer.codebooks[0].equal(kept)


def test_reset_leaves_alone_what_serves_everything_exactly():
    quantizer = ResidualQuantizer(1, 4, 2)
    with torch.no_grad(): quantizer.codebooks[0].copy_(torch.tensor([[1., 1.], [5., 5.], [6., 6.], [7., 7.]]))
    assert len(quantizer.reset(torch.ones(10, 2))[0]) == 0


def test_limit_lowers_and_warns():
    quantizer = ResidualQuantizer(2, (8, 3), 4)
    with pytest.warns(UserWarning, match="8, 3 codewords for 5 vectors"): assert quantizer.limit(5)
    assert quantizer.sizes == (5, 3) and [len(b) for b in quantizer.codebooks] == [5, 3] and not quantizer.limit(5)


def test_no_rows():
    quantised = (quantizer := ResidualQuantizer(2, 4, 3))(torch.zeros(0, 3))
    assert quantised.codes.shape == (0, 2) and quantizer.loss(quantised) == 0 and quantizer.decode(quantised.codes).shape == (0, 3)
    assert (quantizer.decode(torch.zeros(2, 2, dtype=torch.long), 0) == 0).all()


@pytest.mark.parametrize("arguments", [(0, 4), (2, 0), (2, (4,)), (2, (4, 0))])
def test_bad_sizes(arguments):
    with pytest.raises(ValueError, match="level"): ResidualQuantizer(*arguments)
