"""Hybrids: unbiased risks by Monte Carlo, exact models, limits in which a hybrid is one of its parents."""
import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional

import ddpm
import dip
import hybrid

SCHEDULE, SIGMA, QUICK = ddpm.cosine(1000), 0.2, {"lr": 0.05, "decay": 0.5}
MEAN, STD = 0.2, 0.5


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=gen(seed))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


def fresh(problem, generator, copies=1):
    n, (channels, *size) = copies * len(problem.y), problem.shape[1:]
    torch.manual_seed(int(torch.randint(2 ** 31, (1,), generator=generator)))
    net = dip.Hourglass(4, channels, (8, 8), upsample="nearest", padding="zeros", copies=n)
    return net, torch.cat([dip.random_input(size, generator, 4) for _ in range(n)])


class Pixels(torch.nn.Module):
    """A network without structure: its only weights are the image, and its input is added brightness."""
    def __init__(self, start):
        super().__init__()
        self.image = torch.nn.Parameter(start.clone())

    def forward(self, z):
        return self.image + z


def pixels(problem, generator, copies=1):
    start = torch.full((copies * len(problem.y), *problem.shape[1:]), 0.5)
    return Pixels(start), torch.zeros(len(start), 1, 1, 1)


def photo(B=1, sigma=SIGMA, channels=3):
    """B smooth images of falling contrast, and the problem of them with noise."""
    coarse = 0.5 + torch.linspace(1, 0.4, B).reshape(B, 1, 1, 1) * (rand(B, channels, 4, 4, seed=5) - 0.5)
    x = functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    return x, dip.Problem(x + sigma * torch.randn(x.shape, generator=gen()), dip.identity(), sigma)


def masked(x, known, sigma=0.0):
    return dip.Problem(x * known, dip.mask(known), sigma)


def half_known(share=0.5, side=16):
    return (rand(1, 1, side, side, seed=8) < share).float()


def gaussian(s=SCHEDULE):
    """E[x0 | xt] for x0 ~ N(MEAN, STD²), in [−1, 1]."""
    def denoise(xt, t):
        a = s.alpha_bar[t].item()
        return MEAN + math.sqrt(a) * STD ** 2 / (a * STD ** 2 + 1 - a) * (xt - math.sqrt(a) * MEAN)
    return denoise


def knows(image):
    """The exact denoiser of data that are one image in [0, 1]."""
    return lambda xt, t: ddpm.to_diffusion(image).expand_as(xt)


def model(denoise=gaussian(), s=SCHEDULE):
    return ddpm.Model(denoise, s, torch.linspace(0, 0.05, s.T + 1))


def listening(asked):
    """The exact model of Gaussian images, which notes in `asked` all (xt, t) that it is evaluated at."""
    return model(lambda xt, t: asked.append((xt, t)) or gaussian()(xt, t))


def valley(values, patience):
    """(best, stopped), from 1: the least value, once nothing less has come for `patience` steps."""
    rule = dip.Valley(patience)
    stopped = next((i for i, value in enumerate(values, 1) if rule.record(i, value)), len(values))
    return rule.best, stopped


# ------------------------------------------------------------------------------------- noise stages and risks

def many_chains(n, ratios=(0.5, 1.0, 2.0), shape=(1, 2, 3)):
    """n noisy photos y of one image, and a chain for each: every image is one more experiment."""
    x = rand(1, *shape).double().expand(n, *shape)
    y = x + SIGMA * randn(*x.shape, seed=1)
    return x, y, hybrid.noising_chain(y, SIGMA, ratios, gen(2))


def test_a_recorrupted_target_is_independent_of_the_whole_noisier_tail():
    """Jointly Gaussian, so uncorrelated is independent: for every j ≥ k, and not for j < k."""
    x, y, chain = many_chains(100000, (0.5, 1.0, 2.0), (1, 1, 1))
    for k, (link, ratio) in enumerate(zip(chain, (0.5, 1.0, 2.0))):
        c, left = hybrid.recorrupted_target(y, SIGMA, link) - x, SIGMA * math.hypot(1, 1 / ratio)
        assert link.S == pytest.approx(ratio * SIGMA) and c.std().item() == pytest.approx(left, rel=0.02)
        assert (link.q - x).std().item() == pytest.approx(SIGMA * math.hypot(1, ratio), rel=0.01)
        for j, other in enumerate(chain):
            found = abs(torch.corrcoef(torch.stack([c.flatten(), (other.q - x).flatten()]))[0, 1])
            assert found < 0.015 if j >= k else found > 0.1


def test_a_chain_must_rise():
    for ratios in ((1.0, 0.5), (0.5, 0.5), (0.0,)):
        with pytest.raises(ValueError, match="rise"):
            hybrid.noising_chain(torch.zeros(1, 1, 2, 2), SIGMA, ratios, gen())


@pytest.mark.parametrize("n", [3, 4])
def test_stages_are_equally_many_steps_of_a_schedule_apart(n):
    s, sigma = ddpm.linear(4000), 25 / 255
    ratios = hybrid.equal_steps(s, sigma, n)
    steps = torch.tensor([ddpm.step_of(s, sigma * math.hypot(1, ratio)) for ratio in ratios])
    assert len(ratios) == n and ratios[::n - 1] == (2.0, 0.25)
    # ratios have two digits, the last of them worth up to three steps
    assert ratios == tuple(round(ratio, 2) for ratio in ratios)
    assert (steps[:-1] - steps[1:] - 277 / (n - 1)).abs().max() < 4


@pytest.mark.parametrize("estimate", [
    torch.zeros_like, torch.clone, torch.round, lambda q: 0.7 * q + 0.1, lambda q: (3 * q).tanh() ** 2])
def test_risks_are_unbiased_for_any_estimator_and_a_pair_is_quieter(estimate):
    """The estimated minus the true error, in 200 groups of 200 experiments."""
    (x, y, (link, *_)), misses = many_chains(40000), []
    for truth, seen, q in zip(x.split(200), y.split(200), link.q.split(200)):
        here = seen, SIGMA, link._replace(q=q)
        f, g = estimate(q), estimate(hybrid.opposite(seen, here[2]).q)
        misses.append([hybrid.risk(f, *here) - (f - truth).square().mean().item(),
                       hybrid.pair_risk(f, g, *here) - ((f + g) / 2 - truth).square().mean().item()])
    bias, spread = torch.tensor(misses).mean(0).abs(), torch.tensor(misses).std(0)
    assert (bias < 4 * spread / math.sqrt(200)).all() and 0.02 > spread[0] > 1.5 * spread[1]


def test_pair_risk_is_sure_with_a_central_difference_and_every_risk_scales_with_the_square():
    (_, y, ((S, q),)), risks = many_chains(3, (0.5,)), []
    for k in (1, 2):
        f, g, at = k * q ** 2, k * (2 * y - q) ** 2, (k * y, k * SIGMA, hybrid.Link(k * S, k * q))
        divergence = ((f - g) * (q - y)).mean().item() / (2 * k * S ** 2)
        sure = ((f + g) / 2 - k * y).square().mean().item() + (k * SIGMA) ** 2 * (2 * divergence - 1)
        assert hybrid.pair_risk(f, g, *at) == pytest.approx(sure, abs=1e-12)
        risks.append([sure, hybrid.risk(f, *at), hybrid.expected_error(k * k / 99, f, g, *at)])
    assert risks[1] == pytest.approx([4 * value for value in risks[0]], rel=1e-12)


def test_a_posterior_mean_knows_its_own_error():
    """x ~ N(0, s²), f = h q the posterior mean: its error is σ² times its divergence h, for every y."""
    h, (y, noise) = 0.15 ** 2 / (0.15 ** 2 + SIGMA ** 2), 0.25 * randn(2, 1, 3, 16, 16)
    at = h * (y + SIGMA * noise), h * (y - SIGMA * noise), y, SIGMA, hybrid.Link(SIGMA / 4, y + SIGMA * noise)
    exact, scatter = h * SIGMA ** 2, 2 * SIGMA ** 4 / y.numel()
    for value in (0.9 * exact, exact, 1.3 * exact):
        theory, doubt = 1.1 * exact, (0.2 * exact) ** 2 + (value - 1.1 * exact) ** 2 / 4
        mixed = (theory / doubt + value / scatter) / (1 / doubt + 1 / scatter)
        assert hybrid.expected_error(exact, *at, 1.0, 0.0) == pytest.approx(exact, rel=1e-9)
        assert hybrid.expected_error(value, *at, 1.0, 1e9) == pytest.approx(value, rel=1e-9)
        assert hybrid.expected_error(value, *at, 1.1, 0.2) == pytest.approx(mixed, rel=1e-9)


def test_while_a_fit_still_rises_and_theory_is_far_off_the_unbiased_risk_is_announced():
    for step in hybrid.antithetic_pair(photo()[1], fresh, gen(1), steps=8):
        assert step.facts["expected"] == pytest.approx(step.facts["risk"], rel=0.1)


@pytest.mark.parametrize("ratio, antithetic", [(0.5, True), (1e-7, False)])
def test_a_pair_is_the_mean_of_two_fits_to_opposite_noise_and_without_noise_plain_dip(ratio, antithetic):
    y, operator, _ = problem = photo()[1]
    link, = hybrid.noising_chain(y, SIGMA, [ratio], gen(3))
    targets, settings = (link.q, 2 * y - link.q) if antithetic else (y,), {"steps": 6, "jitter": 0}
    fits = [dip.fit(q, operator.A, *pixels(problem, gen()), generator=gen(), **settings) for q in targets]
    ours = hybrid.antithetic_pair(problem, pixels, gen(3), ratios=[ratio], antithetic=antithetic, **settings)
    for step, *parts in zip(ours, *fits, strict=True):
        assert torch.allclose(step.now, sum(part.average for part in parts) / len(parts), atol=1e-6)


@pytest.mark.parametrize("antithetic", [False, True])
def test_every_image_of_a_batch_is_delivered_at_its_own_least_risk(antithetic):
    y, operator, _ = problem = photo(3)[1]
    copies, settings = 1 + antithetic, {"antithetic": antithetic, "patience": 4, "steps": 99, **QUICK}
    (*seen, end), g, stops = hybrid.antithetic_pair(problem, pixels, gen(3), **settings), gen(3), []
    link, = hybrid.noising_chain(y, SIGMA, [0.25], g)
    targets = torch.stack([link.q, 2 * y - link.q][:copies], 1).flatten(0, 1)
    steps = list(dip.fit(targets, operator.A, *pixels(problem, g, copies), len(seen) + 1, g, **QUICK))
    for b in range(3):
        here = y[b:b + 1], SIGMA, link._replace(q=link.q[b:b + 1])
        images = [step.average[copies * b:copies * (b + 1)].split(1) for step in steps]
        risks = [(hybrid.pair_risk if antithetic else hybrid.risk)(*found, *here) for found in images]
        best, stopped = valley(risks, 4)
        least, delivered = risks[best - 1], images[best - 1]
        expected = hybrid.expected_error(least, *delivered, *here) if antithetic else least
        facts = {"risk": least, "expected": expected, "risk_now": risks[stopped - 1]}
        facts |= {"step": best, "stopped": stopped, "updates": copies * stopped}
        assert {name: values[b] for name, values in end.facts.items()} == facts
        assert torch.allclose(end.image[b], sum(delivered)[0] / copies, atol=1e-6)
        stops.append(stopped)
    assert min(stops) < max(stops) == len(steps) < 99


@pytest.mark.parametrize("warm", [False, True])
def test_stages_are_walked_in_order_and_combined_by_their_expected_errors(warm):
    """On nested states; each starts with fresh networks, or with `warm` the same ones go on."""
    y, operator, _ = problem = photo(2)[1]
    settings, g, tools = {"ratios": (1.0, 0.5), "warm": warm, "steps": 50, **QUICK}, gen(2), None
    *seen, end = hybrid.antithetic_pair(problem, pixels, gen(2), **settings)
    for (name, stage), link in zip(end.others.items(), hybrid.noising_chain(y, SIGMA, (0.5, 1.0), g)[::-1]):
        own = [step for step in seen if list(step.others)[-1] == name]
        targets = torch.stack([link.q, 2 * y - link.q], 1).flatten(0, 1)
        tools = tools if warm and tools else pixels(problem, g, 2)
        for ours, step in zip(own, dip.fit(targets, operator.A, *tools, len(own), g, **QUICK), strict=True):
            assert torch.equal(ours.now, step.average.unflatten(0, (2, 2)).mean(1))
        assert torch.equal(stage.target, link.q) and torch.equal(own[-1].image, stage.image)
        assert len(own) == max(stage.facts["stopped"]) < 50
    stages = end.others.values()
    mixed, = hybrid.weighted(problem, [s._replace(facts={"risk": s.facts["expected"]}) for s in stages])
    facts = {"expected": mixed.facts["risk"], "updates": sum(max(s.facts["updates"]) for s in stages)}
    assert torch.equal(end.image, mixed.image) and end.facts == mixed.facts | facts and len(stages) == 2


@pytest.mark.parametrize("watch", [False, True])
def test_one_sided_sure_stops_a_plain_fit_by_the_divergence_that_its_twin_shows(watch):
    y, operator, _ = problem = photo()[1]
    settings, g, twin = {"patience": 3, "steps": 40, "watch": watch, **QUICK}, gen(1), torch.Generator()
    seen = list(hybrid.one_sided_sure(problem, pixels, gen(1), ratio=0.3, **settings))
    (S, q), = hybrid.noising_chain(y, SIGMA, [0.3], g)
    twin.set_state(g.get_state())
    plain, other = ([step.average for step in dip.fit(c, operator.A, *pixels(problem, g), 40, own, **QUICK)]
                    for c, own in ((y, g), (q, twin)))
    best, stopped = valley([(f - y).square().mean() + 2 * SIGMA ** 2 * ((h - f) * (q - y) / S ** 2).mean()
                            for f, h in zip(plain, other)], 3)
    assert torch.equal(seen[-1].image, plain[best - 1]) and torch.equal(seen[-1].now, plain[len(seen) - 1])
    assert seen[-1].facts == {"step": best, "stopped": stopped, "updates": 2 * stopped} and 2 < stopped < 40
    assert seen[1].facts["updates"] == 4 and len(seen) == (40 if watch else stopped)


def test_a_diffusion_pair_is_the_mean_of_two_recorrupted_photos_denoised():
    _, y, _ = many_chains(30, (0.5,))
    settings = {"ratio": 0.5, "evaluations": 3}
    found, = hybrid.diffusion_pair(dip.Problem(y, dip.identity(), SIGMA), model(), gen(4), **settings)
    link, = hybrid.noising_chain(y, SIGMA, [0.5], gen(4))
    f, g = (ddpm.denoise_photo(gaussian(), SCHEDULE, q, math.hypot(SIGMA, link.S), 3)
            for q in (link.q, 2 * y - link.q))
    risk = hybrid.pair_risk(f[7:8], g[7:8], y[7:8], SIGMA, link._replace(q=link.q[7:8]))
    assert torch.allclose(found.image, (f + g) / 2) and found.facts["risk"][7] == pytest.approx(risk)


@given(st.sampled_from([2, 3, 4]), st.floats(0, 1), st.integers(0, 99))
def test_no_other_weights_are_better_and_the_announced_error_is_true(K, shared, seed):
    """With true risks, for errors of unlike size that are partly shared, against a grid of the simplex."""
    x, common, *own = randn(K + 2, 1, 1, 8, 8, seed=seed)
    images = torch.stack([x + shared * common + k / K * n for k, n in enumerate(own, 1)])
    C = hybrid.moments(list(images), (images - x).square().mean((1, 2, 3, 4)).tolist())
    errors = (images - x).flatten(1)
    assert torch.allclose(C, errors @ errors.T / x.numel(), atol=1e-9)
    best, error = hybrid.least_on_simplex(C)
    grid = torch.tensor([w for w in itertools.product(range(9), repeat=K) if sum(w) == 8]).double() / 8
    errors = (torch.tensordot(torch.cat([best[None], grid]), images, 1) - x).square().mean((1, 2, 3, 4))
    assert best.min() >= 0 and best.sum().item() == pytest.approx(1)
    assert errors[0].item() == pytest.approx(error, abs=1e-9) and errors.min() > error - 1e-9


def test_duplicates_and_zero_distances_do_not_break_the_weights_and_independent_images_gain_half():
    f, g = randn(2, 1, 1, 200, 200)
    for images, risks, least in (([f, f, f], [3, 2, 4], 2), ([f, f], [0, 0], 0), ([f, g], [1, 1], 0.5),
                                 ([f, f, g], [1, 1, 1], 0.5)):
        assert hybrid.least_on_simplex(hybrid.moments(images, risks))[1] == pytest.approx(least, abs=0.01)


@given(st.floats(0.1, 1), st.floats(0.1, 1), st.floats(-0.9, 0.9))
def test_two_images_are_weighted_by_the_formula_of_the_law(a, b, rho):
    """w = ½ + (b − a)/(2D), D the distance, cut to [0, 1]; equal errors gain 10 log₁₀(2/(1 + ρ)) dB."""
    c = rho * math.sqrt(a * b)
    w, error = hybrid.least_on_simplex(torch.tensor([[a, c], [c, b]], dtype=torch.float64))
    expected = min(1, max(0, 0.5 + (b - a) / (2 * (a + b - 2 * c))))
    assert w.tolist() == pytest.approx([expected, 1 - expected], abs=1e-6)
    equal = hybrid.least_on_simplex(torch.tensor([[a, rho * a], [rho * a, a]], dtype=torch.float64))[1]
    assert 10 * math.log10(a / equal) == pytest.approx(10 * math.log10(2 / (1 + rho)), abs=1e-6)


@pytest.mark.parametrize("shrink", [0.0, 0.3, 1e6])
def test_stacking_is_least_squares_on_what_the_experts_have_not_seen(shrink):
    """Against a search of the segment; a great shrink makes a plain mean; known pixels are kept."""
    x, known = photo(2)[0].double(), half_known(0.7)
    problem, unseen = masked(x, known), known * half_known(0.3)
    images = [x + 0.1 * randn(*x.shape, seed=k) for k in range(4)]
    # the blind experts err unlike: the least of their errors scales the shrinkage
    images[3] = images[3] + 0.07
    found, = hybrid.stacked(problem, [dip.Restoration(image) for image in images], lambda p: unseen,
                            shrink=shrink)
    for b in range(2):
        grid, blind = torch.linspace(0, 1, 2001, dtype=torch.float64), [f[b] - x[b] for f in images[2:]]
        misses = [(w * blind[0] + (1 - w) * blind[1])[:, unseen[0, 0] > 0].square().mean() for w in grid]
        scale = min(f[:, unseen[0, 0] > 0].square().mean() for f in blind)
        penalised = torch.stack(misses) + shrink * scale * (grid ** 2 + (1 - grid) ** 2)
        w = grid[penalised.argmin()].item()
        assert found.facts["weights"][b] == pytest.approx([w, 1 - w], abs=1e-3)
        assert found.facts["error"][b] == pytest.approx(misses[penalised.argmin()].item(), rel=1e-3)
        mean = w * images[0][b] + (1 - w) * images[1][b]
        assert torch.allclose(found.image[b], problem.y[b] + (1 - known[0]) * mean, atol=1e-3)


def test_images_are_weighted_one_by_one_and_a_plain_mean_agrees_with_the_measurement():
    (x, problem), known, risks = photo(2), half_known(), torch.tensor([[0.004, 0.0045], [0.005, 0.0041]])
    one, two = (x + 0.1 * rand(*x.shape, seed=k) for k in (0, 1))
    experts = [dip.Restoration(f, {"risk": risk}) for f, risk in zip((one, two), risks.tolist())]
    found, = hybrid.weighted(problem, experts)
    for f, g, risk, image, *facts in zip(one, two, risks.T.tolist(), found.image, *found.facts.values()):
        w, error = hybrid.least_on_simplex(hybrid.moments([f, g], risk))
        assert facts == [error, w.tolist()] and torch.allclose(image, w[0].float() * f + w[1].float() * g)
    for each, seen in ((problem, 0 * known), (masked(x, known), known)):
        plain, = hybrid.averaged(each, experts)
        assert torch.allclose(plain.image, seen * x + (1 - seen) * (one + two) / 2, atol=1e-6)


# ------------------------------------------------------------------------------------ measurements kept back

def holed(side, size=64, corner=20):
    known = torch.ones(1, 1, size, size)
    known[..., corner:corner + side, corner:corner + side] = 0
    return known


def keep_back(known, seed=0):
    return hybrid.kept_back(masked(torch.ones_like(known), known), gen(seed))


@given(st.integers(1, 256), st.floats(0, 1), st.integers(0, 99))
def test_scattered_measurements_are_known_ones_and_at_least_one(count, share, seed):
    known = (torch.randperm(256, generator=gen(seed)) < count).float().reshape(1, 1, 16, 16)
    unseen = hybrid.scattered(masked(known, known), gen(seed), share)
    assert unseen.shape == known.shape and (unseen <= known).all() and unseen.sum() >= 1
    assert abs(unseen.sum().item() - share * count) <= 1 + 4 * math.sqrt(count * share * (1 - share))
    with pytest.raises(ValueError, match="nothing is known"):
        keep_back(0 * known)


def test_the_depth_of_a_hole_is_the_number_of_layers_that_can_be_peeled_off():
    for side in (1, 2, 7, 10):
        assert hybrid.depth(1 - holed(side) * holed(1, corner=50)) == math.ceil(side / 2)
        assert hybrid.depth(1 - holed(side, corner=0)) == side
    assert hybrid.depth(torch.zeros(1, 1, 8, 8)) == hybrid.depth(torch.ones(1, 1, 8, 8)) == 0


@pytest.mark.parametrize("known, width, count", [
    (holed(16), 8, 3), (holed(11, 42), 6, 2), (holed(12, 60, 0), 12, 2), (holed(40, 56, 8), 8, 2)])
def test_beside_a_wide_hole_whole_squares_as_wide_as_it_is_deep_are_kept_back(known, width, count):
    """Known and near the hole; about a twentieth of what is known, a tenth at most."""
    hidden, near = set(), functional.max_pool2d(1 - known, 2 * width + 1, 1, width)
    for seed in range(60):
        unseen = keep_back(known, seed)
        corners = -functional.max_pool2d(-unseen, width, 1)
        squares = functional.conv_transpose2d(corners, torch.ones(1, 1, width, width)) > 0
        assert torch.equal(squares.float(), unseen) and (unseen <= known * near).all()
        hidden.add(unseen.sum().item())
    assert width ** 2 <= min(hidden) < max(hidden) == count * width ** 2 <= 0.1 * known.sum()


@pytest.mark.parametrize("known", [
    holed(10), holed(60, 64, 2), half_known(), torch.ones(1, 1, 9, 9), 1 - holed(600, 1000, 0)[..., :6, :],
    holed(20) * (torch.arange(64) % 2)])
def test_elsewhere_single_measurements_are_kept_back(known):
    """Small holes, too little known, no hole at all, narrow images, no room for a square."""
    assert torch.equal(keep_back(known), hybrid.scattered(masked(known, known), gen(), 0.2))


@pytest.mark.parametrize("sigma", [0.0, SIGMA])
def test_held_out_measurements_say_when_to_stop_and_do_not_enter_the_fit(sigma):
    (y, *_), g = problem, _ = masked(photo()[1].y, half_known(0.8), sigma), gen(1)
    hidden = hybrid.scattered(problem, g)
    seen = masked(y, problem.known - hidden)
    steps = list(dip.fit(seen.y, seen.operator.A, *pixels(problem, g), 20, g))
    best, _ = valley([((step.average - y).square() * hidden).sum().item() for step in steps], 200)
    *_, end = hybrid.held_out(problem, pixels, gen(1), steps=20)
    assert end.facts["step"] == [best] and best < 20 and end.facts["stopped"] == [20]
    assert torch.equal(end.image, problem.consistent(steps[best - 1].average))


# -------------------------------------------------------------------------------------- the reverse chain

def test_the_error_curve_of_an_exact_denoiser_is_the_posterior_variance():
    """s² (1−ᾱ)/(ᾱ s² + 1−ᾱ), in [0, 1] a quarter of it; straight in the logarithm between, level outside."""
    s, ts = ddpm.cosine(100), [10, 30, 35, 80]
    x0 = ddpm.to_image(MEAN + STD * torch.randn(40, 1, 20, 20, generator=gen()))
    v, noise = ddpm.error_curve(gaussian(s), s, x0, ts, gen(1)), 4 * ddpm.noise_level(s)[ts] ** 2
    assert v[ts].tolist() == pytest.approx((STD ** 2 * noise / (STD ** 2 + noise) / 4).tolist(), rel=0.04)
    for left, right in zip(ts, ts[1:]):
        line = torch.lerp(v[left].log(), v[right].log(), torch.linspace(0, 1, right - left + 1))
        assert torch.allclose(v[left:right + 1].log(), line, atol=1e-4)
    assert v.shape == (101,) and v[0] == 0 and (v[1:11] == v[10]).all() and (v[80:] == v[80]).all()


@pytest.mark.parametrize("operator", [dip.identity(), dip.mask(half_known(side=8)), dip.downsample(4)])
def test_agreeing_moves_a_guess_to_the_measurement_within_the_range_only(operator):
    """The null space of A is left to the model."""
    f, y = rand(2, 3, 8, 8), operator.A(rand(2, 3, 8, 8, seed=1))
    moved = ddpm.to_image(hybrid.agree(dip.Problem(y, operator))(ddpm.to_diffusion(f), 2))
    assert torch.allclose(operator.A(moved), y, atol=1e-6)
    assert torch.allclose(*(x - operator.pinv(operator.A(x)) for x in (moved, f)), atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1e6])
def test_a_refit_without_weight_is_dip_going_on_and_with_all_of_it_dip_on_the_guess(weight):
    (_, problem), guess, g = photo(2), rand(2, 3, 16, 16), gen(5)
    (ours, z), (theirs, _) = fresh(problem, gen(1)), fresh(problem, gen(1))
    again = hybrid.fitted_again(problem, ours, z, 4, gen(5), weight, lr=0.003)
    for target in ((guess,) if weight else (problem.y, problem.y)):
        *_, last = dip.fit(target, problem.operator.A, theirs, z, 4, g, lr=0.003)
        found = ddpm.to_image(again(ddpm.to_diffusion(guess), 7))
        assert (found - last.average).abs().mean() < (1e-4 if weight else 1e-7)


@pytest.mark.parametrize("s", [ddpm.linear(1000), SCHEDULE])
def test_a_start_at_the_far_end_is_diffusion_alone_and_at_the_clean_end_there_is_none(s):
    f, x, left = rand(6, 1, 8, 8), torch.randn(6, 1, 8, 8, generator=gen()), s.alpha_bar[-1].sqrt().item()
    ours = list(hybrid.reverse(f, model(gaussian(s), s), 1000, 12, gen()))[1:]
    for a, b in zip(ours, ddpm.ddim(gaussian(s), s, x, 12, gen()), strict=True):
        assert a.t == b.t and (a.x - b.x).abs().max() < 1.5 * left + 1e-5 < 0.02
    known, refine = half_known(side=8), hybrid.agree(masked(x, half_known(side=8)))
    for options, expected in (({}, f), ({"refine": refine}, x * known + f * (1 - known))):
        only, = hybrid.reverse(f, model(None), 0, 10, gen(), **options)
        assert only.t == 0 and torch.allclose(ddpm.to_image(only.x), expected, atol=1e-6)


@given(st.integers(1, 1000), st.integers(1, 12), st.sampled_from([0.0, 0.7]), st.integers(0, 99))
def test_the_refined_image_is_diffused_and_taken_back_by_ddim(t, evaluations, eta, seed):
    """Every guess is refined, and the noise estimate moves with it: also, the same seed repeats."""
    f, g, refine = rand(2, 1, 3, 3, seed=seed), gen(seed), hybrid.fuse(rand(2, 1, 3, 3), lambda t: 0.5)
    first, *rest = hybrid.reverse(f, model(), t, evaluations, gen(seed), eta=eta, refine=refine)
    x0 = refine(ddpm.to_diffusion(f), t)
    x = ddpm.q_sample(SCHEDULE, x0, t, torch.randn(f.shape, generator=g))
    assert first.t == t and torch.equal(first.x0_hat, x0) and torch.equal(first.x, x)
    for a, b in zip(rest, ddpm.ddim(gaussian(), SCHEDULE, x, evaluations, g, eta, t, refine), strict=True):
        assert a.t == b.t and torch.equal(a.x, b.x) and torch.equal(a.x0_hat, b.x0_hat)


def alone(problem, asked=model(), seed=0, f=0.5, **options):
    """The last word of diffusion alone, started from grey or from an image f."""
    *_, last = hybrid.diffusion(problem, asked, gen(seed), lambda p: 0 * p.y + f, **options)
    return last


def test_the_model_alone_samples_the_exact_posterior():
    """Known pixels are exact, the others are the point, or draws from the prior of independent pixels."""
    known, point, asked = half_known(side=64), rand(1, 3, 64, 64, seed=1), []
    problem = masked(rand(2, 3, 64, 64), known)
    one = alone(problem, model(knows(point)), evaluations=3)
    assert torch.allclose(one.image, problem.y + (1 - known) * point, atol=1e-6)
    drawn = alone(problem, listening(asked), samples=1, t=1000, evaluations=100)
    free = ddpm.to_diffusion(drawn.image)[(1 - known).expand_as(problem.y) > 0]
    assert [free.mean().item(), free.std().item()] == pytest.approx([MEAN, STD], abs=0.035)
    assert torch.allclose(drawn.image * known, problem.y, atol=1e-6) and len(asked) == 100
    assert drawn.facts["diversity"] == [0, 0]


def test_the_mean_of_samples_is_that_of_chains_and_its_diversity_their_distance():
    problem = masked(rand(2, 3, 8, 8), half_known(side=8))
    many = problem._replace(y=problem.y.repeat_interleave(3, 0))
    f, refine = torch.full((6, 3, 8, 8), 0.25), hybrid.agree(many)
    *_, last = hybrid.reverse(f, model(), 400, 5, gen(2), eta=0.7, refine=refine)
    images = ddpm.to_image(last.x0_hat).reshape(2, 3, -1)
    for options in ({"f": 0.25}, {"experts": [dip.Restoration(f[:2])]}):
        found = alone(problem, seed=2, t=400, evaluations=5, eta=0.7, samples=3, **options)
        assert torch.allclose(found.image.flatten(1), images.mean(1), atol=1e-6)
        for b in range(2):
            pairs = [(images[b, i] - images[b, j]).square().mean() for i, j in ((0, 1), (0, 2), (1, 2))]
            assert found.facts["diversity"][b] == pytest.approx((sum(pairs) / 3).sqrt().item(), rel=1e-4)


def test_leaning_averages_every_guess_with_the_start_by_inverse_variance():
    (f, known), v, asked = (rand(2, 3, 8, 8), half_known(side=8)), model().v, []
    problem = masked(rand(2, 3, 8, 8, seed=1), known)
    found = alone(problem, seed=3, experts=[dip.Restoration(f)], t=300, evaluations=4, samples=1, lean=True)
    hooks = [lambda g, t: (v[300] * g + v[t] * (2 * f - 1)) / (v[t] + v[300]), hybrid.agree(problem)]
    *_, last = hybrid.reverse(f, listening(asked), 300, 4, gen(3), eta=1.0, refine=hybrid.in_turn(*hooks))
    assert torch.allclose(found.image, ddpm.to_image(last.x0_hat), atol=1e-5) and len(asked) == 4


def test_guidance_through_the_model_is_the_gradient_of_the_likelihood():
    """Gaussian pixels that hang together: the guess becomes E[x0 | xt, y] wherever y is exact enough."""
    known, (y, xt) = half_known(side=8), (rand(1, 1, 8, 8), randn(1, 1, 8, 8))
    problem = dip.Problem(y.double() * known, dip.mask(known.double()))
    a = SCHEDULE.alpha_bar[600].item()
    mix = torch.eye(64, dtype=torch.float64) + 0.5 * torch.ones(64, 64, dtype=torch.float64) / 64
    slope = 0.01 * mix / math.sqrt(a)

    def linear(x, t):
        return (x.flatten(1) @ slope.T).reshape(x.shape)
    found = hybrid.guided(problem, model(linear))(xt, 600)
    x0 = linear(xt, 600)
    missed = (2 * problem.y - 1 - x0) * known
    expected = x0 + (missed.flatten(1) @ slope).reshape(x0.shape) / math.sqrt(a)
    assert torch.allclose(found, expected.clamp(-1, 1), atol=1e-9) and not found.requires_grad
    calm = alone(dip.Problem(problem.y.float(), dip.mask(known)), t=500, gradient=True, evaluations=3)
    assert torch.allclose(calm.image * known, problem.y.float(), atol=1e-6)


def test_eight_views_are_the_mean_over_flips_and_transposes():
    """A picture turned by any of them gives the result turned; a pointwise estimator is left as it is."""
    y, ramp = rand(2, 3, 8, 8), torch.linspace(0, 1, 8)

    def uneven(x):
        return x * ramp + x.roll(1, 2)
    seen, found = [], hybrid.eight_views(uneven, y)
    for turn in (lambda x: x.mT, lambda x: x.flip(2), lambda x: x.mT.flip(3)):
        assert torch.allclose(hybrid.eight_views(uneven, turn(y)), turn(found), atol=1e-6)
    assert torch.allclose(hybrid.eight_views(torch.square, y), y.square())
    hybrid.eight_views(lambda x: seen.append(x.clone()) or x, y)
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 8
    assert torch.allclose(alone(photo(2)[1]).image, hybrid.eight_views(lambda view: ddpm.denoise_photo(
        gaussian(), SCHEDULE, view, SIGMA, 4), photo(2)[1].y))
    single = ddpm.denoise_photo(gaussian(), SCHEDULE, photo(2)[1].y, SIGMA, 2)
    assert torch.equal(alone(photo(2)[1], evaluations=2, views=False).image, single)


def test_refits_of_a_brief_dip_lead_the_chain():
    """Written out: agree, fit again, agree."""
    problem, g = masked(photo(2)[0], half_known()), gen(1)
    settings = {"brief": 6, "updates": 3, "weight": 0.2, "t": 400, "evaluations": 4, "eta": 0.5}
    found = list(hybrid.refit(problem, model(), fresh, gen(1), **settings))
    net, z = fresh(problem, g)
    *_, step = dip.fit(problem.y, problem.operator.A, net, z, 6, g)
    agree, again = hybrid.agree(problem), hybrid.fitted_again(problem, net, z, 3, g, 0.2)
    chain = hybrid.reverse(step.average, model(), 400, 4, g, eta=0.5,
                           refine=hybrid.in_turn(agree, again, agree))
    for k, (ours, theirs) in enumerate(zip(found[6:], chain, strict=True), 1):
        assert torch.equal(ours.image, ddpm.to_image(theirs.x0_hat)) and ours.facts == {"updates": 6 + 3 * k}
    assert [step.facts["updates"] for step in found[:6]] == [1, 2, 3, 4, 5, 6]
    assert all(torch.allclose(step.image * half_known(), problem.y, atol=1e-5) for step in found)


# ---------------------------------------------------------------------------- a diffusion model in DIP's loss

def test_without_weight_and_floor_a_regularised_fit_is_plain_dip():
    problem, plain = photo(2)[1], {"weight": 0.0, "steps": 9}
    ours = hybrid.regularised(problem, None, fresh, gen(1), floor=0.0, **plain)
    rules = {"": lambda p: dip.FixedBudget(9)}
    for a, b in zip(ours, dip.deep_image_prior(problem, fresh, gen(1), steps=9, rules=rules), strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.now, b.now) and a.facts == b.facts


def test_without_the_constraint_data_keep_their_gradient_and_only_the_averaging_is_the_same():
    """Down to the floor both are one fit; beyond it the free one goes on to y."""
    problem, ends = photo(1)[1], {}
    for constrain in (True, False):
        (net, z), misfits = pixels(problem, gen()), []
        for step in dip.fit(problem.y, problem.operator.A, net, z, 60, gen(), floor=0.05, lr=0.02, jitter=0,
                            constrain=constrain):
            misfits.append(step.misfit.item())
        ends[constrain] = misfits
    reached = next(i for i, misfit in enumerate(ends[True]) if misfit <= 0.05)
    assert ends[True][:reached + 1] == ends[False][:reached + 1] and 0 < reached < 50
    assert 2 * ends[False][-1] < ends[True][-1] < 0.05


@pytest.mark.parametrize("sigma, weight, floor", [
    (0.05, 0.3, 1.0), (0.1, 0.2, 1.0), (0.1, 0.2, 4.0), (0.6, 0.5, 1.0)])
def test_free_pixels_end_between_the_guess_and_the_edge_of_the_noise(sigma, weight, floor):
    """y + s (c − y), s = min(1, max(w/(1 + w), √(floor σ²)/|c − y|)): a model that knows one image c is a
    second measurement."""
    y, c = rand(2, 1, 1, 16, 16)
    net, problem = Pixels(0.5 + 0 * y), dip.Problem(y, dip.identity(), sigma)
    fit = hybrid.regularised(problem, model(knows(c)), lambda *_: (net, torch.zeros(1)), gen(), weight=weight,
                             floor=floor, steps=900, lr=0.003, jitter=0)
    settled = torch.stack([net.image.detach().clone() for _ in fit][-300:]).mean(0)
    distance = (c - y).square().mean().sqrt().item()
    s = min(1, max(weight / (1 + weight), math.sqrt(floor) * sigma / distance))
    assert (settled - (y + s * (c - y))).square().mean().sqrt() < 0.01


def test_the_model_is_evaluated_once_at_y_and_its_own_noise_level():
    asked, problem = [], photo(2)[1]
    list(hybrid.regularised(problem, listening(asked), pixels, gen(), steps=5))
    (xt, t), = asked
    scale = SCHEDULE.alpha_bar[t].sqrt().item()
    assert t == ddpm.step_of(SCHEDULE, SIGMA) and torch.allclose(xt, scale * (2 * problem.y - 1), atol=1e-6)


def test_further_terms_pull_towards_the_features_of_y_and_towards_real_patches():
    problem, network = dip.Problem(rand(1, 3, 16, 16), dip.identity(), 0.1), ddpm.UNet(3, (8, 16))
    images, white = rand(8, 3, 16, 16, seed=1).requires_grad_(), torch.ones(4, 3, 16, 16)
    pull = hybrid.perceptual(problem, network, SCHEDULE)
    each, whole = [pull(image[None], 1).item() for image in images], pull(images, 1).item()
    assert pull(problem.y, 1) == 0 < min(each) and whole == pytest.approx(sum(each), rel=1e-4)
    judge = hybrid.adversarial(problem, lambda: white)
    *_, last = (judge(images, i) for i in range(60))
    assert images.grad is None and last > 0.01 * problem.sigma ** 2 * len(images)
    assert torch.autograd.grad(last, images)[0].mean() < 0
