"""The package as a whole: its public names, what is installed, and that the presets are what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest

from autotp_plan.planner.rules.preset_files import preset_names, read_preset
from tests.helpers.paths import ROOT


def test_the_public_names() -> None:
    import autotp_plan
    from autotp_plan import runtime

    assert autotp_plan.__version__ == metadata.version("autotp-plan")
    assert callable(autotp_plan.compile_plan) and callable(autotp_plan.load_plan) and callable(runtime.local_shard)
    for module, name in ((autotp_plan, "load_plans"), (runtime, "load_plans")):
        with pytest.raises(AttributeError, match="has no attribute 'load_plans'"):
            getattr(module, name)


@pytest.mark.parametrize("missing", ["torch", "deepspeed", "transformers"])
def test_a_plan_without_what_training_needs(missing: str) -> None:
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import autotp_plan
from autotp_plan.schemas.errors import MissingDependencyError
try:
    autotp_plan.load_plan("plan.json")
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, missing], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"no module named '{missing}'" in done.stdout, done.stderr
    assert "pip install 'autotp-plan[train]'" in done.stdout


def test_the_wheel_has_every_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "out"), "."]
    source = tmp_path / "source"  # a copy: setuptools writes beside what it builds
    shutil.copytree(ROOT / "autotp_plan", source / "autotp_plan", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (tmp_path / "out").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "autotp_plan").rglob("*")
        if path.suffix in (".py", ".json", ".css", ".js") or path.name == "py.typed"
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
