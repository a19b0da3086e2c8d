"""The house rules of imports: data flows one way, and the core needs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "smolstack"
# Each room may import from itself and from the rooms before it, with the exceptions below.
ORDER = [
    ("errors", "config", "text", "progress", "unique_keys"),
    ("output_files", "option_types"),
    ("batch",),
    ("native",),
    ("processor",),
    ("model",),
    ("backends",),
    ("quantization",),
    ("family",),
    ("checkpoint",),
    ("bridging",),
    ("generation",),
    ("retrieval",),
    ("vlm",),
    ("bulk",),
    ("documents",),
    ("interop", "cli", "train", "serve", "bench", "quantization_job", "notebook"),
    ("__main__",),
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def modules() -> list[Path]:
    return [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    own = room(path)
    assert own in RANK, f"{own} has no place in the order of rooms"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "smolstack" or parts[1] in ("__version__", own):
            continue
        other = parts[1]
        if other in RANK:
            assert RANK[other] <= RANK[own], f"{own} imports {name}"
        assert {own, other} != {"processor", "model"}, "they meet in batch.py alone"


def test_no_imports_go_round_in_a_circle() -> None:
    """Those for type checkers, and those inside functions, included."""
    files = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in modules()
    }
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = {one if one in files else one.rpartition(".")[0] for one in imports(path)}
        graph[name] = (found & set(files)) - {name}
    while free := {name for name, needs in graph.items() if not needs}:
        graph = {name: needs - free for name, needs in graph.items() if name not in free}
    assert not graph, f"a circle, or what imports one: {sorted(graph)}"


@pytest.mark.parametrize("path", sorted((SOURCE / "model").glob("*.py")), ids=lambda p: p.name)
def test_the_model_is_plain_pytorch(path: Path) -> None:
    """What computes it faster stands behind model/backend.py."""
    for name in imports(path):
        assert not name.startswith(("ctypes", "smolstack.native", "smolstack.backends"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_transformers_is_imported_by_interop_alone(path: Path) -> None:
    if room(path) != "interop":
        assert not [name for name in imports(path) if name.split(".")[0] == "transformers"]


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import smolstack, sys;"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_using_the_package_never_loads_transformers() -> None:
    program = (
        "import smolstack, sys; smolstack.load; smolstack.Idefics3Connector;"
        "print('transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
