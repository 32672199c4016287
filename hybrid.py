"""Diffusion and deep image prior together: what each can do for the other.

Read in order: noise stages that tell DIP when to stop → combining finished images → measurements kept back →
the reverse chain, and DIP in it → a diffusion model in DIP's loss.

Notation (besides that of ddpm.py and dip.py)
    y = x + n     a noisy photo, n ~ N(0, σ² I): up to scale a state of the forward process, where σ_t = σ
    ξ             fresh N(0, I) noise, independent of n
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
from dip import Fresh, Problem, Restoration


# ------------------------------------------------------------------- noise stages that tell DIP when to stop

class Link(NamedTuple):
    """A state of the forward process that runs through y: the noise S added since y, and q itself."""
    S: float
    q: Tensor


def noising_chain(y: Tensor, sigma: float, ratios: Sequence[float], generator: torch.Generator) -> list[Link]:
    """The forward process continued from y to S = ratio · sigma, nested: q_k = q_{k−1} + s_k ξ_k, q_0 = y.

    s_k² = S_k² − S_{k−1}². Raises ValueError unless sigma and the ratios are positive and the ratios rise.
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
    """c = y − (σ²/S²)(q − y): given x, independent of q and of all noisier links (Pang et al. 2021)."""
    return y - (sigma / link.S) ** 2 * (link.q - y)


def risk(f: Tensor, y: Tensor, sigma: float, link: Link) -> float:
    """‖f − c‖²/d − σ²(1 + σ²/S²): unbiased for ‖f − x‖²/d if f was made of q and noisier links alone."""
    own_noise = sigma ** 2 * (1 + (sigma / link.S) ** 2)
    return (f - recorrupted_target(y, sigma, link)).square().mean().item() - own_noise


def opposite(y: Tensor, link: Link) -> Link:
    """The link with the opposite noise, y − Sξ: just as likely; in the mean of both ξ cancels."""
    return link._replace(q=2 * y - link.q)


def pair_risk(f: Tensor, g: Tensor, y: Tensor, sigma: float, link: Link) -> float:
    """Unbiased for the squared error of (f + g)/2, where f was made of the link and g of its opposite.

    By the parallelogram law on the two errors, ‖(a+b)/2‖² = ‖a‖²/2 + ‖b‖²/2 − ‖a−b‖²/4. Multiplied out it is
    SURE (Stein 1981) with the divergence as a central difference of step S, but unbiased for any S: the
    two-fold case of antithetic Gaussian randomisation (Liu, Panigrahi & Soloff 2024). What is subtracted
    last, (σ/S)⁴ (‖q − y‖²/d − S²), has mean zero: it removes noise of ξ that is the same at every update. The
    result may be negative.
    """
    halves = risk(f, y, sigma, link) / 2 + risk(g, y, sigma, opposite(y, link)) / 2
    shared = (sigma / link.S) ** 4 * ((link.q - y).square().mean().item() - link.S ** 2)
    return halves - (f - g).square().mean().item() / 4 - shared


def expected_error(value: float, f: Tensor, g: Tensor, y: Tensor, sigma: float, link: Link,
                   ratio: float = 1.15, spread: float = 0.11) -> float:
    """`value`, the `pair_risk` of f and g, made steadier by a divergence-based estimate of the same error.

    The unbiased estimate scatters by σ²√(2/d), as |n|²/d does. A posterior mean has the error σ² · divergence
    / d (REPORT, section 1.4), and the divergence, a finite difference here, hardly scatters. DIP is no
    posterior mean, but on development photos its error at the stop was `ratio` ± `spread` times that (this
    ratio is not S/σ). The two are mixed by inverse variance, as if independent: heuristic. Early in a fit the
    second is far off; so half the distance between them counts as doubt about it, too.
    """
    noise = link.q - y
    theory = ratio * sigma ** 2 * ((f - g) * noise).sum().item() / (2 * noise.square().sum().item())
    doubt = (spread / ratio * theory) ** 2 + (value - theory) ** 2 / 4
    scatter = 2 * sigma ** 4 / y.numel()
    return (doubt * value + scatter * theory) / (doubt + scatter)


class LeastRisk(dip.Valley):
    """The stop rule of a link: least risk of its one network, or of the mean of an antithetic pair.

    facts: risk and expected error of the best step; risk_now, that of the last step before the stop."""

    def __init__(self, problem: Problem, link: Link, patience: int = 15):
        super().__init__(patience)
        self.problem, self.link = problem, link
        self.facts = {"risk": math.nan, "expected": math.nan}

    def __call__(self, step: dip.Step) -> bool:
        y, sigma, images = self.problem.y, self.problem.sigma, step.average.split(1)
        judge: Callable = pair_risk if len(images) == 2 else risk
        now = judge(*images, y, sigma, self.link)
        stop = self.record(step.i, now)
        if self.best == step.i:
            better = (expected_error(now, images[0], images[1], y, sigma, self.link)
                      if len(images) == 2 else now)
            self.facts = {"risk": now, "expected": better}
        self.facts = self.facts | {"risk_now": now}
        return stop


def antithetic_pair(problem: Problem, fresh: Fresh, generator: torch.Generator, *,
                    ratios: Sequence[float] = (0.25,), antithetic: bool = True, warm: bool = False,
                    patience: int = 15, steps: int = 2000, watch: bool = False, **options
                    ) -> Iterator[Restoration]:
    """Denoising by DIP on noisier states, y ± Sξ, stopped where their mean has the least estimated risk.

    ratios: S/σ of each stage, in the order walked. Give the noisiest first, as the reverse process does: then
    every risk stays unbiased, also with warm, which goes on with the networks of the stage before: they have
    seen noisier links only. Several stages are combined by their expected errors and listed in `others`.
    antithetic: off for one network per stage. A stage ends `patience` updates after its least risk, or after
    `steps`.
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
        *_, best = weighted(problem, finished)
        facts = best.facts | {"expected": best.facts["risk"], "updates": spent}
        yield Restoration(best.image, facts, stage.now, stages)


def one_sided_sure(problem: Problem, fresh: Fresh, generator: torch.Generator, *, ratio: float = 0.25,
                   patience: int = 15, steps: int = 2000, watch: bool = False, **options
                   ) -> Iterator[Restoration]:
    """Monte-Carlo SURE (Ramani, Blu & Unser 2008) along a plain fit to y, for one image at a time.

    A second fit, from the same start with the same jitter, to y + Sξ gives the divergence."""
    y, sigma, twin = problem.y, problem.sigma, torch.Generator()
    link, = noising_chain(y, sigma, [ratio], generator)
    twin.set_state(generator.get_state())
    fits = [dip.fit(target, problem.operator.A, *fresh(problem, source), steps, source, **options)
            for target, source in ((y, generator), (link.q, twin))]
    valley, stopped, best = dip.Valley(patience), 0, y
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

def moments(images: Sequence[Tensor], risks: Sequence[float]) -> Tensor:
    """(K, K), the second moments of the errors of K images of one size, from their mean squared errors.

    f_i − f_j is the difference of two errors, so C_ij = (r_i + r_j − ‖f_i − f_j‖²/d)/2: known distances and
    K estimated numbers are enough, the truth is not needed.
    """
    f = torch.stack([image.flatten() for image in images]).cpu().double()
    r = torch.as_tensor(risks, dtype=torch.float64)
    return (r[:, None] + r - (f[:, None] - f).square().mean(2)) / 2


def least_on_simplex(C: Tensor) -> tuple[Tensor, float]:
    """The (K,) weights, not negative, of sum 1, of the average with the least error wᵀ C w, and that error.

    It lies inside one of the simplex's faces, where C w is constant; all faces are tried.
    """
    best, least = None, math.inf
    for size in range(1, len(C) + 1):
        for face in itertools.combinations(range(len(C)), size):
            inside = torch.linalg.pinv(C[face, :][:, face]).sum(1)
            w = torch.zeros(len(C), dtype=torch.float64)
            w[list(face)] = inside / inside.sum() if size > 1 else 1.0
            if w.isfinite().all() and (w >= 0).all() and (error := (w @ C @ w).item()) < least:
                best, least = w, error
    return best, least


def mixed(experts: Sequence[Restoration], b: int, w: Tensor) -> Tensor:
    """The average of image b of every expert with weights w."""
    return sum(float(share) * expert.image[b] for share, expert in zip(w, experts))


def weighted(problem: Problem, experts: Sequence[Restoration]) -> Iterator[Restoration]:
    """The risk-weighted average: the best mixture of finished estimates by their risks, image by image."""
    images, facts = [], {"risk": [], "weights": []}
    for b in range(len(problem.y)):
        risks = [expert.facts["risk"][b] for expert in experts]
        w, error = least_on_simplex(moments([expert.image[b] for expert in experts], risks))
        images.append(mixed(experts, b, w))
        facts["risk"].append(error)
        facts["weights"].append(w.tolist())
    yield Restoration(torch.stack(images), facts)


def stacked(problem: Problem, experts: Sequence[Restoration],
            unseen: Callable[[Problem], Tensor], *, shrink: float = 0.1) -> Iterator[Restoration]:
    """Stacking (Wolpert 1992; Breiman 1996), for measurements without noise.

    The second half of the experts are the first half, blind to the measurements where unseen(problem) is 1.
    There the second moments of their errors are measured, and so the best weights of the first half. shrink:
    this share of the least error is added to the diagonal, which draws the weights towards equality.
    """
    half, kept, images, facts = len(experts) // 2, unseen(problem), [], {"error": [], "weights": []}
    for b in range(len(problem.y)):
        misses = torch.stack([(problem.operator.A(expert.image[b:b + 1]) - problem.y[b]) * kept
                              for expert in experts[half:]]).flatten(1).double().cpu()
        C = misses @ misses.T / (kept.sum().item() * problem.y.shape[1])
        w, _ = least_on_simplex(C + shrink * C.diagonal().min() * torch.eye(half))
        images.append(mixed(experts, b, w))
        facts["error"].append((w @ C @ w).item())
        facts["weights"].append(w.tolist())
    yield Restoration(problem.consistent(torch.stack(images)), facts)


def averaged(problem: Problem, experts: Sequence[Restoration]) -> Iterator[Restoration]:
    """The plain mean of finished estimates: the control of everything that averages."""
    yield Restoration(problem.consistent(sum(expert.image for expert in experts) / len(experts)))


# ------------------------------------------------------------------------------------ measurements kept back

def scattered(problem: Problem, generator: torch.Generator, share: float = 0.05) -> Tensor:
    """(1, 1, h, w), 1 for about `share` of the measurements, at least one. ValueError where there is none."""
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


def kept_back(problem: Problem, generator: torch.Generator, share: float = 0.2) -> Tensor:
    """(1, 1, h, w), 1 for the measurements that experts are not to see, so that they can judge them.

    A pixel alone in its neighbourhood says little about a hole: what is far from all that is known is harder
    to guess. So beside a hole of more than ten pixels whole squares are kept back, half as wide as the hole;
    elsewhere a `share` of the measurements, one by one.
    """
    known = problem.known
    side = min(depth(1 - known), int(math.sqrt(0.05 * known.sum().item())))
    if 5 < side <= min(known.shape[-2:]):
        squares = squares_beside(known, side, generator)
        if squares.any():
            return squares
    return scattered(problem, generator, share)


def held_out(problem: Problem, fresh: Fresh, generator: torch.Generator, *, steps: int = 2000,
             **options) -> Iterator[Restoration]:
    """DIP, stopped by a twentieth of the measurements that it does not see: needs neither σ nor the truth."""
    unseen = scattered(problem, generator)
    rules = {"": lambda p: dip.HeldOut(p, unseen)}
    yield from dip.deep_image_prior(problem, fresh, generator, steps=steps, hidden=unseen, rules=rules,
                                    **options)


# ------------------------------------------------------------------------- the reverse chain, and DIP in it

Refine = Callable[[Tensor, int], Tensor]
# The hooks below are all built so: give them what they need, get a function (x̂₀, t) → x̂₀.


def in_turn(*hooks: Refine) -> Refine:
    """One hook that applies several, the first one first."""
    def refine(x0_hat: Tensor, t: int) -> Tensor:
        for hook in hooks:
            x0_hat = hook(x0_hat, t)
        return x0_hat
    return refine


def agree(problem: Problem) -> Refine:
    """Data consistency without noise, x̂₀ + A⁺(y − A x̂₀): DDNM (Wang, Yu & Zhang 2023)."""
    return lambda x0_hat, t: ddpm.to_diffusion(problem.consistent(ddpm.to_image(x0_hat)))


def fuse(g: Tensor, share: Callable[[int], Tensor | float]) -> Refine:
    """x̃₀ = (1 − w) x̂₀ + w g, w = share(t), g in [0, 1]: so the noise estimate is (x_t − √ᾱ x̃₀)/√(1−ᾱ)."""
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
    """Images f (B, C, H, W) in [0, 1], refined and diffused to step t, are taken back by jumps of DDIM.

    Yields the start first, then every reverse step. t = 0: no diffusion at all; t = T: f is forgotten.
    """
    s, x0 = model.schedule, refine(ddpm.to_diffusion(f), t)
    x = ddpm.q_sample(s, x0, t, torch.randn(f.shape, generator=generator).to(f.device))
    yield ddpm.Sample(t, x, x0)
    yield from ddpm.ddim(model.denoise, s, x, evaluations, generator, eta, t_start=t, refine=refine)


def at_its_step(y: Tensor, sigma: float, model: ddpm.Model, evaluations: int, views: bool) -> Tensor:
    """A noisy photo is a state of the chain: the model at the step of its noise, over eight views or one."""
    def denoise(view: Tensor) -> Tensor:
        return ddpm.denoise_photo(*model[:2], view, sigma, evaluations)
    return eight_views(denoise, y) if views else denoise(y)


def eight_views(estimate: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """The mean of an estimator over the eight flips and transposes of a photo: they share its noise level."""
    found = []
    for over, axes in itertools.product((False, True), ((), (2,), (3,), (2, 3))):
        view = estimate((y.mT if over else y).flip(axes)).flip(axes)
        found.append(view.mT if over else view)
    return sum(found) / len(found)


def diffusion_pair(problem: Problem, model: ddpm.Model, generator: torch.Generator, *, ratio: float = 0.25,
                   evaluations: int = 4, views: bool = True) -> Iterator[Restoration]:
    """The model alone on y ± Sξ: the mean of both estimates, with its risk."""
    def estimate(q: Tensor, level: float) -> Tensor:
        return at_its_step(q, level, model, evaluations, views)
    yield from recorrupted(problem, generator, estimate, ratio=ratio)


def guided(problem: Problem, model: ddpm.Model) -> Callable[[Tensor, int], Tensor]:
    """ΠGDM (Song, Vahdat, Mardani & Kautz 2023) for y without noise: x̂₀ + Jᵀ A⁺(y − A x̂₀)/√ᾱ_t.

    J is the Jacobian of x̂₀ in x_t. With N(0, (1−ᾱ_t) I) for the error of x̂₀, this is Tweedie's formula for
    p(x_t | y): (1−ᾱ_t)/√ᾱ_t ∇ log p(y | x_t) is added. Clipped to [−1, 1]."""
    y, operator, _ = problem

    def denoise(xt: Tensor, t: int) -> Tensor:
        with torch.enable_grad():
            xt = xt.detach().requires_grad_()
            x0_hat = model.denoise(xt, t)
            missed = 2 * operator.pinv(y - operator.A(ddpm.to_image(x0_hat)))
            step, = torch.autograd.grad((missed.detach() * x0_hat).sum(), xt)
        return (x0_hat.detach() + step / model.schedule.alpha_bar[t].sqrt().item()).clamp(-1, 1)
    return denoise


def diffusion(problem: Problem, model: ddpm.Model, generator: torch.Generator,
              interpolate: Callable[[Problem], Tensor], experts: Sequence[Restoration] = (), *, t: int = 600,
              evaluations: int = 0, eta: float = 1.0, samples: int = 8, lean: bool = False,
              gradient: bool = False, views: bool = True) -> Iterator[Restoration]:
    """The model alone, in its best form on development pictures.

    Noisy y: four evaluations from the step of its own noise, over eight `views` or one. Without noise: the
    mean of `samples` chains of `evaluations` (default 10) steps of DDIM. They start at t from an
    interpolation and agree with y at every step (DDNM), or with `gradient` are guided through the model
    (ΠGDM). t = T: they start from pure noise. An expert's image takes the place of the interpolation
    (SDEdit, Meng et al. 2022; CCDF, Chung, Sim & Ye 2022). lean: each guess is also averaged with that
    image, by inverse variance, as if the image had the error v of the start step. diversity: root mean square
    distance of two samples.
    """
    if problem.sigma:
        yield Restoration(at_its_step(problem.y, problem.sigma, model, evaluations or 4, views))
        return
    f = experts[0].image if experts else interpolate(problem)
    many = problem._replace(y=problem.y.repeat_interleave(samples, 0))
    f, v = f.expand(problem.shape).repeat_interleave(samples, 0), model.v
    hooks = [fuse(f, lambda now: inverse_variance(v[now].item(), v[t].item()))] * lean
    hooks += [agree(many)] * (not gradient)
    model = model._replace(denoise=guided(many, model)) if gradient else model
    for sample in reverse(f, model, t, evaluations or 10, generator, eta=eta, refine=in_turn(*hooks)):
        images = many.consistent(ddpm.to_image(sample.x0_hat)).unflatten(0, (-1, samples))
        apart = 2 * images.var(1).mean((1, 2, 3)) if samples > 1 else torch.zeros(len(images))
        yield Restoration(images.mean(1), {"diversity": apart.sqrt().tolist()})


def refit(problem: Problem, model: ddpm.Model, fresh: Fresh, generator: torch.Generator, *,
          brief: int = 100, updates: int = 20, weight: float = 0.1, t: int = 300, evaluations: int = 8,
          eta: float = 0.0, **options) -> Iterator[Restoration]:
    """DDNM with DIP refits: a DIP of `brief` updates starts the chain at step t and is fitted again in it.

    At the start and at every one of `evaluations` guesses it takes `updates` more, to y and, with `weight`,
    to the guess. `options` go to dip.fit.
    """
    net, z = fresh(problem, generator)
    for step in dip.fit(problem.y, problem.operator.A, net, z, brief, generator, **options):
        yield Restoration(problem.consistent(step.average), {"updates": step.i})
    agreed = agree(problem)
    again = fitted_again(problem, net, z, updates, generator, weight, **options)
    chain = reverse(step.average, model, t, evaluations, generator, eta=eta,
                    refine=in_turn(agreed, again, agreed))
    for k, sample in enumerate(chain, 1):
        yield Restoration(ddpm.to_image(sample.x0_hat), {"updates": brief + k * updates})


# --------------------------------------------------------------------------- a diffusion model in DIP's loss

def regularised(problem: Problem, model: Optional[ddpm.Model], fresh: Fresh, generator: torch.Generator, *,
                steps: int = 800, weight: float = 0.3, floor: float = 1.0, constrain: bool = True, **options
                ) -> Iterator[Restoration]:
    """Denoiser-regularised DIP: min_θ max(mean (f_θ − y)², floor · σ²) + weight · mean (f_θ − D(y))².

    D(y) is one evaluation of the model on y itself, in the spirit of RED and DeepRED (Mataev, Elad & Milanfar
    2019; with a diffusion model, Mardani et al. 2024), which denoise f_θ. Data met as well as their noise
    allows have no gradient (Morozov's principle as a constraint); from then on all images are averaged alike.

    weight = 0 leaves the model out, floor = 0 the constraint; both: plain DIP. constrain = False: the same
    averaging from the same update on, but the data keep their gradient.
    """
    target = None
    if weight:
        target = ddpm.denoise_photo(model.denoise, model.schedule, problem.y, problem.sigma)

    def penalty(images: Tensor, i: int) -> Tensor:
        return weight * (images - target).square().mean((1, 2, 3)).sum()
    fitted = dip.fit(problem.y, problem.operator.A, *fresh(problem, generator), steps, generator,
                     floor=floor * problem.sigma ** 2, constrain=constrain,
                     penalty=penalty if weight else None, **options)
    yield from dip.follow(problem, fitted, {"": [dip.FixedBudget(steps) for _ in problem.y]})


# --------------------------------------------------------------------------------------------- further terms

def perceptual(problem: Problem, network: ddpm.UNet, s: ddpm.Schedule) -> Callable:
    """Penalty: features of a diffusion model's first layers, of the image and of y, at y's noise level."""
    t = torch.tensor([ddpm.step_of(s, problem.sigma)], device=problem.y.device)
    emb = network.embed(ddpm.time_features(t, network.embed[0].in_features)).detach()

    def features(image: Tensor) -> Tensor:
        xt = ddpm.at(s.alpha_bar.sqrt(), t, image) * ddpm.to_diffusion(image)
        return network.down[0](network.enter(xt), emb)
    target = features(problem.y).detach()
    unit = 0.3 * problem.sigma ** 2 / target.var().item()
    return lambda images, i: unit * (features(images) - target).square().mean((1, 2, 3)).sum()


def adversarial(problem: Problem, draw: Callable[[], Tensor]) -> Callable:
    """Penalty: a small critic learns to tell real patches, draw() → (n, 3, h, w), from DIP's images."""
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
