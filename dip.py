"""Deep image prior: fit an untrained network to one damaged photo, and stop in time (Ulyanov, Vedaldi & Lempitsky 2018).

A convolutional network finds natural images easily and noise only with effort. So fit its weights θ to the measurement y
of an unknown image, min_θ ‖A f_θ(z) − y‖², from random weights and a fixed random input z: on the way to y the image
f_θ(z) passes close to the truth. The catch is in "on the way": somebody has to say when.

Read in order: operators (what A can be) → network → fitting loop → rules that say when.

Notation
    y = A x + n   the measurement of the image x; n is noise of standard deviation sigma
    A, A⁺         a linear operator and its pseudo-inverse
    z, f_θ(z)     the network's input and its output, the current image
Images are float tensors (1, C, H, W) in [0, 1].
"""
from collections import deque
from typing import Callable, Iterator, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# ------------------------------------------------------------------------------------------- linear operators

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
    """Super-resolution: means of k × k pixels are measured. A⁺ repeats each mean k × k times. H and W: multiples of k."""
    return Operator(lambda x: F.avg_pool2d(x, k), lambda y: F.interpolate(y, scale_factor=k, mode="nearest"))


def blur(sigma: float, shape: tuple[int, int], floor: float = 1e-3) -> Operator:
    """Deblurring: a Gaussian of `sigma` pixels on the torus of `shape` (H, W); frequencies weaker than `floor` are lost."""
    rows, columns = torch.fft.fftfreq(shape[0]), torch.fft.rfftfreq(shape[1])
    gain = torch.exp(-2 * (torch.pi * sigma) ** 2 * (rows[:, None] ** 2 + columns ** 2))
    gain = gain * (gain > floor)
    inverse = torch.where(gain > 0, 1 / gain, 0)
    def filtered(response):
        return lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * response.to(x.device), s=shape)
    return Operator(filtered(gain), filtered(inverse))


# ---------------------------------------------------------------------------------------------------- network

class Hourglass(nn.Module):
    """z (1, c_in, H, W) → image (1, c_out, H, W) in (0, 1): down by strides of 2, once per entry of `widths`, and up again.

    widths: channels of each scale, finest first. skip: channels that cross over at each scale, 0 for none. upsample: an
    interpolation mode, "bilinear" or "nearest". padding: "reflect" or "zeros". With widths = (128,) · 5 and the other
    defaults this is the original's denoising network. H and W: multiples of 2^scales, and more than 2^scales.
    """

    def __init__(self, c_in: int = 32, c_out: int = 3, widths: tuple = (128,) * 5, skip: int = 4,
                 upsample: str = "bilinear", padding: str = "reflect"):
        super().__init__()
        self.upsample = upsample

        def unit(c, c_next, size, stride=1):
            return nn.Sequential(nn.Conv2d(c, c_next, size, stride, size // 2, padding_mode=padding),
                                 nn.BatchNorm2d(c_next), nn.LeakyReLU(0.2, inplace=True))
        above = (c_in, *widths[:-1])
        below = (*widths[1:], widths[-1])
        self.down = nn.ModuleList(nn.Sequential(unit(a, w, 3, stride=2), unit(w, w, 3)) for a, w in zip(above, widths))
        self.skip = nn.ModuleList(unit(a, skip, 1) for a in above) if skip else None
        self.up = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(b + skip), unit(b + skip, w, 3), unit(w, w, 1))
                                for b, w in zip(below, widths))
        self.image = nn.Sequential(nn.Conv2d(widths[0], c_out, 1), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        inputs = [z]
        for down in self.down:
            inputs.append(down(inputs[-1]))
        x = inputs[-1]
        for i in reversed(range(len(self.up))):
            x = F.interpolate(x, scale_factor=2, mode=self.upsample)
            if self.skip:
                x = torch.cat([self.skip[i](inputs[i]), x], dim=1)
            x = self.up[i](x)
        return self.image(x)


def random_input(shape: tuple[int, int], generator: torch.Generator, channels: int = 32) -> Tensor:
    """z, (1, channels, H, W): uniform noise in [0, 0.1], as in the original."""
    return 0.1 * torch.rand(1, channels, *shape, generator=generator)


# ----------------------------------------------------------------------------------------------- fitting loop

class Step(NamedTuple):
    """After an update: its number (from 1), the image before it, the average of the images so far, the data misfit."""
    i: int
    image: Tensor
    average: Tensor
    misfit: float


def fit(y: Tensor, A: Callable[[Tensor], Tensor], net: nn.Module, z: Tensor, steps: int, generator: torch.Generator, *,
        lr: float = 0.01, jitter: float = 1 / 30, average: float = 0.99, collapse: float = 3.0,
        penalty: Optional[Callable[[Tensor, int], Tensor]] = None, amp: Optional[torch.dtype] = None) -> Iterator[Step]:
    """min_θ mean (A f_θ(z) − y)² + penalty by Adam; yields after each of `steps` updates. The network is changed in place.

    jitter: standard deviation of fresh noise added to z at every step. average: decay of the running average of the images,
    corrected for its short past as in Adam (Kingma & Ba 2015, Algorithm 1): else the first image would weigh average^i for long.
    collapse: Adam at this rate sometimes falls off a cliff; where the misfit jumps to more than `collapse` times its
    recent typical value, the weights from up to 50 steps before are restored, with a fresh optimiser. penalty(image, i): a
    further term of the loss, a scalar.
    """
    optimiser = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    mean, typical, good = None, None, None
    for i in range(1, steps + 1):
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        with torch.autocast(z.device.type, dtype=amp, enabled=amp is not None):
            image = net(z + jitter * noise).float()
        misfit = F.mse_loss(A(image), y)
        value = misfit.item()
        if good is not None and not value <= collapse * typical:                                 # "not ≤": NaN collapses too
            net.load_state_dict(good)
            optimiser = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
        else:
            typical = value if typical is None else 0.95 * typical + 0.05 * value
            if i % 50 == 0:
                good = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            optimiser.zero_grad()
            (misfit if penalty is None else misfit + penalty(image, i)).backward()
            optimiser.step()
            mean = image.detach() if mean is None else torch.lerp(mean, image.detach(), (1 - average) / (1 - average ** i))
        yield Step(i, image.detach(), mean, value)


# ----------------------------------------------------------------------------------- rules that say when to stop
# A rule reads the stream of Steps: `rule(step)` returns True once it would stop, and `rule.best` is the step whose
# image it would deliver. None of them sees anything but y and the images.

class FixedBudget:
    """Stop after n steps, whatever happens."""

    def __init__(self, n: int):
        self.n, self.best = n, 0

    def __call__(self, step: Step) -> bool:
        self.best = min(step.i, self.n)
        return step.i >= self.n


class Valley:
    """Remember the step with the least value; stop after `patience` steps without a new least one."""

    def __init__(self, patience: int):
        self.patience, self.best, self.least = patience, 0, float("inf")

    def record(self, i: int, value: float) -> bool:
        if value < self.least:
            self.best, self.least = i, value
        return self.best > 0 and i - self.best >= self.patience


class WindowedVariance(Valley):
    """ES-WMV (Wang et al. 2021, arXiv 2112.06074): the variance of the last `window` images is least near the peak."""

    def __init__(self, window: int = 100, patience: int = 1000):
        super().__init__(patience)
        self.images, self.window, self.sum, self.squares = deque(), window, 0., 0.

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


class Discrepancy:
    """Morozov's principle: stop when the misfit has fallen to tau · sigma², the noise that should be left over."""

    def __init__(self, sigma: float, tau: float = 1.0):
        self.threshold, self.best = tau * sigma ** 2, 0

    def __call__(self, step: Step) -> bool:
        self.best = step.i
        return step.misfit <= self.threshold


class HeldOut(Valley):
    """Stop where the error on measurements that the fit never saw is least (as in Noise2Self, Batson & Royer 2019).

    y: all measurements; A: the full operator; unseen: 1 where a measurement was kept from the fit. The error is taken on
    the running average, whose valley is smoother.
    """

    def __init__(self, y: Tensor, A: Callable, unseen: Tensor, patience: int = 200):
        super().__init__(patience)
        self.y, self.A, self.unseen, self.count = y, A, unseen, unseen.expand_as(y).sum().item()

    def __call__(self, step: Step) -> bool:
        error = ((self.A(step.average) - self.y).square() * self.unseen).sum().item() / self.count
        return self.record(step.i, error)
