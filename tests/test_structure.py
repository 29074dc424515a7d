"""Who may import whom, and what must stay light."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "unetseg").glob("*.py")}


def imports(tree):
    """Names of imported modules: siblings as ".name"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {f".{node.module}"} if node.module else {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_the_module_graph_has_no_circles():
    graph = {name: {i[1:] for i in imports(tree) if i.startswith(".")} for name, tree in MODULES.items()}
    while graph:
        leaves = [name for name, uses in graph.items() if not uses & graph.keys()]
        assert leaves, f"a circle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_libraries_live_where_they_should():
    users = {
        library: {name for name, tree in MODULES.items() if library in imports(tree)}
        for library in ("wandb", "matplotlib")
    }
    assert users == {"wandb": {"tracking"}, "matplotlib": {"plots"}}
    for name in ("model", "losses", "augment"):
        assert imports(MODULES[name]) <= {"torch", "math", ".classes"}, name
    assert imports(MODULES["classes"]) <= {"numpy", "dataclasses"}


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "numpy", "cv2", "wandb", "matplotlib")
    code = f"import sys, unetseg, unetseg.__main__; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_no_function_grows_beyond_forty_lines():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
                assert node.end_lineno - start < 40, f"{name}.{node.name}"
