"""The import rules of the house, read from the source alone: nothing is imported here."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "hf_efficient"
METHODS = ("dynamic_llava", "toe", "kdfs", "pix2pix")
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_LINES = 600
# safetensors is a requirement of transformers itself, there wherever a checkpoint loads
SHIPPED_PACKAGES = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "safetensors", "torchvision"}
# what setup.py requires without an extra, by import name
CORE_PACKAGES = SHIPPED_PACKAGES - {"torchvision"} | {
    "accelerate",
    "datasets",
    "evaluate",
    "optimum",
    "peft",
}
BANNED_NAMES = {"utils.py", "helpers.py", "common.py", "base.py"}
# role -> layer; a file imports its own layer and those below while it loads; a role not named here is arithmetic
LAYERS = {
    "configuration": 0,
    "modeling": 2,
    "image_processing": 3,
    "pipeline": 3,
    "trainer": 4,
    "callback": 4,
    "pruner": 4,
    "convert": 4,
    "robustness": 4,
    "figures": 4,
    "commands": 5,
    "quickstart": 5,
}
ARITHMETIC = 1
# classes that transformers writes into checkpoints live in files of these roles; what they import travels along
SHIPPED_ROLES = ("modeling_", "image_processing_", "pipeline_", "processing_")


def imports(tree: ast.AST, when_loading: bool = False) -> Iterator[tuple[int, str, int]]:
    """(level, module, line) of every import; `when_loading` leaves out functions, `try` and `if` blocks."""
    for node in ast.iter_child_nodes(tree):
        if when_loading and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try | ast.If):
            continue
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", node.lineno
        else:
            yield from imports(node, when_loading)


def is_foreign(module: str, allowed: set[str]) -> bool:
    top = module.split(".")[0]
    return top not in sys.stdlib_module_names and top not in allowed


def layer(name: str) -> int:
    return next((rank for role, rank in LAYERS.items() if name.startswith(role + "_")), ARITHMETIC)


def check_any_file(source: str) -> list[str]:
    """Rules for every file of the package."""
    tree, faults = ast.parse(source), []
    lines = source.count("\n") + 1
    if lines > MAX_LINES:
        faults.append(f"{lines} lines, the budget is {MAX_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            faults.append(f"line {node.lineno}: assert; raise an error with a sentence")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            faults.append(f"line {node.lineno}: print; use transformers' logging")
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.search(r"^\s*from \.", node.value, re.M)
        ):
            faults.append(
                f"line {node.lineno}: a string has a line that starts with 'from .'; saving takes it for an import"
            )
    for level, module, line in imports(tree):
        if level > 1:
            faults.append(f"line {line}: import from a parent folder")
        if level == 1 and not module:
            faults.append(f"line {line}: 'from . import'; write 'from .file import Name'")
    faults += [
        f"line {line}: {module} is optional; import it in the function that needs it"
        for level, module, line in imports(tree, when_loading=True)
        if level == 0 and is_foreign(module, CORE_PACKAGES | {"hf_efficient"})
    ]
    return faults


def check_folder_file(source: str, name: str, travels: bool = True) -> list[str]:
    """Further rules for a file of a method folder; arithmetic that stays at home may build on the models."""
    tree, faults = ast.parse(source), []
    for level, module, line in imports(tree):
        if level == 0 and module.split(".")[0] == "hf_efficient":
            faults.append(f"line {line}: a method folder never imports hf_efficient by name")
        if level == 1 and "." in module:
            faults.append(f"line {line}: '.{module}' is no file of this folder")
    if name != "__init__.py":
        own = layer(name) if travels or layer(name) != ARITHMETIC else LAYERS["trainer"]
        for level, module, line in imports(tree, when_loading=True):
            if level == 1 and layer(module) > own:
                faults.append(f"line {line}: {name} stands below {module}")
    return faults


def check_shipped_file(source: str) -> list[str]:
    """Further rules for a file that travels in checkpoints."""
    tree, faults = ast.parse(source), []
    for level, module, line in imports(tree):
        if level == 0 and is_foreign(module, SHIPPED_PACKAGES):
            faults.append(f"line {line}: a shipped file must not import {module}")
        if level == 0 and module == "__future__":
            faults.append(f"line {line}: __future__ annotations switch the config checks off")
    for node in ast.walk(tree):
        name = node.func if isinstance(node, ast.Call) else None
        if isinstance(name, ast.Name | ast.Attribute) and (getattr(name, "id", "") or name.attr) in (
            "import_module",
            "__import__",
        ):
            faults.append(f"line {node.lineno}: an import that transformers does not see is not shipped")
    return faults


def shipped_files(method: str) -> set[Path]:
    """The files of a method that save_pretrained copies: those of the shipped roles and what they import."""
    open_files = [path for path in (PACKAGE / method).glob("*.py") if path.name.startswith(SHIPPED_ROLES)]
    found: set[Path] = set()
    while open_files:
        path = open_files.pop()
        if path in found:
            continue
        found.add(path)
        siblings = [module for level, module, _ in imports(ast.parse(path.read_text())) if level == 1]
        open_files += [path.parent / f"{module}.py" for module in siblings]
    return found


SHIPPED = sorted(path for method in METHODS for path in shipped_files(method))


def ids(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_the_package_is_seen():
    assert PACKAGE / "__init__.py" in FILES
    assert len(FILES) > 10
    names = {path.name for path in SHIPPED}
    assert {"modeling_dynamic_llava.py", "configuration_dynamic_llava.py", "cache_dynamic_llava.py"} <= names


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_file(path):
    source = path.read_text(encoding="utf-8")
    faults = check_any_file(source)
    if path.relative_to(PACKAGE).parts[0] in (*METHODS, "metrics"):
        faults += check_folder_file(source, path.name, travels=path in SHIPPED)
    if path.name in BANNED_NAMES:
        faults.append("the name says nothing about what is inside")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", SHIPPED, ids=ids)
def test_shipped_file(path):
    assert path.is_file(), f"{path.name} is imported but not there"
    faults = check_shipped_file(path.read_text(encoding="utf-8"))
    if layer(path.name) > LAYERS["pipeline"]:
        faults.append("a trainer, callback, pruner, converter, figure or command must not travel in checkpoints")
    assert not faults, "\n".join(faults)


def test_package_is_flat():
    """A folder has no folders, but for metrics, where `evaluate` wants one folder a metric."""
    deep = [
        ids(path)
        for path in FILES
        if len(path.relative_to(PACKAGE).parts) > 2 and path.relative_to(PACKAGE).parts[0] != "metrics"
    ]
    assert not [name for name in deep if not name.startswith("optimum_cli/")]


@pytest.mark.parametrize(
    ("source", "check", "fault"),
    [
        ("x = 1\n" * 600, check_any_file, "601 lines"),
        ("def f():\n    assert True", check_any_file, "assert"),
        ("print(1)", check_any_file, "print"),
        ("from ..toe import x", check_any_file, "parent folder"),
        ("def f():\n    from . import x", check_any_file, "'from . import'"),
        ('"""Doc.\n\n    from .x import y\n"""', check_any_file, "takes it for an import"),
        ("import matplotlib.pyplot as plt", check_any_file, "matplotlib.pyplot is optional"),
        ("class A:\n    from torchvision import ops", check_any_file, "torchvision is optional"),
        ("def f():\n    import hf_efficient.toe", lambda s: check_folder_file(s, "a_toe.py"), "by name"),
        ("from .sub.deep import x", lambda s: check_folder_file(s, "a_toe.py"), "no file of this folder"),
        ("from .modeling_x import X", lambda s: check_folder_file(s, "configuration_x.py"), "stands below modeling_x"),
        ("from .trainer_x import X", lambda s: check_folder_file(s, "modeling_x.py"), "stands below trainer_x"),
        ("from .modeling_x import X", lambda s: check_folder_file(s, "sparsity_x.py"), "stands below modeling_x"),
        ("def f():\n    import hf_efficient", check_shipped_file, "must not import hf_efficient"),
        ("try:\n    import scipy\nexcept ImportError:\n    pass", check_shipped_file, "must not import scipy"),
        ("from __future__ import annotations", check_shipped_file, "__future__"),
        ("import importlib\nimportlib.import_module('.x')", check_shipped_file, "does not see"),
    ],
)
def test_the_checks_catch(source, check, fault):
    assert any(fault in found for found in check(source)), check(source)


@pytest.mark.parametrize(
    ("source", "check"),
    [
        ("def f():\n    import matplotlib", check_any_file),
        ("from .modeling_x import X", lambda s: check_folder_file(s, "slicing_x.py", travels=False)),
        ("# from .x import y", check_any_file),
        ("from .modeling_x import X", lambda s: check_folder_file(s, "trainer_x.py")),
        ("def _files_to_ship():\n    from .pipeline_x import X", lambda s: check_folder_file(s, "modeling_x.py")),
        ("import math\nimport torch.nn\nfrom PIL import Image\nfrom .a import b", check_shipped_file),
    ],
)
def test_the_checks_let_pass(source, check):
    assert check(source) == []
