"""The diffusion's laws: schedules, closed forms, exact posteriors, and samplers fed with exact denoisers."""
import math

import pytest
import torch
import torch.nn as nn
from hypothesis import given, strategies as st

import ddpm

SCHEDULES = [ddpm.linear, ddpm.cosine, ddpm.sigmoid]
schedules = st.builds(lambda make, T: make(T), st.sampled_from(SCHEDULES), st.integers(2, 1000))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def last(chain):
    *_, state = chain
    return state


# --------------------------------------------------------------------------------------------------- schedules

@given(schedules)
def test_a_schedule_falls_strictly_from_one_and_stays_positive(s):
    assert s.alpha_bar[0] == 1 and s.beta[0] == 0 and s.alpha_bar.dtype == torch.float64 and len(s.beta) == s.T + 1
    assert (s.alpha_bar.diff() < 0).all() and (s.alpha_bar > 0).all()
    assert ((s.beta[1:] > 0) & (s.beta <= 0.9991)[1:]).all() and torch.equal(s.alpha, 1 - s.beta)
    assert (ddpm.noise_level(s).diff() > 0).all()                                              # so SNR = 1/σ² falls
    assert torch.allclose(s.alpha_bar, torch.cumprod(s.alpha, 0))


def test_schedules_are_those_of_the_papers():
    assert torch.allclose(ddpm.linear(1000).beta[1:], torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), atol=1e-12)
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2                                        # noqa: E731
    s = ddpm.cosine(1000)
    assert all(s.alpha_bar[t].item() == pytest.approx(f(t / 1000) / f(0), rel=1e-9) for t in (1, 10, 500, 900))
    assert s.beta.max() == pytest.approx(0.999)
    g = lambda u: 1 / (1 + math.exp(-(3 - 6 * u)))                                                         # noqa: E731
    s = ddpm.sigmoid(1000)
    assert all(s.alpha_bar[t].item() == pytest.approx((g(t / 1000) - g(1)) / (g(0) - g(1)), rel=1e-9) for t in (1, 10, 500, 900))
    for make in SCHEDULES:
        with pytest.raises(ValueError, match="T ≥ 2"):
            make(1)


@given(schedules, st.data())
def test_step_of_finds_the_step_of_a_noise_level(s, data):
    t = data.draw(st.integers(1, s.T))
    assert ddpm.step_of(s, ddpm.noise_level(s)[t].item()) == t
    assert ddpm.step_of(s, 0.0) == 1 and ddpm.step_of(s, 1e9) == s.T


def test_noise_level_is_the_deviation_of_the_rescaled_state_in_image_units():
    s, t = ddpm.cosine(100), 30
    xt = ddpm.q_sample(s, torch.zeros(1, 1, 200, 200), t, torch.randn(1, 1, 200, 200, generator=generator()))
    image = ddpm.to_image(xt / s.alpha_bar[t].sqrt().float())
    assert image.std().item() == pytest.approx(ddpm.noise_level(s)[t].item(), rel=0.02)


# -------------------------------------------------------------------------------------- forward and posterior

@given(schedules, st.data())
def test_one_step_after_another_is_the_closed_form(s, data):
    """Mean factor and variance of x_t, followed step by step (DDPM Eq. 2), are those of Eq. 4."""
    t = data.draw(st.integers(1, s.T))
    factor, variance = 1.0, 0.0
    for k in range(1, t + 1):
        factor, variance = factor * math.sqrt(1 - s.beta[k].item()), (1 - s.beta[k].item()) * variance + s.beta[k].item()
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert ddpm.q_sample(s, one, t, 0 * one).item() == pytest.approx(factor, rel=1e-9)
    assert ddpm.q_sample(s, 0 * one, t, one).item() == pytest.approx(math.sqrt(variance), rel=1e-9)


@given(schedules, st.data(), st.floats(-2, 2), st.floats(-2, 2))
def test_posterior_is_gaussian_conditioning(s, data, x0, xt):
    """Brute force: condition the joint Gaussian of (x_{t−1}, x_t) given x_0 on x_t."""
    t = data.draw(st.integers(2, s.T))
    before, alpha, beta = s.alpha_bar[t - 1].item(), s.alpha[t].item(), s.beta[t].item()
    mean = torch.tensor([math.sqrt(before) * x0, math.sqrt(alpha * before) * x0], dtype=torch.float64)
    cov = torch.tensor([[1 - before, math.sqrt(alpha) * (1 - before)], [math.sqrt(alpha) * (1 - before), alpha * (1 - before) + beta]], dtype=torch.float64)
    expected_mean = mean[0] + cov[0, 1] / cov[1, 1] * (xt - mean[1])
    expected_variance = cov[0, 0] - cov[0, 1] ** 2 / cov[1, 1]
    got_mean, got_variance = ddpm.q_posterior(s, torch.full((1, 1, 1, 1), x0, dtype=torch.float64), torch.full((1, 1, 1, 1), xt, dtype=torch.float64), t)
    assert got_mean.item() == pytest.approx(expected_mean.item(), rel=1e-6, abs=1e-8)
    assert got_variance == pytest.approx(expected_variance.item(), rel=1e-6, abs=1e-12)


@given(schedules)
def test_the_last_step_adds_no_noise_and_lands_on_the_guess(s):
    x0, x1 = torch.randn(2, 1, 1, 3, 3, generator=generator())
    mean, variance = ddpm.q_posterior(s, x0, x1, 1)
    assert variance == 0 and torch.allclose(mean, x0, atol=1e-6)


@given(schedules, st.data(), st.integers(0, 99))
def test_the_three_predictions_are_inverses(s, data, seed):
    t = torch.tensor([data.draw(st.integers(1, s.T)) for _ in range(3)])
    x0, eps = torch.randn(2, 3, 2, 4, 4, generator=generator(seed), dtype=torch.float64)
    xt = ddpm.q_sample(s, x0, t, eps)
    assert torch.allclose(ddpm.predict_x0(s, xt, t, eps), x0, atol=1e-6)
    assert torch.allclose(ddpm.predict_eps(s, xt, t, x0), eps, atol=1e-6)
    for head in (ddpm.eps_head, ddpm.v_head):
        assert torch.allclose(head.x0(s, xt, t, head.target(s, x0, eps, t)), x0, atol=1e-6)
    assert torch.allclose(ddpm.to_image(ddpm.to_diffusion(x0)), x0)
    for i in range(3):                                                                       # a batch is its images
        assert torch.equal(ddpm.q_sample(s, x0[i:i + 1], t[i].item(), eps[i:i + 1]), xt[i:i + 1])


# ------------------------------------------------------------------- samplers with exact denoisers (the oracles)

def gaussian_denoiser(s, mean, std):
    """E[x0 | xt] for x0 ~ N(mean, std²): a linear function of xt."""
    def denoise(xt, t):
        a, b = s.alpha_bar[t].item(), 1 - s.alpha_bar[t].item()
        return mean + math.sqrt(a) * std ** 2 / (a * std ** 2 + b) * (xt - math.sqrt(a) * mean)
    return denoise


def mixture_denoiser(s, points):
    """E[x0 | xt] for x0 uniform on a few numbers, pixel by pixel."""
    def denoise(xt, t):
        a, b = s.alpha_bar[t].item(), 1 - s.alpha_bar[t].item()
        weights = torch.softmax(-(xt[..., None] - math.sqrt(a) * points) ** 2 / (2 * b), dim=-1)
        return (weights * points).sum(-1)
    return denoise


@pytest.mark.parametrize("make", SCHEDULES)
def test_one_point_data_is_reached_from_anywhere(make):
    s, point = make(50), torch.rand(1, 3, 4, 4, generator=generator(1))
    for chain in (ddpm.p_sample, lambda *a: ddpm.ddim(*a[:3], 7, a[3], 0.5)):
        x = torch.randn(5, 3, 4, 4, generator=generator())
        assert torch.allclose(last(chain(lambda xt, t: point.expand_as(xt), s, x, generator())).x, point.expand_as(x), atol=1e-5)


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "eta 0.5"])
def test_gaussian_data_come_back_with_their_mean_and_variance(make, sampler):
    s, mean, std, n = make(400), 0.3, 0.5, 40_000
    x = torch.randn(n, 1, 1, 1, generator=generator()) * math.sqrt(1 - s.alpha_bar[-1] + s.alpha_bar[-1] * std ** 2) + math.sqrt(s.alpha_bar[-1]) * mean
    denoise = gaussian_denoiser(s, mean, std)
    chain = ddpm.p_sample(denoise, s, x, generator(1)) if sampler == "ancestral" else ddpm.ddim(denoise, s, x, 400, generator(1), 0.5 if "eta" in sampler else 0.0)
    got = last(chain).x
    assert got.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(n) + 0.002)
    assert got.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("ancestral", [True, False])
def test_mixture_data_come_back_with_their_weights(ancestral):
    s, points, n = ddpm.cosine(300), torch.tensor([-0.8, 0.1, 0.9]), 6000
    x = torch.randn(n, 1, 1, 1, generator=generator())
    denoise = mixture_denoiser(s, points)
    got = last(ddpm.p_sample(denoise, s, x, generator(1)) if ancestral else ddpm.ddim(denoise, s, x, 300, generator(1))).x.flatten()
    distance, nearest = (got[:, None] - points).abs().min(1)
    assert distance.max() < 0.02
    assert torch.allclose(torch.bincount(nearest) / n, torch.full((3,), 1 / 3), atol=4 * math.sqrt(2 / 9 / n))


@given(schedules.filter(lambda s: s.T <= 60), st.integers(0, 99))
def test_ddim_with_all_steps_and_eta_one_is_ancestral_sampling(s, seed):
    """With the same noise, state by state: DDIM's Eq. 12 and 16 reduce to DDPM's Eq. 6 and 7."""
    denoise = gaussian_denoiser(s, 0.2, 0.7)
    x = torch.randn(2, 1, 3, 3, generator=generator(seed), dtype=torch.float64)
    a, b = (list(chain) for chain in (ddpm.p_sample(denoise, s, x, generator(7)), ddpm.ddim(denoise, s, x, s.T, generator(7), eta=1.0)))
    assert [state.t for state in a] == [state.t for state in b] == list(range(s.T - 1, -1, -1))
    for p, q in zip(a, b):
        assert torch.allclose(p.x, q.x, atol=1e-6)


@given(st.integers(1, 60), st.integers(1, 60))
def test_ddim_jumps_from_the_start_to_zero(steps, t_start):
    s = ddpm.cosine(60)
    states = list(ddpm.ddim(lambda xt, t: 0 * xt, s, torch.ones(1, 1, 2, 2), steps, generator(), t_start=t_start))
    assert states[-1].t == 0 and len(states) == min(steps, t_start)
    assert all(a.t > b.t for a, b in zip(states, states[1:])) and states[0].t < t_start


def test_refine_steers_the_chain_and_sees_every_step():
    s, seen, target = ddpm.cosine(20), [], torch.full((1, 1, 2, 2), 0.25)

    def refine(x0_hat, t):
        seen.append(t)
        return target
    for chain in (ddpm.p_sample(lambda xt, t: xt, s, torch.randn(1, 1, 2, 2), generator(), refine=refine),
                  ddpm.ddim(lambda xt, t: xt, s, torch.randn(1, 1, 2, 2), 20, generator(), refine=refine)):
        assert torch.allclose(last(chain).x, target, atol=1e-5)
    assert seen == 2 * list(range(20, 0, -1))


def test_ancestral_sampling_can_start_anywhere():
    s = ddpm.linear(30)
    assert [state.t for state in ddpm.p_sample(lambda xt, t: xt, s, torch.zeros(1, 1, 1, 1), generator(), t_start=4)] == [3, 2, 1, 0]


def test_one_step_denoising_of_gaussian_images_is_the_wiener_estimate():
    """Images N(m, v) in [0, 1] units, noise sigma: E[x | y] = m + v / (v + σ²) (y − m)."""
    s, mean, std = ddpm.cosine(1000), 0.6, 0.2
    y = torch.rand(1, 1, 8, 8, generator=generator())
    sigma = ddpm.noise_level(s)[200].item()
    got = ddpm.denoise_photo(gaussian_denoiser(s, 2 * mean - 1, 2 * std), s, y, sigma)
    assert torch.allclose(got, mean + std ** 2 / (std ** 2 + sigma ** 2) * (y - mean), atol=1e-5)


def test_many_steps_from_a_noisy_photo_follow_the_ode_of_gaussian_images():
    """η = 0 with ever more steps moves y along dx/dσ = −σ ∇log p: for N(m, v) that ends at m + √(v / (v + σ²)) (y − m), a sample and not the mean."""
    s, mean, std = ddpm.cosine(1000), 0.6, 0.2
    y = torch.rand(1, 1, 8, 8, generator=generator())
    sigma = ddpm.noise_level(s)[200].item()
    model, seen = gaussian_denoiser(s, 2 * mean - 1, 2 * std), []

    def counted(xt, t):
        seen.append(t)
        return model(xt, t)
    got = ddpm.denoise_photo(counted, s, y, sigma, 100)
    assert torch.allclose(got, mean + (std ** 2 / (std ** 2 + sigma ** 2)) ** 0.5 * (y - mean), atol=3e-3)
    assert len(seen) == 100 and seen[0] == 200


# ------------------------------------------------------------------------------------------ network and training

def small(seed=0, channels=1):
    torch.manual_seed(seed)
    return ddpm.UNet(channels, (8, 16))


def stirred(net):
    """The zero-initialised layers made random, so that every path matters."""
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def test_heads_are_read_by_the_denoiser():
    s, x0, eps = ddpm.cosine(50), *torch.randn(2, 2, 1, 4, 4, generator=generator()).clamp(-1, 1)
    xt = ddpm.q_sample(s, x0, 20, eps)
    for head in (ddpm.eps_head, ddpm.v_head):
        class Perfect(nn.Module):
            def forward(self, x, t):
                assert t.tolist() == [20, 20]
                return head.target(s, x0, eps, t)
        assert torch.allclose(ddpm.denoiser(Perfect(), s, head)(xt, 20), x0, atol=1e-4)
        assert ddpm.loss(Perfect(), s, head, x0, torch.tensor([20, 20]), eps) == 0


@given(st.integers(1, 3), st.integers(3, 16), st.integers(3, 16), st.sampled_from([1, 3]))
def test_the_network_takes_any_size_and_batching_changes_nothing(b, h, w, channels):
    torch.manual_seed(0)
    net = stirred(ddpm.UNet(channels, (8, 16))).eval()
    x, t = torch.randn(b, channels, h, w, generator=generator()), torch.arange(1, b + 1)
    with torch.no_grad():
        out = net(x, t)
        assert out.shape == x.shape
        for i in range(b):
            assert torch.allclose(net(x[i:i + 1], t[i:i + 1]), out[i:i + 1], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(net(x, t + 50), out, atol=1e-2)                                   # it reads the clock


def test_training_resumes_bit_for_bit_and_a_stream_repeats():
    def batch(g):
        return torch.rand(4, 1, 8, 8, generator=g)

    def weights(interrupt):
        net, g, s = small(), generator(3), ddpm.cosine(20)
        run = ddpm.train(net, s, batch, ddpm.v_head, 8, g)
        for state in run:
            if interrupt and state.step == 4:
                saved = {k: (v if not hasattr(v, "clone") else v.clone()) for k, v in state.checkpoint().items()}
                import io
                buffer = io.BytesIO()
                torch.save(saved, buffer)
                buffer.seek(0)
                for state in ddpm.train(small(9), s, batch, ddpm.v_head, 8, generator(8), resume=torch.load(buffer, weights_only=True)):
                    pass
                break
        return state.ema.state_dict(), state.step, state.loss
    (a, step_a, loss_a), (b, step_b, loss_b), (c, _, _) = weights(False), weights(True), weights(False)
    assert step_a == step_b == 8 and loss_a == loss_b
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)


def test_the_average_leaves_buffers_alone():
    """Buffers are copied from the trained network, never averaged; parameters are averaged."""
    net, ema = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(net.weight, 3.0), nn.init.constant_(ema.weight, 1.0)
    net.running_mean.fill_(5.0), net.num_batches_tracked.fill_(7)
    ddpm.update_ema(ema, net, 0.75)
    assert torch.allclose(ema.weight, torch.full((2,), 1.5)) and torch.equal(ema.running_mean, net.running_mean)
    assert ema.num_batches_tracked == 7 and not list(ddpm.UNet(1, (8, 16)).buffers())


class Spy(nn.Module):
    """Remembers the steps that training asks for."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.zeros(1)), []

    def forward(self, xt, t):
        self.seen.extend(t.tolist())
        return self.w * xt


def test_training_stays_below_t_max_and_covers_it():
    spy = Spy()
    for _ in ddpm.train(spy, ddpm.cosine(100), lambda g: torch.rand(16, 1, 4, 4, generator=g), ddpm.eps_head, 40, generator(), t_max=10):
        pass
    assert set(spy.seen) == set(range(1, 11))


def test_logit_normal_steps_have_their_quantiles():
    """log(u / (1 − u)) is normal: the median and the ±1 σ quantiles of the steps that training asks for."""
    spy, mean, std = Spy(), -0.5, 0.8
    for _ in ddpm.train(spy, ddpm.cosine(1000), lambda g: torch.rand(100, 1, 1, 1, generator=g), ddpm.eps_head, 100, generator(),
                        place=ddpm.logit_normal(mean, std)):
        pass
    share = torch.tensor(spy.seen) / 1000
    for z, below in ((-1, 0.1587), (0, 0.5), (1, 0.8413)):
        assert (share.double() <= 1 / (1 + math.exp(-(mean + z * std)))).double().mean().item() == pytest.approx(below, abs=0.01)
    assert torch.equal(ddpm.evenly(share), share)


@pytest.mark.parametrize("head", [ddpm.eps_head, ddpm.v_head])
def test_two_images_are_learnt_by_heart(head):
    """A model trained on two pictures samples those two pictures."""
    s = ddpm.cosine(100)
    pictures = torch.stack([torch.full((1, 8, 8), 0.1), torch.full((1, 8, 8), 0.8)])
    pictures[1, :, :4] = 0.2
    torch.manual_seed(0)
    net = ddpm.UNet(1, (16, 16))
    for state in ddpm.train(net, s, lambda g: pictures[torch.randint(2, (16,), generator=g)], head, 400, generator(), lr=3e-3, ema_decay=0.98):
        pass
    x = last(ddpm.ddim(ddpm.denoiser(state.ema, s, head), s, torch.randn(24, 1, 8, 8, generator=generator(5)), 25, generator())).x
    distance, nearest = (ddpm.to_image(x)[:, None] - pictures).abs().mean((2, 3, 4)).min(1)
    assert distance.median() < 0.05 and 4 <= nearest.sum() <= 20
