"""The layout of the package: imports point down only, heavy libraries stay where they belong, files stay short."""

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import hf_seqkv

ROOT = Path(hf_seqkv.__file__).parent
FLOORS = {
    "config": 0,
    "errors": 0,
    "codec": 1,
    "kernels": 2,
    "calibration": 3,
    "store": 3,
    "integration": 4,
    "cli": 5,
    "eval": 5,
}
TOP = max(FLOORS.values())
# The package's front door: on the top floor for those who import it, and free to reach anywhere lazily.
FRONT = {"hf_seqkv", "hf_seqkv.register", "hf_seqkv.__main__"}
# Library -> where it may be imported: a folder of the package, one module, or a pattern of modules.
HOMES = {
    "transformers": {"integration", "cli", "eval"},
    "numba": {
        "kernels.cpu",
        *(f"codec.{name}" for name in ("entropy", "exact_*", "sequence*", "symbol_*", "token_*", "uniform")),
    },
    "llvmlite": {"kernels.cpu"},
    "triton": {
        f"kernels.triton_{name}"
        for name in (
            *("attend", "bytes", "center", "gather", "launch", "pages"),
            *("partials", "rows", "scales", "softmax", "tile"),
        )
    },
    "fsspec": {"store.remote"},
    "sqlite3": {"store.index"},
    "huggingface_hub": {"calibration", "cli", "eval"},
}
LINES = 300
FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def module_name(path: Path, root: Path) -> str:
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, root: Path) -> list[str]:
    """Absolute names of everything a file imports, inside functions too: `from .a import b` gives `hf_seqkv.a.b`."""
    module = module_name(path, root)
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


def violations(root: Path, path: Path) -> list[str]:
    """What a file of the package under `root` imports although its floor may not."""
    module = module_name(path, root)
    if module in FRONT:
        return []
    inside = module.split(".", 1)[1]
    found = []
    for name in imported(path, root):
        top, _, rest = name.partition(".")
        if top == root.name:
            if FLOORS.get(rest.split(".")[0], TOP) > FLOORS[inside.split(".")[0]]:
                found.append(f"{inside} imports {name}, which is above it")
        elif top in HOMES and not any(fnmatchcase(f"{inside}.", f"{home}.*") for home in HOMES[top]):
            found.append(f"{inside} imports {name}; only {', '.join(sorted(HOMES[top]))} may")
    return found


@every_file
def test_imports_point_down(path):
    assert violations(ROOT, path) == []


def test_every_module_is_on_a_floor():
    parts = {module_name(path, ROOT).split(".")[1] for path in FILES if module_name(path, ROOT) not in FRONT}
    assert parts <= set(FLOORS)


@pytest.mark.parametrize(
    ("file", "source", "bad"),
    [
        ("codec/a.py", "from ..kernels.interface import LayerView", True),
        ("codec/a.py", "from .. import integration", True),
        ("codec/a.py", "def f():\n    import hf_seqkv.kernels.cpu", True),
        ("codec/a.py", "from ..register import register", True),
        ("integration/a.py", "from .. import __version__", True),
        ("cli/a.py", "from .. import __version__", False),
        ("codec/__init__.py", "from ..kernels import cpu", True),
        ("kernels/a.py", "def f():\n    from transformers import AutoModel", True),
        ("kernels/reference.py", "import numba.core", True),
        ("codec/a.py", "from numba import njit", True),
        ("codec/entropy_of.py", "from numba import njit", True),
        ("kernels/a.py", "from huggingface_hub import hf_hub_download", True),
        (
            "kernels/a.py",
            "from . import cpu\nfrom ..codec.page import PageCodec\nfrom ..errors import FormatError",
            False,
        ),
        ("kernels/cpu/rows.py", "import numba", False),
        ("codec/sequence_of.py", "from numba import njit", False),
        ("codec/a.py", "text = 'import transformers'  # import numba", False),
        ("integration/a.py", "import transformers\nfrom ..calibration.artifact import SeqKVCalibration", False),
    ],
    ids=[
        "upward",
        "upward package",
        "inside a function",
        "front door",
        "its attribute",
        "its attribute from the top",
        "from an init",
        "transformers",
        "numba",
        "numba in the codec",
        "numba beside the coder",
        "hub",
        "downward",
        "numba at home",
        "numba in a file of a pattern",
        "only a string",
        "transformers at home",
    ],
)
def test_the_walk_sees(tmp_path, file, source, bad):
    path = tmp_path / "hf_seqkv" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert bool(violations(tmp_path / "hf_seqkv", path)) is bad


@every_file
def test_file_is_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LINES


@every_file
def test_module_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # An empty `__init__.py` only marks a folder.
    assert not tree.body or ast.get_docstring(tree)


def test_import_is_light():
    code = "import sys, hf_seqkv; print(sorted({'torch', 'transformers', 'numba', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
