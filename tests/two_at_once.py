"""Two restores of a 64 × 64 picture at once must take no more than three times as long as one."""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PROGRAM = str(Path(__file__).resolve().parent.parent / "experiments.py")


def restore(folder, n):
    """Seconds that n restores take when they are started together."""
    words = ["task=denoise", "sigma=25", "method=held-out", "steps=60", f"image={folder}/y.png"]
    began = time.perf_counter()
    running = [subprocess.Popen([sys.executable, PROGRAM, "restore", *words, f"out={folder}/{k}.png"])
               for k in range(n)]
    assert not any([process.wait() for process in running])
    return time.perf_counter() - began


with tempfile.TemporaryDirectory() as where:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(f"{where}/y.png")
    one, two = restore(where, 1), restore(where, 2)
print(f"one {one:.1f} s, two at once {two:.1f} s: {two / one:.2f} times")
sys.exit(two > 3 * one)
