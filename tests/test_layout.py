"""The fixed layout: which files exist, and that imports form one line."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINE = ["tools", "networks", "hrssm", "models", "exploration", "dreamer"]
OTHERS = ["configs.yaml", "envs", "setup", "figures", "tests", "README.md", "LICENSE", "pyproject.toml"]


def imported(path: Path) -> set[str]:
    """First parts of all absolute module names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_top_level():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(LINE)
    assert [name for name in OTHERS if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", LINE)
def test_imports_form_a_line(name):
    allowed = set(LINE[: LINE.index(name)])
    assert imported(ROOT / f"{name}.py") & set(LINE) <= allowed


def unsafe(tree: ast.AST) -> list[str]:
    """Calls that could run what they read, or write where they should not."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and "pickle" in ast.unparse(node):
            found.append(ast.unparse(node))
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
            "time.time": False,  # jumps when the clock is set
        }.get(name, name.split(".")[-1] != "extractall" and options.get("shell", "False") == "False")
        if not safe:
            found.append(ast.unparse(node))
    return found


def test_nothing_that_is_read_is_run():
    files = [*ROOT.glob("*.py"), *(ROOT / "envs").glob("*.py"), *(ROOT / "setup").glob("*.py")]
    files += (ROOT / "figures").glob("*.py")
    assert len(files) > 20
    assert {path.name: found for path in files if (found := unsafe(ast.parse(path.read_text())))} == {}
    for line in ["torch.load(p)", "np.load(p, allow_pickle=True)", "eval(x)", "import pickle", "run(x, shell=True)"]:
        assert unsafe(ast.parse(line)), line


def test_nothing_listens_to_the_network():
    """TensorBoard listens on localhost unless told otherwise."""
    for path in [ROOT / "README.md", *(ROOT / "setup").glob("*.sh"), *ROOT.glob("*.py")]:
        assert not {"--bind_all", "0.0.0.0"} & set(path.read_text().split()), path


def test_environments_stand_alone():
    files = sorted((ROOT / "envs").rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & {*LINE, "torch"}, path


def test_environments_do_not_load_torch():
    """Also not through a dependency: an environment worker would pay seconds and hundreds of MB for it."""
    modules = sorted(f"envs.{path.stem}" for path in (ROOT / "envs").glob("*.py") if path.stem != "__init__")
    if importlib.util.find_spec("mani_skill2") is None:
        modules.remove("envs.maniskill_tasks")  # the only one that needs what is not installed on every Python
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
