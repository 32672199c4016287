"""The lesson's curves against closed forms that are worked out another way."""
import math

import pytest
import torch

import ddpm
import experiments as E
import hybrid


@pytest.mark.parametrize("t", [20, 300, 700])
def test_the_exact_denoiser_is_the_posterior_mean(t):
    """… of many draws of x0, each weighted by how likely it makes the state."""
    s, generator = ddpm.cosine(1000), E.seeded("draws")
    x0 = ddpm.to_diffusion(E.clouds(generator, 400_000)).flatten(1)
    a = s.alpha_bar[t].item()
    xt = math.sqrt(a) * x0[:5] + math.sqrt(1 - a) * torch.randn(5, 2, generator=generator)
    found = E.exact_denoiser(s)(xt[..., None, None], t).flatten(1)
    for state, mean in zip(xt, found):
        weights = torch.softmax(-(state - math.sqrt(a) * x0).double().square().sum(1) / (2 * (1 - a)), 0)
        assert (weights @ x0.double() - mean).abs().max() < 0.01


def test_the_exact_chain_ends_in_the_clouds_and_three_steps_do_not():
    s, centres, far = ddpm.cosine(1000), ddpm.to_diffusion(E.CENTRES), []
    for steps in (100, 3):
        start = torch.randn(600, 2, 1, 1, generator=E.seeded("start"))
        *_, end = ddpm.ddim(E.exact_denoiser(s), s, start, steps, E.seeded("none"))
        distance = torch.cdist(end.x.flatten(1), centres).min(1).values / (2 * E.SPREAD)
        far.append((distance > 4).float().mean().item())
    assert far[0] < 0.03 and far[1] > 0.3


def test_rise_and_fall_is_that_of_the_matrix():
    x, values, vectors = E.linear_dip(32)
    K = vectors * values @ vectors.T
    for updates in (1, 7, 300):
        left = torch.linalg.matrix_power(torch.eye(32, dtype=K.dtype) - K, updates)
        bias, variance = E.rise_and_fall(x, values, vectors, 0.1, [updates])
        assert bias.item() == pytest.approx((left @ x).square().mean().item(), rel=1e-6)
        spread = (torch.eye(32, dtype=K.dtype) - left).square().sum() / 32
        assert variance.item() == pytest.approx(0.01 * spread.item(), rel=1e-6)


def test_measured_fits_rise_and_fall_and_the_risk_stops_better_than_discrepancy():
    updates, curves, stops = E.linear_fits()
    ratio = curves["measured"] / (curves["bias²"] + curves["variance"])
    assert (ratio - 1).abs().max() < 0.05
    assert 0 < curves["measured"].argmin() < len(updates) - 1 and (curves["bias²"].diff() < 0).all()
    measured, at = curves["measured"], torch.tensor(updates)
    lost = {rule: (measured[torch.searchsorted(at, found)] / measured.min()).mean()
            for rule, found in stops.items()}
    assert 1 < lost["unbiased risk"] < lost["discrepancy"]


@pytest.mark.parametrize("b, rho", [(1.0, -0.4), (1.0, 0.5), (2.0, 0.0), (4.0, 0.3), (4.0, 0.8)])
def test_the_law_of_two_is_the_least_over_a_grid_and_that_of_simulated_estimates(b, rho):
    w = torch.linspace(0, 1, 2001, dtype=torch.float64)
    least = (w ** 2 + (1 - w) ** 2 * b + 2 * w * (1 - w) * rho * math.sqrt(b)).min().item()
    assert E.least_of_two(1.0, b, rho) == pytest.approx(least, abs=1e-6)
    C = torch.tensor([[1.0, rho * math.sqrt(b)], [rho * math.sqrt(b), b]], dtype=torch.float64)
    assert hybrid.least_on_simplex(C)[1] == pytest.approx(least, abs=1e-6)
    assert E.average_of_two(1.0, b, rho) == pytest.approx(least, rel=0.02)
