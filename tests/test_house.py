"""The laws of the house, read off the source."""
import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

import ddpm
import dip
import experiments
import hybrid
import metrics

ROOT = Path(__file__).resolve().parent.parent
OURS = {"metrics", "ddpm", "dip", "hybrid", "experiments"}
PURE = [name for name in ("metrics", "ddpm", "dip", "hybrid") if (ROOT / f"{name}.py").exists()]
MAY_IMPORT = {"metrics": set(), "ddpm": set(), "dip": set(), "hybrid": {"ddpm", "dip"}, "experiments": OURS}
BUDGET = {"metrics": 120, "ddpm": 300, "dip": 230, "hybrid": 230, "experiments": 1400}                  # non-blank lines


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


@pytest.mark.parametrize("name", [*PURE, "experiments"])
def test_imports(name):
    imported = {alias.name for node in ast.walk(tree(name)) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree(name)) if isinstance(node, ast.ImportFrom)}
    assert imported & OURS <= MAY_IMPORT[name]
    if name in PURE:
        roots = {i.split(".")[0] for i in imported}
        assert roots <= {"torch", "math", "copy", "typing", "collections"} | MAY_IMPORT[name]


@pytest.mark.parametrize("name", PURE)
def test_purity(name):
    """No files, clocks, global seeds or device choice; every random number comes from a generator that was passed in."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"manual_seed", "seed", "is_available", "save", "load", "default_generator"}
        if isinstance(node, ast.Name):
            assert node.id not in {"open", "print", "input", "np", "random"}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {
                "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like", "dropout"}:
            assert "generator" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)


@pytest.mark.parametrize("name", PURE)
def test_no_restoring_function_takes_the_truth(name):
    if name != "metrics":
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.FunctionDef):
                assert not {a.arg for a in node.args.args + node.args.kwonlyargs} & {"clean", "truth", "gt", "ground_truth", "x_true"}


def test_what_a_rule_chooses_does_not_depend_on_the_scores(monkeypatch):
    """Blind the scorer: every picture that a rule delivers, and its step, stay the same."""
    run = experiments.Fit("coffee-left", "denoise25", 12, unseen=0.05, widths=(4, 4), size=32)
    seen = run.execute(lambda *a: None)
    monkeypatch.setattr(metrics, "psnr", lambda x, y, peak=1.0: 0 * x.mean((1, 2, 3)))
    blind = run.execute(lambda *a: None)
    assert blind["curves"]["psnr"].abs().max() == 0 < seen["curves"]["psnr"].abs().max()
    assert seen["best"] == blind["best"] and seen["stopped"] == blind["stopped"]
    for name in seen["pictures"].keys() - {"oracle"}:
        assert (seen["pictures"][name] == blind["pictures"][name]).all()


def test_what_the_stages_deliver_does_not_depend_on_the_scores(monkeypatch):
    run = experiments.Staged("coffee-left", "denoise25", 8, ratios=(1.0, 0.25), widths=(4, 4), size=32)
    seen = run.execute(lambda *a: None)
    monkeypatch.setattr(metrics, "psnr", lambda x, y, peak=1.0: 0 * x.mean((1, 2, 3)))
    monkeypatch.setattr(metrics, "ssim", lambda x, y, peak=1.0: 0 * x.mean((1, 2, 3)))
    blind = run.execute(lambda *a: None)
    assert blind["psnr"] == 0 < seen["psnr"] and seen["expected"] == blind["expected"] and seen["sigma"] == blind["sigma"]
    assert [s["step"] for s in seen["stages"]] == [s["step"] for s in blind["stages"]]
    assert all((picture == blind["pictures"][name]).all() for name, picture in seen["pictures"].items())


def test_loops_are_generators():
    assert all(map(inspect.isgeneratorfunction, (ddpm.train, ddpm.p_sample, ddpm.ddim, dip.fit, hybrid.staged_fit)))


def test_experiments_are_data():
    kinds = experiments.Run.__subclasses__()
    assert kinds and all(dataclasses.is_dataclass(k) and k.__dataclass_params__.frozen for k in kinds)
    full, quick = (experiments.SCALES[k] for k in ("full", "quick"))
    for make in experiments.EXPERIMENTS.values():
        assert {type(r) for r in make(full).runs} == {type(r) for r in make(quick).runs}
        runs = make(full).runs                                   # runs are equal exactly when their names in the cache are
        assert len({run.key for run in runs}) == len(set(runs)) == len({(run, run.key) for run in runs})


def test_no_photo_is_in_two_sets():
    sets = experiments.TEST, experiments.DEVELOPMENT, experiments.TRAINING
    names = [name.split(".")[0].replace("_left", "").replace("_right", "") for group in sets for name in group]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", [*PURE, "experiments"])
def test_public_things_say_what_they_are(name):
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and (name != "experiments" or isinstance(node, ast.ClassDef)):
            assert ast.get_docstring(node), f"{name}.{node.name}"


def test_line_budgets():
    counts = {name: sum(bool(line.strip()) for line in (ROOT / f"{name}.py").read_text().splitlines()) for name in [*PURE, "experiments"]}
    print(counts)
    assert all(count <= 1.25 * BUDGET[name] for name, count in counts.items()), counts
    tree_ = tree("ddpm")
    unet = next(n for n in tree_.body if isinstance(n, ast.ClassDef) and n.name == "UNet")
    block = next(n for n in tree_.body if isinstance(n, ast.ClassDef) and n.name == "ResBlock")
    assert unet.end_lineno - unet.lineno + block.end_lineno - block.lineno <= 110
