"""Diffusion and deep image prior together: what each can do for the other.

Read in order: noise stages that tell DIP when to stop → DIP as the entrance to the reverse process → a diffusion model in
DIP's loss.

Notation (besides that of ddpm.py and dip.py)
    y = x + n     a noisy photo, n ~ N(0, σ² I): already a state of the forward process, at the step whose σ_t is σ
    q = y + S ξ   a noisier state of the same process, at the step where σ_t² = σ² + S²
    c             the complement of q: y − (σ²/S²)(q − y)
    d             number of values in y
    v(t)          mean squared error of the model's guess x̂₀ at step t, in [0, 1] units
    refine        a function (x̂₀, t) → x̂₀ in [−1, 1], the hook of ddpm's samplers
Images are float tensors (1, C, H, W) in [0, 1]; σ and S are standard deviations in the same unit.
"""
import math
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
import torch.nn as nn
from torch import Tensor

import ddpm
import dip


# --------------------------------------------------------------------------- noise stages that tell DIP when to stop

class Link(NamedTuple):
    """A state of the forward process that runs through y: its step, the noise S added since y, and q itself."""
    t: int
    S: float
    q: Tensor


def noising_chain(y: Tensor, sigma: float, s: ddpm.Schedule, ts: Sequence[int], generator: torch.Generator) -> list[Link]:
    """The forward process continued from y to the steps `ts` (rising): q_k = q_{k−1} + s_k ξ_k, nested, never drawn anew from y.

    Raises ValueError where a step is not noisier than the one before (or than y).
    """
    chain, q, S = [], y, 0.0
    for t in ts:
        variance = ddpm.noise_level(s)[t].item() ** 2 - sigma ** 2
        if not variance > S ** 2:
            raise ValueError(f"step {t} must be noisier than the step before it: give rising steps with σ_t above {math.hypot(sigma, S):.4f}")
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)
        q = q + math.sqrt(variance - S ** 2) * noise
        S = math.sqrt(variance)
        chain.append(Link(t, S, q))
    return chain


def complement(y: Tensor, sigma: float, link: Link) -> Tensor:
    """c = y − (σ²/S²)(q − y): given x, independent of q and of every later link (one link: Pang et al. 2021; REPORT, section 1.4)."""
    return y - (sigma / link.S) ** 2 * (link.q - y)


def risk(f: Tensor, y: Tensor, sigma: float, link: Link) -> float:
    """‖f − c‖²/d − σ²(1 + σ²/S²): unbiased for ‖f − x‖²/d if f was made of q and of later links alone, in any way."""
    return (f - complement(y, sigma, link)).square().mean().item() - sigma ** 2 * (1 + (sigma / link.S) ** 2)


def mirror(y: Tensor, link: Link) -> Link:
    """The link with the opposite noise, y − Sξ: just as likely, and together the two cancel ξ to first order."""
    return link._replace(q=2 * y - link.q)


def pair_risk(f: Tensor, g: Tensor, y: Tensor, sigma: float, link: Link) -> float:
    """Unbiased for the squared error of (f + g)/2, where f was made of the link and g of its mirror.

    By the parallelogram law on the two errors, ‖(a+b)/2‖² = ‖a‖²/2 + ‖b‖²/2 − ‖a−b‖²/4. Multiplied out it is SURE (Stein 1981) with
    the divergence as a central difference of step S, but unbiased for any S: the two-fold case of antithetic Gaussian
    randomisation (Liu, Panigrahi & Soloff 2024). The last term has mean zero and takes away noise that all steps share.
    """
    halves = risk(f, y, sigma, link) / 2 + risk(g, y, sigma, mirror(y, link)) / 2
    shared = (sigma / link.S) ** 4 * ((link.q - y).square().mean().item() - link.S ** 2)
    return halves - (f - g).square().mean().item() / 4 - shared


def expected_error(value: float, f: Tensor, g: Tensor, y: Tensor, sigma: float, link: Link, ratio: float = 1.15, spread: float = 0.11) -> float:
    """`value`, which is `pair_risk` of f and g, made steadier by a second opinion on the squared error of their mean.

    The unbiased estimate scatters by σ²√(2/d), as |n|²/d does. A posterior mean has the error σ² · divergence / d exactly
    (REPORT, section 1.4), and the divergence, a finite difference here, hardly scatters. Deep image priors are no posterior means, but
    the error of theirs was `ratio` ± `spread` times that on development photos. The two are mixed by inverse variance.
    """
    noise = link.q - y
    theory = ratio * sigma ** 2 * ((f - g) * noise).sum().item() / (2 * noise.square().sum().item())
    doubt, scatter = (spread / ratio * theory) ** 2, 2 * sigma ** 4 / y.numel()
    return (doubt * value + scatter * theory) / (doubt + scatter)


def blend(f: Tensor, risk_f: float, g: Tensor, risk_g: float) -> tuple[Tensor, float]:
    """The convex combination w f + (1−w) g of least estimated risk, and that risk.

    On the errors, ‖w a + (1−w) b‖² = w‖a‖² + (1−w)‖b‖² − w(1−w)‖a−b‖², and a − b = f − g is known. So with D = ‖f−g‖²/d the best
    weight is ½ + (risk_g − risk_f)/(2D), cut to [0, 1]; equal risks gain D/4.
    """
    D = (f - g).square().mean().item()
    w = min(1.0, max(0.0, 0.5 + (risk_g - risk_f) / (2 * D))) if D else 1.0
    return w * f + (1 - w) * g, w * risk_f + (1 - w) * risk_g - w * (1 - w) * D


class Stage(NamedTuple):
    """After an update within stage `k` (the noisiest is 0): what was fitted, how far, and what there is to deliver.

    image: the stage's running average, of both networks where the link has a mirror. value: its estimated squared error,
    or, on y itself, its misfit in units of σ². best_step, best: the step of this stage to be delivered and its image. blended,
    expected: the combination of all stages so far and its estimated squared error (NaN where nothing can estimate it). stopped:
    the stage has had enough; from then on best_step to expected stand still.
    """
    k: int
    link: Link
    i: int
    image: Tensor
    value: float
    best_step: int
    best: Tensor
    blended: Tensor
    expected: float
    stopped: bool


def staged_fit(y: Tensor, sigma: float, chain: Sequence[Link], fresh: Callable[[], tuple[nn.Module, Tensor]], steps: int,
               generator: torch.Generator, *, mirrored: bool = True, warm: bool = False, patience: int = 15, watch: bool = False,
               **options) -> Iterator[Stage]:
    """DIP on the states of a noising chain, in the order given, each stopped by its own error meter; at most `steps` a stage.

    Give the noisiest link first, as the reverse process does: then every meter is honest, also with `warm`. fresh() gives a
    new network and its input. mirrored: fit a second network to the link with the opposite noise, in step with the first, and
    deliver their mean; otherwise one network per stage. warm: go on with the networks of the stage before. A stage ends
    `patience` steps after its least estimated risk. A link with S = 0 is plain DIP on y, where no complement exists: it stops
    when its misfit has fallen to the fraction of the noise that was left at the best step of the stage before (to σ² itself
    if there was none), and counts for 0.7 in the blend. watch: go on to `steps` after the last stage's stop, for a scorer who
    wants to see what was missed. `options` go to dip.fit.
    """
    nets, fraction, blended, expected = [], 1.0, None, math.nan
    for k, link in enumerate(chain):
        links = [link, mirror(y, link)] if mirrored and link.S else [link]
        nets = nets[:len(links)] if warm and k else [fresh() for _ in links]
        fits = [dip.fit(x.q, lambda image: image, net, z, steps, generator, **options) for x, (net, z) in zip(links, nets)]
        valley, before, stopped = dip.Valley(patience), (blended, expected), False
        for pair in zip(*fits):
            images, i = [step.average for step in pair], pair[0].i
            image = sum(images) / len(images)
            misfit = (images[0] - link.q).square().mean().item() / (sigma ** 2 + link.S ** 2)
            value = misfit if not link.S else pair_risk(*images, y, sigma, link) if mirrored else risk(image, y, sigma, link)
            over, stopped = stopped, stopped or (valley.record(i, value) if link.S else misfit <= fraction)
            if not over and (valley.best == i or not link.S):
                best, best_step, left, blended = image, i, misfit, image
                expected = math.nan if not link.S else expected_error(value, *images, y, sigma, link) if mirrored else value
                if before[0] is not None:
                    blended, expected = blend(*before, image, expected) if link.S else (0.3 * before[0] + 0.7 * image, math.nan)
            yield Stage(k, link, i, image, value, best_step, best, blended, expected, stopped)
            if stopped and not (watch and k == len(chain) - 1):
                break
        fraction = left


# ------------------------------------------------------------------------- DIP as the entrance to the reverse process

def error_curve(denoise: Callable, s: ddpm.Schedule, x0: Tensor, ts: Sequence[int], generator: torch.Generator) -> Tensor:
    """v(t), the model's mean squared error in [0, 1] units at every step, (T+1,): measured on training images x0 (B, C, H, W) in
    [0, 1] at two or more strictly rising steps `ts`, linear in between (in log v against t), with v(0) = 0."""
    found = []
    for t in ts:
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        guess = denoise(ddpm.q_sample(s, ddpm.to_diffusion(x0), t, eps), t)
        found.append((ddpm.to_image(guess) - x0).square().mean().item())
    known, logs = torch.tensor([float(t) for t in ts]), torch.tensor(found).log()
    t = torch.arange(1, s.T + 1).clamp(ts[0], ts[-1])
    right = torch.searchsorted(known, t.float()).clamp(min=1, max=len(ts) - 1)
    share = (t - known[right - 1]) / (known[right] - known[right - 1])
    return torch.cat([torch.zeros(1), torch.lerp(logs[right - 1], logs[right], share).exp()])


def enter_step(s: ddpm.Schedule, error: float, kappa: float = 1.0) -> int:
    """The step with σ_t = κ √error, where `error` is the (estimated) mean squared error of the picture that enters."""
    return ddpm.step_of(s, kappa * math.sqrt(max(error, 0.0)))


def kept_back(y: Tensor, operator: dip.Operator, generator: torch.Generator, squares: bool = True) -> Tensor:
    """1 for the measurements that a fit is not to see, (1, 1, h, w): about a twentieth, scattered; or, with `squares` and where a hole is
    more than ten pixels wide, two or more squares beside it, as wide as the hole is deep, a tenth of all that is known at most. What is
    far from all that is known is harder to guess. At least one measurement is kept back."""
    known, pool = operator.A(torch.ones_like(operator.pinv(y)))[:, :1], nn.functional.max_pool2d
    missing, side, places = (known < 0.5).float(), 0, []
    while squares and missing.any():                                                     # peel the hole: how deep is it?
        missing, side = -pool(-missing, 3, 1, 1), side + 1
    side = min(side, int(math.sqrt(0.05 * known.sum().item())))
    if 5 < side <= min(y.shape[-2:]):
        beside = known * pool(1 - known, 2 * side + 1, 1, side)
        places = (-pool(-beside, side, 1)).nonzero()                                      # where a whole square fits
    if not len(places):
        unseen = (torch.rand(1, 1, *y.shape[-2:], generator=generator) < 0.05).float().to(y.device) * known
        unseen.view(-1)[known.argmax()] = max(unseen.view(-1)[known.argmax()], float(not unseen.any()))
        return unseen
    unseen = torch.zeros_like(known)
    for k in torch.randperm(len(places), generator=generator)[:max(2, round(0.05 * known.sum().item() / side ** 2))]:
        i, j = places[k][-2:]
        unseen[..., i:i + side, j:j + side] = 1
    return unseen


def kept_error(picture: Tensor, y: Tensor, operator: dip.Operator, unseen: Tensor) -> float:
    """The mean squared error of a picture on the measurements kept back."""
    return ((operator.A(picture) - y).square() * unseen).sum().item() / max(1.0, unseen.expand_as(y).sum().item())


def together(a: float, b: float) -> float:
    """The squared error of two pictures fused by inverse variance (`lean_on`), if theirs are `a` and `b` and independent."""
    return a * b / (a + b)


Refine = Callable[[Tensor, int], Tensor]


def in_turn(*hooks: Refine) -> Refine:
    """One `refine` hook that applies several, the first one first."""
    def refine(x0_hat: Tensor, t: int) -> Tensor:
        for hook in hooks:
            x0_hat = hook(x0_hat, t)
        return x0_hat
    return refine


def agree(y: Tensor, operator: dip.Operator, sigma: float, v: Tensor) -> Refine:
    """Data consistency: x̂₀ + w A⁺(y − A x̂₀), with w = v(t)/(v(t) + σ²).

    Without noise w = 1, and A x̂₀ = y exactly: the range–null-space decomposition (DDNM, Wang, Yu & Zhang 2023). With noise w is the
    weight of least variance where guess and measurement err independently and A keeps variances (identity, mask; not means of pixels).
    """
    def refine(x0_hat: Tensor, t: int) -> Tensor:
        w = v[t].item() / (v[t].item() + sigma ** 2) if sigma else 1.0
        image = ddpm.to_image(x0_hat)
        return ddpm.to_diffusion(image + w * operator.pinv(y - operator.A(image)))
    return refine


def lean_on(f: Tensor, error: float, v: Tensor) -> Refine:
    """DIP guides every step: x̂₀ and f fused by inverse variance, (δ² x̂₀ + v(t) f) / (δ² + v(t)) with δ² = `error` of f.

    Moving the guess moves the noise estimate, ε̃ = (x_t − √ᾱ x̃₀)/√(1−ᾱ). Early in the chain f leads, late the model does.
    """
    def refine(x0_hat: Tensor, t: int) -> Tensor:
        w = v[t].item() / (v[t].item() + error)
        return (1 - w) * x0_hat + w * ddpm.to_diffusion(f)
    return refine


def refit(y: Tensor, A: Callable, net: nn.Module, z: Tensor, steps: int, generator: torch.Generator, at: Sequence[int], *,
          weight: float = 1.0, **options) -> Refine:
    """Intermediate priors: at the steps t in `at`, DIP is fitted for `steps` more updates to y and to the current guess, and
    its picture becomes the guess. (In `hand_over` the step of the entrance counts twice: for the entrance and for the step from it.)"""
    def refine(x0_hat: Tensor, t: int) -> Tensor:
        if t not in at:
            return x0_hat
        target = ddpm.to_image(x0_hat).detach()
        *_, last = dip.fit(y, A, net, z, steps, generator, penalty=lambda image, i: weight * (image - target).square().mean(), **options)
        return ddpm.to_diffusion(last.average)
    return refine


def hand_over(f: Tensor, denoise: Callable, s: ddpm.Schedule, t: int, steps: int, generator: torch.Generator, *, eta: float = 0.0,
              refine: Refine = lambda x0_hat, t: x0_hat) -> Iterator[ddpm.Sample]:
    """The reverse process entered at step t by the pictures f (B, C, H, W) in [0, 1], for `steps` evaluations by DDIM.

    f is refined and diffused to t (q_sample), then taken back. Yields the entrance first, then every reverse step. t = 0: no
    diffusion at all; t = T: f is forgotten, and this is diffusion alone. Copies of f in the batch give different samples.
    """
    x0 = refine(ddpm.to_diffusion(f), t)
    x = ddpm.q_sample(s, x0, t, torch.randn(f.shape, generator=generator).to(f.device))
    yield ddpm.Sample(t, x, x0)
    yield from ddpm.ddim(denoise, s, x, steps, generator, eta, t_start=t, refine=refine)


# ------------------------------------------------------------------------------------ a diffusion model in DIP's loss

def guided_fit(y: Tensor, A: Callable, net: nn.Module, z: Tensor, steps: int, generator: torch.Generator, denoise: Callable, s: ddpm.Schedule, *,
               weight: Callable[[int], float], ts: Callable[[float], int], noise: torch.Generator, refresh: int = 5, evaluations: int = 1,
               begin: int = 0, floor: float = 0.0, guess: Callable[[Tensor, int], Tensor] | None = None, follow: float = 0.9, average: float = 0.99,
               **options) -> Iterator[dip.Step]:
    """min_θ max(mean (A f_θ(z) − y)², floor) + weight(t) mean (f_θ(z) − sg[x̂₀])²: DIP whose images are also pulled to where the model sees them.

    At update i the chain is at the step t = ts(i / steps). Every `refresh` updates a running average of the images (decay `follow`)
    is handed over: diffused to t with noise from `noise` and taken back by `evaluations` steps of DDIM, to x̂₀. The first `begin`
    updates are plain DIP. No gradient goes through the model, so a fit costs at most ⌈(steps − begin) / refresh⌉ times
    `evaluations`. With one evaluation this is RED-diff (Mardani et al. 2024) with a network's images in place of free pixels, as in
    DeepRED (Mataev, Elad & Milanfar 2019) with a diffusion model as the denoiser.

    floor: the misfit of the truth, σ² for noise σ: data that are met so well have nothing left to say (Morozov's discrepancy
    principle, as a constraint and not as a stop). From the first update below it all images count alike in the average.
    guess(running average, t): another way to x̂₀, such as what the model makes of a noisy y, which is a state of the chain itself.
    `options` go to dip.fit, whose Steps it yields; with weight 0 and floor 0 it is dip.fit.
    """
    mean, target, w, settled, count, last = None, None, 0.0, None, 1 / (1 - average), 0

    def restart(image: Tensor, t: int) -> Tensor:
        *_, end = hand_over(image, denoise, s, t, evaluations, noise)
        return ddpm.to_image(end.x)

    def penalty(image: Tensor, i: int) -> Tensor:
        nonlocal mean, target, w, last
        mean, last = image.detach() if mean is None else torch.lerp(mean, image.detach(), (1 - follow) / (1 - follow ** i)), i
        slack = (floor - (A(image) - y).square().mean()).clamp(min=0) if floor else image.new_zeros(())
        if i <= begin:
            return slack
        if target is None or (i - 1 - begin) % refresh == 0:
            t = ts(i / steps)
            with torch.no_grad():
                target, w = (guess or restart)(mean, t), weight(t)
        return slack + w * (image - target).square().mean()

    for step in dip.fit(y, A, net, z, steps, generator, penalty=penalty, average=average, **options):
        if settled is not None and last == step.i:                                          # not where dip.fit has just stepped back
            count += 1
            settled = torch.lerp(settled, step.image, 1 / count)
        elif settled is None and floor and step.misfit <= floor:
            settled = step.average
        yield step if settled is None else step._replace(average=settled)
