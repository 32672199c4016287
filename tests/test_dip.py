"""Deep image prior: operators, network, fit and method by their laws; rules against slow copies of them."""
import math

import pytest
import torch
import torch.nn as nn
from hypothesis import given, strategies as st

import dip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def fresh(problem, g, copies=1):
    _, channels, *size = problem.shape
    n = copies * len(problem.y)
    torch.manual_seed(int(torch.randint(2 ** 31, (1,), generator=g)))
    net = dip.Hourglass(4, channels, (8, 8), copies=n).to(memory_format=torch.channels_last)
    return net, torch.cat([dip.random_input(size, g, 4) for _ in range(n)])


def smooth(B, sigma=0.0):
    """The problem of B pictures with brightness rising from left to right, each in its own way, and noise."""
    x = torch.linspace(0, 0.4, 16).expand(B, 1, 16, 16) * torch.linspace(0.5, 1, B).reshape(B, 1, 1, 1)
    return dip.Problem(x + sigma * noise(*x.shape, seed=9), dip.identity(), sigma)


def fitted(problem, steps, **options):
    g = generator(1)
    return list(dip.fit(problem.y, problem.operator.A, *fresh(problem, g), steps, g, **options))


def restored(problem, **options):
    return list(dip.deep_image_prior(problem, fresh, generator(1), **options))


def random_mask(share, h=16, w=16, seed=0):
    return (torch.rand(1, 1, h, w, generator=generator(seed)) < share).float()


# ------------------------------------------------------------------------------------- problem and operators

OPERATORS = [dip.identity(), dip.mask(random_mask(0.4, 12)), dip.downsample(2), dip.downsample(4)]


@pytest.mark.parametrize("operator", OPERATORS)
def test_pseudo_inverses_are_moore_penrose_and_gradients_the_adjoint(operator):
    """A A⁺ A = A, A⁺ A A⁺ = A⁺, A A⁺ and A⁺ A are symmetric, with A and A⁺ as matrices column by column."""
    A, pinv = operator
    x = noise(1, 1, 12, 16).requires_grad_()
    M = A(torch.eye(192).reshape(192, 1, 12, 16)).flatten(1).T
    y = noise(*A(x).shape, seed=1)
    P = pinv(torch.eye(len(M)).reshape(-1, *y.shape[1:])).flatten(1).T
    adjoint, = torch.autograd.grad((A(x) * y).sum(), x)
    for got, expected in ((M @ P @ M, M), (P @ M @ P, P), (M @ P, (M @ P).T), (P @ M, (P @ M).T),
                          (M @ x.flatten(), A(x).flatten()), (M.T @ y.flatten(), adjoint.flatten())):
        assert torch.allclose(got, expected, atol=1e-5)
    assert set(A(torch.ones(1, 1, 12, 16)).unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_a_problem_knows_of_itself(operator):
    x, other = noise(2, 2, 3, 12, 16)
    problem = dip.Problem(operator.A(x), operator)
    assert problem.shape == x.shape and torch.equal(problem.known, operator.A(torch.ones(1, 1, 12, 16)))
    for one, y in zip(problem.each(), problem.y, strict=True):
        assert torch.equal(one.y, y[None]) and one[1:] == problem[1:]
    # The nearest image that agrees with the measurement; noise need not be met.
    moved = problem.consistent(other)
    assert torch.allclose(operator.A(moved), problem.y, atol=1e-5)
    assert torch.allclose(moved - other, operator.pinv(operator.A(moved - other)), atol=1e-5)
    assert problem._replace(sigma=0.1).consistent(other) is other
    # Of measurements kept back nothing is left. They alone count as error, image by image.
    unseen = problem.known * random_mask(0.3, *problem.known.shape[-2:], seed=5)
    blind = problem.without(unseen)
    assert torch.equal(blind.known, problem.known - unseen) and blind.shape == problem.shape
    assert torch.equal(blind.y, problem.y * (1 - unseen)) and torch.equal(blind.operator.A(x), blind.y)
    error = (operator.A(other) - problem.y)[..., unseen[0, 0] == 1].square().mean((1, 2))
    assert problem.error_on(unseen, other) == pytest.approx(error.tolist(), rel=1e-5)
    assert problem.error_on(0 * unseen, other) == [0, 0]


# --------------------------------------------------------------------------------------------------- network

def test_at_five_scales_of_128_the_network_is_the_originals():
    """Parameters layer by layer: convolutions with bias, each with a batch norm of scale and shift."""
    def unit(a, b, size):
        return a * b * size ** 2 + b + 2 * b
    total = 128 * 3 + 3
    for c in (32, 128, 128, 128, 128):
        total += unit(c, 4, 1) + unit(c, 128, 3) + unit(128, 128, 3)
        total += 2 * 132 + unit(132, 128, 3) + unit(128, 128, 1)
    net = dip.Hourglass()
    assert sum(p.numel() for p in net.parameters()) == total == 2_217_831
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 5 * 5 + 1 and sum(m.stride == (2, 2) for m in convolutions) == 5
    assert all(m.padding_mode == "reflect" for m in convolutions) and net.upsample == "bilinear"
    z = dip.random_input((16, 16), generator())
    assert z.shape == (1, 32, 16, 16) and 0 <= z.min() < 0.001 < 0.099 < z.max() <= 0.1
    assert net(z).shape == (1, 3, 16, 16)


@given(scales=st.integers(1, 3), skip=st.sampled_from([0, 4]), h=st.integers(16, 40), w=st.integers(16, 40),
       kind=st.sampled_from([("nearest", "reflect"), ("bilinear", "zeros")]), c_out=st.sampled_from([1, 3]))
def test_any_size_keeps_size_and_range_and_uses_all_weights(scales, skip, h, w, kind, c_out):
    """An image whose sides are no multiples of 2^scales is continued by its edge, and the output cut."""
    torch.manual_seed(0)
    net, multiple = dip.Hourglass(4, c_out, (6, 8, 10)[:scales], skip, *kind), 2 ** scales
    z = dip.random_input((h, w), generator(), 4)
    image = net(z)
    padded = net(nn.functional.pad(z, (0, -w % multiple, 0, -h % multiple), mode="replicate"))
    assert image.shape == (1, c_out, h, w) and 0 < image.min() and image.max() < 1
    assert torch.equal(padded[..., :h, :w], image)
    image.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("skip, size", [(4, (16, 16)), (0, (16, 24)), (4, (17, 33)), (0, (19, 18))])
def test_networks_that_run_together_are_the_single_networks(skip, size, monkeypatch):
    """Outputs, and a whole fit with all that it yields, given the same weights and the same jitter."""
    torch.manual_seed(0)
    singles = [dip.Hourglass(4, 3, (8, 12), skip) for _ in range(3)]
    for p in nn.ModuleList(singles).parameters():
        nn.init.normal_(p, std=0.3)
    together = dip.Hourglass(4, 3, (8, 12), skip, copies=3)
    together.load_copies(singles)
    z, y = torch.rand(3, 4, *size, generator=generator()), torch.rand(3, 3, *size, generator=generator(1))
    for k in range(3):
        assert (together(z)[k] - singles[k](z[k:k + 1])[0]).abs().max() <= 1e-5

    def fit(net, part):
        rows = iter([noise(*z.shape, seed=i)[part] for i in range(8)])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda shape, generator: next(rows))
            z_part, y_part = z[part].double(), y[part].double()
            return list(dip.fit(y_part, lambda x: x, net.double(), z_part, 8, None, floor=0.05))
    joint = fit(together, slice(None))
    for k in range(3):
        for ours, theirs in zip(joint, fit(singles[k], slice(k, k + 1)), strict=True):
            assert all((a[k] - b[0]).abs().max() <= 1e-9 for a, b in zip(ours[1:], theirs[1:]))


# ---------------------------------------------------------------------------------------------- fitting loop

class Scripted(nn.Module):
    """n networks with images of one pixel that are written down: misfits[i, k] from 0 at step i + 1."""

    def __init__(self, misfits):
        super().__init__()
        self.misfits, self.seen = iter(misfits), []
        self.w = nn.Parameter(torch.zeros(misfits.shape[1], 1, 1, 1))

    def forward(self, z):
        self.seen.append(z)
        return 0 * self.w + next(self.misfits).sqrt().reshape(-1, 1, 1, 1)


def falls_and_averages(misfits, floor):
    """Slow copy of guard and average: whether each network falls at each step, and its average, (steps, n).

    Images weigh 0.99^age; those that fell, nothing; those after the floor was met, all alike. What came
    before then weighs as much as a hundred of them.
    """
    typical = good = misfits[0]
    weights, settled, rows = misfits[:0], torch.zeros(misfits.shape[1], dtype=torch.bool), []
    for i, now in enumerate(misfits, 1):
        fallen = ~(now <= 3 * typical) & (i > 50)
        typical = torch.where(fallen, good, 0.95 * typical + 0.05 * now)
        if i % 50 == 0 and not fallen.any():
            good = typical
        faded = torch.where(settled | fallen, weights, 0.99 * weights)
        weights = torch.cat([faded, 1.0 - fallen.float()[None]])
        rows.append((fallen, (weights * misfits[:i].sqrt().nan_to_num()).sum(0) / weights.sum(0)))
        met = (now <= floor) & ~settled & (floor > 0)
        weights = torch.where(met, 100 * weights / weights.sum(0), weights)
        settled = settled | met
    return [torch.stack(column) for column in zip(*rows)]


@given(seed=st.integers(0, 999), n=st.integers(1, 3), floor=st.sampled_from([0.0, 0.02, 0.2]))
def test_guard_floor_and_average_against_a_slow_copy(seed, n, floor):
    """With floor 0 even a misfit of exactly 0 is no floor. And jitter is fresh noise at every step."""
    g, calls, z = generator(seed), [], torch.zeros(n, 4, 20, 20)
    misfits = torch.randn(170, n, generator=g).mul(0.6).exp() * torch.logspace(0, -1, 170)[:, None]
    misfits[20] = 0.0
    misfits[50:][torch.rand(120, n, generator=g) < 0.01] = math.nan

    def penalty(images, i):
        calls.append(i)
        return 0 * images.sum()
    net, (falls, averages) = Scripted(misfits), falls_and_averages(misfits, floor)
    run = dip.fit(torch.zeros(n, 1, 1, 1), lambda x: x, net, z, 170, g, floor=floor, penalty=penalty)
    assert torch.allclose(torch.stack([step.average.flatten() for step in run]), averages, rtol=1e-4)
    assert calls == [i for i, row in enumerate(falls, 1) if not row.any()]
    jitter = torch.stack(net.seen)
    assert jitter.std().item() == pytest.approx(1 / 30, rel=0.01) and jitter.mean(0).abs().max() < 0.015


@pytest.mark.parametrize("value", [math.nan, 20.0])
def test_a_collapse_takes_one_network_back_and_leaves_the_others_alone(value):
    problem, pushed, g = smooth(3), [], generator(1)
    net, z = fresh(problem, g)
    for step in dip.fit(problem.y, problem.operator.A, net, z, 90, g, jitter=0.0):
        pushed.append(step)
        if step.i == 69:
            net.image[0].bias.data[1] = value
    calm = fitted(problem, 90, jitter=0.0)
    for ours, theirs in zip(pushed, calm, strict=True):
        assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(ours[1:], theirs[1:]))
    assert torch.equal(pushed[69].average[1], pushed[68].average[1]) and pushed[-1].average.isfinite().all()
    # Weights and moments are those of step 50; only the bias correction of Adam has moved on.
    assert torch.equal(pushed[70].image[1], calm[49].image[1])
    assert all(torch.allclose(pushed[70 + k].image[1], calm[49 + k].image[1], atol=2e-3) for k in range(10))


def test_the_guard_does_not_lock_on_a_flat_graphic():
    """A disc without noise is met ever more closely: what was a good misfit 50 steps ago is no collapse."""
    grid, g = torch.arange(48) - 23.5, generator()
    disc = (grid[:, None] ** 2 + grid ** 2 < 15 ** 2).float()
    torch.manual_seed(0)
    net, z = dip.Hourglass(8, 3, (16, 16, 16)), dip.random_input((48, 48), g, 8)
    run = dip.fit((0.2 + 0.6 * disc).expand(1, 3, 48, 48), lambda x: x, net, z, 540, g)
    averages = [step.average for step in run]
    thrown = [torch.equal(a, b) for a, b in zip(averages[340:], averages[339:])]
    assert sum(thrown) <= 0.06 * len(thrown)


def test_below_the_floor_weights_stand_still():
    first, second = fitted(smooth(2), 1)[0].misfit.tolist()
    steps = fitted(smooth(2), 4, floor=(first + second) / 2, jitter=0.0)
    still = [torch.equal(a, b) for a, b in zip(steps[0].image, steps[-1].image)]
    assert still == [first < second, second < first]


# ---------------------------------------------------------------------------- stop rules and DIP as a method

def outcome(rule, images, misfits=(0.0,) * 60):
    """When the rule stops a fit with these images (None: never), and its best step."""
    steps = [dip.Step(i, x, x, torch.tensor([m])) for i, (x, m) in enumerate(zip(images, misfits), 1)]
    return next((step.i for step in steps if rule(step)), None), rule.best


def valley(values, patience, skipped=0):
    """Slow copy: the step `patience` after the least value, and the step of that value, counted from 1."""
    best = 0
    for i, value in enumerate(values):
        if value < values[best]:
            best = i
        elif i - best >= patience:
            return i + 1 + skipped, best + 1 + skipped
    return None, best + 1 + skipped


@given(seed=st.integers(0, 99), n=st.integers(2, 12), alpha=st.floats(0.1, 0.9), patience=st.integers(1, 20))
def test_windowed_and_moving_variance_against_their_definitions(seed, n, alpha, patience):
    images = noise(60, 1, 1, 3, 3, seed=seed).double() * torch.linspace(2, 0.5, 60).reshape(-1, 1, 1, 1, 1)
    windows = [images[i:i + n] for i in range(60 - n + 1)]
    values = [(window - window.mean(0)).square().mean().item() for window in windows]
    assert outcome(dip.WindowedVariance(n, patience), images) == valley(values, patience, n - 1)
    mean, variance, values = images[0], 0.0, []
    for x in images:
        variance = (1 - alpha) * (variance + alpha * (x - mean).square().mean().item())
        mean = (1 - alpha) * mean + alpha * x
        values.append(variance)
    assert outcome(dip.MovingVariance(alpha, patience, skip=n), images) == valley(values[n:], patience, n)


class Least(dip.Valley):
    def __call__(self, step):
        self.facts = {"watched": step.i}
        return self.record(step.i, step.misfit.mean().item())


@given(seed=st.integers(0, 99), watch=st.booleans(), B=st.integers(1, 3), copies=st.integers(1, 2),
       sigma=st.sampled_from([0.0, 0.1]))
def test_rules_are_followed_picture_by_picture(seed, watch, B, copies, sigma):
    """Each rule judges its own networks and delivers the mean of their averages at its best step."""
    averages, misfits = noise(30, B * copies, 1, 2, 2, seed=seed), noise(30, B * copies, seed=seed).exp()
    # At first the last picture has no best step; then its current image is delivered.
    misfits[:3, -copies:] = math.inf
    steps = [dip.Step(i, a + 1, a, m) for i, (a, m) in enumerate(zip(averages, misfits), 1)]
    problem = dip.Problem(torch.zeros(B, 1, 2, 2), dip.mask(torch.eye(2)[None, None]), sigma)
    rules = {"first": [Least(3 + b) for b in range(B)], "second": [Least(5 - b) for b in range(B)]}
    means, scores = (values.unflatten(1, (B, copies)).mean(2) for values in (averages, misfits))
    means = problem.consistent(means)
    delivered = list(dip.follow(problem, iter(steps), rules, watch=watch))
    ends = [valley(scores[:, b].tolist(), 3 + b)[0] or 30 for b in range(B)]
    assert len(delivered) == (30 if watch else max(ends))
    for i, offer in enumerate(delivered, 1):
        assert torch.equal(offer.now, means[i - 1]) and list(offer.others) == ["second"]
        for name, found in (("first", offer), ("second", offer.others["second"])):
            for b, rule in enumerate(rules[name]):
                fired, best = valley(scores[:i, b].tolist(), rule.patience)
                best, end = best if scores[best - 1, b] < math.inf else i, fired or i
                facts = {"watched": end, "step": best, "stopped": end, "updates": end * copies}
                assert {fact: values[b] for fact, values in found.facts.items()} == facts
                assert torch.equal(found.image[b], means[best - 1, b])


def test_with_noise_morozovs_principle_stops_each_picture_and_neighbours_do_not_matter():
    problem = smooth(2, sigma=0.1)
    got = restored(problem, lr=0.02)
    plain = fitted(problem, len(got), lr=0.02)
    reached = torch.stack([step.misfit for step in plain]) <= 0.92 * 0.1 ** 2
    ends = [reached[:, b].tolist().index(True) + 1 for b in range(2)]
    assert got[-1].facts == {"step": ends, "stopped": ends, "updates": ends}
    assert len(got) == max(ends) > min(ends)
    for b, end in enumerate(ends):
        assert torch.equal(got[-1].image[b], plain[end - 1].average[b])
    other = restored(problem._replace(y=problem.y * torch.tensor([1, 0.9]).reshape(2, 1, 1, 1)), lr=0.02)[-1]
    assert torch.equal(other.image[0], got[-1].image[0]) and other.facts["step"][0] == ends[0]


@pytest.mark.parametrize("side, updates", [(16, 100), (32, 141)])
def test_without_noise_the_budget_grows_with_the_root_of_the_side(side, updates):
    steps = restored(dip.Problem(torch.full((1, 1, side, side), 0.5), dip.identity()))
    assert len(steps) == updates == steps[-1].facts["updates"][0]
