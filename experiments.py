"""Everything impure: data, runs, caches, figures, the report and the command line. Read it last."""
import argparse
import ast
import functools
import hashlib
import importlib.util
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
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Optional

import matplotlib
import numpy as np
import skimage
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, inpaint_biharmonic
from torch import Tensor
from tqdm import tqdm

import ddpm
import dip
import hybrid
import metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt                                                                      # noqa: E402


# ------------------------------------------------------------------------------------------------------ data

TEST = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
DEVELOPMENT = ("motorcycle_left.png", "hubble_deep_field.jpg")
TRAINING = ("retina.jpg", "ihc.png", "brick.png", "grass.png", "gravel.png", "coins.png", "moon.png", "cell.png", "camera.png",
            "page.png", "text.png", "clock_motion.png", "microaneurysms.png", "grace_hopper.jpg")


def photo(name: str) -> Image.Image:
    """A photograph from the installed wheels of scikit-image or matplotlib."""
    folders = Path(skimage.__file__).parent / "data", Path(matplotlib.get_data_path()) / "sample_data"
    return Image.open(next(f / name for f in folders if (f / name).exists())).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """(1, C, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None].contiguous()


@functools.cache
def crops(name: str, size: int = 128) -> dict[str, Tensor]:
    """Three views of a photo, by rule and not by taste: the centred square, and 256 × 256 pixels at half height from the left
    and from the right edge; each reduced to size × size."""
    image, views = photo(name), {}
    w, h = image.size
    for label, side, place in (("whole", min(w, h), 1 / 2), ("left", 256, 0), ("right", 256, 1)):
        x, y = round((w - side) * place), (h - side) // 2
        views[f"{Path(name).stem}-{label}"] = to_tensor(image.resize((size, size), Image.Resampling.BOX, (x, y, x + side, y + side)))
    return views


def photo_named(view: str, size: int) -> Tensor:
    """crops("chelsea.png", size)["chelsea-left"] by its view's name."""
    name = next(n for n in TEST + DEVELOPMENT if n.startswith(view.rsplit("-", 1)[0]))
    return crops(name, size)[view]


@functools.cache
def training_photos(folder: str = "") -> list[Tensor]:
    """The training photographs, or those of a folder, at full, half and quarter size where at least 64 pixels remain."""
    found = []
    for image in [read_image(str(path)).expand(-1, 3, -1, -1) for path in images_in(folder)] if folder else [to_tensor(photo(name)) for name in TRAINING]:
        for k in (1, 2, 4):
            if min(image.shape[-2:]) // k >= 64:
                found.append(nn.functional.avg_pool2d(image, k)[0])
    return found


def images_in(folder: str) -> list[Path]:
    return sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"))


def photo_patches(photos: list[Tensor], generator: torch.Generator, n: int = 16, size: int = 64) -> Tensor:
    """(n, 3, size, size): random places of random photos, flipped and transposed at random."""
    def draw(high):
        return int(torch.randint(high, (1,), generator=generator))
    patches = []
    for _ in range(n):
        image = photos[draw(len(photos))]
        y, x = (draw(side - size + 1) for side in image.shape[1:])
        patch = image[:, y:y + size, x:x + size]
        patch = patch.flip(1) if draw(2) else patch
        patch = patch.flip(2) if draw(2) else patch
        patches.append(patch.transpose(1, 2) if draw(2) else patch)
    return torch.stack(patches)


@functools.cache
def cat_layers(size: int = 32) -> list[Tensor]:
    """Five tensors (options, 4, size, size) of premultiplied RGBA: body, fur, eyes, mouth, accessory (David Revoy, CC-BY 4.0).
    Two of the ten fur files are the same picture; the second is left out."""
    root = Path(importlib.util.find_spec("robohash").origin).parent / "sets" / "set4"
    def load(path):
        rgba = np.asarray(Image.open(path).convert("RGBA"), np.float32) / 255
        rgba[..., :3] *= rgba[..., 3:]
        k = rgba.shape[0] // size
        return rgba.reshape(size, k, size, k, 4).mean((1, 3)).transpose(2, 0, 1)
    return [torch.from_numpy(np.stack([load(p) for p in sorted(folder.glob("*.png")) if p.name != "006#fur6.png"]))
            for folder in sorted(root.iterdir()) if folder.is_dir()]


def render_cats(parts: Tensor, size: int = 32) -> Tensor:
    """(n, 5) factor indices → (n, 3, size, size) in [0, 1]: the layers laid over white, in order."""
    image = torch.ones(len(parts), 3, size, size)
    for layer, index in zip(cat_layers(size), parts.T):
        rgba = layer[index]
        image = image * (1 - rgba[:, 3:]) + rgba[:, :3]
    return image.clamp(0, 1)


CAT_FACTORS = {"body": 15, "fur": 9, "eyes": 15, "mouth": 10, "accessory": 16}


def cat_number(parts: Tensor) -> Tensor:
    """(n, 5) factors → (n,) numbers, one for each of the 324,000 cats."""
    number = torch.zeros(len(parts), dtype=torch.long)
    for index, options in zip(parts.T, CAT_FACTORS.values()):
        number = number * options + index
    return number


def everything(parts: Tensor) -> Tensor:
    return torch.ones(len(parts), dtype=torch.bool)


def held_out(parts: Tensor) -> Tensor:
    """(n,) bool: about a tenth of all pairs (fur, eyes) never occurs in training."""
    return (parts[:, 1] + parts[:, 2]) % 10 == 0


HELD_OUT_SHARE = float(held_out(torch.cartesian_prod(*map(torch.arange, CAT_FACTORS.values()))).float().mean())


def draw_cats(generator: torch.Generator, n: int, keep=lambda parts: ~held_out(parts)) -> Tensor:
    """(n, 5) factors, uniform among the combinations that `keep` admits."""
    parts = torch.stack([torch.randint(k, (4 * n + 64,), generator=generator) for k in CAT_FACTORS.values()], dim=1)
    return parts[keep(parts)][:n]


def subject(name: str, size: int) -> Tensor:
    """A clean picture by name: a view of a photo, or "cat-7" of a fixed row of cats, counted from 0."""
    if name.startswith("cat-"):
        return render_cats(draw_cats(torch.Generator().manual_seed(9), 64, keep=everything))[[int(name[4:])]]
    return photo_named(name, size)


# -------------------------------------------------------------------------------------------------- machinery

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".cache"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
NATIVE_BF16 = (DEVICE.type == "cuda" and torch.cuda.is_bf16_supported()) or (
    DEVICE.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
AMP = torch.bfloat16 if NATIVE_BF16 else None           # where bf16 is emulated it is slower than float32


class Refusal(Exception):
    """Something the user can mend; its text is the one sentence shown."""


def write(path: Path, save) -> None:
    """Call save(temporary path), then rename: readers see the old file or the whole new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    save(temporary)
    os.replace(temporary, path)


@functools.cache
def definitions() -> dict:
    """(module, name) → syntax tree of every top-level definition in our five files, docstrings removed."""
    found = {}
    for module in ("metrics", "ddpm", "dip", "hybrid", "experiments"):
        path = ROOT / f"{module}.py"
        for node in ast.parse(path.read_text()).body if path.exists() else []:
            for part in ast.walk(node):
                if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part, clean=False) is not None:
                    part.body = part.body[1:]
            targets = getattr(node, "targets", [getattr(node, "target", node)])
            for target in targets:
                for name in [n.id for n in ast.walk(target) if isinstance(n, ast.Name)] if target is not node else [getattr(node, "name", "")]:
                    found[module, name] = node
    return found


@functools.cache
def fingerprint(name: str, module: str = "experiments") -> str:
    """A hash of the code behind a definition: its syntax tree and, again and again, those of all definitions of ours that
    it names. Comments, docstrings and layout do not count, and neither does the version of Python."""
    def shape(node):
        if isinstance(node, ast.AST):
            return type(node).__name__, [(k, shape(v)) for k, v in ast.iter_fields(node) if v not in (None, [])]
        return [shape(n) for n in node] if isinstance(node, list) else node
    todo, seen = [(module, name)], set()
    while todo:
        here = todo.pop()
        if here in seen or here not in definitions():
            continue
        seen.add(here)
        for node in ast.walk(definitions()[here]):
            if isinstance(node, ast.Name):
                todo.append((here[0], node.id))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                todo.append((node.value.id, node.attr))
    return hashlib.sha256(repr([(h, shape(definitions()[h])) for h in sorted(seen)]).encode()).hexdigest()


class Run:
    """One cached computation. A subclass is a frozen dataclass: its fields are all its settings, `execute(progress)` does
    the work and returns a dict of tensors and plain values, `needs` are runs whose results it reads, `cost` is a guess
    in core-seconds for the order of work and the time left."""
    needs: tuple = ()
    cost: float = 1.0

    @property
    def key(self) -> str:
        return hashlib.sha256((repr(self) + fingerprint(type(self).__name__)).encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        return CACHE / f"{type(self).__name__}-{self.key}.pt"

    def result(self) -> dict:
        return torch.load(self.path, weights_only=True)

    def generator(self, salt: str = "") -> torch.Generator:
        """Reproducible and of its own for every seed and purpose; equal for runs that differ in other settings only."""
        digest = hashlib.sha256(f"{self.seed}/{salt}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _start_worker(queue) -> None:
    """Workers use one thread each, leave Ctrl-C to the parent, and do not outlive it."""
    global report_progress
    report_progress = queue.put
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def _work(run: Run) -> None:
    last = [0.0]

    def progress(done: float, note: str = "") -> None:
        if time.monotonic() - last[0] > 1:
            last[0] = time.monotonic()
            report_progress((run, done, note))
    began = time.perf_counter()
    result = run.execute(progress)
    write(run.path, functools.partial(torch.save, result | {"core_seconds": time.perf_counter() - began}))


def execute(runs, jobs: int) -> None:
    """Do what the cache lacks of `runs` and of the runs they need, in `jobs` processes, with one progress bar."""
    todo = {}

    def add(run):
        if run.path.exists() or run in todo:
            return
        for need in run.needs:
            add(need)
        todo[run] = None
    for run in runs:
        add(run)
    if not todo:
        return
    total, done, notes, context = sum(r.cost for r in todo), 0.0, {}, multiprocessing.get_context("spawn")
    waiting, running = sorted(todo, key=lambda r: (bool(r.needs), -r.cost)), {}
    queue = context.SimpleQueue()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(queue,))
    bar = tqdm(total=100, desc=f"{len(todo)} runs", bar_format="{desc} {percentage:3.0f}% {bar} {elapsed} <{remaining} {postfix}",
               mininterval=0 if sys.stderr.isatty() else 60, smoothing=0.02)
    try:
        while waiting or running:
            for run in [r for r in waiting if not any(n in todo for n in r.needs)][:jobs - len(running)]:
                waiting.remove(run)
                running[pool.submit(_work, run)] = run
            finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            while not queue.empty():
                run, fraction, note = queue.get()
                notes[run] = fraction, note
            for future in finished:
                run = running.pop(future)
                future.result()
                done += run.cost
                del todo[run]
            notes = {r: n for r, n in notes.items() if r in running.values()}
            bar.set_postfix_str(f"{len(todo)} left; " + " | ".join(f"{r.label} {100 * f:.0f}% {n}" for r, (f, n) in notes.items()), refresh=False)
            bar.update(min(100, 100 * (done + sum(r.cost * f for r, (f, _) in notes.items())) / total) - bar.n)
    except KeyboardInterrupt:
        raise Refusal("interrupted: every finished run is kept, run the same command again to go on")
    except BrokenProcessPool:
        raise Refusal("a worker process was killed: every finished run is kept, run the same command again to go on")
    finally:
        bar.close()
        for process in list((pool._processes or {}).values()):
            process.terminate() if running else None
        pool.shutdown(wait=False, cancel_futures=True)


# --------------------------------------------------------------------------------------- runs: diffusion models

@dataclass(frozen=True)
class Train(Run):
    """A diffusion model, its weights averaged at an eighth, a quarter, a half and the whole of training; resumable."""
    data: str                                       # "cats", "photos", or a folder of images
    steps: int
    schedule: str = "cosine"
    head: str = "v"
    places: tuple = ()                              # mean and deviation of a logit-normal t / T; empty: all steps alike
    t_max: int = 0                                                  # the last step that is learnt; 0: all
    stamp: str = ""                                 # what the folder held
    seed: int = 0

    label = property(lambda self: f"train {self.data}")
    cost = property(lambda self: self.steps * (0.32 if self.data == "cats" else 0.6))
    images = property(lambda self: 16 if self.data == "cats" else 8)                                      # per step
    widths = property(lambda self: (32, 64, 96, 128) if self.data == "cats" else (32, 64, 96))
    lr = property(lambda self: 2e-3 if self.data == "cats" else 3e-3)

    def network(self) -> ddpm.UNet:
        torch.manual_seed(self.seed)
        return ddpm.UNet(3, self.widths).to(DEVICE, memory_format=torch.channels_last)

    def parts(self) -> tuple:
        schedule = {"linear": ddpm.linear, "cosine": ddpm.cosine, "sigmoid": ddpm.sigmoid}[self.schedule]
        return schedule(1000), {"v": ddpm.v_head, "eps": ddpm.eps_head}[self.head]

    def denoiser(self, at: float = 1.0, ema: bool = True):
        """The trained model after the fraction `at` of its training, as (denoise, schedule)."""
        network, (schedule, head), result = self.network(), self.parts(), self.result()
        network.load_state_dict(result["ema"][at] if ema else result["raw"])
        return ddpm.denoiser(network.eval(), schedule, head), schedule

    def execute(self, progress) -> dict:
        seen = torch.zeros(math.prod(CAT_FACTORS.values()), dtype=torch.bool)

        def batch(generator):
            if self.data != "cats":
                return photo_patches(training_photos("" if self.data == "photos" else self.data), generator, self.images)
            parts = draw_cats(generator, self.images)
            seen[cat_number(parts)] = True
            return render_cats(parts)
        half_done, saved = self.path.with_suffix(".part.pt"), {"ema": {}, "losses": [], "seconds": 0.0, "trainer": None}
        if half_done.exists():
            saved = torch.load(half_done, weights_only=True)
            seen.copy_(saved["seen"])
        began, spent, last = time.perf_counter(), saved["seconds"], time.perf_counter()
        marks = {max(1, round(self.steps * f)): f for f in (1 / 8, 1 / 4, 1 / 2, 1.0)}
        network, (schedule, head) = self.network(), self.parts()
        for state in ddpm.train(network, schedule, batch, head, self.steps, self.generator(), lr=self.lr, amp=AMP, t_max=self.t_max or None,
                                place=ddpm.logit_normal(*self.places) if self.places else ddpm.evenly, resume=saved["trainer"]):
            saved["losses"].append(state.loss)
            seconds = spent + time.perf_counter() - began
            progress(state.step / self.steps, f"loss {state.loss:.3f}, {self.images * state.step / seconds:.0f} images/s")
            if state.step in marks:
                saved["ema"][marks[state.step]] = {k: v.detach().cpu().clone() for k, v in state.ema.state_dict().items()}
            if time.perf_counter() - last > 60:
                last = time.perf_counter()
                write(half_done, functools.partial(torch.save, {**saved, "seconds": seconds, "seen": seen, "trainer": state.checkpoint()}))
        half_done.unlink(missing_ok=True)
        raw = {k: v.detach().cpu() for k, v in network.state_dict().items()}
        return {"ema": saved["ema"], "raw": raw, "losses": saved["losses"], "seen": seen, "seconds": seconds,
                "parameters": sum(p.numel() for p in network.parameters())}


class Eye(nn.Module):
    """Names the five parts of a cat; its 64 features are where the Fréchet distance is taken."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 96)
        self.features = nn.Sequential(*[m for a, b in zip(widths, widths[1:]) for m in (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())],
                                      nn.Flatten(), nn.Linear(96 * 16, 64), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(64, k) for k in CAT_FACTORS.values())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(self.features(x)) for head in self.heads]


@dataclass(frozen=True)
class LearnToSee(Run):
    """The factor classifier: all combinations, labels free, trained on slightly noisy cats."""
    steps: int
    seed: int = 0
    label, cost = "train classifier", property(lambda self: self.steps * 0.06)

    def execute(self, progress) -> dict:
        torch.manual_seed(self.seed)
        eye, generator = Eye(), self.generator()
        optimiser = torch.optim.Adam(eye.parameters(), lr=2e-3)
        for step in range(self.steps):
            parts = draw_cats(generator, 128, keep=everything)
            x = render_cats(parts)
            x = x + 0.1 * torch.rand(1, generator=generator) * torch.randn(x.shape, generator=generator)
            loss = sum(nn.functional.cross_entropy(out, part) for out, part in zip(eye(x), parts.T))
            optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / self.steps)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress(step / self.steps, f"loss {loss.item():.2f}")
        return {"eye": eye.state_dict()}

    def eye(self) -> Eye:
        eye = Eye()
        eye.load_state_dict(self.result()["eye"])
        return eye.eval()


def nearest_parts(images: Tensor, parts: Tensor) -> Tensor:
    """(n, 5): the cat nearest to each image, found from the guess `parts` by trying every option of one factor at a time."""
    for _ in range(4):
        before, parts = parts, parts.clone()
        for i, options in enumerate(CAT_FACTORS.values()):
            tried = parts.repeat_interleave(options, 0)
            tried[:, i] = torch.arange(options).repeat(len(parts))
            rendered = render_cats(tried).reshape(len(parts), options, -1)
            parts[:, i] = (rendered - images.flatten(1)[:, None]).square().sum(2).argmin(1)
        if torch.equal(parts, before):
            break
    return parts


@torch.no_grad()
def examine(eye: Eye, images: Tensor, seen: Tensor) -> dict:
    """Cats (n, 3, 32, 32): the classifier's features, the nearest true cats, and the measures that a known distribution allows."""
    parts = torch.cat([nearest_parts(x, torch.stack([out.argmax(1) for out in eye(x)], dim=1)) for x in images.split(64)])
    def entropy(index, options):                                                                   # 1 = uniform
        share = torch.bincount(index, minlength=options) / len(index)
        return float(-torch.special.xlogy(share, share).sum() / math.log(options))
    sizes, names = list(CAT_FACTORS.values()), list(CAT_FACTORS)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    return {"features": eye.features(images), "parts": parts, "n": len(images),
            "fidelity": float((images - render_cats(parts)).square().mean((1, 2, 3)).sqrt().mean()),
            "entropy": {n: entropy(parts[:, i], sizes[i]) for i, n in enumerate(names)},
            "pair_entropy": sum(entropy(parts[:, i] * sizes[j] + parts[:, j], sizes[i] * sizes[j]) for i, j in pairs) / len(pairs),
            "held_out": int(held_out(parts).sum()), "seen": float(seen[cat_number(parts)].float().mean())}


@dataclass(frozen=True)
class RealCats(Run):
    """The floor: real cats examined as if they were samples."""
    eye: LearnToSee
    n: int
    seed: int = 0
    label, needs = "real cats", property(lambda self: (self.eye,))

    def execute(self, progress) -> dict:
        parts = draw_cats(self.generator(), self.n, keep=everything)
        report = examine(self.eye.eye(), render_cats(parts), torch.zeros(math.prod(CAT_FACTORS.values())))
        return report | {"accuracy": (report["parts"] == parts).float().mean(0).tolist()}


@dataclass(frozen=True)
class SampleCats(Run):
    """n cats from a model: DDIM with `eta`, or with steps = 1000 and eta = 1 ancestral sampling."""
    model: Train
    eye: LearnToSee
    n: int
    steps: int = 50
    eta: float = 0.0
    at: float = 1.0
    ema: bool = True
    seed: int = 0
    label, needs = "sample cats", property(lambda self: (self.model, self.eye))
    cost = property(lambda self: self.n * self.steps * 0.005)

    def execute(self, progress) -> dict:
        (denoise, schedule), generator, images, began = self.model.denoiser(self.at, self.ema), self.generator(), [], time.perf_counter()
        for start in range(0, self.n, 64):
            x = torch.randn(min(64, self.n - start), 3, 32, 32, generator=generator).to(DEVICE)
            chain = ddpm.p_sample(denoise, schedule, x, generator) if (self.steps, self.eta) == (schedule.T, 1) else \
                ddpm.ddim(denoise, schedule, x, self.steps, generator, self.eta)
            film = []
            for i, state in enumerate(chain):
                progress((start + len(x) * i / self.steps) / self.n)
                if start == 0 and (i % max(1, self.steps // 8) == 0 or state.t == 0):
                    film.append(torch.stack([state.x[:4], state.x0_hat[:4]]).cpu())
            images.append(ddpm.to_image(state.x).clamp(0, 1).cpu())
            films = film if start == 0 else films
        seconds = time.perf_counter() - began
        return examine(self.eye.eye(), torch.cat(images), self.model.result()["seen"]) | {
            "images": (torch.cat(images)[:64] * 255).round().byte(), "film": torch.stack(films), "seconds": seconds}


@dataclass(frozen=True)
class SamplePhotos(Run):
    """Unconditional 64 × 64 patches."""
    model: Train
    n: int = 16
    steps: int = 100
    seed: int = 0
    label, needs, cost = "sample photos", property(lambda self: (self.model,)), property(lambda self: self.n * self.steps * 0.03)

    def execute(self, progress) -> dict:
        (denoise, schedule), generator = self.model.denoiser(), self.generator()
        x = torch.randn(self.n, 3, 64, 64, generator=generator).to(DEVICE)
        for state in ddpm.ddim(denoise, schedule, x, self.steps, generator):
            progress(1 - state.t / schedule.T)
        return {"images": (ddpm.to_image(state.x).clamp(0, 1) * 255).round().byte().cpu()}


@dataclass(frozen=True)
class DenoisePhotos(Run):
    """Photos + noise → estimates by the diffusion model: one step, or a DDIM chain from the step that matches the noise."""
    model: Train
    names: tuple
    sigma: float                                                                                   # in 0 … 255
    steps: int = 1
    at: float = 1.0
    size: int = 128
    seed: int = 0
    label, needs = "denoise photos", property(lambda self: (self.model,))
    cost = property(lambda self: len(self.names) * 3 * self.steps * 0.12)

    def execute(self, progress) -> dict:
        (denoise, schedule), sigma, rows, pictures = self.model.denoiser(self.at), self.sigma / 255, {}, {}
        for name, clean in ((n, x) for name in self.names for n, x in crops(name, self.size).items()):
            y = clean + sigma * torch.randn(clean.shape, generator=self.generator(name))
            began = time.perf_counter()
            estimate = ddpm.denoise_photo(denoise, schedule, y.to(DEVICE), sigma, self.steps)
            seconds = time.perf_counter() - began
            rows[name] = score(estimate.cpu(), clean) | {"noisy_psnr": score(y, clean)["psnr"], "seconds": seconds}
            pictures[name] = [to_bytes(y), to_bytes(estimate), to_bytes(clean)]
        return {"rows": rows, "pictures": pictures}


def score(estimate: Tensor, clean: Tensor) -> dict:
    """PSNR and SSIM against the truth; it meets an estimate here and where a finished run or a step already taken is scored."""
    estimate = estimate.clamp(0, 1)
    return {"psnr": metrics.psnr(estimate, clean).item(), "ssim": metrics.ssim(estimate, clean).item()}


def to_bytes(x: Tensor) -> Tensor:
    return (x.detach().cpu().clamp(0, 1) * 255).round().byte()


# ------------------------------------------------------------------------------------- runs: deep image prior

TASKS = {"denoise15": 15, "denoise25": 25, "denoise50": 50, "superres4": 0, "random80": 0, "block": 0, "bigblock": 0}
"""Task → noise sigma in 0 … 255. The last four are measured without noise."""


def measure(task: str, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, dip.Operator]:
    """What the camera of `task` makes of the clean image: y and its operator."""
    operator = dip.identity()
    if task == "superres4":
        operator = dip.downsample(4)
    elif task == "random80":
        operator = dip.mask((torch.rand(1, 1, *clean.shape[-2:], generator=generator) > 0.8).float().to(clean.device))
    elif task in ("block", "bigblock"):                                      # a quarter or three eighths of each side, in the middle
        known, (h, w), eighth = torch.ones_like(clean[:, :1]), clean.shape[-2:], 16 if task == "block" else 24
        known[..., h // 2 - eighth * h // 128:h // 2 + eighth * h // 128, w // 2 - eighth * w // 128:w // 2 + eighth * w // 128] = 0
        operator = dip.mask(known)
    y = operator.A(clean)
    return y + TASKS[task] / 255 * torch.randn(y.shape, generator=generator).to(y.device), operator


def fresh_dip(generator: torch.Generator, shape, **options) -> tuple[dip.Hourglass, Tensor]:
    """A new hourglass, by default the one of the experiments, and its input."""
    torch.manual_seed(int(torch.randint(2 ** 31, (1,), generator=generator)))
    network = dip.Hourglass(**{"widths": (32,) * 4, "upsample": "nearest", "padding": "zeros"} | options)
    return network.to(DEVICE), dip.random_input(shape, generator).to(DEVICE)


@dataclass(frozen=True)
class Fit(Run):
    """One DIP fit with every rule watching: curves at each step, what each rule would deliver, some pictures."""
    photo: str                                                                              # such as "chelsea-left"
    task: str
    steps: int
    unseen: float = 0.0                                             # share of the measurements held out of the fit
    widths: tuple = (32, 32, 32, 32)
    skip: int = 4
    upsample: str = "nearest"
    padding: str = "zeros"
    jitter: float = 1 / 30
    size: int = 96
    seed: int = 0                                                          # of the noise, and of the network's start
    start: int = 0                                              # another start on the same measurement
    label = property(lambda self: f"fit {self.photo}")
    cost = property(lambda self: self.steps * 0.037 * (self.widths[0] / 32) ** 1.4 * (self.size / 96) ** 2)

    def rules(self, y, operator, unseen) -> dict:
        found = {"budget": dip.FixedBudget(BUDGET[self.task]), "wmv": dip.WindowedVariance(*WMV), "emv": dip.MovingVariance(*EMV),
                 "wmv_published": dip.WindowedVariance(), "emv_published": dip.MovingVariance()}
        if TASKS[self.task]:
            found["discrepancy"] = dip.Discrepancy(TASKS[self.task] / 255)
            found["discrepancy_tuned"] = dip.Discrepancy(TASKS[self.task] / 255, TAU)
        if self.unseen:
            found["held_out"] = dip.HeldOut(y, operator.A, unseen)
        return found

    def execute(self, progress) -> dict:
        clean = photo_named(self.photo, self.size).to(DEVICE)
        generator = self.generator(f"{self.photo}/{self.task}")
        y, operator = measure(self.task, clean, generator)
        unseen = (torch.rand(1, 1, *y.shape[-2:], generator=generator) < self.unseen).float().to(DEVICE)
        generator = self.generator(f"{self.photo}/{self.task}/start {self.start}")
        network, z = fresh_dip(generator, clean.shape[-2:], widths=self.widths, skip=self.skip, upsample=self.upsample, padding=self.padding)
        rules, stopped, pictures = self.rules(y, operator, unseen), {}, {"measured": operator.pinv(y)}
        curves, snapshots, seconds, began = {"psnr": [], "average_psnr": [], "misfit": [], "held_out": []}, {}, 0.0, time.perf_counter()
        for step in dip.fit(y * (1 - unseen), lambda x: operator.A(x) * (1 - unseen), network, z, self.steps, generator,
                            jitter=self.jitter, amp=AMP):
            seconds += time.perf_counter() - began
            for name, rule in rules.items():
                if name not in stopped and rule(step):
                    stopped[name] = step.i
                if rule.best == step.i:
                    pictures[name] = step.average
            curves["psnr"].append(metrics.psnr(step.image, clean).item())
            curves["average_psnr"].append(metrics.psnr(step.average, clean).item())
            curves["misfit"].append(step.misfit)
            curves["held_out"].append(((operator.A(step.average) - y).square() * unseen).sum().item() / max(1.0, unseen.expand_as(y).sum().item()))
            if step.i in SNAPSHOTS:
                snapshots[step.i] = step.average.cpu().half()
            if step.i == 1 or curves["average_psnr"][-1] >= max(curves["average_psnr"]):
                pictures["oracle"] = step.average
            progress(step.i / self.steps, self.task)
            began = time.perf_counter()
        pictures["last"] = step.average
        return {"curves": {k: torch.tensor(v) for k, v in curves.items()}, "best": {n: r.best for n, r in rules.items()},
                "stopped": stopped, "snapshots": snapshots, "pictures": {n: to_bytes(p) for n, p in pictures.items()} | {"clean": to_bytes(clean)},
                "seconds": seconds, "parameters": sum(p.numel() for p in network.parameters())}


@dataclass(frozen=True)
class Sure(Run):
    """Stein's unbiased risk estimate along a fit: its divergence is the answer of a second fit, from the same start and with the same
    jitter, to a little noise S ξ added to y (Monte-Carlo SURE, Ramani, Blu & Unser 2008). It ends like the pairs of hybrid I do."""
    fit: Fit
    ratio: float = 0.25                                                     # S / σ; of 1/50, 1/10 and 1/4 the best on development photos
    patience: int = 15
    seed: int = 0
    label = property(lambda self: f"SURE of {self.fit.photo}")
    cost = property(lambda self: 2 * self.fit.cost)

    def execute(self, progress) -> dict:
        run, sigma = self.fit, TASKS[self.fit.task] / 255
        y, operator = measure(run.task, photo_named(run.photo, run.size), run.generator(f"{run.photo}/{run.task}"))
        y, S, xi = y.to(DEVICE), self.ratio * sigma, torch.randn(y.shape, generator=self.generator("xi")).to(DEVICE)
        fits, rule, values, began = [], dip.Valley(self.patience), [], time.perf_counter()
        for target in (y, y + S * xi):
            generator = run.generator(f"{run.photo}/{run.task}/start {run.start}")
            network, z = fresh_dip(generator, y.shape[-2:], widths=run.widths, skip=run.skip, upsample=run.upsample, padding=run.padding)
            fits.append(dip.fit(target, operator.A, network, z, run.steps, generator, jitter=run.jitter, amp=AMP))
        for step, other in zip(*fits):
            divergence = ((other.average - step.average) * xi).sum().item() / (S * y.numel())
            values.append((step.average - y).square().mean().item() + 2 * sigma ** 2 * divergence - sigma ** 2)
            progress(step.i / run.steps, run.task)
            if rule.record(step.i, values[-1]):
                break
        return {"values": torch.tensor(values), "step": rule.best, "seconds": time.perf_counter() - began}


# ------------------------------------------------------------------------------------------------ runs: hybrids

def corrupt(clean: Tensor, noise: str, sigma: float, generator: torch.Generator) -> Tensor:
    """White Gaussian noise, the same cut to [0, 1] as a camera's file is, or Poisson or salt-and-pepper noise of the same mean square."""
    if noise == "poisson":                                                       # photons per unit of brightness: mean / σ²
        photons = clean.mean().item() / sigma ** 2
        return torch.poisson(clean * photons, generator=generator) / photons
    if noise == "salt and pepper":
        grains = torch.rand(clean.shape, generator=generator).round()
        hit = torch.rand(clean.shape, generator=generator) < sigma ** 2 / (grains - clean).square().mean()
        return torch.where(hit, grains, clean)
    y = clean + sigma * torch.randn(clean.shape, generator=generator)
    return y.clamp(0, 1) if noise == "clipped" else y


@functools.cache
def fine_cosine() -> ddpm.Schedule:
    """The cosine schedule cut finely: a stage with S = σ/50 is not a whole step of 1,000."""
    return ddpm.cosine(100_000)


def noisier(y: Tensor, sigma: float, ratios, generator: torch.Generator) -> list[hybrid.Link]:
    """The states of the cosine schedule's process that continue y to S = ratio · σ, for rising ratios."""
    return hybrid.noising_chain(y, sigma, fine_cosine(), [ddpm.step_of(fine_cosine(), sigma * math.hypot(1, r)) for r in ratios], generator)


@dataclass(frozen=True)
class SelfDiffusion(Run):
    """Stages in the manner of Self-diffusion (2510.21417): the network's input is its last picture plus ever less noise, the target always y."""
    photo: str
    task: str
    steps: int
    levels: int = 20
    size: int = 96
    seed: int = 0
    label = property(lambda self: f"self-diffusion of {self.photo}")
    cost = property(lambda self: self.steps * 0.037 * (self.size / 96) ** 2)

    def execute(self, progress) -> dict:
        clean, generator, sigma = photo_named(self.photo, self.size), self.generator(f"{self.photo}/{self.task}"), TASKS[self.task] / 255
        y = corrupt(clean, "gaussian", sigma, generator).to(DEVICE)
        network, _ = fresh_dip(generator, y.shape[-2:], c_in=3)
        x, curve, began = torch.zeros_like(y), [], time.perf_counter()
        for k in range(self.levels):
            z = x + (1 - k / self.levels) * torch.randn(y.shape, generator=generator).to(DEVICE)
            for step in dip.fit(y, lambda image: image, network, z, max(1, self.steps // self.levels), generator, jitter=0.0, amp=AMP):
                pass
            x = step.image
            curve.append(score(x.cpu(), clean)["psnr"])
            progress(k / self.levels)
        return {"stages": [{"gap": max(curve) - curve[-1], "step": len(curve)}], "expected": math.nan,
                "seconds": time.perf_counter() - began} | score(x.cpu(), clean)


@dataclass(frozen=True)
class Staged(Run):
    """Hybrid I on one photo: what the stages believe of themselves, and the truth about them."""
    photo: str
    task: str
    steps: int                                                                              # at most so many, per stage
    ratios: tuple = (0.25,)                                      # S / σ of each stage in the order walked; 0 is y itself
    mirrored: bool = True
    warm: bool = False
    patience: int = 15
    copies: int = 1                                                                 # chains drawn and averaged
    belief: float = 1.0                                           # the σ that is believed over the true one; 0: estimated
    noise: str = "gaussian"
    extra: str = ""                                                             # "perceptual" or "adversarial": a further loss
    leak: bool = False                                            # LEAK: stages are the *clean* image plus noise, as in public projects
    widths: tuple = (32, 32, 32, 32)
    skip: int = 4
    size: int = 96
    seed: int = 0
    model: Optional[Train] = None
    watch: bool = True                                                  # go on after the stop, so that the scorer sees what was missed
    label = property(lambda self: f"stages of {self.photo}")
    needs = property(lambda self: (self.model,) if self.model else ())
    cost = property(lambda self: self.copies * len(self.ratios) * (1 + self.mirrored) * self.steps * 0.037 * (self.size / 96) ** 2)

    def chain(self, y: Tensor, sigma: float, generator: torch.Generator) -> list[hybrid.Link]:
        """The links in the order of `ratios`."""
        rising = sorted(r for r in self.ratios if r)
        links = dict(zip(rising, noisier(y, sigma, rising, generator)))
        return [links.get(r, hybrid.Link(ddpm.step_of(fine_cosine(), sigma), 0.0, y)) for r in self.ratios]

    def execute(self, progress) -> dict:
        clean, generator, true = subject(self.photo, self.size), self.generator(f"{self.photo}/{self.task}"), TASKS[self.task] / 255
        y = corrupt(clean, self.noise, true, generator)
        sigma = self.belief * true if self.belief else estimate_sigma(y)
        source = clean if self.leak else y
        outcomes, curves, stages, seconds = [], {"psnr": [], "believed": [], "own": []}, [], 0.0
        clean, done = clean.to(DEVICE), 0
        for copy in range(self.copies):
            generator = self.generator(f"{self.photo}/{self.task}/stages {copy}")
            chain = [link._replace(q=link.q.to(DEVICE)) for link in self.chain(source, sigma, generator)]
            def fresh():
                return fresh_dip(generator, y.shape[-2:], widths=self.widths, skip=self.skip)
            penalty, over, began = self.penalty(y, sigma), False, time.perf_counter()
            for stage in hybrid.staged_fit(source.to(DEVICE), sigma, chain, fresh, self.steps, generator, mirrored=self.mirrored, warm=self.warm,
                                           patience=self.patience, watch=self.watch, penalty=penalty, amp=AMP):
                seconds += 0.0 if over else time.perf_counter() - began
                over = stage.stopped and stage.k == len(chain) - 1
                if stage.i == 1:
                    stages.append({"ratio": stage.link.S / sigma, "t": stage.link.t / fine_cosine().T, "curve": []})
                stages[-1]["curve"].append(metrics.psnr(stage.image, clean).item())
                stages[-1] |= {"best": stage.best, "link": stage.link, "step": stage.i if self.leak else stage.best_step}
                if stage.best_step == stage.i:
                    stages[-1]["believed"] = 10 * math.log10(1 / max(stage.value, 1e-6))
                for name, value in (("psnr", stages[-1]["curve"][-1]), ("believed", stage.value)):
                    curves[name].append(value)
                progress((copy + (stage.k + stage.i / self.steps) / len(self.ratios)) / self.copies, self.task)
                began = time.perf_counter()
            outcomes.append((stage.image, math.nan) if self.leak else (stage.blended, stage.expected))
        delivered = sum(image for image, _ in outcomes) / self.copies                                    # R(mean) = mean R − spread
        spread = sum((image - delivered).square().mean().item() for image, _ in outcomes) / self.copies
        expected = sum(risk for _, risk in outcomes) / self.copies - spread
        pictures = {"measured": y, "delivered": delivered, "last": stage.image, "clean": clean}
        for k, found in enumerate(stages):
            best, link = found.pop("best"), found.pop("link")
            target = link.q.clamp(0, 1)
            found |= {"gap": max(found["curve"]) - found["curve"][found["step"] - 1], "delivered": found["curve"][found["step"] - 1],
                      "own_psnr": metrics.psnr(best, target).item(), "own_ssim": metrics.ssim(best, target).item(), "ssim": score(best.cpu(), clean.cpu())["ssim"],
                      "curve": torch.tensor(found["curve"])}
            pictures |= {f"target {k}": link.q, f"stage {k}": best}
        return {"stages": stages, "curves": {k: torch.tensor(v) for k, v in curves.items()}, "expected": 10 * math.log10(1 / max(expected, 1e-6)),
                "pictures": {n: to_bytes(p) for n, p in pictures.items()}, "seconds": seconds, "sigma": sigma} | score(delivered.cpu(), clean.cpu())

    def penalty(self, y: Tensor, sigma: float):
        """A perceptual term: features of the photo model's first layers, of the image and of y, at y's own noise level. An adversarial
        term: a small critic, taught on the way to tell training photos from DIP's images, and DIP to please it."""
        if self.extra == "perceptual":
            network, (schedule, _) = self.model.network(), self.model.parts()
            network.load_state_dict(self.model.result()["ema"][1.0])
            t = torch.tensor([ddpm.step_of(schedule, sigma)], device=DEVICE)
            emb, scale = network.embed(ddpm.time_features(t, network.embed[0].in_features)).detach(), ddpm.at(schedule.alpha_bar.sqrt(), t, y.to(DEVICE))

            def features(image):
                return network.down[0](network.enter(scale * ddpm.to_diffusion(image)), emb)
            target = features(y.to(DEVICE)).detach()
            unit = sigma ** 2 / target.var().item()
            return lambda image, i: 0.3 * unit * nn.functional.mse_loss(features(image), target)
        if self.extra == "adversarial":
            torch.manual_seed(self.seed)
            critic = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 3)).to(DEVICE)
            optimiser, generator = torch.optim.Adam(critic.parameters(), 1e-3, (0.5, 0.9)), self.generator("critic")

            def penalty(image, i):
                real = photo_patches(training_photos(), generator, 1).to(DEVICE)
                loss = nn.functional.softplus(-critic(real)).mean() + nn.functional.softplus(critic(image.detach())).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                return 0.01 * sigma ** 2 * nn.functional.softplus(-critic(image)).mean()
            return penalty


# ------------------------------------------------------------------- runs: DIP and the diffusion model together

@dataclass(frozen=True)
class ModelError(Run):
    """v(t) of a trained model on its own kind of training pictures."""
    model: Train
    seed: int = 0
    label, needs, cost = "model error", property(lambda self: (self.model,)), 60.0

    def execute(self, progress) -> dict:
        (denoise, schedule), generator = self.model.denoiser(), self.generator()
        x0 = render_cats(draw_cats(generator, 64)) if self.model.data == "cats" else photo_patches(training_photos(), generator, 32)
        ts = [1, 10, 20, 40, 70, *range(100, schedule.T + 1, 100)]
        return {"v": hybrid.error_curve(denoise, schedule, x0.to(DEVICE), ts, generator)}


class Pixels(nn.Module):
    """Free pixels in place of a network: the prior that prefers nothing."""

    def __init__(self, image: Tensor):
        super().__init__()
        self.image = nn.Parameter(image.clone())

    def forward(self, z: Tensor) -> Tensor:
        return self.image


def classical_fill(name: str, y: Tensor, operator: dip.Operator, unseen: Tensor | float = 0.0) -> Tensor:
    """What can be had without any network: A⁺y; interpolation, biharmonic of what is missing or in `unseen`, then bicubic to the size
    of the picture; least total variation (A⁺y and this of all of y only)."""
    start = operator.pinv(y)
    if name == "pinv":
        return start
    if name == "fill":
        missing = (operator.A(torch.ones_like(start))[:, :1] * (1 - unseen) == 0)[0, 0].cpu().numpy()
        filled = inpaint_biharmonic(y[0].permute(1, 2, 0).cpu().numpy(), missing, channel_axis=-1) if missing.any() else y[0].permute(1, 2, 0).cpu().numpy()
        filled = torch.from_numpy(filled).float().permute(2, 0, 1)[None].to(y.device)
        return (nn.functional.interpolate(filled, size=start.shape[-2:], mode="bicubic") if filled.shape != start.shape else filled).clamp(0, 1)

    def variation(image, i):
        return 0.005 * ((image[..., 1:, :] - image[..., :-1, :]).abs().mean() + (image[..., 1:] - image[..., :-1]).abs().mean())
    *_, last = dip.fit(y, operator.A, Pixels(start), torch.zeros(1, 1, 1, 1, device=y.device), 400, torch.Generator(), penalty=variation)
    return last.image.clamp(0, 1)


def second_opinion(y: Tensor, operator: dip.Operator, unseen: Tensor) -> tuple[Tensor, float]:
    """Interpolation of all measurements, and the error on those kept back of interpolation without them."""
    return projection(classical_fill("fill", y, operator), y, operator), max(1e-9, hybrid.kept_error(classical_fill("fill", y, operator, unseen), y, operator, unseen))


def inside(entry: "Entry", y: Tensor, operator: dip.Operator, network, z: Tensor, chain: torch.Generator, t: int, held_out: float, opinion) -> hybrid.Refine:
    """What hybrid II does to every guess: refit DIP, fuse its picture with the second opinion by the errors on what was kept back."""
    again = hybrid.refit(y, operator.A, network, z, entry.refits, chain, range(1, t + 1), weight=entry.weight, amp=AMP)
    return again if opinion is None else hybrid.in_turn(again, hybrid.lean_on(*opinion, torch.full((t + 1,), held_out)))


class Entry(NamedTuple):
    """One way into the reverse process, and through it."""
    source: str = "dip"                             # who enters: "dip", "pinv", "fill", "tv", "other" (photo's DIP), or "noise"
    after: int = 0                                                              # DIP updates before; 0: as fixed for the task
    t: int = 0                                                                                  # the entrance; 0: by the rule
    steps: int = 8
    eta: float = 0.0
    refits: int = 20                                                                        # DIP updates at every step; 0: none
    weight: float = 0.1                                                              # of the model's guess in those updates
    fresh: bool = False                                                     # let an untrained DIP do them, not the brief one
    second: bool = True                                                     # after them, fuse with interpolation by inverse variance
    lean: bool = False                                                                 # fuse with f by inverse variance
    samples: int = 1
    consistent: bool = True


@dataclass(frozen=True)
class Enter(Run):
    """Hybrid II on some pictures: one brief DIP each, handed over to the reverse process in several ways."""
    names: tuple
    task: str
    model: Train
    entries: tuple
    size: int = 96
    widths: tuple = (32, 32, 32, 32)
    seed: int = 0
    start: int = 0                                                                  # another start of DIP and of the chain
    label = property(lambda self: f"enter {self.names[0]}")
    needs = property(lambda self: (self.model, ModelError(self.model)))
    cost = property(lambda self: len(self.names) * (0.25 if self.size == 32 else 1) * sum(
        1 + e.steps * (0.04 * e.samples + 0.026 * e.refits) for e in self.entries))

    def execute(self, progress) -> dict:
        found = []
        for i, name in enumerate(self.names):
            found.append(self.one(name, lambda done: progress((i + done) / len(self.names), self.task)))
        return {"rows": {n: f["rows"] for n, f in zip(self.names, found)}, "pictures": {n: f["pictures"] for n, f in zip(self.names, found)},
                "seconds": sum(row["chain_seconds"] for f in found for row in f["rows"])}

    def one(self, name: str, progress) -> dict:
        clean, y, operator, unseen = self.measured(name)
        (denoise, schedule), v = self.model.denoiser(), ModelError(self.model).result()["v"]
        stops = sorted({self.after(e) for e in self.entries})
        brief = self.brief(y, operator, unseen, clean.shape, stops, self.generator(f"{name}/{self.task}/start {self.start}"))
        other, rows, pictures, began = {}, [], {"measured": operator.pinv(y), "clean": clean}, time.perf_counter()
        opinion = second_opinion(y, operator, unseen)
        asking = time.perf_counter() - began
        for k, entry in enumerate(self.entries):
            f, state, held_out, spent = brief[self.after(entry)]
            began, brought = time.perf_counter(), not entry.fresh and (entry.source == "dip" or entry.refits > 0)     # does the brief DIP take part?
            fused = entry.refits > 0 and entry.second
            error = hybrid.together(held_out, opinion[1]) if fused else held_out
            if entry.source == "other":
                twin = self.names[0] if name.startswith("cat-") else next(v for v in views(TEST) if v.split("-")[0] != name.split("-")[0])
                if not other:
                    other |= self.brief(operator.A(subject(twin, self.size).to(DEVICE)), operator, 0 * unseen, clean.shape, [BRIEF[self.task]], self.generator(f"{twin}/start"))
                f = other[BRIEF[self.task]][0]
            elif entry.source != "dip":
                f = clean * 0 if entry.source == "noise" else classical_fill(entry.source, y, operator)
            t = schedule.T if entry.source == "noise" else entry.t or hybrid.enter_step(schedule, error, KAPPA)
            chain = self.generator(f"{name}/chain {k if entry.samples > 1 else 0} of {self.start}")
            consistent = hybrid.agree(y, operator, 0.0, v) if entry.consistent else hybrid.in_turn()
            hooks = [consistent]
            if entry.lean:
                hooks = [hybrid.lean_on(f, held_out, v), consistent]
            if entry.refits:
                network, z = fresh_dip(self.generator(f"{name}/{self.task}/start {self.start}"), clean.shape[-2:], widths=self.widths)
                if brought:
                    network.load_state_dict(state)
                hooks = [*hooks, inside(entry, y, operator, network, z, chain, t, held_out, opinion if fused else None), consistent]
            *_, last = hybrid.hand_over(f.expand(entry.samples, -1, -1, -1), denoise, schedule, t, entry.steps, chain, eta=entry.eta,
                                        refine=hybrid.in_turn(*hooks))
            images, seconds = ddpm.to_image(last.x), time.perf_counter() - began + asking * fused
            mean = images.mean(0, keepdim=True)
            rows.append({"psnr": float(np.mean([score(x[None].cpu(), clean.cpu())["psnr"] for x in images])), "t": t, "held_out": held_out,
                         "ssim": float(np.mean([score(x[None].cpu(), clean.cpu())["ssim"] for x in images])), "mean_psnr": score(mean.cpu(), clean.cpu())["psnr"],
                         "f_psnr": score(projection(f, y, operator).cpu(), clean.cpu())["psnr"], "evaluations": entry.steps * entry.samples,
                         "fused_psnr": score(((opinion[1] * projection(f, y, operator) + held_out * opinion[0]) / (held_out + opinion[1])).cpu(), clean.cpu())["psnr"],
                         "updates": self.after(entry) * (brought or entry.source == "other") + entry.refits * (entry.steps + 1),
                         "chain_seconds": seconds, "total_seconds": seconds + spent * brought, "to_f": (images - f).square().mean().sqrt().item(),
                         "diversity": (images - mean).square().mean().item() ** 0.5 * math.sqrt(2 * entry.samples / max(1, entry.samples - 1))})
            pictures[f"entry {k}"] = mean
            if entry.samples > 1:
                pictures[f"map {k}"] = 4 * images.std(0, keepdim=True).mean(1, keepdim=True).expand(-1, 3, -1, -1)
            progress((k + 1) / len(self.entries))
        return {"rows": rows, "pictures": {n: to_bytes(p) for n, p in pictures.items()}}

    def measured(self, name: str) -> tuple:
        """The clean picture, the same measurement of it as in Fit, and what of that no brief DIP will see."""
        clean, generator = subject(name, self.size).to(DEVICE), self.generator(f"{name}/{self.task}")
        y, operator = measure(self.task, clean, generator)
        return clean, y, operator, hybrid.kept_back(y, operator, generator)

    def after(self, entry: Entry) -> int:
        return entry.after or BRIEF[self.task]

    def brief(self, y, operator, unseen, shape, stops, generator) -> dict:
        """DIP updates → (average, weights, error on the measurements kept back, seconds)."""
        network, z = fresh_dip(generator, shape[-2:], widths=self.widths)
        found, spent, began = {}, 0.0, time.perf_counter()
        for step in dip.fit(y * (1 - unseen), lambda x: operator.A(x) * (1 - unseen), network, z, stops[-1], generator, amp=AMP):
            if step.i in stops:
                spent += time.perf_counter() - began
                weights = {n: w.clone() for n, w in network.state_dict().items()}
                found[step.i] = step.average, weights, hybrid.kept_error(step.average, y, operator, unseen), spent
                began = time.perf_counter()
        return found


@dataclass(frozen=True)
class Film(Run):
    """The guesses on the way down the chain: diffusion alone, a plain restart from a brief DIP, and hybrid II."""
    enter: Enter
    seed: int = 0
    label, cost = "film", 12.0
    needs = property(lambda self: self.enter.needs)

    def execute(self, progress) -> dict:
        run, name, entry = self.enter, self.enter.names[0], self.enter.entries[0]
        clean, y, operator, unseen = run.measured(name)
        (denoise, schedule), start, after = run.model.denoiser(), f"{name}/{run.task}/start {run.start}", run.after(entry)
        f, state, held_out, _ = run.brief(y, operator, unseen, clean.shape, [after], run.generator(start))[after]
        consistent, opinion = hybrid.agree(y, operator, 0.0, torch.zeros(schedule.T + 1)), second_opinion(y, operator, unseen)
        t, late = (hybrid.enter_step(schedule, error, KAPPA) for error in (held_out, hybrid.together(held_out, opinion[1])))
        network, z = fresh_dip(run.generator(start), clean.shape[-2:], widths=run.widths)
        network.load_state_dict(state)
        strips = {}
        for label, x, at, refits in (("diffusion alone", clean * 0, schedule.T, 0), ("plain restart", f, t, 0), ("hybrid II", f, late, entry.refits)):
            chain = run.generator(f"{name}/chain 0 of {run.start}")
            again = inside(entry, y, operator, network, z, chain, at, held_out, opinion) if refits else hybrid.in_turn()
            steps = hybrid.hand_over(x, denoise, schedule, at, entry.steps, chain, refine=hybrid.in_turn(consistent, again, consistent))
            frames = [(s.t, to_bytes(ddpm.to_image(s.x0_hat)), score(ddpm.to_image(s.x0_hat).cpu(), clean.cpu())["psnr"]) for s in steps]
            strips[label] = {"t": [a for a, _, _ in frames], "pictures": torch.cat([b for _, b, _ in frames]), "psnr": [c for _, _, c in frames]}
        return {"strips": strips}


def projection(f: Tensor, y: Tensor, operator: dip.Operator) -> Tensor:
    """f, made to agree with what was measured."""
    return f + operator.pinv(y - operator.A(f))


def keeping(run: Fit, picture: Tensor) -> Tensor:
    """A picture made from the run's measurement, made to agree with it unless it is noisy: everybody may keep the pixels that are known."""
    if TASKS[run.task]:
        return picture
    return projection(picture, *measure(run.task, photo_named(run.photo, run.size), run.generator(f"{run.photo}/{run.task}")))


@functools.cache
def agreeing(run: Fit, name) -> dict:
    """The score of a picture of a plain fit, by its name or by the step of a snapshot, with what was measured kept."""
    result = run.result()
    picture = result["snapshots"][name].float() if isinstance(name, int) else result["pictures"][name] / 255
    return score(keeping(run, picture), photo_named(run.photo, run.size))


def smoother(name: str, schedule: ddpm.Schedule):
    """A classical denoiser in the model's place, (xt, t) → x̂₀: total variation or non-local means at the level of noise of t."""
    def denoise(xt: Tensor, t: int) -> Tensor:
        sigma, image = ddpm.noise_level(schedule)[t].item(), ddpm.to_image(xt / schedule.alpha_bar[t].sqrt().item())[0].permute(1, 2, 0).cpu().numpy()
        found = denoise_tv_chambolle(image, weight=sigma, channel_axis=-1) if name == "tv" else \
            denoise_nl_means(image, 5, 6, h=0.6 * sigma, sigma=sigma, fast_mode=True, channel_axis=-1)
        return ddpm.to_diffusion(torch.from_numpy(np.ascontiguousarray(found)).float().permute(2, 0, 1)[None]).to(xt.device)
    return denoise


@dataclass(frozen=True)
class Guided(Run):
    """Hybrid III on one picture: the curve of its running average."""
    photo: str
    task: str
    steps: int
    model: Train
    strength: float = -1.0                                                                      # λ; negative: as fixed for the kind of task
    high: float = 1.0                                   # first and last step of the chain, in units of the step that fits the noise
    low: float = 1 / 3                                  # (noise-free: of NOISE_FREE's first step)
    order: str = "down"                                                                             # or "random": between the two
    asks: str = "y"                                 # the model is asked once, about a noisy photo itself; or "fit": again and again, about the
    refresh: int = 40                                                                                   # fit's images, as always without noise
    evaluations: int = 0                                                                # of the model each time; 0: as fixed, 1 or 8
    begin: int = -1                                                        # updates without the model; negative: as fixed for the kind of task
    at: float = 1.0                                                                          # how far the model was trained
    prior: str = "model"                                                                               # or "tv", "nlm"
    free: bool = False                                                                     # pixels in place of the network
    floor: float = 1.0                                                                     # of the misfit, in units of σ²; 0: none
    belief: float = 1.0
    size: int = 96
    seed: int = 0
    start: int = 0                                                                  # another start on the same measurement
    label = property(lambda self: f"guided {self.photo}")
    needs = property(lambda self: (self.model,))
    cost = property(lambda self: self.steps * (0.027 + 0.04 * (self.evaluations or 8) / self.refresh * (self.asks == "fit" or not TASKS[self.task])) * (self.size / 96) ** 2)

    def options(self, y: Tensor, denoise, schedule: ddpm.Schedule, sigma: float, noise: torch.Generator) -> dict:
        """When a guided fit asks the model, about what, from which step of the chain, and how much it listens."""
        levels, unit, once = ddpm.noise_level(schedule), ddpm.step_of(schedule, sigma) if sigma else NOISE_FREE["t"], sigma and self.asks == "y"
        high, low = (max(1, round(unit * x)) for x in ((1, 1) if once else (self.high, self.low)))
        strength = self.strength if self.strength >= 0 else STRENGTH[self.asks] if sigma else NOISE_FREE["strength"]
        evaluations = self.evaluations or (1 if once else 8)

        def at(u):
            return round(high + (low - high) * (u if self.order == "down" else float(torch.rand(1, generator=noise))))

        def guess(image, t):
            return ddpm.denoise_photo(denoise, schedule, y, sigma, evaluations)
        return {"ts": at, "weight": lambda t: strength * ((sigma / levels[t].item()) ** 2 if sigma else 1.0), "noise": noise, "floor": self.floor * sigma ** 2,
                "refresh": self.steps if once else self.refresh, "evaluations": evaluations, "guess": guess if once else None,
                "begin": self.begin if self.begin >= 0 else 0 if sigma else min(NOISE_FREE["begin"], self.steps // 3)}

    def execute(self, progress) -> dict:
        clean, sigma = subject(self.photo, self.size).to(DEVICE), self.belief * TASKS[self.task] / 255
        y, operator = measure(self.task, clean, self.generator(f"{self.photo}/{self.task}"))
        denoise, schedule = self.model.denoiser(self.at)
        denoise = denoise if self.prior == "model" else smoother(self.prior, schedule)
        start, noise, asked = self.generator(f"{self.photo}/{self.task}/start {self.start}"), self.generator(f"{self.photo}/guide {self.start}"), []
        network, z = (Pixels(operator.pinv(y)), torch.zeros(1, 1, 1, 1, device=DEVICE)) if self.free else fresh_dip(start, clean.shape[-2:])

        def counted(xt, t):
            asked.append(t)
            return denoise(xt, t)

        curve, seconds, began = [], 0.0, time.perf_counter()
        for step in hybrid.guided_fit(y, operator.A, network, z, self.steps, start, counted, schedule, amp=None if self.free else AMP,
                                      **self.options(y, counted, schedule, sigma, noise)):
            seconds += time.perf_counter() - began
            image = step.average if sigma else projection(step.average, y, operator)
            curve.append(metrics.psnr(image.clamp(0, 1), clean).item())
            progress(step.i / self.steps, self.task)
            began = time.perf_counter()
        return {"curve": torch.tensor(curve), "seconds": seconds, "evaluations": len(asked),
                "pictures": {"measured": to_bytes(operator.pinv(y)), "last": to_bytes(image), "clean": to_bytes(clean)}} | score(image.cpu(), clean.cpu())


@dataclass(frozen=True)
class Diffuse(Run):
    """The diffusion model alone on one noisy photo: one step, a few steps, a mirrored pair; and its blend with a mirrored pair of DIPs."""
    staged: Staged
    model: Train
    steps: int = 4
    label = property(lambda self: f"diffuse {self.staged.photo}")
    needs, cost = property(lambda self: (self.staged, self.model, ModelError(self.model))), 1.0

    def execute(self, progress) -> dict:
        run, stored = self.staged, self.staged.result()
        clean, sigma, generator = subject(run.photo, run.size), TASKS[run.task] / 255, run.generator(f"{run.photo}/{run.task}")
        y = corrupt(clean, run.noise, sigma, generator)                                              # as in Staged, and its link
        link, = run.chain(y, sigma, run.generator(f"{run.photo}/{run.task}/stages 0"))
        denoise, schedule = self.model.denoiser()

        def alone(q, level, steps):
            return ddpm.denoise_photo(denoise, schedule, q.to(DEVICE), level, steps).cpu()
        found, seconds = {}, {}
        for name, steps in (("one step", 1), ("diffusion", self.steps)):
            began = time.perf_counter()
            found[name], seconds[name] = alone(y, sigma, steps), time.perf_counter() - began
        began = time.perf_counter()
        pair = [alone(q, math.hypot(sigma, link.S), self.steps) for q in (link.q, hybrid.mirror(y, link).q)]
        found["diffusion pair"], f = sum(pair) / 2, stored["pictures"]["delivered"] / 255
        risks = 10 ** (-stored["stages"][-1]["believed"] / 10), hybrid.pair_risk(*pair, y, sigma, link)
        found["blend"], expected = hybrid.blend(f, risks[0], found["diffusion pair"], risks[1])
        seconds["diffusion pair"] = time.perf_counter() - began
        seconds["blend"] = seconds["half"] = seconds["diffusion pair"] + stored["seconds"]
        found["half"] = (f + found["diffusion pair"]) / 2
        v, unit, ts = ModelError(self.model).result()["v"], ddpm.step_of(schedule, sigma), {}
        v = v * (max(risks[1], 1e-6) / v[unit].item())                                 # this photo's own scale of the model's error
        for name, t in {"rule": hybrid.enter_step(schedule, risks[0]), **{f"t{t}": t for t in (10, 20, 40, 80, 160, 320, schedule.T)}}.items():
            for lean in (False, True) if name == "rule" else (False,):
                began, hook = time.perf_counter(), hybrid.agree(y.to(DEVICE), dip.identity(), sigma, v)
                hook = hybrid.in_turn(hybrid.lean_on(f.to(DEVICE), risks[0], v), hook) if lean else hook
                *_, last = hybrid.hand_over(f.to(DEVICE), denoise, schedule, t, 8, run.generator(f"{run.photo}/chain"), refine=hook)
                name, ts[name] = name + " lean" * lean, t
                found[name], seconds[name] = ddpm.to_image(last.x).cpu(), time.perf_counter() - began + stored["seconds"]
        return {"rows": {n: score(x, clean) | {"seconds": seconds[n]} for n, x in found.items()}, "entrance": ts["rule"],
                "expected": 10 * math.log10(1 / max(expected, 1e-6)), "believed": 10 * math.log10(1 / max(risks[1], 1e-6)),
                "weight": float((found["blend"] - found["diffusion pair"]).norm() / (f - found["diffusion pair"]).norm().clamp(min=1e-9)),
                "pictures": {n: to_bytes(x) for n, x in (found | {"measured": y, "clean": clean}).items()}}


@dataclass(frozen=True)
class HandOverCats(Run):
    """DIP's pictures of 64 cats, handed over to a model at the step `t`, plainly: with how little training is it good enough?"""
    model: Train
    t: int
    eye: LearnToSee
    at: float = 1.0
    n: int = 64
    task: str = "bigblock"
    seed: int = 0
    label, cost = "hand over cats", 12.0
    needs = property(lambda self: (self.model, self.eye, BriefCats(self.task, self.n)))

    def execute(self, progress) -> dict:
        (denoise, schedule), brief = self.model.denoiser(self.at), BriefCats(self.task, self.n).result()
        clean = torch.cat([subject(f"cat-{i}", 32) for i in range(self.n)])
        _, operator = measure(self.task, clean[:1], torch.Generator())
        y = operator.A(clean)
        began = time.perf_counter()
        *_, last = hybrid.hand_over(brief["f"].to(DEVICE), denoise, schedule, self.t, 8, self.generator(),
                                    refine=hybrid.agree(y.to(DEVICE), operator, 0.0, torch.zeros(schedule.T + 1)))
        images = ddpm.to_image(last.x).clamp(0, 1).cpu()
        seconds, found = time.perf_counter() - began, examine(self.eye.eye(), images, torch.zeros(math.prod(CAT_FACTORS.values())))
        *_, wild = ddpm.ddim(denoise, schedule, torch.randn(32, 3, 32, 32, generator=self.generator()).to(DEVICE), 20, self.generator())
        lost = examine(self.eye.eye(), ddpm.to_image(wild.x).clamp(0, 1).cpu(), torch.zeros(math.prod(CAT_FACTORS.values())))
        return {"psnr": metrics.psnr(images, clean).tolist(), "fidelity": found["fidelity"], "features": found["features"], "seconds": seconds,
                "from_noise": lost["fidelity"]}


@dataclass(frozen=True)
class BriefCats(Run):
    """DIP for a hundred updates on each of n damaged cats."""
    task: str
    n: int = 64
    seed: int = 0
    label, cost = "brief DIP of cats", property(lambda self: 1.0 * self.n)

    def execute(self, progress) -> dict:
        images, began = [], time.perf_counter()
        for i in range(self.n):
            clean, generator = subject(f"cat-{i}", 32).to(DEVICE), self.generator(f"cat-{i}/{self.task}")
            y, operator = measure(self.task, clean, generator)
            network, z = fresh_dip(generator, clean.shape[-2:])
            *_, last = dip.fit(y, operator.A, network, z, BRIEF[self.task], generator, amp=AMP)
            images.append(last.average.cpu())
            progress(i / self.n)
        return {"f": torch.cat(images), "seconds": time.perf_counter() - began}


# ------------------------------------------------------------------------------------------------ experiments

class Scale(NamedTuple):
    """Budgets. `quick` only proves that every part runs; its numbers mean nothing."""
    cats: int                                                                                  # training steps
    photos: int
    short: int                                                                 # … of a model that is an ablation
    eye: int
    samples: int                                                                           # cats per evaluation
    few: int                                                       # … where each costs up to 1,000 evaluations
    chain: dict                                                                     # eta → numbers of sampling steps
    test: tuple
    seeds: int
    fit: dict                                                                                   # task → DIP steps


SCALES = {
    "full": Scale(2600, 1250, 160, 400, 512, 40, {0: (5, 10, 20, 50, 100), 1: (5, 10, 20, 50, 100, 1000)}, TEST, 3,
                  {"denoise15": 800, "denoise25": 500, "denoise50": 320, "superres4": 360, "random80": 360, "block": 450, "bigblock": 450}),
    "quick": Scale(24, 12, 8, 60, 64, 4, {0: (5, 10, 20, 50, 100), 1: (5, 10, 20, 50, 100, 1000)}, TEST[:1], 1, dict.fromkeys(TASKS, 24)),
}
BUDGET = {"denoise15": 600, "denoise25": 425, "denoise50": 225, "superres4": 360, "random80": 300, "block": 450, "bigblock": 450}
TAU = 0.92                                             # Morozov's constant, for the running average, on the development photos
SNAPSHOTS = (25, 50, 100, 200, 300)                                                          # steps whose running average is kept
PLACES = (-0.1, 1.1)                            # training steps of the cats: the middle of the chain, where fur and mouth are decided
BRIEF = {"block": 100, "bigblock": 100, "superres4": 100, "random80": 200}                         # DIP updates before a handover
KAPPA = 4.0                                             # the entrance: σ_t over DIP's error on measurements that it has not seen
STRENGTH = {"y": 0.3, "fit": 0.4}                                       # λ of guided fits to noisy photos, by what the model is asked about
NOISE_FREE = {"t": 300, "strength": 0.1, "begin": 100}              # … to noise-free measurements: first step, λ, updates before
WMV, EMV = (80, 50), (0.05, 50, 50)         # window or weight, patience, first step: rescaled from fits of thousands of steps


def views(names) -> list[str]:
    return [view for name in names for view in crops(name)]


def wholes(scale: Scale) -> list[str]:
    return [view for view in views(scale.test) if view.endswith("whole")]


def interval(values) -> dict:
    """Mean and 95 % bootstrap interval of the mean (2,000 resamples, fixed seed)."""
    values = np.asarray(list(values), float)
    means = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def show(v: dict, digits: int = 2) -> str:
    return f"{v['mean']:.{digits}f} [{v['low']:.{digits}f}, {v['high']:.{digits}f}]"


def table(header, rows) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def share(count: int, n: int, fair: float) -> dict:
    """count / n relative to its fair value, with Wilson's 95 % interval."""
    z, p = 1.96, count / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + s * half) / (1 + z * z / n) for s in (-1, 1))
    return {"mean": p / fair, "low": low / fair, "high": high / fair, "n": n}


class DDPM:
    """Does the model generate, and at what cost?"""

    def __init__(self, scale: Scale):
        s = self.scale = scale
        self.eye, self.cats, self.photos = LearnToSee(s.eye), Train("cats", s.cats, places=PLACES), Train("photos", s.photos)
        self.main = SampleCats(self.cats, self.eye, s.samples)
        self.floor = {n: RealCats(self.eye, n, seed=1) for n in {s.samples, s.samples // 5, s.few}}
        self.reference = RealCats(self.eye, 4 * s.samples, seed=2)
        self.grid = {(eta, k): SampleCats(self.cats, self.eye, s.few, k, float(eta)) for eta in s.chain for k in s.chain[eta]}
        self.budget = {at: SampleCats(self.cats, self.eye, s.samples // 5, at=at) for at in (1 / 8, 1 / 4, 1 / 2, 1.0)}
        self.raw = SampleCats(self.cats, self.eye, s.samples // 5, ema=False)
        variants = {"cosine, v": {}, "linear, v": {"schedule": "linear"}, "sigmoid, v": {"schedule": "sigmoid"}, "cosine, eps": {"head": "eps"},
                    "cosine, v, all steps alike": {"places": ()}}
        self.variants = {name: SampleCats(Train(**{"data": "cats", "steps": s.short, "places": PLACES} | change), self.eye, s.samples // 5)
                         for name, change in variants.items()}
        self.sheet = SamplePhotos(self.photos, steps=min(50, s.chain[0][-1]))
        settings = [(15, 1, 1.0), (25, 1, 1.0), (50, 1, 1.0), (25, 2, 1.0), (25, 10, 1.0), (25, 1, 1 / 8), (25, 1, 1 / 4), (25, 1, 1 / 2)]
        self.denoise = {(sigma, k, at): [DenoisePhotos(self.photos, s.test, sigma, k, at, seed=seed) for seed in range(s.seeds)]
                        for sigma, k, at in settings}

    @property
    def runs(self) -> list[Run]:
        return [self.main, *self.floor.values(), self.reference, *self.grid.values(), *self.budget.values(), self.raw,
                *self.variants.values(), self.sheet, *sum(self.denoise.values(), [])]

    def judge(self, result: dict, reference: dict) -> dict:
        """The measures of one sheet, without its pictures."""
        return {k: result[k] for k in ("n", "fidelity", "entropy", "pair_entropy", "seen", "seconds") if k in result} | {
            "frechet": metrics.frechet(result["features"], reference["features"]),
            "entropy_least": min(result["entropy"].values()), "held_out": share(result["held_out"], result["n"], HELD_OUT_SHARE)}

    def assemble(self) -> tuple[dict, dict]:
        reference = self.reference.result()
        floor = {n: self.judge(run.result(), reference) for n, run in self.floor.items()}
        main, raw = self.judge(self.main.result(), reference), self.judge(self.raw.result(), reference)
        grid = {k: self.judge(run.result(), reference) for k, run in self.grid.items()}
        budget = {k: self.judge(run.result(), reference) for k, run in self.budget.items()}
        variants = {k: self.judge(run.result(), reference) for k, run in self.variants.items()}
        trained = {k: t.result() for k, t in (("cats", self.cats), ("photos", self.photos))}
        seeds = {k: [run.result()["rows"] for run in runs] for k, runs in self.denoise.items()}
        rows = {k: {view: {m: float(np.mean([of[view][m] for of in found])) for m in found[0][view]} for view in found[0]} for k, found in seeds.items()}
        denoise = {k: {m: interval(r[m] for r in v.values()) for m in ("psnr", "ssim", "noisy_psnr", "seconds")} for k, v in rows.items()}
        few, fifth = self.scale.few, self.scale.samples // 5

        def row(name, m):
            return [name, m["n"], f"{m['frechet']:.2f}", f"{m['fidelity']:.3f}", f"{100 * m['entropy_least']:.1f} %",
                    f"{100 * m['pair_entropy']:.1f} %", show(m["held_out"])]
        columns = ["", "n", "Fréchet ↓", "fidelity ↓", "least factor entropy ↑", "pair entropy ↑", "unseen pairs / fair rate (1 is right)"]
        seconds = trained["cats"]["seconds"]
        tables = {
            "main": table(columns, [row("DDPM, DDIM 50 steps", main), row("real cats (floor)", floor[self.scale.samples])]),
            "samplers": table(["sampler", "evaluations", *columns[1:], "seconds per image"], [
                [("ancestral" if k == 1000 else "DDIM, η = 1") if eta else "DDIM, η = 0", k, *row("", m)[1:], f"{m['seconds'] / m['n']:.2f}"]
                for (eta, k), m in grid.items()] + [["real cats (floor)", "", *row("", floor[few])[1:], ""]]),
            "budget": table(["training steps", "seconds", *columns[1:]], [
                [round(at * self.cats.steps), round(at * seconds), *row("", m)[1:]] for at, m in budget.items()]
                + [["the last, without averaging", round(seconds), *row("", raw)[1:]], ["real cats (floor)", "", *row("", floor[fifth])[1:]]]),
            "variants": table(["schedule, prediction", *columns[1:]], [row(k, m) for k, m in variants.items()]),
            "denoise": table(["noise σ · 255", "method", "evaluations", "photos", "noisy PSNR", "PSNR, dB", "SSIM", "seconds"], [
                [sigma, "one step" if k == 1 else "DDIM", k, m["psnr"]["n"], f"{m['noisy_psnr']['mean']:.2f}", show(m["psnr"]), show(m["ssim"], 3),
                 f"{m['seconds']['mean']:.2f}"] for (sigma, k, at), m in denoise.items() if at == 1]),
            "photo_budget": table(["training steps", "seconds", "PSNR at σ = 25, dB"], [
                [round(at * self.photos.steps), round(at * trained["photos"]["seconds"]), show(denoise[25, 1, at]["psnr"])]
                for at in (1 / 8, 1 / 4, 1 / 2, 1.0)]),
        }
        values = {"main": main, "raw": raw, "accuracy": dict(zip(CAT_FACTORS, self.floor[self.scale.samples].result()["accuracy"])),
                  "floor": {"main": floor[self.scale.samples], "fifth": floor[fifth], "few": floor[few]},
                  "grid": {f"{'ancestral' if eta else 'ddim'}{k}": m for (eta, k), m in grid.items()},
                  "budget": {f"at{round(100 * at)}": m for at, m in budget.items()},
                  "variants": {re.sub(r"\W+", "_", k): m for k, m in variants.items()}, "variants_steps": self.scale.short,
                  "train": {k: {"seconds": t["seconds"], "steps": len(t["losses"]), "parameters": t["parameters"]} for k, t in trained.items()},
                  "seen_fair": float(trained["cats"]["seen"].float().mean()),
                  "denoise": {f"s{sigma}_k{k}_at{round(100 * at)}": m for (sigma, k, at), m in denoise.items()},
                  "photos": {f"{view.replace('-', '_')}": r for view, r in rows[25, 1, 1.0].items()}}
        return values, tables

    def figures(self, values: dict) -> dict:
        return {"cats": lambda: sheet(self.main.result()["images"], 8), "film": self.film, "schedules": schedules_figure,
                "sampling": lambda: self.sampling(values), "photo_samples": lambda: sheet(self.sheet.result()["images"], 8),
                "photo_denoising": self.denoising}

    def film(self):
        film = self.main.result()["film"].clamp(-1, 1)                                  # (moments, 2, 4, 3, 32, 32)
        strip = film.permute(2, 1, 0, 3, 4, 5)[:2].reshape(-1, 3, 32, 32)
        return sheet(to_bytes(ddpm.to_image(strip)), len(film))

    def sampling(self, values: dict):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
        for ax, measure_name in zip(axes, ("frechet", "fidelity")):
            for eta, label, name in ((0, "DDIM, η = 0", "ddim"), (1, "η = 1 (last: ancestral)", "ancestral")):
                ax.plot(self.scale.chain[eta], [values["grid"][f"{name}{k}"][measure_name] for k in self.scale.chain[eta]], "o-", label=label)
            ax.axhline(values["floor"]["few"][measure_name], color="k", ls=":", label="real cats")
            ax.set(xscale="log", ylim=(0, None), xlabel="network evaluations", title=f"{measure_name.replace('frechet', 'Fréchet distance')} ↓")
        axes[0].legend()
        spent = [at * values["train"]["cats"]["seconds"] for at in self.budget]
        axes[2].plot(spent, [values["budget"][f"at{round(100 * at)}"]["frechet"] for at in self.budget], "o-", label="averaged weights")
        axes[2].plot(spent[-1:], [values["raw"]["frechet"]], "s", label="last weights")
        axes[2].axhline(values["floor"]["fifth"]["frechet"], color="k", ls=":", label="real cats")
        axes[2].set(ylim=(0, None), xlabel="training, seconds on one core", title="Fréchet distance ↓")
        axes[2].legend()
        return figure

    def denoising(self):
        pictures = self.denoise[25, 1, 1.0][0].result()["pictures"]
        return panels([[scored("noisy", pictures[v][0], pictures[v][2]), scored("one step", pictures[v][1], pictures[v][2]), (pictures[v][2], v)] for v in wholes(self.scale)], transpose=True)


RULES = {"budget": "fixed budget", "wmv": "ES-WMV, rescaled", "emv": "ES-EMV, rescaled", "wmv_published": "ES-WMV, W 100, P 1000",
         "emv_published": "ES-EMV, P 1000", "discrepancy": "discrepancy, τ = 1", "discrepancy_tuned": f"discrepancy, τ = {TAU}", "held_out": "held-out pixels",
         "sure": "Monte-Carlo SURE"}


class DIP:
    """What does the prior know, and when does it forget?"""
    TASKS = ("denoise15", "denoise25", "denoise50", "superres4", "random80", "block")

    def __init__(self, scale: Scale):
        self.scale, fit = scale, scale.fit
        self.main = {(task, view, seed): Fit(view, task, fit[task], seed=seed, unseen=0.0 if TASKS[task] else 0.05)
                     for task in self.TASKS for view in views(scale.test) for seed in range(scale.seeds if task == "denoise25" else 1)}
        self.held_out = {(task, view, 0): Fit(view, task, fit[task], unseen=0.05) for task in self.TASKS if TASKS[task] for view in views(scale.test)}
        changes = {"as chosen": {}, "bilinear, reflected borders": {"upsample": "bilinear", "padding": "reflect", "steps": 2 * fit["denoise25"]},
                   "3 scales": {"widths": (32,) * 3}, "width 16": {"widths": (16,) * 4},
                   "no skips": {"skip": 0}, "no jitter": {"jitter": 0.0}}
        self.ablation = {(name, view): Fit(**{"photo": view, "task": "denoise25", "steps": fit["denoise25"], "size": 64, **change})
                         for name, change in changes.items() for view in wholes(scale)}

    @property
    def runs(self) -> list[Run]:
        return [*self.main.values(), *self.held_out.values(), *self.ablation.values()]

    @staticmethod
    @functools.cache
    def outcome(run: Fit) -> dict:
        """Per rule: the step it chose, the PSNR of the running average there, and how far average and iterate are from their own peaks."""
        result = run.result()
        curve, iterates, clean = result["curves"]["average_psnr"], result["curves"]["psnr"], result["pictures"]["clean"] / 255
        best = {name: i or len(curve) for name, i in result["best"].items()} | {"oracle": int(curve.argmax()) + 1, "last": len(curve)}
        found = {}
        for name, i in best.items():
            picture = result["pictures"]["last" if i == len(curve) else name] / 255
            found[name] = {"psnr": curve[i - 1].item(), "ssim": metrics.ssim(picture, clean).item(), "gap": float(curve.max() - curve[i - 1]),
                           "iterate": iterates[i - 1].item(), "iterate_gap": float(iterates.max() - iterates[i - 1]), "step": i,
                           "fired": name in result["stopped"], "seconds": result["seconds"] * result["stopped"].get(name, len(curve)) / len(curve)}
        return found | {"measured": {"psnr": score(result["pictures"]["measured"] / 255, clean)["psnr"]},
                        "peak": {"psnr": iterates.max().item(), "step": int(iterates.argmax()) + 1}}

    def assemble(self) -> tuple[dict, dict]:
        outcomes = {k: self.outcome(run) for k, run in self.main.items()}
        held = {k: self.outcome(run) for k, run in self.held_out.items()}
        ablation = {k: self.outcome(run) for k, run in self.ablation.items()}

        def over_views(task, rule, key, found=outcomes):
            """One number per photo (its seeds averaged), then the interval over photos."""
            of = {}
            for (t, view, _), o in found.items():
                if t == task and rule in o:
                    of.setdefault(view, []).append(o[rule][key])
            return interval(np.mean(v) for v in of.values())
        tasks, rules = {}, {}
        for task in self.TASKS:
            chosen = "budget" if TASKS[task] else "held_out"
            wanted = {"measured": ("measured", "psnr"), "delivered": (chosen, "psnr"), "delivered_ssim": (chosen, "ssim"), "seconds": (chosen, "seconds"),
                      "oracle": ("oracle", "psnr"), "oracle_step": ("oracle", "step"), "last": ("last", "psnr"),
                      "peak": ("peak", "psnr"), "peak_step": ("peak", "step"), "iterate_last": ("last", "iterate")}
            tasks[task] = {name: over_views(task, *what) for name, what in wanted.items()}
            tasks[task] |= {"rule": chosen, "runs": sum(k[0] == task for k in outcomes),
                            "unfinished": sum(k[0] == task and o["oracle"]["step"] > 0.99 * self.main[k].steps for k, o in outcomes.items())}
            for rule in RULES:
                source = held if TASKS[task] and rule == "held_out" else outcomes
                seen = [o[rule] for k, o in source.items() if k[0] == task and rule in o]
                if seen:
                    gaps = [o["gap"] for o in seen]
                    rules[f"{task}_{rule}"] = {key: over_views(task, rule, key, source) for key in ("gap", "iterate_gap", "psnr", "iterate", "step")} | {
                        "median": float(np.median(gaps)), "p90": float(np.quantile(gaps, 0.9)), "worst": max(gaps), "runs": len(gaps),
                        "failures": float(np.mean([g > 1 for g in gaps])), "fired": float(np.mean([o["fired"] for o in seen]))}
        names = list(dict.fromkeys(name for name, _ in self.ablation))
        changes = {name: {m: interval(ablation[k][who][key] for k in ablation if k[0] == name)
                          for m, who, key in (("oracle", "oracle", "psnr"), ("step", "oracle", "step"), ("last", "last", "psnr"))}
                   | {"gain": interval(ablation[k]["oracle"]["psnr"] - ablation["as chosen", k[1]]["oracle"]["psnr"] for k in ablation if k[0] == name),
                      "ms": 1000 * float(np.mean([r.result()["seconds"] / r.steps for k, r in self.ablation.items() if k[0] == name])),
                      "parameters": next(r for k, r in self.ablation.items() if k[0] == name).result()["parameters"]} for name in names}
        tables = {
            "tasks": table(["task", "photos × seeds", "A⁺y, dB", "delivered, dB", "SSIM", "rule", "seconds", "*oracle*, dB", "*oracle* step", "still rising at the end", "at the end, dB"], [
                [task, f"{t['oracle']['n']} × {t['runs'] // t['oracle']['n']}", f"{t['measured']['mean']:.2f}", show(t["delivered"]),
                 show(t["delivered_ssim"], 3), RULES[t["rule"]], f"{t['seconds']['mean']:.0f}", show(t["oracle"]), f"{t['oracle_step']['mean']:.0f}",
                 f"{t['unfinished']} of {t['runs']}", f"{t['last']['mean']:.2f}"] for task, t in tasks.items()]),
            "rules": table(["task", "rule", "runs", "mean gap, dB", "median", "P90", "worst", "gap > 1 dB", "fired", "delivered, dB",
                            "the iterate, dB", "its gap"], [
                [task, RULES[rule], r["runs"], show(r["gap"]), f"{r['median']:.2f}", f"{r['p90']:.2f}", f"{r['worst']:.2f}",
                 f"{100 * r['failures']:.0f} %", f"{100 * r['fired']:.0f} %", f"{r['psnr']['mean']:.2f}", f"{r['iterate']['mean']:.2f}",
                 f"{r['iterate_gap']['mean']:.2f}"]
                for task in self.TASKS for rule in RULES if (r := rules.get(f"{task}_{rule}"))]),
            "ablation": table(["change", "parameters", "*oracle*, dB", "gain, dB", "*oracle* step", "at the end, dB", "ms per step"], [
                [name, f"{c['parameters']:,}", show(c["oracle"]), show(c["gain"]), f"{c['step']['mean']:.0f}", f"{c['last']['mean']:.2f}", f"{c['ms']:.0f}"]
                for name, c in changes.items()])}
        return {"tasks": tasks, "rules": rules, "ablation": {re.sub(r"\W", "_", n): c for n, c in changes.items()}}, tables

    def figures(self, values: dict) -> dict:
        return {"rise_and_fall": self.rise_and_fall, "restored": self.restored, "ablation": self.ablation_curves}

    def rise_and_fall(self):
        tasks = self.TASKS
        figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
        for ax, task in zip(axes.flat, tasks):
            view = views(self.scale.test)[len(self.scale.test)]
            result = self.main[task, view, 0].result()
            curve = result["curves"]["average_psnr"]
            ax.plot(range(1, len(curve) + 1), result["curves"]["psnr"], lw=0.6, color="0.6", label="iterate")
            ax.plot(range(1, len(curve) + 1), curve, color="k", label="running average")
            for mark, (rule, i) in zip("sD^v<>PX", result["best"].items()):
                if i:
                    ax.plot(i, curve[i - 1], mark, ms=7, alpha=0.8, label=RULES[rule])
            ax.plot(int(curve.argmax()) + 1, curve.max(), "*", ms=14, mfc="gold", mec="k", label="oracle")
            ax.set(title=f"{view}: {task}", xlabel="DIP steps", ylabel="PSNR, dB")
            ax.set_ylim(float(curve.max()) - 9, float(curve.max()) + 1)
            ax.legend(fontsize=7)
        return figure

    def restored(self):
        columns = []
        for task, view in zip(self.TASKS, views(self.scale.test)[::2] * 2):
            pictures, rule = self.main[task, view, 0].result()["pictures"], "budget" if TASKS[task] else "held_out"
            named = {task: "measured", RULES[rule]: rule, "at the end": "last"}
            columns.append([*(scored(label, pictures[name], pictures["clean"]) for label, name in named.items()), (pictures["clean"], view)])
        return panels(columns, transpose=True)

    def ablation_curves(self):
        figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for name in dict.fromkeys(name for name, _ in self.ablation):
            curves = torch.stack([r.result()["curves"]["average_psnr"] for k, r in self.ablation.items() if k[0] == name])
            ax.plot(range(1, curves.shape[1] + 1), curves.mean(0), label=name, lw=2.5 if name == "as chosen" else 1.2)
        ax.set(xlabel="DIP steps", ylabel="PSNR of the running average, dB", ylim=(float(curves.mean(0).max()) - 6, None))
        ax.legend(fontsize=8)
        return figure


def by_photo(values: dict) -> dict:
    """{(…, photo, seed): number} → interval over photos, seeds averaged first."""
    of = {}
    for (*_, view, _), value in values.items():
        of.setdefault(view, []).append(value)
    return interval(np.mean(v) for v in of.values())


def spread(values) -> dict:
    """The tail of a list of gaps in dB."""
    values = list(values)
    return {"median": float(np.median(values)), "p90": float(np.quantile(values, 0.9)), "worst": max(values), "runs": len(values),
            "failures": float(np.mean([v > 1 for v in values]))}


class Stop:
    """Can noise stages tell DIP when to stop?"""

    TASKS = ("denoise15", "denoise25", "denoise50")

    def __init__(self, scale: Scale):
        self.scale, fit = scale, scale.fit
        keys = [(task, view, seed) for task in self.TASKS for view in views(scale.test) for seed in range(min(2, scale.seeds) if task == "denoise25" else 1)]
        self.main = {(task, view, seed): Staged(view, task, round(1.16 * fit[task]), seed=seed) for task, view, seed in keys}
        self.plain = {k: DIP(scale).main[k] for k in keys}
        self.held_out, self.sure = DIP(scale).held_out, {k: Sure(run) for k, run in self.plain.items() if k[2] == 0}
        self.twin = {view: Fit(view, "denoise25", fit["denoise25"], start=1) for view in views(scale.test)}
        four, slow = (2.0, 1.0, 0.5, 0.25), {"mirrored": False, "warm": True}
        photos = Train("photos", scale.photos)
        changes = {
            "as chosen: one mirrored pair, S = σ/4": {},
            "S = σ/50": {"ratios": (0.02,)}, "S = σ/10": {"ratios": (0.1,)}, "S = σ/2": {"ratios": (0.5,)}, "S = σ": {"ratios": (1.0,)},
            "S = 2σ": {"ratios": (2.0,)}, "two pairs, S = σ, σ/4": {"ratios": (1.0, 0.25)}, "four pairs, S = 2σ … σ/4": {"ratios": four},
            "one network, S = σ/4": {"mirrored": False}, "one network, S = σ/2": {"ratios": (0.5,), "mirrored": False},
            "calibrate on S = σ/2, refit y": {"ratios": (0.5, 0.0), "mirrored": False}, "no stages, τ = 1": {"ratios": (0.0,), "mirrored": False},
            "four stages, warm, heavy to light": {"ratios": four, **slow}, "… light to heavy": {"ratios": four[::-1], **slow},
            "… shuffled": {"ratios": (0.5, 2.0, 0.25, 1.0), **slow}, "… equal steps of S": {"ratios": (2.0, 1.42, 0.83, 0.25), **slow},
            "… equal steps of t, linear schedule": {"ratios": equal_steps(ddpm.linear, 4), **slow},
            "… equal steps of t, cosine schedule": {"ratios": equal_steps(ddpm.cosine, 4), **slow},
            "patience of 30": {"patience": 30}, "never stopped": {"patience": 10 ** 6}, "two chains averaged": {"copies": 2},
            "3 scales": {"widths": (32,) * 3}, "width 16": {"widths": (16,) * 4}, "no skips": {"skip": 0},
            "σ believed × 0.7": {"belief": 0.7}, "σ believed × 1.3": {"belief": 1.3}, "σ estimated": {"belief": 0.0},
            "noise cut to [0, 1]": {"noise": "clipped"}, "Poisson noise": {"noise": "poisson"}, "salt-and-pepper noise": {"noise": "salt and pepper"},
            "perceptual term": {"extra": "perceptual", "model": photos}, "adversarial term": {"extra": "adversarial"},
            "32 × 32 pixels": {"size": 32}, "128 × 128 pixels": {"size": 128, "steps": round(1.8 * fit["denoise25"])},
            "LEAK: stages of the clean image": {"ratios": (1.0, 0.5, 0.25, 0.1), "leak": True, "patience": 10 ** 6, "steps": fit["denoise25"] // 4, **slow}}
        whole = wholes(scale)
        self.ablation = {(name, view, 0): Staged(**{"photo": view, "task": "denoise25", "steps": fit["denoise25"], "size": 64} | change)
                         for name, change in changes.items() for view in whole}
        self.ablation |= {("Self-diffusion's stages", view, 0): SelfDiffusion(view, "denoise25", fit["denoise25"], size=64) for view in whole}
        self.early = 3 * fit["denoise25"] // 10                                           # a step at which the meters of all sizes are compared
        self.large = {("large", view, 0): Staged(view, "denoise25", self.early, size=256) for view in whole}
        self.small = {(view, 0): Fit(view, "denoise25", fit["denoise25"], size=64) for view in whole}
        self.changed = {(name, view): run for (name, view), run in DIP(scale).ablation.items() if name in changes}         # plain DIP with that network
        self.alien = {name for name, change in changes.items() if {"noise", "size"} & set(change)}           # no plain fit to compare with

    @property
    def runs(self) -> list[Run]:
        return [*self.main.values(), *self.plain.values(), *self.held_out.values(), *self.sure.values(), *self.twin.values(), *self.ablation.values(),
                *self.small.values(), *self.changed.values(), *self.large.values()]

    def rival(self, rule: str, task: str) -> dict:
        """(task, photo, seed) → what a rule did on its fit, which is the plain one but for held-out pixels, and the best step there."""
        fits, found = self.held_out if rule == "held_out" else self.plain, {}
        for k in (k for k in (self.sure if rule == "sure" else fits) if k[0] == task):
            outcome = DIP.outcome(fits[k])
            if rule == "sure":
                step, curves = self.sure[k].result()["step"], fits[k].result()["curves"]
                average, iterates = curves["average_psnr"], curves["psnr"]
                outcome = outcome | {"sure": {"step": step, "psnr": average[step - 1].item(), "gap": float(average.max() - average[step - 1]),
                                              "iterate_gap": float(iterates.max() - iterates[step - 1])}}
            found[k] = outcome[rule] | {"late": abs(outcome[rule]["step"] - outcome["oracle"]["step"])}
        return found

    def assemble(self) -> tuple[dict, dict]:
        plain = {k: DIP.outcome(run) for k, run in self.plain.items()}
        twin = {v: run.result() for v, run in self.twin.items()}
        main = {k: self.digest(run.result()) for k, run in self.main.items()}
        values, rows, versus = {}, [], []
        for task in self.TASKS:
            keys = [k for k in main if k[0] == task]
            def over(number):
                return by_photo({k: number(k) for k in keys})
            found = values[task] = {m: over(lambda k: main[k][m]) for m in ("gap", "psnr", "ssim", "expected", "error", "step")} | {
                "late": over(lambda k: abs(main[k]["late"]))} | spread(main[k]["gap"] for k in keys)
            found |= {"error_size": over(lambda k: abs(main[k]["error"])), "oracle": over(lambda k: plain[k]["oracle"]["psnr"]), "gain": over(lambda k: main[k]["psnr"] - plain[k]["oracle"]["psnr"]),
                      "within": float(np.mean([abs(main[k]["error"]) < 0.5 for k in keys])),
                      "within_before": float(np.mean([abs(main[k]["believed"]) < 0.5 for k in keys])),
                      "updates": over(lambda k: 2 * min(main[k]["step"] + self.main[k].patience, self.main[k].steps) / plain[k]["oracle"]["step"]),
                      "cost": over(lambda k: main[k]["seconds"] / (self.plain[k].result()["seconds"] * plain[k]["oracle"]["step"] / self.plain[k].steps))}
            rows.append([task, "**mirrored pair**", found["runs"], show(found["gap"], 3), *(f"{found[m]:.2f}" for m in ("median", "p90", "worst")),
                         f"{100 * found['failures']:.0f} %", f"{found['late']['mean']:.0f}", show(found["psnr"]), "", ""])
            for rule in RULES:
                rival = self.rival(rule, task)
                def against(number):
                    return by_photo({k: number(k) for k in rival})
                tail, wins = spread(r["gap"] for r in rival.values()), float(np.mean([main[k]["psnr"] > r["psnr"] for k, r in rival.items()]))
                found[rule] = {"gap": against(lambda k: rival[k]["gap"]), "gaps": against(lambda k: rival[k]["gap"] - main[k]["gap"]), "wins": wins,
                               "iterate_gaps": against(lambda k: rival[k]["iterate_gap"] - main[k]["gap"]), "psnr": against(lambda k: rival[k]["psnr"]),
                               "better": against(lambda k: main[k]["psnr"] - rival[k]["psnr"])} | tail
                rows.append([task, RULES[rule], tail["runs"], show(found[rule]["gap"], 3), *(f"{tail[m]:.2f}" for m in ("median", "p90", "worst")), f"{100 * tail['failures']:.0f} %",
                             f"{against(lambda k: rival[k]['late'])['mean']:.0f}", show(found[rule]["psnr"]), show(found[rule]["better"]), f"{100 * wins:.0f} %"])
        keys = [("denoise25", view, 0) for view in twin]
        for name, label in (("oracle", "*oracle* of each"), ("discrepancy_tuned", RULES["discrepancy_tuned"])):
            of = {k: score((self.plain[k].result()["pictures"][name] / 255 + twin[k[1]]["pictures"][name] / 255) / 2, twin[k[1]]["pictures"]["clean"] / 255)["psnr"]
                  for k in keys}
            values[f"two_{name}"] = {"psnr": by_photo(of), "better": by_photo({k: main[k]["psnr"] - of[k] for k in keys})}
            versus.append([f"two plain fits averaged, {label}", show(values[f"two_{name}"]["psnr"]), show(values[f"two_{name}"]["better"])])
        base = {k[1:]: self.digest(run.result()) for k, run in self.ablation.items() if k[0] == next(iter(self.ablation))[0]}
        small = {k: DIP.outcome(run) for k, run in self.small.items()}
        ablation = {}
        for name in dict.fromkeys(k[0] for k in self.ablation):
            runs = {k: self.digest(run.result()) for k, run in self.ablation.items() if k[0] == name}
            known = all(math.isfinite(r["error"]) for r in runs.values())
            oracle = {k: (DIP.outcome(self.changed[name, k[1]]) if (name, k[1]) in self.changed else small[k[1:]])["oracle"]["psnr"] for k in runs}
            ablation[name] = {m: by_photo({k: r[m] for k, r in runs.items()}) for m in ("gap", "psnr", "last", "seconds")} | {
                "error": by_photo({k: r["error"] for k, r in runs.items()}) if known else None,
                "gain": None if name in self.alien else by_photo({k: r["psnr"] - oracle[k] for k, r in runs.items()}), "worst": max(r["gap"] for r in runs.values()),
                "cost": by_photo({k: r["seconds"] / base[k[1:]]["seconds"] for k, r in runs.items()})}
        sizes = {}
        for size in (32, 64, 96, 128, 256):
            runs = [r for r in (*self.ablation.values(), *self.main.values(), *self.large.values()) if isinstance(r, Staged) and r.size == size and
                    replace(r, steps=0, seed=0, size=0) == Staged(r.photo, "denoise25", 0, size=0)]
            curves = [r.result()["curves"] for r in runs]
            misses = [c["believed"][self.early - 1].item() - 0.1 ** (c["psnr"][self.early - 1].item() / 10) for c in curves]
            sizes[f"s{size}"] = {"runs": len(runs), "rms": float(np.mean(np.square(misses)) ** 0.5), "predicted": (25 / 255) ** 2 * math.sqrt(2 / (3 * size ** 2)),
                                 "gap": by_photo({("", r.photo, r.seed): r.result()["stages"][-1]["gap"] for r in runs})}
        tables = {
            "sizes": table(["pixels", "runs", f"RMS of meter − truth at step {self.early}, 10⁻⁴", "of which `σ²√(2/d)`, 10⁻⁴", "gap of the stop, dB"], [
                [f"{k[1:]} × {k[1:]}", x["runs"], f"{1e4 * x['rms']:.2f}", f"{1e4 * x['predicted']:.2f}", show(x["gap"], 3) if k != "s256" else "not reached"]
                for k, x in sizes.items()]),
            "main": table(["task", "rule", "runs", "mean gap, dB", "median", "P90", "worst", "gap > 1 dB", "steps off", "delivered, dB", "pair − rule, dB", "pair wins"], rows),
            "gain": table(["task", "*oracle* of plain DIP, dB", "mirrored pair, dB", "difference", "expected − true, dB", "within 0.5 dB", "updates / plain DIP's to its peak", "seconds / plain DIP's to its peak"], [
                [t, show(v["oracle"]), show(v["psnr"]), show(v["gain"]), show(v["error"]), f"{100 * v['within']:.0f} %", show(v["updates"]), show(v["cost"])]
                for t, v in ((t, values[t]) for t in self.TASKS)]),
            "control": table(["σ = 25, first seed", "PSNR, dB", "mirrored pair − it, dB"], versus),
            "ablation": table(["change", "gap, dB", "worst", "delivered, dB", "− *oracle* of plain DIP", "expected − true, dB", "seconds / as chosen"], [
                [name, show(a["gap"], 3), f"{a['worst']:.2f}", show(a["psnr"]), show(a["gain"]) if a["gain"] else "none",
                 show(a["error"]) if a["error"] else "none", f"{a['cost']['mean']:.1f}"] for name, a in ablation.items()]),
            "stages": table(["stage", "S / σ", "t / T", "delivered at step", "PSNR against its own noisy target", "SSIM against it", "PSNR by its error meter", "*true* PSNR", "*true* SSIM"], [
                [k, f"{x['ratio']:.2f}", f"{x['t']:.4f}", x["step"], f"{x['own_psnr']:.2f}", f"{x['own_ssim']:.3f}", f"{x['believed']:.2f}", f"{x['delivered']:.2f}", f"{x['ssim']:.3f}"]
                for k, x in enumerate(self.example().result()["stages"])])}
        ratio, deviation = hybrid.expected_error.__defaults__
        return {"main": values, "calibration": {"ratio": ratio, "spread": deviation}, "sizes": sizes,
                "small": {rule: by_photo({k: o[rule]["psnr"] for k, o in small.items()}) for rule in ("oracle", "last", "discrepancy_tuned")}, "ablation": {re.sub(r"\W+", "_", n).strip("_"): a for n, a in ablation.items()}}, tables

    def example(self) -> Staged:
        return next(run for (name, *_), run in self.ablation.items() if name.startswith("four pairs"))

    @staticmethod
    def digest(result: dict) -> dict:
        """What a staged fit delivered, how far its last stage was from the best step of that stage's curve, and whether it knew."""
        last = result["stages"][-1]
        return {"psnr": result["psnr"], "ssim": result["ssim"], "gap": last["gap"], "step": last["step"], "expected": result["expected"],
                "late": last["step"] - 1 - int(torch.as_tensor(last["curve"]).argmax()) if "curve" in last else 0,
                "error": result["expected"] - result["psnr"], "seconds": result["seconds"], "last": float(last.get("curve", [result["psnr"]])[-1]),
                "believed": last.get("believed", math.nan) - result["psnr"]}

    def figures(self, values: dict) -> dict:
        return {"meter": self.meter, "gaps": self.gaps, "calibration": self.calibration, "film": self.film}

    def meter(self):
        figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
        for ax, view in zip(axes, wholes(self.scale)):
            result = self.main["denoise25", view, 0].result()
            steps = range(1, len(result["curves"]["psnr"]) + 1)
            ax.plot(steps, result["curves"]["psnr"], color="k", label="truth")
            ax.plot(steps, -10 * result["curves"]["believed"].clamp(min=1e-5).log10(), color="C1", lw=1, label="estimated from the noisy photo alone")
            ax.axvline(result["stages"][0]["step"], color="C1", ls=":", label="delivered")
            ax.set(title=view, xlabel="DIP steps", ylim=(max(result["curves"]["psnr"]) - 9, max(result["curves"]["psnr"]) + 1))
        axes[0].set_ylabel("PSNR of the pair's picture, dB")
        axes[0].legend(fontsize=8)
        return figure

    def gaps(self):
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained", sharey=True)
        for ax, task in zip(axes, self.TASKS):
            rows = {"mirrored pair": [self.digest(r.result())["gap"] for k, r in self.main.items() if k[0] == task]}
            rows |= {RULES[rule]: [r["gap"] for r in self.rival(rule, task).values()] for rule in RULES}
            for i, gaps in enumerate(rows.values()):
                ax.plot([i + 0.25 * (j / len(gaps) - 0.5) for j in range(len(gaps))], [max(g, 1e-3) for g in gaps], "o", ms=4, alpha=0.6)
            ax.set_xticks(range(len(rows)), rows, rotation=30, ha="right", fontsize=8)
            ax.set(yscale="log", title=task)
        axes[0].set_ylabel("gap to the oracle of its own curve, dB")
        return figure

    def calibration(self):
        figure, ax = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
        for task in self.TASKS:
            found = [self.digest(r.result()) for k, r in self.main.items() if k[0] == task]
            ax.plot([f["expected"] for f in found], [f["psnr"] for f in found], "o", ms=5, alpha=0.7, label=task)
        low, high = ax.get_xlim()
        ax.plot([low, high], [low, high], "k-", lw=1)
        ax.fill_between([low, high], [low - 0.5, high - 0.5], [low + 0.5, high + 0.5], color="0.9", label="± 0.5 dB")
        ax.set(xlabel="expected PSNR (from the noisy photo alone), dB", ylabel="true PSNR, dB")
        ax.legend()
        return figure

    def film(self):
        result = self.example().result()
        columns = [[(result["pictures"][f"target {k}"], f"target, S = {x['ratio']:.2f} σ"), (result["pictures"][f"stage {k}"], f"stage {k}: {x['delivered']:.2f} dB")]
                   for k, x in enumerate(result["stages"])]
        return panels(columns + [[(result["pictures"]["measured"], "measured"), (result["pictures"]["delivered"], f"blended: {result['psnr']:.2f} dB")],
                                 [(result["pictures"]["clean"], "truth")] * 2], transpose=True)


def equal_steps(make, n: int, sigma: float = 25 / 255, high: float = 2.0, low: float = 0.25) -> tuple:
    """S / σ of n stages from `high` to `low` that are equally many steps of a schedule apart."""
    s = make(4000)
    ends = [ddpm.step_of(s, sigma * math.hypot(1, r)) for r in (high, low)]
    return tuple(round(math.sqrt(ddpm.noise_level(s)[round(t)].item() ** 2 / sigma ** 2 - 1), 2) for t in np.linspace(*ends, n))


def ways_at(scale: Scale, ways: dict) -> tuple:
    """The entries of a table of ways; on the quick scale as short as they can be."""
    if scale.seeds > 1:
        return tuple(ways.values())
    return tuple(w._replace(after=4 + (w.after > 100), steps=min(w.steps, 2), refits=min(w.refits, 1), samples=min(w.samples, 2)) for w in ways.values())


def cats_at(scale: Scale) -> int:
    return 64 if scale.seeds > 1 else 4


class Entrance:
    """How many steps of the chain does a brief DIP save, and at what quality?"""

    TASKS = ("block", "bigblock", "random80", "superres4")
    WAYS = {"hybrid II": Entry(), "plain restart": Entry(refits=0), "plain restart, guided by f": Entry(refits=0, lean=True),
            "restart from A⁺y": Entry("pinv", refits=0), "restart from interpolation": Entry("fill", refits=0), "restart from TV": Entry("tv", refits=0),
            "restart from another photo's DIP": Entry("other", refits=0), "hybrid II without interpolation": Entry(second=False),
            "diffusion alone, 10 steps": Entry("noise", steps=10, eta=0.85, refits=0), "diffusion alone, 50 steps": Entry("noise", steps=50, eta=0.85, refits=0),
            "DIP's picture at t = T": Entry(t=1000, refits=0)}
    GRID = {f"t = {t}": Entry(t=t) for t in (100, 200, 400, 700)}
    ABLATION = {**{f"{n} DIP updates before": Entry(after=n) for n in (25, 50, 200)}, **{f"{k} steps": Entry(steps=k) for k in (1, 2, 4)},
                "5 updates a step": Entry(refits=5), **{f"model's weight {w}": Entry(weight=w) for w in (0.03, 0.3, 1.0)},
                "η = 1": Entry(eta=1.0), "no data consistency": Entry(consistent=False),
                "A⁺y, fresh DIP inside": Entry("pinv", fresh=True, second=False), "refits and fusion with f": Entry(lean=True),
                **{f"8 samples, t = {t}": Entry(t=t, refits=0, samples=8) for t in (100, 300, 500, 700)},
                **{f"diffusion alone, {k} steps": Entry("noise", steps=k, eta=0.85, refits=0) for k in (5, 20, 100)},
                "diffusion alone, 50 steps, η = 0": Entry("noise", steps=50, refits=0)}
    NETWORKS = {"width 16": (16,) * 4, "3 scales": (32,) * 3}
    LONG = {"hybrid II": Entry()} | {f"diffusion alone, {k} steps": Entry("noise", steps=k, eta=0.85, refits=0) for k in (100, 300)}     # timed together
    CATS = ("block", "bigblock", "random80", "superres4")
    CAT_WAYS = ("hybrid II", "plain restart", "restart from A⁺y", "restart from interpolation", "diffusion alone, 10 steps", "diffusion alone, 50 steps")

    def __init__(self, scale: Scale):
        s = self.scale = scale
        photos, four = Train("photos", s.photos), wholes(s)
        ways = ways_at(s, self.WAYS)
        self.main = {(task, view): Enter((view,), task, photos, ways) for task in self.TASKS for view in views(s.test)}
        self.grid = {(task, view): Enter((view,), task, photos, ways_at(s, self.GRID)) for task in self.TASKS for view in four}
        self.ablation = {(task, view): Enter((view,), task, photos, ways_at(s, self.ABLATION)) for task in ("block", "superres4") for view in four}
        self.long = {(task, view): Enter((view,), task, photos, ways_at(s, self.LONG)) for task in self.TASKS for view in four}
        self.networks = {(name, task, view): Enter((view,), task, photos, ways_at(s, {"": Entry()}), widths=widths)
                         for name, widths in self.NETWORKS.items() for task in ("block", "superres4") for view in four}
        cats = Train("cats", s.cats, places=PLACES)
        self.cats = {task: Enter(tuple(f"cat-{i}" for i in range(cats_at(s))), task, cats,
                                 ways_at(s, {w: self.WAYS[w] for w in self.CAT_WAYS}), size=32) for task in self.CATS}
        self.eye, self.reference = LearnToSee(s.eye), RealCats(LearnToSee(s.eye), 4 * s.samples, seed=2)
        dips, stop = DIP(s), Stop(s)
        self.plain = {(task, view): dips.main[task, view, 0] if (task, view, 0) in dips.main else Fit(view, task, s.fit[task], unseen=0.05)
                      for task in self.TASKS for view in views(s.test)}
        self.films = {task: Film(self.main[task, four[0]]) for task in ("block", "superres4")}
        self.noisy = {k: Diffuse(run, photos) for k, run in stop.main.items() if k[0] != "denoise15" and k[2] == 0}
        self.noisy |= {(f"cats{level}", i, 0): Diffuse(Staged(f"cat-{i}", f"denoise{level}", s.fit[f"denoise{level}"], size=32, watch=False), cats)
                       for level in (25, 50) for i in range(cats_at(s))}

    @property
    def runs(self) -> list[Run]:
        return [*self.main.values(), *self.grid.values(), *self.ablation.values(), *self.long.values(), *self.networks.values(), *self.cats.values(), self.eye, self.reference,
                *self.plain.values(), *self.films.values(), *self.noisy.values()]

    def assemble(self) -> tuple[dict, dict]:
        plain = {k: DIP.outcome(run) for k, run in self.plain.items()}
        rows = {(task, view, way): row for (task, view), run in self.main.items() for way, row in zip(self.WAYS, run.result()["rows"][view])}
        values, lines = {}, []
        for task in self.TASKS:
            seen = [view for t, view in self.main if t == task]
            mine = {view: rows[task, view, "hybrid II"] for view in seen}
            honest = {v: agreeing(self.plain[task, v], "held_out")["psnr"] for v in seen}
            found = values[task] = {"dip": interval(honest.values()), "dip_oracle": interval(agreeing(self.plain[task, v], "oracle")["psnr"] for v in seen),
                                    "dip_ssim": interval(agreeing(self.plain[task, v], "held_out")["ssim"] for v in seen),
                                    "versus_dip": interval(mine[v]["psnr"] - honest[v] for v in seen),
                                    "wins_dip": float(np.mean([mine[v]["psnr"] > honest[v] for v in seen])),
                                    "dip_seconds": interval(plain[task, v]["held_out"]["seconds"] for v in seen),
                                    "dip_steps": interval(plain[task, v]["held_out"]["step"] for v in seen),
                                    "same_updates": interval(mine[v]["psnr"] - agreeing(r, max(r.result()["snapshots"], default="last"))["psnr"] for v, r in (
                                        (v, self.plain[task, v]) for v in seen)),                                  # plain DIP after 300 updates
                                    "f": interval(r["f_psnr"] for r in mine.values()), "t": interval(r["t"] for r in mine.values())}
            lines.append([task, "DIP alone, held-out pixels", 0, f"{found['dip_steps']['mean']:.0f}", show(found["dip"]), show(found["dip_ssim"], 3),
                          f"{found['dip_seconds']['mean']:.1f}", show(found["versus_dip"]), f"{100 * found['wins_dip']:.0f} %"])
            entering = {"brief DIP itself": ("hybrid II", "f_psnr"), "interpolation itself (no network)": ("restart from interpolation", "f_psnr"),
                        "TV itself (no network)": ("restart from TV", "f_psnr"), "brief DIP and interpolation, fused (no model)": ("hybrid II", "fused_psnr")}
            ways = {way: {v: rows[task, v, way] for v in seen} for way in self.WAYS} | {
                label: {v: {"psnr": rows[task, v, way][m], "evaluations": 0, "updates": BRIEF[task] if way == "hybrid II" else 0} for v in seen} for label, (way, m) in entering.items()}
            for way, of in ways.items():
                entry = found[slug(way)] = {m: interval(r[m] for r in of.values()) for m in next(iter(of.values())) if m in ("psnr", "ssim", "total_seconds", "updates", "evaluations")}
                differences = [mine[v]["psnr"] - of[v]["psnr"] for v in seen]
                entry |= {"better": interval(differences), "wins": float(np.mean([d > 0 for d in differences])), "median": float(np.median(differences))}
                lines.append([task, f"**{way}**" if way == "hybrid II" else way, f"{entry['evaluations']['mean']:.0f}", f"{entry['updates']['mean']:.0f}", show(entry["psnr"]),
                              *((show(entry["ssim"], 3), f"{entry['total_seconds']['mean']:.1f}") if way in self.WAYS else ("", "")),
                              *(("", "") if way == "hybrid II" else (show(entry["better"]), f"{100 * entry['wins']:.0f} %"))])
            found["median_dip"] = float(np.median([mine[v]["psnr"] - honest[v] for v in seen]))
            found["median_diffusion"] = float(np.median([mine[v]["psnr"] - max(rows[task, v, w]["psnr"] for w in self.WAYS if w.startswith("diffusion")) for v in seen]))
        grid, regret = {}, []
        for (task, view), run in self.grid.items():
            of = dict(zip(self.GRID, run.result()["rows"][view]))
            for name, row in of.items():
                grid.setdefault((task, name), []).append(row["psnr"])
            regret.append(max(max(r["psnr"] for r in of.values()), rows[task, view, "hybrid II"]["psnr"]) - rows[task, view, "hybrid II"]["psnr"])
            grid.setdefault((task, "by the rule"), []).append(rows[task, view, "hybrid II"]["psnr"])
        values["regret"] = interval(regret)
        ablation, reaches = {}, {}
        for (task, view), run in self.ablation.items():
            for name, row in zip(self.ABLATION, run.result()["rows"][view]):
                ablation.setdefault((name, task), []).append((row, rows[task, view, "hybrid II"]))
        for (name, task, view), run in self.networks.items():
            ablation.setdefault((name, task), []).append((run.result()["rows"][view][0], rows[task, view, "hybrid II"]))
        changes = {f"{slug(name)}_{task}": {"psnr": interval(a["psnr"] for a, _ in pairs), "gain": interval(a["psnr"] - b["psnr"] for a, b in pairs),
                                            **{m: float(np.mean([a[m] for a, _ in pairs])) for m in ("diversity", "to_f", "mean_psnr", "f_psnr", "total_seconds", "updates", "evaluations")}}
                   for (name, task), pairs in ablation.items()}
        reach_lines = []
        for task in ("block", "superres4"):                                                    # evaluations that reach a given mean PSNR, on the four photos
            mean = {way: float(np.mean([rows[task, v, way]["psnr"] for v in wholes(self.scale)])) for way in self.WAYS}
            alone = {k: changes[f"diffusion_alone_{k}_steps_{task}"]["psnr"]["mean"] for k in (5, 20, 100)} | {k: mean[f"diffusion alone, {k} steps"] for k in (10, 50)}
            ways = {"hybrid": {k: changes[f"{k}_steps_{task}"]["psnr"]["mean"] for k in (1, 2, 4)} | {8: mean["hybrid II"]}, "plain": {8: mean["plain restart"]}, "alone": alone}
            honest = float(np.mean([agreeing(self.plain[task, v], "held_out")["psnr"] for v in wholes(self.scale)]))
            for label, goal in (("diffusion alone, 100 evaluations", alone[100]), ("diffusion alone at its best", max(alone.values())), ("DIP alone, honest stop", honest)):
                needed = {n: min((k for k, p in way.items() if p >= goal), default=10 ** 6) for n, way in ways.items()}
                reaches[f"{task}_{slug(label)}"] = {"goal": goal, **needed}
                reach_lines.append([task, label, f"{goal:.2f}", *("never" if k == 10 ** 6 else k for k in needed.values())])
        long, long_lines = {}, []                                                        # diffusion alone with as many seconds
        for task in self.TASKS:
            found = {v: dict(zip(self.LONG, self.long[task, v].result()["rows"][v])) for v in wholes(self.scale)}
            for way in self.LONG:
                entry = long[f"{task}_{slug(way)}"] = {m: interval(f[way][m] for f in found.values()) for m in ("psnr", "total_seconds", "evaluations")} | {
                    "better": interval(f["hybrid II"]["psnr"] - f[way]["psnr"] for f in found.values())}
                long_lines.append([task, way, f"{entry['evaluations']['mean']:.0f}", show(entry["psnr"]), f"{entry['total_seconds']['mean']:.1f}", show(entry["better"]) if way != "hybrid II" else ""])
        cats, cat_lines = {}, []
        reference = self.reference.result()
        for task, run in self.cats.items():
            result = run.result()
            for k, way in enumerate(self.CAT_WAYS):
                of = [result["rows"][name][k] for name in run.names]
                base = [result["rows"][name][0] for name in run.names]
                found = examine(self.eye.eye(), torch.cat([result["pictures"][name][f"entry {k}"] for name in run.names]) / 255, torch.zeros(math.prod(CAT_FACTORS.values())))
                entry = cats[f"{task}_{slug(way)}"] = {"psnr": interval(r["psnr"] for r in of), "f": interval(r["f_psnr"] for r in of), "better": interval(b["psnr"] - r["psnr"] for r, b in zip(of, base)),
                                                       "fidelity": found["fidelity"], "entropy_least": min(found["entropy"].values()), "seconds": float(np.mean([r["total_seconds"] for r in of])),
                                                       "frechet": metrics.frechet(found["features"], reference["features"])}
                cat_lines.append([task, way, f"{of[0]['evaluations']}", show(entry["psnr"]), show(entry["better"]) if k else "", f"{entry['fidelity']:.3f}", f"{entry['frechet']:.1f}",
                                  f"{100 * entry['entropy_least']:.0f} %", f"{entry['seconds']:.1f}"])
        noisy, noisy_lines = {}, []
        for task in ("denoise25", "denoise50", "cats25", "cats50"):
            runs = {k: run.result()["rows"] for k, run in self.noisy.items() if k[0] == task}
            pair = {k: self.noisy[k].staged.result()["psnr"] for k in runs}
            noisy[task] = {slug(n): interval(r[n]["psnr"] for r in runs.values()) | {"gain": interval(r[n]["psnr"] - pair[k] for k, r in runs.items())} for n in next(iter(runs.values()))}
            noisy[task] |= {"pair": interval(pair.values()), "regret": interval(max([r["rule"]["psnr"], *(r[f"t{t}"]["psnr"] for t in (10, 20, 40, 80, 160, 320))]) - r["rule"]["psnr"] for r in runs.values())}
            names = {"one step": "diffusion alone, one step from y", "diffusion": "diffusion alone, four steps from y", "rule": "pair's picture restarted at the rule's step",
                     "rule lean": "… guided by the pair's picture", **{f"t{t}": f"… restarted at t = {t}" for t in (20, 80, 320, 1000)}, "diffusion pair": "two diffusion estimates averaged", "half": "DIP pair and diffusion, half each", "blend": "blend of both, by estimated risks"}
            noisy_lines += [[task, "mirrored pair of DIPs (hybrid I)", show(noisy[task]["pair"]), ""], *([task, label, show(noisy[task][slug(n)]), show(noisy[task][slug(n)]["gain"])] for n, label in names.items())]
        tables = {
            "main": table(["task", "way", "evaluations", "DIP updates", "PSNR, dB", "SSIM", "seconds", "hybrid II − it, dB", "hybrid II wins"], lines),
            "grid": table(["task", *self.GRID, "by the rule"], [[task, *(f"{np.mean(grid[task, n]):.2f}" for n in (*self.GRID, "by the rule"))] for task in self.TASKS]),
            "ablation": table(["change", "task", "PSNR, dB", "gain, dB", "DIP updates", "evaluations", "seconds"], [
                [name, task, f"{c['psnr']['mean']:.2f}", show(c["gain"]), f"{c['updates']:.0f}", f"{c['evaluations']:.0f}", f"{c['total_seconds']:.1f}"]
                for (name, task), c in zip(ablation, changes.values()) if "samples" not in name]),
            "diversity": table(["entrance", "task", "RMS distance between two samples", "RMS distance to f", "PSNR of one sample, dB", "PSNR of the mean of eight, dB", "seconds for all", "seconds a sample"], [
                [name.split(", ")[1], task, f"{c['diversity']:.4f}", f"{c['to_f']:.4f}", f"{c['psnr']['mean']:.2f}", f"{c['mean_psnr']:.2f}", f"{c['total_seconds']:.1f}", f"{c['total_seconds'] / c['evaluations'] * 8:.1f}"]
                for (name, task), c in zip(ablation, changes.values()) if "samples" in name]),
            "long": table(["task", "way", "evaluations", "PSNR, dB", "seconds", "hybrid II − it, dB"], long_lines),
            "reach": table(["task", "quality of", "PSNR, dB", "hybrid II", "plain restart", "diffusion alone"], reach_lines),
            "cats": table(["task", "way", "evaluations", "PSNR, dB", "hybrid II − it, dB", "fidelity ↓", "Fréchet ↓", "least factor entropy ↑", "seconds"], cat_lines),
            "noisy": table(["task", "way", "PSNR, dB", "− pair, dB"], noisy_lines)}
        return {"main": values, "ablation": changes, "cats": cats, "noisy": noisy, "long": long, "reaches": reaches, "kappa": KAPPA,
                "grid": {f"{task}_{slug(n)}": float(np.mean(v)) for (task, n), v in grid.items()}}, tables

    def figures(self, values: dict) -> dict:
        return {"pictures": self.pictures, "cost": lambda: self.cost(values), "maps": self.maps, "film": self.film}

    def film(self):
        return panels([[(picture[None], f"{label if i == 0 else ''}\nt = {t}: {psnr:.1f} dB") for i, (t, picture, psnr) in enumerate(zip(strip["t"], strip["pictures"], strip["psnr"]))]
                       for run in self.films.values() for label, strip in run.result()["strips"].items()])

    def pictures(self):
        columns = []
        for task, view in zip(self.TASKS, wholes(self.scale) * 4):
            stored, plain = self.main[task, view].result()["pictures"][view], self.plain[task, view]
            named = {task: stored["measured"], "DIP alone, honest stop": to_bytes(keeping(plain, plain.result()["pictures"]["held_out"] / 255))} | {
                way: stored[f"entry {list(self.WAYS).index(way)}"] for way in ("diffusion alone, 50 steps", "plain restart", "hybrid II")}
            columns.append([*(scored(label, picture, stored["clean"]) for label, picture in named.items()), (stored["clean"], view)])
        return panels(columns, transpose=True)

    def cost(self, values: dict):
        figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained", sharey="col")
        for column, task in zip(axes.T, self.TASKS):
            found = values["main"][task]
            for ax, unit in zip(column, ("evaluations", "total_seconds")):
                for mark, way, entry in ((mark, way, found[slug(way)]) for mark, way in zip("*osv^<>PXDd", self.WAYS) if slug(way) in found):
                    ax.plot(max(entry[unit]["mean"], 0.1), entry["psnr"]["mean"], mark, ms=14 if mark == "*" else 7, label=way)
                if unit == "total_seconds":
                    runs = [self.plain[task, v] for v in views(self.scale.test)]
                    kept = sorted(set.intersection(*(set(r.result()["snapshots"]) for r in runs)))
                    per_step = np.mean([r.result()["seconds"] / r.steps for r in runs])
                    ax.plot([per_step * i for i in (*kept, runs[0].steps)], [np.mean([agreeing(r, i)["psnr"] for r in runs]) for i in (*kept, "last")], "k.-", lw=1, label="DIP alone, if stopped there")
                else:
                    ax.axhline(found["dip"]["mean"], color="k", lw=1)
                ax.axhline(found["interpolation_itself_no_network"]["psnr"]["mean"], color="C4", ls=":", label="interpolation itself")
                ax.set(xscale="log", xlabel="network evaluations" if unit == "evaluations" else "seconds, DIP's included", title=task)
                ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes[0, 0].set_ylabel("PSNR, dB"), axes[1, 0].set_ylabel("PSNR, dB")
        figure.legend(*axes[1, 3].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        return figure

    def maps(self):
        view = wholes(self.scale)[0]
        stored, names = self.ablation["block", view].result()["pictures"][view], list(self.ABLATION)
        rows = [[(stored["measured"], "measured"), (stored["clean"], "truth")]]
        for t in (100, 300, 500, 700):
            k = names.index(f"8 samples, t = {t}")
            rows.append([(stored[f"entry {k}"], f"mean of eight, entered at t = {t}"), (stored[f"map {k}"], "their deviation × 4")])
        return panels(rows, transpose=True)


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")


class Truncate:
    """Does a prior that opens the chain late make training cheaper?"""

    RANGES = {"all steps": 0, "t ≤ 500": 500, "t ≤ 250": 250}
    MARKS = (1 / 8, 1 / 4, 1 / 2, 1.0)

    def __init__(self, scale: Scale):
        s = self.scale = scale
        steps, self.eye, self.reference = 5 * s.short // 2, LearnToSee(s.eye), RealCats(LearnToSee(s.eye), 4 * s.samples, seed=2)
        self.models = {(name, seed): Train("cats", steps, t_max=t, seed=seed) for name, t in self.RANGES.items() for seed in range(s.seeds)}
        self.cats = {(name, entered, at, seed): HandOverCats(model, entered, self.eye, at, cats_at(s)) for (name, seed), model in self.models.items()
                     for entered in (250, 500) if entered <= (model.t_max or 1000) for at in self.MARKS}
        self.photo_models = {name: Train("photos", steps * 5 // 8, t_max=t) for name, t in self.RANGES.items()}
        self.photos = {(name, at): DenoisePhotos(model, s.test, 25, at=at) for name, model in self.photo_models.items() for at in self.MARKS}

    @property
    def runs(self) -> list[Run]:
        return [*self.models.values(), *self.cats.values(), *self.photo_models.values(), *self.photos.values(), self.reference]

    def assemble(self) -> tuple[dict, dict]:
        reference, values, lines, photo_lines = self.reference.result(), {}, [], []
        keys = dict.fromkeys((name, entered) for name, entered, _, _ in self.cats)
        for entered in (250, 500):
            for name in (n for n, e in keys if e == entered):
                for at in self.MARKS:
                    of = [self.cats[name, entered, at, seed].result() for seed in range(self.scale.seeds)]
                    full = [self.cats["all steps", entered, at, seed].result() for seed in range(self.scale.seeds)]
                    found = values[f"{slug(name)}_e{entered}_at{round(100 * at)}"] = {
                        "psnr": interval(np.mean([r["psnr"] for r in of], 0)), "gain": interval(np.mean([r["psnr"] for r in of], 0) - np.mean([r["psnr"] for r in full], 0)),
                        "fidelity": interval(r["fidelity"] for r in of), "frechet": interval(metrics.frechet(r["features"], reference["features"]) for r in of),
                        "from_noise": interval(r["from_noise"] for r in of)}
                    lines.append([f"t = {entered}", name, round(at * self.models["all steps", 0].steps), show(found["psnr"]), show(found["gain"]), f"{found['fidelity']['mean']:.4f}",
                                  f"{found['frechet']['mean']:.0f}", f"{found['from_noise']['mean']:.3f}"])
        for name in self.RANGES:
            for at in self.MARKS:
                rows, full = (self.photos[n, at].result()["rows"] for n in (name, "all steps"))
                found = values[f"photos_{slug(name)}_at{round(100 * at)}"] = {"psnr": interval(r["psnr"] for r in rows.values()), "gain": interval(rows[v]["psnr"] - full[v]["psnr"] for v in rows)}
                photo_lines.append([name, round(at * self.photo_models[name].steps), show(found["psnr"]), show(found["gain"])])
        return values, {"cats": table(["entered at", "trained on", "training steps", "PSNR, dB", "− all steps, dB", "fidelity ↓", "Fréchet ↓", "fidelity from pure noise ↓"], lines),
                        "photos": table(["trained on", "training steps", "PSNR at σ = 25, dB", "− all steps, dB"], photo_lines)}

    def figures(self, values: dict) -> dict:
        return {"training": lambda: self.training(values)}

    def training(self, values: dict):
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
        for ax, entered in zip(axes, (250, 500)):
            for name in dict.fromkeys(n for n, e, _, _ in self.cats if e == entered):
                found = [values[f"{slug(name)}_e{entered}_at{round(100 * at)}"]["psnr"]["mean"] for at in self.MARKS]
                ax.plot([at * self.models[name, 0].steps for at in self.MARKS], found, "o-", label=name)
            ax.set(title=f"cats, big block, entered at t = {entered}", xlabel="training steps", ylabel="PSNR, dB")
            ax.legend()
        for name in self.RANGES:
            axes[2].plot([at * self.photo_models[name].steps for at in self.MARKS], [values[f"photos_{slug(name)}_at{round(100 * at)}"]["psnr"]["mean"] for at in self.MARKS], "o-", label=name)
        axes[2].set(title="photos, one step at σ = 25", xlabel="training steps")
        axes[2].legend()
        return figure


class Guide:
    """Does a learned prior make early stopping unnecessary?"""

    TASKS = ("denoise25", "denoise50", "block", "random80", "superres4")

    def __init__(self, scale: Scale):
        s = self.scale = scale
        photos, cats, four = Train("photos", s.photos), Train("cats", s.cats, places=PLACES), wholes(s)
        self.strong = Train("photos", 4 * s.photos)
        steps = {task: round(1.6 * s.fit[task]) if TASKS[task] else s.fit[task] for task in self.TASKS}
        self.main = {(task, view): Guided(view, task, steps[task], photos) for task in self.TASKS for view in views(s.test)}
        never, single = {"begin": 10 ** 6}, {"asks": "fit", "refresh": 5, "evaluations": 1}
        self.off = {view: Guided(view, "denoise25", steps["denoise25"], photos, floor=0.0, **never) for view in views(s.test)}
        self.still = {(task, view): Guided(view, task, steps[task], photos, **never) for task in self.TASKS[:2] for view in views(s.test)}
        changes = {"as chosen": {}, "floor, no model (λ = 0)": never, "model, no floor": {"floor": 0.0}, "neither: plain DIP": {"floor": 0.0} | never,
                   "λ = 0.1": {"strength": 0.1}, "λ = 1": {"strength": 1.0}, "λ = 10": {"strength": 10.0}, "CNN off (free pixels)": {"free": True},
                   "TV in the model's place": {"prior": "tv"}, "non-local means in the model's place": {"prior": "nlm"}, "asked in eight steps": {"evaluations": 8},
                   "asked about its own images": {"asks": "fit"}, "… without the floor": {"asks": "fit", "floor": 0.0}, "… fixed t": {"asks": "fit", "low": 1.0},
                   "… random t": {"asks": "fit", "order": "random"}, "… every 5 updates, one evaluation": single,
                   "model after 1/4": {"at": 1 / 4}, "model trained 4 × as long": {"model": self.strong}, "cats' model (out of domain)": {"model": cats},
                   "σ believed × 0.7": {"belief": 0.7}, "σ believed × 1.3": {"belief": 1.3}}
        self.ablation = {(name, view): Guided(**{"photo": view, "task": "denoise25", "steps": steps["denoise25"], "model": photos, "size": 64} | change)
                         for name, change in changes.items() for view in four}
        self.foreign = {(name, f"cat-{i}"): Guided(f"cat-{i}", "denoise25", steps["denoise25"], model, size=32, **more) for i in range(4)
                        for name, model, more in (("photos' model", photos, {}), ("cats' model", cats, {}), ("no model", photos, never))}

    @property
    def runs(self) -> list[Run]:
        return [*self.main.values(), *self.off.values(), *self.still.values(), *self.ablation.values(), *self.foreign.values()]

    @staticmethod
    def digest(run: Guided) -> dict:
        result = run.result()
        return {m: result[m] for m in ("psnr", "ssim", "seconds", "evaluations")} | {
            "peak": result["curve"].max().item(), "loss": float(result["curve"].max() - result["curve"][-1]), "step": int(result["curve"].argmax()) + 1}

    def assemble(self) -> tuple[dict, dict]:
        main, off, still = ({k: self.digest(r) for k, r in runs.items()} for runs in (self.main, self.off, self.still))
        ablation, foreign = ({k: self.digest(r) for k, r in runs.items()} for runs in (self.ablation, self.foreign))
        def over(found):
            return {m: interval(d[m] for d in found.values()) for m in ("psnr", "ssim", "peak", "loss", "seconds", "evaluations", "step")}
        values = {task: over({k: d for k, d in main.items() if k[0] == task}) for task in self.TASKS} | {"off": over(off)}
        for task in self.TASKS[:2]:
            values[f"still_{task}"] = over({k: d for k, d in still.items() if k[0] == task}) | {"gain": interval(main[k]["psnr"] - d["psnr"] for k, d in still.items() if k[0] == task)}
        values["gain_off"] = interval(main["denoise25", v]["psnr"] - off[v]["peak"] for v in off)
        values["loss"] = float(np.mean([values[task]["loss"]["mean"] for task in self.TASKS]))
        names, kinds = (list(dict.fromkeys(name for name, _ in found)) for found in (ablation, foreign))
        changes = {n: over({k: d for k, d in ablation.items() if k[0] == n}) | {"gain": interval(d["psnr"] - ablation["as chosen", k[1]]["psnr"] for k, d in ablation.items() if k[0] == n)}
                   for n in names}
        others = {n: over({k: d for k, d in foreign.items() if k[0] == n}) for n in kinds}
        def line(name, m):
            return [name, show(m["psnr"]), show(m["peak"]), show(m["loss"]), f"{m['step']['mean']:.0f}", f"{m['evaluations']['mean']:.0f}", f"{m['seconds']['mean']:.0f}"]
        columns = ["last step, dB", "*peak*, dB", "lost since the peak, dB", "*peak at step*", "evaluations", "seconds"]
        tables = {"main": table(["task", *columns], [*(line(t, values[t]) for t in self.TASKS), *(line(f"{t}, floor but no model", values[f"still_{t}"]) for t in self.TASKS[:2]), line("denoise25, plain DIP", values["off"])]),
                  "ablation": table(["change", *columns, "− as chosen, dB"], [[*line(n, m), show(m["gain"])] for n, m in changes.items()]),
                  "foreign": table(["cats with noise σ = 25", *columns], [line(n, m) for n, m in others.items()])}
        return {"main": values, "ablation": {slug(n): m for n, m in changes.items()}, "foreign": {slug(n): m for n, m in others.items()},
                "strength": STRENGTH["y"], "free_strength": NOISE_FREE["strength"]}, tables

    def figures(self, values: dict) -> dict:
        return {"curves": self.curves}

    def curves(self):
        figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
        for view, color in zip(wholes(self.scale), ("C0", "C1", "C2", "C3")):
            axes[0].plot(self.main["denoise25", view].result()["curve"], color=color, label=view)
            axes[0].plot(self.off[view].result()["curve"], color=color, ls=":")
        axes[0].set(title="σ = 25: guided (lines), plain DIP (dotted)", xlabel="DIP updates", ylabel="PSNR of the running average, dB")
        axes[0].legend(fontsize=8)
        for ax, wanted in ((axes[1], ("as chosen", "floor, no model (λ = 0)", "model, no floor", "neither: plain DIP", "asked about its own images", "λ = 10")),
                           (axes[2], ("as chosen", "CNN off (free pixels)", "TV in the model's place", "non-local means in the model's place", "cats' model (out of domain)", "model after 1/4", "model trained 4 × as long"))):
            for name in wanted:
                ax.plot(torch.stack([r.result()["curve"] for k, r in self.ablation.items() if k[0] == name]).mean(0), label=name)
            ax.set(xlabel="DIP updates", title="four photos of 64 × 64 pixels")
            ax.legend(fontsize=8)
        for ax in axes:
            ax.set_ylim(bottom=max(line.get_ydata().max() for line in ax.lines) - 9)
        return figure


class Final:
    """Which method would you use?"""

    TASKS = ("denoise25", "denoise50", "block", "random80", "superres4")
    SHORT = ("hybrid II", "diffusion alone, 50 steps")                                        # the ways of Entrance that are run again here
    CANDIDATES = {True: ("hybrid I", "blend", "hybrid III"),                                                                          # with noise
                  False: ("hybrid II", "hybrid III", "two of hybrid II averaged", "two of hybrid III averaged")}                       # without

    def __init__(self, scale: Scale):
        s = self.scale = scale
        photos, dips, stop, guide = Train("photos", s.photos), DIP(s), Stop(s), Guide(s)
        keys = [(task, view, n) for task in self.TASKS for view in views(s.test) for n in range(min(2, s.seeds))]
        self.plain = {(t, v, n): self.again(dips.main[t, v, 0], n) for t, v, n in keys}
        self.diffuse = {(t, v, n): Diffuse(self.again(stop.main[t, v, 0], n), photos) for t, v, n in keys if TASKS[t]}
        entrance, short = Entrance(s).main, ways_at(s, {way: Entrance.WAYS[way] for way in self.SHORT})
        self.enter = {(t, v, n): self.again(replace(entrance[t, v], entries=short), n) if n else entrance[t, v] for t, v, n in keys if not TASKS[t]}
        self.guided, self.still = {(t, v, n): self.again(guide.main[t, v], n) for t, v, n in keys}, guide.still
        self.strong = {k: {"hybrid III": replace(run, model=guide.strong)} | (
            {"diffuse": replace(self.diffuse[k], model=guide.strong)} if TASKS[k[0]] else {"enter": replace(self.enter[k], model=guide.strong, entries=short)})
            for k, run in self.guided.items() if k[1] in wholes(s) and not k[2]}
        self.development = {(t, v): self.candidates(replace(guide.main[t, views(s.test)[0]], photo=v), s) for t in self.TASKS for v in views(DEVELOPMENT)[:6 if s.seeds > 1 else 1]}
        self.twin = {(t, v, n): replace(self.plain[t, v, n], start=1 - n) for t, v, n in keys if not TASKS[t] or (n == 0 and v in wholes(s))}

    @staticmethod
    def again(run: Run, n: int) -> Run:
        """The n-th seed: other noise, and with it another start; without noise another start on the same measurement."""
        return replace(run, seed=n) if TASKS[run.task] else replace(run, start=n)

    @property
    def runs(self) -> list[Run]:
        return [*self.plain.values(), *self.diffuse.values(), *self.enter.values(), *self.guided.values(), *self.still.values(), *self.twin.values(),
                *(run for found in (self.strong, self.development) for runs in found.values() for run in runs.values())]

    def candidates(self, guided: Guided, s: Scale) -> dict:
        """The runs behind the hybrids for one development photo, which decide what is named for its task."""
        if TASKS[guided.task]:
            return {"blend": Diffuse(Staged(guided.photo, guided.task, round(1.16 * s.fit[guided.task]), watch=False), guided.model), "hybrid III": guided}
        enter = Enter((guided.photo,), guided.task, guided.model, ways_at(s, {"": Entry()}))
        return {(name, n): self.again(run, n) for name, run in (("hybrid II", enter), ("hybrid III", guided)) for n in (0, 1)}

    @staticmethod
    def outcome(run: Run) -> tuple[dict, Tensor]:
        """PSNR, SSIM and seconds of a run of one of the hybrids, and its picture."""
        result = run.result()
        if isinstance(run, Enter):
            row, pictures = result["rows"][run.names[0]][0], result["pictures"][run.names[0]]
            return {"psnr": row["psnr"], "ssim": row["ssim"], "seconds": row["total_seconds"]}, pictures["entry 0"] / 255
        return {m: result[m] for m in ("psnr", "ssim", "seconds")}, result["pictures"]["last" if isinstance(run, Guided) else "delivered"] / 255

    def averaged(self, runs) -> tuple[dict, Tensor]:
        """The same of the mean of their pictures."""
        ((view, size),), found = {(r.photo if isinstance(r, Guided) else r.names[0], r.size) for r in runs}, [self.outcome(run) for run in runs]
        picture = sum(x for _, x in found) / len(found)
        return score(picture, photo_named(view, size)) | {"seconds": sum(row["seconds"] for row, _ in found)}, picture

    def delivered(self, name: str, key: tuple) -> tuple[dict, Tensor]:
        """The same of a hybrid by its name, for (task, photo, seed); averages are of all seeds."""
        run = {"hybrid I": {k: diffuse.staged for k, diffuse in self.diffuse.items()}, "hybrid II": self.enter, "hybrid III": self.guided}
        one = name.removeprefix("two of ").removesuffix(" averaged")
        return self.outcome(run[one][key]) if name == one else self.averaged([r for k, r in run[one].items() if k[:2] == key[:2]])

    @functools.cached_property
    def chosen(self) -> dict:
        """Task → {hybrid: mean PSNR on the development photos}, the best one first. The first is the one that is named."""
        found = {}
        for (task, _), runs in self.development.items():
            if TASKS[task]:
                blend = runs["blend"]
                psnr = {"blend": blend.result()["rows"]["blend"]["psnr"], "hybrid I": blend.staged.result()["psnr"], "hybrid III": runs["hybrid III"].result()["psnr"]}
            else:
                psnr = {}
                for name in ("hybrid II", "hybrid III"):
                    two = [runs[name, n] for n in (0, 1)]
                    psnr |= {name: float(np.mean([self.outcome(run)[0]["psnr"] for run in two])), f"two of {name} averaged": self.averaged(two)[0]["psnr"]}
            found.setdefault(task, []).append(psnr)
        means = {task: {n: float(np.mean([p[n] for p in rows])) for n in self.CANDIDATES[bool(TASKS[task])]} for task, rows in found.items()}
        return {task: dict(sorted(of.items(), key=lambda item: -item[1])) for task, of in means.items()}

    def with_interpolation(self, key: tuple, share: float) -> dict:
        """The same of interpolation, with a share of DIP alone at its honest stop."""
        run, clean, began = self.plain[key], photo_named(key[1], self.plain[key].size), time.perf_counter()
        y, operator = measure(run.task, clean, run.generator(f"{run.photo}/{run.task}"))
        picture = projection(share * run.result()["pictures"]["held_out"] / 255 + (1 - share) * classical_fill("fill", y, operator), y, operator)
        return score(picture, clean) | {"seconds": time.perf_counter() - began + (DIP.outcome(run)["held_out"]["seconds"] if share else 0.0)}

    def methods(self, task: str) -> dict:
        """Method → {(task, photo, seed): {psnr, ssim, seconds}}."""
        keys, rule = [k for k in self.plain if k[0] == task], "discrepancy_tuned" if TASKS[task] else "held_out"
        def alone(name):
            return {k: agreeing(self.plain[k], name) | {"seconds": DIP.outcome(self.plain[k])[name]["seconds"]} for k in keys}
        found = {"DIP alone, best honest stop": alone(rule), "DIP alone, *oracle*": alone("oracle")}
        if TASKS[task]:
            rows = {k: self.diffuse[k].result()["rows"] for k in keys}
            found |= {label: {k: r[n] for k, r in rows.items()} for n, label in (("diffusion", "diffusion alone"), ("one step", "diffusion alone, one step"), ("diffusion pair", "two diffusion estimates averaged"))}
            found |= {"hybrid I": {k: self.delivered("hybrid I", k)[0] for k in keys}, "hybrid II": {k: r["rule lean"] for k, r in rows.items()},
                      "blend": {k: r["blend"] for k, r in rows.items()}, "DIP pair and diffusion, half each": {k: r["half"] for k, r in rows.items()},
                      "DIP with the floor, no model": {k: self.outcome(self.still[k[:2]])[0] for k in keys if not k[2]}}
        else:
            rows = {k: dict(zip(self.SHORT if k[2] else Entrance.WAYS, self.enter[k].result()["rows"][k[1]])) for k in keys}
            found |= {label: {k: {"psnr": r[n]["psnr"], "ssim": r[n]["ssim"], "seconds": r[n]["total_seconds"]} for k, r in rows.items() if n in r} for n, label in (
                ("diffusion alone, 50 steps", "diffusion alone"), ("restart from interpolation", "restart from interpolation"), ("hybrid II without interpolation", "hybrid II without interpolation"), ("hybrid II", "hybrid II"))}
            found |= {label: {k: self.with_interpolation(k, share) for k in keys if not k[2]} for label, share in (("interpolation (no network)", 0.0), ("DIP alone and interpolation, half each", 0.5))}
        for name in ("hybrid III", *(n for n in self.CANDIDATES[bool(TASKS[task])] if n.startswith("two of"))):
            found[name] = {k: self.delivered(name, k)[0] for k in keys if k in self.guided}
        pairs = {k: [run.result() for run in (self.plain[k], twin)] for k, twin in self.twin.items() if k[0] == task}
        found["two DIPs averaged"] = {k: score(keeping(self.plain[k], sum(r["pictures"][rule] / 255 for r in two) / 2), photo_named(k[1], 96)) | {"seconds": sum(r["seconds"] for r in two)} for k, two in pairs.items()}
        return found

    def stronger(self, task: str, methods: dict) -> tuple[dict, list]:
        """The same with a model that was trained four times as long: PSNR, gain over the shorter training, and over both parents."""
        found = {}
        for k, runs in ((k, r) for k, r in self.strong.items() if k[0] == task):
            rows = runs["diffuse"].result()["rows"] if "diffuse" in runs else dict(zip(self.SHORT, runs["enter"].result()["rows"][k[1]]))
            names = {"diffusion alone": "diffusion", "blend": "blend"} if "diffuse" in runs else {"diffusion alone": self.SHORT[1], "hybrid II": "hybrid II"}
            for label, psnr in {**{label: rows[name]["psnr"] for label, name in names.items()}, "hybrid III": runs["hybrid III"].result()["psnr"]}.items():
                found.setdefault(label, {})[k] = psnr
        alone, dip_alone = found["diffusion alone"], methods["DIP alone, best honest stop"]
        values = {slug(n): {"psnr": by_photo(of), "gain": by_photo({k: p - methods[n][k]["psnr"] for k, p in of.items()}), "over_diffusion": by_photo({k: p - alone[k] for k, p in of.items()}),
                            "over_dip": by_photo({k: p - dip_alone[k]["psnr"] for k, p in of.items()})} for n, of in found.items()}
        curves = [runs["hybrid III"].result()["curve"] for k, runs in self.strong.items() if k[0] == task]
        values["hybrid_III"]["loss"] = interval(float(c.max() - c[-1]) for c in curves)
        return values, [[task, n, *(show(values[slug(n)][m]) for m in ("psnr", "gain", "over_dip")), "" if n == "diffusion alone" else show(values[slug(n)]["over_diffusion"])] for n in found]

    def assemble(self) -> tuple[dict, dict]:
        candidates = list(dict.fromkeys(sum(self.CANDIDATES.values(), ())))
        values, lines, decision, strong = {"strong": {}, "development": {t: {slug(n): p for n, p in of.items()} for t, of in self.chosen.items()}}, [], [], []
        for task in self.TASKS:
            methods, name_chosen = self.methods(task), next(iter(self.chosen[task]))
            values["strong"][task], more = self.stronger(task, methods)
            strong += more
            dip_alone, alone = methods["DIP alone, best honest stop"], methods["diffusion alone"]
            of = values[task] = {}
            for name, rows in methods.items():
                entry = of[slug(name)] = {m: by_photo({k: r[m] for k, r in rows.items()}) for m in ("psnr", "ssim", "seconds")} | {
                    "over_dip": by_photo({k: r["psnr"] - dip_alone[k]["psnr"] for k, r in rows.items()}), "over_diffusion": by_photo({k: r["psnr"] - alone[k]["psnr"] for k, r in rows.items()}),
                    "wins": float(np.mean([r["psnr"] > max(dip_alone[k]["psnr"], alone[k]["psnr"]) for k, r in rows.items()])), "runs": len({k[:2] if name.startswith(("two of", "two DIPs")) and not TASKS[task] else k for k in rows})}
                lines.append([task, f"**{name}**" if name == name_chosen else name, entry["runs"], show(entry["psnr"]), show(entry["ssim"], 3), f"{entry['seconds']['mean']:.1f}",
                              show(entry["over_dip"]), show(entry["over_diffusion"]), f"{100 * entry['wins']:.0f} %"])
            chosen = of[slug(name_chosen)]
            better = "over_dip" if of["DIP_alone_best_honest_stop"]["psnr"]["mean"] > of["diffusion_alone"]["psnr"]["mean"] else "over_diffusion"
            of["headline"] = chosen | {"over_better": chosen[better], "name": name_chosen}
            best = max((h for h in map(slug, candidates) if h in of), key=lambda h: of[h]["over_dip"]["mean"])
            of["best"] = {"name": best.replace("_", " "), "over_better": of[best][better]} | of[best]
            decision.append([task, name_chosen, show(chosen["psnr"]), show(chosen["over_dip"]), show(chosen["over_diffusion"]), f"{100 * chosen['wins']:.0f} %", f"{chosen['seconds']['mean']:.1f}"])
        values["gain"] = float(np.mean([values[t]["headline"]["over_better"]["mean"] for t in self.TASKS]))
        values["won"] = sum(min(values[t]["headline"][m]["low"] for m in ("over_dip", "over_diffusion")) > 0 for t in self.TASKS)
        values["won_best"] = sum(min(values[t]["best"][m]["low"] for m in ("over_dip", "over_diffusion")) > 0 for t in self.TASKS)
        values["gain_best"] = float(np.mean([values[t]["best"]["over_better"]["mean"] for t in self.TASKS]))
        return values, {"main": table(["task", "method", "runs", "PSNR, dB", "SSIM", "seconds", "− DIP alone, dB", "− diffusion alone, dB", "beats both parents"], lines),
                        "strong": table(["task", "method", "PSNR, dB", "− with the shorter training, dB", "− DIP alone, dB", "− diffusion alone (same model), dB"], strong),
                        "development": table(["task", *candidates], [[task, *(f"{of[n]:.2f}" if n in of else "" for n in candidates)] for task, of in self.chosen.items()]),
                        "decision": table(["task", "method named for the task", "PSNR, dB", "− DIP alone, dB", "− diffusion alone, dB", "beats both parents", "seconds"], decision)}

    def figures(self, values: dict) -> dict:
        return {"answer": self.answer}

    def answer(self):
        """One photo per task: measured, both parents, the hybrid chosen for the task, truth."""
        columns = []
        for task, view in zip(self.TASKS, wholes(self.scale) * 2):
            key, noisy = (task, view, 0), bool(TASKS[task])
            plain = self.plain[key].result()["pictures"]
            stored = self.diffuse[key].result()["pictures"] if noisy else self.enter[key].result()["pictures"][view]
            alone = stored["diffusion"] if noisy else stored[f"entry {list(Entrance.WAYS).index('diffusion alone, 50 steps')}"]
            name, parent = next(iter(self.chosen[task])), to_bytes(keeping(self.plain[key], plain["discrepancy_tuned" if noisy else "held_out"] / 255))
            best = stored["blend"] if name == "blend" else to_bytes(self.delivered(name, key)[1])
            named = {"DIP alone": parent, "diffusion alone": alone, name: best}
            columns.append([(plain["measured"], task), *(scored(label, picture, plain["clean"]) for label, picture in named.items()), (plain["clean"], view)])
        return panels(columns, transpose=True)


EXPERIMENTS = {"ddpm": DDPM, "dip": DIP, "stop": Stop, "enter": Entrance, "truncate": Truncate, "guide": Guide, "final": Final}


# ---------------------------------------------------------------------------------------------------- figures

def sheet(images: Tensor, columns: int):
    """A contact sheet of (n, 3, H, W) bytes."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    grid = torch.full((rows * columns, 3, h + 2, w + 2), 255, dtype=torch.uint8)
    grid[:n, :, 1:-1, 1:-1] = images
    grid = grid.reshape(rows, columns, 3, h + 2, w + 2).permute(0, 3, 1, 4, 2).reshape(rows * (h + 2), columns * (w + 2), 3)
    k = max(1, 900 // grid.shape[1])
    return Image.fromarray(grid.numpy()).resize((grid.shape[1] * k, grid.shape[0] * k), Image.Resampling.NEAREST)


def scored(label: str, picture: Tensor, clean: Tensor) -> tuple:
    """A picture (bytes) and its title, with its score."""
    found = score(picture / 255, clean / 255)
    return picture, f"{label}\n{found['psnr']:.2f} dB, SSIM {found['ssim']:.3f}"


def panels(rows, transpose: bool = False):
    """Pictures with titles: rows of (bytes (1, 3, H, W), title)."""
    rows = list(zip(*rows)) if transpose else rows
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(2.4 * len(rows[0]), 2.75 * len(rows)), layout="constrained", squeeze=False)
    for ax, (image, title) in zip(axes.flat, (p for row in rows for p in row)):
        ax.imshow(image[0].permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(title, fontsize=8)
        ax.axis("off")
    return figure


def schedules_figure():
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for name, make in (("linear", ddpm.linear), ("cosine", ddpm.cosine), ("sigmoid", ddpm.sigmoid)):
        s = make(1000)
        left.plot(s.alpha_bar, label=name)
        right.semilogy(ddpm.noise_level(s)[1:], label=name)
    left.set(xlabel="t", title="ᾱ_t: what is left of the image")
    right.axhline(25 / 255, color="k", ls=":", label="a photo at σ = 25/255")
    right.set(xlabel="t", title="noise level σ_t, in units of [0, 1]")
    left.legend(), right.legend()
    return figure


def save_figure(figure, path: Path) -> None:
    if isinstance(figure, Image.Image):
        return write(path, figure.save)
    write(path, lambda p: figure.savefig(p, dpi=110, metadata={"Software": None}))
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------- report

class Box(dict):
    """A dict whose keys are also attributes, so that holes read as paths."""

    def __getattr__(self, name):
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} among {', '.join(map(str, self))}")
        return Box(value) if isinstance(value, dict) else value

    __getitem__ = lambda self, name: Box(value) if isinstance(value := dict.__getitem__(self, name), dict) else value      # noqa: E731


def render(template: str, results: dict, check_claims: bool = True) -> str:
    """Fill the holes `<<path:format>>` and tables `<<experiment.tables.name>>`, check the claims `<!-- claim: … -->`.

    Raises Refusal for an unknown hole, a claim that cannot be evaluated, or a claim that is false.
    """
    names = Box(results)

    def evaluate(expression, what):
        try:
            return eval(f"({expression})", {"__builtins__": {}, "abs": abs, "min": min, "max": max, "all": all, "any": any} | {k: names[k] for k in names})
        except Exception as error:
            raise Refusal(f"{what} in REPORT.in.md cannot be filled: {expression} ({error})")

    def hole(match):
        expression, _, spec = match[1].partition(":")
        value = evaluate(expression, "a hole")
        try:
            return show(value, int(spec or 2)) if isinstance(value, dict) else format(value, spec)
        except (ValueError, TypeError, KeyError) as error:
            raise Refusal(f"a hole in REPORT.in.md cannot be filled: {match[0]} ({error})")

    for claim in re.findall(r"<!-- claim: (.*?) -->", template, re.S):
        if not evaluate(claim, "a claim") and check_claims:
            raise Refusal(f"a claim in REPORT.in.md is false: {claim}; change the sentence under it or the method")
    body = re.sub(r"<!-- claim: .*? -->\n?", "", template, flags=re.S)
    return re.sub(r"<<(.+?)>>", hole, body)


def read_results(scale: str, out: Path) -> dict:
    """out/*.json of every experiment, refused where one is missing, broken, or made by other code or settings."""
    results = {}
    for name, make in EXPERIMENTS.items():
        path = out / f"{name}.json"
        try:
            results[name] = json.loads(path.read_text())
        except (OSError, ValueError):
            raise Refusal(f"{path.name} is missing or broken: run `make all` to compute it")
        if results[name].get("key") != experiment_key(make(SCALES[scale])):
            raise Refusal(f"{path.name} was made by other code or settings: run `make all` to compute it anew")
    return results


def experiment_key(experiment) -> str:
    parts = sorted({run.key for run in experiment.runs}) + [fingerprint(type(experiment).__name__)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def hardware() -> dict:
    name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else ""
    return {"machine": name or platform.processor() or platform.machine(), "cores": os.cpu_count(), "device": DEVICE.type, "bfloat16": bool(AMP),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "system": platform.system()}


def everything_run(runs) -> dict:
    """All runs and what they need, each once."""
    found = {}
    for run in runs:
        found |= everything_run(run.needs)
        found[run] = None
    return found


def make_all(scale: str, jobs: int) -> None:
    """Run what is missing, assemble out/*.json and the figures, render the report."""
    out = ROOT / ("out" if scale == "full" else f"out-{scale}")
    stale, first = {}, {}                                                          # first: run → the experiment that pays for it
    for name, make in EXPERIMENTS.items():
        experiment, path = make(SCALES[scale]), out / f"{name}.json"
        runs = everything_run(experiment.runs)
        first = dict.fromkeys(runs, name) | first
        try:
            stored = json.loads(path.read_text())
            fresh = stored["key"] == experiment_key(experiment) and all((out / f).exists() for f in stored["figures"])
            fresh = fresh and all(run.path.exists() for run in runs)         # a fresh clone has results, but has not computed them
        except (OSError, ValueError, KeyError):
            fresh = False
        if not fresh:
            stale[name] = experiment, runs
    execute([run for _, runs in stale.values() for run in runs], jobs)
    for name, (experiment, runs) in stale.items():
        values, tables = experiment.assemble()
        figures = draw_figures(name, experiment, values, out)
        paid = [run.result() for run in runs if first[run] == name]
        seconds = sum(max(r.get("core_seconds", 0.0), r.get("seconds", 0.0)) for r in paid)                      # a resumed training adds up its own
        stored = {"experiment": name, "key": experiment_key(experiment), "scale": scale, "hardware": hardware(), "runs": len(runs), "core_seconds": seconds,
                  "figures": figures, "settings": sorted({repr(run) for run in runs}), "values": values, "tables": tables}
        write(out / f"{name}.json", lambda p: p.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n"))
        print(f"{path_name(out / f'{name}.json')}: {len(runs)} runs, {len(figures)} figures")
    make_report(scale)


def draw_figures(name: str, experiment, values: dict, out: Path) -> list[str]:
    found = {f"{name}_{label}.png": draw for label, draw in experiment.figures(values).items()}
    for file, draw in found.items():
        save_figure(draw(), out / file)
    return list(found)


def make_figures(scale: str) -> None:
    """Draw the figures again; the runs behind them must be in the cache."""
    out = ROOT / ("out" if scale == "full" else f"out-{scale}")
    for name, stored in read_results(scale, out).items():
        experiment = EXPERIMENTS[name](SCALES[scale])
        if not all(run.path.exists() for run in experiment.runs):
            raise Refusal(f"the figures of {name} need its runs, and .cache/ does not have them all: run `make all`")
        print(", ".join(draw_figures(name, experiment, stored["values"], out)))


def bench() -> None:
    """Milliseconds per step and achieved GFLOP/s on one thread, beside the same machine's matrix product."""
    from torch.utils.flop_counter import FlopCounterMode
    torch.set_num_threads(1)
    g, schedule = torch.Generator().manual_seed(0), ddpm.cosine()
    matrix = torch.rand(1024, 1024)

    def hourglass(size, **options):
        z, y = dip.random_input((size, size), g), torch.rand(1, 3, size, size)
        return functools.partial(next, dip.fit(y, lambda x: x, dip.Hourglass(**options), z, 99, g, amp=AMP))

    def training(data, size, n):
        network, batch = Train(data, 99).network().cpu(), torch.rand(n, 3, size, size)
        return functools.partial(next, ddpm.train(network, schedule, lambda _: batch, ddpm.v_head, 99, g, amp=AMP))
    x, y = torch.rand(2, 1, 3, 512, 512)
    jobs = {"matrix product 1024": lambda: matrix @ matrix, "U-Net training step, 16 cats 32×32": training("cats", 32, 16),
            "U-Net training step, 8 patches 64×64": training("photos", 64, 8),
            "DIP step 96×96, as chosen": hourglass(96, widths=(32,) * 4, upsample="nearest", padding="zeros"),
            "DIP step 128×128, as chosen": hourglass(128, widths=(32,) * 4, upsample="nearest", padding="zeros"),
            "DIP step 128×128, original network": hourglass(128), "SSIM 512×512 colour": lambda: metrics.ssim(x, y)}
    for name, job in jobs.items():
        job()
        with FlopCounterMode(display=False) as counter:
            job()
        best = min(timeit.repeat(job, number=1, repeat=5))
        print(f"{name:40s} {1000 * best:8.1f} ms {counter.get_total_flops() / best / 1e9:8.1f} GFLOP/s")


def make_report(scale: str) -> None:
    out = ROOT / ("out" if scale == "full" else f"out-{scale}")
    results = {name: r["values"] | {"tables": r["tables"], "hardware": r["hardware"], "runs": r["runs"], "core_seconds": r["core_seconds"]}
               for name, r in read_results(scale, out).items()}
    text = render((ROOT / "REPORT.in.md").read_text(), results, check_claims=scale == "full")
    path = ROOT / "REPORT.md" if scale == "full" else out / "REPORT.md"
    if scale != "full":
        text = text.replace("](out/", "](")
    if not path.exists() or path.read_text() != text:
        write(path, lambda p: p.write_text(text))
    print(f"{path_name(path)} rendered")


def path_name(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# ---------------------------------------------------------------------------------------------- a user's photo

PIXELS = 4_000_000                                              # above this a fit needs more memory than most have


def read_image(path: str) -> Tensor:
    """Any PNG, JPEG, WebP or TIFF as (1, 1 or 3, H, W) in [0, 1]; turned as its EXIF says, transparency over white."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
            pixels = np.asarray(image).astype(np.float32)
            pixels = pixels / (65535 if image.mode != "F" else 1)
        else:
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"), np.float32) / 255
    except FileNotFoundError:
        raise Refusal(f"there is no file {path}: check the name")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refusal(f"{path} cannot be read as an image ({error}): convert it to PNG or JPEG")
    if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
        raise Refusal(f"{path} has pixels that are not numbers in [0, 1]: convert it to an 8- or 16-bit image")
    if not 16 <= min(pixels.shape[:2]) or pixels.shape[0] * pixels.shape[1] > PIXELS:
        raise Refusal(f"{path} has {pixels.shape[1]} × {pixels.shape[0]} pixels: sides of at least 16 and at most {PIXELS:,} pixels in all can be "
                      "restored; resize it")
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)[None].contiguous()


def estimate_sigma(y: Tensor) -> float:
    """Noise level of a photo in [0, 1] units: median absolute value of diagonal second differences / 0.6745 (Donoho & Johnstone 1994)."""
    diagonal = (y[..., :-1, :-1] - y[..., 1:, :-1] - y[..., :-1, 1:] + y[..., 1:, 1:]) / 2
    return float(diagonal.abs().median() / 0.6745)


def folder_model(folder: str, steps: int = 0) -> Train:
    """The run that trains a photo model on the user's own images."""
    if not Path(folder).is_dir() or not images_in(folder):
        raise Refusal(f"{folder or 'IMAGES'} is not a folder with images (PNG, JPEG, WebP or TIFF): give IMAGES=folder")
    if not training_photos(folder):
        raise Refusal(f"no image in {folder} has sides of at least 64 pixels: add larger ones")
    stamp = repr([(p.name, p.stat().st_size) for p in images_in(folder)])
    return Train(str(Path(folder).resolve()), steps or SCALES["full"].photos, stamp=hashlib.sha256(stamp.encode()).hexdigest()[:16])


def train(images: str, out: str = "", train_steps: int = 0) -> None:
    """Train a photo model on a folder of images, keep it in the cache, and draw 16 samples."""
    target = Path(out or "samples.png")
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or not target.parent.is_dir():
        raise Refusal(f"cannot write {target}: OUT needs an existing folder and the ending .png, .jpg or .webp")
    samples = SamplePhotos(folder_model(images, train_steps), steps=20)
    execute([samples], 1)
    save_figure(sheet(samples.result()["images"], 4), target)
    print(f"{path_name(target)} written; restore with METHOD=ddpm IMAGES={images}" + (f" TRAIN_STEPS={train_steps}" if train_steps else ""))


def restore(image: str, task: str, method: str = "dip", sigma: str = "", mask: str = "", factor: str = "", out: str = "", steps: int = 0,
            images: str = "", train_steps: int = 0, samples: str = "") -> None:
    """Restore a photo from a file; writes the result and a before/after picture beside it."""
    if not image or not task:
        raise Refusal("restore needs IMAGE=… and TASK=denoise, inpaint or superres")
    if task not in ("denoise", "inpaint", "superres"):
        raise Refusal(f"unknown task {task!r}: choose denoise, inpaint or superres")
    if method not in ("dip", "ddpm", "staged", "blend", "handover", "guided"):
        raise Refusal(f"unknown method {method!r}: choose dip, ddpm, staged, blend, handover or guided")
    for name, why in (("blend", "weighs two denoised photos by their estimated errors"), ("staged", "judges itself by the noise it adds to a noisy photo")):
        if method == name and task != "denoise":
            raise Refusal(f"METHOD={name} {why}, so it denoises only: choose TASK=denoise, or METHOD=dip, ddpm, handover or guided")
    if method == "handover" and task == "denoise":
        raise Refusal("METHOD=handover gains nothing on noise, where the photo itself opens the chain: choose METHOD=blend, or TASK=inpaint or superres")
    count = int(number(samples or "1", "SAMPLES", 1, 64))
    if count > 1 and method != "handover":
        raise Refusal("SAMPLES=… draws alternatives of METHOD=handover; leave it out or choose that method")
    y = read_image(image).to(DEVICE)
    target = Path(out) if out else Path(image).with_name(f"{Path(image).stem}-restored.png")
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or not target.parent.is_dir():
        raise Refusal(f"cannot write {target}: OUT needs an existing folder and the ending .png, .jpg or .webp")
    operator, level, shape = dip.identity(), 0.0, y.shape[-2:]
    if task == "denoise":
        level = number(sigma, "SIGMA", 0.5, 255) / 255 if sigma else estimate_sigma(y)
        print(f"noise: sigma {255 * level:.1f} of 255" + ("" if sigma else " (estimated)"))
        if level < 0.5 / 255:
            raise Refusal("no noise was found in this photo: give SIGMA=… (in 0…255) if there is some")
    if task == "superres":
        k = int(number(factor or "2", "FACTOR", 2, 8))
        shape = tuple(k * side for side in shape)
        if shape[0] * shape[1] > PIXELS:
            raise Refusal(f"the result would have {shape[1]} × {shape[0]} pixels, more than {PIXELS:,}: choose a smaller FACTOR or photo")
        operator = dip.downsample(k)
    if task == "inpaint":
        if not mask:
            raise Refusal("inpaint needs MASK=…, an image of the same size that is white where pixels are known")
        known = (read_image(mask).mean(1, keepdim=True) > 0.5).float().to(DEVICE)
        if known.shape[-2:] != y.shape[-2:]:
            raise Refusal(f"the mask has {known.shape[-1]} × {known.shape[-2]} pixels and the photo {y.shape[-1]} × {y.shape[-2]}: make them equal")
        if known.mean() in (0, 1):
            raise Refusal(f"the mask is all {'white: nothing is missing' if known.mean() else 'black: nothing is known'}; "
                          "it must be white where pixels are known and black where they are missing")
        operator = dip.mask(known)
        y = operator.A(y)
    model = folder_model(images, train_steps) if images else DDPM(SCALES["full"]).photos
    began, colours = time.perf_counter(), y.expand(-1, 3, -1, -1)                                    # a grey photo has three equal ones

    def faded(x):
        return x.mean(1, keepdim=True) if y.shape[1] == 1 else x
    if method != "handover":
        estimate = {"dip": lambda: restore_dip(y, operator, task, shape, steps), "staged": lambda: restore_staged(y, level, steps)[0],
                    "blend": lambda: restore_blend(y, level, steps, model), "guided": lambda: faded(restore_guided(colours, operator, level, shape, steps, model)),
                    "ddpm": lambda: faded(restore_ddpm(colours, operator, task, level, shape, steps, model))}[method]()
    else:
        alternatives = faded(restore_handover(colours, operator, shape, steps, model, count))
        estimate = alternatives.mean(0, keepdim=True)
        for i, image in enumerate(alternatives if count > 1 else []):
            save_picture(image[None], target.with_name(f"{target.stem}-{i + 1}{target.suffix}"))
        if count > 1:
            save_picture(4 * alternatives.std(0, keepdim=True).mean(1, keepdim=True), target.with_name(f"{target.stem}-disagreement.png"))
            print(f"{count} alternatives, their mean and their disagreement (deviation × 4) written")
    if task == "inpaint":
        estimate = y + estimate * (1 - known)                                                    # what is known stays
    save_picture(estimate, target)
    comparison = target.with_name(f"{target.stem}-before-after.png")
    save_picture(torch.cat([operator.pinv(y), torch.ones_like(estimate[..., :8]), estimate], dim=-1), comparison)
    print(f"{path_name(target)} and {path_name(comparison)} written, {time.perf_counter() - began:.0f} s")


def number(text: str, name: str, low: float, high: float) -> float:
    try:
        value = float(text)
        if low <= value <= high:
            return value
    except ValueError:
        pass
    raise Refusal(f"{name}={text} is not a number from {low:g} to {high:g}")


def save_picture(x: Tensor, path: Path) -> None:
    pixels = to_bytes(x)[0].permute(1, 2, 0).numpy()
    write(path, Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save)


def restore_dip(y, operator, task, shape, steps) -> Tensor:
    """DIP, stopped by held-out measurements: of all rules here the one that needs neither the truth nor the noise level."""
    steps, generator = steps or 2000, torch.Generator().manual_seed(0)
    net, z = cropped_dip(generator, shape, y.shape[1])
    unseen = hybrid.kept_back(y, operator, generator, squares=False)
    rule = dip.HeldOut(y, operator.A, unseen)
    fit = dip.fit(y * (1 - unseen), lambda x: operator.A(x) * (1 - unseen), net, z, steps, generator, amp=AMP)
    for step in (bar := tqdm(fit, total=steps, desc=f"DIP, {task}")):
        stop = rule(step)
        best = step.average if rule.best == step.i else best
        bar.set_postfix_str(f"stopped, best at step {rule.best}" if stop else f"misfit {255 * step.misfit ** 0.5:.1f}", refresh=stop)
        if stop:
            break
    return best


def cropped_dip(generator: torch.Generator, shape, channels: int) -> tuple[dip.Hourglass, Tensor]:
    """A new hourglass whose pictures have any shape: it works on the next multiples of 16 and cuts."""
    net, z = fresh_dip(generator, [16 * max(2, -(-side // 16)) for side in shape], c_out=channels)
    net.register_forward_hook(lambda module, inputs, image: image[..., :shape[0], :shape[1]])
    return net, z


def restore_staged(y, level, steps) -> tuple[Tensor, float, hybrid.Link]:
    """Hybrid I: a mirrored pair of fits at S = σ/4, which says when it stopped and how good it believes to be; with its estimated
    error and its link."""
    seed = int.from_bytes(hashlib.sha256(y.cpu().numpy().tobytes()).digest()[:7], "little")      # never that of noise added by hand
    steps, generator = steps or 2000, torch.Generator().manual_seed(seed)
    chain = noisier(y, level, [0.25], generator)
    fit = hybrid.staged_fit(y, level, chain, lambda: cropped_dip(generator, y.shape[-2:], y.shape[1]), steps, generator, amp=AMP)
    for stage in (bar := tqdm(fit, total=steps, desc="DIP, mirrored pair")):
        least = stage.value if stage.best_step == stage.i else least
        expected = -10 * math.log10(max(stage.expected, 1e-6))
        bar.set_postfix_str(f"expected PSNR {expected:.1f} dB", refresh=False)
    if not (y.min() > 0 and y.max() < 1):
        print("(some pixels are saturated: their noise was cut, and the expectation will be off by a decibel or two)")
    print(f"stopped after {stage.i} steps, least estimated error at step {stage.best_step}: expected PSNR {expected:.1f} dB")
    return stage.blended, least, chain[0]


def ready(model: Train):
    """The trained model and its schedule; trained now where that has not happened yet."""
    if not model.path.exists():
        print("no trained model yet: training it once, about a quarter of an hour; it is kept in .cache")
        execute([model], 1)
    return model.denoiser()


def restore_blend(y, level, steps, model) -> Tensor:
    """Hybrid I and the diffusion model, each on a mirrored pair, mixed by their estimated errors."""
    denoise, schedule = ready(model)
    f, error, link = restore_staged(y, level, steps)
    pair = [ddpm.denoise_photo(denoise, schedule, q.expand(-1, 3, -1, -1), math.hypot(level, link.S), 4) for q in (link.q, hybrid.mirror(y, link).q)]
    pair = [x.mean(1, keepdim=True) for x in pair] if y.shape[1] == 1 else pair
    mixed, expected = hybrid.blend(f, error, sum(pair) / 2, hybrid.pair_risk(*pair, y, level, link))
    print(f"blended with the diffusion model's picture: expected PSNR {-10 * math.log10(max(expected, 1e-6)):.1f} dB")
    return mixed


def restore_handover(y, operator, shape, steps, model, samples) -> Tensor:
    """Hybrid II: a brief DIP opens the reverse process, and goes on inside it; `samples` alternatives (n, C, H, W)."""
    (denoise, schedule), steps, generator = ready(model), steps or 100, torch.Generator().manual_seed(0)
    net, z = cropped_dip(generator, shape, 3)
    unseen = hybrid.kept_back(y, operator, generator)
    fit = dip.fit(y * (1 - unseen), lambda x: operator.A(x) * (1 - unseen), net, z, steps, generator, amp=AMP)
    step = deque(tqdm(fit, total=steps, desc="DIP, brief"), 1).pop()
    state = {name: w.clone() for name, w in net.state_dict().items()}
    held_out, opinion, entry = hybrid.kept_error(step.average, y, operator, unseen), second_opinion(y, operator, unseen), Entry()
    t, found = hybrid.enter_step(schedule, hybrid.together(held_out, opinion[1]), KAPPA), []
    print(f"the chain is entered at step {t} of {schedule.T}; by what was kept back, DIP weighs {100 * opinion[1] / (held_out + opinion[1]):.0f} % against interpolation")
    for _ in tqdm(range(samples), desc="reverse process", disable=samples == 1):
        net.load_state_dict(state)
        consistent, again = hybrid.agree(y, operator, 0.0, torch.zeros(schedule.T + 1)), inside(entry, y, operator, net, z, generator, t, held_out, opinion)
        chain = hybrid.hand_over(step.average, denoise, schedule, t, entry.steps, generator, refine=hybrid.in_turn(consistent, again, consistent))
        found.append(ddpm.to_image(deque(tqdm(chain, total=entry.steps + 1, desc="reverse process", disable=samples > 1), 1).pop().x))
    return torch.cat(found)


def restore_guided(y, operator, level, shape, steps, model) -> Tensor:
    """Hybrid III: DIP with the diffusion model in its loss; the last running average is delivered, nothing has to stop."""
    (denoise, schedule), steps, generator = ready(model), steps or (800 if level else 450), torch.Generator().manual_seed(0)
    net, z = cropped_dip(generator, shape, 3)
    fit = hybrid.guided_fit(y, operator.A, net, z, steps, generator, denoise, schedule, amp=AMP,
                            **Guided("", "", steps, model).options(y, denoise, schedule, level, torch.Generator().manual_seed(1)))
    step = deque(tqdm(fit, total=steps, desc="guided DIP"), 1).pop()
    return step.average if level else projection(step.average, y, operator)


def restore_ddpm(y, operator, task, level, shape, steps, model) -> Tensor:
    """Diffusion: one step at the matching noise, or a DDIM chain whose every guess is made to agree with y (range–null space)."""
    denoise, schedule = ready(model)
    if task == "denoise":
        return ddpm.denoise_photo(denoise, schedule, y, level)
    refine = hybrid.agree(y, operator, 0.0, torch.zeros(schedule.T + 1))
    generator, count = torch.Generator().manual_seed(0), steps or 50
    x = torch.randn(1, 3, *shape, generator=generator).to(DEVICE)
    chain = ddpm.ddim(denoise, schedule, x, count, generator, eta=0.85, refine=refine)
    return ddpm.to_image(deque(tqdm(chain, total=count, desc=f"DDPM, {task}"), 1).pop().x)


# ----------------------------------------------------------------------------------------------- command line

def command_line() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("all", "run what is missing, then figures and report"), ("report", "render the report from out/"),
                       ("figures", "draw the figures again from the cache"), ("bench", "where the time goes on this machine")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--scale", choices=SCALES, default="full")
        command.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    command = commands.add_parser("restore", help="restore a photo of yours")
    for name in ("image", "task", "method", "sigma", "mask", "factor", "out", "images", "samples"):
        command.add_argument(f"--{name}", default={"method": "dip"}.get(name, ""))
    command.add_argument("--steps", type=int, default=0, help="at most so many DIP or sampling steps")
    learn = commands.add_parser("train", help="train a diffusion model on a folder of images of yours")
    learn.add_argument("--images", required=True)
    learn.add_argument("--out", default="")
    for command in (command, learn):
        command.add_argument("--train-steps", type=int, default=0, help=f"training steps (default {SCALES['full'].photos})")
    options = vars(parser.parse_args())
    command = options.pop("command")
    try:
        {"all": lambda: make_all(options["scale"], max(1, options["jobs"])), "report": lambda: make_report(options["scale"]),
         "figures": lambda: make_figures(options["scale"]), "bench": bench, "train": lambda: train(**options), "restore": lambda: restore(**options)}[command]()
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


if __name__ == "__main__":
    command_line()
