"""Data, jobs and their cache, records and queries, the report, and a user's photo."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import experiments as E
from test_house import learnt, made, tiny  # noqa: F401

ROOT, MODELS = Path(__file__).resolve().parent.parent, E.PHOTOS[E.GROUPS[1]]


# ------------------------------------------------------------------------------------------------------ data

def test_cats_are_324000_and_their_parts_are_what_is_drawn():
    options = list(E.CAT_FACTORS.values())
    assert np.prod(options) == 324_000 and [len(layer) for layer in E.cat_layers()] == options
    parts = E.draw_cats(torch.Generator().manual_seed(0), 4000, everything=True)
    assert len(parts) == 4000
    assert all(parts[:, i].unique().tolist() == list(range(k)) for i, k in enumerate(options))
    assert E.never_trained(parts).float().mean().item() == pytest.approx(13 / 135, abs=0.015)
    assert not E.never_trained(E.draw_cats(torch.Generator().manual_seed(0), 4000)).any()
    cats = E.pictures((0, 7), 32)
    assert cats.shape == (2, 3, 32, 32) and 0 <= cats.min() and (cats[:, :, 0, 0] == cats.max()).all()


def test_a_cat_is_its_layers_laid_over_white():
    """Against Pillow's own compositing, at full size, then reduced."""
    parts, picture = torch.tensor([[3, 5, 7, 2, 9]]), Image.new("RGBA", (1024, 1024), "white")
    root = Path(E.importlib.util.find_spec("robohash").origin).parent / "sets" / "set4"
    for folder, i in zip(sorted(f for f in root.iterdir() if f.is_dir()), parts[0].tolist()):
        files = sorted(folder.glob("*.png"), key=lambda path: int(re.match(r"\d+", path.name)[0]))
        files = [path for path in files if path.name != "006#fur6.png"]
        picture = Image.alpha_composite(picture, Image.open(files[i]).convert("RGBA"))
    expected = E.to_tensor(picture.convert("RGB").resize((32, 32), Image.Resampling.BOX))
    assert (E.render_cats(parts) - expected).abs().mean() < 0.01


def test_real_cats_are_found_part_by_part_and_a_collapse_is_seen():
    parts = E.draw_cats(torch.Generator().manual_seed(0), 400, everything=True)
    assert (E.nearest_parts(E.render_cats(parts[:100])) == parts[:100]).float().mean() > 0.98
    found = E.examine(E.render_cats(parts))
    assert found["fidelity"] < 0.005 and found["least"] > 0.97 and 0.5 < found["unseen"] < 1.6
    found = E.examine(E.render_cats(parts[:1]).expand(50, -1, -1, -1))
    assert found["least"] == found["body"] == 0


@pytest.mark.parametrize("task", E.TASKS)
def test_measurements(task):
    clean, generator = E.square("coffee", 96).to(E.DEVICE), E.seeded("x")
    problem, again = (E.measured(clean, task, "coffee", 0) for _ in range(2))
    noise = problem.y - problem.operator.A(clean)
    assert torch.equal(problem.y, again.y) and problem.shape == clean.shape
    assert noise.square().mean().sqrt().item() == pytest.approx(E.TASKS[task].sigma / 255, rel=0.1)
    share = {"hole": 15 / 16, "large hole": 55 / 64, "80 % missing": 0.2}.get(task, 1)
    assert problem.known.mean().item() == pytest.approx(share, abs=0.01)
    assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=E.seeded("x")))


def test_robots_and_photographs_are_drawn_by_name():
    robots, again = E.robots(), E.pictures(("robot 3", "coffee"), 32)
    assert robots.shape == (32, 3, 32, 32) and torch.equal(again[:1], robots[3:4])
    assert torch.equal(again[1:], E.square("coffee", 32))
    assert len({tuple(image.flatten().tolist()) for image in robots}) == 32
    assert (robots[:, :, 0, 0] == 1).all()


def test_two_numbers_of_training_pictures():
    few = {tuple(x.flatten().tolist()) for k in range(9) for x in E.recipe("cats", 8)[1](E.seeded(k))}
    many = {tuple(x.flatten().tolist()) for k in range(9) for x in E.recipe("cats")[1](E.seeded(k))}
    assert len(few) == 8 and len(many) > 100


@pytest.mark.parametrize("size", [(24, 31), (16, 16)])
def test_nl_ridge_is_its_two_formulas_patch_by_patch(size):
    """Against loops over patches, in which every formula stands as in the paper, with patches as columns."""
    x = torch.nn.functional.interpolate(torch.rand(1, 2, 3, 3, generator=E.seeded(0)), size, mode="bicubic")
    y, sigma, side = (x + 0.1 * torch.randn(x.shape, generator=E.seeded(1)))[0].double(), 0.1, 5
    corners = [(i, j) for i in range(size[0] - 4) for j in range(size[1] - 4)]
    lines = [sorted({*range(0, length - 4, 4), length - 5}) for length in size]

    def stage(guide, members):
        total, weight = torch.zeros_like(y), torch.zeros_like(y)
        patch = {at: guide[:, at[0]:at[0] + side, at[1]:at[1] + side].flatten() for at in corners}
        for centre in ((i, j) for i in lines[0] for j in lines[1]):
            near = [at for at in corners if max(abs(at[0] - centre[0]), abs(at[1] - centre[1])) <= 18]
            group = sorted(near, key=lambda at: (patch[at] - patch[centre]).square().sum().item())[:members]
            X = torch.stack([patch[at] for at in group], 1)
            Y = torch.stack([y[:, i:i + side, j:j + side].flatten() for i, j in group], 1)
            noise, gram = len(X) * sigma ** 2 * torch.eye(len(group)).double(), X.T @ X
            theta = (torch.eye(len(group)) - noise @ torch.linalg.inv(gram) if guide is y
                     else torch.linalg.inv(gram + noise) @ gram)
            for (i, j), column, estimate in zip(group, theta.T, (Y @ theta).T):
                w = 1 / column.square().sum()
                total[:, i:i + side, j:j + side] += w * estimate.reshape(2, side, side)
                weight[:, i:i + side, j:j + side] += w
        return total / weight
    first = stage(y, 18)
    assert torch.allclose(E.ridge_stage(y, y, sigma, 18).double(), first, atol=1e-5)
    assert torch.allclose(E.ridge_stage(y, first, sigma, 55).double(), stage(first, 55), atol=1e-5)
    found = E.nl_ridge(y[None], sigma)
    assert (found - x).square().mean() < 0.4 * (y - x).square().mean()
    assert torch.allclose(E.nl_ridge(torch.full((1, 3, 20, 20), 0.5), 0.1), torch.tensor(0.5), atol=1e-3)


def test_a_shifted_model_is_the_model_of_the_shifted_pictures():
    """A third of a turn permutes the colours; grey stays grey; there is a way back."""
    x, seen = torch.rand(2, 3, 8, 8, generator=E.seeded(0)), []

    def model(xt, t):
        seen.append(xt)
        return xt * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    found = E.ddpm.shifted(model, 120)(x, 7)
    permuted = next(order for order in ([1, 2, 0], [2, 0, 1])
                    if torch.allclose(x[:, order], seen[-1], atol=1e-5))
    back = torch.empty_like(x)
    back[:, permuted] = model(x[:, permuted], 7)
    assert torch.allclose(found, back, atol=1e-5)
    assert torch.allclose(E.ddpm.shifted(lambda xt, t: xt, 47)(x, 7), x, atol=1e-5)
    E.ddpm.shifted(model, 77)(x[:, :1].expand(-1, 3, -1, -1), 7)
    assert torch.allclose(seen[-1], x[:, :1].expand(-1, 3, -1, -1), atol=1e-5)
    assert torch.allclose(seen[-1].norm(), x[:, :1].expand(-1, 3, -1, -1).norm())
    assert torch.equal(E.ddpm.shifted(lambda xt, t: xt.cumsum(2), "flip")(x, 7), x.flip(2).cumsum(2).flip(2))


# -------------------------------------------------------------------------------------------- jobs and cache

@pytest.fixture
def edit(tmp_path, monkeypatch):
    """A copy of the source to edit: edit(file, old, new) → the keys of a fit, a pair and a training."""
    for name in ("metrics", "ddpm", "dip", "hybrid", "experiments"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    monkeypatch.setattr(E, "ROOT", tmp_path)

    def keys(name="dip", old="", new=""):
        path = tmp_path / f"{name}.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1) if old else path.read_text())
        E.definitions.cache_clear(), E.fingerprint.cache_clear()
        fit, pair = (E.job(method, "coffee", "noise 25", size=32) for method in ("dip", "pair"))
        return fit.key, pair.key, E.job("train", "cats", steps=5).key
    yield keys
    E.definitions.cache_clear(), E.fingerprint.cache_clear()


def test_a_key_follows_the_code_that_a_job_uses_and_nothing_else(edit):
    first = edit()
    assert edit("dip", '"""Stop after n steps', '"""Other words, after n steps') == first
    assert edit("ddpm", "\ndef q_sample", "\n# a comment\ndef q_sample") == first
    assert edit("experiments", '"seconds": 1, "updates": 0', '"seconds": 2, "updates": 0') == first
    assert edit("experiments", "def plot_law(rows", "def plot_law(many_rows") == first
    assert edit("dip", "tau: float = 0.92", "tau: int = 0.92") == first
    # of a table, only the entry that is used
    assert edit("experiments", "Task(15)", "Task(16)") == first
    assert edit("experiments", "dip.Discrepancy(p.sigma, 1.0)", "dip.Discrepancy(p.sigma, 1.1)") == first
    fit, pair, train = edit("experiments", "dip.Discrepancy(p.sigma, 0.7)", "dip.Discrepancy(p.sigma, 0.8)")
    assert fit != first[0] and (pair, train) == first[1:]
    first = edit()
    fit, pair, train = edit("experiments", '"noise 25": Task(25)', '"noise 25": Task(26)')
    assert fit != first[0] and pair != first[1] and train == first[2]
    first = edit()
    fit, pair, train = edit("hybrid", "steps: int = 800,", "steps: int = 801,")
    assert (fit, train) == (first[0], first[2]) and pair == first[1]
    fit, pair, train = edit("hybrid", "copies, networks, spent", "copies, networks, paid")
    assert (fit, train) == (first[0], first[2]) and pair != first[1]
    fit2, pair2, train2 = edit("dip", "nn.LeakyReLU(0.2", "nn.LeakyReLU(0.1")
    assert fit2 != fit and pair2 != pair and train2 == train
    fit3, _, train3 = edit("ddpm", "widths: tuple = (32, 64, 96)", "widths: tuple = (32, 64, 64)")
    assert train3 != train2


def test_a_key_follows_every_setting_and_need():
    at = {"photo": "coffee", "task": "hole", "model": MODELS[-1]}
    more = {"photo": "chelsea"}, {"task": "×4"}, {"model": MODELS[0]}, {"seed": 1}, {"brief": 9}
    base, others = E.job("refit", **at), [E.job("refit", **at | change) for change in more]
    assert len({job.key for job in [base, *others]}) == 6 and base == E.job("refit", **at)
    assert len({job.key for job in MODELS}) == 5 and MODELS[3] in MODELS[4].needs


def test_writes_are_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    E.write(path, "old")

    def fail(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        E.write(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", [b"", b"no zip at all", "cut"])
def test_a_damaged_result_is_set_aside_and_computed_again(tiny, capsys, damage):  # noqa: F811
    job = E.job("ridge", "coffee", "noise 25", size=32)
    whole = made(job)
    job.path.write_bytes(job.path.read_bytes()[:-99] if damage == "cut" else damage)
    assert torch.equal(made(job)["image"], whole["image"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "set aside" in said and job.path.with_suffix(".broken").exists()


def test_killed_work_is_resumed_and_finished_work_is_left_alone(tmp_path):
    for name in ("metrics", "ddpm", "dip", "hybrid", "experiments"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    script = tmp_path / "work.py"
    script.write_text("import sys, experiments as E\nif __name__ == '__main__':\n"
                      "    E.compute([E.job('ridge', p, 'noise 25', size=32) for p in E.TEST[:2]] + "
                      "[E.job('dip', 'coffee', 'hole', size=32, steps=int(sys.argv[1]))], 2)\n"
                      "    print('finished')\n")
    process = subprocess.Popen([sys.executable, str(script), "99999"], cwd=tmp_path, start_new_session=True)
    began, cache = time.time(), tmp_path / ".cache"
    while len(list(cache.glob("ridge-*.pt"))) < 2 and time.time() - began < 90:
        time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("ridge-*.pt")}
    assert len(kept) == 2
    for _ in range(2):
        done = subprocess.run([sys.executable, str(script), "3"], cwd=tmp_path, capture_output=True)
        assert b"finished" in done.stdout, done.stderr
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in cache.glob("*.pt")}.items()
    # workers do not outlive their parent
    pytest.raises(ProcessLookupError, os.killpg, process.pid, 0)


def test_a_chain_of_training_is_one_training(tiny):  # noqa: F811
    whole = made(E.job("train", "cats", steps=6, place=E.PLACE))
    half = E.job("train", "cats", steps=3, place=E.PLACE)
    parts = made(E.job("train", "cats", steps=6, place=E.PLACE, experts=(half,)))
    for which in ("ema", "net"):
        other = parts["trainer"][which]
        assert all(torch.equal(value, other[name]) for name, value in whole["trainer"][which].items())
    assert parts["seconds"] > half.result()["seconds"] and parts["v"].shape == (1001,)


# --------------------------------------------------------------------------------------- records and queries

def record(row, photo, psnr, **more):
    return {"row": row, "photo": photo, "task": "noise 25", "seed": 0, "psnr": psnr, "key": "k"} | more


RECORDS = {"a": [record("x", "p", 20.0), record("x", "p", 22.0, seed=1), record("x", "q", 30.0),
                 record("y", "p", 20.5), record("y", "p", 20.5, seed=1), record("y", "q", 31.0),
                 record("z", "p", 1.0, gap=0.25)]}


def test_seeds_are_averaged_first_and_pairs_are_paired():
    q = E.Query(RECORDS)
    number = q("psnr", "a", row="x")
    assert (number.mean, number.n, number.wins) == (25.5, 2, 2) and number.low == 21 and number.high == 30
    less = q("psnr", "a", row="x", minus={"row": "y"})
    assert less.mean == pytest.approx((0.5 - 1.0) / 2) and f"{less:k}" == "1 of 2"
    assert f"{number:.1f}" == "25.5 [21.0, 30.0]" and f"{q('psnr', 'a', row='z'):.2f}" == "1.00"
    assert q("abs(psnr - 21)", "a", row="x", seed=0).mean == 5 and q("gap", "a").n == 1
    assert q("psnr", "a", row=("x", "y"), photo="q").mean == 30.5
    with pytest.raises(KeyError):
        q("psnr", "a", row="nobody")
    columns = {"dB": "psnr:.1f", "− y": "psnr:.2f - y", "k": "psnr:k - y", "gap": "gap:.2f"}
    lines = q.table("a", columns).split("\n")
    assert lines[2] == "| x | 25.5 [21.0, 30.0] | -0.25 [-1.00, 0.50] | 1 of 2 |  |"
    assert lines[4] == "| z | 1.0 | -19.50 | 0 of 1 | 0.25 |"


def test_p_counts_signs_and_holm_corrects_for_the_number_of_names():
    q = E.Query({"a": [record("x", str(k), value) for k, value in enumerate((1.0, 2.0, 3.0, -0.5))]})
    number = q("psnr", "a", row="x")
    assert number.p == 4 / 16 and f"{number:p}" == "0.25" and number.photos == ("0", "1", "2", "3")
    many = E.Number(1.0, 0, 0, 20, 20, (1.0,) * 20, ())
    assert many.p < 1e-3
    assert E.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_the_best_other_row_is_never_a_combination_of_both():
    rows = [record("DIP", "p", 20.0), record("diffusion", "p", 21.0), record("without DIP", "p", 22.0),
            record("DIP and diffusion", "p", 24.0), record("combination", "p", 23.5)]
    q = E.Query({"a": rows})
    assert q.rival("a") == "without DIP" and q.gain("a").mean == 1.5
    assert q.rival("a", E.RIVALS) == "diffusion" and q.gain("a", E.RIVALS).mean == 2.5
    columns = {"DIP": "psnr:m.1f of DIP", "none": "psnr:m.1f of three DIPs", "− best": "gain:.2f",
               "− alone": "gain alone:.2f", "k": "gain alone:k", "which": "rival alone:"}
    lines = q.table("a", columns, lines={"p": {"photo": "p"}, "q": {"photo": "q"}}).split("\n")
    assert lines[2] == "| p | 20.0 |  | 1.50 | 2.50 | 1 of 1 | diffusion |"


def test_the_law_in_a_record_is_the_best_average_there_is():
    """Of two pictures, from the true errors: against a search of all weights."""
    x, f, g = torch.rand(3, 1, 3, 8, 8, generator=E.seeded(0))
    found, grid = E.law([f[0], g[0]], x[0]), torch.linspace(0, 1, 2001)
    errors = torch.stack([(w * f + (1 - w) * g - x).square().mean() for w in grid])
    assert found["law"] == pytest.approx(-10 * errors.min().log10().item(), abs=1e-3)
    parents = [(image - x).square().mean().item() for image in (f, g)]
    assert found["best_expert"] == pytest.approx(-10 * np.log10(min(parents)), abs=1e-4)
    shared = ((f - x) * (g - x)).mean().item()
    assert found["rho"] == pytest.approx(shared / np.sqrt(parents[0] * parents[1]), abs=1e-4)


@pytest.mark.parametrize("template, text", [
    ("x <<q('psnr', 'a', row='z'):.1f>> y", "x 1.0 y"), ("<<q('psnr', 'a', row='x').mean:.0f>> %", "26 %"),
    ("<<1 if q('psnr', 'a').n < 9 else 2>>", "1"),
    ("<!-- claim: q('psnr', 'a', row='x').mean > 1 -->\nSo.", "So.")])
def test_holes_and_claims(template, text):
    assert E.render(template, E.Query(RECORDS)) == text


@pytest.mark.parametrize("template", [
    "<<nothing>>", "<<q('psnr', 'b')>>", "<<q('psnr', 'a'):.2q>>", "<<open('x')>>",
    "<!-- claim: q('psnr', 'a').mean > 99 -->", "<!-- claim: q.x -->"])
def test_unknown_holes_and_false_claims_fail_the_build(template):
    with pytest.raises(E.Refusal):
        E.render(template, E.Query(RECORDS))


def test_records_are_written_trusted_and_refused(tiny, tmp_path, monkeypatch):  # noqa: F811
    """Nothing is computed twice; with reuse committed records are trusted where keys fit."""
    rows, worked = {"final": [("ridge", E.job("ridge", "coffee", "noise 25", size=32))]}, []
    monkeypatch.setattr(E, "OUT", {"full": tmp_path / "out"})
    monkeypatch.setattr(E, "rows_of", lambda scale: rows)
    monkeypatch.setattr(E, "FIGURES", {})
    monkeypatch.setattr(E, "make_report", lambda scale: None)

    def compute(jobs, processes):
        for job in E.missing(jobs):
            worked.append(job)
            E.make(job)
    monkeypatch.setattr(E, "compute", compute)
    with pytest.raises(E.Refusal, match="missing or broken"):
        E.read_records("full")
    E.make_all(), E.make_all()
    text = (tmp_path / "out" / "final.json").read_text()
    assert len(worked) == 1 and len(text.splitlines()) == 3
    assert json.loads(text)["records"][0]["photo"] == "coffee"
    assert E.read_records("full")("psnr", "final", row="ridge").mean > 10
    shutil.rmtree(E.CACHE)
    E.make_all(reuse=True)
    assert len(worked) == 1 and (tmp_path / "out" / "final.json").read_text() == text
    E.make_all()
    assert len(worked) == 2
    rows["final"] = [("ridge", E.job("ridge", "coffee", "noise 50", size=32))]
    with pytest.raises(E.Refusal, match="other code or settings"):
        E.read_records("full")


def test_the_report_is_the_render_of_the_committed_records():
    q = E.read_records("full")
    text, readme = (ROOT / "REPORT.md").read_text(), (ROOT / "README.md").read_text()
    assert E.render((ROOT / "REPORT.in.md").read_text(), q) == text and E.with_answer(readme, q) == readme
    assert len(text.split()) <= 6500 and text.count("\n![") <= 7 and text.count("\n|---") <= 6
    for page in ("REPORT.md", "README.md"):
        for file in re.findall(r"\]\((out/[^)]*)\)", (ROOT / page).read_text()):
            assert (ROOT / file).exists(), file


def test_every_reference_is_cited_and_every_citation_listed():
    """By first author and year."""
    body, listed = (ROOT / "REPORT.in.md").read_text().split("## References\n")
    works = re.findall(r"(?:^|\. )([A-Z]\w+)[^`*]*? (\d{4})", listed)
    for author, year in works:
        assert re.search(rf"{author}[^\n]{{0,40}} \(?{year}", body), (author, year)
    cited = re.findall(r"([A-Z][a-z]+)(?: & \w+| et al\.)? \(?((?:19|20)\d\d)\b", body)
    for author, year in cited:
        assert re.search(rf"{author}[^`*\n]*? {year}", listed), (author, year)
    assert len(works) > 40 and len(cited) > 40


def test_no_typed_number_that_a_computer_produced():
    """Decimals, and numbers with a unit of measurement, come from holes only."""
    def typed(text):
        text = re.sub(r"^#.*?$", "", text, flags=re.M)
        for pattern in (r"<<.*?>>", r"<!--.*?-->", r"\$.*?\$", r"`[^`]*`", r"\]\([^)]*\)", r"ection [\d.]+"):
            text = re.sub(pattern, "", text, flags=re.S)
        return re.findall(r"(?<![\w.])\d+\.\d+(?![\d.]*\w*/)|\d+\s*(?:dB|seconds|minutes|s\b|ms\b)", text)
    assert not typed((ROOT / "REPORT.in.md").read_text())
    assert typed("We got 27 dB") and not typed("We got <<q>> dB")


# -------------------------------------------------------------------------------------------- a user's photo

def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return str(path)


def noisy(h=40, w=37, channels=3):
    ramp = np.linspace(60, 190, w)[None, :, None] + np.random.default_rng(0).normal(0, 25, (h, w, channels))
    x = np.clip(ramp, 0, 255).astype(np.uint8)
    return x.squeeze(2) if channels == 1 else x


@pytest.mark.parametrize("kind", ["rgb.png", "grey.png", "rgba.png", "rgb.jpg", "palette.png", "deep.png"])
def test_any_usual_picture_is_denoised_at_its_own_size(tmp_path, kind):
    path, x = tmp_path / kind, noisy(channels=1 if kind in ("grey.png", "deep.png") else 3)
    x = x.astype(np.uint16) * 257 if kind == "deep.png" else x
    x = np.dstack([x, np.full((40, 37), 128, np.uint8)]) if kind == "rgba.png" else x
    image = Image.fromarray(x)
    (image.quantize(64) if kind == "palette.png" else image).save(path)
    E.restore(str(path), "denoise", steps="3")
    result = Image.open(tmp_path / f"{path.stem}-denoise-auto.png")
    assert result.size == (37, 40) and (result.mode == "L") == (x.ndim == 2)
    assert Image.open(tmp_path / f"{path.stem}-denoise-auto-before-after.png").size == (37 * 2 + 8, 40)


def test_exif_rotation_is_obeyed_and_transparency_is_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert E.read_image(save(tmp_path / "turned.jpg", noisy(), exif=exif)).shape == (1, 3, 37, 40)
    assert E.read_image(save(tmp_path / "clear.png", np.zeros((20, 20, 4), np.uint8))).min() == 1
    assert E.read_image(save(tmp_path / "deep.png", np.full((20, 20), 65535, np.uint16))).max() == 1


def test_inpainting_keeps_what_is_known_and_samples_differ(tiny, tmp_path):  # noqa: F811
    x, known = noisy(), np.full((40, 37), 255, np.uint8)
    known[10:20, 10:20] = 0
    path, mask = save(tmp_path / "x.png", x), save(tmp_path / "mask.png", known)
    E.restore(path, "inpaint", "diffusion", mask=mask, samples="2", out=str(tmp_path / "out.png"))
    files = [tmp_path / f"out{ending}.png" for ending in ("", "-1", "-2")]
    mean, first, second = (np.asarray(Image.open(file)).astype(int) for file in files)
    assert all(np.abs(result - x)[known > 0].max() <= 1 for result in (mean, first, second))
    assert np.abs(first - second)[12:18, 12:18].max() > 0
    grey = save(tmp_path / "grey.png", noisy(channels=1))
    E.restore(grey, "superres", "refit", factor="3", out=str(tmp_path / "big.jpg"))
    assert Image.open(tmp_path / "big.jpg").size == (111, 120)
    E.restore(path, "inpaint", "interpolation", mask=mask, out=str(tmp_path / "out.jpg"))
    assert np.abs(np.asarray(Image.open(tmp_path / "out.jpg")).astype(int) - x)[known > 0].max() <= 2


@pytest.mark.parametrize("kind", [
    "white.png", "ones.png", "dark.png", "deep.png", "palette.png", "alpha.png", "edge.png", "x.jpg"])
def test_masks_mean_what_people_draw(tmp_path, kind):
    """Near-white and opaque is known; one colour with transparency is a mask by its transparency."""
    known = np.ones((40, 36), np.uint8)
    known[8:24, 8:24] = 0
    x = {"ones.png": known, "deep.png": known.astype(np.uint16) * 65535}.get(kind, known * 255)
    x = np.dstack([0 * x, 0 * x, 0 * x, x]) if kind == "alpha.png" else x
    if kind == "dark.png":
        x, known = known * 200, 0 * known
    if kind == "edge.png":
        x[7, 8:24] = 128
        known[7, 8:24] = 0
    image = Image.fromarray(x)
    (image.convert("RGB").quantize(2) if kind == "palette.png" else image).save(tmp_path / kind)
    found = E.read_mask(str(tmp_path / kind))[0, 0].numpy()
    assert (found[known == 0] == 0).all() and (found != known).mean() < (0.1 if kind == "x.jpg" else 1e-9)


@pytest.mark.parametrize("pixels", ["few known", "one missing", "border"])
def test_odd_holes_are_filled_by_every_method(tiny, tmp_path, pixels):  # noqa: F811
    known = np.full((20, 20), 255, np.uint8)
    known[5, 5] = 0
    known = 255 - known if pixels == "few known" else known
    known[9, :12] = 255
    known[:6] = 0 if pixels == "border" else known[:6]
    x, mask = save(tmp_path / "x.png", noisy(20, 20)), save(tmp_path / "mask.png", known)
    for method in ("auto", *(name for name, each in E.METHODS.items() if not each.noise)):
        out = tmp_path / "out.png"
        E.restore(x, "inpaint", method, mask=mask, out=str(out), steps="2")
        assert (np.asarray(Image.open(out))[known > 0] == noisy(20, 20)[known > 0]).all(), method


def test_auto_names_its_experts_and_trains_no_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(E, "CACHE", tmp_path)
    E.restore(save(tmp_path / "x.png", noisy()), "denoise", steps="3", sigma="25", out=f"{tmp_path}/x.jpg")
    said = capsys.readouterr().out
    assert re.search(r"weights: pair [\d.]+, ridge-pair [\d.]+; without a model no diffusion-pair", said)


def test_no_quality_is_invented(tmp_path, capsys):
    """A risk that is negative, or within its own scatter, is no PSNR; doubts about the noise are said."""
    x = noisy()
    for sigma, ending, message in (("30", "png", "or SIGMA too large"), ("60", "png", "far from"),
                                   ("", "jpg", "compressed"), ("20", "png", "expected PSNR"),
                                   ("", "png", "estimated, too roughly for a PSNR")):
        E.restore(save(tmp_path / f"{sigma}x.{ending}", x), "denoise", "ridge-pair", sigma=sigma)
        said = capsys.readouterr().out
        assert message in said and ("expected" in said) == (sigma == "20"), said
    Image.fromarray(x).resize((74, 80), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    E.restore(str(tmp_path / "large.png"), "denoise", "ridge-pair")
    assert "not independent" in capsys.readouterr().out


def test_nothing_of_the_users_is_lost(tiny, tmp_path):  # noqa: F811
    """Every name that is written is checked, photos of one name keep theirs, results are not learnt from."""
    endings = ("", "-1", "-2", "-before-after")
    names = ("x.png", "x.jpg", *(f"{k}{ending}.png" for k, ending in enumerate(endings)))
    photos = [save(tmp_path / name, noisy(64, 64)) for name in names]
    before = [Path(path).read_bytes() for path in photos]
    mask = save(tmp_path / "mask.png", np.tile(np.uint8(255) * (np.arange(64) > 9), (64, 1)))
    for k in range(4):
        with pytest.raises(E.Refusal, match="no result"):
            out = str(tmp_path / f"{k}.png")
            E.restore(photos[0], "inpaint", "diffusion", mask=mask, out=out, samples="2")
    for path in photos[:2]:
        E.restore(path, "denoise", "ridge", sigma="25")
    # a result may be replaced, but not while it is the photo
    free = str(tmp_path / "free.jpg")
    for _ in range(2):
        E.restore(photos[0], "denoise", "ridge", sigma="25", out=free)
    with pytest.raises(E.Refusal, match="itself"):
        E.restore(free, "denoise", "ridge", sigma="25", out=free)
    assert [Path(path).read_bytes() for path in photos] == before
    assert (tmp_path / "x.jpg-denoise-ridge.png").exists()
    assert {path.name for path in E.images_in(str(tmp_path))} == {*names, "mask.png"}


def test_pictures_are_read_as_they_are_meant(tmp_path):
    """Grey stored as RGB is grey; broken EXIF blocks and profiles do no harm; dead links are no pictures."""
    assert E.read_image(save(tmp_path / "g.png", np.dstack([noisy(channels=1)] * 3))).shape == (1, 1, 40, 37)
    assert E.read_image(save(tmp_path / "e.jpg", noisy(), exif=b"Exif\0\0MM\0*broken")).shape[-2:] == (40, 37)
    profile = E.ImageCms.ImageCmsProfile(E.ImageCms.createProfile("sRGB")).tobytes()
    for x in (noisy(), np.dstack([noisy(channels=1), np.full((40, 37), 255, np.uint8)])):
        read = E.read_image(save(tmp_path / "c.png", x, icc_profile=profile))
        assert torch.allclose(read, E.to_tensor(x[..., :1] if x.shape[2] == 2 else x), atol=0.02)
    (tmp_path / "dead.png").symlink_to(tmp_path / "none.png")
    for name in (".hidden.png", "c.png"):
        save(tmp_path / name, noisy(70, 70))
    (tmp_path / "broken.png").write_bytes(b"no")
    assert [path.name for path in E.images_in(str(tmp_path))] == ["broken.png", "c.png", "e.jpg", "g.png"]
    assert len(E.users_photos(str(tmp_path))) == 1


def test_refusals_are_one_sentence(tmp_path):
    good, black = save(tmp_path / "good.png", noisy()), save(tmp_path / "b.png", np.zeros((40, 37), np.uint8))
    white = save(tmp_path / "white.png", np.full((40, 37), 255, np.uint8))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    (tmp_path / "cut.png").write_bytes(Path(good).read_bytes()[:900])
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    small, other = save(tmp_path / "small.png", noisy(9, 9)), save(tmp_path / "other.png", noisy(41, 37))
    flat = save(tmp_path / "flat.png", np.full((40, 40), 9, np.uint8))
    half = save(tmp_path / "half.png", np.tile(np.uint8(255) * (np.arange(37) > 9), (40, 1)), exif=E.MARK)
    os.mkfifo(tmp_path / "pipe.png")
    wide = save(tmp_path / "wide.png", np.zeros((16, 4001), np.uint8))
    inverted = save(tmp_path / "w.tiff", np.full((40, 37), 9999, np.uint16), tiffinfo={262: 0})
    (tmp_path / "folder.png").mkdir(), save(tmp_path / "deep.tiff", np.full((40, 37), 255, np.int32))
    cases = [
        ("not there", {"image": "none.png"}), ("cannot be read", {"image": str(tmp_path / "broken.png")}),
        ("be read", {"image": str(tmp_path / "cut.png")}), ("inverted", {"image": inverted}),
        ("not a file", {"image": str(tmp_path)}), ("not numbers", {"image": str(tmp_path / "nan.tiff")}),
        ("resize it", {"image": small}), ("needs IMAGE", {"image": ""}), ("no noise", {"image": flat}),
        ("needs IMAGE", {"task": "sharpen"}), ("choose auto, ridge", {"method": "magic"}),
        ("choose auto, interpolation", {"task": "superres", "method": "pair"}), ("itself", {"out": good}),
        ("SAMPLES=0", {"samples": "0"}), ("SIGMA=loud", {"sigma": "loud"}), ("SIGMA=nan", {"sigma": "nan"}),
        ("SIGMA=300", {"sigma": "300"}), ("SIGMA=--5", {"sigma": "--5"}), ("STEPS=-3", {"steps": "-3"}),
        ("FACTOR=1", {"task": "superres", "factor": "1"}), ("needs MASK", {"task": "inpaint"}),
        ("all white", {"task": "inpaint", "mask": white}), ("black but", {"task": "inpaint", "mask": black}),
        ("size", {"task": "inpaint", "mask": other}), ("cannot write", {"out": "x.webp"}),
        ("cannot write", {"out": str(tmp_path / "no" / "x.png")}), ("too long", {"out": "x" * 250 + ".png"}),
        ("itself", {"task": "inpaint", "mask": half, "out": half}), ("no use for MASK", {"mask": black}),
        ("no result", {"out": str(tmp_path / "folder.png")}), ("whole number", {"samples": "1.5"}),
        ("no use for SIGMA", {"task": "inpaint", "sigma": "25"}), ("STEPS=0", {"steps": "0"}),
        ("whole number", {"task": "superres", "factor": "2.5"}), ("one result", {"samples": "4"}),
        ("needs IMAGES", {"train_steps": "99"}), ("sides", {"image": wide}),
        ("uses no model", {"method": "pair", "images": str(tmp_path)}), ("STEPS=loud", {"steps": "loud"}),
        ("of its 16 bits", {"image": save(tmp_path / "dim.png", np.full((40, 37), 999, np.uint16))}),
        ("not a file", {"image": str(tmp_path / "pipe.png")}), ("not there", {"image": "~nobody/x.png"}),
        ("32-bit", {"image": str(tmp_path / "deep.tiff")}),
        ("IMAGES=folder", {"method": "diffusion", "images": str(tmp_path / "none")})]
    for message, arguments in cases:
        with pytest.raises(E.Refusal, match=message) as caught:
            E.restore(**{"image": good, "task": "denoise"} | arguments)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*tmp*")) and (np.asarray(Image.open(good)) == noisy()).all()
    for given, message in ((["restore", "image=none", "task=denoise"], "is not there"),
                           (["magic"], "not a command"), (["all", "speed=9", "jobs=many"], "takes"),
                           (["all", "jobs=many"], "whole number"), (["all", "scale=huge"], "choose full"),
                           (["report", "scale=quick", "scale=full"], "once")):
        command = [sys.executable, str(ROOT / "experiments.py"), *given]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and message in done.stderr


def test_the_pair_brings_a_photo_closer_to_the_truth_and_says_how_close(tmp_path, capsys):
    x = 0.25 + 0.5 * E.square("motorcycle_left", 61)[..., :45, :]
    E.save_picture(x + 25 / 255 * torch.randn(x.shape, generator=E.seeded(0)), tmp_path / "y.png")
    E.restore(str(tmp_path / "y.png"), "denoise", "pair", sigma="25", steps="500")
    expected = float(re.search(r"expected PSNR ([\d.]+) dB", capsys.readouterr().out)[1])
    results = (E.read_image(str(tmp_path / name)) for name in ("y.png", "y-denoise-pair.png"))
    before, after = (E.metrics.psnr(result, x).item() for result in results)
    assert after > before + 5 and abs(expected - after) < 1.5


def test_a_model_is_trained_on_a_folder_and_used(tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(E, "compute", lambda jobs, n: [E.make(job) for job in E.missing(jobs)])
    folder = tmp_path / "my photos"
    folder.mkdir()
    save(folder / "small.png", noisy(20, 20))
    with pytest.raises(E.Refusal, match="at least 64"):
        E.train_on(str(folder))
    save(folder / "a.png", noisy(70, 130)), save(folder / "b.jpg", noisy(64, 64, 1))
    save(folder / "large.png", noisy(1000, 600))
    read = E.training_photos(str(folder))
    assert [tuple(x.shape) for x in read] == [(3, 70, 130), (3, 64, 64), (3, 500, 300)] and read[0].max() <= 1
    with pytest.raises(E.Refusal, match="no result"):
        E.train_on(str(folder), str(folder / "a.png"), train_steps="16")
    E.train_on(str(folder), str(tmp_path / "samples.png"), train_steps="16")
    assert Image.open(tmp_path / "samples.png").size == (256, 256)
    E.restore(save(tmp_path / "x.png", noisy()), "denoise", "diffusion", images=str(folder), train_steps="16")
    assert (tmp_path / "x-denoise-diffusion.png").exists() and len(list(E.CACHE.glob("train-*.pt"))) == 6
