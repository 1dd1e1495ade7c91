"""The presets: JSON files, one for each architecture, and which of them fits a model.

`--preset auto` picks by `model_type`; a name may also be DeepSpeed's, which is then replaced by the model's preset.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources

from autotp_plan.schemas.documents import did_you_mean
from autotp_plan.schemas.errors import CompileError, Fault
from autotp_plan.schemas.spec import SpecFile

AUTO, NONE, INFER = "auto", "none", "infer"


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    folder = resources.files("autotp_plan.planner.presets")
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def read_preset(name: str) -> SpecFile:
    """The preset called `name`.

    Raises:
        CompileError: there is no such preset.
    """
    return SpecFile.from_dict(json.loads(preset_text(name)), f"preset {name}")


def preset_text(name: str) -> str:
    """The text of the file of the preset called `name`.

    Raises:
        CompileError: there is no such preset.
    """
    if name not in preset_names():
        raise CompileError(
            Fault(
                code="unknown-preset",
                what="there is no such preset",
                where="presets show",
                got=name,
                expected=", ".join(preset_names()),
                next=did_you_mean(name, preset_names()) or "see `autotp-plan presets list`",
            )
        )
    return resources.files("autotp_plan.planner.presets").joinpath(f"{name}.json").read_text(encoding="utf-8")


def find_preset(preset: str, model_type: str | None, notes: list[str], where: str = "--preset") -> SpecFile | None:
    """The preset for a model.

    Args:
        preset: `auto`, `none`, `infer`, a preset's name or one of its aliases.
        model_type: the model's, as in config.json.
        notes: what the user should know of the choice is added here.
        where: what faults point to.

    Returns:
        None for `none` and `infer`, and for `auto` where no preset is for `model_type`.

    Raises:
        CompileError: there is no such preset, or the model has another.
    """
    if preset in (NONE, INFER):
        return None
    names = preset_names()
    if preset == AUTO:
        if model_type in names:
            return read_preset(model_type)
        return next((found for found in map(read_preset, names) if model_type in found.model_types), None)
    aliased = [found for found in map(read_preset, names) if preset in found.aliases]
    if aliased and preset not in names:
        return _by_alias(preset, aliased, model_type, notes, where)
    if preset not in names:
        raise CompileError(
            Fault(
                code="unknown-preset",
                what="there is no such preset",
                where=where,
                got=preset,
                expected="auto, none, infer, " + ", ".join(names),
                next=did_you_mean(preset, names) or "use --preset auto, or write a spec file and use --preset none",
            )
        )
    found = read_preset(preset)
    if model_type is None or model_type in found.model_types:
        return found
    fitting = find_preset(AUTO, model_type, notes)
    if fitting is not None:
        raise CompileError(
            Fault(
                code="preset-of-another-model",
                what="the preset is not for this model",
                where=where,
                got=f"{preset}, which is for model_type {', '.join(found.model_types)}",
                expected=f"the preset for model_type {model_type}",
                next=f"use --preset auto or --preset {fitting.name}",
            )
        )
    notes.append(f"Preset {preset} was made for model_type {', '.join(found.model_types)}; this model is {model_type}.")
    return found


def _by_alias(
    alias: str, presets: Sequence[SpecFile], model_type: str | None, notes: list[str], where: str
) -> SpecFile:
    """The preset that `alias` means for a model of `model_type`."""
    found = next((preset for preset in presets if model_type in preset.model_types), None)
    names = ", ".join(str(preset.name) for preset in presets)
    if found is None:
        raise CompileError(
            Fault(
                code="preset-of-another-model",
                what="the preset is not for this model",
                where=where,
                got=f"{alias}, for model_type {model_type}",
                expected=f"a model that transformers has: {alias} stands for {names}, not for models of remote code",
                next="use --preset auto, or write a spec file: the rows of a fused weight must be known, not guessed",
            )
        )
    note = f"Preset {alias} stands for {names}; this model is a {model_type}, planned by preset {found.name}."
    wrong = found.deepspeed_presets.get(alias)
    notes.append(f"{note} DeepSpeed's own {alias} {wrong}." if wrong else note)
    return found


def preset_for_deepspeed(preset_model: str, model_type: str | None, notes: list[str]) -> str:
    """The name of the preset for a DeepSpeed config's `preset_model`: the model's preset, wherever there is one.

    `notes` gets a sentence where that is another than DeepSpeed's.
    """
    preset_model = preset_model.lower()  # as DeepSpeed does
    fitting = find_preset(AUTO, model_type, notes)
    if fitting is None or fitting.name is None:
        return preset_model
    wrong = fitting.deepspeed_presets.get(preset_model)
    if wrong is not None:
        notes.append(
            f"preset_model {preset_model!r} of the DeepSpeed config was replaced by preset {fitting.name!r}. "
            f"DeepSpeed's own {wrong}."
        )
    elif fitting.name != preset_model:
        notes.append(
            f"preset_model {preset_model!r} of the DeepSpeed config was replaced by preset {fitting.name!r}: "
            f"the model is a {model_type}, which differs."
        )
    return fitting.name
