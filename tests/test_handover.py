"""Handing over: DIP's picture enters the reverse chain, and the diffusion model pulls at DIP's picture.

Exact denoisers (one point, a Gaussian) make both chains affine, so whole laws can be computed; the rest are limits in which a hybrid
is one of its parents.
"""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ddpm
import dip
import hybrid

SCHEDULE = ddpm.cosine(1000)
MEAN, STD = 0.2, 0.5                                   # the Gaussian that pictures are drawn from, in [-1, 1]
variances = st.floats(1e-4, 1.0)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(s, mean=MEAN, std=STD):
    """E[x0 | xt] for x0 ~ N(mean, std²)."""
    def denoise(xt, t):
        a, b = s.alpha_bar[t].item(), 1 - s.alpha_bar[t].item()
        return mean + math.sqrt(a) * std ** 2 / (a * std ** 2 + b) * (xt - math.sqrt(a) * mean)
    return denoise


def pull(s, t, std=STD):
    """How much of a picture's distance to the mean the Gaussian's denoiser leaves at step t, on average over the noise."""
    a = s.alpha_bar[t].item()
    return a * std ** 2 / (a * std ** 2 + 1 - a)


def curve(*values):
    return torch.tensor(values, dtype=torch.float64)


def pixel(value, copies=1):
    return torch.full((copies, 1, 1, 1), float(value))


def law(x, eps):
    """Mean and deviation of x, an affine function of standard normal numbers eps."""
    design = torch.stack([torch.ones(len(eps)), eps.flatten()], 1).double()
    solution = torch.linalg.lstsq(design, x.flatten().double()[:, None]).solution.flatten()
    assert (design @ solution - x.flatten()).abs().max() < 1e-4
    return solution[0].item(), abs(solution[1].item())


def total_variation(p, q):
    """½ ∫ |p − q| of two normal laws (mean, deviation), by the trapezium rule."""
    (a, u), (b, v) = p, q
    x = torch.linspace(min(a, b) - 9 * max(u, v), max(a, b) + 9 * max(u, v), 20001, dtype=torch.float64)
    density = [torch.exp(-(x - m) ** 2 / (2 * d ** 2)) / (d * math.sqrt(2 * math.pi)) for m, d in (p, q)]
    return torch.trapezoid((density[0] - density[1]).abs(), x).item() / 2


def small(seed=0, channels=3):
    """A small network and its input."""
    torch.manual_seed(seed)
    return dip.Hourglass(c_in=4, c_out=channels, widths=(8, 8), upsample="nearest", padding="zeros"), dip.random_input((16, 16), gen(seed), 4)


class Pixels(torch.nn.Module):
    """A network without structure: its weights are the picture, its input is ignored."""

    def __init__(self, start):
        super().__init__()
        self.image = torch.nn.Parameter(start.clone())

    def forward(self, z):
        return 1 * self.image


# ------------------------------------------------------------------------------------------------- error curve

@pytest.mark.parametrize("make", [ddpm.linear, ddpm.cosine])
def test_the_error_of_an_exact_denoiser_is_the_posterior_variance(make):
    """Data N(m, s²) in [-1, 1] leave s² (1−ᾱ) / (ᾱ s² + 1−ᾱ); a quarter of that in [0, 1]: never more than σ_t² or than the data's variance."""
    s, ts, asked = make(1000), [1, 50, 200, 500, 800, 1000], []
    def denoise(xt, t):
        asked.append(t)
        return gaussian(s)(xt, t)
    x0 = ddpm.to_image(MEAN + STD * torch.randn(40, 1, 20, 20, generator=gen()))
    v = hybrid.error_curve(denoise, s, x0, ts, gen(1))
    assert asked == ts
    assert v.shape == (1001,) and v[0] == 0 and (v[1:] > 0).all()
    for t in ts:
        a = s.alpha_bar[t].item()
        assert v[t].item() == pytest.approx(STD ** 2 * (1 - a) / (a * STD ** 2 + 1 - a) / 4, rel=0.05)
        assert v[t].item() < 1.05 * min(ddpm.noise_level(s)[t].item() ** 2, STD ** 2 / 4)
    assert torch.equal(v, hybrid.error_curve(gaussian(s), s, x0, ts, gen(1)))


def test_between_its_steps_the_error_curve_is_straight_in_the_logarithm_and_outside_it_is_level():
    s, ts = ddpm.cosine(100), [10, 30, 35, 80]
    x0 = ddpm.to_image(MEAN + STD * torch.randn(4, 1, 20, 20, generator=gen()))
    v = hybrid.error_curve(gaussian(s), s, x0, ts, gen(1))
    for n in (2, 3):                                                                    # later steps change nothing before them
        assert torch.allclose(hybrid.error_curve(gaussian(s), s, x0, ts[:n], gen(1))[:ts[n - 1] + 1], v[:ts[n - 1] + 1])
    assert (v[1:].diff() >= 0).all() and (v[10:81].diff() > 0).all()
    for a, b in zip(ts, ts[1:]):
        line = v[a].log() + (v[b] / v[a]).log() * torch.linspace(0, 1, b - a + 1)
        assert torch.allclose(v[a:b + 1].log(), line, atol=1e-4)
    assert torch.equal(v[1:11], v[10].expand(10)) and torch.equal(v[80:], v[80].expand(21))


# ---------------------------------------------------------------------------------------------------- entrance

@given(st.floats(1e-8, 1.0), st.floats(0.25, 4.0), st.sampled_from([ddpm.linear, ddpm.cosine]))
def test_a_picture_enters_where_its_error_is_the_noise(error, kappa, make):
    s = make(1000)
    levels, t = ddpm.noise_level(s), hybrid.enter_step(s, error, kappa)
    distance = (levels[1:].log() - math.log(kappa * math.sqrt(error))).abs()
    assert 1 <= t <= s.T and distance[t - 1] == distance.min()
    assert t <= hybrid.enter_step(s, 1.1 * error, kappa) and t <= hybrid.enter_step(s, error, 1.1 * kappa)
    assert t == hybrid.enter_step(s, kappa ** 2 * error)


def test_a_better_picture_enters_later_and_an_estimate_below_zero_last():
    errors = torch.logspace(-7, 0, 30).tolist()
    ts = [hybrid.enter_step(SCHEDULE, error) for error in errors]
    assert ts == sorted(ts) and len(set(ts)) > 20
    assert hybrid.enter_step(SCHEDULE, -0.01) == hybrid.enter_step(SCHEDULE, 0.0) == 1
    assert all(hybrid.enter_step(SCHEDULE, ddpm.noise_level(SCHEDULE)[t].item() ** 2) == t for t in (1, 20, 300, 1000))


# --------------------------------------------------------------------------------------------------- hand-over

@pytest.mark.parametrize("make", [ddpm.linear, ddpm.cosine])
def test_entering_at_the_far_end_is_diffusion_alone(make):
    s, f = make(1000), torch.rand(6, 1, 4, 4, generator=gen(3))
    left = s.alpha_bar[-1].sqrt().item()
    ours = list(hybrid.hand_over(f, gaussian(s), s, s.T, 12, gen()))
    alone = list(ddpm.ddim(gaussian(s), s, torch.randn(f.shape, generator=gen()), 12, gen(9)))
    assert [a.t for a in ours[1:]] == [b.t for b in alone]
    for a, b in zip(ours[1:], alone):
        assert (a.x - b.x).abs().max() < 1.5 * left + 1e-5
    other = list(hybrid.hand_over(1 - f, gaussian(s), s, s.T, 12, gen()))
    assert (ours[-1].x - other[-1].x).abs().max() < 2 * left + 1e-5 < 0.02


def test_entering_at_the_clean_end_is_no_diffusion_at_all():
    f, known = torch.rand(2, 3, 4, 4, generator=gen()), (torch.rand(1, 1, 4, 4, generator=gen(1)) > 0.5).float()
    def never(xt, t):
        raise AssertionError("the model was asked")
    only, = hybrid.hand_over(f, never, SCHEDULE, 0, 10, gen())
    assert only.t == 0 and torch.allclose(ddpm.to_image(only.x), f, atol=1e-6) and torch.allclose(only.x0_hat, only.x)
    y = known * torch.rand(1, 3, 4, 4, generator=gen(2))
    only, = hybrid.hand_over(f, never, SCHEDULE, 0, 10, gen(), refine=hybrid.agree(y, dip.mask(known), 0.0, torch.zeros(1001)))
    assert torch.allclose(ddpm.to_image(only.x), y + (1 - known) * f, atol=1e-6)


@given(st.integers(1, 1000), st.integers(1, 15), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_hand_over_diffuses_the_refined_picture_and_takes_it_back_by_ddim(t, steps, eta, seed):
    f, seen, calls = torch.rand(2, 1, 3, 3, generator=gen(seed)), [], []
    def refine(x0_hat, t):
        seen.append(t)
        return 0.5 * x0_hat
    def denoise(xt, t):
        calls.append(t)
        return gaussian(SCHEDULE)(xt, t)
    first, *rest = hybrid.hand_over(f, denoise, SCHEDULE, t, steps, gen(seed), eta=eta, refine=refine)
    assert first.t == t and torch.allclose(first.x0_hat, f - 0.5)
    g = gen(seed)
    assert torch.allclose(first.x, ddpm.q_sample(SCHEDULE, f - 0.5, t, torch.randn(f.shape, generator=g)), atol=1e-6)
    assert seen == [t, *calls] and calls == [t, *(a.t for a in rest[:-1])] and len(calls) == min(steps, t) and rest[-1].t == 0
    for a, b in zip(rest, ddpm.ddim(denoise, SCHEDULE, first.x, steps, g, eta, t, refine)):
        assert a.t == b.t and torch.equal(a.x, b.x) and torch.equal(a.x0_hat, b.x0_hat)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_same_seed_repeats_the_stream_and_copies_differ(eta):
    f = torch.rand(1, 1, 4, 4, generator=gen()).expand(3, 1, 4, 4)
    one, two, other = (list(hybrid.hand_over(f, gaussian(SCHEDULE), SCHEDULE, 400, 8, gen(seed), eta=eta)) for seed in (1, 1, 2))
    assert all(torch.equal(a.x, b.x) for a, b in zip(one, two)) and not torch.allclose(one[-1].x, other[-1].x, atol=0.05)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (one[-1].x[i] - one[-1].x[j]).abs().mean() > 0.1


@pytest.mark.parametrize("t", [1, 100, 1000])
def test_one_point_data_are_reached_from_every_entrance(t):
    point = torch.rand(1, 1, 4, 4, generator=gen(1))
    *_, end = hybrid.hand_over(torch.rand(2, 1, 4, 4, generator=gen()), lambda xt, t: point.expand_as(xt), SCHEDULE, t, 6, gen(), eta=0.3)
    assert torch.allclose(end.x, point.expand_as(end.x), atol=1e-5)


@pytest.mark.parametrize("t", [100, 400, 700])
def test_gaussian_data_forget_the_entrance_as_the_flow_says(t):
    """With all steps DDIM is the probability flow, which keeps (x − √ᾱ m) / √(ᾱ s² + 1−ᾱ): so f at t ends at a known normal law."""
    s, f = ddpm.linear(1000), pixel(0.9, 50)
    a = s.alpha_bar[t].item()
    *_, end = hybrid.hand_over(f, gaussian(s), s, t, t, gen())
    mean, deviation = law(end.x, torch.randn(f.shape, generator=gen()))
    gain = STD / math.sqrt(a * STD ** 2 + 1 - a)
    assert mean == pytest.approx(MEAN + gain * math.sqrt(a) * (0.8 - MEAN), abs=0.01)
    assert deviation == pytest.approx(gain * math.sqrt(1 - a), rel=0.02)


# --------------------------------------------------------------------------- what entering with the wrong picture costs

@given(st.floats(0, 1), st.floats(0, 1), st.integers(5, 1000), st.sampled_from([ddpm.linear, ddpm.cosine]))
def test_the_divergence_of_the_starts_is_half_the_signal_to_noise_times_the_squared_error(f, x0, t, make):
    """KL = ½ SNR ‖f − x0‖² in [-1, 1], which in [0, 1] is ½ ‖f − x0‖² / σ_t²."""
    s, eps = make(1000), torch.randn(20, 1, 1, 1, generator=gen())
    (a, u), (b, v) = (law(next(hybrid.hand_over(pixel(p, 20), gaussian(s), s, t, 5, gen())).x, eps) for p in (f, x0))
    divergence = math.log(v / u) + (u ** 2 + (a - b) ** 2) / (2 * v ** 2) - 0.5
    snr = (s.alpha_bar[t] / (1 - s.alpha_bar[t])).item()
    assert divergence == pytest.approx(0.5 * snr * (2 * f - 2 * x0) ** 2, rel=1e-3, abs=1e-4)
    assert divergence == pytest.approx(0.5 * (f - x0) ** 2 / ddpm.noise_level(s)[t].item() ** 2, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("make", [ddpm.linear, ddpm.cosine])
@pytest.mark.parametrize("error", [0.05, 0.3])
def test_outputs_differ_by_no_more_than_the_starts_allow(make, error):
    """Data processing and Pinsker: TV ≤ ½ √SNR ‖f − x0‖. The deterministic chain can be undone, so it keeps TV; noise on the way lowers it."""
    s, x0, n = make(1000), 0.4, 4000
    eps, before = torch.randn(n, 1, 1, 1, generator=gen()), 1.0
    for t in (100, 250, 500, 750, 1000):
        (start, end), (start0, end0) = ([law(sample.x, eps) for sample in (chain[0], chain[-1])] for chain in (
            list(hybrid.hand_over(pixel(p, n), gaussian(s), s, t, 10, gen())) for p in (x0 + error, x0)))
        distance, snr = total_variation(end, end0), (s.alpha_bar[t] / (1 - s.alpha_bar[t])).item()
        assert distance <= 0.5 * math.sqrt(snr) * 2 * error + 1e-6 and distance < before
        assert distance == pytest.approx(total_variation(start, start0), abs=1e-3)
        assert distance == pytest.approx(math.erf(math.sqrt(snr / 8) * 2 * error), abs=1e-3)
        noisy, noisy0 = (list(hybrid.hand_over(pixel(p, n), gaussian(s), s, t, 10, gen(), eta=1.0))[-1].x for p in (x0 + error, x0))
        assert total_variation(*((x.mean().item(), noisy.std().item()) for x in (noisy, noisy0))) < distance
        before = distance
    assert before < 0.01


# ------------------------------------------------------------------------------------------------------- hooks

def test_hooks_in_turn_are_applied_the_first_one_first_and_all_see_the_step():
    seen = []
    def hook(name, change):
        def refine(x0_hat, t):
            seen.append((name, t))
            return change(x0_hat)
        return refine
    double, more = hook("double", lambda x: 2 * x), hook("more", lambda x: x + 1)
    one = torch.ones(1, 1, 1, 1)
    assert hybrid.in_turn(double, more)(one, 7).item() == 3 and seen == [("double", 7), ("more", 7)]
    assert hybrid.in_turn(more, double)(one, 7).item() == 4
    assert hybrid.in_turn()(one, 7) is one and hybrid.in_turn(double)(one, 7).item() == 2
    assert hybrid.in_turn(more, hybrid.in_turn(double, more))(one, 1).item() == hybrid.in_turn(hybrid.in_turn(more, double), more)(one, 1).item() == 5


OPERATORS = {"mask": dip.mask((torch.rand(1, 1, 8, 8, generator=gen(8)) > 0.6).float()), "downsample": dip.downsample(4), "identity": dip.identity()}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("led", [False, True])
def test_without_noise_every_guess_of_the_chain_agrees_with_the_measurement(name, eta, led):
    """A x̂₀ = y at the entrance, at every step and at the end, whatever f says, also behind another hook."""
    operator, v = OPERATORS[name], torch.linspace(0, 0.05, 1001)
    y = operator.A(torch.rand(1, 3, 8, 8, generator=gen(2)))
    f = torch.rand(2, 3, 8, 8, generator=gen(3))
    refine = hybrid.agree(y, operator, 0.0, v)
    refine = hybrid.in_turn(hybrid.lean_on(f, 0.01, v), refine) if led else refine
    samples = list(hybrid.hand_over(f, gaussian(SCHEDULE), SCHEDULE, 500, 7, gen(), eta=eta, refine=refine))
    for sample in samples:
        assert (operator.A(ddpm.to_image(sample.x0_hat)) - y).abs().max() < 1e-5
    assert (operator.A(ddpm.to_image(samples[-1].x)) - y).abs().max() < 1e-5


@given(st.sampled_from(["mask", "downsample"]), st.floats(0, 0.5), st.integers(0, 99))
def test_agreeing_moves_a_guess_within_the_range_only_and_towards_the_measurement(name, sigma, seed):
    """The null space of A, which the measurement does not see, is left to the model; the misfit shrinks by 1 − w."""
    operator = OPERATORS[name]
    x0_hat, y = torch.randn(1, 3, 8, 8, generator=gen(seed)), operator.A(torch.rand(1, 3, 8, 8, generator=gen(seed + 1)))
    image, moved = (ddpm.to_image(x) for x in (x0_hat, hybrid.agree(y, operator, sigma, curve(0, 0.04))(x0_hat, 1)))
    hidden = lambda x: x - operator.pinv(operator.A(x))                                                    # noqa: E731
    assert torch.allclose(hidden(moved), hidden(image), atol=1e-5)
    w = 0.04 / (0.04 + sigma ** 2)
    assert torch.allclose(operator.A(moved) - y, (1 - w) * (operator.A(image) - y), atol=1e-5)


def weight_on(fused):
    """The weight of a fusion on its second opinion: what it makes of the two pictures 0 and 1, in [0, 1]."""
    w, rest = (ddpm.to_image(fused(*(torch.full((1, 1, 1, 1), b, dtype=torch.float64) for b in bits))).item() for bits in ((0., 1.), (1., 0.)))
    assert w + rest == pytest.approx(1, abs=1e-12)
    return w


def opinions(kind, a, b):
    """(x̂₀ with error variance a, the other picture with variance b) → the fusion, as a function of the two pictures."""
    if kind == "agree":
        return lambda guess, y: hybrid.agree(y, dip.identity(), math.sqrt(b), curve(0, 9, a))(ddpm.to_diffusion(guess), 2)
    return lambda guess, f: hybrid.lean_on(f, b, curve(0, 9, a))(ddpm.to_diffusion(guess), 2)


@pytest.mark.parametrize("kind", ["agree", "lean on"])
@given(a=variances, b=variances)
def test_no_other_weight_fuses_independent_errors_better(kind, a, b):
    """Errors of variance a and b leave (1−w)² a + w² b, at best ab/(a+b): below both."""
    w = weight_on(opinions(kind, a, b))
    left = lambda w: (1 - w) ** 2 * a + w ** 2 * b                                                         # noqa: E731
    assert left(w) == pytest.approx(a * b / (a + b), rel=1e-9) and left(w) < min(a, b)
    assert all(left(w) <= left(other) + 1e-15 for other in torch.linspace(-1, 2, 31).tolist())


@pytest.mark.parametrize("kind", ["agree", "lean on"])
def test_fused_errors_are_as_small_as_promised(kind):
    a, b = 0.02, 0.01
    x, e, n = torch.randn(3, 1, 1, 300, 300, generator=gen(), dtype=torch.float64)
    fused = ddpm.to_image(opinions(kind, a, b)(x + math.sqrt(a) * e, x + math.sqrt(b) * n))
    assert (fused - x).square().mean().item() == pytest.approx(a * b / (a + b), rel=0.03)


@pytest.mark.parametrize("kind", ["agree", "lean on"])
def test_the_worse_opinion_does_not_count(kind):
    assert weight_on(opinions(kind, 0.01, 1e12)) < 1e-10 and weight_on(opinions(kind, 1e12, 0.01)) > 1 - 1e-10


def test_a_worthless_picture_leaves_the_chain_alone_and_a_perfect_one_ends_it():
    f, v = torch.rand(2, 1, 4, 4, generator=gen(1)), torch.linspace(0, 0.05, 1001)
    chain = lambda **more: list(hybrid.hand_over(f, gaussian(SCHEDULE), SCHEDULE, 600, 9, gen(), eta=0.4, **more))       # noqa: E731
    plain, alone, led = chain(), chain(refine=hybrid.lean_on(1 - f, math.inf, v)), chain(refine=hybrid.lean_on(1 - f, 0.0, v))
    for a, b, c in zip(plain, alone, led):
        assert torch.equal(a.x, b.x) and torch.equal(a.x0_hat, b.x0_hat) and torch.allclose(ddpm.to_image(c.x0_hat), 1 - f, atol=1e-6)
    assert torch.allclose(ddpm.to_image(led[-1].x), 1 - f, atol=1e-6)


def test_moving_the_guess_moves_the_noise():
    """x_t = √ᾱ x̃₀ + √(1−ᾱ) ε̃ holds for the fused guess too, and the next state is made of the same two."""
    f, v = torch.rand(1, 1, 4, 4, generator=gen(1)), torch.linspace(0, 0.05, 1001)
    before, *rest = hybrid.hand_over(f, gaussian(SCHEDULE), SCHEDULE, 600, 9, gen(), refine=hybrid.lean_on(1 - f, 0.02, v))
    for sample in rest[:-1]:
        guess = gaussian(SCHEDULE)(before.x, before.t)
        fused = (0.02 * guess + v[before.t] * (1 - 2 * f)) / (0.02 + v[before.t])
        now, then = (SCHEDULE.alpha_bar[t].item() for t in (before.t, sample.t))
        noise = (before.x - math.sqrt(now) * fused) / math.sqrt(1 - now)
        assert torch.allclose(sample.x0_hat, fused, atol=1e-5) and not torch.allclose(fused, guess, atol=0.05)
        assert torch.allclose(sample.x, math.sqrt(then) * fused + math.sqrt(1 - then) * noise, atol=1e-5)
        before = sample


# ------------------------------------------------------------------------------------------------------- refit

def test_refits_happen_at_their_steps_only():
    (net, z), y, calls = small(), torch.rand(1, 3, 16, 16, generator=gen(1)), []
    def A(image):
        calls.append(1)
        return image
    refine, untouched = hybrid.refit(y, A, net, z, 4, gen(), [300, 100]), {k: v.clone() for k, v in net.state_dict().items()}
    guess = torch.randn(1, 3, 16, 16, generator=gen(2))
    assert refine(guess, 200) is guess and refine(guess, 0) is guess and not calls
    assert all(torch.equal(v, untouched[k]) for k, v in net.state_dict().items())
    totals = []
    for sample in hybrid.hand_over(y, gaussian(SCHEDULE), SCHEDULE, 500, 5, gen(), refine=refine):
        totals.append((sample.t, len(calls)))
        assert not sample.x.requires_grad
    assert totals == [(500, 0), (400, 0), (300, 0), (200, 4), (100, 4), (0, 8)]
    assert not torch.equal(net.image[0].weight, untouched["image.0.weight"])


@pytest.mark.parametrize("options", [{}, {"lr": 0.003, "average": 0.5}])
def test_a_refit_without_the_guess_is_dip_going_on(options):
    """With weight 0, twice three updates are the average images of two fits of the same network, bit for bit, as guesses in [-1, 1]."""
    (ours, z), (theirs, _), (y, guess), g, h = small(), small(), torch.rand(2, 1, 3, 16, 16, generator=gen(1)), gen(5), gen(5)
    refine = hybrid.refit(y, lambda x: x, ours, z, 3, g, [7], weight=0.0, **options)
    for _ in range(2):
        *_, last = dip.fit(y, lambda x: x, theirs, z, 3, h, **options)
        assert torch.equal(refine(guess, 7), 2 * last.average - 1)


@pytest.mark.parametrize("silent", [True, False])
def test_a_refit_by_the_guess_alone_is_dip_on_the_guess(silent):
    """Either nothing is measured, or the guess weighs so much that it does not matter."""
    (ours, z), (theirs, _), (y, guess) = small(), small(), torch.rand(2, 1, 3, 16, 16, generator=gen(1))
    A, y, weight = (lambda x: 0 * x, 0 * y, 1.0) if silent else (lambda x: x, y, 1e6)
    *_, last = dip.fit(guess, lambda x: x, theirs, z, 5, gen(5))
    got = hybrid.refit(y, A, ours, z, 5, gen(5), [7], weight=weight)(ddpm.to_diffusion(guess), 7)
    assert (ddpm.to_image(got) - last.average).abs().mean() < 1e-3


@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0])
def test_a_refit_settles_between_measurement_and_guess(weight):
    """Free pixels end at (y + w x̂₀) / (1 + w)."""
    y, guess = torch.rand(2, 1, 1, 4, 4, generator=gen(1))
    refine = hybrid.refit(y, lambda x: x, Pixels(torch.full_like(y, 0.5)), torch.zeros(1), 200, gen(), [7], weight=weight, average=0.5)
    assert torch.allclose(ddpm.to_image(refine(ddpm.to_diffusion(guess), 7)), (y + weight * guess) / (1 + weight), atol=5e-3)


def test_a_refit_of_a_fresh_network_comes_closer_to_the_measurement():
    (net, z), operator = small(), dip.downsample(2)
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=gen(5)), scale_factor=4, mode="bilinear")
    y, misfit = operator.A(x), lambda image: (operator.A(image) - operator.A(x)).square().mean().item()        # noqa: E731
    fresh = misfit(net(z).detach())
    first, second = (misfit(ddpm.to_image(hybrid.refit(y, operator.A, net, z, 40, gen(), [1])(ddpm.to_diffusion(x), 1))) for _ in range(2))
    assert second < 0.5 * first < 0.5 * fresh


# ------------------------------------------------------------------------------------------------ guided fitting

def guided(y, A, net, z, steps, denoise, s=SCHEDULE, t=300, w=1.0, **options):
    return hybrid.guided_fit(y, A, net, z, steps, gen(5), denoise, s, weight=lambda t: w, ts=lambda u: t, noise=gen(6), **options)


@pytest.mark.parametrize("options", [{}, {"lr": 0.003, "jitter": 0.0, "average": 0.5}])
def test_guidance_without_weight_is_plain_dip(options):
    y = torch.rand(1, 3, 16, 16, generator=gen(1))
    ours, theirs = (list(fit) for fit in (guided(y, lambda x: x, *small(), 12, gaussian(SCHEDULE), w=0.0, **options),
                                          dip.fit(y, lambda x: x, *small(), 12, gen(5), **options)))
    assert len(ours) == len(theirs) == 12
    for a, b in zip(ours, theirs):
        assert a.i == b.i and a.misfit == b.misfit and torch.equal(a.image, b.image) and torch.equal(a.average, b.average)


@given(steps=st.integers(1, 30), refresh=st.integers(1, 12), evaluations=st.integers(1, 4), begin=st.integers(0, 33))
def test_the_model_is_asked_at_every_refresh_from_the_step_of_its_time_down(steps, refresh, evaluations, begin):
    asked, times, weights = [], [], []
    def denoise(xt, t):
        asked.append(t)
        return 0 * xt
    def ts(u):
        times.append(u)
        return 1000 - round(600 * u)
    def weight(t):
        weights.append(t)
        return 1.0
    y = torch.rand(1, 1, 2, 2, generator=gen())
    fit = hybrid.guided_fit(y, lambda x: x, Pixels(0 * y), torch.zeros(1), steps, gen(), denoise, SCHEDULE,
                            weight=weight, ts=ts, noise=gen(1), refresh=refresh, evaluations=evaluations, begin=begin)
    counts = [len(asked) for _ in fit]
    assert counts == [evaluations * max(0, math.ceil((i - begin) / refresh)) for i in range(1, steps + 1)]
    assert times == [i / steps for i in range(begin + 1, steps + 1, refresh)]
    assert asked[::evaluations] == weights == [1000 - round(600 * u) for u in times]
    for k, t in enumerate(weights):
        assert asked[k * evaluations:(k + 1) * evaluations] == [round(t * (1 - j / evaluations)) for j in range(evaluations)]


def test_updates_before_the_first_guess_are_plain_dip():
    y = torch.rand(1, 3, 16, 16, generator=gen(1))
    ours, theirs = list(guided(y, lambda x: x, *small(), 12, gaussian(SCHEDULE), begin=5)), dip.fit(y, lambda x: x, *small(), 12, gen(5))
    assert [torch.equal(a.image, b.image) for a, b in zip(ours, theirs)] == 6 * [True] + 6 * [False]                    # images are those before the update


def test_data_met_better_than_their_noise_have_nothing_left_to_say():
    """Below the floor the loss is flat: without guidance the network stands still from the first update on; above it nothing changes."""
    y, (net, z) = torch.rand(1, 3, 16, 16, generator=gen(1)), small()
    before = {n: w.clone() for n, w in net.state_dict().items() if "running" not in n and "num" not in n}
    *_, last = guided(y, lambda x: x, net, z, 8, gaussian(SCHEDULE), w=0.0, floor=10.0)
    assert last.misfit < 10 and all(torch.equal(w, net.state_dict()[n]) for n, w in before.items())
    ours, theirs = guided(y, lambda x: x, *small(), 12, gaussian(SCHEDULE), w=0.0, floor=1e-6), dip.fit(y, lambda x: x, *small(), 12, gen(5))
    assert all(torch.equal(a.image, b.image) and torch.equal(a.average, b.average) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("floor, w", [(0.01, 0.2), (0.04, 0.2), (0.01, 2.0), (0.3, 0.5)])
def test_with_a_floor_free_pixels_end_between_the_guess_and_the_edge_of_the_noise(floor, w):
    """y + s (c − y) with s = min(1, max(w / (1 + w), √floor / |c − y|)) for a guess c (REPORT, section 1.6): never y, however long it takes."""
    y, c = torch.rand(2, 1, 1, 16, 16, generator=gen(1))
    steps = list(guided(y, lambda x: x, Pixels(0.5 + 0 * y), torch.zeros(1), 1500, lambda xt, t: ddpm.to_diffusion(c), w=w, floor=floor, lr=0.003))
    settled = sum(step.image for step in steps[-500:]) / 500
    share = min(1, max(w / (1 + w), math.sqrt(floor / (c - y).square().mean().item())))
    assert (settled - (y + share * (c - y))).square().mean().sqrt().item() < 0.01
    *_, alone = guided(y, lambda x: x, Pixels(0.5 + 0 * y), torch.zeros(1), 400, gaussian(SCHEDULE), w=0.0, floor=floor, lr=0.003)
    assert 0.7 * min(floor, 1 / 12) < alone.misfit <= floor                                         # without a guess: at the floor, or where it began


@pytest.mark.parametrize("average", [0.9, 0.98])
def test_from_the_floor_on_all_images_count_alike(average):
    """The running average up to there stands for the 1 / (1 − average) images that it is of; an image that dip.fit throws away counts for nothing."""
    class Jump(Pixels):
        calls = 0

        def forward(self, z):
            self.calls += 1
            return self.image + 0.001 * self.calls + (100.0 if self.calls == 55 else 0.0)
    y = torch.rand(1, 1, 8, 8, generator=gen(1))
    plain = list(dip.fit(y, lambda x: x, Jump(0.5 + 0 * y), torch.zeros(1), 20, gen(5), average=average))
    steps = list(guided(y, lambda x: x, Jump(0.5 + 0 * y), torch.zeros(1), 60, gaussian(SCHEDULE), w=0.0, floor=0.05, average=average))
    first = next(k for k, step in enumerate(steps) if step.misfit <= 0.05)
    assert 3 < first < 19 and all(torch.equal(a.average, b.average) for a, b in zip(plain[:first + 1], steps))
    window, images = 1 / (1 - average), [step.image for k, step in enumerate(steps) if k > first and k != 54]
    expected = (window * plain[first].average + sum(images)) / (window + len(images))
    assert steps[54].misfit > 1000 and torch.allclose(steps[-1].average, expected, atol=1e-5)


def test_a_collapse_where_the_first_guess_is_due_only_delays_it():
    """dip.fit does not ask for the penalty in an update that restores older weights."""
    class Jump(Pixels):
        calls = 0

        def forward(self, z):
            self.calls += 1
            return self.image + (100.0 if self.calls == 53 else 0.0)
    y, asked = torch.rand(1, 1, 8, 8, generator=gen(1)), []
    def denoise(xt, t):
        asked.append(t)
        return 0 * xt
    *_, last = guided(y, lambda x: x, Jump(0.5 + 0 * y), torch.zeros(1), 60, denoise, begin=52, refresh=100)
    assert last.i == 60 and len(asked) == 1


def test_a_guess_of_several_evaluations_is_a_plain_hand_over():
    """Where only the guess counts, free pixels go to what `hand_over` makes of the start with the same noise."""
    y, t = torch.rand(1, 3, 8, 8, generator=gen(1)), 400
    *_, guess = hybrid.hand_over(y, gaussian(SCHEDULE), SCHEDULE, t, 4, gen(6))
    *_, last = guided(y, lambda x: 0 * x, Pixels(y), torch.zeros(1), 300, gaussian(SCHEDULE), t=t, refresh=1000, evaluations=4, average=0.9)
    assert torch.allclose(last.average, ddpm.to_image(guess.x), atol=1e-2) and not torch.allclose(y, ddpm.to_image(guess.x), atol=0.1)


def test_the_weight_belongs_to_the_step_of_the_chain():
    """A weight that is 0 until half of the fit: plain DIP up to there, bit for bit, and another fit from then on."""
    y = torch.rand(1, 3, 16, 16, generator=gen(1))
    fit = hybrid.guided_fit(y, lambda x: x, *small(), 12, gen(5), gaussian(SCHEDULE), SCHEDULE, weight=lambda t: float(t < 500),
                            ts=lambda u: 900 if u <= 0.5 else 100, noise=gen(6), refresh=1)
    same = [torch.equal(a.image, b.image) for a, b in zip(fit, dip.fit(y, lambda x: x, *small(), 12, gen(5)))]
    assert same == 7 * [True] + 5 * [False]                                             # images are those before the update


@pytest.mark.parametrize("follow", [0.0, 0.5, 0.9])
def test_the_model_sees_the_diffused_average_of_the_images(follow):
    """Undoing q_sample with the same noise gives Σ follow^(i−j) image_j, normalised: decay `follow`, no weight on the unseen past."""
    y, seen, t = torch.rand(1, 3, 16, 16, generator=gen(1)), [], 200
    def denoise(xt, step):
        seen.append(xt)
        return gaussian(SCHEDULE)(xt, step)
    images = [a.image for a in guided(y, lambda x: x, *small(), 9, denoise, t=t, follow=follow, refresh=2)]
    g = gen(6)
    for i, xt in zip(range(1, 10, 2), seen):
        decay = torch.tensor([follow ** (i - j) for j in range(1, i + 1)])
        expected = (decay.view(-1, 1, 1, 1, 1) * torch.stack(images[:i])).sum(0) / decay.sum()
        got = ddpm.predict_x0(SCHEDULE, xt, t, torch.randn(y.shape, generator=g))
        assert torch.allclose(ddpm.to_image(got), expected, atol=1e-5)


@pytest.mark.parametrize("w", [0.5, 3.0])
def test_a_model_that_knows_one_picture_is_a_second_measurement(w):
    """mean (f−y)² + w mean (f−c)² is, up to factor and constant, the fit to (y + w c) / (1 + w); Adam does not see the factor."""
    y, c = torch.rand(2, 1, 1, 8, 8, generator=gen(1))
    ours = guided(y, lambda x: x, Pixels(0.5 + 0 * y), torch.zeros(1), 90, lambda xt, t: ddpm.to_diffusion(c), w=w)
    for a, b in zip(ours, dip.fit((y + w * c) / (1 + w), lambda x: x, Pixels(0.5 + 0 * y), torch.zeros(1), 90, gen(5))):
        assert torch.allclose(a.image, b.image, atol=1e-3)


class Gain(torch.nn.Module):
    """A denoiser with a weight that could be trained."""

    def __init__(self):
        super().__init__()
        self.gain, self.seen = torch.nn.Parameter(torch.tensor(0.5)), []

    def forward(self, xt, t):
        self.seen.append(xt)
        return self.gain * xt


@pytest.mark.parametrize("refresh, evaluations", [(1, 1), (3, 1), (3, 4)])
def test_no_gradient_reaches_the_model_nor_passes_through_it(refresh, evaluations):
    model, y = Gain(), torch.rand(1, 3, 16, 16, generator=gen(1))
    steps = list(guided(y, lambda x: x, *small(), 7, model, refresh=refresh, evaluations=evaluations))
    assert model.gain.grad is None and model.gain.item() == 0.5 and len(model.seen) == evaluations * math.ceil(7 / refresh)
    assert not any(xt.requires_grad for xt in model.seen) and not any(a.image.requires_grad or a.average.requires_grad for a in steps)


@pytest.mark.parametrize("t", [300, 600])
def test_with_nothing_measured_free_pixels_go_to_the_mean_of_the_prior(t):
    """The only fixed point of an exact Gaussian denoiser is the mean."""
    nothing = torch.zeros(1, 1, 24, 24)
    *_, last = guided(nothing, lambda x: 0 * x, Pixels(nothing + 0.1), torch.zeros(1), 400, gaussian(SCHEDULE), t=t, w=50.0, refresh=1,
                      average=0.98)
    assert last.misfit == 0 and last.average.mean().item() == pytest.approx(ddpm.to_image(torch.tensor(MEAN)).item(), abs=0.005)


@pytest.mark.parametrize("w, t, follow, refresh", [(1.0, 500, 0.9, 1), (4.0, 300, 0.9, 5), (4.0, 600, 0.0, 2), (0.25, 600, 0.0, 1)])
def test_free_pixels_find_the_ridge_solution(w, t, follow, refresh):
    """(f − y) + w (f − D(f)) = 0, where D(f) = m + c (f − m) on average over the noise, c = ᾱ s² / (ᾱ s² + 1−ᾱ): so
    f = (y + r m) / (1 + r) with r = w (1 − c), the MAP estimate of a Gaussian picture. (With a gradient through D it would be w (1 − c)².)"""
    y, m = torch.cat([torch.full((1, 1, 12, 24), 0.1), torch.full((1, 1, 12, 24), 0.9)], 2), (MEAN + 1) / 2
    *_, last = guided(y, lambda x: x, Pixels(torch.full_like(y, m)), torch.zeros(1), 600, gaussian(SCHEDULE), t=t, w=w, follow=follow,
                      refresh=refresh, average=0.995)
    r = w * (1 - pull(SCHEDULE, t))
    for rows, value in ((slice(0, 12), 0.1), (slice(12, 24), 0.9)):
        assert last.average[:, :, rows].mean().item() == pytest.approx((value + r * m) / (1 + r), abs=0.006)
