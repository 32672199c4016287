"""Deep image prior: fit an untrained network to one damaged photo, and stop in time.

A convolutional network finds natural images easily and noise only with effort (Ulyanov, Vedaldi & Lempitsky
2018). So fit its weights θ to the measurement y of an unknown image, min_θ ‖A f_θ(z) − y‖², from random
weights and a fixed random input z. On the way to y the image f_θ(z) passes close to the truth: somebody has
to say when.

Read in order: problem and operators → network → fitting loop → stop rules → DIP as a method.

Notation
    y = A x + n   the measurement of the image x; n is noise of standard deviation sigma
    A, A⁺         a linear operator and its pseudo-inverse
    z, f_θ(z)     the network's input and its output, the current image
    B, N          number of images of a problem, and of networks that are fitted together
Images are float tensors (B, C, H, W) in [0, 1], measurements (B, C, h, w).
"""
from collections import deque
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# ------------------------------------------------------------------------------------- problem and operators

class Operator(NamedTuple):
    """y = A(x); pinv(y) is the shortest image that A maps as close to y as can be (Moore–Penrose)."""
    A: Callable[[Tensor], Tensor]
    pinv: Callable[[Tensor], Tensor]


def identity() -> Operator:
    """Denoising: the photo itself is measured."""
    return Operator(lambda x: x, lambda y: y)


def mask(known: Tensor) -> Operator:
    """Inpainting: only pixels where `known` (1, 1, H, W) is 1 are measured, the others read 0. A⁺ = A."""
    return Operator(lambda x: x * known, lambda y: y * known)


def downsample(k: int) -> Operator:
    """Super-resolution: means of k × k pixels. A⁺ repeats each mean k × k times. H and W: multiples of k."""
    return Operator(lambda x: F.avg_pool2d(x, k), lambda y: F.interpolate(y, scale_factor=k, mode="nearest"))


class Problem(NamedTuple):
    """All that a method may know of B images x, measured by one operator: y = A x + n, n ~ N(0, sigma² I)."""
    y: Tensor
    operator: Operator
    sigma: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, C, H, W) of the unknown x."""
        return tuple(self.operator.pinv(self.y).shape)

    @property
    def known(self) -> Tensor:
        """(1, 1, h, w): 1 where something was measured."""
        measured = self.operator.A(torch.ones_like(self.operator.pinv(self.y[:1])))
        return (measured[:, :1] > 0.5).float()

    def each(self) -> list["Problem"]:
        """B problems of one image each."""
        return [self._replace(y=y[None]) for y in self.y]

    def without(self, unseen: Tensor) -> "Problem":
        """The same problem, blind to the measurements where `unseen` (1, 1, h, w) is 1."""
        A, seen = self.operator.A, 1 - unseen
        return self._replace(y=self.y * seen, operator=self.operator._replace(A=lambda x: A(x) * seen))

    def consistent(self, x: Tensor) -> Tensor:
        """x + A⁺(y − A x), which agrees with y; with noise x itself: noisy data must not be met exactly."""
        return x if self.sigma else x + self.operator.pinv(self.y - self.operator.A(x))

    def error_on(self, unseen: Tensor, x: Tensor) -> list[float]:
        """The mean squared error of each image of x on the measurements where `unseen` is 1."""
        count = max(1.0, unseen.expand_as(self.y[:1]).sum().item())
        return (((self.operator.A(x) - self.y).square() * unseen).sum((1, 2, 3)) / count).tolist()


class Restoration(NamedTuple):
    """What a method would deliver now. A *method* is a generator function; its last word is the answer.

    Its positional arguments after `problem` are tools, passed by name: fresh(problem, generator, copies) →
    networks and inputs, generator, model (ddpm.Model), interpolate(problem) → images, unseen(problem) → a
    mask, experts (finished Restorations). Arguments by keyword only are settings. It yields after every step.

    image: (B, C, H, W). facts: name → a number, or a list of B numbers. now: the current image, where that is
    not the one to be delivered. others: what else could be delivered. target: what was fitted, if not y.
    """
    image: Tensor
    facts: dict = {}
    now: Optional[Tensor] = None
    others: dict = {}
    target: Optional[Tensor] = None


Fresh = Callable[..., tuple[nn.Module, Tensor]]


# --------------------------------------------------------------------------------------------------- network

class Hourglass(nn.Module):
    """z (n, c_in, H, W) → images (n, c_out, H, W) in (0, 1): n independent networks that run as one.

    Each goes down by strides of 2, once per entry of `widths`, and up again. widths: channels of each scale,
    finest first. skip: channels that cross over at each scale, 0 for none. upsample: "bilinear" or
    "nearest". padding: "reflect" or "zeros". copies: n. With widths = (128,) · 5 and the other defaults each
    is the original's denoising network. Any size of at least 16: the input is padded to multiples of
    2^scales, the output cut.
    """

    def __init__(self, c_in: int = 32, c_out: int = 3, widths: tuple = (128,) * 5, skip: int = 4,
                 upsample: str = "bilinear", padding: str = "reflect", copies: int = 1):
        super().__init__()
        self.upsample, self.copies, self.multiple = upsample, copies, 2 ** len(widths)

        # Grouped convolutions keep the copies apart; batch norm works on single channels anyway.
        def conv(c, c_next, size, stride=1):
            c, c_next = copies * c, copies * c_next
            return nn.Conv2d(c, c_next, size, stride, size // 2, groups=copies, padding_mode=padding)

        def unit(c, c_next, size, stride=1):
            return nn.Sequential(conv(c, c_next, size, stride), nn.BatchNorm2d(copies * c_next),
                                 nn.LeakyReLU(0.2, inplace=True))

        above = (c_in, *widths[:-1])
        below = (*widths[1:], widths[-1])
        self.down = nn.ModuleList(nn.Sequential(unit(a, w, 3, stride=2), unit(w, w, 3))
                                  for a, w in zip(above, widths))
        self.skip = nn.ModuleList(unit(a, skip, 1) for a in above) if skip else None
        self.up = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(copies * (b + skip)), unit(b + skip, w, 3),
                                              unit(w, w, 1)) for b, w in zip(below, widths))
        self.image = nn.Sequential(conv(widths[0], c_out, 1), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        height, width = z.shape[-2:]
        bottom, right = (max(2 * self.multiple - side, -side % self.multiple) for side in (height, width))
        x = F.pad(z, (0, right, 0, bottom), mode="replicate").flatten(0, 1)[None]
        inputs = [x.contiguous(memory_format=torch.channels_last)]
        for down in self.down:
            inputs.append(down(inputs[-1]))
        x = inputs[-1]
        for i in reversed(range(len(self.up))):
            x = F.interpolate(x, scale_factor=2, mode=self.upsample)
            if self.skip:
                x = self.join(self.skip[i](inputs[i]), x)
            x = self.up[i](x)
        return self.image(x)[0].unflatten(0, (self.copies, -1))[..., :height, :width]

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """The channels of a and b side by side, copy by copy."""
        pairs = zip(a.chunk(self.copies, 1), b.chunk(self.copies, 1))
        return torch.cat([part for pair in pairs for part in pair], dim=1)

    def load_copies(self, singles: Sequence["Hourglass"]) -> None:
        """Take over the weights of n single networks: every tensor is theirs, one after another."""
        states = [single.state_dict() for single in singles]
        self.load_state_dict({name: torch.cat([state[name] for state in states]) if value.dim() else value
                              for name, value in states[0].items()})


def random_input(shape: tuple[int, int], generator: torch.Generator, channels: int = 32) -> Tensor:
    """z, (1, channels, H, W): uniform noise in [0, 0.1], as in the original."""
    return 0.1 * torch.rand(1, channels, *shape, generator=generator)


# ---------------------------------------------------------------------------------------------- fitting loop

class Step(NamedTuple):
    """Update i (from 1): images (N, C, H, W) before the weights move, their running averages, misfits."""
    i: int
    image: Tensor
    average: Tensor
    misfit: Tensor

    def split(self, count: int) -> list["Step"]:
        """The N networks shared out among `count` problems, in order."""
        parts = zip(*(tensor.chunk(count) for tensor in self[1:]))
        return [Step(self.i, *part) for part in parts]


def fit(y: Tensor, A: Callable[[Tensor], Tensor], net: nn.Module, z: Tensor, steps: int,
        generator: torch.Generator, *, lr: float = 0.01, jitter: float = 1 / 30, decay: float = 0.99,
        collapse: float = 3.0, floor: float = 0.0, constrain: bool = True,
        penalty: Optional[Callable[[Tensor, int], Tensor]] = None) -> Iterator[Step]:
    """min_θ Σ max(mean (A f_θ(z) − y)², floor) + penalty by Adam; yields after each of `steps` updates.

    y: N targets for the N networks of `net`, which are changed in place. jitter: standard deviation of fresh
    noise on z. penalty(images, i): a further scalar in the loss. decay: of the running average of the
    images, corrected for its short past as in Adam (Kingma & Ba 2015, Algorithm 1). floor: the misfit that
    the truth has, if known. While a network's misfit is below it, its data term has no gradient (constrain =
    False keeps it). From the first such update on, all its images count alike in its average.

    collapse: Adam at this rate sometimes falls off a cliff. Where a misfit jumps to more than `collapse`
    times its recent typical value, that network and its optimiser go back to the last kept state. States
    are kept every 50 updates, if no network has just fallen.
    """
    optimiser = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    n, mean, typical, good = len(y), None, None, None
    count, settled = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
    for i in range(1, steps + 1):
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        image = net(z + jitter * noise)
        misfit = (A(image) - y).square().mean((1, 2, 3))
        values = misfit.detach().cpu()
        # Written as "not ≤", so that NaN is a collapse as well.
        fallen = torch.zeros(n, dtype=torch.bool) if good is None else ~(values <= collapse * typical)
        typical = values if typical is None else torch.where(fallen, typical, 0.95 * typical + 0.05 * values)
        if i % 50 == 0 and not fallen.any():
            good = typical, [tensor.clone() for tensor in _state(net, optimiser)]
        loss = misfit.clamp(min=floor if constrain else 0).sum()
        if penalty is not None and not fallen.any():
            loss = loss + penalty(image, i)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if fallen.any():
            typical = torch.where(fallen, good[0], typical)
            for tensor, kept in zip(_state(net, optimiser), good[1]):
                tensor.unflatten(0, (n, -1))[fallen] = kept.unflatten(0, (n, -1))[fallen]
        # The number of images that the average stands for; a collapsed image does not enter.
        count = torch.where(fallen, count, torch.where(settled, count + 1, decay * count + 1))
        seen, skipped = image.detach(), fallen.to(z.device).reshape(-1, 1, 1, 1)
        weights = 1 / count.to(seen).reshape(-1, 1, 1, 1)
        mean = seen if mean is None else torch.where(skipped, mean, torch.lerp(mean, seen, weights))
        reached = (values <= floor) & ~settled & (floor > 0)
        count, settled = torch.where(reached, 1 / (1 - decay), count), settled | reached
        yield Step(i, seen, mean, values)


def _state(net: nn.Module, optimiser: torch.optim.Adam) -> list[Tensor]:
    """What a fallen network gets back: its weights and Adam's two moments of each."""
    moments = [optimiser.state[p][name] for p in net.parameters() for name in ("exp_avg", "exp_avg_sq")]
    return [p.data for p in net.parameters()] + moments


# ------------------------------------------------------------------------------- rules that say when to stop
# A rule reads the Steps of one problem: `rule(step)` returns True once it would stop, `rule.best` is the step
# whose image it would deliver (0: none yet), `rule.facts`, if any, what it knows about it. No rule sees more.

class FixedBudget:
    """Stop after n steps, whatever happens."""

    def __init__(self, n: int):
        self.n, self.best = n, 0

    def __call__(self, step: Step) -> bool:
        self.best = min(step.i, self.n)
        return step.i >= self.n


class Discrepancy:
    """Morozov's principle: stop when the misfit has fallen to tau · sigma², the noise that should be left
    over.

    The misfit is that of the single image, where tau = 1 is the principle. What is delivered is the running
    average, which gains from a later stop: tau = 0.92 was the best on development photos.
    """

    def __init__(self, sigma: float, tau: float = 0.92):
        self.threshold, self.best = tau * sigma ** 2, 0

    def __call__(self, step: Step) -> bool:
        self.best = step.i
        return bool(step.misfit.mean() <= self.threshold)


class Valley:
    """Remember the step with the least value; `record` is True after `patience` steps without a new one."""

    def __init__(self, patience: int):
        self.patience, self.best, self.least = patience, 0, float("inf")

    def record(self, i: int, value: float) -> bool:
        if value < self.least:
            self.best, self.least = i, value
        return self.best > 0 and i - self.best >= self.patience


class WindowedVariance(Valley):
    """ES-WMV (Wang et al. 2021, arXiv 2112.06074): the variance of the last `window` images is least near
    the peak.
    """

    def __init__(self, window: int = 100, patience: int = 1000):
        super().__init__(patience)
        self.images, self.window, self.sum, self.squares = deque(), window, torch.zeros(()), 0.

    def __call__(self, step: Step) -> bool:
        new = step.image.to("cpu", torch.float64)
        self.images.append(new)
        self.sum, self.squares = self.sum + new, self.squares + new.square().mean().item()
        if len(self.images) < self.window:
            return False
        variance = self.squares / self.window - (self.sum / self.window).square().mean().item()
        old = self.images.popleft()
        self.sum, self.squares = self.sum - old, self.squares - old.square().mean().item()
        return self.record(step.i, variance)


class MovingVariance(Valley):
    """ES-EMV (Wang et al. 2021): the same with exponential weights `alpha`, after `skip` steps."""

    def __init__(self, alpha: float = 0.1, patience: int = 1000, skip: int = 100):
        super().__init__(patience)
        self.alpha, self.skip, self.mean, self.variance = alpha, skip, None, 0.

    def __call__(self, step: Step) -> bool:
        if self.mean is None:
            self.mean = step.image
        change = step.image - self.mean
        self.mean = self.mean + self.alpha * change
        self.variance = (1 - self.alpha) * (self.variance + self.alpha * change.square().mean().item())
        return step.i > self.skip and self.record(step.i, self.variance)


class HeldOut(Valley):
    """Stop where the error on measurements that the fit never saw is least (as in Noise2Self, Batson & Royer
    2019).

    unseen: 1 for these. The error is taken on the running average, whose valley is smoother.
    """

    def __init__(self, problem: Problem, unseen: Tensor, patience: int = 200):
        super().__init__(patience)
        self.problem, self.unseen = problem, unseen

    def __call__(self, step: Step) -> bool:
        return self.record(step.i, self.problem.error_on(self.unseen, step.average)[0])


# ------------------------------------------------------------------------------------------- DIP as a method

def follow(problem: Problem, steps: Iterator[Step], rules: dict[str, list], *, watch: bool = False
           ) -> Iterator[Restoration]:
    """Deliver the images of a fit as stop rules say, problem by problem; networks of one problem are
    averaged.

    rules: name → a rule for each of the B problems; the first name is delivered, the rest go to `others`.
    Ends when the first has stopped everywhere; watch: goes on for the others and for whoever keeps score.
    facts: step (whose image is delivered), stopped, updates (of all networks of a problem), and the rule's.
    """
    B, offers = len(problem.y), {}
    stops, images = ({name: [None] * B for name in rules} for _ in range(2))
    for step in steps:
        now = problem.consistent(step.average.unflatten(0, (B, -1)).mean(1))
        for name, found in rules.items():
            for b, (rule, view) in enumerate(zip(found, step.split(B))):
                if not stops[name][b]:
                    stops[name][b] = step.i if rule(view) else None
                    images[name][b] = now[b] if rule.best in (0, step.i) else images[name][b]
            facts = {fact: [rule.facts[fact] for rule in found] for fact in getattr(found[0], "facts", {})}
            ends = [end or step.i for end in stops[name]]
            facts |= {"step": [rule.best or step.i for rule in found], "stopped": ends}
            facts |= {"updates": [end * len(step.image) // B for end in ends]}
            offers[name] = Restoration(torch.stack(images[name]), facts)
        first, *rest = rules
        yield offers[first]._replace(now=now, others={name: offers[name] for name in rest})
        if all(stops[first]) and not watch:
            return


def deep_image_prior(problem: Problem, fresh: Fresh, generator: torch.Generator, *, steps: int = 0,
                     hidden: Optional[Tensor] = None, rules: Optional[dict[str, Callable]] = None,
                     watch: bool = False, **options) -> Iterator[Restoration]:
    """Plain DIP; `options` go to `fit`.

    With noise Morozov's principle stops it, within `steps` (default 2000) updates. Without noise it takes
    `steps` updates, by default 25 √side: twice as many were no better on development pictures of 32 and 96
    pixels. rules: name → (problem → rule), instead of these. hidden: 1 for measurements that the fit is not
    to see (default: it sees all).
    """
    height, width = problem.shape[-2:]
    steps = steps or (2000 if problem.sigma else round(25 * (height * width) ** 0.25))
    own = (lambda p: Discrepancy(p.sigma)) if problem.sigma else (lambda p: FixedBudget(steps))
    watching = {name: [make(p) for p in problem.each()] for name, make in (rules or {"": own}).items()}
    seen = problem if hidden is None else problem.without(hidden)
    fitted = fit(seen.y, seen.operator.A, *fresh(problem, generator), steps, generator, **options)
    yield from follow(problem, fitted, watching, watch=watch)
