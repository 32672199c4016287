"""Data, the two stores, the report's holes and claims, and the restore command."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dip
import experiments as E

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------------------------------- data

def test_cats_are_324000_and_their_parts_are_what_is_drawn():
    assert np.prod(list(E.CAT_FACTORS.values())) == 324_000
    assert [len(layer) for layer in E.cat_layers()] == list(E.CAT_FACTORS.values())
    g = torch.Generator().manual_seed(0)
    parts = E.draw_cats(g, 4000, keep=E.everything)
    assert len(parts) == 4000 and all(parts[:, i].unique().tolist() == list(range(k)) for i, k in enumerate(E.CAT_FACTORS.values()))
    numbers = E.cat_number(parts)
    assert numbers.min() >= 0 and numbers.max() < 324_000 and len(numbers.unique()) == len(parts.unique(dim=0))
    assert E.held_out(parts).float().mean().item() == pytest.approx(E.HELD_OUT_SHARE, abs=0.015) and E.HELD_OUT_SHARE == pytest.approx(13 / 135)
    training = E.draw_cats(g, 4000)
    assert len(training) == 4000 and not E.held_out(training).any()
    cats = E.render_cats(parts[:8])
    assert cats.shape == (8, 3, 32, 32) and cats.min() >= 0 and cats.max() <= 1 and (cats[:, :, 0, 0] == 1).all()


def test_a_cat_is_its_layers_laid_over_white():
    """Against Pillow's own compositing, at full size, then reduced."""
    parts = torch.tensor([[3, 5, 7, 2, 9]])
    root = Path(__import__("importlib.util").util.find_spec("robohash").origin).parent / "sets" / "set4"
    picture = Image.new("RGBA", (1024, 1024), "white")
    for folder, i in zip(sorted(f for f in root.iterdir() if f.is_dir()), parts[0].tolist()):
        file = [p for p in sorted(folder.glob("*.png"), key=lambda p: int(re.match(r"\d+", p.name)[0])) if p.name != "006#fur6.png"][i]
        picture = Image.alpha_composite(picture, Image.open(file).convert("RGBA"))
    expected = torch.from_numpy(np.asarray(picture.convert("RGB").resize((32, 32), Image.Resampling.BOX), np.float32) / 255).permute(2, 0, 1)
    assert (E.render_cats(parts)[0] - expected).abs().mean() < 0.01


def test_the_fur_left_out_is_a_twin():
    folder = Path(__import__("importlib.util").util.find_spec("robohash").origin).parent / "sets" / "set4" / "001#01fur"
    assert all(np.asarray(Image.open(folder / f"00{i}#fur{i}.png").convert("RGBA"))[..., 3].max() == 0 for i in (2, 6))    # both are empty


def test_photos():
    for name in E.TEST + E.DEVELOPMENT:
        found = E.crops(name)
        assert len(found) == 3 and all(x.shape == (1, 3, 128, 128) and 0 <= x.min() and x.max() <= 1 for x in found.values())
    assert len(E.views(E.TEST)) == 12
    assert torch.equal(E.photo_named("chelsea-left", 96), E.crops("chelsea.png", 96)["chelsea-left"])
    a, b = (E.photo_patches(E.training_photos(), torch.Generator().manual_seed(s), 4) for s in (0, 0))
    assert a.shape == (4, 3, 64, 64) and torch.equal(a, b)


@pytest.mark.parametrize("task", E.TASKS)
def test_measurements(task):
    clean = E.photo_named("coffee-whole", 96)
    y, operator = E.measure(task, clean, torch.Generator().manual_seed(0))
    again, _ = E.measure(task, clean, torch.Generator().manual_seed(0))
    assert torch.equal(y, again) and operator.A(clean).shape == y.shape
    assert (y - operator.A(clean)).std().item() == pytest.approx(E.TASKS[task] / 255, rel=0.02)
    if task in ("random80", "block"):
        known = operator.A(torch.ones(1, 1, 96, 96)).mean().item()
        assert known == pytest.approx({"random80": 0.2, "block": 15 / 16}[task], abs=0.01)


def test_noise_is_estimated_from_the_photo():
    for name in ("motorcycle_left-left", "hubble_deep_field-left"):
        x = E.photo_named(name, 128)
        y = x + 25 / 255 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        assert E.estimate_sigma(y) == pytest.approx(25 / 255, rel=0.15)
    assert E.estimate_sigma(torch.full((1, 1, 20, 20), 0.5)) == 0


def test_statistics():
    v = E.interval([1.0, 2.0, 3.0, 4.0])
    assert v["mean"] == 2.5 and 1 <= v["low"] < 2.5 < v["high"] <= 4 and v["n"] == 4 and E.interval([1.0, 2.0, 3.0, 4.0]) == v
    s = E.share(10, 100, 0.1)                                                        # Wilson's interval of 10 in 100 is [0.0552, 0.1744]
    assert s["mean"] == pytest.approx(1) and s["low"] == pytest.approx(0.552, abs=2e-3) and s["high"] == pytest.approx(1.744, abs=2e-3)


def test_real_cats_examined_as_samples_are_the_floor():
    g = torch.Generator().manual_seed(0)
    parts = E.draw_cats(g, 600, keep=E.everything)

    class Blind(torch.nn.Module):
        features = staticmethod(lambda x: x.flatten(1)[:, :8])

        def forward(self, x):
            return [torch.zeros(len(x), k) for k in E.CAT_FACTORS.values()]                                      # no guess at all
    seen = torch.zeros(324_000)
    seen[E.cat_number(parts[:150])] = 1
    found = E.examine(Blind(), E.render_cats(parts), seen)
    assert (found["parts"] == parts).float().mean() > 0.99
    assert found["fidelity"] < 1e-3 and min(found["entropy"].values()) > 0.98 and found["held_out"] == int(E.held_out(parts).sum())
    assert found["seen"] == pytest.approx(0.25, abs=0.01)
    parts[:] = parts[:1].clone()                                                                           # a collapsed model
    found = E.examine(Blind(), E.render_cats(parts), seen)
    assert max(found["entropy"].values()) == 0 and found["pair_entropy"] == 0


# ------------------------------------------------------------------------------------------------------- stores

@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the source that can be edited, and the keys of two runs as they follow from it."""
    for name in ("metrics", "ddpm", "dip", "hybrid", "experiments"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    monkeypatch.setattr(E, "ROOT", tmp_path)

    def keys():
        E.definitions.cache_clear(), E.fingerprint.cache_clear()
        return E.Fit("chelsea-left", "denoise25", 5).key, E.Train("cats", 5).key

    def edit(name, old, new):
        path = tmp_path / f"{name}.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        return keys()
    yield keys, edit
    E.definitions.cache_clear(), E.fingerprint.cache_clear()


def test_a_key_follows_the_code_that_a_run_uses_and_nothing_else(copy):
    keys, edit = copy
    fit, train = keys()
    assert keys() == (fit, train)
    assert edit("dip", '"""Stop after n steps, whatever happens."""', '"""Other words."""  # and a comment') == (fit, train)
    assert edit("ddpm", "\ndef q_sample", "\n\n\n# a comment\ndef q_sample") == (fit, train)
    fit2, train2 = edit("dip", "nn.LeakyReLU(0.2", "nn.LeakyReLU(0.1")
    assert fit2 != fit and train2 == train
    fit3, train3 = edit("ddpm", "widths: tuple = (32, 64, 96)", "widths: tuple = (32, 64, 64)")
    assert fit3 == fit2 and train3 != train
    fit4, train4 = edit("experiments", '"denoise25": 425', '"denoise25": 426')
    assert fit4 != fit3 and train4 == train3


def test_a_key_follows_every_setting():
    base = E.Fit("chelsea-left", "denoise25", 5)
    changed = [E.Fit("chelsea-right", "denoise25", 5), E.Fit("chelsea-left", "block", 5), E.Fit("chelsea-left", "denoise25", 6),
               E.Fit("chelsea-left", "denoise25", 5, seed=1), E.Fit("chelsea-left", "denoise25", 5, jitter=0.0)]
    assert len({run.key for run in [base, *changed]}) == 6
    assert E.SampleCats(E.Train("cats", 5), E.LearnToSee(1), 4).key != E.SampleCats(E.Train("cats", 6), E.LearnToSee(1), 4).key


def test_writes_are_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    E.write(path, lambda p: p.write_text("old"))

    def fail(p):
        p.write_text("ha")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        E.write(path, fail)
    assert path.read_text() == "old"


def test_killed_work_is_resumed_and_finished_work_is_left_alone(tmp_path):
    for name in ("metrics", "ddpm", "dip", "hybrid", "experiments"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    script = tmp_path / "work.py"
    script.write_text("import experiments as E\nif __name__ == '__main__':\n"
                      "    E.execute([E.LearnToSee(3), E.LearnToSee(4), E.LearnToSee(int(__import__('sys').argv[1]))], 2)\n    print('finished')\n")
    process = subprocess.Popen([sys.executable, str(script), "100000"], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    began = time.time()
    while len(list((tmp_path / ".cache").glob("*.pt") if (tmp_path / ".cache").exists() else [])) < 2 and time.time() - began < 90:
        time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".cache").glob("LearnToSee-????????????????.pt")}
    assert len(kept) == 2
    for _ in range(2):
        done = subprocess.run([sys.executable, str(script), "5"], cwd=tmp_path, capture_output=True, text=True)
        assert "finished" in done.stdout, done.stderr
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".cache").glob("LearnToSee-????????????????.pt")}
    assert len(after) == 3 and kept.items() <= after.items()


def test_interrupted_training_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(E, "CACHE", tmp_path)
    run = E.Train("cats", 6)
    whole = run.execute(lambda *a: None)
    ticks = iter(range(0, 10 ** 9, 100))
    monkeypatch.setattr(E.time, "perf_counter", lambda: next(ticks))                     # every step is "a minute later"

    def interrupt(done, note):
        if done > 0.6:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run.execute(interrupt)
    assert [p.name for p in tmp_path.iterdir()] == [f"Train-{run.key}.part.pt"]
    again = run.execute(lambda *a: None)
    assert again["losses"] == whole["losses"] and torch.equal(again["seen"], whole["seen"])
    assert all(torch.equal(again["ema"][1.0][k], v) for k, v in whole["ema"][1.0].items())
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- report

RESULTS = {"a": {"b": {"c": 1.2345}, "v": {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 4}, "tables": {"t": "| x |"}}}


def test_holes_tables_and_claims():
    assert E.render("x <<a.b.c:.2f>> y", RESULTS) == "x 1.23 y"
    assert E.render("<<a.v>> <<a.v:1>>", RESULTS) == "2.00 [1.00, 3.00] 2.0 [1.0, 3.0]"
    assert E.render("<<a.tables.t>>", RESULTS) == "| x |"
    assert E.render("<<100 * a.b.c - a.v.low:.0f>> %", RESULTS) == "122 %"
    assert E.render("<!-- claim: a.b.c > 1 and a.v.low == 1 -->\nSo it is.", RESULTS) == "So it is."


@pytest.mark.parametrize("template, message", [
    ("<<a.b.d:.2f>>", "hole"), ("<<nothing>>", "hole"), ("<!-- claim: a.b.c > 2 -->", "is false"), ("<!-- claim: a.x > 2 -->", "claim"),
    ("<<a.b.c:.2q>>", "hole"), ("<!-- claim: a.b.c > 1 and\na.b.c > 2 -->", "is false"), ("<!-- claim: open('x') -->", "claim")])
def test_unknown_holes_and_false_claims_fail_the_build(template, message):
    with pytest.raises(E.Refusal, match=message):
        E.render(template, RESULTS)


class Tiny:
    """An experiment of one run, for the machinery."""

    def __init__(self, scale):
        self.runs = [E.LearnToSee(1, seed=5)]

    def assemble(self):
        return {"weights": len(self.runs[0].result()["eye"])}, {}

    def figures(self, values):
        return {"sheet": lambda: E.sheet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 2)}


def test_all_computes_on_a_fresh_clone_and_does_nothing_twice(tmp_path, monkeypatch):
    """Committed results are not a computation: without the cache of runs everything is done again; with it nothing is."""
    monkeypatch.setattr(E, "EXPERIMENTS", {"tiny": Tiny})
    monkeypatch.setattr(E, "CACHE", tmp_path / "cache")
    rendered, worked = [], []
    monkeypatch.setattr(E, "make_report", rendered.append)
    monkeypatch.setattr(E, "path_name", str)

    def work(runs, jobs):
        for run in [r for r in runs if not r.path.exists()]:
            worked.append(run)
            E.write(run.path, lambda p, run=run: torch.save(run.execute(lambda *a: None), p))
    monkeypatch.setattr(E, "execute", work)
    monkeypatch.setattr(E, "definitions", lambda: {("experiments", "LearnToSee"): __import__("ast").parse("1").body[0]})
    E.fingerprint.cache_clear()
    monkeypatch.setattr(E, "ROOT", tmp_path)
    try:
        for expected in (1, 1):
            E.make_all("full", 1)
            assert len(worked) == expected and (tmp_path / "out" / "tiny_sheet.png").exists()
        stamp = (tmp_path / "out" / "tiny.json").stat().st_mtime_ns
        E.make_all("full", 1)
        assert (tmp_path / "out" / "tiny.json").stat().st_mtime_ns == stamp and len(rendered) == 3
        shutil.rmtree(tmp_path / "cache")
        E.make_all("full", 1)
        assert len(worked) == 2
        (tmp_path / "out" / "tiny_sheet.png").unlink()
        E.make_all("full", 1)
        assert len(worked) == 2 and (tmp_path / "out" / "tiny_sheet.png").exists()
        E.make_all("quick", 1)
        assert (tmp_path / "out-quick" / "tiny.json").exists() and len(worked) == 2
    finally:
        E.fingerprint.cache_clear()


def test_a_missing_broken_or_stale_result_cannot_be_used(tmp_path):
    with pytest.raises(E.Refusal, match="missing or broken"):
        E.read_results("quick", tmp_path)
    for name in E.EXPERIMENTS:
        (tmp_path / f"{name}.json").write_text('{"key": "some other"}')
    with pytest.raises(E.Refusal, match="other code or settings"):
        E.read_results("quick", tmp_path)
    (tmp_path / "ddpm.json").write_text('{"key": "half')
    with pytest.raises(E.Refusal, match="missing or broken"):
        E.read_results("quick", tmp_path)


def prose(text):
    """What was typed: holes, claims, code, links, comments and formulas taken out."""
    for pattern in (r"^#.*?$", r"<<.*?>>", r"<!--.*?-->", r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"[Ss]ection \d\.\d"):
        text = re.sub(pattern, "", text, flags=re.M if pattern[0] == "^" else re.S)
    return text


def test_no_typed_number_that_a_computer_produced():
    """Decimals, and numbers with a unit of measurement, come from holes only."""
    typed = re.findall(r"(?<![\w.])\d+\.\d+(?![\d.]*\w*/)|\d+\s*(?:dB|%|seconds|minutes|s\b|ms\b|GFLOP)", prose((ROOT / "REPORT.in.md").read_text()))
    assert not typed, typed
    assert re.findall(r"\d+\s*(?:dB)", prose("We got 27 dB")) and not re.findall(r"\d+\s*(?:dB)", prose("We got <<a.b>> dB"))


def test_the_report_is_the_render_of_the_committed_results():
    results = {name: r["values"] | {"tables": r["tables"], "hardware": r["hardware"], "runs": r["runs"], "core_seconds": r["core_seconds"]}
               for name, r in E.read_results("full", ROOT / "out").items()}
    assert E.render((ROOT / "REPORT.in.md").read_text(), results) == (ROOT / "REPORT.md").read_text()
    for file in re.findall(r"\]\((out/[^)]*)\)", (ROOT / "REPORT.md").read_text() + (ROOT / "README.md").read_text()):
        assert (ROOT / file).exists(), file


# ------------------------------------------------------------------------------------------------------ restore

def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return str(path)


def noisy(h=40, w=37, channels=3):
    x = np.clip(np.linspace(60, 190, w)[None, :, None] + np.random.default_rng(0).normal(0, 25, (h, w, channels)), 0, 255).astype(np.uint8)
    return x.squeeze(2) if channels == 1 else x


@pytest.mark.parametrize("kind", ["rgb.png", "grey.png", "rgba.png", "rgb.jpg", "rgb.webp", "palette.png", "deep.png"])
def test_any_usual_picture_is_denoised_at_its_own_size(tmp_path, kind):
    path = tmp_path / kind
    if kind == "grey.png":
        save(path, noisy(channels=1))
    elif kind == "rgba.png":
        save(path, np.dstack([noisy(), np.full((40, 37), 128, np.uint8)]))
    elif kind == "palette.png":
        Image.fromarray(noisy()).quantize(64).save(path)
    elif kind == "deep.png":
        save(path, noisy(channels=1).astype(np.uint16) * 257)
    else:
        save(path, noisy())
    E.restore(str(path), "denoise", steps=3)
    result = Image.open(tmp_path / f"{path.stem}-restored.png")
    assert result.size == (37, 40) and (result.mode == "L") == (kind in ("grey.png", "deep.png"))
    assert Image.open(tmp_path / f"{path.stem}-restored-before-after.png").size == (37 * 2 + 8, 40)


def test_exif_rotation_is_obeyed_and_transparency_is_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "turned.jpg", noisy(), exif=exif)
    assert E.read_image(path).shape == (1, 3, 37, 40)
    clear = np.zeros((20, 20, 4), np.uint8)
    assert E.read_image(save(tmp_path / "clear.png", clear)).min() == 1
    deep = np.full((20, 20), 65535, np.uint16)
    assert E.read_image(save(tmp_path / "deep.png", deep)).max() == 1


def test_inpainting_keeps_what_is_known_and_superres_enlarges(tmp_path):
    x, known = noisy(), np.full((40, 37), 255, np.uint8)
    known[10:20, 10:20] = 0
    path, mask = save(tmp_path / "x.png", x), save(tmp_path / "mask.png", known)
    E.restore(path, "inpaint", mask=mask, steps=3, out=str(tmp_path / "out.png"))
    result = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert np.abs(result - x)[known > 0].max() <= 1 and np.abs(result[12:18, 12:18]).max() > 0
    E.restore(path, "superres", factor="3", steps=3, out=str(tmp_path / "big.webp"))
    assert Image.open(tmp_path / "big.webp").size == (111, 120)


def test_the_diffusion_model_restores_and_agrees_with_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(E, "CACHE", tmp_path)
    run = E.Train("photos", 2)
    E.write(run.path, lambda p: torch.save(run.execute(lambda *a: None), p))
    monkeypatch.setattr(E, "DDPM", lambda scale: SimpleNamespace(photos=run))
    path, known = save(tmp_path / "x.png", noisy(36, 40)), np.full((36, 40), 255, np.uint8)
    known[10:20, 10:20] = 0
    mask = save(tmp_path / "mask.png", known)
    for task, size in (("denoise", (40, 36)), ("inpaint", (40, 36)), ("superres", (80, 72))):
        E.restore(path, task, method="ddpm", mask=mask, steps=2, out=str(tmp_path / f"{task}.png"))
        assert Image.open(tmp_path / f"{task}.png").size == size
    for task, method, size, more in (("denoise", "blend", (40, 36), {}), ("inpaint", "handover", (40, 36), {"samples": "2"}), ("superres", "handover", (80, 72), {}),
                                     ("denoise", "guided", (40, 36), {}), ("superres", "guided", (80, 72), {})):
        E.restore(path, task, method=method, mask=mask, steps=2, out=str(tmp_path / f"{task}-{method}.png"), **more)
        assert Image.open(tmp_path / f"{task}-{method}.png").size == size
    first, second, map_ = (np.asarray(Image.open(tmp_path / f"inpaint-handover-{n}.png")).astype(int) for n in ("1", "2", "disagreement"))
    assert np.abs(first - second)[12:18, 12:18].max() > 0 and map_[12:18, 12:18].max() > 0 and np.abs(first - np.asarray(Image.open(path)))[known > 0].max() <= 1
    x, filled, big = (np.asarray(Image.open(tmp_path / f)).astype(float) for f in ("x.png", "inpaint.png", "superres.png"))
    assert np.abs(filled - x)[known > 0].max() <= 1
    assert np.abs(big.reshape(36, 2, 40, 2, 3).mean((1, 3)) - x).mean() < 2                         # but for clipping and rounding


def test_refusals_are_one_sentence(tmp_path):
    good = save(tmp_path / "good.png", noisy())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(Path(good).read_bytes()[:900])
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    white, black = (save(tmp_path / f"{v}.png", np.full((40, 37), v, np.uint8)) for v in (255, 0))
    small, other = save(tmp_path / "small.png", noisy(9, 9)), save(tmp_path / "other.png", noisy(41, 37))
    cases = [(dict(image=str(tmp_path / "none.png"), task="denoise"), "no file"), (dict(image=str(tmp_path / "broken.png"), task="denoise"), "cannot be read"),
             (dict(image=str(tmp_path / "empty.jpg"), task="denoise"), "cannot be read"), (dict(image=str(tmp_path / "cut.png"), task="denoise"), "cannot be read"),
             (dict(image=str(tmp_path / "nan.tiff"), task="denoise"), "not numbers"), (dict(image=small, task="denoise"), "sides of at least"),
             (dict(image=good, task="sharpen"), "unknown task"), (dict(image="", task="denoise"), "needs IMAGE"), (dict(image=good, task=""), "needs IMAGE"), (dict(image=good, task="denoise", method="magic"), "unknown method"),
             (dict(image=good, task="superres", method="staged"), "denoises only"), (dict(image=good, task="superres", method="blend"), "denoises only"),
             (dict(image=good, task="denoise", method="handover"), "opens the chain"), (dict(image=good, task="superres", samples="2"), "alternatives"),
             (dict(image=good, task="superres", method="handover", samples="0"), "SAMPLES=0"), (dict(image=good, task="denoise", method="ddpm", images=str(tmp_path / "none")), "not a folder"),
             (dict(image=good, task="denoise", sigma="loud"), "SIGMA=loud"), (dict(image=good, task="denoise", sigma="nan"), "SIGMA=nan"),
             (dict(image=good, task="denoise", sigma="-3"), "SIGMA=-3"), (dict(image=good, task="denoise", sigma="300"), "SIGMA=300"),
             (dict(image=good, task="superres", factor="1"), "FACTOR=1"), (dict(image=good, task="inpaint"), "needs MASK"),
             (dict(image=good, task="inpaint", mask=white), "nothing is missing"), (dict(image=good, task="inpaint", mask=black), "nothing is known"),
             (dict(image=good, task="inpaint", mask=other), "make them equal"), (dict(image=good, task="denoise", out=str(tmp_path / "no" / "x.png")), "cannot write"),
             (dict(image=good, task="denoise", out=str(tmp_path / "x.txt")), "cannot write"), (dict(image=str(tmp_path), task="denoise"), "cannot be read"),
             (dict(image=save(tmp_path / "flat.png", np.full((40, 40), 9, np.uint8)), task="denoise"), "no noise was found")]
    for arguments, message in cases:
        with pytest.raises(E.Refusal, match=message) as caught:
            E.restore(**arguments)
        assert "\n" not in str(caught.value)
    done = subprocess.run([sys.executable, str(ROOT / "experiments.py"), "restore", "--image", str(tmp_path / "none.png"), "--task", "denoise"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no file") and len(done.stderr.strip().splitlines()) == 1


def test_restoring_brings_a_photo_closer_to_the_truth(tmp_path):
    x = E.photo_named("motorcycle_left-right", 96)
    y = x + 50 / 255 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "y.png"
    E.save_picture(y, path)
    E.restore(str(path), "denoise", sigma="50", steps=350)
    before, after = E.score(E.read_image(str(path)), x), E.score(E.read_image(str(tmp_path / "y-restored.png")), x)
    assert after["psnr"] > before["psnr"] + 5


def test_a_staged_restoration_says_when_it_stopped_and_what_it_expects(tmp_path, capsys):
    x = E.photo_named("motorcycle_left-right", 96)[..., :45, :61]
    y = (0.25 + 0.5 * x) + 25 / 255 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    E.save_picture(y, tmp_path / "y.png")
    E.restore(str(tmp_path / "y.png"), "denoise", method="staged", sigma="25", steps=500)
    words = re.search(r"stopped after (\d+) steps, least estimated error at step (\d+): expected PSNR ([\d.]+) dB", capsys.readouterr().out)
    result = E.read_image(str(tmp_path / "y-restored.png"))
    true = E.score(result, 0.25 + 0.5 * x)["psnr"]
    assert result.shape == x.shape and int(words[1]) == int(words[2]) + 15 < 500 and abs(float(words[3]) - true) < 1.5
    assert true > E.score(E.read_image(str(tmp_path / "y.png")), 0.25 + 0.5 * x)["psnr"] + 5


def test_a_model_is_trained_on_a_folder_and_used(tmp_path, monkeypatch):
    monkeypatch.setattr(E, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(E, "execute", lambda runs, jobs: [E.write(r.path, lambda p, r=r: torch.save(r.execute(lambda *a: None), p)) for r in
                                                          (*runs[0].needs, runs[0]) if not r.path.exists()])
    folder = tmp_path / "my photos"
    folder.mkdir()
    with pytest.raises(E.Refusal, match="not a folder with images"):
        E.train(str(folder))
    save(folder / "small.png", noisy(20, 20))
    with pytest.raises(E.Refusal, match="at least 64"):
        E.train(str(folder))
    save(folder / "a.png", noisy(70, 130)), save(folder / "b.jpg", noisy(64, 64, 1))
    E.training_photos.cache_clear()
    assert [tuple(x.shape) for x in E.training_photos(str(folder))] == [(3, 70, 130), (3, 64, 64)]
    E.train(str(folder), out=str(tmp_path / "samples.png"), train_steps=2)
    assert Image.open(tmp_path / "samples.png").size[0] > 200
    E.restore(save(tmp_path / "x.png", noisy()), "denoise", method="ddpm", images=str(folder), train_steps=2)
    assert (tmp_path / "x-restored.png").exists() and len(list((tmp_path / "cache").glob("Train-*.pt"))) == 1


@pytest.mark.parametrize("noise", ["gaussian", "clipped", "poisson", "salt and pepper"])
def test_every_noise_has_the_mean_square_it_claims(noise):
    clean = 0.2 + 0.6 * torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    y = E.corrupt(clean, noise, 0.1, torch.Generator().manual_seed(1))
    assert (y - clean).square().mean().sqrt().item() == pytest.approx(0.1, rel=0.03) and abs((y - clean).mean().item()) < 0.01


def test_a_staged_run_measures_the_noise_of_its_plain_twin():
    """Same photo, task and seed: the same noisy photo as in the plain fit; and the delivered pictures do not depend on the scores."""
    staged, plain = E.Staged("coffee-left", "denoise25", 8, ratios=(0.5, 0.25), widths=(4, 4), size=32), E.Fit("coffee-left", "denoise25", 2, widths=(4, 4), size=32)
    seen = staged.execute(lambda *a: None)
    assert (seen["pictures"]["measured"] == plain.execute(lambda *a: None)["pictures"]["measured"]).all()
    assert [s["ratio"] for s in seen["stages"]] == pytest.approx([0.5, 0.25], rel=0.02) and len(seen["curves"]["psnr"]) == 16
    twice = E.Staged("coffee-left", "denoise25", 8, ratios=(0.25,), copies=2, widths=(4, 4), size=32).execute(lambda *a: None)
    assert len(twice["stages"]) == 2 and math.isfinite(twice["expected"])


def test_sure_is_the_misfit_and_the_answer_of_a_twin_to_a_little_noise():
    """Misfit + 2σ² divergence − σ² along the very fit that `Fit` makes; the twin differs by S ξ in its target alone."""
    fit = E.Fit("coffee-whole", "denoise25", 5, size=32)
    run = E.Sure(fit, patience=99)
    found = run.execute(lambda *_: None)
    y, operator = E.measure("denoise25", E.photo_named("coffee-whole", 32), fit.generator("coffee-whole/denoise25"))
    sigma, xi = 25 / 255, torch.randn(y.shape, generator=run.generator("xi"))

    def averages(target):
        g = fit.generator("coffee-whole/denoise25/start 0")
        return [step.average for step in dip.fit(target, operator.A, *E.fresh_dip(g, (32, 32)), 5, g, amp=E.AMP)]
    pairs = list(zip(averages(y), averages(y + sigma / 4 * xi)))
    expected = [float((f - y).square().mean() + 2 * sigma ** 2 * ((g - f) * xi).mean() / (sigma / 4) - sigma ** 2) for f, g in pairs]
    assert found["values"].tolist() == pytest.approx(expected, rel=1e-4) and found["step"] == 1 + int(np.argmin(expected))
    psnr = [-10 * math.log10(float((f - E.photo_named("coffee-whole", 32)).square().mean())) for f, _ in pairs]
    assert fit.execute(lambda *_: None)["curves"]["average_psnr"].tolist() == pytest.approx(psnr, abs=1e-4)


@pytest.mark.parametrize("task", ["random80", "block", "bigblock", "superres4"])
def test_what_is_kept_back_was_measured(task):
    """Where four fifths of the pixels are missing, they must not count as kept back: they would make every error look five times smaller."""
    run = E.Enter(("coffee-whole",), task, E.Train("photos", 2), ())
    clean, y, operator, unseen = run.measured("coffee-whole")
    known = operator.A(torch.ones_like(clean))[:, :1]
    assert set(unseen.unique().tolist()) == {0, 1} and (unseen <= known).all()
    assert float(unseen.sum() / known.sum()) == pytest.approx(0.07 if task == "bigblock" else 0.05, abs=0.02)              # two squares of 18 × 18 are more
    again, _ = E.measure(task, clean, run.generator(f"coffee-whole/{task}"))
    assert torch.equal(y, again)
    run = E.Enter(("coffee-whole",), task, E.Train("photos", 2), (), size=32)
    found = run.brief(y, operator, unseen, clean.shape, [3], torch.Generator().manual_seed(0))[3]
    error = (operator.A(found[0]) - y).square()
    assert found[2] == pytest.approx(float(error[unseen.expand_as(y) == 1].mean()), rel=1e-4)


@pytest.mark.parametrize("h, w, deep", [(24, 24, 12), (36, 36, 18), (14, 60, 7), (60, 13, 7)])
@pytest.mark.parametrize("seed", [0, 1])
def test_beside_a_wide_hole_squares_half_as_wide_are_kept_back(h, w, deep, seed):
    known = torch.ones(1, 1, 96, 96)
    known[..., 20:20 + h, 30:30 + w] = 0
    unseen = E.hybrid.kept_back(known, E.dip.mask(known), torch.Generator().manual_seed(seed))
    assert not (unseen * (1 - known)).any() and unseen.any()
    rows, columns = unseen[0, 0].nonzero().T
    assert 20 - deep <= rows.min() and rows.max() < 20 + h + deep and 30 - deep <= columns.min() and columns.max() < 30 + w + deep
    whole = -torch.nn.functional.max_pool2d(-unseen, deep, 1)                                             # where a whole square of that side is kept back
    again = torch.nn.functional.max_pool2d(torch.nn.functional.pad(whole, (deep - 1,) * 4), deep, 1)
    assert torch.equal(again, unseen)                                                                                # nothing but such squares
    assert not torch.equal(unseen, E.hybrid.kept_back(known, E.dip.mask(known), torch.Generator().manual_seed(seed + 7)))


@pytest.mark.parametrize("rows, columns", [((0, 96), (0, 96)), ((0, 96), (100, 192)), ((0, 60), (0, 90)), ((20, 96), (70, 192)), ((5, 94), (5, 190))])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_hole_at_the_border_does_not_hide_everything(rows, columns, seed):
    known = torch.ones(1, 1, 96, 192)
    known[..., slice(*rows), slice(*columns)] = 0
    unseen = E.hybrid.kept_back(known, E.dip.mask(known), torch.Generator().manual_seed(seed))
    assert unseen.any() and not (unseen * (1 - known)).any() and unseen.sum() <= 0.11 * known.sum() + 1
    picture, error = E.second_opinion(known.expand(-1, 3, -1, -1) * 0.5, E.dip.mask(known), unseen)
    assert abs(picture - 0.5).max() < 0.01 and error < 1e-6


def test_something_is_always_kept_back_and_scattered_where_that_is_wanted():
    known = torch.zeros(1, 1, 32, 32)
    known[..., 3, 4] = 1
    assert E.hybrid.kept_back(known, E.dip.mask(known), torch.Generator().manual_seed(0)).sum() == 1
    known[..., 10:] = 1
    loose = [E.hybrid.kept_back(known, E.dip.mask(known), torch.Generator().manual_seed(0), squares=False), (torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.05) * known]
    assert torch.equal(*loose)
    blurred = E.dip.Operator(lambda x: x * (1 - 1e-7), lambda y: y)                                                        # A(1) is not quite 1 everywhere
    assert 0.02 < E.hybrid.kept_back(torch.rand(1, 3, 64, 64), blurred, torch.Generator().manual_seed(0)).mean() < 0.08


def test_small_holes_keep_back_single_measurements():
    known = torch.ones(1, 1, 96, 96)
    known[..., 20:30, 30:40] = 0                                                                                # five deep
    unseen = E.hybrid.kept_back(known, E.dip.mask(known), torch.Generator().manual_seed(0))
    assert 0.03 < unseen.mean() < 0.07 and not (unseen * (1 - known)).any()
    everything = torch.zeros(1, 1, 40, 40)
    everything[..., :2] = 1                                                                         # no square of that side fits beside it
    assert not (E.hybrid.kept_back(everything, E.dip.mask(everything), torch.Generator().manual_seed(0)) * (1 - everything)).any()


@pytest.mark.parametrize("task", ["block", "random80", "superres4"])
def test_the_second_opinion_is_judged_on_what_it_did_not_see(task):
    clean = E.photo_named("coffee-left", 32)
    y, operator = E.measure(task, clean, torch.Generator().manual_seed(0))
    known = operator.A(torch.ones_like(clean))[:, :1]
    unseen = (torch.rand(known.shape, generator=torch.Generator().manual_seed(1)) < 0.2).float() * known
    picture, error = E.second_opinion(y, operator, unseen)
    assert torch.allclose(operator.A(picture), y, atol=1e-5)                                          # all measurements are in the picture …
    apart = E.classical_fill("fill", y, operator, unseen)                                             # … and the judged one has not seen these:
    assert torch.allclose(apart, E.classical_fill("fill", y * (1 - unseen), operator, unseen), atol=1e-5)
    assert error == pytest.approx(((operator.A(apart) - y).square() * unseen).sum().item() / (3 * unseen.sum().item()), rel=1e-4)
    ramp = torch.linspace(0.2, 0.8, 32).expand(1, 3, 32, 32)
    assert E.second_opinion(operator.A(ramp), operator, unseen)[1] < (1e-3 if task == "superres4" else 1e-5)                  # straight lines go on


@pytest.mark.parametrize("a, b", [(1.0, 3.0), (0.01, 0.01), (4.0, 0.0)])
def test_pictures_are_fused_with_the_least_error(a, b):
    """`together` is the least w² a + (1 − w)² b, and `inside` takes the weight that has it."""
    assert E.hybrid.together(a, b) == pytest.approx(min(w * w * a + (1 - w) ** 2 * b for w in np.linspace(0, 1, 2001)), abs=1e-6)
    y, (net, z) = torch.rand(1, 3, 32, 32), E.fresh_dip(torch.Generator().manual_seed(0), (32, 32), widths=(4, 4))
    state, guess, opinion = {n: w.clone() for n, w in net.state_dict().items()}, torch.zeros(1, 3, 32, 32), 0 * y + 0.25
    pictures = []
    for second in (None, (opinion, b)):
        net.load_state_dict(state)
        hook = E.inside(E.Entry(refits=2), y, E.dip.identity(), net, z, torch.Generator().manual_seed(1), 5, a, second)
        pictures.append(E.ddpm.to_image(hook(guess, 5)))
    assert torch.allclose(pictures[1], (b * pictures[0] + a * opinion) / (a + b), atol=1e-5)


class Fake:
    """A run whose result is given."""

    def __init__(self, **result):
        self.stored = result

    def result(self):
        return self.stored


def fake_fit(average, iterate, best):
    picture = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    names = ("clean", "measured", "oracle", "last", *best)
    return Fake(curves={"average_psnr": torch.tensor(average), "psnr": torch.tensor(iterate)}, best=best, stopped={}, seconds=1.0, pictures=dict.fromkeys(names, picture))


def test_every_rival_is_judged_by_the_curve_of_its_own_fit():
    plain, kept = fake_fit([20.0, 24.0, 23.0], [21.0, 22.0, 19.0], {"emv": 1}), fake_fit([19.0, 20.0, 22.5], [18.0, 19.0, 20.0], {"held_out": 2})
    stop, key, other = object.__new__(E.Stop), ("denoise25", "x-whole", 0), ("denoise50", "x-whole", 0)
    stop.plain, stop.held_out, stop.sure = {key: plain, other: plain}, {key: kept}, {key: Fake(step=3)}
    (k, emv), = stop.rival("emv", "denoise25").items()
    assert k == key and (emv["gap"], emv["iterate_gap"], emv["psnr"], emv["late"]) == (4, 1, 20, 1)
    held, = stop.rival("held_out", "denoise25").values()
    assert (held["gap"], held["psnr"], held["late"]) == (2.5, 20, 1)
    sure, = stop.rival("sure", "denoise25").values()
    assert (sure["gap"], sure["iterate_gap"], sure["psnr"], sure["late"]) == (1, 3, 23, 1)
    assert not stop.rival("sure", "denoise50") and not stop.rival("held_out", "denoise50")


def test_the_method_that_is_named_is_the_best_on_development_photos():
    final = object.__new__(E.Final)
    noisy, final.development = Fake(rows={"blend": {"psnr": 30.0}}), {}
    noisy.staged = Fake(psnr=29.0)
    final.outcome = lambda run: (run.result(), None)
    final.averaged = lambda runs: ({"psnr": 0.5 + float(np.mean([run.result()["psnr"] for run in runs]))}, None)
    for view, bonus in (("a", 3.0), ("b", -4.0)):                                                          # the mean decides
        final.development["block", view] = {("hybrid II", 0): Fake(psnr=25.0), ("hybrid II", 1): Fake(psnr=26.0),
                                            ("hybrid III", 0): Fake(psnr=25.0 + bonus), ("hybrid III", 1): Fake(psnr=24.0)}
        final.development["denoise25", view] = {"blend": noisy, "hybrid III": Fake(psnr=29.5)}
    assert final.chosen == {"block": {"two of hybrid II averaged": 26.0, "hybrid II": 25.5, "two of hybrid III averaged": 24.75, "hybrid III": 24.25},
                            "denoise25": {"blend": 30.0, "hybrid III": 29.5, "hybrid I": 29.0}}
    assert [next(iter(found)) for found in final.chosen.values()] == ["two of hybrid II averaged", "blend"]
    real = E.Final(E.SCALES["full"]).development
    assert {view for _, view in real} == set(E.views(E.DEVELOPMENT)) and len(real) == 30
    for (task, view), runs in real.items():
        for name, run in runs.items():
            assert view in (getattr(run, "photo", ""), getattr(run, "names", [""])[0], getattr(getattr(run, "staged", None), "photo", "")), name


def made_up(run, pictures, monkeypatch, **result):
    monkeypatch.setattr(type(run), "result", lambda self: result | {"pictures": pictures})
    return run


def test_a_second_seed_and_the_mean_of_two_fits(monkeypatch):
    """With noise the second seed is other noise, without it another start on the same measurement; a mean is scored as a picture."""
    model = E.Train("photos", 8)
    noisy, hole = (E.Guided("coffee-left", task, 4, model, size=32) for task in ("denoise25", "block"))
    assert E.Final.again(noisy, 1).seed == 1 == E.Final.again(hole, 1).start and E.Final.again(noisy, 1).start == 0 == E.Final.again(hole, 1).seed
    assert E.Final.again(hole, 0) == hole
    final, clean = object.__new__(E.Final), E.photo_named("coffee-left", 32)
    above, below = (clean + shift for shift in (0.1, -0.1))
    made_up(hole, {"last": 255 * above}, monkeypatch, psnr=20.0, ssim=0.9, seconds=2.0)
    row = {"psnr": 21.0, "ssim": 0.8, "total_seconds": 3.0}
    entered = made_up(E.Enter(("coffee-left",), "block", model, (E.Entry(),), size=32), {"coffee-left": {"entry 0": 255 * below}}, monkeypatch, rows={"coffee-left": [row]})
    assert final.outcome(hole)[0] == {"psnr": 20.0, "ssim": 0.9, "seconds": 2.0} and final.outcome(entered)[0] == {"psnr": 21.0, "ssim": 0.8, "seconds": 3.0}
    both, picture = final.averaged([hole, entered])
    assert both["seconds"] == 5.0 and both["psnr"] > 60 and both["ssim"] == pytest.approx(1, abs=1e-4) and torch.allclose(picture, clean, atol=1e-5)
    final.diffuse, final.enter = {}, {("block", "coffee-left", 0): entered}
    final.guided = {("block", "coffee-left", 0): hole, ("block", "coffee-left", 1): hole, ("block", "coffee-right", 0): None}
    assert final.delivered("hybrid II", ("block", "coffee-left", 0))[0]["psnr"] == 21.0 and final.delivered("hybrid III", ("block", "coffee-left", 1))[0]["psnr"] == 20.0
    assert final.delivered("two of hybrid III averaged", ("block", "coffee-left", 0))[0]["seconds"] == 4.0


def test_unwatched_stages_end_with_their_patience():
    run = E.Staged("cat-3", "denoise25", 40, size=32, patience=2, watch=False)
    found = run.execute(lambda *_: None)
    stage, = found["stages"]
    assert len(stage["curve"]) == min(40, stage["step"] + 2) and found["psnr"] > 5
    assert len(E.replace(run, watch=True).execute(lambda *_: None)["stages"][0]["curve"]) == 40


def test_equal_steps_run_from_heavy_to_light():
    for make in (E.ddpm.linear, E.ddpm.cosine):
        ratios = E.equal_steps(make, 4)
        assert len(ratios) == 4 and list(ratios) == sorted(ratios, reverse=True) and ratios[0] == pytest.approx(2, rel=0.05) and ratios[-1] == pytest.approx(0.25, rel=0.1)


def test_results_on_disk_carry_their_settings():
    for name in E.EXPERIMENTS:
        stored = json.loads((ROOT / "out" / f"{name}.json").read_text())
        assert {"settings", "hardware", "scale", "core_seconds", "key"} <= stored.keys() and stored["scale"] == "full"
        assert {"machine", "cores", "torch", "python"} <= stored["hardware"].keys()
