"""Denoising diffusion probabilistic models: learn to undo noise, then run the undoing from pure noise.

Read in order: schedule → forward process → posterior → what the network predicts → training → sampling →
network.

Notation (papers: DDPM = Ho et al. 2020, DDIM = Song et al. 2021)
    t = 1 … T     step; t = 0 is the clean image, t = T is (almost) pure noise
    beta[t]       variance added by one step, x_t = √alpha[t] x_{t−1} + √beta[t] · noise; alpha = 1 − beta
    alpha_bar[t]  product of alpha[1 … t];    alpha_bar[0] = 1
    x0, xt, eps   clean image, noisy image, the noise: xt = √ᾱ_t x0 + √(1−ᾱ_t) eps
    x0_hat        the current guess of x0
    denoise       a function (xt, t) → x0_hat; a trained network, or in the tests an exact posterior mean

Images are float tensors (B, C, H, W). Outside this file they live in [0, 1]; the diffusion works in [−1,
1]; `to_diffusion`, `to_image` and the half in `noise_level` convert. Every random number but the initial
weights comes from the `torch.Generator` that the caller passes.
"""
import copy
import math
from typing import Callable, Iterator, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# ---------------------------------------------------------------------------------------------------- ranges

def to_diffusion(image: Tensor) -> Tensor:
    """[0, 1] → [−1, 1]."""
    return 2 * image - 1


def to_image(x: Tensor) -> Tensor:
    """[−1, 1] → [0, 1]; values outside are kept, so the two functions are exact inverses."""
    return (x + 1) / 2


# -------------------------------------------------------------------------------------------------- schedule

class Schedule(NamedTuple):
    """Three float64 tensors of length T + 1, indexed by t itself. Index 0 is the clean image: β₀ = 0, ᾱ₀
    = 1.
    """
    beta: Tensor
    alpha: Tensor
    alpha_bar: Tensor

    @property
    def T(self) -> int:
        return len(self.beta) - 1


def from_curve(alpha_bar: Tensor) -> Schedule:
    """The schedule whose ᾱ follows `alpha_bar` (T+1 values from 1 downwards), with β ≤ 0.999 (Nichol &
    Dhariwal 2021).
    """
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    beta = torch.cat([torch.zeros(1, dtype=torch.float64), beta.clamp(max=0.999)])
    return Schedule(beta, 1 - beta, torch.cumprod(1 - beta, 0))


def linear(T: int = 1000) -> Schedule:
    """β from 1e-4 to 0.02, 1000 equally spaced values (DDPM, Section 4); another T reads the same curve of
    log ᾱ at T + 1 points.
    """
    log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64),
                           torch.log1p(-torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))])
    position = _grid(T) * 1000
    low = position.floor().long().clamp(max=999)
    curve = torch.cumsum(log_alpha, 0)
    return from_curve(torch.exp(torch.lerp(curve[low], curve[low + 1], position - low)))


def cosine(T: int = 1000, s: float = 0.008) -> Schedule:
    """ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s) · π/2) (Nichol & Dhariwal 2021, Eq. 17)."""
    f = torch.cos((_grid(T) + s) / (1 + s) * math.pi / 2) ** 2
    return from_curve(f / f[0])


def sigmoid(T: int = 1000, start: float = -3, end: float = 3) -> Schedule:
    """ᾱ falls along a logistic curve from `start` to `end`, rescaled to run from 1 to 0 (Jabri et al.
    2022; Chen 2023, τ = 1).
    """
    f = torch.sigmoid(-(start + (end - start) * _grid(T)))
    return from_curve((f - f[-1]) / (f[0] - f[-1]))


def _grid(T: int) -> Tensor:
    if T < 2:
        raise ValueError(f"a schedule needs T ≥ 2 steps, got {T}")
    return torch.arange(T + 1, dtype=torch.float64) / T


def noise_level(s: Schedule) -> Tensor:
    """(T+1,): σ_t = √((1−ᾱ_t)/ᾱ_t) / 2, the noise of xt/√ᾱ_t in [0, 1] units (the half undoes [−1, 1])."""
    return torch.sqrt((1 - s.alpha_bar) / s.alpha_bar) / 2


def step_of(s: Schedule, sigma: float) -> int:
    """The step whose noise level is nearest to `sigma` ([0, 1] units) on a logarithmic scale; at least 1."""
    return 1 + int((noise_level(s)[1:].log() - math.log(max(sigma, 1e-12))).abs().argmin())


def at(values: Tensor, t, like: Tensor) -> Tensor:
    """values[t] shaped to multiply `like` (B, …). t is an int or a (B,) integer tensor."""
    v = values.to(like.dtype).to(like.device)[torch.as_tensor(t, device=like.device)]
    return v.reshape(-1, *[1] * (like.dim() - 1))


# ----------------------------------------------------------------------------- forward process and posterior

def q_sample(s: Schedule, x0: Tensor, t, eps: Tensor) -> Tensor:
    """A draw from q(x_t | x_0), DDPM Eq. 4: √ᾱ_t x0 + √(1−ᾱ_t) eps."""
    return at(s.alpha_bar.sqrt(), t, x0) * x0 + at((1 - s.alpha_bar).sqrt(), t, x0) * eps


def predict_x0(s: Schedule, xt: Tensor, t, eps: Tensor) -> Tensor:
    """The x0 for which `q_sample` gives xt (DDPM, Eq. 15)."""
    return (xt - at((1 - s.alpha_bar).sqrt(), t, xt) * eps) / at(s.alpha_bar.sqrt(), t, xt)


def predict_eps(s: Schedule, xt: Tensor, t, x0: Tensor) -> Tensor:
    """The noise for which `q_sample` gives xt; t ≥ 1."""
    return (xt - at(s.alpha_bar.sqrt(), t, xt) * x0) / at((1 - s.alpha_bar).sqrt(), t, xt)


def q_posterior(s: Schedule, x0: Tensor, xt: Tensor, t: int) -> tuple[Tensor, float]:
    """Mean and variance of q(x_{t−1} | x_t, x_0), DDPM Eq. 6–7. The variance at t = 1 is exactly 0."""
    before, now = s.alpha_bar[t - 1], s.alpha_bar[t]
    weight_x0 = float(before.sqrt() * s.beta[t] / (1 - now))
    weight_xt = float(s.alpha[t].sqrt() * (1 - before) / (1 - now))
    return weight_x0 * x0 + weight_xt * xt, float(s.beta[t] * (1 - before) / (1 - now))


# --------------------------------------------------------------------------------- what the network predicts

class Head(NamedTuple):
    """What the network predicts: `target(s, x0, eps, t)`, and the x0 that follows: `x0(s, xt, t,
    prediction)`.
    """
    target: Callable
    x0: Callable


def v_target(s: Schedule, x0: Tensor, eps: Tensor, t) -> Tensor:
    """v = √ᾱ eps − √(1−ᾱ) x0 (Salimans & Ho 2022, Appendix D)."""
    return at(s.alpha_bar.sqrt(), t, x0) * eps - at((1 - s.alpha_bar).sqrt(), t, x0) * x0


def x0_of_v(s: Schedule, xt: Tensor, t, v: Tensor) -> Tensor:
    """x0 = √ᾱ xt − √(1−ᾱ) v: no division, so it is well-conditioned at both ends of the chain."""
    return at(s.alpha_bar.sqrt(), t, xt) * xt - at((1 - s.alpha_bar).sqrt(), t, xt) * v


# The network predicts the noise (DDPM, Eq. 14), or v.
eps_head = Head(target=lambda s, x0, eps, t: eps, x0=predict_x0)
v_head = Head(target=v_target, x0=x0_of_v)


def denoiser(net: nn.Module, s: Schedule, head: Head) -> Callable[[Tensor, int], Tensor]:
    """The network as a function (xt, t) → x0_hat, clipped to the range of images.

    Differentiable in xt if xt requires a gradient (none where the clip acts)."""
    def denoise(xt: Tensor, t) -> Tensor:
        steps = torch.as_tensor(t, device=xt.device).expand(len(xt))
        with torch.set_grad_enabled(xt.requires_grad):
            return head.x0(s, xt, steps, net(xt, steps)).clamp(-1, 1)
    return denoise


def denoise_photo(denoise: Callable, s: Schedule, y: Tensor, sigma: float, steps: int = 1) -> Tensor:
    """Images y in [0, 1] with noise `sigma` → estimates, by `steps` evaluations of DDIM.

    y is, up to scale, a state of the forward process at the step whose noise level is sigma; DDIM starts
    there. One evaluation is E[x0 | y] for a perfect model, and no estimate has a smaller mean squared error.
    Trained models are not perfect; on development photos four evaluations were better.
    """
    t = step_of(s, sigma)
    xt = at(s.alpha_bar.sqrt(), t, y) * to_diffusion(y)
    *_, last = ddim(denoise, s, xt, steps, torch.Generator(), t_start=t)
    return to_image(last.x)


# -------------------------------------------------------------------------------------------------- training

def loss(net: nn.Module, s: Schedule, head: Head, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the prediction; with `eps_head` this is L_simple, DDPM Eq. 14. Scalar."""
    return F.mse_loss(net(q_sample(s, x0, t, eps), t), head.target(s, x0, eps, t))


def evenly(u: Tensor) -> Tensor:
    """All steps equally often, as in DDPM: `place` maps numbers spread over [0, 1] to t / t_max."""
    return u


def logit_normal(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    """Steps around the middle of the chain more often: t / t_max is the logistic function of a normal number.

    Esser et al. 2024, Section 3.1. ndtri turns a uniform number into a normal one.
    """
    return lambda u: torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))


def windows(photos: list[Tensor], generator: torch.Generator, n: int = 8, size: int = 64) -> Tensor:
    """(n, C, size, size): random squares of random photos (C, H, W), reduced, flipped left-right at random.

    The side of a square is log-uniform between `size` and the short side of its photo, so that the network
    meets things near and far.
    """
    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))
    found = []
    for _ in range(n):
        image = photos[draw(len(photos))]
        share = torch.rand(1, generator=generator).item()
        side = round(size * (min(image.shape[1:]) / size) ** share)
        y, x = (draw(length - side + 1) for length in image.shape[1:])
        window = F.adaptive_avg_pool2d(image[:, y:y + side, x:x + side], size)
        found.append(window.flip(2) if draw(2) else window)
    return torch.stack(found)


class TrainState(NamedTuple):
    """After a step: its number (from 1), its loss, the averaged network to use, and a function `checkpoint`.

    `checkpoint()` is a copy of all that `train` needs to go on. Use it, and `ema`, before the next step.
    """
    step: int
    loss: float
    ema: nn.Module
    checkpoint: Callable[[], dict]


def train(net: nn.Module, s: Schedule, batch: Callable[[torch.Generator], Tensor], head: Head, steps: int,
          generator: torch.Generator, *, lr: float = 1e-3, warmup: int = 100, clip: float = 1.0,
          ema_decay: float = 0.999, t_max: Optional[int] = None, place: Callable[[Tensor], Tensor] = evenly,
          resume: Optional[dict] = None) -> Iterator[TrainState]:
    """DDPM Algorithm 1 with Adam: changes `net` in place and yields after each of `steps` updates.

    batch(generator) draws training pictures, (B, C, H, W) in [0, 1]. Their steps t = 1 … t_max (default
    T) come from one uniform number for the whole batch, spread evenly over it (Kingma et al. 2021,
    Appendix I.1); `place` maps such numbers to t / t_max.

    The learning rate rises linearly over `warmup` updates and then stays at `lr`. So a run that is cut
    short is the beginning of a longer one, and no budget is favoured. The noise of the last updates is
    averaged away: `ema` is an exponential average of the weights with decay `ema_decay`, shorter at the
    beginning. Gradients are clipped to norm `clip`.

    resume: a checkpoint. On the same kind of machine the run then goes on bit for bit as if never
    interrupted.
    """
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimiser = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    device, t_max, start = next(net.parameters()).device, t_max or s.T, 0
    if resume:
        net.load_state_dict(resume["net"])
        ema.load_state_dict(resume["ema"])
        optimiser.load_state_dict(resume["optimiser"])
        generator.set_state(resume["generator"])
        start = resume["step"]
    for step in range(start + 1, steps + 1):
        x0 = to_diffusion(batch(generator)).to(device)
        spread = (torch.rand(1, generator=generator) + torch.arange(len(x0)) / len(x0)) % 1
        t = (1 + (place(spread) * t_max).long()).clamp(max=t_max).to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, step / max(1, warmup))
        value = loss(net, s, head, x0, t, eps)
        optimiser.zero_grad()
        value.backward()
        # An update that is not a number would spoil the weights for good: it is left out.
        if nn.utils.clip_grad_norm_(net.parameters(), clip).isfinite():
            optimiser.step()
            update_ema(ema, net, min(ema_decay, (1 + step) / (10 + step)))
        yield TrainState(step, value.item(), ema, lambda: copy.deepcopy({
            "net": net.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict(),
            "generator": generator.get_state(), "step": step}))


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema ← decay · ema + (1 − decay) · net, on parameters; buffers are not averaged but copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    for kept, new in zip(ema.buffers(), net.buffers()):
        kept.copy_(new)


# -------------------------------------------------------------------------------------------------- sampling

class Sample(NamedTuple):
    """After a reverse step: where the chain now stands (t, x in [−1, 1]) and the guess it was moved by."""
    t: int
    x: Tensor
    x0_hat: Tensor


def p_sample(denoise: Callable, s: Schedule, x: Tensor, generator: torch.Generator,
             t_start: Optional[int] = None, refine: Callable = lambda x0_hat, t: x0_hat) -> Iterator[Sample]:
    """Ancestral sampling, DDPM Algorithm 2 with variance β̃_t, from x at step t_start (default T) down to 0.

    Algorithm 2 is written with eps; here the same mean is written with x0_hat: q(x_{t−1} | x_t, x0_hat).
    `refine(x0_hat, t) → x0_hat` is where measurements or another prior can correct the guess.
    """
    for t in range(s.T if t_start is None else t_start, 0, -1):
        x0_hat = refine(denoise(x, t), t)
        mean, variance = q_posterior(s, x0_hat, x, t)
        x = mean + math.sqrt(variance) * _noise(x, generator)
        yield Sample(t - 1, x, x0_hat)


def jumps(t_start: int, steps: int) -> list[tuple[int, int]]:
    """[(t, next t), …] from t_start to 0, evenly spaced; equal steps merge, so there are at most t_start
    jumps.
    """
    times = torch.linspace(t_start, 0, steps + 1).round().long().unique().flip(0).tolist()
    return list(zip(times, times[1:]))


def ddim(denoise: Callable, s: Schedule, x: Tensor, steps: int, generator: torch.Generator, eta: float = 0.,
         t_start: Optional[int] = None, refine: Callable = lambda x0_hat, t: x0_hat) -> Iterator[Sample]:
    """DDIM Eq. 12 in `steps` jumps from t_start (default T) to 0.

    eta = 0: deterministic; eta = 1 and all steps: ancestral sampling. `refine` as in `p_sample`.
    """
    for t, t_next in jumps(s.T if t_start is None else t_start, steps):
        x0_hat = refine(denoise(x, t), t)
        now, then = s.alpha_bar[t].item(), s.alpha_bar[t_next].item()
        # DDIM, Eq. 16: η times the standard deviation of ancestral sampling
        std = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        direction = math.sqrt(max(1 - then - std ** 2, 0)) * predict_eps(s, x, t, x0_hat)
        x = math.sqrt(then) * x0_hat + direction + (std * _noise(x, generator) if std else 0)
        yield Sample(t_next, x, x0_hat)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def shifted(denoise: Callable, shift) -> Callable[[Tensor, int], Tensor]:
    """The model of a shifted distribution, D_R(x) = R⁻¹ D(R x): R mirrors images top to bottom ("flip") or
    rotates their hues by `shift` degrees about the grey axis. R is orthogonal, so white noise stays white.
    """
    if shift == "flip":
        return lambda xt, t: denoise(xt.flip(2), t).flip(2)
    # Rodrigues' formula; the axis is (1, 1, 1)/√3
    angle, cross = math.radians(shift), torch.tensor([[0., -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    R = math.cos(angle) * torch.eye(3) + (1 - math.cos(angle)) / 3 + math.sin(angle) * cross

    def turn(matrix: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("ij,bjhw->bihw", matrix.to(x), x)
    return lambda xt, t: turn(R.T, denoise(turn(R, xt), t))


class Model(NamedTuple):
    """A trained diffusion model: (xt, t) → x0_hat, its schedule, and v (T+1,), the mean squared error of
    x0_hat at each step, as from `error_curve` (not the v of `v_head`)."""
    denoise: Callable[[Tensor, int], Tensor]
    schedule: Schedule
    v: Tensor


def error_curve(denoise: Callable, s: Schedule, x0: Tensor, ts: list[int],
                generator: torch.Generator) -> Tensor:
    """v(t), the mean squared error of x0_hat in [0, 1] units at every step, (T+1,), with v(0) = 0.

    Measured on training images x0 (B, C, H, W) in [0, 1] at two or more rising steps `ts`; in between log v
    is linear in t.
    """
    found = []
    for t in ts:
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        guess = denoise(q_sample(s, to_diffusion(x0), t, eps), t)
        found.append((to_image(guess) - x0).square().mean().item())
    known, logs = torch.tensor([float(t) for t in ts]), torch.tensor(found).log()
    t = torch.arange(1, s.T + 1).clamp(ts[0], ts[-1])
    right = torch.searchsorted(known, t.float()).clamp(min=1, max=len(ts) - 1)
    share = (t - known[right - 1]) / (known[right] - known[right - 1])
    return torch.cat([torch.zeros(1), torch.lerp(logs[right - 1], logs[right], share).exp()])


# --------------------------------------------------------------------------------------------------- network

class ResBlock(nn.Module):
    """norm → SiLU → conv → norm · (1 + scale(t)) + shift(t) → SiLU → conv, added to the input.

    (B, c_in, H, W), (B, c_time) → (B, c_out, H, W); channels are multiples of 8.
    """

    def __init__(self, c_in: int, c_out: int, c_time: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        # Each block starts as its skip path, up to a constant: that keeps early training calm.
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class UNet(nn.Module):
    """(xt, t) → an image-shaped prediction. Any height and width; weights do not depend on the size.

    A U-Net (Ronneberger et al. 2015) without attention: a residual block per scale on the way down, one
    at the bottom, one per scale on the way up, fed with what the way down saw at that scale. `widths` are
    the channels of each scale, finest first. The finest scale is thin but works on whole pixels: noise
    lives there.
    """

    def __init__(self, channels: int = 3, widths: tuple = (32, 64, 96)):
        super().__init__()
        c_time, self.multiple = 4 * widths[0], 2 ** (len(widths) - 1)
        self.embed = nn.Sequential(nn.Linear(widths[0], c_time), nn.SiLU(),
                                   nn.Linear(c_time, c_time), nn.SiLU())
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(ResBlock(w, w, c_time) for w in widths)
        pairs = list(zip(widths, widths[1:]))
        self.shrink = nn.ModuleList(nn.Conv2d(w, v, 3, stride=2, padding=1) for w, v in pairs)
        self.bottom = ResBlock(widths[-1], widths[-1], c_time)
        self.up = nn.ModuleList(ResBlock(2 * w, w, c_time) for w in widths)
        self.grow = nn.ModuleList(nn.Conv2d(v, w, 1) for w, v in pairs)
        self.leave = nn.Sequential(nn.GroupNorm(8, widths[0]), nn.SiLU(),
                                   nn.Conv2d(widths[0], channels, 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        height, width = xt.shape[-2:]
        x = F.pad(xt, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        x = self.enter(x)
        emb, seen = self.embed(time_features(t, self.embed[0].in_features)), []
        for i, block in enumerate(self.down):
            x = block(self.shrink[i - 1](x) if i else x, emb)
            seen.append(x)
        x = self.bottom(x, emb)
        for i in reversed(range(len(self.up))):
            x = self.up[i](torch.cat([x, seen[i]], dim=1), emb)
            if i:
                x = F.interpolate(self.grow[i - 1](x), scale_factor=2, mode="nearest")
        return self.leave(x)[..., :height, :width]


def time_features(t: Tensor, size: int) -> Tensor:
    """(B,) steps → (B, size) sines and cosines of t at wavelengths from 2π to 2π · 10⁴ steps (Vaswani et
    al. 2017).
    """
    frequency = torch.exp(-math.log(1e4) * torch.arange(size // 2, device=t.device) / (size // 2))
    phase = t.float()[:, None] * frequency
    return torch.cat([phase.sin(), phase.cos()], dim=1)
