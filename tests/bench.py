"""`make bench`: where the time goes on one thread of the CPU; written to README.md and out/bench.json.

With LONG=1 also fits to equal PSNR and a photo of 512 × 512, restored: more than an hour."""
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import skimage.metrics
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpm  # noqa: E402
import dip  # noqa: E402
import experiments as E  # noqa: E402
import metrics  # noqa: E402

torch.set_num_threads(1)
torch.manual_seed(0)
G, MATRIX, PAIR = torch.Generator().manual_seed(0), torch.rand(1024, 1024), torch.rand(2, 1, 3, 512, 512)
FIVE = {"widths": (128,) * 5, "upsample": "bilinear", "padding": "reflect"}


def hourglass(size, n=1, **options):
    problem = dip.Problem(torch.rand(1, 3, size, size, device=E.DEVICE), dip.identity())
    y, (network, z) = problem.y.expand(n, -1, -1, -1), E.fresh(problem, G, n, **options)
    return functools.partial(next, dip.fit(y, lambda x: x, network, z, 10 ** 6, G))


class Plain(nn.Module):
    """The original's network (Ulyanov et al. 2018) written plainly: concatenations, no channels_last."""
    def __init__(self):
        super().__init__()
        like = dip.Hourglass(**FIVE)
        self.down, self.skip, self.up, self.image = like.down, like.skip, like.up, like.image
        self.enlarge = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x):
        crossing = []
        for down, skip in zip(self.down, self.skip):
            crossing.append(skip(x))
            x = down(x)
        for skip, up in zip(crossing[::-1], list(self.up)[::-1]):
            x = up(torch.cat([skip, self.enlarge(x)], 1))
        return self.image(x)


def plainly(y):
    """The original's loop: Adam as it comes, an average over updates, nothing else."""
    network, z, average = Plain(), 0.1 * torch.rand(1, 32, *y.shape[-2:]), None
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    while True:
        image = network(z + torch.randn_like(z) / 30)
        optimiser.zero_grad()
        nn.functional.mse_loss(image, y).backward()
        optimiser.step()
        average = image.detach() if average is None else 0.99 * average + 0.01 * image.detach()
        yield average


def training(data):
    widths, batch, lr = E.recipe(data)
    network = ddpm.UNet(3, widths).to(E.DEVICE, memory_format=torch.channels_last)
    return functools.partial(next, ddpm.train(network, ddpm.cosine(), batch, ddpm.v_head, 10 ** 6, G, lr=lr))


def progress(averages, clean, updates):
    """Best PSNR so far and seconds after each update."""
    began, found = time.perf_counter(), [(0.0, 0.0)]
    for _ in range(updates):
        score = metrics.psnr(next(averages).clamp(0, 1), clean).item()
        found.append((max(score, found[-1][0]), time.perf_counter() - began))
    return found


def restoring():
    """Seconds and peak memory (MB) of METHOD=auto on a noisy photo of 512 × 512."""
    with tempfile.TemporaryDirectory() as folder:
        path, began = f"{folder}/y.png", time.perf_counter()
        E.save_picture(E.measured(E.square("motorcycle_left", 512), "noise 25").y, Path(path))
        subprocess.run([sys.executable, E.__file__, "restore", f"image={path}", "task=denoise"], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return time.perf_counter() - began, peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


work = {"matrix product, 1024²": lambda: MATRIX @ MATRIX, "SSIM, 512², colour": lambda: metrics.ssim(*PAIR)}
theirs = functools.partial(
    skimage.metrics.structural_similarity, *PAIR[:, 0].double().numpy(), channel_axis=0, data_range=1,
    gaussian_weights=True, use_sample_covariance=False, sigma=1.5)
work |= {"SSIM of scikit-image": theirs}
work |= {f"U-Net training step, {data}": training(data) for data in ("cats", E.GROUPS[0])}
for side, n in ((32, 1), (32, 16), (64, 1), (64, 2), (96, 1), (96, 2), (128, 1), (256, 1)):
    work[f"DIP update, {side}², {n} as one"] = hourglass(side, n)
for side in (128, 256):
    work[f"original network, {side}², here"] = hourglass(side, **FIVE)
    work[f"original network, {side}², plain"] = functools.partial(next, plainly(torch.rand(1, 3, side, side)))
rows = {}
for name, step in work.items():
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    best = min(timeit.repeat(step, number=1, repeat=5))
    rows[name] = {"ms": 1000 * best, "GFLOP/s": counter.get_total_flops() / best / 1e9}
    print(f"{name:45s} {rows[name]['ms']:8.1f} ms {rows[name]['GFLOP/s']:8.1f} GFLOP/s", flush=True)
facts = {}
for data in ("cats", E.GROUPS[0]):
    seconds, images = rows[f"U-Net training step, {data}"]["ms"] / 1000, len(E.recipe(data)[1](G))
    facts[f"U-Net training, {data}"] = f"{images / seconds:.0f} images/s"
if sys.argv[1:] == ["long"]:
    clean = E.square("motorcycle_left", 128)
    y = E.measured(clean, "noise 25").y
    network, z = E.fresh(dip.Problem(y, dip.identity()), G)
    ours = (step.average for step in dip.fit(y, lambda x: x, network, z, 600, G))
    both = progress(ours, clean, 600), progress(plainly(y), clean, 1800)
    goal = min(found[-1][0] for found in both)
    here, plain = (next(seconds for score, seconds in found if score >= goal) for found in both)
    facts["DIP to equal PSNR, 128², σ = 25"] = f"{goal:.1f} dB: {here:.0f} s here, {plain:.0f} s plain"
    seconds, megabytes = restoring()
    model = "with" if E.PHOTOS[E.GROUPS[0]][-1].done() else "without"
    facts[f"restore of 512², METHOD=auto, {model} a model"] = f"{seconds:.0f} s, {megabytes:.0f} MB"
text = json.dumps({"steps": rows, "facts": facts}, ensure_ascii=False, indent=1)
E.write(E.OUT["full"] / "bench.json", text)
table = ["| one thread | ms | GFLOP/s |", "| --- | ---: | ---: |"]
table += [f"| {name} | {row['ms']:.1f} | {row['GFLOP/s']:.0f} |" for name, row in rows.items()]
table += [f"| {name}: {text} | | |" for name, text in facts.items()]
page = (E.ROOT / "README.md").read_text("utf-8")
E.write(E.ROOT / "README.md", E.between(page, "bench", "\n".join(table)))
