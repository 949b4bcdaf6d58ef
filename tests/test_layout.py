"""The fixed layout: which files exist, and that imports point one way."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# tools <- networks <- {hrssm, models} <- exploration <- dreamer: a module may import those of earlier levels.
LEVELS = [["tools"], ["networks"], ["hrssm", "models"], ["exploration"], ["dreamer"]]
TOP = [name for level in LEVELS for name in level]
FOLDERS = ["envs", "setup", "figures", "tests"]
OTHERS = ["configs.yaml", *FOLDERS, "README.md", "LICENSE", "pyproject.toml"]


def find_modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the repository; a package has the name of its folder."""
    paths = [*root.glob("*.py"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))]
    names = [path.relative_to(root).with_suffix("").parts for path in paths]
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in zip(names, paths, strict=True)}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, inside functions too; `from a import b` gives `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by absolute name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_names(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the repository that it imports; `from envs import video` is an import of `envs.video`."""
    modules = find_modules(root)

    def resolve(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    return {name: {resolve(other) for other in imported(path)} - {""} for name, path in modules.items()}


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle, or [] if there is none."""
    cleared: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name not in cleared:
            for target in sorted(graph[name]):
                if circle := visit(target, [*path, name]):
                    return circle
            cleared.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


def test_top_level():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(TOP)
    assert [name for name in OTHERS if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", TOP)
def test_imports_form_a_line(name):
    level = next(i for i, names in enumerate(LEVELS) if name in names)
    allowed = {other for names in LEVELS[:level] for other in names}
    assert top_names(ROOT / f"{name}.py") & {*TOP, "figures", "tests"} <= allowed


def test_nothing_imports_figures():
    for folder in ("envs", "setup"):
        files = sorted((ROOT / folder).rglob("*.py"))
        assert files
        assert [path.name for path in files if top_names(path) & {"figures", "tests"}] == []
    assert [path.name for path in (ROOT / "figures").glob("*.py") if "tests" in top_names(path)] == []


def test_no_import_circles():
    graph = import_graph(ROOT)
    assert {"figures.plot", "envs.paired", "setup.download"} <= graph.keys()
    assert "models" in graph["dreamer"] and "envs.task" in graph["envs.vector"]
    assert find_circle(graph) == []


def test_an_import_circle_is_found(tmp_path):
    """Three modules, one import hidden in a function, one through a package."""
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("import json\nimport outside\n")
    (tmp_path / "envs" / "a.py").write_text("import envs\nfrom envs.b import x\n")
    (tmp_path / "envs" / "b.py").write_text("def f():\n    import c\n")
    (tmp_path / "c.py").write_text("import os\n")
    graph = import_graph(tmp_path)
    assert graph == {"envs": set(), "envs.a": {"envs", "envs.b"}, "envs.b": {"c"}, "c": set()}
    assert find_circle(graph) == []
    (tmp_path / "c.py").write_text("from envs import a\n")
    assert sorted(find_circle(import_graph(tmp_path))) == ["c", "envs.a", "envs.b"]


def unsafe(tree: ast.AST) -> list[str]:
    """Calls that could execute the data they read, or write outside their folder."""
    calls = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and "pickle" in ast.unparse(node):
            calls.append(ast.unparse(node))
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        safe = {
            "torch.load": options.get("weights_only") == "True",
            "np.load": options.get("allow_pickle", "False") == "False",
            "yaml.load": False,
            "eval": False,
            "exec": False,
            "os.system": False,
            "time.time": False,  # jumps when the clock is adjusted
        }.get(name, name.split(".")[-1] != "extractall" and options.get("shell", "False") == "False")
        if not safe:
            calls.append(ast.unparse(node))
    return calls


def test_data_is_never_executed():
    files = [*ROOT.glob("*.py"), *(ROOT / "envs").glob("*.py"), *(ROOT / "setup").glob("*.py")]
    files += (ROOT / "figures").glob("*.py")
    assert len(files) > 20
    assert {path.name: calls for path in files if (calls := unsafe(ast.parse(path.read_text())))} == {}
    for line in ["torch.load(p)", "np.load(p, allow_pickle=True)", "eval(x)", "import pickle", "run(x, shell=True)"]:
        assert unsafe(ast.parse(line)), line


def test_nothing_listens_to_the_network():
    """TensorBoard listens on localhost by default."""
    for path in [ROOT / "README.md", *(ROOT / "setup").glob("*.sh"), *ROOT.glob("*.py")]:
        assert not {"--bind_all", "0.0.0.0"} & set(path.read_text().split()), path


def test_environments_stand_alone():
    files = sorted((ROOT / "envs").rglob("*.py"))
    assert files
    for path in files:
        assert not top_names(path) & {*TOP, "setup", "torch"}, path


def test_environments_do_not_load_torch():
    """Not through a dependency either: it would cost each environment worker seconds and hundreds of MB."""
    modules = sorted(f"envs.{path.stem}" for path in (ROOT / "envs").glob("*.py") if path.stem != "__init__")
    if importlib.util.find_spec("mani_skill2") is None:
        modules.remove("envs.maniskill_tasks")  # needs mani_skill2, which is not installed on every Python
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_program_ends_by_the_console():
    """Ctrl-C, closed pipes and warnings are treated alike: `console` comes before whatever takes seconds to import."""
    programs = [ROOT / "dreamer.py", *(ROOT / "setup").glob("*.py"), *(ROOT / "figures").glob("*.py")]
    programs = [path for path in programs if "__main__" in path.read_text() and path.name != "console.py"]
    assert len(programs) > 10
    for path in programs:
        first, *_ = (name for name in imported_in_order(path) if name != "sys" and not name.startswith("pathlib."))
        assert first == "setup.console" and path.read_text().endswith("    console.run(main)\n"), path


def imported_in_order(path: Path) -> list[str]:
    """Names imported at the top level of a file, first to last."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names
