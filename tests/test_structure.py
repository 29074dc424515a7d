"""The house: who may import whom, how large each part may be, how deep the loop lies, what must stay light."""

import ast
import shutil
import subprocess
import sys
import traceback

from conftest import ROOT

from unetseg.__main__ import main
from unetseg.losses import LOSSES, cross_entropy

SITTING = ["settings", "classes", "processed", "data", "augment", "losses", "model", "optimizers", "metrics"]
SITTING += ["train", "run", "checkpoint", "distributed", "device"]
AROUND = ["__init__", "__main__", "images", "inference", "tracking", "plots", "files"]
BUDGETS = {  # lines, docstrings and comments included, blank ones not
    "the sitting": ([f"unetseg/{name}.py" for name in SITTING], 1609),
    "around it": ([f"unetseg/{name}.py" for name in AROUND], 936),
    "evaluation": (["unetseg/evaluation/*.py"], 711),
    "show": (["unetseg/show/*.py"], 378),
    "tools": (["unetseg/tools/*.py"], 1938),
    "notebooks": (["notebooks/*.py"], 300),
    "the script": (["preprocessing/*.py"], 20),
    "report": (["report/*.py", "report/*.typ"], 400),
    "benchmarks": (["benchmarks/*.py"], 900),
    "tests": (["tests/*.py"], 4500),
}
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "unetseg").glob("*.py")}


def imports(tree):
    """Names of imported modules: siblings as ".name"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {f".{node.module.split('.')[0]}"} if node.module else {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_every_part_keeps_to_its_budget():
    counted = {}
    for part, (patterns, most) in BUDGETS.items():
        paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
        lines = sum(bool(line.strip()) for path in paths for line in path.read_text(encoding="utf-8").splitlines())
        counted[part] = f"{lines} of {most}"
        assert 0 < lines <= most, f"{part}: {counted[part]}"
    assert {path.stem for path in (ROOT / "unetseg").glob("*.py")} == {*SITTING, *AROUND}


def test_the_module_graph_has_no_circles():
    graph = {name: {i[1:] for i in imports(tree) if i.startswith(".")} for name, tree in MODULES.items()}
    while graph:
        leaves = [name for name, uses in graph.items() if not uses & graph.keys()]
        assert leaves, f"a circle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_arrows_point_one_way():
    uses = {name: {i[1:] for i in imports(tree) if i.startswith(".")} for name, tree in MODULES.items()}
    assert uses["settings"] == {"files"} and not uses["classes"] and not uses["files"]
    for name in ("augment", "losses", "metrics"):
        assert uses[name] == {"classes"}, name
    assert uses["model"] == {"settings"} and uses["device"] == uses["distributed"] == {"files"}
    known = {"checkpoint", "distributed", "classes", "device", "files", "losses", "metrics", "optimizers"}
    assert uses["train"] == known and [name for name, used in uses.items() if "run" in used] == ["__main__"]
    for part in ("tools", "evaluation", "show"):
        assert [name for name, used in uses.items() if part in used] == ["__main__"]


def test_libraries_live_where_they_should():
    for library, home in (("wandb", "tracking"), ("matplotlib", "plots"), ("cv2", "images")):
        assert {name for name, tree in MODULES.items() if library in imports(tree)} == {home}
    assert imports(MODULES["classes"]) <= {"numpy", "dataclasses", "pathlib", "tomllib", "hashlib"}


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "numpy", "cv2", "wandb", "matplotlib")
    code = f"import sys, unetseg, unetseg.__main__; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_at_most_five_frames_lie_between_the_command_and_the_gradient(processed, tmp_path, monkeypatch):
    seen = []

    def loss_fn(logits, mask, class_weights=None, all_sum=None):
        seen.append([frame.name for frame in traceback.extract_stack() if f"{ROOT}/unetseg" in frame.filename])
        return cross_entropy(logits, mask)

    monkeypatch.setitem(LOSSES, "ce", loss_fn)
    tiny = ["--channels", "4", "--depth", "1", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(["train", "scratch", "--data", str(processed), *tiny]) == 0
    assert seen[0] == ["main", "train", "train", "fit", "train_one_epoch", "deep_supervision"]


def test_functions_stay_short():
    """At most thirty lines after the docstring, blank ones not counted."""
    for path in [*(ROOT / "unetseg").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
                lines = text.splitlines()[start - 1 : node.end_lineno]
                assert sum(bool(line.strip()) for line in lines) <= 30, f"{path.name}: {node.name}"


def test_pip_installs_a_whole_package(tmp_path):
    """Nothing is looked for beside it: every module of the package is in what setuptools would install."""
    shutil.copytree(ROOT / "unetseg", tmp_path / "source" / "unetseg", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    site, options = tmp_path / "site", ["-q", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(tmp_path / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for pattern in ("*.py", "*.toml", "site/**/*"):
        ours, theirs = ({str(p.relative_to(top)) for p in (top / "unetseg").rglob(pattern)} for top in (ROOT, site))
        assert ours and ours == theirs
    code = "import unetseg.run; print(unetseg.run.__file__, unetseg.commit())"
    said = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, text=True)
    assert said.split() == [str(site / "unetseg" / "run.py"), "unknown"]
