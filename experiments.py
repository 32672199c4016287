"""What is it worth? Everything impure: data, jobs, records, figures, report, command line. Read it last.

Read in order: data → tasks and tools → methods → jobs → work → sweeps → records and queries → figures →
lesson → report → a user's photo → command line.

picture → measured → a method of METHODS → Restorations → scored → records (out/*.json) → queries → REPORT.md
"""
import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections import UserList, deque, namedtuple
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional, Sequence

import matplotlib
import numpy as np
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from PIL import Image, ImageCms, ImageDraw, ImageOps
from skimage.restoration import inpaint_biharmonic
from torch import Tensor
from tqdm import tqdm

import ddpm
import dip
import hybrid
import metrics

ROOT = Path(__file__).resolve().parent
CACHE, OUT = ROOT / ".cache", {"full": ROOT / "out", "quick": ROOT / "out-quick"}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Refusal(Exception):
    """Something the user can mend; its text is the one sentence shown."""


def check(fine, why: str) -> None:
    if not fine:
        raise Refusal(why)


# ------------------------------------------------------------------------------------------------------ data

ONE = ("astronaut", "chelsea", "coffee", "rocket", "china", "luispedro")
TWO = ("kodim23", "monarch", "sail", "tulips", "barbara", "flower")
TEST, DEVELOPMENT = ONE + TWO, ("motorcycle_left", "hubble_deep_field", "grace_hopper", "camera")
# No photograph is restored by a model that has seen it: each model learns from the other group and these.
COMMON = ("coins", "brick", "grass", "gravel", "clock_motion", "moon", "retina")
# GROUPS[photo in ONE] names what the model learns from that restores the photo.
FIRST, GROUPS = ONE[:4], ("photos for group two", "photos for group one")
LEARNT = {"photos for group one": TWO + COMMON, "photos for group two": ONE + COMMON}
FOLDERS = {"skimage": "data", "matplotlib": "mpl-data/sample_data", "sklearn": "datasets/images",
           "sporco": "data", "mahotas": "demos/data"}
CAT_FACTORS = {"body": 15, "fur": 9, "eyes": 15, "mouth": 10, "accessory": 16}


def to_tensor(image: Image.Image) -> Tensor:
    """(1, C, H, W) in [0, 1]."""
    pixels = np.asarray(image, np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)[None].contiguous()


def photo(name: str) -> Image.Image:
    """A photograph out of an installed wheel; the packages themselves are not imported."""
    folders = (Path(importlib.util.find_spec(package).origin).parent / folder
               for package, folder in FOLDERS.items())
    return Image.open(next(path for folder in folders for path in folder.glob(f"{name}.*"))).convert("RGB")


@functools.cache
def square(name: str, size: int) -> Tensor:
    """(1, 3, size, size): the centred square of a photo, reduced."""
    image = photo(name)
    side = min(image.size)
    x, y = ((length - side) // 2 for length in image.size)
    return to_tensor(image.resize((size, size), Image.Resampling.BOX, (x, y, x + side, y + side)))


@functools.cache
def training_photos(data: str) -> Sequence[Tensor]:
    """What a photo model learns from, (3, H, W): photos of the wheels, or the images of a folder."""
    return [to_tensor(photo(name))[0] for name in LEARNT[data]] if data in LEARNT else users_photos(data)


@functools.cache
def cat_layers(size: int = 32) -> list[Tensor]:
    """Five tensors (options, 4, size, size) of premultiplied RGBA, one a factor (David Revoy, CC-BY 4.0)."""
    def load(path):
        rgba = np.asarray(Image.open(path).convert("RGBA"), np.float32) / 255
        rgba[..., :3] *= rgba[..., 3:]
        k = rgba.shape[0] // size
        return torch.from_numpy(rgba.reshape(size, k, size, k, 4).mean((1, 3)).transpose(2, 0, 1))
    # two of the ten fur files are the same picture; the second is left out
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


@functools.cache
def robots(n: int = 32, size: int = 32) -> Tensor:
    """(n, 3, size, size): robots of Zikri Kader (robohash, CC-BY 3.0), over white; no model knows them."""
    root, images = Path(importlib.util.find_spec("robohash").origin).parent / "sets" / "set1", []
    generator, colours = seeded("robots"), sorted(folder for folder in root.iterdir() if folder.is_dir())
    for k in range(n):
        image = Image.new("RGBA", (300, 300), "white")
        # the two digits behind "#" are the order in which the parts are laid over each other
        folders = sorted(colours[k % len(colours)].iterdir(), key=lambda folder: folder.name.split("#")[1])
        for files in (sorted(folder.glob("*.png")) for folder in folders):
            chosen = files[int(torch.randint(len(files), (1,), generator=generator))]
            image.alpha_composite(Image.open(chosen).convert("RGBA").resize(image.size))
        images.append(to_tensor(image.convert("RGB").resize((size, size), Image.Resampling.BOX)))
    return torch.cat(images)


def pictures(names: tuple, size: int) -> Tensor:
    """(B, 3, size, size), clean: photos by name, "robot 7", or cats (32 pixels) by number in a fixed row."""
    if isinstance(names[0], int):
        return render_cats(draw_cats(torch.Generator().manual_seed(9), 320, everything=True)[list(names)])
    found = [robots()[[int(name[6:])]] if name.startswith("robot") else square(name, size) for name in names]
    return torch.cat(found)


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
    """sigma in 0 … 255, camera(shape, generator) → operator, noise(clean, sigma, generator) → y."""
    sigma: float = 0.0
    camera: Callable = lambda shape, generator: dip.identity()
    noise: Callable = gaussian


TASKS = {"noise 15": Task(15), "noise 25": Task(25), "noise 50": Task(50),
         "Poisson noise": Task(25, noise=poisson), "hole": Task(camera=hole(1 / 4)),
         "noise 25, cut to [0, 1]": Task(25, noise=lambda *of: gaussian(*of).clamp(0, 1)),
         "large hole": Task(camera=hole(3 / 8)), "80 % missing": Task(camera=random_pixels),
         "×4": Task(camera=lambda shape, generator: dip.downsample(4))}


def seeded(*what) -> torch.Generator:
    """A generator of its own for every purpose, the same in every run."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def measured(clean: Tensor, task: str, *seed) -> dip.Problem:
    """What the camera of a task makes of clean pictures: one operator for all of them, noise for each."""
    camera, generator = TASKS[task], seeded(task, *seed)
    operator, sigma = camera.camera(clean.shape[-2:], generator), camera.sigma / 255
    noisy = camera.noise(clean.cpu(), sigma, generator).to(clean.device) if sigma else operator.A(clean)
    return dip.Problem(noisy, operator, sigma)


def starting(problem: dip.Problem, *seed) -> torch.Generator:
    """The random numbers of a method, seeded by the measurement: a file and a job give the same picture."""
    return seeded(hashlib.sha256(problem.y.cpu().numpy().tobytes()).hexdigest(), *seed)


def unseen_of(problem: dip.Problem) -> Tensor:
    """Tool: 1 for the measurements that blind experts do not see, the same for all of them."""
    return hybrid.kept_back(problem, starting(problem, "kept back"))


def fresh(problem: dip.Problem, generator: torch.Generator, copies: int = 1, **options) -> tuple:
    """Tool: new hourglasses, `copies` for each picture, run as one network; and their inputs."""
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


def interpolate(problem: dip.Problem) -> Tensor:
    """Tool: biharmonic interpolation of what is not known, then bicubic to the size of the picture."""
    unknown, filled = (problem.known == 0)[0, 0].cpu().numpy(), problem.y
    if unknown.any():
        images = [inpaint_biharmonic(image.permute(1, 2, 0).cpu().numpy(), unknown, channel_axis=-1)
                  for image in filled]
        filled = torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2).to(problem.y.device)
    if filled.shape[-2:] != problem.shape[-2:]:
        filled = nn.functional.interpolate(filled, size=problem.shape[-2:], mode="bicubic")
    return filled.clamp(0, 1)


def ridge_stage(y: Tensor, guide: Tensor, sigma: float, members: int, side: int = 5, reach: int = 18,
                step: int = 4) -> Tensor:
    """One stage of NL-Ridge on y (C, H, W): every patch becomes a combination of patches like it.

    Groups of `members` patches, similar in `guide`, within `reach` pixels of a patch in every `step`-th row
    and column. The combination Θ of least estimated risk: I − nσ²(YYᵀ)⁻¹ where y is its own guide, else
    XXᵀ(XXᵀ + nσ²I)⁻¹ with the guide's patches X; n values a patch.
    """
    rows, cols = (length - side + 1 for length in y.shape[1:])
    noisy, like = (nn.functional.unfold(image[None], side)[0].T.double() for image in (y, guide))
    (count, n), total = noisy.shape, torch.zeros_like(noisy)
    shares = torch.zeros(count, 1, dtype=torch.float64, device=y.device)
    centres = torch.tensor(sorted({*range(0, cols, step), cols - 1}), device=y.device)
    far = (centres[:, None] - torch.arange(cols, device=y.device)).abs() > reach
    for row in sorted({*range(0, rows, step), rows - 1}):
        low, high = max(0, row - reach), min(rows, row + reach + 1)
        near = torch.arange(low * cols, high * cols, device=y.device)
        distance = torch.cdist(like[row * cols + centres], like[near])
        distance[far.repeat(1, high - low)] = math.inf
        # among equals, the patch itself: so that every pixel is in a group
        distance[torch.arange(len(centres)), (row - low) * cols + centres] = -1
        group = near[distance.topk(min(members, (high - low) * (reach + 1)), largest=False).indices]
        Y, gram = noisy[group], like[group] @ like[group].mT
        noise = n * sigma ** 2 * torch.eye(gram.shape[-1], dtype=torch.float64, device=y.device)
        if guide is y:
            theta = torch.eye(len(noise), device=y.device) - noise @ torch.linalg.pinv(gram, hermitian=True)
        else:
            theta = torch.linalg.solve(gram + noise, gram).mT
        share = 1 / theta.square().sum(2, keepdim=True)
        total.index_add_(0, group.flatten(), (share * (theta @ Y)).flatten(0, 1))
        shares.index_add_(0, group.flatten(), share.flatten(0, 1))
    total, shares = (nn.functional.fold(x.T[None], y.shape[1:], side) for x in (total, shares.expand(-1, n)))
    return (total / shares)[0].float()


def nl_ridge(y: Tensor, sigma: float) -> Tensor:
    """NL-Ridge (Herbreteau & Kervrann 2022) of photos y (B, C, H, W), a method of the class of BM3D."""
    def denoise(image: Tensor) -> Tensor:
        return ridge_stage(image, ridge_stage(image, image, sigma, 18), sigma, 55)
    return torch.stack([denoise(image) for image in y])


def smoother(s: ddpm.Schedule) -> Callable:
    """Tool: NL-Ridge in the place of a model, (xt, t) → x̂₀, at the noise level of t."""
    def denoise(xt: Tensor, t: int) -> Tensor:
        image = ddpm.to_image(xt / s.alpha_bar[t].sqrt().item())
        return ddpm.to_diffusion(nl_ridge(image, ddpm.noise_level(s)[t].item()))
    return denoise


def perceptual(problem: dip.Problem, model: "Job", generator: torch.Generator) -> Callable:
    network, (s, _), _ = network_of(model)
    return hybrid.perceptual(problem, network, s)


def adversarial(problem: dip.Problem, model: "Job", generator: torch.Generator) -> Callable:
    torch.manual_seed(0)
    photos = training_photos("photos for group one")
    return hybrid.adversarial(problem, lambda: ddpm.windows(photos, generator, 1))


PENALTIES = {"perceptual": perceptual, "adversarial": adversarial}
# updates until a fit has long passed its peak
FITS = {"noise 15": 800, "noise 25": 500, "noise 50": 320}
RULES = {"discrepancy, τ = 0.92": lambda p: dip.Discrepancy(p.sigma),
         "discrepancy, τ = 1": lambda p: dip.Discrepancy(p.sigma, 1.0),
         "discrepancy, τ = 0.7": lambda p: dip.Discrepancy(p.sigma, 0.7),
         "ES-WMV, rescaled": lambda p: dip.WindowedVariance(80, 50),
         "ES-WMV, W 100, P 1000": lambda p: dip.WindowedVariance(),
         "ES-EMV, rescaled": lambda p: dip.MovingVariance(0.05, 50, 50),
         "ES-EMV, P 1000": lambda p: dip.MovingVariance(),
         "fixed budget": lambda p: dip.FixedBudget({15: 600, 25: 425, 50: 225}[round(255 * p.sigma)])}


# --------------------------------------------------------------------------------------------------- methods

def interpolation(problem: dip.Problem, interpolate: Callable) -> Iterator[dip.Restoration]:
    """The classical formula for what is missing: no network, no model."""
    yield dip.Restoration(problem.consistent(interpolate(problem)))


def ridge(problem: dip.Problem) -> Iterator[dip.Restoration]:
    """The classical formulas for noise."""
    yield dip.Restoration(nl_ridge(problem.y, problem.sigma))


def ridge_pair(problem: dip.Problem, generator: torch.Generator) -> Iterator[dip.Restoration]:
    """The classical formulas for noise on an antithetic pair, with their risk."""
    yield from hybrid.recorrupted(problem, generator, nl_ridge)


class Method(NamedTuple):
    """A function, a line about it, for noise only (True), never (False) or both, experts with settings."""
    run: Callable
    about: str
    noise: Optional[bool] = None
    experts: tuple = ()


STARTS = tuple(("dip", {"start": k} if k else {}) for k in range(3))
MISSING = (("interpolation", {}), ("two-dips", {}), ("diffusion", {}))
METHODS = {
    "interpolation": Method(interpolation, "a classical formula, biharmonic and bicubic", False),
    "ridge": Method(ridge, "a classical formula, NL-Ridge", True),
    "ridge-pair": Method(ridge_pair, "NL-Ridge on an antithetic pair", True),
    "dip": Method(dip.deep_image_prior, "a deep image prior on all measurements"),
    "two-dips": Method(hybrid.averaged, "the mean of two", experts=STARTS[:2]),
    "three-dips": Method(hybrid.averaged, "the mean of three", experts=STARTS),
    "held-out": Method(hybrid.held_out, "DIP, stopped by measurements kept back: needs no SIGMA"),
    "sure": Method(hybrid.one_sided_sure, "DIP, stopped by Stein's estimate", True),
    "pair": Method(hybrid.antithetic_pair, "an antithetic pair of DIPs, stopped by its risk estimate", True),
    "diffusion": Method(hybrid.diffusion, "the diffusion model alone"),
    "diffusion-pair": Method(hybrid.diffusion_pair, "the diffusion model on an antithetic pair", True),
    "weighted": Method(hybrid.weighted, "DIP, diffusion and NL-Ridge, weighted by estimated risks", True,
                       experts=(("pair", {}), ("diffusion-pair", {}), ("ridge-pair", {}))),
    "stacked": Method(hybrid.stacked, "interpolation, DIP and diffusion, weighted by measurements kept back",
                      False, experts=MISSING + tuple((name, {"blind": True}) for name, _ in MISSING)),
    "refit": Method(hybrid.refit, "the reverse chain with DIP refits", False),
    "regularised": Method(hybrid.regularised, "DIP with the diffusion model in its loss", True),
}


def names(method: str, settings: bool = False) -> set:
    """The tools that a method takes, its positional arguments; or its settings, by keyword only."""
    known = inspect.signature(METHODS[method].run).parameters.values() if method in METHODS else ()
    return {each.name for each in known if settings == (each.kind == each.KEYWORD_ONLY)}


def perform(method: str, problem: dip.Problem, tools: dict, settings: dict) -> Iterator[dip.Restoration]:
    """Run a method; of the tools it gets those that it names."""
    wanted = {name: tool for name, tool in tools.items() if name in names(method)}
    return METHODS[method].run(problem, **wanted, **settings)


def toolbox(problem: dip.Problem, generator: torch.Generator, model: Optional["Job"], settings: dict
            ) -> tuple[dict, list]:
    """The tools of a method (their settings leave `settings`), and a list of the evaluations of the model."""
    tools = {"generator": generator, "interpolate": interpolate, "unseen": unseen_of, "model": None}
    tools["fresh"], evaluations = functools.partial(fresh, **dict(settings.pop("network", ()))), []
    prior, shift, grey = settings.pop("prior", None), settings.pop("shift", 0), problem.shape[1] == 1
    if "rules" in settings:
        settings["rules"] = {name: RULES[name] for name in settings["rules"]}
    if "penalty" in settings:
        settings["penalty"] = PENALTIES[settings["penalty"]](problem, model, generator)
    if model is not None:
        loaded = model_of(model)
        denoise = smoother(loaded.schedule) if prior == "ridge" else loaded.denoise
        denoise = ddpm.shifted(denoise, shift) if shift else denoise

        def counted(xt: Tensor, t: int) -> Tensor:
            # chains and views of one picture count, too
            evaluations.extend([t] * (len(xt) // len(problem.y)))
            # A grey picture is three equal ones to the model.
            return denoise(xt.expand(-1, 3, -1, -1), t).mean(1, keepdim=True) if grey else denoise(xt, t)
        tools["model"] = loaded._replace(denoise=counted)
    return tools, evaluations


# -------------------------------------------------------------------------------------- jobs and their cache

# A job hashes its own entries of these tables; a user's folder is no part of the experiments.
NOT_FOLLOWED = {"METHODS", "WORK", "PENALTIES", "TASKS", "RULES", "Job", "Refusal", "users_photos"}


@functools.cache
def definitions() -> dict:
    """(module, name) → syntax tree of every top-level definition in our five files; no docstrings, types.

    The entries of a table have names of their own, such as TASKS[hole]."""
    found = {}
    for module in ("metrics", "ddpm", "dip", "hybrid", "experiments"):
        for node in ast.parse((ROOT / f"{module}.py").read_bytes()).body:
            for part in ast.walk(node):
                if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part) is not None:
                    part.body = part.body[1:]
                part.__dict__.update(annotation=None, returns=None)
            stored = [part.id for target in getattr(node, "targets", []) for part in ast.walk(target)
                      if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
            found |= {(module, name): node for name in stored or [getattr(node, "name", "")]}
            if stored and isinstance(table := getattr(node, "value", None), ast.Dict):
                found |= {(module, f"{stored[0]}[{getattr(key, 'value', '')}]"): value
                          for key, value in zip(table.keys, table.values)}
    return found


@functools.cache
def fingerprint(name: str, module: str = "experiments") -> str:
    """A hash of a definition's syntax tree and of those of all our definitions that it leads to."""
    todo, seen = [(module, name)], {}
    while todo:
        here = todo.pop()
        if here in seen or here not in definitions() or here[1] in NOT_FOLLOWED:
            continue
        node = definitions()[here]
        # Python 3.12 has one field more, 3.13 leaves out what is empty: one text for all of them
        whole = {"show_empty": True} if sys.version_info >= (3, 13) else {}
        seen[here], parts = ast.dump(node, **whole).replace(", type_params=[]", ""), list(ast.walk(node))
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
    """One cached computation: a method on pictures, or a piece of WORK such as training.

    experts: jobs whose results it uses: finished restorations; the training that it continues; for samples,
    real cats and, if they are to be judged, restored ones."""
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
        method, chosen = METHODS.get(self.method), dict(self.settings)
        work = [restoration, method.run] if method else [WORK[self.method]]
        code = [fingerprint(f.__name__, f.__module__.replace("__main__", "experiments")) for f in work]
        code += [fingerprint(f"TASKS[{self.task}]"), fingerprint(f"PENALTIES[{chosen.get('penalty')}]")]
        code += [fingerprint(f"RULES[{rule}]") for rule in chosen.get("rules", ())]
        own = replace(self, model=None, experts=())
        return sha((own, [need.key for need in self.needs], code))

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
        result = torch.load(self.path, weights_only=True, map_location=DEVICE)
        if "trainer" in result:
            result["trainer"]["generator"] = result["trainer"]["generator"].cpu()
        return result

    @property
    def cost(self) -> float:
        """A guess in core-seconds, for the order of work and the time left."""
        fits = self.method in WORK or "fresh" in names(self.method)
        a_step = {"train": 4.7, "sample": 15, "pair": 2.3, "sure": 1.8, "regularised": 1.7, "diffusion": 0.7
                  }.get(self.method, fits)
        area = (self.size / 96) ** 2 * len(self.photos)
        return 1 + 0.022 * a_step * area * dict(self.settings).get("steps", 300)


def best_form(method: str, task: str, size: int) -> dict:
    """Settings that were best on development pictures, where they are not those of the methods."""
    cats, noisy = size == 32, task in NOISY
    if method == "dip" and noisy and cats:
        return {"rules": ("discrepancy, τ = 0.7",)}
    if method in ("diffusion", "diffusion-pair") and cats:
        # cats never hang upside down; ΠGDM does more for them than DDNM
        return {"views": False, "evaluations": 1} if noisy else {"gradient": True}
    # scattered pixels of photographs are interpolated well, so that the chain may start late
    return {"t": 200} if method == "diffusion" and task == "80 % missing" else {}


def job(method: str, photo="", task: str = "", *, seed: int = 0, size: int = 96, model: Optional[Job] = None,
        experts: Optional[tuple] = None, **settings) -> Job:
    """A Job: photo one name or several, dictionaries frozen, a method's own experts called in.

    model="own": the photo model that has not seen the photo."""
    def frozen(value):
        return tuple(sorted((k, frozen(v)) for k, v in value.items())) if isinstance(value, dict) else value
    # Fits to noisy test photos are watched to their end, so that every question shares them.
    if method in ("dip", "pair") and task in FITS and photo in FIRST and size == 96 and not settings:
        settings = {"watch": True, "steps": round(FITS[task] * (1.16 if method == "pair" else 1))}
        settings |= {"rules": tuple(RULES)} if method == "dip" else {}
    settings = best_form(method, task, size) | settings
    if experts is None:
        called = METHODS[method].experts if method in METHODS else ()
        blind = {"blind": True} if settings.get("blind") else {}
        experts = tuple(job(name, photo, task, seed=seed, size=size, model=model, **more | blind)
                        for name, more in called)
    used = method not in METHODS or "model" in names(method) or "penalty" in settings
    photos = photo if isinstance(photo, tuple) else (photo,)
    model = PHOTOS[GROUPS[photos[0] in ONE]][-1] if model == "own" else model
    return Job(method, photos, task, seed, size, model if used else None, experts, frozen(settings))


def write(path: Path, content) -> None:
    """A text, or what content(path) saves, by way of a temporary file: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        content(temporary) if callable(content) else temporary.write_text(content, "utf-8")
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
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def missing(jobs, found: Optional[dict] = None) -> dict:
    """What the cache lacks of `jobs` and of what they need, each once, needs first."""
    found = {} if found is None else found
    for job in jobs:
        if job not in found and not job.done():
            missing(job.needs, found)
            found[job] = None
    return found


def compute(jobs, processes: int) -> None:
    """Make what is missing: a job starts as soon as what it needs is there, the costliest first."""
    todo, running = missing(jobs), {}
    waiting = sorted(todo, key=lambda job: -job.cost)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker)
    seen, shape = 1 if sys.stderr.isatty() else 60, "{l_bar}{bar} {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=sum(job.cost for job in todo), mininterval=seen, bar_format=shape, disable=not todo)
    try:
        while waiting or running:
            ready = (job for job in waiting if not any(need in todo for need in job.needs))
            for job in list(itertools.islice(ready, processes - len(running))):
                waiting.remove(job)
                running[pool.submit(make, job)] = job
            now = [f"{job.method} {job.photos[0]} {job.task}" for job in running.values()]
            bar.set_postfix_str(f"{len(todo)} jobs left: {' | '.join(now)}", refresh=seen == 1)
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED)[0]:
                future.result()
                bar.update(running[future].cost)
                del todo[running.pop(future)]
    except (KeyboardInterrupt, BrokenExecutor) as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else "a worker process was killed"
        raise Refusal(f"{why}: every finished job is kept, run the same command again to go on")
    finally:
        bar.close()
        for process in list((pool._processes or {}).values()) if running else ():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


# -------------------------------------------------------------- work: training, sampling, restoring, scoring

def recipe(data: str, pictures: int = 0) -> tuple[tuple, Callable, float]:
    """Widths of the U-Net, batches and learning rate for "cats", photos, or a folder of images.

    pictures: how many cats there are to learn from (0: no end of them)."""
    if data == "cats":
        few = draw_cats(seeded("few", pictures), pictures) if pictures else None

        def batch(generator: torch.Generator) -> Tensor:
            parts = draw_cats(generator, 16) if few is None else few[torch.randint(
                pictures, (16,), generator=generator)]
            return render_cats(parts)
        return (32, 64, 96, 128), batch, 2e-3
    # windows of 48 pixels learn no more from an update and take half as long again; those of 32 learn less
    return (32, 64, 96), functools.partial(ddpm.windows, training_photos(data), size=40), 3e-3


def parts_of(chosen: dict) -> tuple[ddpm.Schedule, ddpm.Head]:
    """The schedule and the head of a training job."""
    schedules = {"linear": ddpm.linear, "cosine": ddpm.cosine, "sigmoid": ddpm.sigmoid}
    heads = {"v": ddpm.v_head, "ε": ddpm.eps_head}
    return schedules[chosen.get("schedule", "cosine")](1000), heads[chosen.get("head", "v")]


def network_of(job: Job, ema: bool = True) -> tuple[ddpm.UNet, tuple, dict]:
    """The network of a training job, averaged or last weights; its schedule and head; the result."""
    result = job.result()
    network = ddpm.UNet(3, result["widths"])
    network.load_state_dict(result["trainer"]["ema" if ema else "net"])
    network = network.to(DEVICE, memory_format=torch.channels_last).eval().requires_grad_(False)
    return network, parts_of(dict(job.settings)), result


def model_of(job: Job, ema: bool = True) -> ddpm.Model:
    network, (s, head), result = network_of(job, ema)
    return ddpm.Model(ddpm.denoiser(network, s, head), s, result["v"])


def train(job: Job) -> dict:
    """A diffusion model after `steps` updates, going on from the job before; v(t) measured at the end."""
    chosen = dict(job.settings)
    widths, batch, lr = recipe(job.photos[0], chosen.get("pictures", 0))
    before = job.experts[0].result() if job.experts else {"trainer": None, "seconds": 0.0}
    torch.manual_seed(job.seed)
    network, (s, head) = ddpm.UNet(3, widths).to(DEVICE, memory_format=torch.channels_last), parts_of(chosen)
    generator, began, losses = seeded("train", *job.photos, job.seed), time.perf_counter(), []
    place = ddpm.logit_normal(*chosen["place"]) if "place" in chosen else ddpm.evenly
    for state in ddpm.train(network, s, batch, head, chosen["steps"], generator, lr=lr, place=place,
                            t_max=chosen.get("t_max"), resume=before["trainer"]):
        losses.append(state.loss)
        check(any(map(math.isfinite, losses[-20:])),
              f"training on {job.photos[0]} diverged at update {state.step}: its loss is not a number")
    seconds = before["seconds"] + time.perf_counter() - began
    checkpoint, x0 = state.checkpoint(), torch.cat([batch(generator) for _ in range(4)]).to(DEVICE)
    ts = [1, 10, 20, 40, 70, *range(100, s.T + 1, 100)]
    v = ddpm.error_curve(ddpm.denoiser(state.ema, s, head), s, x0, ts, generator)
    record = {"steps": state.step, "seconds": seconds, "loss": float(np.mean(losses[-50:])),
              "parameters": sum(p.numel() for p in network.parameters())}
    return {"trainer": checkpoint, "v": v, "widths": widths, "seconds": seconds, "records": [record]}


def nearest_parts(images: Tensor) -> Tensor:
    """(n, 5): a cat near to each image, found by changing one factor at a time until nothing improves."""
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
    """What a known distribution lets us measure of cats (n, 3, 32, 32): entropies (1 = uniform), the rate of
    pairs that training never had (1 = as it should), the distance to the nearest cat (fidelity).
    """
    parts = torch.cat([nearest_parts(some) for some in images.split(64)])
    found = {name: metrics.entropy(parts[:, i], k) for i, (name, k) in enumerate(CAT_FACTORS.items())}
    fair = never_trained(torch.cartesian_prod(*map(torch.arange, CAT_FACTORS.values()))).float().mean()
    distance = (images - render_cats(parts)).square().mean((1, 2, 3)).sqrt().mean()
    unseen = (never_trained(parts).float().mean() / fair).item()
    return found | {"least": min(found.values()), "unseen": unseen, "fidelity": distance.item()}


def sample(job: Job) -> dict:
    """n pictures from a model by DDIM, or n real cats, or what the second expert restored; judged against the
    real cats of the first."""
    chosen = {"steps": 50, "ema": True, "eta": 0.0} | dict(job.settings)
    generator, began, real = seeded(job.seed), time.perf_counter(), job.model is None
    side = 32 if real or job.model.photos == ("cats",) else 64
    if job.experts[1:]:
        images = job.experts[1].result()["image"].clamp(0, 1).cpu()
    elif real:
        images = render_cats(draw_cats(generator, chosen["n"], everything=True))
    else:
        (denoise, s, _), found = model_of(job.model, chosen["ema"]), []
        while sum(map(len, found)) < chosen["n"]:
            x = torch.randn(min(64, chosen["n"]), 3, side, side, generator=generator).to(DEVICE)
            *_, last = ddpm.ddim(denoise, s, x, chosen["steps"], generator, chosen["eta"])
            found.append(ddpm.to_image(last.x).clamp(0, 1).cpu())
        images = torch.cat(found)[:chosen["n"]]
    seconds = (time.perf_counter() - began) / len(images)
    record = {"n": len(images), "seconds": seconds, "evaluations": 0 if real else chosen["steps"]}
    record |= examine(images) if side == 32 else {}
    features = nn.functional.avg_pool2d(images, 4).flatten(1)
    if job.experts:
        record["frechet"] = metrics.frechet(features, job.experts[0].result()["features"].cpu())
    return {"records": [record], "features": features, "images": to_bytes(images[:64])}


def restoration(job: Job) -> dict:
    """Damage pictures, restore them by a method, score: here a truth meets an estimate (and in `frames`).

    Settings that no method sees: start (other random numbers), leak, belief (a factor of the σ that is told;
    0: it is estimated), blind.
    """
    settings, truth = dict(job.settings), pictures(job.photos, job.size).to(DEVICE)
    start, leak, belief, blind = (settings.pop(name, default) for name, default in (
        ("start", 0), ("leak", False), ("belief", 1.0), ("blind", False)))
    problem = measured(truth, job.task, *job.photos, job.seed if TASKS[job.task].sigma else 0)
    if leak:
        # LEAK: the method gets the truth in the place of the measurement.
        problem = problem._replace(y=truth)
    problem = problem._replace(sigma=belief * problem.sigma if belief else metrics.noise_level(problem.y))
    problem = problem.without(unseen_of(problem)) if blind else problem
    curve, risks, clock = [], [], [0.0]
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
    offers, curve, records = {"": found} | found.others, torch.stack(curve), []
    for rule, offer in offers.items():
        for b, name in enumerate(job.photos):
            record = score(offer, truth, b, curve) | {"photo": str(name), "rule": rule}
            ended = min(record.get("stopped", len(curve)), len(curve))
            record |= {"seconds": clock[ended] / len(job.photos), "evaluations": len(evaluations)}
            for spent in ("seconds", "updates", "evaluations"):
                record[spent] = record.get(spent, 0) + sum(each["records"][b][spent] for each in results)
            mixed = tools["experts"][:len(record.get("weights", []))]
            record |= law([expert.image[b] for expert in mixed], truth[b]) if mixed and not rule else {}
            records.append(record)
    images = {rule: offer.image for rule, offer in offers.items()}
    images |= {"measured": problem.operator.pinv(problem.y), "truth": truth}
    return {"records": records, "image": found.image, "facts": found.facts, "curve": curve,
            "risks": torch.tensor(risks), "images": {name: to_bytes(image) for name, image in images.items()}}


def decibels(error: float) -> float:
    return -10 * math.log10(max(error, 1e-12))


def law(images: list, truth: Tensor) -> dict:
    """*Oracle*: what the law of combination says, from true errors and distances. ρ: of the first two."""
    images = [image.clamp(0, 1) for image in images]
    errors = [(image - truth).square().mean().item() for image in images]
    C = hybrid.moments(images, errors)
    _, least = hybrid.least_on_simplex(C)
    rho = (C[0, 1] / (C[0, 0] * C[1, 1]).sqrt()).item()
    return {"law": decibels(least), "best_expert": decibels(min(errors)), "rho": rho}


def score(offer: dip.Restoration, truth: Tensor, b: int, curve: Tensor) -> dict:
    """What is known of picture b of an offer."""
    image, clean = offer.image[b:b + 1].clamp(0, 1), truth[b:b + 1]
    found = {name: value[b] if isinstance(value, list) else value for name, value in offer.facts.items()}
    found |= {"psnr": metrics.psnr(image, clean).item(), "ssim": metrics.ssim(image, clean).item()}
    if found.get("expected", 0) > 0:
        found["expected"] = decibels(found["expected"])
    if offer.target is not None:
        target = offer.target[b:b + 1].clamp(0, 1)
        found["target_psnr"] = metrics.psnr(image, target).item()
        found["target_ssim"] = metrics.ssim(image, target).item()
    elif "stopped" in found:
        mine = curve[:, b]
        found |= {"peak": mine.max().item(), "peak_step": int(mine.argmax()) + 1, "last": mine[-1].item()}
        found["gap"] = found["peak"] - mine[found["step"] - 1].item()
    return found


def to_bytes(x: Tensor) -> Tensor:
    return (x.detach().cpu().clamp(0, 1) * 255).round().byte()


def frames(job: Job) -> dict:
    """A film: the reverse chain from y, the fit of a DIP pair, and that averaged with the experts; scored."""
    experts = [dip.Restoration(each["image"], each["facts"]) for each in map(Job.result, job.experts)]
    (denoise, s, _), clean = model_of(job.model), pictures(job.photos, job.size).to(DEVICE)
    problem, count = measured(clean, job.task, *job.photos, 0), 30
    t = ddpm.step_of(s, problem.sigma)
    x = s.alpha_bar[t].sqrt().item() * ddpm.to_diffusion(problem.y)
    chain = [ddpm.to_image(sample.x / s.alpha_bar[sample.t].sqrt().item()) for sample in ddpm.ddim(
        denoise, s, x, count, torch.Generator(), t_start=t)]
    tools, _ = toolbox(problem, starting(problem), None, {})
    fit, found = list(perform("pair", problem, tools, {"patience": 60})), []
    for k in range(1, count + 1):
        now = fit[k * len(fit) // count - 1]
        pair = dip.Restoration(now.now, {"risk": now.facts["risk_now"]})
        *_, both = hybrid.weighted(problem, [pair, *experts])
        shown = {"reverse chain": chain[k * len(chain) // count - 1], "DIP pair": now.now,
                 "combination": both.image}
        tiles = torch.cat(list(shown.values()), -1).repeat_interleave(2, 2).repeat_interleave(2, 3)
        pixels = to_bytes(nn.functional.pad(tiles, (0, 0, 0, 16), value=1))[0].permute(1, 2, 0)
        frame = Image.fromarray(pixels.numpy())
        for j, (label, image) in enumerate(shown.items()):
            text = f"{label}: {metrics.psnr(image.clamp(0, 1), clean).item():.1f} dB"
            ImageDraw.Draw(frame).text((192 * j + 4, 194), text, "black")
        found.append(torch.from_numpy(np.array(frame)))
    return {"records": [], "images": torch.stack(found)}


WORK = {"train": train, "sample": sample, "film": frames}


# ------------------------------------------------------------------------------------ sweeps, one a question
# A sweep yields (row, job): a name for tables and queries, "row" or "row @ cell", and what is computed.

NOISY, HIDDEN = ("noise 15", "noise 25", "noise 50"), ("hole", "80 % missing", "×4")
FIVE = ("noise 25", "noise 50", "hole", "80 % missing", "×4")
SMALL, FOUR = {"task": "noise 25", "size": 48}, (2.0, 1.0, 0.5, 0.25)
SLOW = {"antithetic": False, "warm": True}
# cats by number; those from 256 on are for development
FLOCK, CROWD = tuple(range(32)), tuple(range(128))


def over(**axes) -> list[dict]:
    """Every combination: over(a=(1, 2), b=(3,)) → [{a: 1, b: 3}, {a: 2, b: 3}]."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def changes(method: str, table: dict, photos: tuple = FIRST, **at) -> Iterator:
    """A row for every entry of a table of changed settings, on each of the photos (or groups of photos)."""
    for photo, (row, change) in itertools.product(photos, table.items()):
        yield row, job(method, **{"photo": photo} | at | change)


def chain(data: str, steps: int, **settings) -> tuple:
    """Training as a chain of jobs: a sixteenth, an eighth, a quarter, a half and the whole of the steps."""
    found: tuple = ()
    for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1):
        found += (job("train", data, experts=found[-1:], steps=round(share * steps), **settings),)
    return found


def steps_of(model: Job) -> str:
    return f"{dict(model.settings)['steps']} updates"


PLACE = (-0.1, 1.1)
PHOTOS, CATS = {data: chain(data, 5000) for data in LEARNT}, chain("cats", 2600, place=PLACE)


def ask_ddpm():
    """Does the model generate, and at what cost?"""
    real = (job("sample", "cats", seed=2, n=2048),)
    yield "real cats", job("sample", "cats", experts=real, seed=1, n=256)
    draw = functools.partial(job, "sample", "cats", experts=real, n=256, steps=20)
    yield from ((f"η = 0, {steps} steps", draw(model=CATS[-1], steps=steps)) for steps in (5, 10, 20, 50))
    yield "η = 1, 50 steps", draw(model=CATS[-1], steps=50, eta=1.0)
    yield from ((f"after {steps_of(model)}", draw(model=model)) for model in CATS)
    yield "last weights", draw(model=CATS[-1], ema=False)
    for schedule, head in (("cosine", "v"), ("linear", "v"), ("sigmoid", "v"), ("cosine", "ε")):
        model = job("train", "cats", steps=160, place=PLACE, schedule=schedule, head=head)
        yield f"{schedule}, {head}", draw(model=model)
    yield "cosine, v, all steps alike", draw(model=job("train", "cats", steps=160))
    for data in (CATS, *PHOTOS.values()):
        yield f"training on {data[-1].photos[0]}", data[-1]
    for at in over(photo=DEVELOPMENT, model=PHOTOS[GROUPS[0]]):
        yield f"development, after {steps_of(at['model'])}", job("diffusion", task="noise 25", **at)
    for at in over(photo=FIRST, evaluations=(1, 4)):
        yield f"{at['evaluations']} evaluations", job("diffusion", task="noise 25", model="own", **at)


NETWORKS = {"width 16": {"network": {"widths": (16,) * 4}}, "3 scales": {"network": {"widths": (32,) * 3}},
            "no skips": {"network": {"skip": 0}},
            "bilinear": {"steps": 1000, "network": {"upsample": "bilinear", "padding": "reflect"}}}


def ask_dip():
    """What does the prior know, and when does it overfit?"""
    yield from (("dip", job("dip", **at)) for at in over(photo=FIRST, task=NOISY + HIDDEN))
    table = {"as chosen": {}, "no jitter": {"jitter": 0.0}}
    yield from changes("dip", table | NETWORKS, **SMALL, steps=500, watch=True)


STAGES = {
    "as chosen": {}, **{f"S = {ratio:g} σ": {"ratios": (ratio,)} for ratio in (0.02, 0.1, 1.0, 2.0)},
    "four pairs": {"ratios": FOUR}, "one network": {"antithetic": False},
    "four warm stages, heavy to light": {"ratios": FOUR, **SLOW},
    "four warm stages, light to heavy": {"ratios": FOUR[::-1], **SLOW},
    "four warm stages, linear schedule": {"ratios": hybrid.equal_steps(ddpm.linear(4000), 25 / 255), **SLOW},
    "four warm stages, cosine schedule": {"ratios": hybrid.equal_steps(ddpm.cosine(4000), 25 / 255), **SLOW},
    **NETWORKS,
    **{f"σ believed × {belief}": {"belief": belief} for belief in (0.7, 1.3)}, "σ estimated": {"belief": 0.0},
    "noise cut to [0, 1]": {"task": "noise 25, cut to [0, 1]"}, "Poisson noise": {"task": "Poisson noise"},
    "perceptual term": {"penalty": "perceptual", "model": "own"},
    "adversarial term": {"penalty": "adversarial"}, "LEAK: stages of the clean image": {
        "leak": True, "steps": 120, "patience": 10 ** 6, "ratios": FOUR, **SLOW}}


def ask_stop():
    """Can noise stages tell DIP when to stop?"""
    for at in over(photo=FIRST, task=NOISY):
        yield "", job("dip", **at)
        yield "pair", job("pair", **at)
        if at["task"] != "noise 15":
            yield "two plain fits averaged", job("two-dips", **at)
            yield "held-out pixels", job("held-out", **at, steps=FITS[at["task"]], watch=True)
            yield "Monte-Carlo SURE", job("sure", **at, steps=FITS[at["task"]], watch=True)
    yield from changes("pair", STAGES, **SMALL, steps=320, watch=True)
    table = {f"Monte-Carlo SURE, {row}": STAGES[row] for row in ("as chosen", *NETWORKS)}
    yield from changes("sure", table, **SMALL, steps=500, watch=True)


HARD, FAR = {"gradient": False}, {"t": 1000, "evaluations": 20}
WAYS = {"diffusion": {}, "DDNM": HARD, "ΠGDM": {"gradient": True}, "one sample": {"samples": 1},
        "DDNM, from noise": HARD | FAR, "DDNM, from noise, η = 0": HARD | FAR | {"eta": 0.0},
        "ΠGDM, from noise": FAR | {"gradient": True},
        **{f"{k} steps": {"evaluations": k} for k in (2, 5)},
        **{f"from t₀ = {t}": {"t": t} for t in (200, 400, 800)}}
SHORT = {f"ΠGDM, from noise, {k} steps": FAR | {"evaluations": k, "gradient": True} for k in (2, 5, 10)}
BRIEF = {**{f"start from DIP, {k} steps": {"evaluations": k} for k in (2, 5)},
         "start from DIP, leaning on it": {"lean": True}, "DIP thrown in at t = T": HARD | FAR | {"eta": 0.0}}
REFITS = {"refit": {}, "refit of width 16": NETWORKS["width 16"]}


def ask_enter():
    """How many reverse steps does a DIP prior save, at what quality and diversity?"""
    places = over(photo=FIRST, task=("hole",), size=(96,), model=("own",))
    for at in places + over(photo=(FLOCK[:20],), task=("80 % missing",), size=(32,), model=(CATS[-1],)):
        # the cheap pictures have more rows
        ways, kinds, lengths = WAYS, ("as chosen",), (25, 100)
        if at["size"] == 32:
            ways, kinds, lengths = WAYS | SHORT, ("as chosen", "width 16", "no skips"), (25, 100, 400)
        yield from ((row, job("diffusion", **at, **more)) for row, more in ways.items())
        for kind, updates in itertools.product(kinds, lengths):
            brief = (job("dip", **at, steps=updates, **NETWORKS.get(kind, {})),)
            name = f"DIP of {updates} updates" + f", {kind}" * (kind in NETWORKS)
            yield name, brief[0]
            yield f"start from {name}", job("diffusion", **at, experts=brief)
            if name == "DIP of 100 updates":
                for row, more in BRIEF.items():
                    yield row, job("diffusion", **at, experts=brief, **more)
        yield from ((row, each) for row, each in arms(**at) if row in ("classical", "DIP", "combination"))
        yield from ((row, job("refit", **at, **more)) for row, more in REFITS.items())


def arms(shift=0, **at) -> Iterator:
    """The rows of every comparison: baselines, ensembles, controls, the combination; experts are shared."""
    more = {"shift": shift} if shift else {}
    dips = [job("dip", **at, **start) for _, start in STARTS]
    yield from (("DIP", one) for one in dips[:2])
    yield from (("two DIPs", job("two-dips", **at, experts=(one, dips[1]))) for one in dips[::2])
    yield "three DIPs", job("three-dips", **at)
    alone = job("diffusion", **at, **more)
    yield "diffusion", alone
    if at["task"] in NOISY:
        how, prior, formula, blind = "weighted", job("pair", **at), job("ridge-pair", **at), {}
        model = job("diffusion-pair", **at, **more)
        yield "classical", job("ridge", **at)
        yield "DIP pair", prior
    else:
        how, prior, formula, model = "stacked", job("two-dips", **at), job("interpolation", **at), alone
        blind = {formula: job("interpolation", **at, blind=True), prior: job("two-dips", **at, blind=True),
                 model: job("diffusion", **at, blind=True, **more)}
        yield "classical", formula

    def combine(*experts):
        return job(how, **at, experts=experts + tuple(blind[expert] for expert in experts if blind))
    if blind:
        # a chain can start from any finished picture: from its own mean, or from that of the combination
        for row, start in (("restarted", model), ("from the combination", combine(prior, model, formula))):
            yield row, job("diffusion", **at, **more, experts=(start,))
    yield "combination", combine(prior, model, formula)
    yield "DIP and diffusion", combine(prior, model)
    yield "without diffusion", combine(prior, formula)
    yield "without DIP", combine(model, formula)


def ask_train():
    """How much training does a DIP prior save?"""
    at = {"photo": FLOCK[:20], "task": "large hole", "size": 32}
    crowd = {"photo": CROWD, "task": "80 % missing", "size": 32}
    brief, wide = (job("dip", **at, steps=100),), (job("dip", **crowd, steps=100),)
    real = job("sample", "cats", seed=2, n=2048)
    yield "brief DIP", brief[0]
    models = {steps_of(model): model for model in CATS}
    models |= {f"{n} pictures": chain("cats", 1300, place=PLACE, pictures=n)[-1] for n in (64, 1024)}
    for (name, model), way in itertools.product(models.items(), ("noise", "interpolation", "DIP")):
        more, less = ({"experts": start} if way == "DIP" else FAR if way == "noise" else {}
                      for start in (brief, wide))
        yield f"from {way} @ {name}", job("diffusion", model=model, **at, **more)
        if way != "interpolation":
            drawn = job("diffusion", model=model, **crowd, **less, samples=1)
            yield f"samples from {way} @ {name}", job("sample", "cats", experts=(real, drawn))
    for name, model in models.items():
        rows = arms(photo=FLOCK, task="noise 25", size=32, model=model)
        yield from ((f"{row} @ {name}", each) for row, each in rows
                    if row in ("diffusion", "combination", "without DIP"))
    for t_max in (1000, 250):
        for model in chain("cats", 200, t_max=t_max)[1::3]:
            row = f"t ≤ {t_max} learnt @ from t₀ = 250, {steps_of(model)}"
            yield row, job("diffusion", model=model, experts=brief, t=250, **at)


REGULARISED = {
    "as chosen": {}, "constraint, no model": {"weight": 0.0}, "model, no constraint": {"floor": 0.0},
    "model, no constraint, λ = 10": {"weight": 10.0, "floor": 0.0},
    "neither: plain DIP": {"weight": 0.0, "floor": 0.0},
    "plain DIP, same averaging": {"weight": 0.0, "constrain": False}}
OTHERS = {
    "as chosen": {}, **{f"λ = {weight:g}": {"weight": weight} for weight in (0.0, 0.1, 1.0, 10.0)},
    "NL-Ridge, no model": {"prior": "ridge"}, "cats' model": {"model": CATS[-1]},
    **{f"σ believed × {belief}": {"belief": belief} for belief in (0.7, 1.3)}}


def ask_guide():
    """Does a learned prior make early stopping unnecessary?"""
    yield from (("regularised", job("regularised", photo, "noise 25", model="own")) for photo in FIRST)
    at = {"photos": (FIRST,), "model": "own", "task": "noise 25", "size": 32}
    yield from changes("regularised", REGULARISED, **at, steps=4000)
    table = {f"{row}, 600 updates": change for row, change in OTHERS.items()}
    yield from changes("regularised", table, **at, steps=600)


def ask_final():
    """Which method for which task, on photographs?"""
    for at in over(photo=TEST, task=FIVE):
        rows = list(arms(model="own", **at))
        yield from rows
        # a method of your own comes in by itself; those left out have questions of their own
        known = {each.method for _, each in rows} | {"held-out", "sure", "refit", "regularised"}
        yield from ((name, job(name, model="own", **at)) for name, method in METHODS.items()
                    if name not in known and method.noise in (None, at["task"] in NOISY))


# The cells that carry a claim, chosen on development cats
NAMED = tuple(f"noise {sigma}, hue {hue}, all" for sigma in (25, 50) for hue in (60, 180)) + (
    "noise 25, hue 180, 1/8",)
SHIFTS = {"hue 0": 0, "hue 30": 30, "hue 60": 60, "hue 180": 180, "upside down": "flip"}


def cells(flock: tuple) -> dict:
    """Name → the settings of its arms: task × shift of the model × share of its training; other domains."""
    found = {}
    for task, shift, k in itertools.product(FIVE, SHIFTS, (1, 4)):
        # holes and ×4 cost most: three cells have to do
        if task in NOISY + HIDDEN[1:2] or k == 4 and shift in ("hue 0", "hue 180", "upside down"):
            found[f"{task}, {shift}, {('1/8', 'all')[k // 4]}"] = {
                "photo": flock if task in NOISY else flock[:20], "task": task, "shift": SHIFTS[shift],
                "model": CATS[k]}
    for task in ("noise 25", "80 % missing"):
        at = {"task": task, "model": CATS[-1]}
        found[f"{task}, robots, all"] = at | {"photo": tuple(f"robot {k}" for k in range(20))}
        found[f"{task}, photographs, all"] = at | {"photo": TEST}
    return found


def ask_ladder():
    """Can the gain of a combination be predicted? The cats' model, shifted step by step."""
    # second chains cost as much as all the rest: not in every cell
    only = {"restarted": "all", "from the combination": "hue 0, all"}
    for name, at in cells(FLOCK).items():
        yield from ((f"{row} @ {name}", each) for row, each in arms(size=32, **at)
                    if name.endswith(only.get(row, "")))


QUESTIONS = {"ddpm": ask_ddpm, "dip": ask_dip, "stop": ask_stop, "enter": ask_enter, "train": ask_train,
             "guide": ask_guide, "final": ask_final, "ladder": ask_ladder}
QUICK = {"steps": 12, "brief": 4, "updates": 1, "evaluations": 2, "n": 64, "samples": 2}


def quickly(job: Job) -> Job:
    """The same job on a tiny budget; its numbers mean nothing."""
    given, takes = dict(job.settings), names(job.method, settings=True) & set(QUICK)
    small = {name: min(value, QUICK[name]) if name in QUICK else value for name, value in given.items()}
    small = {name: QUICK[name] for name in takes} | small
    if job.method == "train":
        small["steps"] = math.isqrt(given["steps"])
    return replace(job, photos=job.photos[:4], model=job.model and quickly(job.model),
                   settings=tuple(sorted(small.items())), experts=tuple(map(quickly, job.experts)))


def rows_of(scale: str) -> dict:
    """Question → [(row, job)]; the quick scale has one photo of each group."""
    check(scale in OUT, f"scale={scale} is not a scale: choose {' or '.join(OUT)}")
    found = {question: list(ask()) for question, ask in QUESTIONS.items()}
    if scale == "full":
        return found
    left_out = ONE[1:] + TWO[1:] + DEVELOPMENT[1:]
    return {question: [(row, quickly(job)) for row, job in rows if job.photos[0] not in left_out]
            for question, rows in found.items()}


# --------------------------------------------------------------------------------------- records and queries

def records_of(rows: list, committed: Optional[dict] = None) -> list[dict]:
    """Flat records. committed: key → records, trusted where the cache has no result."""
    found = []
    for row, job in rows:
        row, _, cell = row.partition(" @ ")
        shared = {name: getattr(job, name) for name in ("method", "task", "seed", "size")} | {"photo": ""}
        shared["settings"] = {name: str(value) for name, value in job.settings if name != "rules"}
        trusted = None if job.done() else (committed or {}).get(job.key)
        for record in trusted or job.result()["records"]:
            # the delivered rule has the name ""; in a row without a name it is the first of RULES
            label = ": ".join(filter(None, [row, record.get("rule")])) or next(iter(RULES))
            found.append({"row": label} | shared | record | {"row": label, "cell": cell, "key": job.key})
    return found


class Number(namedtuple("Number", "mean low high n wins values photos")):
    """A mean over photographs, 95 % interval (photographs resampled); wins: values above 0."""

    @property
    def p(self) -> float:
        """Two-sided p under random signs of the values: all up to sixteen values, else 2¹⁶ drawn ones."""
        drawn, rng = self.n > 16, np.random.default_rng(0)
        signs = rng.choice((1, -1), (2 ** 16, self.n)) if drawn else (
            np.array(list(itertools.product((1, -1), repeat=self.n))))
        as_far = abs(signs @ self.values) >= abs(sum(self.values)) - 1e-12
        return float((as_far.sum() + drawn) / (len(signs) + drawn))

    def __format__(self, spec: str) -> str:
        """A number's format, with the interval or (m.2f) without; k: how often above 0; n; p."""
        if spec in ("k", "n", "p"):
            return {"k": f"{self.wins} of {self.n}", "n": str(self.n), "p": f"{self.p:.2g}"}[spec]
        mean, low, high = (f"{value:{spec.lstrip('m') or '.2f'}}" for value in self[:3])
        return mean if self.n == 1 or spec.startswith("m") else f"{mean} [{low}, {high}]"


def holm(found: dict) -> dict:
    """Name → p corrected for the number of names (Holm 1979)."""
    corrected, least = {}, 0.0
    for k, name in enumerate(sorted(found, key=found.get)):
        corrected[name] = least = max(least, min(1.0, (len(found) - k) * found[name]))
    return corrected


RIVALS = ("classical", "DIP", "two DIPs", "three DIPs", "DIP pair", "diffusion", "restarted")
# averages of two experts, one of them left out: they say what each is worth to the combination
CONTROLS = ("without diffusion", "without DIP")


class Query:
    """q("psnr", "final", row="DIP pair", minus={"row": "DIP"}, task=…) is a Number.

    A value is a field or an expression of fields; a condition is a value or a tuple of them. `minus` changes
    conditions, the same pictures and seeds are paired. Seeds are averaged first, then photographs resampled.
    """

    def __init__(self, records: dict[str, list]):
        self.records, self.cells = records, {}
        for question, found in records.items():
            for record in found:
                self.cells.setdefault((question, record.get("cell")), []).append(record)

    def select(self, question: str, **where) -> list[dict]:
        wanted = {name: value if isinstance(value, tuple) else (value,) for name, value in where.items()}
        found = self.cells.get((question, where["cell"]), []) if "cell" in where else self.records[question]
        return [record for record in found if all(
            record.get(name) in values for name, values in wanted.items())]

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
        if minus:
            other = self.values(value, question, where | minus)
            found = {at: number - other[at] for at, number in found.items() if at in other}
        if not found:
            raise KeyError(f"{question} has no {value} with {where} {minus or ''}")
        photos = sorted({at[0] for at in found})
        means = np.array([np.mean([found[at] for at in found if at[0] == photo]) for photo in photos])
        drawn = np.random.default_rng(0).choice(means, (2000, len(means))).mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Number(float(means.mean()), float(low), float(high), len(means), int((means > 0).sum()),
                      tuple(means.tolist()), tuple(photos))

    def rival(self, question: str, rows: tuple = RIVALS + CONTROLS, **where) -> str:
        """The best other row: the one of the best mean of those that do not combine DIP with diffusion."""
        present = {record["row"] for record in self.select(question, **where)} & set(rows)
        # where there is none, "" asks for a record that is not there
        return max(sorted(present) or [""], key=lambda row: self("psnr", question, row=row, **where).mean)

    def gain(self, question: str, rows: tuple = RIVALS + CONTROLS, **where) -> Number:
        """The combination less the best other row."""
        other = {"row": self.rival(question, rows, **where)}
        return self("psnr", question, row="combination", minus=other, **where)

    def table(self, question: str, columns: dict, rows: Iterable = (), lines: Optional[dict] = None,
              **where) -> str:
        """A line for each of `rows`, or for every name → conditions of `lines`; no record, an empty cell.

        Columns: "psnr:.2f"; less the row dip "psnr:.2f - dip"; of the row dip "psnr:m.2f of dip"; "gain:k",
        "rival:" against all other rows, with "gain alone:k" and "rival alone:" against RIVALS.
        """
        def cell(column: str, at: dict) -> str:
            value, spec, sign, row = re.fullmatch(r"(.*?):(\S*)(?: (-|of) (.*))?", column).groups()
            others = RIVALS if value.endswith("alone") else RIVALS + CONTROLS
            with contextlib.suppress(KeyError):
                if value.startswith("rival"):
                    return self.rival(question, others, **at)
                if value.startswith("gain"):
                    return format(self.gain(question, others, **at), spec)
                at = at | ({"row": row} if sign == "of" else {})
                return format(self(value, question, {"row": row} if sign == "-" else None, **at), spec)
            return ""
        rows = rows or dict.fromkeys(record["row"] for record in self.select(question, **where))
        drawn = [["", *columns]]
        drawn += [[name, *(cell(column, where | at) for column in columns.values())]
                  for name, at in (lines or {row: {"row": row} for row in rows}).items()]
        head, *body = ["| " + " | ".join(line) + " |" for line in drawn]
        return "\n".join([head, "|---" + "|---:" * len(columns) + "|", *body])


@functools.cache
def laws(q: Query) -> dict:
    """Cell → gain over the better of DIP and diffusion, predicted, measured; ρ; diffusion − DIP; q.gain."""
    found = {}
    for cell in dict.fromkeys(record["cell"] for record in q.records["ladder"]):
        rows = {record["row"] for record in q.select("ladder", cell=cell)}
        dips, model, both, law, rho = (q(value, "ladder", cell=cell, row=row).mean for value, row in (
            ("psnr", "DIP pair" if "DIP pair" in rows else "two DIPs"), ("psnr", "diffusion"),
            ("psnr", "DIP and diffusion"), ("law", "DIP and diffusion"), ("rho", "DIP and diffusion")))
        better = max(dips, model)
        found[cell] = law - better, both - better, rho, model - dips, q.gain("ladder", cell=cell).mean
    return found


def render(template: str, q: Query, check_claims: bool = True) -> str:
    """Fill the holes <<expression:format>>, check the claims <!-- claim: … -->; Refusal where one fails."""
    known: dict = {f.__name__: f for f in (abs, min, max, all, any, len, sum, laws, holm)}
    known |= {"q": q, "CELLS": tuple(cells(FLOCK)), "NAMED": NAMED, "FIVE": FIVE, "ONE": ONE, "TWO": TWO}
    known |= {"RIVALS": RIVALS, "interp": np.interp, "__builtins__": {}}

    def evaluate(expression: str, finish: Callable):
        try:
            return finish(eval(f"({expression.strip()})", known))
        except Exception as error:
            raise Refusal(f"REPORT.in.md asks for something that is not there: {expression} ({error})")
    for claim in re.findall(r"<!-- claim: (.*?) -->", template, re.S):
        check(evaluate(claim, bool) or not check_claims,
              f"a claim in REPORT.in.md is false: {claim}; change its sentence or the method")
    body = re.sub(r"<!-- claim: .*? -->\n?", "", template, flags=re.S)
    return re.sub(r"<<(.+?)(?::([.\w]*))?>>", lambda hole: evaluate(
        hole[1], lambda value: format(value, hole[2] or "")), body, flags=re.S)


def read_records(scale: str) -> Query:
    """The records of out/*.json; refused where a file is missing, broken, or of other jobs."""
    found = {}
    for question, asked in rows_of(scale).items():
        try:
            found[question] = json.loads((OUT[scale] / f"{question}.json").read_text("utf-8"))["records"]
        except (OSError, ValueError, KeyError):
            raise Refusal(f"{question}.json is missing or broken: run `make all` to compute it")
        check({record["key"] for record in found[question]} == {job.key for _, job in asked},
              f"{question}.json is of other code or settings: run `make all` to compute it anew")
    return Query(found)


# --------------------------------------------------------------------------------------------------- figures
# draw(rows, q): the jobs, for pictures and curves, and a Query. 9 inches are a page: 8 points are 10 pixels.

matplotlib.rcParams.update({
    "font.size": 8, "axes.titlesize": 9, "figure.constrained_layout.use": True, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1.2})
# colours that colour-blind readers can tell (Okabe & Ito 2008)
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"


def show(ax, image: Tensor) -> None:
    """A picture (C, H, W) of bytes."""
    ax.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[], frame_on=False)


def curve_of(job: Job) -> Tensor:
    """PSNR after each update, the mean over the job's pictures."""
    return job.result()["curve"].mean(1).cpu()


def median_photo(q: Query, task: str) -> str:
    """The photograph whose gain over the best other row is the median one."""
    gain = q.gain("final", task=task)
    return sorted(zip(gain.values, gain.photos))[(gain.n - 1) // 2][1]


def plot_answer(rows: dict, q: Query) -> Figure:
    """The middle of the median photograph of each task; below, the score and what it is behind."""
    shown, figure = ("classical", "DIP", "diffusion", "combination"), Figure((9, 8.6))
    axes = figure.subplots(len(FIVE), 6)
    for line, task in zip(axes, FIVE):
        photo = median_photo(q, task)
        # of two starts of DIP, the first
        found = {row: each.result() for row, each in reversed(rows["final"])
                 if each.task == task and each.photos == (photo,) and row in shown}
        images = found["DIP"]["images"] | {row: found[row]["images"][""] for row in shown}
        scores = {row: found[row]["records"][0]["psnr"] for row in shown}
        for ax, row in zip(line, ("measured", *shown, "truth")):
            quarter = images[row].shape[-1] // 4
            show(ax, images[row][0, :, quarter:-quarter, quarter:-quarter])
            if task == FIVE[0]:
                ax.set_title(row)
            if row in shown:
                best = scores[row] == max(scores.values())
                ax.set_xlabel(f"{scores[row]:.2f} dB ({scores[row] - scores['combination']:+.2f})",
                              fontweight="bold" if best else "normal")
        line[0].set_ylabel(f"{task}\n{photo}")
    return figure


def plot_axis(rows: dict, q: Query) -> Figure:
    """A drawing: the noise levels of the process, where a noisy photo sits, and where each method enters."""
    figure = Figure((9, 3.6))
    ax = figure.subplots()
    ax.axis("off")
    ax.set(xlim=(-1.6, 10.3), ylim=(-2.4, 2.5))
    ax.annotate("", (10.3, 0), (-0.5, 0), arrowprops={"arrowstyle": "->", "lw": 1.5})
    marks = {0: "x\nclean, t = 0", 3.2: "y = x + n\nnoise σ", 4.4: "y ± Sξ\n√(σ² + S²)",
             7.2: "start step t₀", 9.7: "t = T\npure noise"}
    for place, text in marks.items():
        ax.plot(place, 0, "o", color="black")
        ax.text(place, -0.2, text, ha="center", va="top")
    for start, height, colour, text in (
            (3.2, 0.4, BLUE, "diffusion alone: the model at y's own step, D(y)"),
            (4.4, 1.1, ORANGE, "A. DIP pair, fitted to y ± Sξ, stopped by its unbiased risk"),
            (9.7, 1.8, GREY, "DDPM: the reverse chain from pure noise"),
            (7.2, -1.5, GREEN, "B. an interpolation or a DIP, noised to t₀; the chain goes on from there"),
            (3.2, -2.2, RED, "C. DIP, fitted to y, with D(y) in its loss")):
        ax.plot((start, start), (0, height), ":", color=colour)
        ax.annotate("", (0, height), (start, height), arrowprops={"arrowstyle": "->", "color": colour})
        ax.text(0.2, height + 0.1, text, color=colour, fontsize=9)
    ax.text(-1.6, 0.75, "risk-\nweighted\naverage", va="center", fontsize=9)
    for height, colour in ((0.4, BLUE), (1.1, ORANGE)):
        ax.annotate("", (-0.7, 0.75), (-0.05, height), arrowprops={"arrowstyle": "->", "color": colour})
    return figure


def plot_baselines(rows: dict, q: Query) -> Figure:
    """Above, samples of the cats' model. Below, DIP's rise and fall: a line and its peak a photograph."""
    figure = Figure((9, 4.6))
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.6))
    samples = dict(rows["ddpm"])["η = 0, 50 steps"].result()["images"][:48]
    lines = [torch.cat(list(line), 2) for line in samples.split(16)]
    show(figure.add_subplot(grid[0, :]), torch.cat(lines, 1))
    for k, task in enumerate(NOISY + HIDDEN[:1]):
        ax = figure.add_subplot(grid[1, k], title=task, xlabel="updates", ylabel="" if k else "PSNR, dB")
        fits = [each for _, each in rows["dip"] if (each.task, each.size) == (task, 96)]
        for j, (each, colour) in enumerate(zip(fits, (BLUE, ORANGE, GREEN, RED))):
            curve = curve_of(each)
            ax.plot(range(1, 1 + len(curve)), curve, color=colour)
            ax.plot(curve.argmax() + 1, curve.max(), "o", ms=4, color=colour)
            ax.text(0.95, 0.05 + 0.08 * j, "" if k else each.photos[0], color=colour, ha="right",
                    transform=ax.transAxes)
    return figure


def plot_stop(rows: dict, q: Query) -> Figure:
    """The pair's estimate along one fit; what every rule loses; constraint × model along a long fit."""
    figure, at = Figure((9, 3.4)), {"task": "noise 25", "size": 96}
    meter, gaps, long = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.6))
    pairs = [each for row, each in rows["stop"] if row == "pair" and each.task == "noise 25"]
    middle = sorted(pairs, key=lambda each: each.result()["records"][0]["gap"])[(len(pairs) - 1) // 2]
    record = middle.result()["records"][0]
    estimate = middle.result()["risks"][:record["stopped"]].clamp(min=1e-5)
    for text, curve, colour, y in (("truth", curve_of(middle), GREY, 0.25),
                                   ("estimate", -10 * estimate.log10().cpu(), ORANGE, 0.15)):
        meter.plot(range(1, 1 + len(curve)), curve, color=colour)
        meter.text(0.5, y, text, color=colour, transform=meter.transAxes)
    meter.axvline(record["step"], color="black", lw=0.8)
    meter.set(title=f"{middle.photos[0]}: update {record['step']} is kept", xlabel="updates",
              ylabel="PSNR of the pair, dB")
    found = {record["row"]: q("gap", "stop", row=record["row"], **at) for record in q.select("stop", **at)
             if "gap" in record}
    rules = sorted(found, key=lambda rule: -found[rule].mean)
    for y, rule in enumerate(rules):
        gaps.plot(found[rule].values, [y] * found[rule].n, ".", color=ORANGE if rule == "pair" else GREY)
        gaps.plot(found[rule].mean, y, "|", color="black", ms=10)
    gaps.set_yticks(range(len(rules)), rules)
    gaps.set_title("lost to the fit's best update, dB")
    ends = {row: curve_of(each) for row, each in rows["guide"] if row in REGULARISED}
    height = 0.0
    for row, colour in zip(sorted(ends, key=lambda row: ends[row][-1]), (
            "black", GREY, GREEN, "#CC79A7", BLUE, RED)):
        long.plot(range(1, 1 + len(ends[row])), ends[row], color=colour)
        height = max(height + 0.6, ends[row][-1].item())
        long.text(1.03 * len(ends[row]), height, row, color=colour, va="center")
    steps = len(ends[row])
    long.set(title="C: mean PSNR of four photographs, dB", xlabel="updates", xlim=(0, 2 * steps),
             ylim=(ends[row][-1] - 9, ends[row][-1] + 1), xticks=(0, steps // 2, steps))
    return figure


def plot_law(rows: dict, q: Query) -> Figure:
    """Left: the predicted gain against the measured one. Right: where the combination of all three pays."""
    figure = Figure((9, 4.2))
    left, right = figure.subplots(1, 2)
    for name, (predicted, measured, rho, ahead, gain) in laws(q).items():
        style = {"c": [rho], "vmin": 0.2, "vmax": 1, "s": 26, "marker": "^o"[name.startswith("noise")]}
        left.scatter(predicted, measured, **style)
        drawn = right.scatter(ahead, gain, **style)
        if name in ("noise 25, hue 180, all", "80 % missing, robots, all", "hole, hue 180, all"):
            right.annotate(name, (ahead, gain), (-90 if name[0] == "h" else 5, -10),
                           textcoords="offset points")
    left.axline((0, 0), slope=1, color="grey", lw=0.8)
    left.text(0.03, 0.92, "circles: with noise\ntriangles: without", transform=left.transAxes)
    right.axhline(0, color="grey", lw=0.8)
    left.set(xlabel="an oracle's gain over the better of DIP and diffusion, dB",
             ylabel="gain without truth, dB")
    right.set(xlabel="diffusion − DIP, dB", ylabel="combination − best other row, dB")
    figure.colorbar(drawn, ax=right, label="ρ of the two errors")
    return figure


# Title → question, value, the row that the others are compared with, conditions.
EFFECTS = {
    "Deep image prior, its peak": ("dip", "peak", "as chosen", {"size": 48}),
    "A. Antithetic pair": ("stop", "psnr", "as chosen", {
        "size": 48, "rule": "", "task": "noise 25", "method": "pair"}),
    "C. Diffusion in DIP's loss": ("guide", "psnr", "as chosen, 600 updates", {
        "size": 32, "row": tuple(f"{row}, 600 updates" for row in OTHERS)}),
    "B. Reverse chain in a hole, less diffusion": ("enter", "psnr", "diffusion", {"size": 96}),
    "Rows less the combination, σ = 25": ("final", "psnr", "combination", {"task": "noise 25", "rule": ""})}


def plot_forest(rows: dict, q: Query) -> Figure:
    """Every ablation: a dot a photograph, the mean, its interval; symmetric logarithmic scale."""
    figure = Figure((9, 8.2))
    for ax, titles in zip(figure.subplots(1, 2), (tuple(EFFECTS)[:3], tuple(EFFECTS)[3:])):
        labels = []
        for title in titles:
            question, value, base, where = EFFECTS[title]
            labels.append(title)
            for row in dict.fromkeys(record["row"] for record in q.select(question, **where)):
                found, y = q(value, question, minus={"row": base}, **where | {"row": row}), len(labels)
                # a row that is the base under another name says nothing
                if any(found.values):
                    labels.append(row.removesuffix(", 600 updates"))
                    ax.plot(found.values, [y] * found.n, ".", color=GREY, ms=4)
                    ax.plot((found.low, found.high), (y, y), color=BLUE, lw=2)
                    ax.plot(found.mean, y, "o", color=BLUE, ms=4)
        ax.axvline(0, color="black", lw=0.8)
        ax.set_xscale("symlog", linthresh=0.5)
        ax.set_xticks((-8, -4, -2, -1, 0, 1, 2), (-8, -4, -2, -1, 0, 1, 2))
        ax.set_yticks(range(len(labels)), labels)
        ax.set(ylim=(len(labels), -1), xlabel="dB")
        for text in ax.get_yticklabels():
            text.set_fontweight("bold" if text.get_text() in titles else "normal")
    return figure


def film(rows: dict, q: Query) -> list[Image.Image]:
    """The film of the median photograph at σ = 25: computed once, like every job."""
    at = "noise 25", (median_photo(q, "noise 25"),)
    done = tuple(each for row, each in rows["final"] if row in ("diffusion-pair", "ridge-pair")
                 and (each.task, each.photos) == at)
    shot = Job("film", at[1], at[0], model=next(each.model for each in done if each.model), experts=done)
    if not shot.done():
        make(shot)
    return [Image.fromarray(frame.numpy()).quantize(96) for frame in shot.result()["images"].cpu()]


FIGURES = {"answer": plot_answer, "axis": plot_axis, "baselines": plot_baselines, "stop": plot_stop,
           "law": plot_law, "forest": plot_forest, "film": film}


# ---------------------------------------------------------------------------------------------- the lesson

# Two dimensions: three clouds on a triangle, stored as pictures of two channels and one pixel.
CENTRES, SPREAD = torch.tensor([[0.5, 0.9], [0.15, 0.25], [0.85, 0.25]]), 0.04


def clouds(generator: torch.Generator, n: int = 256) -> Tensor:
    """(n, 2, 1, 1) in [0, 1]: draws from the mixture of three Gaussians of equal weight."""
    which = torch.randint(3, (n,), generator=generator)
    return (CENTRES[which] + SPREAD * torch.randn(n, 2, generator=generator))[..., None, None]


def exact_denoiser(s: ddpm.Schedule) -> Callable[[Tensor, int], Tensor]:
    """E[x0 | xt] for the mixture, (n, 2, 1, 1) in [−1, 1]: every cloud's own mean, by its posterior share."""
    centres, spread = ddpm.to_diffusion(CENTRES), 2 * SPREAD

    def denoise(xt: Tensor, t: int) -> Tensor:
        a, x = s.alpha_bar[t].item(), xt.flatten(1)
        off = x[:, None] - math.sqrt(a) * centres
        variance = a * spread ** 2 + 1 - a
        share = torch.softmax(-off.square().sum(2) / (2 * variance), 1)
        means = centres + math.sqrt(a) * spread ** 2 / variance * off
        return (share[..., None] * means).sum(1)[..., None, None]
    return denoise


class Perceptron(nn.Module):
    """(xt, t) → v for the mixture: two hidden layers."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, 2))

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([xt.flatten(1), ddpm.time_features(t, 32)], 1))[..., None, None]


def linear_dip(d: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """A signal x (d,), the eigenvalues and the eigenvectors of K = Φ Φᵀ, Φ random bumps of many widths.

    A gradient step in the weights of f = Φ θ moves f by K (y − f): section 1.3 of the report, exactly.
    """
    place, generator = torch.linspace(0, 1, d, dtype=torch.float64), seeded("features")
    centre, width = (torch.rand(600, generator=generator, dtype=torch.float64) for _ in range(2))
    features = torch.exp(-((place[:, None] - centre) / (0.005 * 60 ** width)) ** 2 / 2)
    values, vectors = torch.linalg.eigh(features @ features.T)
    x = 0.5 + 0.3 * torch.sin(6 * place) * (place > 0.4) + 0.15 * (place > 0.7)
    return x, values / values.max(), vectors


def rise_and_fall(x: Tensor, values: Tensor, vectors: Tensor, sigma: float, updates: list[int]) -> tuple:
    """Closed form after so many updates: bias² and variance of the mean squared error of the fit."""
    left = (1 - values) ** torch.tensor(updates)[:, None]
    bias = (left * (vectors.T @ x)).square().mean(1)
    return bias, sigma ** 2 * (1 - left).square().mean(1)


def linear_fits(draws: int = 64, sigma: float = 0.1) -> tuple[list, dict, dict]:
    """Updates; name → error over them, of fits to noisy copies of one signal; rule → where each fit stops."""
    x, values, vectors = linear_dip()
    generator, K = seeded("lesson"), vectors * values @ vectors.T
    y = x + sigma * torch.randn(draws, len(x), generator=generator, dtype=x.dtype)
    link, = hybrid.noising_chain(y, sigma, [0.25], generator)
    targets, f, found = torch.stack([y, link.q, hybrid.opposite(y, link).q]), torch.zeros(()), []
    updates = sorted({round(10 ** (k / 20)) for k in range(85)})
    for k in range(1, updates[-1] + 1):
        f = f + (targets - f) @ K
        if k in updates:
            found.append(f)
    plain, f, g = torch.stack(found).unbind(1)
    bias, variance = rise_and_fall(x, values, vectors, sigma, updates)
    curves = {"bias²": bias, "variance": variance, "measured": (plain - x).square().mean((1, 2))}
    risks = torch.tensor([[hybrid.pair_risk(f[k, b], g[k, b], y[b], sigma, hybrid.Link(link.S, link.q[b]))
                           for b in range(draws)] for k in range(len(updates))])
    misfit = (plain - y).square().mean(2) > sigma ** 2
    steps = torch.tensor(updates)
    return updates, curves, {"discrepancy": steps[misfit.sum(0)], "unbiased risk": steps[risks.argmin(0)]}


def least_of_two(a: float, b: float, rho: float) -> float:
    """The law of combination for two estimates with errors a, b and correlation rho."""
    c = rho * math.sqrt(a * b)
    w = min(1.0, max(0.0, (b - c) / (a + b - 2 * c)))
    return w ** 2 * a + (1 - w) ** 2 * b + 2 * w * (1 - w) * c


def average_of_two(a: float, b: float, rho: float, d: int = 100_000) -> float:
    """The error of the best average of two Gaussian estimators, found from errors and distance alone."""
    first, other = torch.randn(2, d, generator=seeded("law", rho), dtype=torch.float64)
    images = [math.sqrt(a) * first, math.sqrt(b) * (rho * first + math.sqrt(1 - rho ** 2) * other)]
    w, _ = hybrid.least_on_simplex(hybrid.moments(images, [a, b]))
    return (w @ torch.stack(images)).square().mean().item()


def lesson() -> None:
    """Draw out/lesson.png: both mechanisms, and the law, where the exact answer is known. A minute."""
    s, generator = ddpm.cosine(1000), seeded("lesson")
    torch.manual_seed(0)
    for state in tqdm(ddpm.train(Perceptron(), s, clouds, ddpm.v_head, 6000, generator), total=6000):
        pass
    models = (exact_denoiser(s), GREY), (ddpm.denoiser(state.ema, s, ddpm.v_head), ORANGE)
    figure = Figure((9, 6.2))
    (score, chain, short), (fits, stopped, law) = figure.subplots(2, 3)
    side, t = torch.linspace(-1.2, 1.2, 11), 400
    grid, a = torch.cartesian_prod(side, side)[..., None, None], s.alpha_bar[t].item()
    for (denoise, colour), width in zip(models, (0.012, 0.005)):
        # Tweedie's formula: the score is (√ᾱ x̂₀ − x)/(1 − ᾱ)
        arrows = (math.sqrt(a) * denoise(grid, t) - grid).flatten(1) / (1 - a)
        score.quiver(*grid.flatten(1).T, *arrows.T, color=colour, width=width)
    score.set_title(f"score at t = {t}: exact (grey), learnt (orange)")
    for ax, steps in ((chain, 50), (short, 3)):
        for denoise, colour in models:
            start = torch.randn(400, 2, 1, 1, generator=seeded("start"))
            *_, end = ddpm.ddim(denoise, s, start, steps, generator)
            ax.scatter(*end.x.flatten(1).T, s=4, color=colour)
        ax.set(title=f"ends of chains of {steps} steps", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
    updates, curves, stops = linear_fits()
    fits.loglog(updates, curves["bias²"] + curves["variance"], color=GREY)
    for (label, curve), colour, at in zip(curves.items(), (BLUE, GREEN, "black"), (
            (200, 5e-4), (1, 6e-4), (200, 4e-3))):
        fits.loglog(updates, curve, "." if label == "measured" else "-", color=colour, ms=3)
        fits.text(*at, label, color=colour)
    fits.set(ylim=(1e-4, 0.03), title="linear DIP: mean squared error over updates")
    best = updates[int(curves["measured"].argmin())]
    stopped.axvline(best, color="black")
    stopped.text(0.4, 0.7, f"best on average: {best}", transform=stopped.transAxes)
    for (rule, found), colour, height in zip(stops.items(), (RED, ORANGE), (0.9, 0.8)):
        stopped.hist(found.clamp(max=295), bins=[*range(10, 300, 10)], color=colour, alpha=0.7)
        stopped.text(0.4, height, f"{rule}: mean {found.float().mean():.0f}", color=colour,
                     transform=stopped.transAxes)
    stopped.set_title("where two rules stop 64 fits (last bar: later)")
    rhos = [k / 20 for k in range(-8, 20)]
    for b, colour in ((1.0, BLUE), (2.0, GREEN), (4.0, RED)):
        law.plot(rhos, [decibels(least_of_two(1, b, rho)) for rho in rhos], color=colour)
        law.plot(rhos[::3], [decibels(average_of_two(1, b, rho)) for rho in rhos[::3]], ".", color=colour)
        law.text(0.6, 0.95 - 0.1 * b, f"error ratio {b:.0f}", color=colour, transform=law.transAxes)
    law.set_title("gain of the best average, dB, over ρ")
    keep_drawing(figure, OUT["full"] / "lesson")


# ------------------------------------------------------------------------------------------------ the report

def make_all(scale: str = "full", jobs: int = 0, reuse: int = 0) -> None:
    """Compute what is missing, then records, figures, report. reuse: trust committed records that fit."""
    rows, committed = rows_of(scale), {}
    for question in rows if reuse else ():
        path = OUT[scale] / f"{question}.json"
        for record in json.loads(path.read_text("utf-8"))["records"] if path.exists() else ():
            committed.setdefault(record["key"], []).append(record)
    todo = [job for asked in rows.values() for _, job in asked if job.key not in committed]
    compute(todo, jobs or os.cpu_count())
    machine = {"device": DEVICE.type, "cores": os.cpu_count(), "torch": torch.__version__}
    for question, asked in rows.items():
        lines = [json.dumps(record, ensure_ascii=False) for record in records_of(asked, committed)]
        text = f'{{"machine": {json.dumps(machine)}, "records": [\n' + ",\n".join(lines) + "\n]}\n"
        write(OUT[scale] / f"{question}.json", text)
    make_figures(scale)
    make_report(scale)


def make_figures(scale: str = "full") -> None:
    """Draw the figures whose jobs are in the cache; the others stay as they are."""
    rows, q = rows_of(scale), read_records(scale)
    for name, draw in FIGURES.items():
        try:
            keep_drawing(draw(rows, q), OUT[scale] / name)
        except FileNotFoundError:
            print(f"{name} stays as it is: .cache does not have its jobs")


def keep_drawing(drawn, path: Path) -> None:
    """A figure as .png, a list of frames as .gif."""
    if isinstance(drawn, Figure):
        write(path.with_suffix(".png"), functools.partial(drawn.savefig, metadata={"Software": None}))
    else:
        pauses = [120] * (len(drawn) - 1) + [3000]
        write(path.with_suffix(".gif"), functools.partial(
            drawn[0].save, save_all=True, append_images=drawn[1:], duration=pauses, loop=0))


FORMATS = {"psnr": 2, "ssim": 3, "law": 2, "rho": 2, "gap": 3, "last": 2, "seconds": 1, "updates": 0,
           "evaluations": 0, "diversity": 4, "target_psnr": 2, "fidelity": 3, "frechet": 2, "least": 2,
           "unseen": 2}


def between(page: str, mark: str, text: str) -> str:
    """A page with a text between its two marks."""
    return re.sub(f"(?s)(?<=<!-- {mark} -->\n).*?(?=<!-- /{mark} -->)", lambda _: text + "\n", page)


def with_answer(page: str, q: Query) -> str:
    rows = ("classical", "DIP", "three DIPs", "diffusion", "combination")
    columns = {row: f"psnr:m.2f of {row}" for row in rows}
    columns |= {"gain": "gain alone:.2f", "better on": "gain alone:k"}
    return between(page, "answer", q.table("final", columns, lines={task: {"task": task} for task in FIVE}))


def make_report(scale: str = "full") -> None:
    """Render REPORT.md, out/TABLES.md and README.md's table from the records in out/, without computing."""
    q, columns = read_records(scale), {name: f"{name}:.{digits}f" for name, digits in FORMATS.items()}
    columns = {"pictures": "psnr:n"} | columns
    text = render((ROOT / "REPORT.in.md").read_text("utf-8"), q, check_claims=scale == "full")
    write(ROOT / "REPORT.md" if scale == "full" else OUT[scale] / "REPORT.md", text)
    if scale == "full":
        write(ROOT / "README.md", with_answer((ROOT / "README.md").read_text("utf-8"), q))
    parts = ["# Every row in full", "Means over photographs [95 % intervals]; written by `make report`."]
    for question, ask in QUESTIONS.items():
        parts.append(f"## {question}: {ask.__doc__}")
        for task, cell in dict.fromkeys((record["task"], record["cell"]) for record in q.records[question]):
            parts.append(f"### {cell or task or 'pictures from noise'}")
            parts.append(q.table(question, columns, task=task, cell=cell))
    write(OUT[scale] / "TABLES.md", "\n\n".join(parts) + "\n")


# -------------------------------------------------------------------------------------------- a user's photo

# a pair of DIPs takes about 6 kB a pixel, eight chains of a model a little more
PIXELS = min(4_000_000, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 12000)
# `opened` has limits of its own and says itself what is wrong
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module="PIL")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
# the EXIF tag "software" of what this program writes
MARK = Image.Exif()
MARK[0x131] = "DDPM and Deep Image Prior, from scratch"


def at_home(path: str) -> Path:
    """A path whose ~ is a home folder, if there is one."""
    return Path(os.path.expanduser(path))


def opened(path: str, limit: int) -> Image.Image:
    """A picture, turned as its EXIF block says, its colours in sRGB."""
    place = at_home(path)
    check(os.path.isfile(place), f"{path} is not there or not a file: check the name")
    try:
        image = Image.open(place)
        check(image.width * image.height <= limit, f"{path} has {image.width} × {image.height} pixels: "
              f"resize it, to {limit:,} in all at most")
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            print(f"{path} has {image.n_frames} frames: the first is taken")
        tags, mode = getattr(image, "tag_v2", {}), image.mode
        check(mode != "I" and 2 not in tags.get(339, ()) and (tags.get(262) != 0 or mode in ("1", "L")),
              f"{path} is a TIFF of 32-bit, signed or inverted integers: convert it to PNG")
        image.load()
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"{path} cannot be read as an image ({error}): convert it to PNG or JPEG")
    # a broken EXIF block or colour profile is no reason to refuse the picture
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    profile, alpha = image.info.get("icc_profile"), "A" in image.mode or "transparency" in image.info
    with contextlib.suppress(Exception):
        if image.mode in ("P", "PA", "LA") or image.mode in ("L", "RGB") and alpha:
            image = image.convert("RGBA" if alpha else "RGB")
        if profile and image.mode in ("L", "RGB", "RGBA", "CMYK"):
            image = ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"),
                outputMode="RGBA" if image.mode == "RGBA" else "RGB")
            profile = None
    if profile:
        print(f"{path}: its colour profile does not fit its pixels and is left out")
    return image


def read_image(path: str, limit: int = PIXELS) -> Tensor:
    """PNG, JPEG, WebP, TIFF → (1, 1 or 3, H, W) in [0, 1]; transparency over white, grey stays grey."""
    image = opened(path, limit)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith(("I;16", "F")):
        values = np.asarray(image, np.float32)
        check(image.mode == "F" or values.max() >= 4096,
              f"{path} uses less than a tenth of its 16 bits: convert it to 8 bits or to their full range")
        pixels = to_tensor(values / (1 if image.mode == "F" else 65535) * 255)
    else:
        pixels = to_tensor(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    check(pixels.isfinite().all() and 0 <= pixels.min() and pixels.max() <= 1,
          f"{path} has pixels that are not numbers in [0, 1]: convert it to an 8- or 16-bit image")
    short, long = sorted(pixels.shape[-2:])
    check(16 <= short and (long <= 4000 or limit > PIXELS),
          f"{path} has sides of {short} and {long} pixels: resize it, to sides of 16 to 4,000")
    return pixels[:, :1] if (pixels == pixels[:, :1]).all() else pixels


def read_mask(path: str) -> Tensor:
    """(1, 1, H, W): 1 where a mask is near-white and opaque. In one colour, its transparency alone counts."""
    image = opened(path, PIXELS)
    if image.mode.startswith(("I", "F")):
        values, opaque = np.asarray(image, np.float32), 1.0
        white = values.max()
    else:
        rgba = np.asarray(image.convert("RGBA"), np.float32)
        values, opaque = rgba[..., :3].min(2), rgba[..., 3] / 255
        values = np.full_like(values, 255) if values.min() == values.max() and opaque.min() < 1 else values
        # a mask of zeros and ones is black and nearly black to the eye
        white = 1 if values.max() == 1 else 255
    known = (values > 0.95 * white) & (opaque > 0.95)
    return torch.from_numpy(known)[None, None].float()


def ours(path: Path) -> bool:
    """Was this picture written by this program?"""
    with contextlib.suppress(Exception), Image.open(path) as image:
        return MARK[0x131].encode() in image.info.get("exif", b"")
    return False


def images_in(folder: str) -> list[Path]:
    """The pictures of a folder, without hidden files and without what this program wrote."""
    return sorted(path for path in at_home(folder).iterdir() if path.suffix.lower() in PICTURES
                  and path.is_file() and not path.name.startswith(".") and not ours(path))


@functools.lru_cache(500)
def reduced(path: Path) -> Tensor:
    """(3, H, W) bytes: a picture to learn from, its short side reduced to 512 at most; refused under 64."""
    image = read_image(str(path), limit=10 ** 8).expand(-1, 3, -1, -1)
    shorter = min(image.shape[-2:])
    check(shorter >= 64, "too small")
    return to_bytes(nn.functional.avg_pool2d(image, -(-shorter // 512)))[0]


class Folder(UserList):
    """Paths of pictures, read when they are asked for: (3, H, W) in [0, 1]."""

    def __getitem__(self, i):
        return reduced(self.data[i]).float() / 255


def users_photos(folder: str) -> Folder:
    """The pictures of a folder that are fit to learn from; the others are named."""
    paths, found = images_in(folder), Folder()
    for path in paths:
        with contextlib.suppress(Refusal):
            reduced(path)
            found.append(path)
    left_out = [path.name for path in paths if path not in found.data]
    if left_out and not multiprocessing.parent_process():
        print(f"left out, as broken, too large or with sides under 64 pixels: {', '.join(left_out)}")
    return found


def number(text: str, name: str, low: float, high: float, whole: bool = False) -> Any:
    fits = re.fullmatch(r"\d+" if whole else r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text)
    check(fits and low <= float(text) <= high,
          f"{name}={text} is not a {'whole ' * whole}number from {low:,} to {high:,}")
    return int(text) if whole else float(text)


def users_noise(y: Tensor, image: str, sigma: str) -> tuple[float, bool]:
    """The noise level that the user believes or that is estimated; does something speak against it?"""
    guess, coarse = metrics.noise_level(y), 2 * metrics.noise_level(nn.functional.avg_pool2d(y, 2))
    level = number(sigma, "SIGMA", 0.5, 255) / 255 if sigma else guess
    origin = f"the photo looks like {255 * guess:.1f}" if sigma else "estimated, too roughly for a PSNR"
    print(f"noise: sigma {255 * level:.1f} of 255 ({origin})")
    check(level >= 0.5 / 255, "no noise was found in this photo: give SIGMA=… (0.5 to 255) if there is some")
    cut = ((y == 0) | (y == 1)).float().mean().item()
    doubts = {
        "SIGMA is far from what the photo looks like": max(level, guess) > 1.5 * min(level, guess) + 1 / 255,
        "this file is compressed, and its noise no longer white":
            Image.open(at_home(image)).format in ("JPEG", "MPO", "WEBP", "AVIF", "GIF"),
        "the noise is not independent from pixel to pixel (enlarged? compressed?), or there is hardly any":
            coarse > 2 * guess,
        f"{100 * cut:.0f} % of the values are 0 or 255, where noise is cut": cut > 0.02}
    for doubt in (doubt for doubt, holds in doubts.items() if holds):
        print(f"careful: {doubt}; the estimates of noise and error may be wrong")
    return level, not sigma or any(doubts.values())


def users_problem(image: str, task: str, sigma: str, mask: str, factor: str) -> tuple[dip.Problem, bool]:
    """What the user measured; are its noise level and so all estimated errors doubtful?"""
    uses = {"denoise": "SIGMA", "inpaint": "MASK", "superres": "FACTOR"}
    check(image and task in uses,
          f"restore needs IMAGE=… and TASK=denoise, inpaint or superres, got IMAGE={image} TASK={task}")
    for name, given in (("SIGMA", sigma), ("MASK", mask), ("FACTOR", factor)):
        check(not given or name == uses[task], f"TASK={task} has no use for {name}={given}: leave it out")
    y = read_image(image).to(DEVICE)
    if task == "denoise":
        level, doubtful = users_noise(y, image, sigma)
        return dip.Problem(y, dip.identity(), level), doubtful
    if task == "superres":
        k = number(factor or "2", "FACTOR", 2, 8, whole=True)
        check(y[0, 0].numel() * k ** 2 <= PIXELS, f"more than {PIXELS:,} pixels: take a smaller FACTOR")
        return dip.Problem(y, dip.downsample(k)), False
    check(mask, "inpaint needs MASK=…, an image of the same size that is white where pixels are known")
    known = read_mask(mask).to(DEVICE)
    check(known.shape[-2:] == y.shape[-2:], "the mask and the photo differ in size: make them equal")
    check(10 <= known.sum() < known.numel(), "the mask is all white, or black but for a few pixels: paint"
          " what is missing black, the rest white")
    missing = int(known.numel() - known.sum().item())
    print(f"{missing} of {known.numel()} pixels are missing: all that are not near-white and opaque" + (
        "; if you meant the others, invert the mask" if missing > known.numel() / 2 else ""))
    return dip.Problem(y * known, dip.mask(known)), False


def users_targets(out: str, default: Path, pixels: int, inputs: tuple = (), endings=("",)) -> list[Path]:
    """Where to write, tried before any work is done; only results of this program are replaced."""
    target = at_home(out) if out else default
    check(target.suffix.lower() in (".png", ".jpg", ".jpeg") and target.parent.is_dir(),
          f"cannot write {target}: OUT needs an existing folder and the ending .png or .jpg")
    targets = [target.with_name(f"{target.stem}{ending}{target.suffix}") for ending in endings]
    for each in targets:
        itself = os.path.exists(each) and any(os.path.samefile(each, at_home(path)) for path in inputs)
        check(not os.path.lexists(each) or ours(each) and not itself,
              f"{each} exists, the photo or mask itself or no result of this program: choose another OUT")
    probe = target.with_name(f"{target.stem}-before-after.{os.getpid()}.tmp{target.suffix}")
    try:
        # as much as all results may take
        probe.write_bytes(bytes(12 * pixels + 10 ** 5))
        for each in filter(os.path.exists, targets):
            each.open("ab").close()
    except OSError as error:
        raise Refusal(f"cannot write {target} ({error.strerror}): choose another OUT")
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return targets


def users_model(images: str, train_steps: str) -> Job:
    """The photo model, or one of the user's own images."""
    check(images or not train_steps, "TRAIN_STEPS needs IMAGES=folder, the pictures to learn from")
    if not images:
        return PHOTOS[GROUPS[0]][-1]
    steps = number(train_steps or "5000", "TRAIN_STEPS", 16, 10 ** 6, whole=True)
    paths = images_in(images) if at_home(images).is_dir() else []
    check(paths, f"no pictures to learn from in a folder {images} (results of this program do not count): "
          f"give IMAGES=folder, with {', '.join(PICTURES)}")
    stamp = sha([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
    model = chain(str(at_home(images).resolve()), steps, stamp=stamp)[-1]
    check(model.done() or users_photos(images),
          f"no image in {images} has sides of at least 64 pixels: add larger ones")
    return model


def train_on(images: str = "", out: str = "", train_steps: str = "") -> None:
    """Train a photo model on a folder of images, keep it in the cache, and draw 16 samples."""
    model = users_model(images or "IMAGES", train_steps)
    default = Path(f"{at_home(images).resolve().name}-samples.png")
    target, = users_targets(out, default, 16 * 64 ** 2)
    drawn = job("sample", "photos", model=model, n=16, steps=20)
    compute([drawn], 1)
    lines = [torch.cat(list(line), -1) for line in drawn.result()["images"].split(4)]
    save_picture(torch.cat(lines, -2)[None] / 255, target)
    print(f"{target} written; restore with METHOD=diffusion IMAGES={images}"
          + f" TRAIN_STEPS={train_steps}" * bool(train_steps))


def restore(image="", task="", method="auto", sigma="", mask="", factor="", out="", images="", samples="",
            steps="", train_steps="") -> None:
    """Restore a photo by a method of METHODS; the result and a before/after picture go beside it."""
    (problem, doubtful), began = users_problem(image, task, sigma, mask, factor), time.perf_counter()
    about = {name: known.about for name, known in METHODS.items() if known.noise in (None, problem.sigma > 0)}
    check(method in (*about, "auto"), f"METHOD={method} is not a method for TASK={task}: choose auto, "
          + ", ".join(f"{name} ({text})" for name, text in about.items()))
    count = number(samples or "1", "SAMPLES", 1, 64, whole=True)
    check(count == 1 or "samples" in names(method, settings=True) and not problem.sigma,
          f"SAMPLES is for METHOD=diffusion without noise: METHOD={method} has one result, leave it out")
    place, endings = at_home(image), tuple(f"-{i + 1}" for i in range(count) if count > 1)
    # photo.png beside photo.jpg: the results of both keep their names apart
    twins = [path for path in place.parent.iterdir() if path.stem == place.stem and path.name != place.name]
    default = place.with_name(f"{place.name if twins else place.stem}-{task}-{method}.png")
    pixels = count * math.prod(problem.shape[-2:])
    check(pixels <= PIXELS, "too many pixels: take fewer SAMPLES")
    targets = users_targets(out, default, pixels, (image, mask or image), ("", "-before-after", *endings))
    problem = problem._replace(y=problem.y.repeat_interleave(count, 0))
    settings = {"steps": number(steps, "STEPS", 1, 10 ** 6, whole=True)} if steps else {}
    settings |= {"samples": 1} if count > 1 else {}
    chosen = {"auto": "weighted" if problem.sigma else "stacked"}.get(method, method)
    unused = {"STEPS": steps and not takes(chosen, "steps"), "SIGMA": sigma and chosen == "held-out"}
    for option in filter(unused.get, unused):
        print(f"METHOD={method} does not use {option}")
    wanted = takes(chosen, "model")
    check(wanted or not images, f"METHOD={method} uses no model: leave IMAGES out")
    trained = users_model(images, train_steps)
    if method == "auto" and not images and not trained.done():
        trained = None
    compute([trained] if wanted and trained else [], 1)
    found = for_user(chosen, problem, settings, trained)
    mean, before = found.image.mean(0, keepdim=True), problem.operator.pinv(problem.y[:1])
    compared = torch.cat([before, torch.ones_like(mean[..., :8]), mean], -1)
    for target, picture in zip(targets, (mean, compared, *found.image.split(1))):
        save_picture(picture, target)
    expected = found.facts.get("expected", found.facts.get("risk", [math.nan]))[0]
    # what the unknown energy of the noise alone moves
    doubt = 2 * problem.sigma ** 2 * math.sqrt(2 / problem.y[0].numel())
    if expected <= doubt:
        print("the estimated error cannot be told from zero: the photo is very smooth, or SIGMA too large")
    elif expected > doubt and not doubtful:
        print(f"expected PSNR {decibels(expected):.1f} dB")
    print(f"{targets[0]} written, with its comparison, {time.perf_counter() - began:.0f} s")


def takes(method: str, name: str) -> bool:
    """Does a method or one of its experts use this tool or setting?"""
    own = names(method) | names(method, settings=True)
    return name in own or any(takes(expert, name) for expert, _ in METHODS[method].experts)


def for_user(method: str, problem: dip.Problem, settings: dict, model: Optional[Job], start=0, blind=False
             ) -> dip.Restoration:
    """What a method delivers, after those it builds on; no model: experts that need one are left out."""
    problem = problem.without(unseen_of(problem)) if blind else problem
    called = [(name, more) for name, more in METHODS[method].experts if model or "model" not in names(name)]
    experts = [for_user(name, problem, settings, model, **more) for name, more in called]
    settings = {name: value for name, value in settings.items() if name in names(method, settings=True)}
    known = inspect.signature(METHODS[method].run).parameters
    most = settings.get("steps", known["steps"].default) if "steps" in known else 0  # it may stop earlier
    tools, _ = toolbox(problem, starting(problem, 0, start), model if "model" in known else None, settings)
    run = perform(method, problem, tools | {"experts": experts}, settings)
    found = deque(tqdm(run, desc=method, total=most or None), 1).pop()
    if "weights" in found.facts and experts:
        shares = zip(called, found.facts["weights"][0])
        left_out = dict.fromkeys(name for name, _ in METHODS[method].experts if name not in dict(called))
        print("weights: " + ", ".join(f"{name} {share:.2f}" for (name, _), share in shares)
              + f"; without a model no {', '.join(left_out)} (METHOD={method} trains one)" * bool(left_out))
    return found


def save_picture(x: Tensor, path: Path) -> None:
    """An image (1, 1 or 3, H, W) as PNG or JPEG, marked as ours."""
    pixels = to_bytes(x)[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    write(path, functools.partial(image.save, exif=MARK, quality=100, keep_rgb=True))


# ---------------------------------------------------------------------------------------------- command line

def command_line() -> None:
    """python experiments.py COMMAND [name=value …], the arguments of one of six functions."""
    commands = {"all": make_all, "report": make_report, "figures": make_figures, "lesson": lesson,
                "train": train_on, "restore": restore}
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    command, *given = sys.argv[1:] or [""]
    try:
        # One thread: two programs of two threads each would wait for one another in busy loops.
        threads = os.environ.get("OMP_NUM_THREADS") or "1"
        torch.set_num_threads(number(threads.split(",")[0], "OMP_NUM_THREADS", 1, 999, whole=True))
        check(command in commands, f"{command or 'nothing'} is not a command: choose {', '.join(commands)}")
        known = inspect.signature(commands[command]).parameters
        options = dict(text.partition("=")[::2] for text in given)
        check(set(options) <= set(known) and len(options) == len(given),
              f"{command} takes {'=…, '.join(known)}=…, each once, got {', '.join(given)}")
        # an empty value is the default, as in `make restore` without SIGMA
        commands[command](**{
            name: number(text, name, 0, 999, whole=True) if isinstance(known[name].default, int) else text
            for name, text in options.items() if text})
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    except Exception as error:
        # a bug in the experiments shows where it is
        if command not in ("restore", "train") and not isinstance(error, (Refusal, OSError)):
            raise
        sys.exit(f"error: {str(error) or 'not enough memory: take a smaller picture'}")


if __name__ == "__main__":
    command_line()
