"""Diffusion and deep image prior together: what each can do for the other.

Read in order: noise stages that tell DIP when to stop → measurements kept back → combining finished images →
DIP in the reverse chain → a diffusion model in DIP's loss.

Notation (besides that of ddpm.py and dip.py)
    y = x + n     a noisy photo, n ~ N(0, σ² I): itself a state of the forward process, where σ_t = σ
    q = y + S ξ   a noisier state of the same process, where σ_t² = σ² + S²
    d             number of values in one image
    r             mean squared error of an estimate, ‖f − x‖²/d; its estimates are called risks
    v(t)          mean squared error of the model's guess x̂₀ at step t, in [0, 1] units
    refine        a function (x̂₀, t) → x̂₀ in [−1, 1]: the hook of ddpm's samplers
Images are float tensors (B, C, H, W) in [0, 1]; σ and S are standard deviations in the same unit.
"""
import itertools
import math
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

import ddpm
import dip

Problem, Restoration = dip.Problem, dip.Restoration


# ------------------------------------------------------------------- noise stages that tell DIP when to stop

class Link(NamedTuple):
    """A state of the forward process that runs through y: the noise S added since y, and q itself."""
    S: float
    q: Tensor


def noising_chain(y: Tensor, sigma: float, ratios: Sequence[float], generator: torch.Generator) -> list[Link]:
    """The forward process continued from y to S = ratio · sigma, nested: q_k = q_{k−1} + s_k ξ_k.

    Raises ValueError unless the ratios are positive and rise.
    """
    chain, q, S = [], y, 0.0
    for ratio in ratios:
        variance = (ratio * sigma) ** 2 - S ** 2
        if not variance > 0:
            raise ValueError(f"the ratios S/σ must be positive and rise, got {list(ratios)}: sort them")
        q = q + math.sqrt(variance) * torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)
        S = ratio * sigma
        chain.append(Link(S, q))
    return chain


def equal_steps(s: ddpm.Schedule, sigma: float, n: int = 4, high: float = 2.0, low: float = 0.25) -> tuple:
    """The ratios S/σ of n states, from `high` to `low`, that are equally many steps of a schedule apart."""
    ends = [ddpm.step_of(s, sigma * math.hypot(1, ratio)) for ratio in (high, low)]
    levels = [ddpm.noise_level(s)[round(t)].item() for t in torch.linspace(*ends, n).tolist()]
    return tuple(round(math.sqrt((level / sigma) ** 2 - 1), 2) for level in levels)


def recorrupted_target(y: Tensor, sigma: float, link: Link) -> Tensor:
    """c = y − (σ²/S²)(q − y): given x, independent of q and of all later links (Pang et al. 2021)."""
    return y - (sigma / link.S) ** 2 * (link.q - y)


def risk(f: Tensor, y: Tensor, sigma: float, link: Link) -> float:
    """‖f − c‖²/d − σ²(1 + σ²/S²): unbiased for ‖f − x‖²/d if f was made of q and later links alone."""
    own_noise = sigma ** 2 * (1 + (sigma / link.S) ** 2)
    return (f - recorrupted_target(y, sigma, link)).square().mean().item() - own_noise


def opposite(y: Tensor, link: Link) -> Link:
    """The link with the opposite noise, y − Sξ: just as likely; in the mean of both ξ cancels."""
    return link._replace(q=2 * y - link.q)


def pair_risk(f: Tensor, g: Tensor, y: Tensor, sigma: float, link: Link) -> float:
    """Unbiased for the squared error of (f + g)/2, where f was made of the link and g of its opposite.

    By the parallelogram law on the two errors, ‖(a+b)/2‖² = ‖a‖²/2 + ‖b‖²/2 − ‖a−b‖²/4. Multiplied out it is
    SURE (Stein 1981) with the divergence as a central difference of step S, but unbiased for any S: the
    two-fold case of antithetic Gaussian randomisation (Liu, Panigrahi & Soloff 2024). The last term has mean
    zero and takes away noise that all steps share.
    """
    halves = risk(f, y, sigma, link) / 2 + risk(g, y, sigma, opposite(y, link)) / 2
    shared = (sigma / link.S) ** 4 * ((link.q - y).square().mean().item() - link.S ** 2)
    return halves - (f - g).square().mean().item() / 4 - shared


def expected_error(value: float, f: Tensor, g: Tensor, y: Tensor, sigma: float, link: Link,
                   ratio: float = 1.15, spread: float = 0.11) -> float:
    """`value`, the `pair_risk` of f and g, made steadier by a divergence-based estimate of the same error.

    The unbiased estimate scatters by σ²√(2/d), as |n|²/d does. A posterior mean has the error σ² ·
    divergence / d (REPORT, section 1.4), and the divergence, a finite difference here, hardly scatters. DIP
    is no posterior mean, but on development photos its error at the stop was `ratio` ± `spread` times that.
    The two are mixed by inverse variance, as if independent. Early in a fit the second is far off; so half
    the distance between them counts as doubt about it, too.
    """
    noise = link.q - y
    theory = ratio * sigma ** 2 * ((f - g) * noise).sum().item() / (2 * noise.square().sum().item())
    doubt = (spread / ratio * theory) ** 2 + (value - theory) ** 2 / 4
    scatter = 2 * sigma ** 4 / y.numel()
    return (doubt * value + scatter * theory) / (doubt + scatter)


class LeastRisk(dip.Valley):
    """The stop rule of a link: least risk of its one network, or of the mean of an antithetic pair."""

    def __init__(self, problem: Problem, link: Link, patience: int = 15):
        super().__init__(patience)
        self.problem, self.link = problem, link

    def __call__(self, step: dip.Step) -> bool:
        y, sigma, images = self.problem.y, self.problem.sigma, step.average.split(1)
        now = (pair_risk if len(images) == 2 else risk)(*images, y, sigma, self.link)
        stop = self.record(step.i, now)
        if self.best == step.i:
            better = expected_error(now, *images, y, sigma, self.link) if len(images) == 2 else now
            self.facts = {"risk": now, "expected": better}
        self.facts = self.facts | {"risk_now": now}
        return stop


def antithetic_pair(problem: Problem, fresh: Callable, generator: torch.Generator, *,
                    ratios: Sequence[float] = (0.25,), antithetic: bool = True, warm: bool = False,
                    patience: int = 15, steps: int = 2000, watch: bool = False, **options
                    ) -> Iterator[Restoration]:
    """DIP on noisier states of the process, y + Sξ and y − Sξ, stopped where their mean has the least
    estimated risk.

    ratios: S/σ of each stage, in the order walked. Give the noisiest first, as the reverse process does:
    then every risk stays unbiased, also with warm, which goes on with the networks of the stage before.
    Several stages are combined by their expected errors and listed in `others`. antithetic: off for one
    network per stage. A stage ends `patience` updates after its least risk, or after `steps`. `options` go
    to dip.fit.
    """
    y, sigma = problem.y, problem.sigma
    chain = dict(zip(sorted(ratios), noising_chain(y, sigma, sorted(ratios), generator)))
    copies, networks, spent, stages, single = 1 + antithetic, None, 0, {}, len(ratios) == 1
    for k, ratio in enumerate(ratios):
        link = chain[ratio]
        targets = torch.stack([link.q, opposite(y, link).q][:copies], 1).flatten(0, 1)
        if networks is None or not warm:
            networks = fresh(problem, generator, copies)
        rules = [LeastRisk(p, link._replace(q=q[None]), patience) for p, q in zip(problem.each(), link.q)]
        fitted = dip.fit(targets, problem.operator.A, *networks, steps, generator, **options)
        for stage in dip.follow(problem, fitted, {"": rules}, watch=watch and k == len(ratios) - 1):
            stages[f"stage {k + 1}"] = stage._replace(now=None, target=link.q)
            yield stage if single else Restoration(stage.image, {"updates": spent}, stage.now, dict(stages))
        spent += max(stage.facts["updates"])
    if not single:
        finished = [s._replace(facts={"risk": s.facts["expected"]}) for s in stages.values()]
        *_, mixed = weighted(problem, finished)
        facts = mixed.facts | {"expected": mixed.facts["risk"], "updates": spent}
        yield Restoration(mixed.image, facts, stage.now, stages)


def one_sided_sure(problem: Problem, fresh: Callable, generator: torch.Generator, *, ratio: float = 0.25,
                   patience: int = 15, steps: int = 2000, watch: bool = False, **options
                   ) -> Iterator[Restoration]:
    """Monte-Carlo SURE (Ramani, Blu & Unser 2008) along a plain fit to y, for comparison; one image at a
    time.

    A second fit, from the same start with the same jitter, to y + Sξ gives the divergence.
    """
    y, sigma, twin = problem.y, problem.sigma, torch.Generator()
    link, = noising_chain(y, sigma, [ratio], generator)
    twin.set_state(generator.get_state())
    fits = [dip.fit(target, problem.operator.A, *fresh(problem, source), steps, source, **options)
            for target, source in ((y, generator), (link.q, twin))]
    valley, stopped = dip.Valley(patience), 0
    for step, other in zip(*fits):
        divergence = ((other.average - step.average) * (link.q - y)).mean().item() / link.S ** 2
        value = (step.average - y).square().mean().item() + 2 * sigma ** 2 * divergence - sigma ** 2
        if not stopped:
            stopped = step.i if valley.record(step.i, value) else 0
            best = step.average if valley.best == step.i else best
        facts = {"step": valley.best, "stopped": stopped or step.i, "updates": 2 * (stopped or step.i)}
        yield Restoration(best, facts, step.average)
        if stopped and not watch:
            return


def recorrupted(problem: Problem, generator: torch.Generator, estimate: Callable[[Tensor, float], Tensor], *,
                ratio: float = 0.25) -> Iterator[Restoration]:
    """Any estimator (y, σ) → image run on the antithetic pair: the mean of both, and its unbiased risk."""
    y, sigma = problem.y, problem.sigma
    link, = noising_chain(y, sigma, [ratio], generator)
    f, g = (estimate(q, math.hypot(sigma, link.S)) for q in (link.q, opposite(y, link).q))
    risks = [pair_risk(f[b:b + 1], g[b:b + 1], y[b:b + 1], sigma, link._replace(q=link.q[b:b + 1]))
             for b in range(len(y))]
    yield Restoration((f + g) / 2, {"risk": risks})


# --------------------------------------------------------------------------------- combining finished images

def best_weights(images: Sequence[Tensor], risks: Sequence[float]) -> tuple[Tensor, float]:
    """The (K,) weights of least estimated error among all averages of K images of one size, and that error.

    The second moments of the errors follow from the risks and from known distances, C_ij = (r_i + r_j − ‖f_i
    − f_j‖²/d)/2; the error of the average with weights w is wᵀ C w. Its least value on the simplex lies
    inside one of its faces, where C w is constant; all faces are tried.
    """
    f = torch.stack([image.flatten() for image in images]).cpu().double()
    r = torch.tensor(risks, dtype=torch.float64)
    C = (r[:, None] + r - (f[:, None] - f).square().mean(2)) / 2
    best, least = None, math.inf
    for size in range(1, len(f) + 1):
        for face in itertools.combinations(range(len(f)), size):
            inside = torch.linalg.pinv(C[face, :][:, face]).sum(1)
            w = torch.zeros(len(f), dtype=torch.float64)
            w[list(face)] = inside / inside.sum() if size > 1 else 1.0
            if w.isfinite().all() and (w >= 0).all() and (error := (w @ C @ w).item()) < least:
                best, least = w, error
    return best, least


def weighted(problem: Problem, experts: Sequence[Restoration]) -> Iterator[Restoration]:
    """The risk-weighted average: the best mixture of finished estimates by their risks, image by image."""
    images, facts = [], {"risk": [], "weights": []}
    for b in range(len(problem.y)):
        found = [expert.image[b] for expert in experts]
        w, error = best_weights(found, [expert.facts["risk"][b] for expert in experts])
        images.append(sum(float(share) * image for share, image in zip(w, found)))
        facts["risk"].append(error)
        facts["weights"].append(w.tolist())
    yield Restoration(torch.stack(images), facts)


def averaged(problem: Problem, experts: Sequence[Restoration]) -> Iterator[Restoration]:
    """The plain mean of finished estimates: the control of everything that averages."""
    yield Restoration(problem.consistent(sum(expert.image for expert in experts) / len(experts)))


# ------------------------------------------------------------------------------------ measurements kept back

def scattered(problem: Problem, generator: torch.Generator, share: float = 0.05) -> Tensor:
    """(1, 1, h, w), 1 for about `share` of the measurements, at random, and for at least one.

    Raises ValueError where nothing was measured."""
    known = problem.known
    if not known.any():
        raise ValueError("nothing is known of this image: give a mask that leaves some pixels")
    unseen = (torch.rand(known.shape, generator=generator) < share).to(known.device) * known
    if not unseen.any():
        unseen.view(-1)[known.argmax()] = 1
    return unseen


def depth(missing: Tensor) -> int:
    """Layers of pixels that can be peeled off the widest hole; missing: (1, 1, h, w), 0 or 1."""
    layers = 0
    while missing.any() and not missing.all():
        missing = -nn.functional.max_pool2d(-missing, 3, 1, 1)
        layers += 1
    return layers


def squares_beside(known: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """(1, 1, h, w), 1 in a few squares of known pixels close to what is missing; all 0 where none fits."""
    pool, unseen = nn.functional.max_pool2d, torch.zeros_like(known)
    near = known * pool(1 - known, 2 * side + 1, 1, side)
    corners = (-pool(-near, side, 1)).nonzero()
    # about a twentieth of what is known, two squares at least
    count = max(2, round(0.05 * known.sum().item() / side ** 2))
    for k in torch.randperm(len(corners), generator=generator)[:count]:
        row, column = corners[k][-2:]
        unseen[..., row:row + side, column:column + side] = 1
    return unseen


def kept_back(problem: Problem, generator: torch.Generator) -> Tensor:
    """(1, 1, h, w), 1 for the measurements that a fit is not to see, so that they can judge it.

    A pixel alone in its neighbourhood says little about a hole: what is far from all that is known is harder
    to guess. So beside a hole of more than ten pixels whole squares are kept back, half as wide as the hole
    is deep; elsewhere single measurements.
    """
    known = problem.known
    side = min(depth(1 - known), int(math.sqrt(0.05 * known.sum().item())))
    if 5 < side <= min(known.shape[-2:]):
        squares = squares_beside(known, side, generator)
        if squares.any():
            return squares
    return scattered(problem, generator)


def held_out(problem: Problem, fresh: Callable, generator: torch.Generator, *, steps: int = 2000,
             **options) -> Iterator[Restoration]:
    """DIP, stopped by a twentieth of the measurements that it does not see: needs neither σ nor the truth."""
    unseen = scattered(problem, generator)
    rules = {"": lambda p: dip.HeldOut(p, unseen)}
    yield from dip.deep_image_prior(problem, fresh, generator, steps=steps, unseen=unseen, rules=rules,
                                    **options)


def judged(problem: Problem, generator: torch.Generator, make: Callable[[Problem], Tensor]
           ) -> Iterator[Restoration]:
    """An image by a formula (problem → image), and its error on measurements kept back from it."""
    unseen = kept_back(problem, generator)
    error = problem.error_on(unseen, make(problem.without(unseen)))
    yield Restoration(problem.consistent(make(problem)), {"error": error})


# ---------------------------------------------------------------------------------- DIP in the reverse chain

def start_step(s: ddpm.Schedule, error: float, kappa: float = 1.0) -> int:
    """The step with σ_t = κ √error, for an image with that (estimated) mean squared error."""
    return ddpm.step_of(s, kappa * math.sqrt(max(error, 0.0)))


Refine = Callable[[Tensor, int], Tensor]
# The hooks below are all built so: give them what they need, get a function (x̂₀, t) → x̂₀.


def in_turn(*hooks: Refine) -> Refine:
    """One hook that applies several, the first one first."""
    def refine(x0_hat: Tensor, t: int) -> Tensor:
        for hook in hooks:
            x0_hat = hook(x0_hat, t)
        return x0_hat
    return refine


def agree(problem: Problem, v: Tensor) -> Refine:
    """Data consistency: x̂₀ + w A⁺(y − A x̂₀), with w = v(t)/(v(t) + σ²).

    Without noise w = 1, and A x̂₀ = y exactly: the range–null-space decomposition (DDNM, Wang, Yu & Zhang
    2023). With noise w is the weight of least variance where guess and measurement err independently and A
    keeps variances (identity, mask; not means of pixels).
    """
    y, operator, sigma = problem

    def refine(x0_hat: Tensor, t: int) -> Tensor:
        w = v[t].item() / (v[t].item() + sigma ** 2) if sigma else 1.0
        image = ddpm.to_image(x0_hat)
        return ddpm.to_diffusion(image + w * operator.pinv(y - operator.A(image)))
    return refine


def fuse(g: Tensor, share: Callable[[int], Tensor | float]) -> Refine:
    """(1 − w) x̂₀ + w g, w = share(t), g in [0, 1]; the noise estimate (x_t − √ᾱ x̃₀)/√(1−ᾱ) moves along."""
    def refine(x0_hat: Tensor, t: int) -> Tensor:
        w = share(t)
        return (1 - w) * x0_hat + w * ddpm.to_diffusion(g)
    return refine


def inverse_variance(a, b):
    """a/(a + b): the best weight of the second of two estimates with independent errors a, b."""
    return a / (a + b)


def fitted_again(problem: Problem, net, z: Tensor, updates: int, generator: torch.Generator, weight: float,
                 **options) -> Refine:
    """Intermediate priors: DIP takes `updates` more, to y and to the guess; its image becomes the guess."""
    def refine(x0_hat: Tensor, t: int) -> Tensor:
        guess = ddpm.to_image(x0_hat).detach()

        def penalty(images: Tensor, i: int) -> Tensor:
            return weight * (images - guess).square().mean((1, 2, 3)).sum()
        *_, last = dip.fit(problem.y, problem.operator.A, net, z, updates, generator, penalty=penalty,
                           **options)
        return ddpm.to_diffusion(last.average)
    return refine


def reverse(f: Tensor, model: ddpm.Model, t: int, evaluations: int, generator: torch.Generator, *,
            eta: float = 0.0, refine: Refine = in_turn()) -> Iterator[ddpm.Sample]:
    """The reverse process started at step t by the images f (B, C, H, W) in [0, 1], by `evaluations` jumps
    of DDIM.

    f is refined and diffused to t, then taken back. Yields the start first, then every reverse step. t = 0:
    no diffusion at all; t = T: f is forgotten, and this is diffusion alone.
    """
    s, x0 = model.schedule, refine(ddpm.to_diffusion(f), t)
    x = ddpm.q_sample(s, x0, t, torch.randn(f.shape, generator=generator).to(f.device))
    yield ddpm.Sample(t, x, x0)
    yield from ddpm.ddim(model.denoise, s, x, evaluations, generator, eta, t_start=t, refine=refine)


def diffusion(problem: Problem, model: ddpm.Model, generator: torch.Generator, *, evaluations: int = 0,
              eta: float = 0.85) -> Iterator[Restoration]:
    """The model alone. Noisy y: 4 evaluations of DDIM from its own step; else 50 from pure noise (DDNM)."""
    denoise, s, v = model
    if problem.sigma:
        yield Restoration(ddpm.denoise_photo(denoise, s, problem.y, problem.sigma, evaluations or 4))
        return
    x = torch.randn(problem.shape, generator=generator).to(problem.y.device)
    for sample in ddpm.ddim(denoise, s, x, evaluations or 50, generator, eta, refine=agree(problem, v)):
        yield Restoration(ddpm.to_image(sample.x0_hat), {"t": sample.t})


def diffusion_pair(problem: Problem, model: ddpm.Model, generator: torch.Generator, *, ratio: float = 0.25,
                   evaluations: int = 4) -> Iterator[Restoration]:
    """The model alone on y ± Sξ: the mean of both estimates, with its risk."""
    def estimate(q: Tensor, level: float) -> Tensor:
        return ddpm.denoise_photo(model.denoise, model.schedule, q, level, evaluations)
    yield from recorrupted(problem, generator, estimate, ratio=ratio)


def warm_start(problem: Problem, model: ddpm.Model, generator: torch.Generator,
               experts: Sequence[Restoration], *, t: int = 0, kappa: float = 4.0, evaluations: int = 8,
               eta: float = 0.0, guide: bool = False) -> Iterator[Restoration]:
    """A finished image f starts the chain late (SDEdit, Meng et al. 2022; CCDF, Chung, Sim & Ye 2022).

    t: the start step; 0: where σ_t is κ times the error of f by its own account (`error` or `risk`).
    guide: each guess is also averaged with f by inverse variance, v(t) against that error."""
    f, facts = experts[0].image, experts[0].facts
    errors = torch.tensor(facts.get("error") or facts["risk"], device=f.device).clamp(min=1e-9)
    t = t or start_step(model.schedule, errors.mean().item(), kappa)
    lean = fuse(f, lambda t: inverse_variance(model.v[t].item(), errors.reshape(-1, 1, 1, 1)))
    refine = in_turn(*[lean] * guide, agree(problem, model.v))
    for sample in reverse(f.expand(problem.shape), model, t, evaluations, generator, eta=eta, refine=refine):
        yield Restoration(ddpm.to_image(sample.x0_hat), {"t": t})


def refit(problem: Problem, model: Optional[ddpm.Model], fresh: Callable, generator: torch.Generator,
          interpolate: Optional[Callable[[Problem], Tensor]], *, brief: int = 100, updates: int = 20,
          weight: float = 0.1, fusion: bool = True, t: int = 0, kappa: float = 4.0, evaluations: int = 8,
          eta: float = 0.0, **options) -> Iterator[Restoration]:
    """DDNM with DIP refits: a brief DIP starts the chain late and is fitted again at every step of it.

    A DIP of `brief` updates, judged by measurements kept back from it, starts the chain at t (0: where σ_t
    is κ times its error there). At every one of `evaluations` guesses it takes `updates` more, to y and,
    with `weight`, to the guess. fusion: its image is also averaged with interpolation, by inverse variance
    of the errors on what both have not seen. evaluations = 0: the brief DIP alone, which needs no model.
    `options` go to dip.fit.
    """
    net, z = fresh(problem, generator)
    unseen = kept_back(problem, generator)
    seen = problem.without(unseen)
    for step in dip.fit(seen.y, seen.operator.A, net, z, brief, generator, **options):
        yield Restoration(problem.consistent(step.average), {"updates": step.i})
    facts = {"updates": brief, "error": problem.error_on(unseen, step.average)}
    yield Restoration(problem.consistent(step.average), facts)
    if not evaluations:
        return
    error = torch.tensor(facts["error"], device=z.device).reshape(-1, 1, 1, 1)
    hooks = [agree(problem, model.v), fitted_again(problem, net, z, updates, generator, weight, **options)]
    if fusion:
        other = torch.tensor(problem.error_on(unseen, interpolate(seen)), device=z.device)
        share = inverse_variance(error, other.clamp(min=1e-9).reshape(-1, 1, 1, 1))
        hooks.append(fuse(problem.consistent(interpolate(problem)), lambda t: share))
        error = error * (1 - share)
    t = t or start_step(model.schedule, error.mean().item(), kappa)
    refine = in_turn(*hooks, agree(problem, model.v))
    chain = reverse(step.average, model, t, evaluations, generator, eta=eta, refine=refine)
    for k, sample in enumerate(chain, 1):
        yield Restoration(ddpm.to_image(sample.x0_hat), facts | {"t": t, "updates": brief + k * updates})


# --------------------------------------------------------------------------- a diffusion model in DIP's loss

def regularised(problem: Problem, model: Optional[ddpm.Model], fresh: Callable, generator: torch.Generator, *,
                steps: int = 0, weight: Optional[float] = None, floor: float = 1.0, begin: int = 100,
                refresh: int = 40, t: int = 300, evaluations: int = 8, **options) -> Iterator[Restoration]:
    """Denoiser-regularised DIP: min_θ max(mean (A f_θ − y)², floor · σ²) + weight · mean (f_θ − x̂₀)².

    With noise x̂₀ is one evaluation of the model on y itself, `weight` 0.3, `steps` 800. Data met as well as
    their noise allows have no gradient any more (Morozov's principle as a constraint, not a stop).

    Without noise `weight` is 0.1 and `steps` five for each pixel of the side. After `begin` updates, a
    running average of the images is diffused to a step of the chain, from t down to t/3 as the fit goes on,
    and taken back by `evaluations` of DDIM to x̂₀; again every `refresh` updates. With one evaluation this
    is RED-diff (Mardani et al. 2024) on the images of a network, as DeepRED (Mataev, Elad & Milanfar 2019)
    has them. No gradient goes through the model.

    weight = 0 leaves the model out, floor = 0 the constraint; both: plain DIP.
    """
    height, width = problem.shape[-2:]
    steps = steps or (800 if problem.sigma else round(5 * (height * width) ** 0.5))
    weight = weight if weight is not None else 0.3 if problem.sigma else 0.1
    begin = 0 if problem.sigma else min(begin, steps // 3)
    mean, target = None, None
    if problem.sigma and weight:
        target = ddpm.denoise_photo(model.denoise, model.schedule, problem.y, problem.sigma)

    def penalty(images: Tensor, i: int) -> Tensor:
        nonlocal mean, target
        seen = images.detach()
        mean = seen if mean is None else torch.lerp(mean, seen, 0.1 / (1 - 0.9 ** i))
        if i <= begin:
            return images.new_zeros(())
        if not problem.sigma and (target is None or (i - 1 - begin) % refresh == 0):
            now = round(t * (1 - 2 / 3 * i / steps))
            *_, end = reverse(mean, model, max(1, now), evaluations, generator)
            target = ddpm.to_image(end.x)
        return weight * (images - target).square().mean((1, 2, 3)).sum()
    fitted = dip.fit(problem.y, problem.operator.A, *fresh(problem, generator), steps, generator,
                     floor=floor * problem.sigma ** 2, penalty=penalty if weight else None, **options)
    yield from dip.follow(problem, fitted, {"": [dip.FixedBudget(steps) for _ in problem.y]})


# --------------------------------------------------------------------------------------------- further terms

def perceptual(problem: Problem, network: ddpm.UNet, s: ddpm.Schedule) -> Callable:
    """Penalty: features of a diffusion model's first layers, of the image and of y, at y's own noise level.
    """
    t = torch.tensor([ddpm.step_of(s, problem.sigma)], device=problem.y.device)
    emb = network.embed(ddpm.time_features(t, network.embed[0].in_features)).detach()

    def features(image: Tensor) -> Tensor:
        xt = ddpm.at(s.alpha_bar.sqrt(), t, image) * ddpm.to_diffusion(image)
        return network.down[0](network.enter(xt), emb)
    target = features(problem.y).detach()
    unit = 0.3 * problem.sigma ** 2 / target.var().item()
    return lambda images, i: unit * (features(images) - target).square().mean((1, 2, 3)).sum()


def adversarial(problem: Problem, draw: Callable[[], Tensor]) -> Callable:
    """Penalty: a small critic learns to tell real patches, draw() → (n, 3, h, w), from images, DIP to fool
    it.
    """
    critic = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1),
                           nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 3)).to(problem.y.device)
    optimiser, softplus = torch.optim.Adam(critic.parameters(), 1e-3, (0.5, 0.9)), nn.functional.softplus

    def penalty(images: Tensor, i: int) -> Tensor:
        optimiser.zero_grad()
        lost = softplus(-critic(draw().to(images.device))).mean() + softplus(critic(images.detach())).mean()
        lost.backward()
        optimiser.step()
        return 0.01 * problem.sigma ** 2 * softplus(-critic(images)).mean() * len(images)
    return penalty
