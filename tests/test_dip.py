"""Deep image prior: operators, the network's structure, the fitting loop, and every stop rule against a slow specification."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, strategies as st

import dip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def operators(seed=0):
    known = (torch.rand(1, 1, 12, 16, generator=generator(seed)) > 0.6).float()
    return {"identity": dip.identity(), "mask": dip.mask(known), "downsample 2": dip.downsample(2), "downsample 4": dip.downsample(4),
            "blur": dip.blur(0.8, (12, 16)), "strong blur": dip.blur(3.0, (12, 16))}


@pytest.mark.parametrize("name", operators())
@given(seed=st.integers(0, 99))
def test_operators_are_linear_and_their_pseudo_inverses_are_moore_penrose(name, seed):
    """A A⁺ A = A, A⁺ A A⁺ = A⁺, and both A A⁺ and A⁺ A pass the dot-product test of symmetry."""
    A, pinv = operators(seed)[name]
    x, x2 = torch.randn(2, 1, 3, 12, 16, generator=generator(seed))
    y, y2 = A(torch.randn(x.shape, generator=generator(seed + 1))), A(x2)
    close = dict(rtol=1e-4, atol=1e-4)
    assert torch.allclose(A(2 * x - 3 * x2), 2 * A(x) - 3 * A(x2), **close)
    assert torch.allclose(A(pinv(A(x))), A(x), **close)
    assert torch.allclose(pinv(A(pinv(y))), pinv(y), **close)
    assert torch.allclose((A(pinv(y)) * y2).sum(), (y * A(pinv(y2))).sum(), **close)
    assert torch.allclose((pinv(A(x)) * x2).sum(), (x * pinv(A(x2))).sum(), **close)


@pytest.mark.parametrize("name", operators())
def test_automatic_gradients_are_the_adjoint(name):
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩ with Aᵀ from autograd, against the matrix written out column by column."""
    A = operators()[name].A
    x = torch.randn(1, 1, 12, 16, generator=generator()).requires_grad_()
    matrix = torch.stack([A(e.reshape(1, 1, 12, 16)).flatten() for e in torch.eye(192)], dim=1)
    y = torch.randn(matrix.shape[0], generator=generator(1))
    (adjoint,) = torch.autograd.grad((A(x).flatten() * y).sum(), x)
    assert torch.allclose(adjoint.flatten(), matrix.T @ y, atol=1e-4)
    assert torch.allclose(matrix @ x.detach().flatten(), A(x).detach().flatten(), atol=1e-4)


def test_what_the_operators_measure():
    x = torch.arange(16.).reshape(1, 1, 4, 4)
    assert dip.downsample(2).A(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(dip.downsample(2).pinv(dip.downsample(2).A(x))[0, 0, :2, :2], torch.full((2, 2), 2.5))
    known = torch.tensor([[1., 0], [0, 1]]).reshape(1, 1, 2, 2)
    assert torch.equal(dip.mask(known).A(torch.ones(1, 3, 2, 2)), known.expand(1, 3, 2, 2))
    assert torch.allclose(dip.blur(1.5, (9, 9)).A(torch.full((1, 1, 9, 9), 0.4)), torch.full((1, 1, 9, 9), 0.4), atol=1e-5)


def original_parameter_count(c_in=32, c_out=3, scales=5, width=128, skip=4):
    """Layer by layer as the original lists them: convolutions with bias, batch norms with scale and shift."""
    conv = lambda a, b, k: a * b * k * k + b                                                                 # noqa: E731
    total, c = 0, c_in
    for _ in range(scales):
        total += conv(c, skip, 1) + 2 * skip                                                        # skip branch
        total += conv(c, width, 3) + 2 * width + conv(width, width, 3) + 2 * width                         # down
        total += 2 * (width + skip)                                                         # norm after the join
        total += conv(width + skip, width, 3) + 2 * width + conv(width, width, 1) + 2 * width                # up
        c = width
    return total + conv(width, c_out, 1)


def test_at_five_scales_of_128_the_network_is_the_originals():
    net = dip.Hourglass()
    assert sum(p.numel() for p in net.parameters()) == original_parameter_count() == 2_217_831
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.stride == (2, 2) for m in convolutions) == 5 and sum(m.out_channels == 4 for m in convolutions) == 5
    assert len(convolutions) == 5 * 5 + 1 and all(m.padding_mode == "reflect" for m in convolutions if m.kernel_size == (3, 3))


@given(scales=st.integers(1, 3), skip=st.sampled_from([0, 4]), upsample=st.sampled_from(["nearest", "bilinear"]),
       padding=st.sampled_from(["reflect", "zeros"]), c_out=st.sampled_from([1, 3]))
def test_the_network_keeps_size_and_range_and_uses_all_its_weights(scales, skip, upsample, padding, c_out):
    torch.manual_seed(0)
    net = dip.Hourglass(4, c_out, (6, 8, 10)[:scales], skip, upsample, padding)
    image = net(dip.random_input((16, 24), generator(), 4))
    assert image.shape == (1, c_out, 16, 24) and 0 < image.min() and image.max() < 1
    image.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_input_is_uniform_and_reproducible():
    z = dip.random_input((64, 64), generator())
    assert z.shape == (1, 32, 64, 64) and z.min() >= 0 and z.max() <= 0.1 and z.mean().item() == pytest.approx(0.05, abs=0.001)
    assert torch.equal(z, dip.random_input((64, 64), generator()))


def stream(steps=60, seed=0, **options):
    torch.manual_seed(seed)
    net, g = dip.Hourglass(8, 3, (8, 8), upsample="nearest", padding="zeros"), generator(seed)
    z = dip.random_input((16, 16), g, 8)
    y = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    return y, dip.fit(y, lambda x: x, net, z, steps, g, **options)


def test_a_fit_repeats_bit_for_bit_approaches_y_and_averages():
    y, run = stream(80)
    steps = list(run)
    again = list(stream(80)[1])
    assert [s.i for s in steps] == list(range(1, 81))
    assert all(torch.equal(a.image, b.image) and a.misfit == b.misfit for a, b in zip(steps, again))
    assert steps[-1].misfit < steps[0].misfit / 5
    assert steps[-1].misfit == pytest.approx((steps[-1].image - y).square().mean().item(), rel=1e-4)
    for s in steps:                                                  # the weights 0.99^age of all images so far, made to sum to 1
        weights = torch.tensor([0.99 ** (s.i - j) for j in range(1, s.i + 1)])
        mean = torch.einsum("i,ichw->chw", weights / weights.sum(), torch.cat([x.image for x in steps[:s.i]]))
        assert torch.allclose(s.average, mean, atol=1e-5)
    assert not steps[-1].image.requires_grad


def test_jitter_is_noise_on_the_input():
    """Without jitter a network that does not learn shows one picture; with it, another at each step."""
    for jitter, same in ((0.0, True), (0.1, False)):
        a, b = itertools.islice(stream(2, lr=0.0, jitter=jitter)[1], 2)
        assert torch.equal(a.image, b.image) is same


class Cliff(nn.Module):
    """A picture of one colour that learns y and jumps off a cliff at step 70."""

    def __init__(self):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.zeros(1, 1, 1, 1)), 0

    def forward(self, z):
        self.calls += 1
        if self.calls == 70:
            with torch.no_grad():
                self.w.fill_(float("nan") if self.broken else 90.0)
        return self.w.expand(1, 1, 4, 4)


def test_a_quadratic_penalty_is_a_shift_of_the_target():
    """|f − y|² + λ|f − c|² = (1 + λ) |f − (y + λc)/(1 + λ)|² + a constant, and Adam does not mind the factor."""
    def images(y, **options):
        torch.manual_seed(0)
        net = dip.Hourglass(c_in=4, widths=(8, 8), upsample="nearest", padding="zeros")
        return [s.image for s in dip.fit(y, lambda x: x, net, torch.full((1, 4, 16, 16), 0.1), 8, generator(), **options)]
    y, c = torch.rand(2, 1, 3, 16, 16, generator=generator(1))
    seen = []
    def penalty(image, i):
        seen.append(i)
        return 0.5 * (image - c).square().mean()
    ours, theirs, plain = images(y, penalty=penalty), images((y + 0.5 * c) / 1.5), images(y)
    assert (ours[1] - theirs[1]).abs().mean() < 1e-4 < 1e-2 < (ours[1] - plain[1]).abs().mean()      # later, Adam amplifies rounding
    assert seen == list(range(1, 9))


@pytest.mark.parametrize("broken", [False, True])
def test_a_collapse_restores_the_last_good_weights(broken):
    net = Cliff()
    net.broken = broken
    steps = list(dip.fit(torch.full((1, 1, 4, 4), 0.7), lambda x: x, net, torch.zeros(1, 1, 4, 4), 120, generator(), lr=0.05))
    assert not steps[69].misfit <= 1                                                          # it did fall
    assert steps[70].misfit < 0.01 and steps[-1].misfit < 0.01
    assert steps[-1].average.isfinite().all() and (steps[-1].average - 0.7).abs().max() < 0.3        # the fall is not averaged


# ------------------------------------------------------------------------------------------------- stop rules

def steps_of(images, misfits=None):
    misfits = misfits or [0.0] * len(images)
    return [dip.Step(i + 1, x, x, m) for i, (x, m) in enumerate(zip(images, misfits))]


def feed(rule, steps):
    for step in steps:
        if rule(step):
            return step.i
    return None


def valley(values, patience):
    """Slow specification: the first index whose value nothing in the next `patience` values goes below."""
    best = 0
    for i, v in enumerate(values):
        if v < values[best]:
            best = i
        elif i - best >= patience:
            return best, i
    return best, None


@given(seed=st.integers(0, 999), window=st.integers(2, 12), patience=st.integers(1, 20))
def test_windowed_variance_against_its_definition(seed, window, patience):
    images = torch.randn(60, 1, 1, 3, 3, generator=generator(seed)) * torch.linspace(2, 0.5, 60)[:, None, None, None, None]
    values = [((w := images[i - window + 1:i + 1]) - w.mean(0)).square().mean().item() for i in range(window - 1, 60)]
    best, fired = valley(values, patience)
    rule = dip.WindowedVariance(window, patience)
    assert feed(rule, steps_of(images)) == (fired + window if fired is not None else None)
    assert rule.best == best + window


@given(seed=st.integers(0, 999), alpha=st.floats(0.05, 0.9), skip=st.integers(1, 20), patience=st.integers(1, 20))
def test_moving_variance_against_its_definition(seed, alpha, skip, patience):
    images = torch.randn(60, 1, 1, 3, 3, generator=generator(seed), dtype=torch.float64)
    mean, variance, values = images[0], 0.0, []
    for i, x in enumerate(images):
        variance = (1 - alpha) * (variance + alpha * (x - mean).square().mean().item())
        mean = (1 - alpha) * mean + alpha * x
        if i >= skip:
            values.append(variance)
    best, fired = valley(values, patience)
    rule = dip.MovingVariance(alpha, patience, skip)
    assert feed(rule, steps_of(images)) == (fired + skip + 1 if fired is not None else None)
    assert rule.best == best + skip + 1


def test_fixed_budget_and_discrepancy():
    images = [torch.zeros(1, 1, 2, 2)] * 9
    rule = dip.FixedBudget(4)
    assert feed(rule, steps_of(images)) == 4 and rule.best == 4
    rule = dip.Discrepancy(sigma=0.1, tau=1.5)
    assert feed(rule, steps_of(images, [0.05, 0.02, 0.0151, 0.0149, 0.01, 0, 0, 0, 0])) == 4 and rule.best == 4
    rule = dip.Discrepancy(sigma=0.1)
    assert feed(rule, steps_of(images, [0.05] * 9)) is None and rule.best == 9


def test_held_out_measurements_decide():
    """The error is taken where `unseen` is 1 and nowhere else."""
    unseen = torch.zeros(1, 1, 2, 2)
    unseen[..., 0, 0] = 1
    y = torch.zeros(1, 3, 2, 2)
    images = [torch.full((1, 3, 2, 2), 9.0) for _ in range(8)]
    for image, value in zip(images, [5, 3, 2, 1, 2, 3, 4, 5]):
        image[..., 0, 0] = value
    rule = dip.HeldOut(y, lambda x: x, unseen, patience=3)
    assert feed(rule, steps_of(images)) == 7 and rule.best == 4 and rule.least == pytest.approx(1.0)


def test_the_original_denoises_and_then_forgets():
    """The claim of the paper in small: a smooth picture plus noise; the fit passes closer to the truth than its end."""
    grid = torch.linspace(0, 3.14, 32)
    clean = (0.5 + 0.4 * torch.sin(grid)[:, None] * torch.cos(2 * grid)).expand(1, 3, 32, 32)
    y = clean + 0.2 * torch.randn(clean.shape, generator=generator())
    torch.manual_seed(0)
    net = dip.Hourglass(16, 3, (32, 32, 32), upsample="nearest", padding="zeros")
    errors = np.array([(s.image - clean).square().mean().item() for s in
                       dip.fit(y, lambda x: x, net, dip.random_input((32, 32), generator(), 16), 400, generator())])
    assert errors.min() < 0.25 * 0.2 ** 2 and errors[-1] > 2 * errors.min() and 20 < errors.argmin() < 300
