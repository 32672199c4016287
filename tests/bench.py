"""`make bench`: milliseconds a step and GFLOP/s on one thread, beside the same machine's matrix product."""
import functools
import sys
import timeit
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpm  # noqa: E402
import dip  # noqa: E402
import experiments as E  # noqa: E402
import metrics  # noqa: E402

torch.set_num_threads(1)
G, MATRIX, PAIR = torch.Generator().manual_seed(0), torch.rand(1024, 1024), torch.rand(2, 1, 3, 512, 512)


def hourglass(size, n=1, **options):
    problem = dip.Problem(torch.rand(1, 3, size, size, device=E.DEVICE), dip.identity())
    y, network = problem.y.expand(n, -1, -1, -1), E.fresh(problem, G, n, **options)
    return functools.partial(next, dip.fit(y, lambda x: x, *network, 99, G))


def training(data):
    widths, batch, lr = E.recipe(data)
    network = ddpm.UNet(3, widths).to(E.DEVICE, memory_format=torch.channels_last)
    return functools.partial(next, ddpm.train(network, ddpm.cosine(), batch, ddpm.v_head, 99, G, lr=lr))


work = {"matrix product 1024": lambda: MATRIX @ MATRIX, "SSIM 512×512 colour": lambda: metrics.ssim(*PAIR)}
work |= {f"U-Net training step, {data}": training(data) for data in ("cats", E.GROUPS[0])}
for side, n in ((32, 1), (32, 16), (64, 1), (64, 2), (96, 1), (96, 2)):
    work[f"DIP update {side}×{side}, {n} as one"] = hourglass(side, n)
original = hourglass(128, widths=(128,) * 5, upsample="bilinear", padding="reflect")
for name, step in (work | {"DIP update 128×128, original network": original}).items():
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    best = min(timeit.repeat(step, number=1, repeat=5))
    print(f"{name:40s} {1000 * best:8.1f} ms {counter.get_total_flops() / best / 1e9:8.1f} GFLOP/s")
