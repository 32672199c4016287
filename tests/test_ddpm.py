"""The diffusion's laws: schedules, closed forms, exact posteriors, and samplers fed with exact denoisers."""
import io
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


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def last(chain):
    *_, state = chain
    return state


# ------------------------------------------------------------------------------------------------- schedules

@given(schedules)
def test_a_schedule_falls_strictly_from_one_stays_positive_and_finds_its_noise_levels(s):
    assert s.alpha_bar[0] == 1 and s.beta[0] == 0 and torch.equal(s.alpha, 1 - s.beta)
    assert s.alpha_bar.dtype == torch.float64 and len(s.alpha_bar) == len(s.beta) == s.T + 1
    assert (s.alpha_bar.diff() < 0).all() and (s.alpha_bar > 0).all() and (s.beta <= 0.9991).all()
    for t in {1, 2, (s.T + 1) // 2, s.T}:
        assert ddpm.step_of(s, ddpm.noise_level(s)[t].item()) == t
    assert ddpm.step_of(s, 0.0) == 1 and ddpm.step_of(s, 1e9) == s.T


def test_schedules_are_those_of_the_papers():
    linear, cosine, sigmoid = (make(1000) for make in SCHEDULES)
    u, beta = torch.arange(1001).double() / 1000, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    nichol, jabri = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2, 1 / (1 + (6 * u - 3).exp())
    assert torch.allclose(linear.beta[1:], beta, atol=1e-12)
    assert torch.allclose(cosine.alpha_bar[:-1], (nichol / nichol[0])[:-1], rtol=1e-9)
    assert torch.allclose(sigmoid.alpha_bar, (jabri - jabri[-1]) / (jabri[0] - jabri[-1]), atol=1e-6)
    # No step destroys everything, and fewer steps read the same curve.
    assert cosine.beta.max() == pytest.approx(0.999)
    assert torch.allclose(ddpm.linear(200).alpha_bar, linear.alpha_bar[::5])
    for make in SCHEDULES:
        with pytest.raises(ValueError, match="T ≥ 2"):
            make(1)


# ------------------------------------------------------------------------------------- forward and posterior

@given(schedules, st.data(), st.floats(-2, 2), st.floats(-2, 2))
def test_forward_process_and_posterior_are_gaussian_chaining_and_conditioning(s, data, x0, xt):
    """Brute force: the joint Gaussian of (x_{t−1}, x_t) given x_0, conditioned on x_t. At t = 1 it is x_0."""
    t = data.draw(st.integers(1, s.T))
    before, alpha, beta = s.alpha_bar[t - 1].item(), s.alpha[t].item(), s.beta[t].item()
    mean_before, mean_now = math.sqrt(before) * x0, math.sqrt(alpha * before) * x0
    var_before, var_now, cov = 1 - before, alpha * (1 - before) + beta, math.sqrt(alpha) * (1 - before)
    value, one = torch.tensor([[x0], [1.0]], dtype=torch.float64)
    assert ddpm.q_sample(s, value, t, 0 * one).item() == pytest.approx(mean_now, rel=1e-9)
    assert ddpm.q_sample(s, 0 * one, t, one).item() ** 2 == pytest.approx(var_now, rel=1e-9)
    mean, variance = ddpm.q_posterior(s, x0, xt, t)
    assert mean == pytest.approx(mean_before + cov / var_now * (xt - mean_now), rel=1e-6, abs=1e-8)
    assert variance == pytest.approx(var_before - cov ** 2 / var_now, rel=1e-6, abs=1e-12)
    assert ddpm.q_posterior(s, x0, xt, 1)[1] == 0


@given(schedules, st.data(), st.integers(0, 99))
def test_predictions_and_ranges_are_inverses_and_a_batch_is_its_images(s, data, seed):
    t = torch.tensor([data.draw(st.integers(1, s.T)) for _ in range(3)])
    x0, eps = noise(2, 3, 2, 4, 4, seed=seed, dtype=torch.float64)
    xt = ddpm.q_sample(s, x0, t, eps)
    assert torch.allclose(ddpm.predict_x0(s, xt, t, eps), x0, atol=1e-6)
    assert torch.allclose(ddpm.predict_eps(s, xt, t, x0), eps, atol=1e-6)
    assert torch.equal(ddpm.eps_head.target(s, x0, eps, t), eps)
    # (x_t, v) is (x_0, eps) turned by an angle: v is to eps and −x_0 what x_t is to x_0 and eps.
    v = ddpm.v_target(s, x0, eps, t)
    assert torch.allclose(v, ddpm.q_sample(s, eps, t, -x0))
    assert torch.allclose(ddpm.x0_of_v(s, xt, t, v), x0, atol=1e-12)
    assert torch.allclose(ddpm.to_image(ddpm.to_diffusion(x0)), x0)
    for i in range(3):
        assert torch.equal(ddpm.q_sample(s, x0[i:i + 1], t[i].item(), eps[i:i + 1]), xt[i:i + 1])


# --------------------------------------------------------------- samplers with exact denoisers (the oracles)

def gaussian_denoiser(s, mean, std):
    """E[x0 | xt] for x0 ~ N(mean, std²): a linear function of xt."""
    def denoise(xt, t):
        a = s.alpha_bar[t].item()
        gain = math.sqrt(a) * std ** 2 / (a * std ** 2 + 1 - a)
        return mean + gain * (xt - math.sqrt(a) * mean)
    return denoise


def sampled(eta, denoise, s, x, steps):
    if eta is None:
        return last(ddpm.p_sample(denoise, s, x, generator(1))).x
    return last(ddpm.ddim(denoise, s, x, steps, generator(1), eta)).x


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
def test_gaussian_data_come_back_with_their_mean_and_variance(make, eta):
    s, mean, std, n = make(400), 0.3, 0.5, 40_000
    a = s.alpha_bar[-1].item()
    x = math.sqrt(a) * mean + math.sqrt(1 - a + a * std ** 2) * noise(n, 1, 1, 1)
    got = sampled(eta, gaussian_denoiser(s, mean, std), s, x, 400)
    assert got.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(n) + 0.002)
    assert got.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("eta", [None, 0.0])
def test_mixture_data_come_back_with_their_weights(eta):
    """Three numbers, equally likely: E[x0 | xt] is their mean, weighted by a softmax."""
    s, points, n = ddpm.cosine(300), torch.tensor([-0.8, 0.1, 0.9]), 6000

    def denoise(xt, t):
        a = s.alpha_bar[t].item()
        distance = (xt[..., None] - math.sqrt(a) * points) ** 2
        return (torch.softmax(-distance / (2 * (1 - a)), dim=-1) * points).sum(-1)
    got = sampled(eta, denoise, s, noise(n, 1, 1, 1), 300).flatten()
    distance, nearest = (got[:, None] - points).abs().min(1)
    assert distance.max() < 0.02
    assert torch.allclose(torch.bincount(nearest) / n, torch.ones(3) / 3, atol=4 * math.sqrt(2 / 9 / n))


@given(st.sampled_from(SCHEDULES), st.integers(2, 60), st.integers(0, 99))
def test_ddim_with_all_steps_and_eta_one_is_ancestral_sampling(make, T, seed):
    """With the same noise, state by state: DDIM's Eq. 12 and 16 reduce to DDPM's Eq. 6 and 7."""
    s = make(T)
    denoise, x = gaussian_denoiser(s, 0.2, 0.7), noise(2, 1, 3, 3, seed=seed, dtype=torch.float64)
    a = list(ddpm.p_sample(denoise, s, x, generator(7)))
    b = list(ddpm.ddim(denoise, s, x, s.T, generator(7), eta=1.0))
    for p, q, t in zip(a, b, reversed(range(T)), strict=True):
        assert p.t == q.t == t and torch.allclose(p.x, q.x, atol=1e-6)
        assert torch.allclose(p.x0_hat, q.x0_hat, atol=1e-6)


@given(st.integers(1, 1000), st.integers(1, 100))
def test_jumps_lead_evenly_from_the_start_to_zero(t_start, steps):
    pairs = ddpm.jumps(t_start, steps)
    times = [t for t, _ in pairs] + [0]
    assert times[0] == t_start and [t_next for _, t_next in pairs] == times[1:]
    assert len(pairs) == min(steps, t_start) and all(t > t_next for t, t_next in pairs)
    assert all(abs(t - t_start * (1 - k / len(pairs))) <= 0.51 for k, t in enumerate(times))


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("start, first", [(None, 20), (4, 4)])
def test_one_point_data_are_reached_from_anywhere_and_refine_sees_every_step(make, start, first):
    """`refine` has the last word: it makes the one point out of whatever the model says."""
    x, seen, point = noise(5, 1, 3, 3), [], torch.rand(1, 1, 3, 3, generator=generator(1))

    def refine(x0_hat, t):
        seen.append(t)
        return point.expand_as(x0_hat)
    options = {"t_start": start, "refine": refine}
    for chain in (ddpm.p_sample(lambda xt, t: xt, make(20), x, generator(), **options),
                  ddpm.ddim(lambda xt, t: xt, make(20), x, 20, generator(), 0.5, **options)):
        assert torch.allclose(last(chain).x, point, atol=1e-5)
    assert seen == 2 * list(range(first, 0, -1))


@pytest.mark.parametrize("steps, power, close", [(1, 1, 1e-5), (100, 0.5, 3e-3)])
def test_a_noisy_gaussian_image_becomes_the_wiener_estimate_or_the_end_of_the_ode(steps, power, close):
    """Images N(m, v), noise σ: one evaluation of the model gives E[x | y] = m + v/(v + σ²) (y − m).

    Ever more steps move y along dx/dσ = −σ ∇log p, which ends at m + √(v/(v + σ²)) (y − m).
    """
    s, mean, std = ddpm.cosine(1000), 0.6, 0.2
    y, sigma = torch.rand(1, 1, 8, 8, generator=generator()), ddpm.noise_level(s)[200].item()
    got = ddpm.denoise_photo(gaussian_denoiser(s, 2 * mean - 1, 2 * std), s, y, sigma, steps)
    gain = (std ** 2 / (std ** 2 + sigma ** 2)) ** power
    assert torch.allclose(got, mean + gain * (y - mean), atol=close)


# -------------------------------------------------------------------------------------- network and training

@given(st.integers(1, 3), st.integers(3, 16), st.integers(3, 16), st.sampled_from([1, 3]))
def test_the_network_takes_any_size_and_batching_changes_nothing(b, h, w, channels):
    torch.manual_seed(0)
    net = ddpm.UNet(channels, (8, 16)).requires_grad_(False)
    x, t = noise(b, channels, h, w), torch.arange(1, b + 1)
    assert net(x, t).flatten(2).std(-1).max() < 1e-6
    # Now every path matters, also through the layers that start at zero.
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    out, close = net(x, t), {"rtol": 1e-3, "atol": 1e-3}
    assert out.shape == x.shape and not torch.allclose(net(x, t + 50), out, atol=1e-2)
    for i in range(b):
        assert torch.allclose(net(x[i:i + 1], t[i:i + 1]), out[i:i + 1], **close)
    # An image of odd size is continued by its edge, and the output cut.
    padded = nn.functional.pad(x, (0, w % 2, 0, h % 2), mode="replicate")
    assert torch.allclose(net(padded, t)[..., :h, :w], out, **close)


@pytest.mark.parametrize("head", [ddpm.eps_head, ddpm.v_head])
def test_the_denoiser_reads_the_head_and_clips(head):
    s, (x0, eps) = ddpm.cosine(50), noise(2, 2, 1, 4, 4)

    def perfect(x, t):
        assert t.tolist() == [20, 20] and not torch.is_grad_enabled()
        return head.target(s, x0, eps, t)
    got = ddpm.denoiser(perfect, s, head)(ddpm.q_sample(s, x0, 20, eps), 20)
    assert x0.abs().max() > 1 and torch.allclose(got, x0.clamp(-1, 1), atol=1e-4)


class Constant(nn.Module):
    """One weight, which is its prediction. It remembers the steps t of every batch."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.zeros(())), []

    def forward(self, xt, t):
        self.seen.append(t)
        return self.w.expand_as(xt)


def training(net, steps, seed=0, T=20, size=4, head=ddpm.v_head, **options):
    def batch(g):
        return torch.rand(size, 1, 8, 8, generator=g)
    return ddpm.train(net, ddpm.cosine(T), batch, head, steps, generator(seed), **options)


def test_a_short_run_is_the_beginning_of_a_longer_one_also_when_it_is_resumed():
    """State by state, bit for bit; a checkpoint is a snapshot that further training does not touch."""
    def run(steps, seed, **options):
        torch.manual_seed(seed)
        states = training(ddpm.UNet(1, (8, 16)), steps, seed, warmup=2, **options)
        return [(state.step, state.loss, state.checkpoint()) for state in states]
    whole, short, buffer = run(8, 3), run(4, 3), io.BytesIO()
    torch.save(short[-1][2], buffer)
    buffer.seek(0)
    joined = short + run(8, 9, resume=torch.load(buffer, weights_only=True))
    assert [step for step, _, _ in joined] == list(range(1, 9))
    torch.testing.assert_close(joined, whole, rtol=0, atol=0)


@pytest.mark.parametrize("warmup, decay", [(0, 0.3), (1, 0.999), (5, 0.3)])
def test_the_rate_rises_and_stays_the_gradient_is_clipped_and_the_weights_are_averaged(warmup, decay):
    """Far from its target the clipped gradient is constant, so that Adam moves by the rate itself."""
    far = ddpm.Head(target=lambda s, x0, eps, t: torch.full_like(x0, 1e6), x0=ddpm.predict_x0)
    net, w, mean = Constant(), 0.0, 0.0
    options = {"lr": 0.1, "warmup": warmup, "clip": 0.5, "ema_decay": decay}
    for state in training(net, 20, head=far, **options):
        assert state.loss == pytest.approx((1e6 - w) ** 2)
        w += 0.1 * min(1.0, state.step / warmup) if warmup else 0.1
        kept = min(decay, (1 + state.step) / (10 + state.step))
        mean = kept * mean + (1 - kept) * w
        assert net.w.item() == pytest.approx(w, rel=1e-4)
        assert net.w.grad.abs().item() == pytest.approx(0.5, rel=1e-4)
        assert state.ema.w.item() == pytest.approx(mean, rel=1e-4) and not state.ema.w.requires_grad


def test_an_update_that_is_not_a_number_is_left_out():
    """The weights and their average stay as they were, and the loss says so."""
    net, wrong = Constant(), {3, 4}

    def target(s, x0, eps, t):
        return torch.full_like(x0, math.nan if len(net.seen) in wrong else 1.0)
    weights = [(net.w.item(), state.ema.w.item()) for state in training(
        net, 6, head=ddpm.Head(target=target, x0=ddpm.predict_x0), warmup=0)]
    assert weights[2] == weights[3] == weights[1] != weights[4] and all(map(math.isfinite, weights[5]))


@pytest.mark.parametrize("T, t_max", [(32, None), (100, 32)])
def test_the_steps_of_a_batch_are_spread_evenly_up_to_t_max(T, t_max):
    """32 steps, 16 images: one of 1 and 2, one of 3 and 4, …; over many batches every step comes."""
    net = Constant()
    last(training(net, 40, T=T, size=16, t_max=t_max))
    seen = torch.stack(net.seen)
    assert torch.equal(((seen - 1) // 2).sort(1).values, torch.arange(16).expand(40, 16))
    assert seen.unique().tolist() == list(range(1, 33))


def test_logit_normal_steps_have_their_quantiles():
    """log(u / (1 − u)) is normal: the median and the ±1 σ quantiles of the steps that training draws."""
    net, mean, std = Constant(), -0.5, 0.8
    last(training(net, 100, T=1000, size=100, place=ddpm.logit_normal(mean, std)))
    share = torch.cat(net.seen).double() / 1000
    for z, below in ((-2, 0.0228), (-1, 0.1587), (0, 0.5), (1, 0.8413), (2, 0.9772)):
        quantile = 1 / (1 + math.exp(-(mean + z * std)))
        assert (share <= quantile).double().mean().item() == pytest.approx(below, abs=0.01)


def test_time_features_turn_once_in_2_pi_steps_and_slower():
    found = ddpm.time_features(torch.tensor([3, 500]), 4)
    assert found.tolist() == [pytest.approx([math.sin(t), math.sin(t / 100), math.cos(t), math.cos(t / 100)],
                                            abs=1e-4) for t in (3, 500)]


@pytest.mark.parametrize("head", [ddpm.eps_head, ddpm.v_head])
def test_two_images_are_learnt_by_heart(head):
    s, pictures = ddpm.cosine(100), torch.full((2, 1, 8, 8), 0.1)
    pictures[1, :, :, :4], pictures[1, :, :, 4:] = 0.2, 0.8
    torch.manual_seed(0)
    net = ddpm.UNet(1, (16, 16))

    def batch(g):
        return pictures[torch.randint(2, (16,), generator=g)]
    state = last(ddpm.train(net, s, batch, head, 400, generator(), lr=3e-3, ema_decay=0.98))
    x = sampled(0.0, ddpm.denoiser(state.ema, s, head), s, noise(24, 1, 8, 8, seed=5), 25)
    distance, nearest = (ddpm.to_image(x)[:, None] - pictures).abs().mean((2, 3, 4)).min(1)
    assert distance.median() < 0.05 and 4 <= nearest.sum() <= 20
