"""Who imports whom: rooms in one order, no circles, nothing heavy before it is needed."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.checkpoints import write_llama
from tests.helpers.paths import PACKAGE

PARTS = (
    "schemas",
    "dequantize",
    "sources",
    "probes",
    "huggingface",
    "factories",
    "inference",
    "planner",
    "runtime",
    "plans",
)
HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "safetensors", "numpy", "ray", "peft"}

ROOMS = (
    "schemas.untrusted", "schemas", "schemas.plan", "schemas.storage", "schemas.shards", "schemas.jobs",
    "schemas.estimate",
    "dequantize",
    "sources.transfer", "sources.torch_files", "sources.places", "sources",
    "probes",
    "huggingface",
    "factories",
    "inference.regions", "inference.small", "inference.spec", "inference",
    "planner.model", "planner.deepspeed", "planner.wrappers", "planner.rules", "planner.fallback", "planner.copying",
    "planner.shards", "planner.diff", "planner.estimate", "planner.pictures",
    "runtime.deepspeed", "runtime.data", "runtime.parameters", "runtime.tensor_parallel", "runtime.sequence_parallel",
    "runtime.losses", "runtime.loading", "runtime.optimizers", "runtime.checkpoint", "runtime.calls",
    "runtime.integrations", "runtime.verify", "runtime.estimate",
    "planner.cli", "planner.presets", "plans",
)  # fmt: skip
"""Every folder, the lowest first: a room imports only rooms that come before it. Files that lie in `planner/` or
`runtime/` itself (the compiler, the training plan) stand between rooms, and only circles are forbidden to them.
"""


def modules() -> dict[str, Path]:
    """Every module of ours by its name without `autotp_plan.`."""
    found = {}
    for part in PARTS:
        for path in sorted((PACKAGE / part).rglob("*.py")):
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path, module_level: bool | None = None, typing: bool = False) -> Iterator[str]:
    """What a file imports: at module level (True), inside functions (False), both (None); and for `typing` alone."""

    def walk(node: ast.AST, inside: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if not typing and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            deeper = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if module_level is None or inside != module_level:
                if isinstance(child, ast.Import):
                    yield from (alias.name for alias in child.names)
                elif isinstance(child, ast.ImportFrom):
                    assert child.level == 0, f"{path} has a relative import"
                    assert child.module
                    for alias in child.names:
                        name = f"{child.module}.{alias.name}"
                        yield name if name.removeprefix("autotp_plan.") in MODULES else child.module
            yield from walk(child, deeper)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def ours(path: Path, module_level: bool | None = None, typing: bool = False) -> set[str]:
    """The modules of ours that a file imports."""
    found = imports(path, module_level, typing)
    return {name.removeprefix("autotp_plan.") for name in found if name.startswith("autotp_plan.")}


def room(module: str) -> str:
    """The folder that a module lies in; `planner.compiler` and the like are rooms of their own."""
    parent = module.rpartition(".")[0]
    if MODULES[module].name == "__init__.py":
        return module
    return module if parent in ("planner", "runtime") else parent


def circles(graph: dict[str, set[str]]) -> list[str]:
    """A circle of the graph; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_is_in_the_order() -> None:
    folders = {str(path.parent.relative_to(PACKAGE)).replace("/", ".") for path in MODULES.values()}
    assert folders - {"planner", "runtime"} == set(ROOMS)


def test_rooms_import_only_rooms_below_them() -> None:
    order = {name: place for place, name in enumerate(ROOMS)}
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in ours(path)
        if room(module) in order and room(other) in order and order[room(other)] > order[room(module)]
    ]
    assert not wrong


def test_no_circles_of_rooms_or_modules() -> None:
    between_modules = {module: ours(path, typing=True) for module, path in MODULES.items()}
    between_rooms: dict[str, set[str]] = defaultdict(set)
    for module, found in between_modules.items():
        between_rooms[room(module)] |= {room(other) for other in found} - {room(module)}
    assert not circles(between_modules)
    assert not circles(dict(between_rooms))


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circles({"a": {"b", "c"}, "b": {"c"}})


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ("schemas", {"schemas"}),
        ("probes", {"probes"}),
        ("huggingface", {"schemas", "huggingface"}),
        ("factories", {"schemas", "factories"}),
        ("inference", {"schemas", "probes", "huggingface", "factories", "inference"}),
        ("dequantize", {"schemas", "dequantize"}),
        ("sources", {"schemas", "dequantize", "sources"}),
        ("planner", {"schemas", "dequantize", "sources", "huggingface", "factories", "planner"}),
        ("runtime", {"schemas", "dequantize", "sources", "probes", "huggingface", "factories", "runtime"}),
        ("plans", {"plans"}),
    ],
)
def test_parts_import_in_one_direction(part: str, allowed: set[str]) -> None:
    for module, path in MODULES.items():
        if module.split(".")[0] == part:
            command = module.startswith("planner.cli.")  # the single door to the runtime, inside functions
            found = {name.split(".")[0] for name in ours(path, True if command else None)}
            assert found <= allowed, f"{module} imports {found - allowed}"
            outside = {name.split(".")[0] for name in imports(path)}
            assert not outside & {*PARTS, "tests"}, f"{module} imports a folder and not the package"


def test_a_room_says_what_belongs_in_it() -> None:
    for name in ROOMS:
        text = ast.get_docstring(ast.parse((PACKAGE / name.replace(".", "/") / "__init__.py").read_text())) or ""
        assert len(text) > 40, f"{name}/__init__.py says nothing"


def test_rooms_are_small() -> None:
    for name in ROOMS:
        files = [path for path in (PACKAGE / name.replace(".", "/")).glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 12, f"{name} has {len(files)} files"


@pytest.mark.parametrize("part", ["schemas", "huggingface", "planner", "plans"])
def test_nothing_heavy_at_module_level(part: str) -> None:
    for module, path in MODULES.items():
        if module.split(".")[0] == part:
            assert not {name.split(".")[0] for name in imports(path, True)} & HEAVY, path
    inside = {
        module: {name.split(".")[0] for name in imports(path, False)} & HEAVY
        for module, path in MODULES.items()
        if module.split(".")[0] == part and part != "huggingface"
    }
    heavy = {module for module, found in inside.items() if found}
    assert heavy <= {"planner.fallback.tp_plan", "planner.copying.copy_rows"}, (
        "models of transformers; numpy, where it is, copies rows"
    )


def python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_planner_leaves_torch_out() -> None:
    code = "import sys; from autotp_plan import compile_plan; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = python(code).split()
    assert "autotp_plan" in loaded
    assert not HEAVY & set(loaded)
    assert not {"jsonschema", "click", "rich"} & set(loaded), "what one command needs is imported by that command"


def test_the_commands_leave_torch_out(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    code = """
import sys
from autotp_plan.planner.cli.main import main
folder, plan, shards = sys.argv[1:]
for arguments in (["compile", "--model", folder, "--tp", "2", "-o", plan], ["check", plan, "--checkpoint", folder],
                  ["show", plan], ["presplit", plan, "--checkpoint", folder, "-o", shards]):
    main(arguments, standalone_mode=False)
print(*{name.split('.')[0] for name in sys.modules})
"""
    loaded = python(code, folder, tmp_path / "plan.json", tmp_path / "shards").splitlines()[-1].split()
    assert not (HEAVY - {"numpy"}) & set(loaded), "numpy, where it is, copies rows"
    assert not {"jsonschema", "http", "pickletools"} & set(loaded), "it was right, and it lay here"
