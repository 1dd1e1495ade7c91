"""The package as a whole: who imports whom, what is installed, and that the presets are what they say."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from autotp_plan.planner.sources import preset_names, read_preset
from tests.helpers.checkpoints import write_llama

if sys.version_info >= (3, 11):
    import tomllib
else:  # the tests that read pyproject.toml need 3.11
    tomllib = None

ROOT = Path(__file__).parent.parent
PARTS = ("schemas", "planner", "runtime", "plans")
HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "safetensors", "numpy", "ray", "peft"}


def imports(path: Path, module_level: bool) -> Iterator[str]:
    """The modules a file imports: at module level, or inside functions. TYPE_CHECKING blocks do not count."""

    def walk(node: ast.AST, inside: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            deeper = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if inside != module_level:
                if isinstance(child, ast.Import):
                    yield from (alias.name for alias in child.names)
                elif isinstance(child, ast.ImportFrom):
                    assert child.level == 0, f"{path} has a relative import"
                    assert child.module
                    yield child.module
            yield from walk(child, deeper)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def files(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("schemas", {"planner", "runtime", "plans"}),
        ("planner", {"runtime", "plans"}),
        ("runtime", {"planner", "plans"}),
        ("plans", {"schemas", "planner", "runtime"}),
    ],
)
def test_parts_import_in_one_direction(part: str, forbidden: set[str]) -> None:
    assert files(part)
    for path in files(part):
        found = {*imports(path, True), *imports(path, False)}
        if path == ROOT / "planner" / "cli.py":  # the single door, inside a function
            found = set(imports(path, True))
        ours = {name.split(".")[1] for name in found if name.startswith("autotp_plan.")}
        assert not ours & forbidden, f"{path} imports {ours & forbidden}"
        assert not {name.split(".")[0] for name in found} & {*PARTS, "tests"}, f"{path} imports the folder"


@pytest.mark.parametrize("part", ["schemas", "planner", "plans"])
def test_nothing_heavy_at_module_level(part: str) -> None:
    for path in files(part):
        assert not {name.split(".")[0] for name in imports(path, True)} & HEAVY, path
    inside = {path.name: {n.split(".")[0] for n in imports(path, False)} & HEAVY for path in files(part)}
    assert {name for name, found in inside.items() if found} <= {"meta_model.py", "tp_plan.py", "rows.py"}, (
        "models of transformers; numpy, where it is, copies rows"
    )


def python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_planner_leaves_torch_out() -> None:
    loaded = python("import sys, autotp_plan.planner; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "autotp_plan" in loaded
    assert not HEAVY & set(loaded)
    assert not {"jsonschema", "click", "rich"} & set(loaded), "what one command needs is imported by that command"


def test_the_commands_leave_torch_out(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    code = """
import sys
from autotp_plan.planner.cli import main
folder, plan, shards = sys.argv[1:]
for arguments in (["compile", "--model", folder, "--tp", "2", "-o", plan], ["check", plan, "--checkpoint", folder],
                  ["show", plan], ["presplit", plan, "--checkpoint", folder, "-o", shards]):
    main(arguments, standalone_mode=False)
print(*{name.split('.')[0] for name in sys.modules})
"""
    loaded = python(code, folder, tmp_path / "plan.json", tmp_path / "shards").splitlines()[-1].split()
    assert not (HEAVY - {"numpy"}) & set(loaded), "numpy, where it is, copies rows"


def test_the_folder_itself_is_not_imported() -> None:
    for part in ("schemas", "planner", "runtime"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {part}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert f"import autotp_plan.{part}, not the folder" in done.stderr


def packages_on_disk() -> set[str]:
    folders = {path.parent for part in PARTS for path in (ROOT / part).rglob("__init__.py")}
    return {"autotp_plan." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_every_folder_is_a_listed_package() -> None:
    if tomllib is None:
        pytest.skip("tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_on_disk()
    for part in PARTS:
        for path in (ROOT / part).rglob("*.json"):
            package = path.parent.parent if part == "plans" and path.parent.name != "plans" else path.parent
            assert (package / "__init__.py").exists(), f"{path} is in a folder that no wheel has"


def test_the_wheel_has_every_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "out"), "."]
    source = tmp_path / "source"  # a copy: setuptools writes beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for part in PARTS:
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (tmp_path / "out").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"autotp_plan/{path.relative_to(ROOT)}"
        for part in PARTS
        for path in (ROOT / part).rglob("*")
        if path.suffix in (".py", ".json") or path.name == "py.typed"
    }
    assert wanted <= held, wanted - held
    outside = {name for name in held - wanted if ".dist-info/" not in name}
    assert not outside, "nothing else is installed"


# presets


def preset_files() -> list[str]:
    folder = resources.files("autotp_plan.planner.presets")
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".json"))


def test_every_preset_is_found_by_its_name() -> None:
    assert [f"{name}.json" for name in preset_names()] == preset_files()
    owners: dict[str, str] = {}
    for name in preset_names():
        preset = read_preset(name)
        assert preset.name == name
        assert preset.description.endswith(".")
        assert preset.model_types, f"{name} is for no model"
        for model_type in preset.model_types:
            assert model_type not in owners, f"{name} and {owners[model_type]} are both for {model_type}"
            owners[model_type] = name
        if name in owners:
            assert owners[name] == name


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_whole(name: str) -> None:
    preset = read_preset(name)
    assert preset.num_layers is not None
    assert preset.layer_specs and preset.vocabulary_specs
    for spec in (*preset.layer_specs, *preset.vocabulary_specs):
        assert all(pattern.endswith("$") for pattern in spec.patterns), "a pattern without an end matches too much"
    text = resources.files("autotp_plan.planner.presets").joinpath(f"{name}.json").read_text()
    assert json.loads(text)["$schema"] == "../../schemas/spec.schema.json"
    assert text.endswith("}\n")
