"""Hybrids: unbiased error meters by Monte Carlo, limits in which a hybrid is one of its parents."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ddpm
import dip
import hybrid

SCHEDULE = ddpm.cosine(1000)
SIGMA = 0.2


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def steps_for(*ratios, sigma=SIGMA):
    return [ddpm.step_of(SCHEDULE, sigma * math.sqrt(1 + r * r)) for r in ratios]


def many_chains(n, ratios=(0.5, 1.0, 2.0), shape=(1, 1, 2, 3), seed=0):
    """n independent photos y of one image and a chain for each, stacked along the batch: every pixel is one more experiment."""
    x = torch.rand(shape, generator=gen(seed), dtype=torch.float64).expand(n, *shape[1:])
    g = gen(seed + 1)
    y = x + SIGMA * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return x, y, hybrid.noising_chain(y, SIGMA, SCHEDULE, steps_for(*ratios), g)


# ------------------------------------------------------------------------------------------------ noising chain

def test_links_sit_at_their_steps_of_the_forward_process():
    x, y, chain = many_chains(20000)
    for link in chain:
        total = ddpm.noise_level(SCHEDULE)[link.t].item()
        assert math.hypot(SIGMA, link.S) == pytest.approx(total, abs=1e-12)
        assert (link.q - x).std().item() == pytest.approx(total, rel=0.01)


def test_complement_is_independent_of_the_whole_noisier_tail():
    """Jointly Gaussian, so uncorrelated is independent: Cov(q_j − x, c_k − x) = 0 for every j ≥ k, and not for j < k."""
    x, y, chain = many_chains(100000, shape=(1, 1, 1, 1))
    for k, link in enumerate(chain):
        c = hybrid.complement(y, SIGMA, link) - x
        assert c.std().item() == pytest.approx(SIGMA * math.sqrt(1 + (SIGMA / link.S) ** 2), rel=0.02)
        for j, other in enumerate(chain):
            correlation = torch.corrcoef(torch.stack([c.flatten(), (other.q - x).flatten()]))[0, 1].item()
            assert abs(correlation) < 0.015 if j >= k else abs(correlation) > 0.1, (k, j, correlation)


def test_stages_drawn_independently_leak():
    """The counter-example: with q_1 = y + S_1 ξ_1 and q_2 = y + S_2 ξ_2 drawn afresh, the two together know n."""
    x, y, (first, *_) = many_chains(50000, (0.5,), shape=(1, 1, 1, 1))
    other = hybrid.noising_chain(y, SIGMA, SCHEDULE, steps_for(1.0), gen(9))[0]
    c = hybrid.complement(y, SIGMA, first)
    tail_alone, both = first.q, (4 * first.q + other.q) / 5
    nested = hybrid.noising_chain(y, SIGMA, SCHEDULE, steps_for(0.5, 1.0), gen(10))
    assert abs(((c - x) * (tail_alone - x)).mean().item()) < 0.05 * SIGMA ** 2
    assert ((c - x) * (both - x)).mean().item() > 0.1 * SIGMA ** 2
    fair = hybrid.complement(y, SIGMA, nested[0])
    assert abs(((fair - x) * ((4 * nested[0].q + nested[1].q) / 5 - x)).mean().item()) < 0.05 * SIGMA ** 2


def test_a_chain_must_rise():
    with pytest.raises(ValueError, match="noisier"):
        hybrid.noising_chain(torch.zeros(1, 1, 2, 2), SIGMA, SCHEDULE, steps_for(1.0, 0.5), gen())
    with pytest.raises(ValueError, match="noisier"):
        hybrid.noising_chain(torch.zeros(1, 1, 2, 2), SIGMA, SCHEDULE, [1], gen())


# -------------------------------------------------------------------------------------------------- error meters

ESTIMATORS = {"nothing": lambda q: 0 * q, "itself": lambda q: q, "shrunk": lambda q: 0.7 * q + 0.1, "bent": lambda q: torch.tanh(3 * q) ** 2,
              "jumps": lambda q: (q > 0.5).double()}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_risk_is_unbiased_for_any_estimator(name, k):
    x, y, chain = many_chains(40000)
    f = ESTIMATORS[name](chain[k].q)
    one = torch.tensor([hybrid.risk(f[i:i + 2000], y[i:i + 2000], SIGMA, chain[k]._replace(q=chain[k].q[i:i + 2000])) for i in range(0, 40000, 2000)])
    true = (f - x).square().mean().item()
    assert abs(one.mean().item() - true) < 4 * one.std().item() / math.sqrt(len(one)) + 1e-12
    assert one.mean().item() == pytest.approx(true, abs=0.05 * SIGMA ** 2 * (1 + (SIGMA / chain[k].S) ** 2))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_pair_risk_is_unbiased_and_quieter(name):
    x, y, chain = many_chains(40000)
    link, estimate = chain[0], ESTIMATORS[name]
    f, g = estimate(link.q), estimate(hybrid.mirror(y, link).q)
    def parts(i):
        cut = slice(i, i + 400)
        here = link._replace(q=link.q[cut])
        return (hybrid.pair_risk(f[cut], g[cut], y[cut], SIGMA, here) - ((f + g) / 2 - x)[cut].square().mean().item(),
                hybrid.risk(f[cut], y[cut], SIGMA, here) - (f - x)[cut].square().mean().item())
    pair, single = torch.tensor([parts(i) for i in range(0, 40000, 400)]).T
    assert abs(pair.mean().item()) < 4 * pair.std().item() / 10 and pair.mean().abs().item() < 0.05 * SIGMA ** 2
    assert pair.std() < single.std()


def test_pair_risk_is_sure_with_a_central_difference():
    x, y, (link,) = many_chains(3, (0.5,))
    f, g = link.q ** 2, hybrid.mirror(y, link).q ** 2
    xi = (link.q - y) / link.S
    divergence = ((f - g) * xi).mean().item() / (2 * link.S)
    sure = ((f + g) / 2 - y).square().mean().item() + 2 * SIGMA ** 2 * divergence - SIGMA ** 2
    assert hybrid.pair_risk(f, g, y, SIGMA, link) == pytest.approx(sure, abs=1e-12)


def test_risk_is_unbiased_for_trained_networks():
    """Networks really fitted to the noisier states, warm from the noisiest on: the meter's mean error is zero."""
    errors, fair = [], []
    for seed in range(24):
        x, y = small(seed, channels=1)
        chain = hybrid.noising_chain(y, SIGMA, SCHEDULE, steps_for(0.7, 1.5), gen(seed + 100))
        *_, stage = hybrid.staged_fit(y, SIGMA, chain[::-1], starts(seed, 1), 12, gen(seed), mirrored=seed % 2 == 0, warm=True, patience=99)
        errors.append(stage.value - (stage.image - x).square().mean().item())
        fair.append((stage.image - y).square().mean().item() - SIGMA ** 2 - (stage.image - x).square().mean().item())
    errors, fair = torch.tensor(errors), torch.tensor(fair)
    assert abs(errors.mean()) < 3 * errors.std() / math.sqrt(24)
    assert fair.mean() < -3 * fair.std() / math.sqrt(24)              # the misfit to y itself is an optimist: the test can tell


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_blend_is_the_best_convex_combination_and_its_risk_is_right(a, b, seed):
    x, n, m = torch.randn(3, 1, 1, 8, 8, generator=gen(seed), dtype=torch.float64)
    f, g = x + a * n, x + b * m
    risk_f, risk_g = ((v - x).square().mean().item() for v in (f, g))
    best, expected = hybrid.blend(f, risk_f, g, risk_g)
    assert expected == pytest.approx((best - x).square().mean().item(), abs=1e-9)
    for w in torch.linspace(0, 1, 11).tolist():
        assert expected <= (w * f + (1 - w) * g - x).square().mean().item() + 1e-9


def test_equal_independent_estimates_gain_half():
    x, n, m = torch.randn(3, 1, 1, 200, 200, generator=gen(), dtype=torch.float64)
    assert hybrid.blend(x + n, 1.0, x + m, 1.0)[1] == pytest.approx(0.5, abs=0.02)


# ------------------------------------------------------------------------------------------------------ staged fit

def starts(seed, channels=3):
    """A function that gives new small networks and inputs, the same ones in the same order for the same seed."""
    g = gen(seed)

    def fresh():
        torch.manual_seed(int(torch.randint(10 ** 6, (1,), generator=g)))
        return dip.Hourglass(c_in=4, c_out=channels, widths=(8, 8), upsample="nearest", padding="zeros"), dip.random_input((16, 16), g, 4)
    return fresh


def small(seed=0, channels=3):
    y = torch.nn.functional.interpolate(torch.rand(1, channels, 4, 4, generator=gen(5)), scale_factor=4, mode="bilinear")
    return y, y + SIGMA * torch.randn(y.shape, generator=gen(seed))


def test_one_stage_without_extra_noise_is_plain_dip():
    _, y = small()
    staged = list(hybrid.staged_fit(y, SIGMA, [hybrid.Link(1, 0.0, y)], starts(1), 12, gen(3)))
    plain = list(dip.fit(y, lambda x: x, *starts(1)(), 12, gen(3)))
    assert len(staged) == 12
    for ours, theirs in zip(staged, plain):
        assert torch.equal(ours.image, theirs.average) and torch.equal(ours.blended, theirs.average) and math.isnan(ours.expected)


def test_a_stage_with_vanishing_noise_is_plain_dip():
    _, y = small()
    staged = hybrid.staged_fit(y, SIGMA, [hybrid.Link(1, 1e-9, y)], starts(1), 6, gen(3), mirrored=False, patience=99)
    for ours, theirs in zip(staged, dip.fit(y, lambda x: x, *starts(1)(), 6, gen(3))):
        assert torch.allclose(ours.image, theirs.average, atol=1e-6)


def test_a_mirrored_stage_is_the_mean_of_two_fits():
    _, y = small()
    link, = hybrid.noising_chain(y, SIGMA, SCHEDULE, steps_for(0.5), gen(1))
    fresh, g = starts(1), gen(3)
    fits = zip(*(dip.fit(target, lambda x: x, *fresh(), 6, g) for target in (link.q, 2 * y - link.q)))
    for ours, (plus, minus) in zip(hybrid.staged_fit(y, SIGMA, [link], starts(1), 6, gen(3), patience=99), fits):
        assert torch.equal(ours.image, (plus.average + minus.average) / 2)
        assert ours.value == hybrid.pair_risk(plus.average, minus.average, y, SIGMA, link)


def test_stages_deliver_their_least_risk_and_are_blended():
    _, y = small()
    chain = hybrid.noising_chain(y, SIGMA, SCHEDULE, steps_for(0.5, 1.0), gen(1))
    seen = list(hybrid.staged_fit(y, SIGMA, chain[::-1], starts(1), 40, gen(2), patience=10))
    assert [s.k for s in seen] == sorted(s.k for s in seen) and all(s.link is chain[1 - s.k] for s in seen) and {s.k for s in seen} == {0, 1}
    for k in (0, 1):
        stage = [s for s in seen if s.k == k]
        values = [s.value for s in stage]
        assert stage[-1].best_step == 1 + values.index(min(values)) and torch.equal(stage[-1].best, stage[values.index(min(values))].image)
        assert len(stage) == min(40, stage[-1].best_step + 10)
    last, first = seen[-1], [s for s in seen if s.k == 0][-1]
    alone = list(hybrid.staged_fit(y, SIGMA, chain[1:], starts(1), 40, gen(2), patience=10))[-1]
    assert torch.equal(alone.best, first.best) and alone.expected == first.expected != min(s.value for s in seen if s.k == 0)
    single = list(hybrid.staged_fit(y, SIGMA, chain[::-1], starts(1), 40, gen(2), patience=10, mirrored=False))
    first, last = [s for s in single if s.k == 0][-1], single[-1]
    least = [min(s.value for s in single if s.k == k) for k in (0, 1)]
    mix, expected = hybrid.blend(first.best, least[0], last.best, least[1])
    assert torch.equal(last.blended, mix) and last.expected == expected and first.expected == least[0]


@pytest.mark.parametrize("ratios", [(0.5, 1.0), (0.0, 0.5)])
def test_watching_goes_on_but_changes_nothing(ratios):
    _, y = small()
    S = [r for r in ratios if r]
    chain = ([] if len(S) == 2 else [hybrid.Link(1, 0.0, y)]) + hybrid.noising_chain(y, SIGMA, SCHEDULE, steps_for(*S), gen(1))
    blind, seen = (list(hybrid.staged_fit(y, SIGMA, chain[::-1], starts(1), 100, gen(2), patience=5, watch=watch)) for watch in (False, True))
    assert len(blind) < len(seen) and seen[-1].i == 100 and [s.stopped for s in blind].count(True) == 2
    for a, b in zip(blind, seen):
        assert (a.k, a.i, a.value, a.best_step, a.stopped) == (b.k, b.i, b.value, b.best_step, b.stopped)
    for late in seen[len(blind):]:
        assert late.stopped and late.best_step == blind[-1].best_step and torch.equal(late.blended, blind[-1].blended)
        assert late.expected == blind[-1].expected or math.isnan(late.expected)


def test_the_last_stage_stops_at_the_transferred_fraction():
    _, y = small()
    chain = [hybrid.Link(1, 0.0, y), *hybrid.noising_chain(y, SIGMA, SCHEDULE, steps_for(0.5), gen(1))]
    seen = list(hybrid.staged_fit(y, SIGMA, chain[::-1], starts(1), 60, gen(2), mirrored=False, patience=15))
    first, last = [s for s in seen if s.k == 0], [s for s in seen if s.k == 1]
    link = first[0].link
    fraction = (first[-1].best - link.q).square().mean().item() / (SIGMA ** 2 + link.S ** 2)
    assert last[-1].value <= fraction or len(last) == 60
    assert all(s.value > fraction for s in last[:-1])
    assert torch.allclose(last[-1].blended, 0.3 * first[-1].best + 0.7 * last[-1].image)


def test_a_posterior_mean_knows_its_own_error():
    """x ~ N(0, s²), f the posterior mean h q: its error is σ² times its divergence h, for every y. Then the second opinion is exact."""
    s, d, misses = 0.15, 3 * 16 * 16, []
    h = s ** 2 / (s ** 2 + SIGMA ** 2)
    for seed in range(40):
        x, n, xi = torch.randn(3, 1, 3, 16, 16, generator=gen(seed), dtype=torch.float64)
        y = s * x + SIGMA * n
        link = hybrid.Link(1, SIGMA / 4, y + SIGMA / 4 * xi)
        f, g = h * link.q, h * hybrid.mirror(y, link).q
        value, truth = hybrid.pair_risk(f, g, y, SIGMA, link), ((f + g) / 2 - s * x).square().mean().item()
        sure = hybrid.expected_error(value, f, g, y, SIGMA, link, ratio=1.0, spread=1e-9)
        assert sure == pytest.approx(SIGMA ** 2 * h, rel=1e-9)
        assert hybrid.expected_error(value, f, g, y, SIGMA, link, spread=1e9) == pytest.approx(value, rel=1e-9)
        theory, precise, vague = 1.1 * SIGMA ** 2 * h, 1 / (0.2 * SIGMA ** 2 * h) ** 2, d / (2 * SIGMA ** 4)
        assert hybrid.expected_error(value, f, g, y, SIGMA, link, 1.1, 0.2) == pytest.approx((precise * theory + vague * value) / (precise + vague), rel=1e-9)
        misses.append([abs(value - truth), abs(hybrid.expected_error(value, f, g, y, SIGMA, link, ratio=1.0) - truth)])
    plain, steadier = torch.tensor(misses).mean(0)
    assert steadier < 0.9 * plain


def test_scaling_the_noise_scales_the_meter():
    """Twice the picture and twice the noise: four times the estimated risk, to rounding."""
    x, y, (link,) = many_chains(5, (0.5,))
    f = 0.7 * link.q
    twice = hybrid.Link(link.t, 2 * link.S, 2 * link.q)
    assert hybrid.risk(2 * f, 2 * y, 2 * SIGMA, twice) == pytest.approx(4 * hybrid.risk(f, y, SIGMA, link), rel=1e-12)
    g = 0.7 * hybrid.mirror(y, link).q
    assert hybrid.pair_risk(2 * f, 2 * g, 2 * y, 2 * SIGMA, twice) == pytest.approx(4 * hybrid.pair_risk(f, g, y, SIGMA, link), rel=1e-12)
    assert hybrid.expected_error(0.04, 2 * f, 2 * g, 2 * y, 2 * SIGMA, twice) == pytest.approx(4 * hybrid.expected_error(0.01, f, g, y, SIGMA, link), rel=1e-12)
