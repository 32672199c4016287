"""The laws of the house: read off the source, and tried on every method of the table."""
import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
import dip
import experiments as E
import metrics

ROOT = Path(__file__).resolve().parent.parent
PURE = ("metrics", "ddpm", "dip", "hybrid")
ALL = (*PURE, "experiments")
MAY_IMPORT = {"hybrid": {"ddpm", "dip"}, "experiments": set(ALL)}
BUDGET = {"metrics": 100, "ddpm": 350, "dip": 300, "hybrid": 420, "experiments": 1721}
RANDOM = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like"}


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def lines(path):
    return [line for line in path.read_text().splitlines() if line.strip()]


@pytest.mark.parametrize("name", ALL)
def test_imports(name):
    nodes = list(ast.walk(tree(name)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported & set(ALL) <= MAY_IMPORT.get(name, set())
    if name in PURE:
        library = {"torch", "math", "copy", "typing", "collections", "itertools"}
        assert {module.split(".")[0] for module in imported} <= library | MAY_IMPORT.get(name, set())


@pytest.mark.parametrize("name", PURE)
def test_purity(name):
    """No files, clocks, global seeds or device choice; random numbers come from a generator."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"manual_seed", "is_available", "save", "load", "default_generator"}
        if isinstance(node, ast.Name):
            assert node.id not in {"open", "print", "input", "np", "random"}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RANDOM:
            assert "generator" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)


@pytest.mark.parametrize("name", ["ddpm", "dip", "hybrid"])
def test_no_restoring_function_takes_the_truth(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef):
            taken = {argument.arg for argument in node.args.args + node.args.kwonlyargs}
            assert not taken & {"clean", "truth", "gt", "ground_truth", "x_true"}


def test_sizes():
    """Non-blank lines of at most 110 columns, no function over fifty of them, without slack."""
    for name in ALL:
        assert len(lines(ROOT / f"{name}.py")) <= BUDGET[name], name
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, node.name
    tests, scripts = (sorted((ROOT / "tests").glob(names)) for names in ("[ct]*.py", "[!ct]*.py"))
    assert sum(len(lines(path)) for path in tests) <= 1800
    assert sum(len(lines(path)) for path in scripts) <= 160
    for path in [*tests, *scripts, *(ROOT / f"{name}.py" for name in ALL)]:
        assert max(map(len, lines(path))) <= 110, path.name


def test_public_things_say_what_they_are():
    for name in ALL:
        for node in tree(name).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and (name in PURE or isinstance(node, ast.ClassDef)):
                assert ast.get_docstring(node), f"{name}.{node.name}"


def test_no_photo_is_in_two_sets():
    """… of those that a photograph's own model learns from, that are developed on, and that are tested."""
    for group, other, data in zip((E.TWO, E.ONE), (E.ONE, E.TWO), E.GROUPS):
        assert E.LEARNT[data] == other + E.COMMON and len(group) == 6
        assert all(E.job("diffusion", name, "hole", model="own").model.photos == (data,) for name in group)
    assert len({*E.ONE, *E.TWO, *E.DEVELOPMENT, *E.COMMON}) == 12 + 4 + 7


def test_loops_and_methods_are_generators():
    loops = [ddpm.train, ddpm.p_sample, ddpm.ddim, dip.fit, *(method.run for method in E.METHODS.values())]
    assert all(map(inspect.isgeneratorfunction, loops))


# ---------------------------------------------------------------------------------------------- every method

@pytest.fixture(scope="session")
def learnt():
    """What two updates on photographs give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpm, "error_curve", lambda *_: torch.linspace(0, 0.05, 1001))
        return E.train(E.job("train", E.GROUPS[1], steps=2))


@pytest.fixture
def tiny(learnt, tmp_path, monkeypatch):
    """A cache of its own, with that photo model in the place of the real one."""
    monkeypatch.setattr(E, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(ddpm, "error_curve", lambda *_: torch.linspace(0, 0.05, 1001))
    model = E.job("train", E.GROUPS[1], steps=2)
    E.write(model.path, lambda path: torch.save(learnt, path))
    monkeypatch.setattr(E, "PHOTOS", {data: (model,) for data in E.GROUPS})
    return model


def made(job):
    for each in E.missing([job]):
        E.make(each)
    return job.result()


CASES = [(name, task) for name, method in E.METHODS.items() for task in ("noise 25", "hole", "80 % missing")
         if method.noise in (None, task in E.NOISY)]


@pytest.mark.parametrize("name, task", CASES)
def test_what_a_method_delivers_does_not_depend_on_the_scores(tiny, monkeypatch, name, task):
    """The scorer is blinded: every picture and everything that the method knows stays the same."""
    job = E.quickly(E.job(name, "coffee", task, size=48, model=tiny))
    seen = made(job)
    monkeypatch.setattr(metrics, "psnr", lambda x, y, peak=1.0: 0 * x.mean((1, 2, 3)))
    monkeypatch.setattr(metrics, "ssim", lambda x, y, peak=1.0: 0 * x.mean((1, 2, 3)))
    blind = E.restoration(job)
    assert blind["records"][0]["psnr"] == 0 < seen["records"][0]["psnr"] and seen["facts"] == blind["facts"]
    assert torch.equal(seen["image"], blind["image"]) and seen["image"].isfinite().all()
    assert all(torch.equal(picture.cpu(), blind["images"][name]) for name, picture in seen["images"].items())
    record = seen["records"][0]
    assert record["seconds"] > 0 and record["evaluations"] >= 0 and record["photo"] == "coffee"
    if task == "hole":
        problem = E.measured(E.square("coffee", 48).to(E.DEVICE), task, "coffee", 0)
        assert (problem.operator.A(seen["image"]) - problem.y).abs().max() < 1e-5


@pytest.mark.parametrize("method, task, users, more", [
    ("dip", "×4", "superres", {"factor": "4"}), ("diffusion", "×4", "superres", {"factor": "4"}),
    ("stacked", "×4", "superres", {"factor": "4"}),
    ("weighted", "noise 25, cut to [0, 1]", "denoise", {"sigma": "25"})])
def test_restore_gives_the_picture_of_the_record(tiny, tmp_path, monkeypatch, method, task, users, more):
    """The measurement of a test photo, given to restore as a file: the same picture, bit for bit."""
    exact = E.measured

    def rounded(*what):
        problem = exact(*what)
        return problem._replace(y=(E.to_bytes(problem.y) / 255).to(E.DEVICE))
    monkeypatch.setattr(E, "measured", rounded)
    size, steps = 64, 0 if method == "stacked" else 9
    E.save_picture(rounded(E.square("coffee", size).to(E.DEVICE), task, "coffee", 0).y, tmp_path / "y.png")
    at = {"photo": "coffee", "task": task, "size": size, "model": tiny}
    experts = tuple(E.job(name, **at, **extra | ({"steps": steps} if name == "pair" else {}))
                    for name, extra in E.METHODS[method].experts)
    own = {"steps": steps} if "steps" in E.names(method, settings=True) else {}
    record = made(E.job(method, **at, experts=experts, **own))
    more = more | {"steps": str(steps or ""), "out": str(tmp_path / "x.png")}
    E.restore(str(tmp_path / "y.png"), users, method, **more)
    got = np.asarray(Image.open(tmp_path / "x.png"))
    assert (got == E.to_bytes(record["image"])[0].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("name", ["interpolation", "dip", "diffusion"])
@pytest.mark.parametrize("task", ["hole", "80 % missing", "×4"])
def test_blind_experts_do_not_see_what_judges_them(tiny, monkeypatch, name, task):
    """Other values where they are blind: the same picture, bit for bit; all experts are blind to the same."""
    job, exact = E.quickly(E.job(name, "coffee", task, size=48, model=tiny, blind=True)), E.measured
    first = made(job)["image"]
    problem = exact(E.square("coffee", 48).to(E.DEVICE), task, "coffee", 0)
    hidden = E.unseen_of(problem)
    monkeypatch.setattr(E, "measured", lambda *_: problem._replace(y=problem.y + 0.3 * hidden))
    monkeypatch.setattr(E, "unseen_of", lambda problem: hidden)
    assert torch.equal(E.restoration(job)["image"], first) and 0 < hidden.mean() < 0.3


def test_every_tool_reaches_only_the_methods_that_mean_it():
    """A method gets what it names; so a setting must not have the name of a tool."""
    meant = {"unseen": {"stacked"}, "experts": {"two-dips", "three-dips", "weighted", "stacked", "diffusion"},
             "interpolate": {"interpolation", "diffusion"},
             "model": {"diffusion", "diffusion-pair", "refit", "regularised"},
             "fresh": {"dip", "held-out", "sure", "pair", "refit", "regularised"}}
    for tool, wanted in meant.items():
        assert {name for name in E.METHODS if tool in E.names(name)} == wanted, tool
    for name, method in E.METHODS.items():
        for parameter in inspect.signature(method.run).parameters.values():
            tool = parameter.name in {"problem", "generator", *meant}
            assert tool == (parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD) or parameter.kind is (
                inspect.Parameter.VAR_KEYWORD), (name, parameter.name)


def test_a_new_method_shows_up_everywhere(tiny, tmp_path, monkeypatch):
    """In restore, in quick and in a query, by its line in METHODS alone."""
    def grey(problem):
        """Half of white."""
        yield dip.Restoration(torch.full(problem.shape, 0.5).to(problem.y))
    monkeypatch.setitem(E.METHODS, "grey", E.Method(grey, "half of white"))
    E.save_picture(torch.rand(1, 3, 20, 20), tmp_path / "y.png")
    E.restore(str(tmp_path / "y.png"), "denoise", "grey", out=str(tmp_path / "x.png"))
    assert np.asarray(Image.open(tmp_path / "x.png")).std() == 0
    rows = [(row, job) for row, job in E.rows_of("quick")["final"] if row == "grey"]
    assert {job.task for _, job in rows} == set(E.FIVE)
    for _, job in rows:
        made(job)
    q = E.Query({"final": E.records_of(rows)})
    assert 0 < q("psnr", "final", row="grey", task="hole").mean < 30
    assert "| grey |" in q.table("final", {"a": "psnr:.2f"})


def test_pictures_of_a_group_are_fitted_as_one_and_scored_each(tiny):
    job = E.quickly(E.job("pair", (3, 5), "noise 25", size=32))
    result = made(job)
    alone = E.pictures((5,), 32).to(E.DEVICE)
    assert [record["photo"] for record in result["records"]] == ["3", "5"]
    assert torch.equal(result["images"]["truth"][1:].cpu(), E.to_bytes(alone))
    psnr = metrics.psnr(result["image"][1:].clamp(0, 1), alone).item()
    assert result["records"][1]["psnr"] == pytest.approx(psnr, abs=1e-4)
    job = E.job("diffusion", "coffee", "hole", size=48, model=tiny, samples=2)
    sampled = made(E.quickly(job))["records"]
    # two chains of two steps
    assert len(sampled) == 1 and sampled[0]["diversity"] > 0 and sampled[0]["evaluations"] == 4
