"""Everything impure: data, jobs and their cache, records, figures, the report and the command line. Read it
last.

picture → measured → a method of METHODS → Restorations → scored → records (out/*.json) → queries → REPORT.md
"""
import argparse
import ast
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
import timeit
import zipfile
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Optional

import matplotlib
import numpy as np
import skimage
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from skimage.restoration import denoise_nl_means, inpaint_biharmonic
from torch import Tensor
from tqdm import tqdm

import ddpm
import dip
import hybrid
import metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".cache"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Refusal(Exception):
    """Something the user can mend; its text is the one sentence shown."""


# ------------------------------------------------------------------------------------------------------ data

TEST = ("astronaut", "chelsea", "coffee", "rocket")
DEVELOPMENT = ("motorcycle_left", "hubble_deep_field")
TRAINING = ("retina", "ihc", "brick", "grass", "gravel", "coins", "moon", "cell", "camera", "page", "text",
            "clock_motion", "microaneurysms", "grace_hopper")
CAT_FACTORS = {"body": 15, "fur": 9, "eyes": 15, "mouth": 10, "accessory": 16}


def to_tensor(image: Image.Image) -> Tensor:
    """(1, C, H, W) in [0, 1]."""
    pixels = np.asarray(image, np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)[None].contiguous()


def photo(name: str) -> Image.Image:
    """A photograph from the installed wheels of scikit-image or matplotlib."""
    folders = Path(skimage.__file__).parent / "data", Path(matplotlib.get_data_path()) / "sample_data"
    return Image.open(next(path for folder in folders for path in folder.glob(f"{name}.*"))).convert("RGB")


@functools.cache
def square(name: str, size: int) -> Tensor:
    """(1, 3, size, size): the centred square of a photo, reduced."""
    image = photo(name)
    side = min(image.size)
    x, y = ((length - side) // 2 for length in image.size)
    return to_tensor(image.resize((size, size), Image.Resampling.BOX, (x, y, x + side, y + side)))


@functools.cache
def training_photos(folder: str = "") -> list[Tensor]:
    """(3, H, W) each: the training photographs, or those of a folder, at full, half and quarter size where 64
    pixels remain."""
    found = map(to_tensor, map(photo, TRAINING)) if not folder else map(read_image, images_in(folder))
    return [nn.functional.avg_pool2d(image.expand(-1, 3, -1, -1), k)[0] for image in found for k in (1, 2, 4)
            if min(image.shape[-2:]) // k >= 64]


def images_in(folder: str) -> list[Path]:
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in kinds)


@functools.cache
def cat_layers(size: int = 32) -> list[Tensor]:
    """Five tensors (options, 4, size, size) of premultiplied RGBA, one a factor (David Revoy, CC-BY 4.0).

    Two of the ten fur files are the same picture; the second is left out.
    """
    def load(path):
        rgba = np.asarray(Image.open(path).convert("RGBA"), np.float32) / 255
        rgba[..., :3] *= rgba[..., 3:]
        k = rgba.shape[0] // size
        return torch.from_numpy(rgba.reshape(size, k, size, k, 4).mean((1, 3)).transpose(2, 0, 1))
    root = Path(importlib.util.find_spec("robohash").origin).parent / "sets" / "set4"
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
    return [torch.stack([load(path) for path in sorted(folder.glob("*.png")) if path.name != "006#fur6.png"])
            for folder in folders]


def render_cats(parts: Tensor, size: int = 32) -> Tensor:
    """(n, 5) factor indices → (n, 3, size, size) in [0, 1]: the layers laid over white, in order."""
    image = torch.ones(len(parts), 3, size, size)
    for layer, index in zip(cat_layers(size), parts.T):
        rgba = layer[index]
        image = image * (1 - rgba[:, 3:]) + rgba[:, :3]
    return image.clamp(0, 1)


def never_trained(parts: Tensor) -> Tensor:
    """(n,) bool: about a tenth of all pairs (fur, eyes) never occurs in training."""
    return (parts[:, 1] + parts[:, 2]) % 10 == 0


def draw_cats(generator: torch.Generator, n: int, everything: bool = False) -> Tensor:
    """(n, 5) factors, uniform among all 324,000 combinations or among those of training."""
    options = CAT_FACTORS.values()
    parts = torch.stack([torch.randint(k, (4 * n + 64,), generator=generator) for k in options], 1)
    return (parts if everything else parts[~never_trained(parts)])[:n]


def pictures(names: tuple, size: int) -> Tensor:
    """(B, 3, size, size), clean: photos by their names, or cats (32 pixels) by their numbers in a fixed row.
    """
    if isinstance(names[0], str):
        return torch.cat([square(name, size) for name in names])
    return render_cats(draw_cats(torch.Generator().manual_seed(9), 64, everything=True))[list(names)]


# ------------------------------------------------------------------------------------------- tasks and tools

def hole(share: float) -> Callable:
    """A square of this share of each side is missing in the middle."""
    def camera(shape, generator):
        known = torch.ones(1, 1, *shape)
        top, left = (round(side * (1 - share) / 2) for side in shape)
        known[..., top:shape[0] - top, left:shape[1] - left] = 0
        return dip.mask(known.to(DEVICE))
    return camera


def random_pixels(shape, generator) -> dip.Operator:
    """Four fifths of the pixels are missing."""
    return dip.mask((torch.rand(1, 1, *shape, generator=generator) > 0.8).float().to(DEVICE))


def gaussian(clean: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return clean + sigma * torch.randn(clean.shape, generator=generator)


def poisson(clean: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Photon noise with the mean square sigma²."""
    photons = clean.mean().item() / sigma ** 2
    return torch.poisson(clean * photons, generator=generator) / photons


class Task(NamedTuple):
    """What a camera does: sigma in 0 … 255, camera(shape, generator) → operator, noise(clean, sigma,
    generator).
    """
    sigma: float = 0.0
    camera: Callable = lambda shape, generator: dip.identity()
    noise: Callable = gaussian


TASKS = {"noise 15": Task(15), "noise 25": Task(25), "noise 50": Task(50),
         "Poisson noise": Task(25, noise=poisson), "hole": Task(camera=hole(1 / 4)),
         "noise 25, cut to [0, 1]": Task(25, noise=lambda *of: gaussian(*of).clamp(0, 1)),
         "large hole": Task(camera=hole(3 / 8)), "80 % missing": Task(camera=random_pixels),
         "×4": Task(camera=lambda shape, generator: dip.downsample(4))}


def seeded(*what) -> torch.Generator:
    """Reproducible, and of its own for every purpose."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def measured(clean: Tensor, task: str, *seed) -> dip.Problem:
    """What the camera of a task makes of clean pictures: one operator for all of them, noise for each."""
    camera, generator = TASKS[task], seeded(task, *seed)
    operator, sigma = camera.camera(clean.shape[-2:], generator), camera.sigma / 255
    noisy = camera.noise(clean.cpu(), sigma, generator).to(clean.device) if sigma else operator.A(clean)
    return dip.Problem(noisy, operator, sigma)


def starting(problem: dip.Problem, *seed) -> torch.Generator:
    """The random numbers of a method: by the measurement and the seed, so that a file and a job give the
    same.
    """
    return seeded(hashlib.sha256(problem.y.cpu().numpy().tobytes()).hexdigest(), *seed)


class Pixels(nn.Module):
    """Free pixels in place of a network: the prior that prefers nothing."""

    def __init__(self, image: Tensor):
        super().__init__()
        self.image = nn.Parameter(image.clone())

    def forward(self, z: Tensor) -> Tensor:
        return 1 * self.image


def fresh(problem: dip.Problem, generator: torch.Generator, copies: int = 1, free: bool = False, **options):
    """Tool: new hourglasses (`copies` for each picture, run as one) or free pixels, and their inputs."""
    if free:
        return Pixels(problem.operator.pinv(problem.y)), torch.zeros(len(problem.y), 1, 1, 1, device=DEVICE)
    _, channels, *shape = problem.shape
    options = {"c_out": channels, "widths": (32,) * 4, "upsample": "nearest", "padding": "zeros"} | options
    singles, inputs = [], []
    for _ in range(copies * len(problem.y)):
        torch.manual_seed(int(torch.randint(2 ** 31, (1,), generator=generator)))
        singles.append(dip.Hourglass(**options))
        inputs.append(dip.random_input(shape, generator))
    network = dip.Hourglass(**options, copies=len(singles))
    network.load_copies(singles)
    return network.to(DEVICE, memory_format=torch.channels_last), torch.cat(inputs).to(DEVICE)


def each(function: Callable, x: Tensor, *args, **options) -> Tensor:
    """function(picture (H, W, C) as an array, …) of scikit-image for every picture of x (B, C, H, W)."""
    found = [function(image.permute(1, 2, 0).cpu().numpy(), *args, channel_axis=-1, **options) for image in x]
    return torch.from_numpy(np.stack(found)).float().permute(0, 3, 1, 2).to(x.device)


def interpolate(problem: dip.Problem) -> Tensor:
    """Tool: biharmonic interpolation of what is not known, then bicubic to the size of the picture."""
    unknown, filled = (problem.known == 0)[0, 0].cpu().numpy(), problem.y
    if unknown.any():
        filled = each(inpaint_biharmonic, filled, unknown)
    if filled.shape[-2:] != problem.shape[-2:]:
        filled = nn.functional.interpolate(filled, size=problem.shape[-2:], mode="bicubic")
    return filled.clamp(0, 1)


def non_local_means(y: Tensor, sigma: float) -> Tensor:
    """Patches of 5 × 5, compared within 6 pixels (Buades, Coll & Morel 2005, as in scikit-image)."""
    return each(denoise_nl_means, y, 5, 6, h=0.6 * sigma, sigma=sigma, fast_mode=True)


def smoother(s: ddpm.Schedule) -> Callable:
    """Tool: non-local means in the place of a model, (xt, t) → x̂₀, at the noise level of t."""
    def denoise(xt: Tensor, t: int) -> Tensor:
        image = ddpm.to_image(xt / s.alpha_bar[t].sqrt().item())
        return ddpm.to_diffusion(non_local_means(image, ddpm.noise_level(s)[t].item()))
    return denoise


def perceptual(problem: dip.Problem, model: "Job", generator: torch.Generator) -> Callable:
    """Penalty: features of the photo model's first layers, of the image and of y, at y's own noise level."""
    network, (s, _), _ = network_of(model)
    t = torch.tensor([ddpm.step_of(s, problem.sigma)], device=DEVICE)
    emb = network.embed(ddpm.time_features(t, network.embed[0].in_features)).detach()

    def features(image):
        xt = ddpm.at(s.alpha_bar.sqrt(), t, image) * ddpm.to_diffusion(image)
        return network.down[0](network.enter(xt), emb)
    target = features(problem.y).detach()
    unit = 0.3 * problem.sigma ** 2 / target.var().item()
    return lambda images, i: unit * (features(images) - target).square().mean((1, 2, 3)).sum()


def adversarial(problem: dip.Problem, model: "Job", generator: torch.Generator) -> Callable:
    """Penalty: a small critic, trained on the way to tell training photos from DIP's images, and DIP to fool
    it.
    """
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1),
                           nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 3)).to(DEVICE)
    optimiser, softplus = torch.optim.Adam(critic.parameters(), 1e-3, (0.5, 0.9)), nn.functional.softplus

    def penalty(images, i):
        real = ddpm.patches(training_photos(), generator, 1).to(DEVICE)
        optimiser.zero_grad()
        (softplus(-critic(real)).mean() + softplus(critic(images.detach())).mean()).backward()
        optimiser.step()
        return 0.01 * problem.sigma ** 2 * softplus(-critic(images)).mean() * len(images)
    return penalty


PENALTIES = {"perceptual": perceptual, "adversarial": adversarial}
# updates until a fit has long passed its peak
FITS = {"noise 15": 800, "noise 25": 500, "noise 50": 320}
RULES = {"discrepancy, τ = 0.92": lambda p: dip.Discrepancy(p.sigma),
         "discrepancy, τ = 1": lambda p: dip.Discrepancy(p.sigma, 1.0),
         "ES-WMV, rescaled": lambda p: dip.WindowedVariance(80, 50),
         "ES-WMV, W 100, P 1000": lambda p: dip.WindowedVariance(),
         "ES-EMV, rescaled": lambda p: dip.MovingVariance(0.05, 50, 50),
         "ES-EMV, P 1000": lambda p: dip.MovingVariance(),
         "fixed budget": lambda p: dip.FixedBudget({15: 600, 25: 425, 50: 225}[round(255 * p.sigma)])}


# --------------------------------------------------------------------------------------------------- methods

def interpolation(problem: dip.Problem, generator: torch.Generator, interpolate: Callable
                  ) -> Iterator[dip.Restoration]:
    """The classical formula for what is missing: no network, no model."""
    yield from hybrid.judged(problem, generator, interpolate)


def means_of_patches(problem: dip.Problem) -> Iterator[dip.Restoration]:
    """The classical formula for noise."""
    yield dip.Restoration(non_local_means(problem.y, problem.sigma))


class Method(NamedTuple):
    """A function, one line for the user, and whether it is for noisy measurements only (True), for others
    (False) or for both; its settings; the methods whose finished Restorations it takes, with theirs.
    """
    run: Callable
    about: str
    noise: Optional[bool] = None
    settings: dict = {}
    experts: tuple = ()


METHODS = {
    "interpolation": Method(interpolation, "a classical formula, biharmonic and bicubic", False),
    "nlm": Method(means_of_patches, "a classical formula, non-local means", True),
    "dip": Method(dip.deep_image_prior, "a deep image prior on all measurements"),
    "two-dips": Method(hybrid.averaged, "the mean of two of them",
                       experts=(("dip", {}), ("dip", {"start": 1}))),
    "held-out": Method(hybrid.held_out, "DIP, stopped by measurements kept back: needs no SIGMA"),
    "sure": Method(hybrid.one_sided_sure, "DIP, stopped by Stein's estimate", True),
    "pair": Method(hybrid.antithetic_pair, "an antithetic pair of DIPs, stopped by its risk estimate", True),
    "diffusion": Method(hybrid.diffusion, "the diffusion model alone"),
    "diffusion-pair": Method(hybrid.diffusion_pair, "the diffusion model on an antithetic pair", True),
    "warm-start": Method(hybrid.warm_start, "the diffusion model alone, started from interpolation", False,
                         experts=(("interpolation", {}),)),
    "weighted": Method(hybrid.weighted, "pair and diffusion-pair, weighted by their estimated risks", True,
                       experts=(("pair", {}), ("diffusion-pair", {}))),
    "brief": Method(hybrid.refit, "the brief DIP that starts the chain in refit", False, {"evaluations": 0}),
    "refit": Method(hybrid.refit, "the reverse chain with DIP refits and interpolation", False),
    "regularised": Method(hybrid.regularised, "DIP with the diffusion model in its loss"),
}


def names(method: str) -> set:
    """The arguments that a method takes: problem, tools and settings."""
    return set(inspect.signature(METHODS[method].run).parameters) if method in METHODS else set()


def perform(method: str, problem: dip.Problem, tools: dict, settings: dict) -> Iterator[dip.Restoration]:
    """Run a method; of the tools it gets those that it names."""
    wanted = {name: tool for name, tool in tools.items() if name in names(method)}
    return METHODS[method].run(problem, **wanted, **METHODS[method].settings | settings)


def toolbox(problem: dip.Problem, generator: torch.Generator, model: Optional["Job"], settings: dict
            ) -> tuple[dict, list]:
    """The tools of a method, and a list that grows with every evaluation of the model. What belongs to the
    tools (network, prior) is taken out of `settings`; names of rules and penalties become functions.
    """
    tools, evaluations = {"generator": generator, "interpolate": interpolate, "model": None}, []
    tools["fresh"] = functools.partial(fresh, **dict(settings.pop("network", ())))
    prior, grey = settings.pop("prior", None), problem.shape[1] == 1
    if "rules" in settings:
        settings["rules"] = {name: RULES[name] for name in settings["rules"]}
    if "penalty" in settings:
        settings["penalty"] = PENALTIES[settings["penalty"]](problem, model, generator)
    if model is not None:
        loaded = model_of(model)
        denoise = smoother(loaded.schedule) if prior == "nlm" else loaded.denoise

        def counted(xt: Tensor, t: int) -> Tensor:
            evaluations.append(t)
            # A grey picture is three equal ones to the model.
            return denoise(xt.expand(-1, 3, -1, -1), t).mean(1, keepdim=True) if grey else denoise(xt, t)
        tools["model"] = loaded._replace(denoise=counted)
    return tools, evaluations


# -------------------------------------------------------------------------------------- jobs and their cache

@functools.cache
def definitions() -> dict:
    """(module, name) → syntax tree of every top-level definition in our five files, docstrings removed."""
    found = {}
    for module in ("metrics", "ddpm", "dip", "hybrid", "experiments"):
        for node in ast.parse((ROOT / f"{module}.py").read_text()).body:
            for part in ast.walk(node):
                if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part) is not None:
                    part.body = part.body[1:]
            targets = [part for part in getattr(node, "targets", [getattr(node, "target", None)]) if part]
            parts = itertools.chain(*map(ast.walk, targets))
            assigned = [part.id for part in parts if isinstance(part, ast.Name)]
            found |= {(module, name): node for name in assigned or [getattr(node, "name", "")]}
    return found


# A job names its own entries of these tables; a user's folder is no part of the experiments.
NOT_FOLLOWED = {"METHODS", "WORK", "PENALTIES", "Job", "Refusal", "read_image"}


@functools.cache
def fingerprint(name: str, module: str = "experiments") -> str:
    """A hash of the code behind a definition: its syntax tree and, again and again, those of all definitions
    of ours that it names. Comments, docstrings and layout do not count.
    """
    todo, seen = [(module, name)], {}
    while todo:
        here = todo.pop()
        if here in seen or here not in definitions() or here[1] in NOT_FOLLOWED:
            continue
        node = definitions()[here]
        seen[here], parts = ast.dump(node), list(ast.walk(node))
        inner = {part.arg for part in parts if isinstance(part, ast.arg)}
        for part in parts:
            if isinstance(part, ast.Name) and part.id not in inner:
                todo.append((here[0], part.id))
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                todo.append((part.value.id, part.attr))
    return sha(sorted(seen.items()))


def sha(what) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """One cached computation: a method on pictures, or a piece of WORK such as training."""
    method: str
    photos: tuple = ()
    task: str = ""
    seed: int = 0
    size: int = 96
    model: Optional["Job"] = None
    experts: tuple = ()
    settings: tuple = ()

    @property
    def needs(self) -> tuple:
        return (*self.experts, *filter(None, [self.model]))

    @functools.cached_property
    def key(self) -> str:
        work, penalty = [WORK.get(self.method, restoration)], dict(self.settings).get("penalty")
        work += [METHODS[self.method].run] * (self.method in METHODS) + [PENALTIES[penalty]] * bool(penalty)
        places = [(f.__name__, f.__module__ if f.__module__ in ("dip", "hybrid") else "experiments")
                  for f in work]
        own = replace(self, model=None, experts=()), METHODS[self.method].settings if len(work) > 1 else {}
        return sha((own, [need.key for need in self.needs], [fingerprint(*place) for place in places]))

    @property
    def path(self) -> Path:
        return CACHE / f"{self.method}-{self.key}.pt"

    def done(self) -> bool:
        """Is the result there? A damaged file is set aside."""
        if self.path.exists() and not zipfile.is_zipfile(self.path):
            os.replace(self.path, self.path.with_suffix(".broken"))
            print(f"{self.path.name} in .cache is damaged: set aside, it is computed again", file=sys.stderr)
        return self.path.exists()

    def result(self) -> dict:
        return torch.load(self.path, weights_only=True, map_location=DEVICE)

    @property
    def cost(self) -> float:
        """A guess in core-seconds, for the order of work and the time left."""
        chosen, area = dict(self.settings), (self.size / 96) ** 2 * len(self.photos)
        if self.method in WORK:
            steps = chosen.get("steps", 50)
            return 1 + (0.1 * steps if self.method == "train" else 0.003 * chosen["n"] * steps)
        updates = {"pair": 800, "sure": 800, "dip": 480, "held-out": 600, "regularised": 640, "refit": 300,
                   "brief": 100}.get(self.method, 10)
        return 1 + 0.022 * area * chosen.get("steps", updates) * (2 if self.method in ("pair", "sure") else 1)


def job(method: str, photo="", task: str = "", *, seed: int = 0, size: int = 96, model: Optional[Job] = None,
        experts: Optional[tuple] = None, **settings) -> Job:
    """A Job: one photo or a tuple of them, dictionaries frozen, a method's own experts called in. Fits of
    DIP and the pair to noisy test photos are watched to their end, so that every question shares them;
    what they deliver is the same.
    """
    def frozen(value):
        return tuple(sorted((k, frozen(v)) for k, v in value.items())) if isinstance(value, dict) else value
    if method in ("dip", "pair") and task in FITS and photo in TEST and size == 96 and not settings:
        settings = {"watch": True, "steps": round(FITS[task] * (1.16 if method == "pair" else 1))}
        settings |= {"rules": tuple(RULES)} if method == "dip" else {}
    if experts is None:
        called = METHODS[method].experts if method in METHODS else ()
        experts = tuple(job(name, photo, task, seed=seed, size=size, model=model, **more)
                        for name, more in called)
    used = method not in METHODS or "model" in names(method) or "penalty" in settings
    photos = photo if isinstance(photo, tuple) else (photo,)
    return Job(method, photos, task, seed, size, model if used else None, experts, frozen(settings))


def write(path: Path, save: Callable) -> None:
    """save(temporary path), then rename: readers see the old file or the whole new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make(job: Job) -> None:
    """Compute a job and keep its result."""
    result = (restoration if job.method in METHODS else WORK[job.method])(job)
    write(job.path, functools.partial(torch.save, result))


def start_worker() -> None:
    """Workers use one thread each, leave Ctrl-C to the parent, and do not outlive it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def missing(jobs) -> dict:
    """What the cache lacks of `jobs` and of what they need, each once, needs first."""
    found, seen = {}, set()

    def visit(job):
        if job not in seen:
            seen.add(job)
            if not job.done():
                for need in job.needs:
                    visit(need)
                found[job] = None
    for job in jobs:
        visit(job)
    return found


def compute(jobs, processes: int) -> None:
    """Make what is missing: a job starts as soon as what it needs is there, the costliest first."""
    todo, running, done, began = missing(jobs), {}, 0.0, time.monotonic()
    waiting, total = sorted(todo, key=lambda job: -job.cost), sum(job.cost for job in todo)
    if not todo:
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker)
    bar = tqdm(total=100, mininterval=0 if sys.stderr.isatty() else 60, smoothing=0.02,
               bar_format="{desc} {percentage:3.0f}% {bar} {elapsed} <{remaining} {postfix}")
    try:
        while waiting or running:
            ready = (job for job in waiting if not any(need in todo for need in job.needs))
            for job in list(itertools.islice(ready, processes - len(running))):
                waiting.remove(job)
                running[pool.submit(make, job)] = job, time.monotonic()
            finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
                job, _ = running.pop(future)
                done += job.cost
                del todo[job]
            # Running jobs count by the time they have had, at the speed of the finished ones.
            now, speed = time.monotonic(), max(done, 1) / max(1, processes * (time.monotonic() - began))
            partly = sum(min(0.9 * job.cost, speed * (now - start)) for job, start in running.values())
            bar.set_description_str(f"{len(todo)} jobs left", refresh=False)
            bar.set_postfix_str(" | ".join(f"{job.method} {job.photos[0]} {job.task}" for job, _ in running.values()))
            bar.update(min(100, 100 * (done + partly) / total) - bar.n)
    except (KeyboardInterrupt, BrokenProcessPool) as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else "a worker process was killed"
        raise Refusal(f"{why}: every finished job is kept, run the same command again to go on")
    finally:
        bar.close()
        for process in list((pool._processes or {}).values()):
            process.terminate() if running else None
        pool.shutdown(wait=False, cancel_futures=True)


# -------------------------------------------------------------- work: training, sampling, restoring, scoring

def recipe(data: str) -> tuple[tuple, Callable, float]:
    """Widths of the U-Net, batches and learning rate for "cats", "photos", or a folder of images."""
    if data == "cats":
        return (32, 64, 96, 128), lambda generator: render_cats(draw_cats(generator, 16)), 2e-3
    photos = training_photos("" if data == "photos" else data)
    return (32, 64, 96), functools.partial(ddpm.patches, photos), 3e-3


def parts_of(chosen: dict) -> tuple[ddpm.Schedule, ddpm.Head]:
    """The schedule and the head of a training job."""
    schedules = {"linear": ddpm.linear, "cosine": ddpm.cosine, "sigmoid": ddpm.sigmoid}
    heads = {"v": ddpm.v_head, "ε": ddpm.eps_head}
    return schedules[chosen.get("schedule", "cosine")](1000), heads[chosen.get("head", "v")]


def network_of(job: Job, ema: bool = True) -> tuple[ddpm.UNet, tuple, dict]:
    """The network of a training job with its averaged (or last) weights, its schedule and head, and the
    result.
    """
    result = job.result()
    network = ddpm.UNet(3, result["widths"])
    network.load_state_dict(result["trainer"]["ema" if ema else "net"])
    return network.to(DEVICE, memory_format=torch.channels_last).eval(), parts_of(dict(job.settings)), result


def model_of(job: Job, ema: bool = True) -> ddpm.Model:
    network, (s, head), result = network_of(job, ema)
    return ddpm.Model(ddpm.denoiser(network, s, head), s, result["v"])


def train(job: Job) -> dict:
    """A diffusion model after `steps` updates, going on from the job before it; v(t) is measured at the end.
    """
    chosen, (widths, batch, lr) = dict(job.settings), recipe(job.photos[0])
    before = job.experts[0].result() if job.experts else {"trainer": None, "seconds": 0.0}
    torch.manual_seed(job.seed)
    network, (s, head) = ddpm.UNet(3, widths).to(DEVICE, memory_format=torch.channels_last), parts_of(chosen)
    generator, began, losses = seeded("train", *job.photos, job.seed), time.perf_counter(), []
    place = ddpm.logit_normal(*chosen["place"]) if "place" in chosen else ddpm.evenly
    for state in ddpm.train(network, s, batch, head, chosen["steps"], generator, lr=lr, place=place,
                            t_max=chosen.get("t_max"), resume=before["trainer"]):
        losses.append(state.loss)
    seconds = before["seconds"] + time.perf_counter() - began
    checkpoint, x0 = state.checkpoint(), torch.cat([batch(generator) for _ in range(4)]).to(DEVICE)
    ts = [1, 10, 20, 40, 70, *range(100, s.T + 1, 100)]
    v = ddpm.error_curve(ddpm.denoiser(state.ema, s, head), s, x0, ts, generator)
    record = {"steps": state.step, "seconds": seconds, "loss": float(np.mean(losses[-50:])),
              "parameters": sum(p.numel() for p in network.parameters())}
    return {"trainer": checkpoint, "v": v, "widths": widths, "seconds": seconds, "records": [record]}


def nearest_parts(images: Tensor) -> Tensor:
    """(n, 5): the cat nearest to each image, by trying all options of one factor at a time until nothing
    improves.
    """
    parts = torch.zeros(len(images), 5, dtype=torch.long)
    for _ in range(6):
        before, parts = parts, parts.clone()
        for i, options in enumerate(CAT_FACTORS.values()):
            tried = parts.repeat_interleave(options, 0)
            tried[:, i] = torch.arange(options).repeat(len(parts))
            rendered = render_cats(tried).reshape(len(parts), options, -1)
            parts[:, i] = (rendered - images.flatten(1)[:, None]).square().sum(2).argmin(1)
        if torch.equal(parts, before):
            break
    return parts


def examine(images: Tensor) -> dict:
    """What a known distribution lets us measure of cats (n, 3, 32, 32): the entropy of each factor (1 =
    uniform), how often pairs occur that training never had (1 = as they should), the distance to the
    nearest cat (fidelity).
    """
    parts = torch.cat([nearest_parts(some) for some in images.split(64)])
    found = {name: metrics.entropy(parts[:, i], k) for i, (name, k) in enumerate(CAT_FACTORS.items())}
    fair = never_trained(torch.cartesian_prod(*map(torch.arange, CAT_FACTORS.values()))).float().mean()
    distance = (images - render_cats(parts)).square().mean((1, 2, 3)).sqrt().mean()
    unseen = (never_trained(parts).float().mean() / fair).item()
    return found | {"least": min(found.values()), "unseen": unseen, "fidelity": distance.item()}


def sample(job: Job) -> dict:
    """n pictures from a model by DDIM, or n real cats; judged against the real cats of the expert."""
    chosen = {"steps": 50, "ema": True, "eta": 0.0} | dict(job.settings)
    generator, began, found = seeded(job.seed), time.perf_counter(), []
    real, n = job.model is None, chosen["n"]
    side = 32 if real or job.model.photos == ("cats",) else 64
    if real:
        found.append(render_cats(draw_cats(generator, n, everything=True)))
    while sum(map(len, found)) < n:
        denoise, s, _ = model_of(job.model, chosen["ema"])
        x = torch.randn(min(64, n), 3, side, side, generator=generator).to(DEVICE)
        *_, last = ddpm.ddim(denoise, s, x, chosen["steps"], generator, chosen["eta"])
        found.append(ddpm.to_image(last.x).clamp(0, 1).cpu())
    images = torch.cat(found)[:n]
    seconds = (time.perf_counter() - began) / n
    record = {"n": n, "seconds": seconds, "evaluations": 0 if real else chosen["steps"]}
    record |= examine(images) if side == 32 else {}
    features = nn.functional.avg_pool2d(images, 4).flatten(1)
    if job.experts:
        record["frechet"] = metrics.frechet(features, job.experts[0].result()["features"].cpu())
    return {"records": [record], "features": features, "images": to_bytes(images[:64])}


def restoration(job: Job) -> dict:
    """Damage pictures, restore them by a method, score: the only place where a truth meets an estimate."""
    settings, truth = dict(job.settings), pictures(job.photos, job.size).to(DEVICE)
    samples, start, leak, belief = (settings.pop(name, default) for name, default in (
        ("samples", 1), ("start", 0), ("leak", False), ("belief", 1.0)))
    problem = measured(truth, job.task, *job.photos, job.seed if TASKS[job.task].sigma else 0)
    if leak:
        # LEAK: the method gets the truth in the place of the measurement, as in public projects.
        problem = problem._replace(y=truth)
    sigma = belief * problem.sigma if belief else metrics.noise_level(problem.y)
    problem = problem._replace(y=problem.y.repeat_interleave(samples, 0), sigma=sigma)
    truth, curve, risks, clock = truth.repeat_interleave(samples, 0), [], [], [0.0]
    tools, evaluations = toolbox(problem, starting(problem, job.seed, start), job.model, settings)
    results = [expert.result() for expert in job.experts]
    tools["experts"] = [dip.Restoration(result["image"], result["facts"]) for result in results]
    began = time.perf_counter()
    for found in perform(job.method, problem, tools, settings):
        clock.append(clock[-1] + time.perf_counter() - began)
        now = found.image if found.now is None else found.now
        curve.append(metrics.psnr(now.clamp(0, 1), truth).cpu())
        risks.append(found.facts.get("risk_now", [math.nan])[0])
        began = time.perf_counter()
    spent = {name: sum(result["records"][0][name] for result in results)
             for name in ("seconds", "updates", "evaluations")}
    spent["evaluations"] += len(evaluations)
    offers, curve, records = {"": found} | found.others, torch.stack(curve), []
    for rule, offer in offers.items():
        for b, name in enumerate(job.photos):
            own = slice(b * samples, (b + 1) * samples)
            record = score(offer, truth, own, curve) | {"photo": str(name), "rule": rule}
            ended = min(record.get("stopped", len(curve)), len(curve))
            record["seconds"] = spent["seconds"] + clock[ended] / len(job.photos)
            record["updates"] = spent["updates"] + record.get("updates", 0)
            records.append(record | {"evaluations": spent["evaluations"]})
    images = {rule: offer.image for rule, offer in offers.items()}
    images |= {"measured": problem.operator.pinv(problem.y), "truth": truth}
    return {"records": records, "image": found.image, "facts": found.facts, "curve": curve,
            "risks": torch.tensor(risks), "images": {name: to_bytes(image) for name, image in images.items()}}


def score(offer: dip.Restoration, truth: Tensor, own: slice, curve: Tensor) -> dict:
    """What is known about one picture of an offer, `own`: several where it was sampled (then means over
    them).
    """
    images, clean = offer.image[own].clamp(0, 1), truth[own]
    found = {name: value[own.start] if isinstance(value, list) else value
             for name, value in offer.facts.items()}
    found["psnr"] = metrics.psnr(images, clean).mean().item()
    found["ssim"] = metrics.ssim(images, clean).mean().item()
    if found.get("expected", 0) > 0:
        found["expected"] = -10 * math.log10(found["expected"])
    if len(images) > 1:
        mean = images.mean(0, keepdim=True)
        found["psnr_of_mean"] = metrics.psnr(mean, clean[:1]).item()
        # the root mean square distance between two samples
        found["diversity"] = (2 * (images - mean).square().sum(0).mean() / (len(images) - 1)).sqrt().item()
    if offer.target is not None:
        target = offer.target[own].clamp(0, 1)
        found["target_psnr"] = metrics.psnr(images, target).mean().item()
        found["target_ssim"] = metrics.ssim(images, target).mean().item()
    elif "stopped" in found:
        mine = curve[:, own.start]
        found |= {"peak": mine.max().item(), "peak_step": int(mine.argmax()) + 1, "last": mine[-1].item()}
        found["gap"] = found["peak"] - mine[found["step"] - 1].item()
    return found


def to_bytes(x: Tensor) -> Tensor:
    return (x.detach().cpu().clamp(0, 1) * 255).round().byte()


WORK = {"train": train, "sample": sample}


# ------------------------------------------------------------------------------------ sweeps, one a question
# A sweep yields (row, job): what the row is called in tables and queries, and what is computed for it.

NOISY, HIDDEN = ("noise 15", "noise 25", "noise 50"), ("hole", "large hole", "80 % missing", "×4")
FIVE = ("noise 25", "noise 50", "hole", "80 % missing", "×4")
SMALL, FOUR, SLOW = {"task": "noise 25", "size": 64}, (2.0, 1.0, 0.5, 0.25), {"antithetic": False, "warm": True}


def over(**axes) -> list[dict]:
    """Every combination: over(a=(1, 2), b=(3,)) → [{a: 1, b: 3}, {a: 2, b: 3}]."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def changes(method: str, table: dict, **at) -> Iterator:
    """A row for every entry of a table of changed settings, on every test photo."""
    for photo, (row, change) in itertools.product(TEST, table.items()):
        yield row, job(method, **{"photo": photo} | at | change)


def chain(data: str, steps: int, **settings) -> tuple:
    """Training as a chain of jobs: a sixteenth, an eighth, a quarter, a half and the whole of the steps."""
    found = ()
    for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1):
        found += (job("train", data, experts=found[-1:], steps=round(share * steps), **settings),)
    return found


def steps_of(model: Job) -> str:
    return f"{dict(model.settings)['steps']} updates"


PLACE = (-0.1, 1.1)
PHOTOS, CATS = chain("photos", 1250), chain("cats", 2600, place=PLACE)


def ask_ddpm():
    """Does the model generate, and at what cost?"""
    draw = functools.partial(job, "sample", "cats", experts=(job("sample", "cats", seed=2, n=2048),), n=512)
    yield "real cats", draw(seed=1)
    for eta, steps in itertools.product((0.0, 1.0), (5, 10, 20, 50)):
        yield f"η = {eta:.0f}, {steps} steps", draw(model=CATS[-1], steps=steps, eta=eta)
    yield from ((f"after {steps_of(model)}", draw(model=model, steps=20)) for model in CATS)
    yield "last weights", draw(model=CATS[-1], ema=False, steps=20)
    for schedule, head in (("cosine", "v"), ("linear", "v"), ("sigmoid", "v"), ("cosine", "ε")):
        model = job("train", "cats", steps=160, place=PLACE, schedule=schedule, head=head)
        yield f"{schedule}, {head}", draw(model=model, steps=20)
    yield "cosine, v, all steps alike", draw(model=job("train", "cats", steps=160), steps=20)
    yield from ((f"training on {model.photos[0]}", model) for model in (CATS[-1], PHOTOS[-1]))
    for model, at in itertools.product(PHOTOS, over(photo=TEST, seed=(0, 1))):
        yield f"after {steps_of(model)}", job("diffusion", task="noise 25", model=model, evaluations=1, **at)
    for k, at in itertools.product((1, 2, 10), over(photo=TEST, task=NOISY, seed=(0, 1))):
        yield f"{k} evaluations", job("diffusion", model=PHOTOS[-1], evaluations=k, **at)


NETWORKS = {"width 16": {"network": {"widths": (16,) * 4}}, "3 scales": {"network": {"widths": (32,) * 3}},
            "no skips": {"network": {"skip": 0}}}
BILINEAR = {"steps": 1000, "network": {"upsample": "bilinear", "padding": "reflect"}}


def ask_dip():
    """What does the prior know, and when does it overfit?"""
    both = over(photo=TEST, task=NOISY, seed=(0, 1)) + over(photo=TEST, task=HIDDEN)
    yield from (("dip", job("dip", **at)) for at in both)
    table = {"as chosen": {}} | NETWORKS | {"bilinear, reflected borders": BILINEAR, "no jitter": {"jitter": 0.0}}
    yield from changes("dip", table, **SMALL, steps=500, watch=True)


def equal_steps(make: Callable, n: int = 4, sigma: float = 25 / 255) -> tuple:
    """S/σ of n stages from 2 to 1/4 that are equally many steps of a schedule apart."""
    s = make(4000)
    ends = [ddpm.step_of(s, sigma * math.hypot(1, ratio)) for ratio in (FOUR[0], FOUR[-1])]
    levels = [ddpm.noise_level(s)[round(t)].item() for t in np.linspace(*ends, n)]
    return tuple(round(math.sqrt((level / sigma) ** 2 - 1), 2) for level in levels)


STAGES = {
    "as chosen": {}, **{f"S = {ratio:g} σ": {"ratios": (ratio,)} for ratio in (0.02, 0.1, 1.0, 2.0)},
    "four pairs": {"ratios": FOUR}, "one network": {"antithetic": False},
    "four warm stages, heavy to light": {"ratios": FOUR, **SLOW},
    "four warm stages, light to heavy": {"ratios": FOUR[::-1], **SLOW},
    "four warm stages, linear schedule": {"ratios": equal_steps(ddpm.linear), **SLOW},
    "four warm stages, cosine schedule": {"ratios": equal_steps(ddpm.cosine), **SLOW},
    **NETWORKS,
    **{f"σ believed × {belief}": {"belief": belief} for belief in (0.7, 1.3)}, "σ estimated": {"belief": 0.0},
    "noise cut to [0, 1]": {"task": "noise 25, cut to [0, 1]"}, "Poisson noise": {"task": "Poisson noise"},
    "perceptual term": {"penalty": "perceptual", "model": PHOTOS[-1]}, "adversarial term": {"penalty": "adversarial"},
    "LEAK: stages of the clean image": {"leak": True, "steps": 120, "patience": 10 ** 6, "ratios": FOUR, **SLOW}}


def ask_stop():
    """Can noise stages tell DIP when to stop?"""
    for at in over(photo=TEST, task=NOISY, seed=(0, 1)):
        yield "", job("dip", **at)
        yield "pair", job("pair", **at)
    for at in over(photo=TEST, task=NOISY):
        yield "held-out pixels", job("held-out", **at, steps=FITS[at["task"]], watch=True)
        yield "Monte-Carlo SURE", job("sure", **at, steps=FITS[at["task"]], watch=True)
        yield "two plain fits averaged", job("two-dips", **at)
    yield from changes("pair", STAGES, **SMALL, steps=360, watch=True)
    yield from changes("dip", {"plain DIP": {}}, **SMALL, steps=500, watch=True)


WAYS = {"refit": ("refit", {}), "refit without interpolation": ("refit", {"fusion": False}),
        "interpolation": ("interpolation", {}), "brief DIP": ("brief", {}),
        "start from interpolation": ("warm-start", {}), "50 evaluations from noise": ("diffusion", {}),
        **{f"{k} evaluations from noise": ("diffusion", {"evaluations": k}) for k in (10, 100)}}
STARTS = {"start from DIP": {}, "start from DIP, guided by it": {"guide": True}, "DIP thrown in at t = T": {"t": 1000},
          **{f"8 samples from t₀ = {t}": {"t": t, "samples": 8} for t in (100, 300, 500, 700)}}
REFITS = {**{f"{n} updates before": {"brief": n} for n in (25, 50, 200)}, **{
    f"{k} evaluations": {"evaluations": k} for k in (1, 2, 4)}, "5 updates a step": {"updates": 5},
    "weight of the guess 1": {"weight": 1.0}, "η = 1": {"eta": 1.0},
    **{f"t₀ = {t}": {"t": t} for t in (100, 400, 700)}, "width 16": NETWORKS["width 16"]}


def ask_enter():
    """How many reverse steps does a DIP prior save, at what quality and diversity?"""
    flock = over(photo=(tuple(range(32)),), task=HIDDEN, size=(32,), model=(CATS[-1],))
    for at in over(photo=TEST, task=HIDDEN, model=(PHOTOS[-1],)) + flock:
        yield from ((row, job(method, **at, **more)) for row, (method, more) in WAYS.items())
        brief = (job("brief", **at),)
        yield from ((row, job("warm-start", **at, experts=brief, **more)) for row, more in STARTS.items()
                    if at not in flock or "samples" not in more)
    for task in ("hole", "×4"):
        yield from changes("refit", REFITS, task=task, model=PHOTOS[-1])


def ask_train():
    """How much training does a DIP prior save?"""
    at = {"photo": tuple(range(32)), "task": "large hole", "size": 32}
    brief = (job("brief", **at),)
    yield "brief DIP", brief[0]
    for model in CATS:
        yield f"from noise, {steps_of(model)}", job("diffusion", model=model, **at)
        yield f"from interpolation, {steps_of(model)}", job("warm-start", model=model, **at)
        yield f"from DIP, {steps_of(model)}", job("warm-start", model=model, experts=brief, **at)
    for t_max, seed in itertools.product((1000, 500, 250), (0, 1)):
        for model, t in itertools.product(chain("cats", 400, t_max=t_max, seed=seed)[1:], (250, 500)):
            row = f"t ≤ {t_max} learnt, from t₀ = {t}, {steps_of(model)}"
            yield from [(row, job("warm-start", model=model, experts=brief, t=t, seed=seed, **at))] * (t <= t_max)


REGULARISED = {
    "as chosen": {}, "constraint, no model": {"weight": 0.0}, "model, no constraint": {"floor": 0.0},
    "neither: plain DIP": {"weight": 0.0, "floor": 0.0}, **{f"λ = {w:g}": {"weight": w} for w in (0.1, 1.0, 10.0)},
    "free pixels, no network": {"network": {"free": True}}, "non-local means, no model": {"prior": "nlm"},
    "model after a quarter": {"model": PHOTOS[2]}, "cats' model": {"model": CATS[-1]},
    **{f"σ believed × {belief}": {"belief": belief} for belief in (0.7, 1.3)}}


def ask_guide():
    """Does a learned prior make early stopping unnecessary?"""
    for at in over(photo=TEST, task=FIVE):
        yield "regularised", job("regularised", model=PHOTOS[-1], **at)
        yield "no model", job("regularised", **at, weight=0.0)
    yield from changes("regularised", {"neither": {}}, task="noise 25", weight=0.0, floor=0.0)
    yield from changes("regularised", REGULARISED, **SMALL, model=PHOTOS[-1])
    for row, more in (("photos'", {"model": PHOTOS[-1]}), ("cats'", {"model": CATS[-1]}), ("no", {"weight": 0.0})):
        yield f"{row} model on cats", job("regularised", tuple(range(8)), "noise 25", size=32, **more)


def ask_final():
    """Which method for which task? Every method as `make restore` runs it, but for the stop rules of `stop`.
    """
    for name, at in itertools.product(METHODS, over(photo=TEST + DEVELOPMENT, task=FIVE)):
        if METHODS[name].noise in (None, at["task"] in NOISY) and name not in ("held-out", "sure", "brief"):
            yield name, job(name, model=PHOTOS[-1], **at)
    for at in over(method=("pair", "diffusion", "diffusion-pair", "weighted"), task=("noise 25", "noise 50")):
        yield f"{at['method']}, cats", job(photo=tuple(range(32)), size=32, model=CATS[-1], **at)


QUESTIONS = {"ddpm": ask_ddpm, "dip": ask_dip, "stop": ask_stop, "enter": ask_enter, "train": ask_train,
             "guide": ask_guide, "final": ask_final}
QUICK = {"steps": 12, "brief": 4, "updates": 1, "evaluations": 2, "n": 64, "samples": 2}


def quickly(job: Job) -> Job:
    """The same job on a tiny budget; its numbers mean nothing."""
    given, takes = dict(job.settings), names(job.method) & {"steps", "brief", "updates"}
    small = {name: min(value, QUICK[name]) if name in QUICK else value for name, value in given.items()}
    small = {name: QUICK[name] for name in takes} | small
    if job.method == "train":
        small["steps"] = math.isqrt(given["steps"])
    return replace(job, photos=job.photos[:4], model=job.model and quickly(job.model),
                   settings=tuple(sorted(small.items())), experts=tuple(map(quickly, job.experts)))


def rows_of(scale: str) -> dict:
    """Question → [(row, job)]; the quick scale has one photo and one seed."""
    found = {question: list(ask()) for question, ask in QUESTIONS.items()}
    if scale == "full":
        return found
    return {question: [(row, quickly(job)) for row, job in rows if job.photos[0] not in TEST[1:] + DEVELOPMENT[1:]
                       and job.seed != 1] for question, rows in found.items()}


# --------------------------------------------------------------------------------------- records and queries

def records_of(rows: list, committed: Optional[dict] = None) -> list[dict]:
    """Flat records, one a delivered picture. committed: key → records, trusted where the cache has no
    result.
    """
    found = []
    for row, job in rows:
        if job.key in (committed or {}) and not job.done():
            found += [record | {"row": row or record["rule"]} for record in committed[job.key]]
            continue
        chosen = {name: str(value) for name, value in job.settings if name != "rules"}
        shared = {"method": job.method, "task": job.task, "seed": job.seed, "size": job.size, "photo": "", "rule": ""}
        for record in job.result()["records"]:
            rule = record.get("rule", "")
            label = f"{row}: {rule}" if row and rule else row or rule
            found.append({"row": label} | shared | record | {"settings": chosen, "key": job.key})
    return found


class Number(NamedTuple):
    """A mean over photographs, its 95 % interval (photographs resampled), and on how many of them it is
    above 0.
    """
    mean: float
    low: float
    high: float
    n: int
    wins: int

    def __format__(self, spec: str) -> str:
        if spec == "k":
            return f"{self.wins} of {self.n}"
        mean, low, high = (f"{value:{spec or '.2f'}}" for value in self[:3])
        return f"{mean} [{low}, {high}]" if self.n > 1 else mean


class Query:
    """Asks the records: q("psnr", "final", row="pair", minus={"row": "dip"}, task=…) is a Number.

    A value is a field or an expression of fields; a condition is a value or a tuple of them. `minus` changes
    some conditions, and the same pictures and seeds are paired. Seeds are averaged first, then photographs
    resampled.
    """

    def __init__(self, records: dict[str, list]):
        self.records = records

    def select(self, question: str, **where) -> list[dict]:
        return [record for record in self.records[question] if all(
            record.get(name) in (value if isinstance(value, tuple) else (value,)) for name, value in where.items())]

    def values(self, value: str, question: str, where: dict) -> dict:
        """(photo, task, seed) → the value, of all records that have it."""
        found = {}
        for record in self.select(question, **where):
            try:
                number = float(eval(value, {"abs": abs, "__builtins__": {}}, record))
                found.setdefault((record["photo"], record["task"], record["seed"]), []).append(number)
            except NameError:
                continue
        return {at: float(np.mean(numbers)) for at, numbers in found.items()}

    def __call__(self, value: str, question: str, minus: Optional[dict] = None, **where) -> Number:
        found = self.values(value, question, where)
        if minus is not None:
            other = self.values(value, question, where | minus)
            found = {at: number - other[at] for at, number in found.items() if at in other}
        photos = {}
        for (photo, *_), number in found.items():
            photos.setdefault(photo, []).append(number)
        if not photos:
            raise KeyError(f"{question} has no {value} with {where} {minus or ''}")
        means = np.array([np.mean(numbers) for numbers in photos.values()])
        drawn = np.random.default_rng(0).choice(means, (2000, len(means))).mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Number(float(means.mean()), float(low), float(high), len(means), int((means > 0).sum()))

    def table(self, question: str, columns: dict, rows: tuple = (), **where) -> str:
        """Markdown, a line a row. A column: title → "psnr:.2f", or "psnr:.2f - dip", the paired difference
        to the row dip ("psnr:k - dip": on how many photographs it is above 0).
        """
        def cell(column: str, row: str) -> str:
            value, _, rest = column.partition(":")
            spec, _, other = rest.partition(" - ")
            try:
                return format(self(value, question, {"row": other} if other else None, **where, row=row), spec)
            except KeyError:
                return ""
        rows = rows or tuple(dict.fromkeys(record["row"] for record in self.select(question, **where)))
        lines = [["", *columns], ["---"] + ["---:"] * len(columns)]
        lines += [[row, *(cell(column, row) for column in columns.values())] for row in rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(template: str, q: Query, check: bool = True) -> str:
    """Fill the holes <<expression:format>> and check the claims <!-- claim: expression -->, Python over `q`.

    Raises Refusal for a hole or a claim that cannot be evaluated, and for a false claim.
    """
    known = {f.__name__: f for f in (abs, min, max, all, any, len, round)} | {"q": q, "__builtins__": {}}

    def evaluate(expression: str, spec: str, what: str):
        try:
            value = eval(f"({expression.strip()})", known)
            return format(value, spec) if what == "a hole" else value
        except Exception as error:
            raise Refusal(f"{what} in REPORT.in.md cannot be filled: {expression} ({error})")
    for claim in re.findall(r"<!-- claim: (.*?) -->", template, re.S):
        if not evaluate(claim, "", "a claim") and check:
            raise Refusal(f"a claim in REPORT.in.md is false: {claim}; change the sentence under it or the method")
    body = re.sub(r"<!-- claim: .*? -->\n?", "", template, flags=re.S)
    return re.sub(r"<<(.+?)(?::([.\w]*))?>>", lambda m: evaluate(m[1], m[2] or "", "a hole"), body, flags=re.S)


def read_records(out: Path, rows: dict) -> Query:
    """The records of out/*.json; refused where a file is missing, broken, or of other jobs than `rows`."""
    found = {}
    for question, asked in rows.items():
        path = out / f"{question}.json"
        try:
            found[question] = json.loads(path.read_text())["records"]
        except (OSError, ValueError, KeyError):
            raise Refusal(f"{path.name} is missing or broken: run `make all` to compute it")
        if {record["key"] for record in found[question]} != {job.key for _, job in asked}:
            raise Refusal(f"{path.name} was made by other code or settings: run `make all` to compute it anew")
    return Query(found)


# --------------------------------------------------------------------------------------------------- figures

def gallery(rows: list):
    """Pictures with titles: rows of (bytes (C, H, W), title)."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), squeeze=False, layout="constrained",
                                figsize=(2.2 * len(rows[0]), 2.6 * len(rows)))
    for ax, (image, title) in zip(axes.flat, itertools.chain(*rows)):
        ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(title, fontsize=9)
        ax.axis("off")
    return figure


def lines(panels: dict, xlabel: str, ylabel: str, **axis):
    """Panels side by side: title → {label: (x, y)}."""
    figure, axes = plt.subplots(1, len(panels), squeeze=False, layout="constrained", figsize=(4.4 * len(panels), 3.8))
    for ax, (title, curves) in zip(axes.flat, panels.items()):
        for label, (x, y) in curves.items():
            ax.plot(x, y, label=label)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, **axis)
        ax.legend(fontsize=8)
    return figure


def scored(job: Job, title: str, name: str = "") -> tuple:
    """A picture of a finished job, and its title with the score of what was delivered."""
    result = job.result()
    return result["images"][name][0], title + ("" if name else f"\n{result['records'][0]['psnr']:.2f} dB")


def plot_answer(rows: dict):
    columns = []
    for task, photo in zip(FIVE, itertools.cycle(TEST)):
        found = {row: job for row, job in rows["final"] if (job.task, job.photos, job.seed) == (task, (photo,), 0)}
        if found:
            chosen = ("dip", "diffusion", "weighted") if task in NOISY else ("dip", "warm-start", "refit")
            columns.append([scored(found["dip"], task, "measured"), *(scored(found[row], row) for row in chosen),
                            scored(found["dip"], photo, "truth")])
    return gallery(list(zip(*columns)))


def plot_cats(rows: dict):
    images = dict(rows["ddpm"])["η = 0, 50 steps"].result()["images"]
    return gallery([[(image, "") for image in line] for line in images[:48].split(12)])


def plot_curves(question: str, wanted: tuple, tasks: tuple, rows: dict):
    """The running average over the updates, the mean over photos, for each of the wanted rows and tasks."""
    panels = {}
    for task in tasks:
        found = {row: [job.result()["curve"][:, 0].cpu() for label, job in rows[question]
                       if (label, job.task, job.size) == (row, task, 96)] for row in wanted}
        panels[task] = {row: (range(1, 1 + len(curves[0])), torch.stack(curves).mean(0))
                        for row, curves in found.items() if curves}
    return lines(panels, "DIP updates", "PSNR of the running average, dB")


def plot_risk(rows: dict):
    panels = {}
    for job in [job for row, job in rows["stop"] if (row, job.task, job.seed) == ("pair", "noise 25", 0)]:
        result = job.result()
        estimated = -10 * result["risks"].cpu().clamp(min=1e-5).log10()
        panels[f"{job.photos[0]}: stopped at {result['records'][0]['step']}"] = {
            name: (range(1, 1 + len(y)), y) for name, y in (("truth", result["curve"][:, 0].cpu()),
                                                            ("estimated from the noisy photo alone", estimated))}
    return lines(panels, "updates of the pair", "PSNR, dB")


def plot_stages(rows: dict):
    result = dict(reversed(rows["stop"]))["four pairs"].result()
    found = {record["rule"] or "combined": f"{record['psnr']:.2f} dB" for record in result["records"]}
    pictures = [(result["images"]["measured"][0], "measured")]
    pictures += [(result["images"][name.replace("combined", "")][0], f"{name}: {psnr}") for name, psnr in found.items()]
    return gallery([pictures])


def plot_training(rows: dict):
    q, updates = Query({"train": records_of(rows["train"])}), [steps_of(model) for model in CATS]
    found = {way: [q("psnr", "train", row=f"from {way}, {n}").mean for n in updates] for way in ("noise", "interpolation", "DIP")}
    found = {f"started from {way}": (list(map(int, (n.split()[0] for n in updates))), y) for way, y in found.items()}
    return lines({"32 cats, large hole": found}, "training updates of the model", "PSNR, dB", xscale="log")


FIGURES = {"answer": plot_answer, "cats": plot_cats, "risk": plot_risk, "stages": plot_stages, "training": plot_training,
           "rise": functools.partial(plot_curves, "dip", ("dip",), NOISY + HIDDEN[:1]),
           "guide": functools.partial(plot_curves, "guide", ("regularised", "no model", "neither"), FIVE[:3])}


# ------------------------------------------------------------------------------------------------ the report

def out_of(scale: str) -> Path:
    return ROOT / ("out" if scale == "full" else f"out-{scale}")


def put(path: Path, text: str) -> None:
    """Write a text where it has changed."""
    if not path.exists() or path.read_text() != text:
        write(path, lambda temporary: temporary.write_text(text))


def make_all(scale: str = "full", jobs: int = os.cpu_count() or 1, reuse: bool = False) -> None:
    """Compute what is missing, then records, figures and report. reuse: trust committed records whose keys
    fit.
    """
    out, rows, committed = out_of(scale), rows_of(scale), {}
    for path in out.glob("*.json") if reuse else ():
        for record in json.loads(path.read_text())["records"]:
            committed.setdefault(record["key"], []).append(record)
    compute([job for asked in rows.values() for _, job in asked if job.key not in committed], jobs)
    machine = {"device": DEVICE.type, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
    for question, asked in rows.items():
        text = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records_of(asked, committed))
        put(out / f"{question}.json", f'{{"machine": {json.dumps(machine)}, "records": [\n{text}\n]}}\n')
    make_figures(scale)
    make_report(scale)


def make_figures(scale: str = "full") -> None:
    """Draw the figures whose jobs are in the cache."""
    rows = rows_of(scale)
    for name, draw in FIGURES.items():
        try:
            figure = draw(rows)
        except FileNotFoundError:
            print(f"{name}.png stays as it is: .cache does not have its jobs")
            continue
        write(out_of(scale) / f"{name}.png", lambda path: figure.savefig(path, dpi=100, metadata={"Software": None}))
        plt.close(figure)


def make_report(scale: str = "full") -> None:
    """Render REPORT.md and out/TABLES.md from the records in out/, without computing."""
    out = out_of(scale)
    q = read_records(out, rows_of(scale))
    text = render((ROOT / "REPORT.in.md").read_text(), q, check=scale == "full")
    put(*((ROOT / "REPORT.md", text) if scale == "full" else (out / "REPORT.md", text.replace("](out/", "]("))))
    columns = {title: f"{title}:{spec}" for title, spec in (("psnr", ".2f"), ("ssim", ".3f"), ("gap", ".3f"), ("last", ".2f"),
        ("seconds", ".1f"), ("updates", ".0f"), ("evaluations", ".0f"), ("diversity", ".4f"), ("fidelity", ".3f"), ("frechet", ".2f"), ("least", ".2f"))}
    parts = ["# Every row in full", "Means over photographs [95 % intervals, photographs resampled]; written by `make report`."]
    for question, ask in QUESTIONS.items():
        parts.append(f"## {question}: {ask.__doc__}")
        for task in dict.fromkeys(record["task"] for record in q.records[question]):
            parts += [f"### {task or 'pictures from noise'}", q.table(question, columns, task=task)]
    put(out / "TABLES.md", "\n\n".join(parts) + "\n")
    print("REPORT.md and TABLES.md rendered")


# -------------------------------------------------------------------------------------------- a user's photo

PIXELS = 4_000_000


def read_image(path: str) -> Tensor:
    """Any PNG, JPEG, WebP or TIFF as (1, 1 or 3, H, W) in [0, 1]; turned as its EXIF says, transparency over
    white.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
            pixels = torch.from_numpy(np.asarray(image).astype(np.float32))[None, None] / (1 if image.mode == "F" else 65535)
        else:
            if "A" in image.getbands() or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            pixels = to_tensor(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except FileNotFoundError:
        raise Refusal(f"there is no file {path}: check the name")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refusal(f"{path} cannot be read as an image ({error}): convert it to PNG or JPEG")
    if not (pixels.isfinite().all() and 0 <= pixels.min() and pixels.max() <= 1):
        raise Refusal(f"{path} has pixels that are not numbers in [0, 1]: convert it to an 8- or 16-bit image")
    if min(pixels.shape[-2:]) < 16 or pixels[0, 0].numel() > PIXELS:
        raise Refusal(f"{path} has {pixels.shape[-1]} × {pixels.shape[-2]} pixels: sides of at least 16 and at most "
                      f"{PIXELS:,} pixels in all can be restored; resize it")
    return pixels


def number(text: str, name: str, low: float, high: float) -> float:
    try:
        if low <= float(text) <= high:
            return float(text)
    except ValueError:
        pass
    raise Refusal(f"{name}={text} is not a number from {low:g} to {high:g}")


def users_problem(image: str, task: str, sigma: str, mask: str, factor: str) -> dip.Problem:
    """What the user measured."""
    if not image or task not in ("denoise", "inpaint", "superres"):
        raise Refusal(f"restore needs IMAGE=… and TASK=denoise, inpaint or superres, got IMAGE={image} TASK={task}")
    y = read_image(image).to(DEVICE)
    if task == "denoise":
        level = number(sigma, "SIGMA", 0.5, 255) / 255 if sigma else metrics.noise_level(y)
        print(f"noise: sigma {255 * level:.1f} of 255" + ("" if sigma else " (estimated)"))
        if level < 0.5 / 255:
            raise Refusal("no noise was found in this photo: give SIGMA=… (in 0…255) if there is some")
        return dip.Problem(y, dip.identity(), level)
    if task == "superres":
        k = int(number(factor or "2", "FACTOR", 2, 8))
        if y[0, 0].numel() * k * k > PIXELS:
            raise Refusal(f"the result would have more than {PIXELS:,} pixels: choose a smaller FACTOR or photo")
        return dip.Problem(y, dip.downsample(k))
    if not mask:
        raise Refusal("inpaint needs MASK=…, an image of the same size that is white where pixels are known")
    known = (read_image(mask).mean(1, keepdim=True) > 0.5).float().to(DEVICE)
    if known.shape[-2:] != y.shape[-2:]:
        raise Refusal(f"the mask has {known.shape[-1]} × {known.shape[-2]} pixels and the photo {y.shape[-1]} × "
                      f"{y.shape[-2]}: make them equal")
    if known.mean() in (0, 1):
        raise Refusal(f"the mask is all {'white: nothing is missing' if known.mean() else 'black: nothing is known'}; "
                      "it must be white where pixels are known and black where they are missing")
    return dip.Problem(y * known, dip.mask(known))


def users_target(out: str, default: Path) -> Path:
    target = Path(out) if out else default
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or not target.parent.is_dir():
        raise Refusal(f"cannot write {target}: OUT needs an existing folder and the ending .png, .jpg or .webp")
    return target


def users_model(images: str, steps: int) -> Job:
    """The photo model, or one of the user's own images."""
    if not images:
        return PHOTOS[-1]
    if not Path(images).is_dir() or not images_in(images):
        raise Refusal(f"{images} is not a folder with images (PNG, JPEG, WebP or TIFF): give IMAGES=folder")
    if not training_photos(images):
        raise Refusal(f"no image in {images} has sides of at least 64 pixels: add larger ones")
    stamp = sha([(path.name, path.stat().st_size) for path in images_in(images)])
    return chain(str(Path(images).resolve()), steps or 1250, stamp=stamp)[-1]


def train_on(images: str = "", out: str = "", train_steps: int = 0) -> None:
    """Train a photo model on a folder of images, keep it in the cache, and draw 16 samples."""
    target = users_target(out, Path("samples.png"))
    drawn = job("sample", "photos", model=users_model(images or "IMAGES", train_steps), n=16, steps=20)
    compute([drawn], 1)
    sheet = drawn.result()["images"].unflatten(0, (4, 4)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
    save_picture(sheet[None] / 255, target)
    print(f"{target} written; restore with METHOD=diffusion IMAGES={images}")


def restore(image: str = "", task: str = "", method: str = "dip", sigma: str = "", mask: str = "", factor: str = "",
            out: str = "", images: str = "", samples: str = "", steps: int = 0, train_steps: int = 0) -> None:
    """Restore a photo from a file by a method of METHODS; writes the result and a before/after picture
    beside it.
    """
    problem, began = users_problem(image, task, sigma, mask, factor), time.perf_counter()
    fitting = {name: known.about for name, known in METHODS.items() if known.noise in (None, problem.sigma > 0)}
    if method not in fitting:
        raise Refusal(f"METHOD={method} is not a method for TASK={task}: choose " + ", ".join(
            f"{name} ({about})" for name, about in fitting.items()))
    target, count = users_target(out, Path(image).with_name(f"{Path(image).stem}-restored.png")), number(samples or "1", "SAMPLES", 1, 64)
    problem = problem._replace(y=problem.y.repeat_interleave(int(count), 0))
    found = for_user(method, problem, {"steps": steps} if steps else {}, lambda: users_model(images, train_steps))
    if "expected" in found.facts:
        print(f"expected PSNR {-10 * math.log10(max(found.facts['expected'][0], 1e-6)):.1f} dB")
    mean, before = found.image.mean(0, keepdim=True), problem.operator.pinv(problem.y[:1])
    written = {"": mean, "-before-after": torch.cat([before, torch.ones_like(mean[..., :8]), mean], -1)}
    written |= {f"-{i + 1}": sample[None] for i, sample in enumerate(found.image) if count > 1}
    for ending, picture in written.items():
        save_picture(picture, target.with_name(f"{target.stem}{ending}{target.suffix}"))
    print(f"{target} written, with its comparison, {time.perf_counter() - began:.0f} s")


def for_user(method: str, problem: dip.Problem, settings: dict, model: Callable, start: int = 0) -> dip.Restoration:
    """What a method delivers, after the methods that it builds on, with progress bars; a model is trained if
    needed.
    """
    experts = [for_user(expert, problem, settings, model, **more) for expert, more in METHODS[method].experts]
    trained = model() if "model" in names(method) and METHODS[method].settings.get("evaluations", 1) else None
    if trained and not trained.done():
        print("no trained model yet: training it once, some minutes; it is kept in .cache")
        compute([trained], 1)
    settings = {name: value for name, value in settings.items() if name in names(method)}
    tools, _ = toolbox(problem, starting(problem, 0, start), trained, settings)
    bar = tqdm(perform(method, problem, tools | {"experts": experts}, settings), desc=method)
    for found in bar:
        facts = {name: value[0] if isinstance(value, list) else value for name, value in found.facts.items()}
        bar.set_postfix({name: f"{value:.4g}" for name, value in facts.items() if not isinstance(value, list)}, refresh=False)
    return found


def save_picture(x: Tensor, path: Path) -> None:
    pixels = to_bytes(x)[0].permute(1, 2, 0).numpy()
    write(path, Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save)


# ---------------------------------------------------------------------------------------------- command line

def bench() -> None:
    """Milliseconds a step and GFLOP/s on one thread, beside the same machine's matrix product."""
    from torch.utils.flop_counter import FlopCounterMode
    g, matrix, x = torch.Generator().manual_seed(0), torch.rand(1024, 1024), torch.rand(2, 1, 3, 512, 512)

    def hourglass(size, copies=1, **options):
        problem = dip.Problem(torch.rand(1, 3, size, size, device=DEVICE), dip.identity())
        return functools.partial(next, dip.fit(problem.y.expand(copies, -1, -1, -1), lambda image: image,
                                               *fresh(problem, g, copies, **options), 99, g))

    def training(data):
        widths, batch, lr = recipe(data)
        return functools.partial(next, ddpm.train(ddpm.UNet(3, widths).to(DEVICE), ddpm.cosine(), batch, ddpm.v_head, 99, g))
    original = {"widths": (128,) * 5, "upsample": "bilinear", "padding": "reflect"}
    work = {"matrix product 1024": lambda: matrix @ matrix, "U-Net training step, cats": training("cats"),
            "U-Net training step, photos": training("photos"), "SSIM 512×512 colour": lambda: metrics.ssim(*x),
            **{f"DIP update {size}×{size}, {n} as one": hourglass(size, n) for size, n in ((32, 1), (32, 16), (96, 1), (96, 2))},
            "DIP update 128×128, original network": hourglass(128, **original)}
    for name, step in work.items():
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        best = min(timeit.repeat(step, number=1, repeat=5))
        print(f"{name:40s} {1000 * best:8.1f} ms {counter.get_total_flops() / best / 1e9:8.1f} GFLOP/s")


def command_line() -> None:
    """A command for each of six functions, an option for each of their arguments."""
    commands = {"all": make_all, "report": make_report, "figures": make_figures, "bench": bench, "train": train_on,
                "restore": restore}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_subparsers(dest="command", required=True)
    for name, run in commands.items():
        command = chosen.add_parser(name, help=run.__doc__, description=run.__doc__)
        for option in inspect.signature(run).parameters.values():
            how = {"action": "store_true"} if option.default is False else {"type": type(option.default), "default": option.default}
            command.add_argument(f"--{option.name.replace('_', '-')}", **how)
    options = vars(parser.parse_args())
    # One thread: two programs of two threads each would wait for one another in busy loops.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        commands[options.pop("command")](**options)
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


if __name__ == "__main__":
    command_line()
