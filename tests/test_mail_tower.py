"""The discrepancy and the zero-shot tower against slow float64 references, their gradients, and bad input."""

import math

import pytest
import torch
from torch import nn

from l2rec.mail.alignment import discrepancy, median_distance, mmd2, paired_square, saturation, square_distances
from l2rec.mail.tower import AttentionPooling, Decoder, Encoder, ZeroShotTower, drop_out, reconstruction_errors

ARMS = {"single": ("attributes",), "dual": ("attributes", "behaviour"), "base": ("attributes", "behaviour", "alignment"),
        "codes only": ("behaviour", "alignment"), "half": ("attributes", "alignment")}


def samples(n=7, m=5, h=4, dtype=torch.float32, scale=1., shift=.5):
    g = torch.Generator().manual_seed(n * 100 + m)
    return (torch.randn(n, h, generator=g, dtype=torch.float64) * scale).to(dtype), (torch.randn(m, h, generator=g, dtype=torch.float64) * scale + shift).to(dtype)


def slow_mmd2(p, q, sigma, unbiased):
    """Three double loops in Python numbers."""
    k = lambda x, y: math.exp(-sum((a - b) ** 2 for a, b in zip(x, y)) / (2 * sigma**2))
    p, q = p.double().tolist(), q.double().tolist()
    n, m = len(p), len(q)
    inside = lambda x: sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if not unbiased or i != j)
    return inside(p) / (n * (n - unbiased)) + inside(q) / (m * (m - unbiased)) - 2 * sum(k(a, b) for a in p for b in q) / (n * m)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("n, m", [(7, 5), (2, 9), (6, 6)])
@pytest.mark.parametrize("sigma", [.3, 1., 4.])
def test_mmd_against_a_double_loop(n, m, sigma, unbiased):
    p, q = samples(n, m)
    assert mmd2(p, q, sigma, unbiased).item() == pytest.approx(slow_mmd2(p, q, sigma, unbiased), rel=1e-4, abs=1e-6)
    assert mmd2(p.double(), q.double(), sigma, unbiased).item() == pytest.approx(slow_mmd2(p.double(), q.double(), sigma, unbiased), rel=1e-10)


@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd_gradient_against_finite_differences(unbiased):
    p, q = (x.requires_grad_() for x in samples(5, 4, 3, torch.float64))
    assert torch.autograd.gradcheck(lambda p, q: mmd2(p, q, .8, unbiased) * 3, (p, q))


def test_mmd_far_from_the_origin_loses_no_digits():
    p, q = samples(40, 30, 8, torch.float64)
    assert mmd2((p + 300).float(), (q + 300).float()).item() == pytest.approx(mmd2(p, q).item(), rel=1e-3)


def test_mmd_is_zero_for_the_same_rows_and_has_no_order():
    p, q = samples()
    assert mmd2(p, p.flip(0)).item() == pytest.approx(0, abs=1e-6)
    assert mmd2(p, q).item() == pytest.approx(mmd2(q, p).item(), rel=1e-5)
    assert mmd2(p[:1], q[:1]).item() == pytest.approx(slow_mmd2(p[:1], q[:1], 1., False), rel=1e-5)


def test_distances_and_their_median():
    p, q = samples(6, 5, 3, torch.float64)
    x = torch.cat([p, q])
    square = square_distances(x)
    torch.testing.assert_close(square, ((x[:, None] - x) ** 2).sum(2))
    pairs = sorted(math.dist(a, b) for i, a in enumerate(x.tolist()) for b in x.tolist()[:i])
    assert median_distance(square).item() == pytest.approx(pairs[(len(pairs) - 1) // 2])
    value, sigma = discrepancy(p, q, "median")
    assert sigma.item() == pytest.approx(pairs[(len(pairs) - 1) // 2]) and value.item() == pytest.approx(slow_mmd2(p, q, sigma.item(), False))
    assert not sigma.requires_grad


def test_median_bandwidth_where_all_rows_are_equal():
    x = torch.ones(4, 3, requires_grad=True)
    value, sigma = discrepancy(x, torch.ones(4, 3), "median")
    value.backward()
    assert value.isfinite() and sigma > 0 and x.grad.isfinite().all()
    assert mmd2(torch.ones(1, 3), torch.ones(1, 3), "median").isfinite()


def test_saturation_counts_pairs():
    p, q = samples(6, 5, 3)
    x, sigma = torch.cat([p, q]).double().tolist(), .4
    values = [math.exp(-math.dist(a, b) ** 2 / (2 * sigma**2)) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    share = sum(v < 1e-3 for v in values) / len(values)
    assert 0 < share < 1 and saturation(p, q, sigma) == pytest.approx(share)
    big = samples(20, 20, 512)
    assert saturation(*big) == 1 and saturation(*big, sigma="median") == 0


@pytest.mark.parametrize("sigma", [0, -1., float("nan"), float("inf"), "mean"])
def test_a_bandwidth_that_is_none(sigma):
    with pytest.raises(ValueError, match="sigma="): mmd2(*samples(), sigma=sigma)
    with pytest.raises(ValueError, match="sigma="): ZeroShotTower(2, 3, 4, sigma=sigma)


def test_samples_that_are_too_small():
    p, q = samples()
    with pytest.raises(ValueError, match="0 and 5 rows"): mmd2(p[:0], q)
    with pytest.raises(ValueError, match="at least 2"): mmd2(p[:1], q, unbiased=True)
    with pytest.raises(ValueError, match="same users"): paired_square(p, q)


# ---------------------------------------------------------------------------------------------------------------------------------- parts

def test_attention_pooling_against_a_loop():
    torch.manual_seed(0)
    pool, x, present = AttentionPooling(4).double(), torch.randn(3, 5, 4, dtype=torch.float64), torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1], [0] * 5]).bool()
    for b in range(3):
        e = {i: (pool.score @ torch.tanh(pool.project.weight @ x[b, i] + pool.project.bias)).item() for i in range(5) if present[b, i]}
        total = sum(math.exp(v) for v in e.values())
        expected = sum((math.exp(v) / total * x[b, i] for i, v in e.items()), torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(pool(x, present)[b], expected)
    torch.testing.assert_close(pool(x), pool(x, torch.ones(3, 5, dtype=torch.bool)))


def test_an_empty_set_has_zeros_and_finite_gradients():
    pool, x = AttentionPooling(4), torch.randn(2, 3, 4, requires_grad=True)
    out = pool(x, torch.tensor([[False] * 3, [True] * 3]))
    out.sum().backward()
    assert out[0].eq(0).all() and x.grad[0].eq(0).all() and all(p.grad.isfinite().all() for p in pool.parameters())


@pytest.mark.parametrize("widths", [(1024, 512, 512), (6,), (7, 5), (8, 7, 6, 5)])
def test_residual_by_concatenation_written_out(widths):
    torch.manual_seed(1)
    encoder, h = Encoder(4, widths).double(), torch.randn(3, 4, dtype=torch.float64)
    assert [(l.in_features, l.out_features) for l in encoder.layers] == [(4 if k == 0 else widths[k - 1] + 4, w) for k, w in enumerate(widths)]
    z = None
    for layer in encoder.layers:
        x = h if z is None else torch.cat([z, h], 1)
        y = torch.stack([layer.weight @ row + layer.bias for row in x])
        z = torch.where(y > 0, y, .01 * y)
    torch.testing.assert_close(encoder(h, drop=False), z)
    torch.testing.assert_close(encoder.eval()(h), z)
    assert encoder(h).shape == (3, widths[-1])


def test_dropout_acts_in_training_on_all_layers_but_the_last():
    torch.manual_seed(2)
    encoder, h = Encoder(4, (64, 32), .5), torch.randn(8, 4)
    assert not torch.equal(encoder(h), encoder(h)) and torch.equal(encoder(h, drop=False), encoder(h, drop=False))
    only = Encoder(4, (6,), .9)
    assert torch.equal(only(h), only(h))


@pytest.mark.parametrize("p", [0., .1, .5, .9, 1 - 2**-20])
def test_dropout_has_its_rate_and_keeps_the_mean(p):
    torch.manual_seed(3)
    x = torch.ones(1001, 301, requires_grad=True)
    y = drop_out(x, p)
    share, n = y.eq(0).double().mean().item(), x.numel()
    assert abs(share - p) < 5 * (p * (1 - p) / n) ** .5 + 2**-16
    torch.testing.assert_close(y, y.ne(0) / (1 - p), rtol=1e-5, atol=0)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(3)
    assert torch.equal(drop_out(x, p), y)


def test_dropout_masks_are_independent_along_the_words():
    torch.manual_seed(4)
    keep = drop_out(torch.ones(100_000, 4), .5).ne(0).double()
    correlation = torch.corrcoef(keep.T) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < .02


def test_decoder_written_out():
    torch.manual_seed(5)
    decoder, code = Decoder(6, (5, 7), (3, 2)).double(), torch.randn(4, 6, dtype=torch.float64)
    z = code
    for layer in decoder.layers:
        y = z @ layer.weight.T + layer.bias
        z = torch.where(y > 0, y, .01 * y)
    expected = z @ decoder.last.weight.T + decoder.last.bias
    assert decoder(code).shape == (4, 3, 2)
    for i in range(3):
        for j in range(2): torch.testing.assert_close(decoder(code)[:, i, j], expected[:, i * 2 + j])


# ---------------------------------------------------------------------------------------------------------------------------------- tower

def old(n=9, n_a=3, slots=6, width=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    present = torch.arange(slots) < torch.randint(1, slots + 1, (n, 1), generator=g)
    return torch.randn(n, n_a, width, generator=g), torch.randn(n, slots, width, generator=g), present


def small(**switches):
    torch.manual_seed(7)
    return ZeroShotTower(3, 6, 4, **{"encoder": (16, 12, 8), "decoder": (10, 14)} | switches)


def slow_error(decoded, target, present, reduction):
    """Element by element, one user after the other."""
    total = size = square = 0.
    for b in range(len(target)):
        for i in range(target.shape[1]):
            if not present[b, i]: continue
            for x, y in zip(decoded[b, i].tolist(), target[b, i].tolist()): total, size, square = total + (x - y) ** 2, size + 1, square + y**2
    return {"mean": total / size, "sum": total / len(target), "relative": total / square}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "relative"])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("alignment", ["mmd", "paired"])
def test_the_loss_and_its_parts_against_a_slow_reference(arm, reduction, alignment):
    weights = {"behaviour": .5, "alignment": 2.}
    tower = small(terms=ARMS[arm], reduction=reduction, alignment=alignment, sigma=.7, weights=weights).double().eval()
    a, v, present = (x.double() if x.is_floating_point() else x for x in old())
    loss, parts = tower.loss(a, v, present)
    p, q = tower.codes(a, v, present)
    everything, expected = torch.ones(a.shape[:2], dtype=torch.bool), {}
    for name, code in (("attributes", p), ("behaviour", q)):
        if name not in ARMS[arm]: continue
        expected[f"{name}_to_attributes"] = slow_error(tower.decode_attributes(code), a, everything, reduction)
        expected[f"{name}_to_behaviour"] = slow_error(tower.decode_behaviour(code), v, present, reduction)
        expected[name] = expected[f"{name}_to_attributes"] + expected[f"{name}_to_behaviour"]
    if q is not None: expected |= {"mmd": slow_mmd2(p, q, .7, False), "sigma": .7}
    if "alignment" in ARMS[arm]: expected["alignment"] = expected["mmd"] if alignment == "mmd" else ((p - q) ** 2).mean().item()
    assert set(parts) == set(expected)
    for name, value in expected.items(): assert parts[name].item() == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert loss.item() == pytest.approx(sum(weights.get(t, 1.) * expected[t] for t in ARMS[arm]), rel=1e-9)
    assert not any(value.requires_grad for value in parts.values())


def test_whole_gradient_against_finite_differences():
    tower = small(dropout=0.).double()
    data = [x.double() if x.is_floating_point() else x for x in old()]
    tower.loss(*data)[0].backward()
    for name, weight in tower.named_parameters():
        at, step = weight.grad.abs().argmax(), 1e-6
        with torch.no_grad():
            flat, kept = weight.view(-1), weight.view(-1)[at].item()
            around = []
            for value in (kept + step, kept - step):
                flat[at] = value
                around.append(tower.loss(*data)[0].item())
            flat[at] = kept
        assert weight.grad.view(-1)[at].item() == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
def test_padding_never_matters(garbage):
    tower = small()
    a, v, present = old()
    losses, gradients = [], []
    for value in (0., garbage):
        torch.manual_seed(11)
        tower.zero_grad()
        loss, parts = tower.loss(a, torch.where(present[..., None], v, torch.tensor(value)), present)
        loss.backward()
        losses.append((loss, parts))
        gradients.append([p.grad.clone() for p in tower.parameters()])
    assert torch.equal(losses[0][0], losses[1][0]) and all(torch.equal(losses[0][1][k], losses[1][1][k]) for k in losses[0][1])
    assert all(torch.equal(x, y) for x, y in zip(*gradients))


@pytest.mark.parametrize("arm", ARMS)
def test_no_old_user_at_all(arm):
    tower, (a, v, present) = small(terms=ARMS[arm]), old()
    for rows in ((a[:0], v[:0], present[:0]), (a, v, torch.zeros_like(present))):
        loss, parts = tower.loss(*rows)
        loss.backward()
        assert loss.item() == 0 and parts == {} and all(p.grad is None or p.grad.eq(0).all() for p in tower.parameters())


def test_old_users_without_behaviour_teach_nothing():
    tower, (a, v, present) = small().eval(), old()
    some = present.clone()
    some[[1, 4]] = False
    keep = some.any(1)
    assert torch.equal(tower.loss(a, v, some)[0], tower.loss(a[keep], v[keep], present[keep])[0])


@pytest.mark.parametrize("sigma", [1., "median"])
def test_one_old_user(sigma):
    tower, (a, v, present) = small(sigma=sigma), old(1)
    loss, parts = tower.loss(a, v, present)
    loss.backward()
    assert all(x.isfinite() for x in parts.values()) and all(p.grad.isfinite().all() for p in tower.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_inputs_get_no_gradient(autocast):
    tower, (a, v, present) = small(autocast=autocast), old()
    a.requires_grad_(), v.requires_grad_()
    tower.loss(a, v, present)[0].backward()
    p, q = tower.codes(a, v, present)
    (p.sum() + q.sum()).backward()
    assert a.grad is None and v.grad is None and not tower.virtual(a).requires_grad


def test_arms_train_exactly_what_they_should():
    parts = {"pool_attributes", "encode_attributes", "decode_attributes", "decode_behaviour"}
    second = {"pool_behaviour", "encode_behaviour"}
    for arm, expected in (("single", parts), ("dual", parts | second), ("base", parts | second), ("codes only", parts | second), ("half", parts | second)):
        tower = small(terms=ARMS[arm], dropout=0.)
        tower.loss(*old())[0].backward()
        assert {name for name, _ in tower.named_children()} == expected
        assert {name for name, p in tower.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == {name for name, _ in tower.named_parameters()}, arm


def test_alignment_adds_gradient_only_where_it_is_a_term():
    """Dual measures the discrepancy and does not follow it: its gradient is that of a loop without it."""
    gradients = {}
    for weight in (0., 1.):
        tower = small(weights={"alignment": weight}, dropout=0.)
        tower.loss(*old())[0].backward()
        gradients[weight] = [p.grad.clone() for p in tower.parameters()]
    dual = small(terms=ARMS["dual"], dropout=0.)
    dual.loss(*old())[0].backward()
    assert all(torch.allclose(x, p.grad) for x, p in zip(gradients[0.], dual.parameters()))
    assert not all(torch.allclose(x, y) for x, y in zip(gradients[0.], gradients[1.]))


def test_virtual_behaviour_is_d2_of_e1_without_dropout():
    tower, (a, v, present) = small(), old()
    assert tower.training
    expected = tower.decode_behaviour(tower.encode_attributes(tower.pool_attributes(a), drop=False))
    assert torch.equal(tower.virtual(a), expected) and torch.equal(tower.virtual(a), tower.eval().virtual(a))
    assert tower.virtual(a).shape == v.shape and tower.virtual(a[:0]).shape == (0, 6, 4)


def test_autocast_is_close_and_returns_float32():
    a, v, present = old(64)
    exact, rounded = small().eval(), small(autocast=True).eval()
    (loss, parts), (near, near_parts) = exact.loss(a, v, present), rounded.loss(a, v, present)
    assert near.dtype == torch.float32 and near.item() == pytest.approx(loss.item(), rel=.02)
    for name in parts: assert near_parts[name].dtype == torch.float32 and near_parts[name].item() == pytest.approx(parts[name].item(), rel=.05, abs=2e-3), name
    assert rounded.virtual(a).dtype == torch.float32
    torch.testing.assert_close(rounded.virtual(a), exact.virtual(a), rtol=.05, atol=.02)
    loss.backward(), near.backward()
    for (name, x), y in zip(exact.named_parameters(), rounded.parameters()):
        assert y.grad.dtype == torch.float32 and nn.functional.cosine_similarity(x.grad.flatten(), y.grad.flatten(), 0) > .98, name


def test_the_discrepancy_stays_in_float32_under_an_outer_autocast():
    p, q = samples(20, 20, 64)
    plain = mmd2(p, q)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(mmd2(p, q), plain)


def test_a_broken_number_can_be_named():
    tower, (a, v, present) = small().eval(), old()
    present[0, 0], v[0, 0, 0] = True, float("nan")
    bad = {name for name, value in tower.loss(a, v, present)[1].items() if not value.isfinite()}
    assert {"attributes_to_behaviour", "behaviour_to_attributes", "behaviour_to_behaviour", "mmd"} <= bad and "attributes_to_attributes" not in bad
    a, v, present = old()
    a[0, 0, 0] = float("inf")
    bad = {name for name, value in tower.loss(a, v, present)[1].items() if not value.isfinite()}
    assert "attributes_to_attributes" in bad and "behaviour_to_behaviour" not in bad


def test_relative_errors_do_not_see_the_scale():
    decoded, (_, target, present) = torch.randn(18, 6, 4), old()
    target = target * present[..., None]
    one, other = (reconstruction_errors(decoded * s, target * s, present, "relative") for s in (1., .01))
    torch.testing.assert_close(one, other)
    assert reconstruction_errors(decoded, torch.zeros_like(target), present, "relative").isfinite().all()


def test_training_brings_virtual_behaviour_to_the_truth():
    """Behaviour that is a function of attributes is learned."""
    torch.manual_seed(0)
    tower, g = ZeroShotTower(1, 2, 6, encoder=(64, 32), decoder=(32,), dropout=0., terms=ARMS["dual"]), torch.Generator().manual_seed(0)
    mix = torch.randn(6, 12, generator=g) / 2

    def draw(n):
        a = torch.randn(n, 1, 6, generator=g)
        return a, torch.tanh(a[:, 0] @ mix).view(n, 2, 6), torch.ones(n, 2, dtype=torch.bool)

    optimiser, new = torch.optim.Adam(tower.parameters(), lr=2e-3), draw(200)
    for _ in range(300):
        optimiser.zero_grad()
        tower.loss(*draw(64))[0].backward()
        optimiser.step()
    assert (tower.virtual(new[0]) - new[1]).square().mean() < .2 * new[1].var()


def test_state_comes_back():
    tower, other, (a, _, _) = small(), small(), old()
    with torch.no_grad(): next(tower.parameters()).add_(1)
    other.load_state_dict(tower.state_dict())
    assert torch.equal(tower.virtual(a), other.virtual(a))


@pytest.mark.parametrize("switches, message", [
    ({"terms": ("attribute",)}, "did you mean 'attributes'"), ({"terms": ()}, "nothing would train"), ({"terms": ("behaviour",)}, "nothing would train"),
    ({"terms": ("alignment",)}, "nothing would train"), ({"alignment": "mdm"}, "did you mean 'mmd'"), ({"reduction": "means"}, "did you mean 'mean'"),
    ({"weights": {"behavior": 1.}}, "did you mean 'behaviour'"), ({"dropout": 1.}, "dropout=1.0"), ({"encoder": ()}, "at least one layer")])
def test_switches_that_are_none(switches, message):
    with pytest.raises(ValueError, match=message): small(**switches)


def test_shapes_that_are_not_the_towers():
    tower, (a, v, present) = small(), old()
    for rows, message in (((a[:, :2], v, present), "attributes has shape"), ((a, v[:, :3], present), "behaviour has shape"), ((a, v, present[:4]), "present has shape")):
        with pytest.raises(ValueError, match=message): tower.loss(*rows)
    with pytest.raises(ValueError, match="slots=0"): ZeroShotTower(3, 0, 4)
