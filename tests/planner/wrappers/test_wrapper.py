"""Vision-language checkpoints: the language model as its preset plans it, all else replicated, names of old and new."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.planner.rules.preset_files import preset_names, read_preset
from autotp_plan.planner.wrappers.wrapper import find_wrapper, flattened, wrapper_types
from autotp_plan.schemas.errors import AutoTPError, CompileError
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.wrappers import SIGLIP, TEXT, WRAPPERS, save_wrapper

OLD_NAMES = {
    "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.", "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}  # fmt: skip
"""As llava and those made after it are published: gemma3's `language_model.model.layers.0...`."""
PLAIN_TOWER = {**OLD_NAMES, "model.vision_tower.": "vision_tower."}
QWEN_NAMES = {"model.visual.": "visual.", "model.language_model.": "model."}
PUBLISHED = {
    "gemma3": OLD_NAMES, "llava": OLD_NAMES, "llava_next": OLD_NAMES, "llava_onevision": OLD_NAMES,
    "paligemma": OLD_NAMES, "mistral3": PLAIN_TOWER, "internvl": PLAIN_TOWER, "qwen2_vl": QWEN_NAMES,
    "qwen2_5_vl": QWEN_NAMES,
}  # fmt: skip


def layouts(plan: Plan, prefix: str = "") -> dict[str, Any]:
    """What the plan says of each parameter below `prefix`."""
    return {
        entry.name.removeprefix(prefix): (plan.layouts[entry.layout].intervals, entry.style, entry.partial_gradient)
        for entry in plan.expanded()
        if entry.name.startswith(prefix)
    }


def bare(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def renamed(folder: Path, target: Path, names: Mapping[str, str]) -> Path:
    """The checkpoint in `folder`, its tensors named as `names` says module names are named on disk."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    plan = compile_plan(folder, tp_size=2)
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for entry in plan.expanded():
        old = next((old for new, old in names.items() if entry.name.startswith(new)), None)
        new = next((new for new in names if entry.name.startswith(new)), "")
        disk = entry.name if old is None else old + entry.name.removeprefix(new)
        found[disk] = tensors[entry.source or entry.name]
    save_file(found, target / "model.safetensors")
    return target


def test_every_wrapper_that_is_known_is_tried() -> None:
    assert sorted(WRAPPERS) == wrapper_types()


@pytest.mark.parametrize("variant", WRAPPERS)
def test_the_language_model_is_planned_as_by_itself(tmp_path: Path, variant: str) -> None:
    """At 4 ranks for 4 KV heads, and at 8, where ranks share them."""
    folder = save_wrapper(tmp_path / "wrapper", variant)
    config = json.loads((folder / "config.json").read_text())
    wrapper = find_wrapper(config)
    assert wrapper is not None
    text = dict(config["text_config"]) | {"tie_word_embeddings": config.get("tie_word_embeddings", wrapper.tied)}
    text |= {"model_type": wrapper.preset_type(config), "architectures": None}
    if variant == "glm4v":  # its heads are as wide as the hidden size says; a glm4's are 128
        text["head_dim"] = 8
    alone = bare(tmp_path / "alone", text)
    for tp_size in (2, 8):
        plan, expected = compile_plan(folder, tp_size=tp_size), compile_plan(alone, tp_size=tp_size)
        assert layouts(plan, f"{wrapper.language_model}.") == layouts(expected, "model.")
        assert layouts(plan, f"{wrapper.head}.") == layouts(expected, "lm_head.")
        around = [e for e in plan.expanded() if not e.name.startswith((wrapper.language_model, wrapper.head))]
        assert around and {(e.style, e.partial_gradient) for e in around} == {("replicated", False)}
        assert {one.attribute for one in plan.module_attributes} == {o.attribute for o in expected.module_attributes}
        assert [(tie.name, tie.to) for tie in plan.tied] == [
            (wrapper.head + ".weight", wrapper.language_model + ".embed_tokens.weight") for _ in expected.tied
        ]
        assert any("replicated on every rank" in note for note in plan.notes)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_names_and_those_of_transformers_5_are_one_model(tmp_path: Path, variant: str) -> None:
    folder = save_wrapper(tmp_path / "now", variant)
    modern = renamed(folder, tmp_path / "modern", {})
    published = renamed(folder, tmp_path / "published", PUBLISHED[variant])
    plans = [compile_plan(path, tp_size=2) for path in (folder, modern, published)]
    plain = [{e.name: dataclasses.replace(e, source=None) for e in plan.expanded()} for plan in plans]
    assert plain[0] == plain[1] == plain[2]
    assert {plan.model.inventory for plan in plans} == {plans[0].model.inventory}
    assert not any(entry.source for entry in plans[1].parameters)
    for plan, path in zip(plans, (folder, modern, published), strict=True):
        on_disk = load_file(path / "model.safetensors").keys()
        assert {name for entry in plan.expanded() for name in entry.names_on_disk()} == set(on_disk)
    # a plan of the bare config is for the published names
    config = bare(tmp_path / "bare", json.loads((folder / "config.json").read_text()))
    assert compile_plan(config, tp_size=2).parameters == plans[2].parameters


@pytest.mark.parametrize("variant", PUBLISHED)
def test_names_become_what_transformers_makes_of_them(tmp_path: Path, variant: str) -> None:
    from transformers import AutoModelForImageTextToText, conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    from tests.helpers.wrappers import make_wrapper_config

    folder = save_wrapper(tmp_path / "now", variant)
    plan = compile_plan(renamed(folder, tmp_path / "published", PUBLISHED[variant]), tp_size=2)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(make_wrapper_config(variant))
    table: list[Any] = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    for entry in plan.expanded():
        (name,) = entry.names_on_disk()
        for step in table:
            assert isinstance(step, WeightRenaming)
            name = step.rename_source_key(name)[0]
        assert name == entry.name


def test_rotary_tables_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    folder = save_wrapper(tmp_path / "now", "llava")
    published = renamed(folder, tmp_path / "published", OLD_NAMES)
    tensors = load_file(published / "model.safetensors")
    tables = {f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in (0, 1)}
    plan = compile_plan(published, tp_size=2)
    save_file({**tensors, **tables}, published / "model.safetensors")
    assert compile_plan(published, tp_size=2).parameters == plan.parameters


@pytest.mark.parametrize("variant", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_a_layer_that_is_missing_or_too_many_is_found(tmp_path: Path, variant: str) -> None:
    """The language model's layers are counted, the tower's, of which there are three here and two there, are not."""
    folder = save_wrapper(tmp_path / "now", variant)
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight") and "vision" not in name)
    save_file({name: one for name, one in tensors.items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(CompileError, match="the model lacks a parameter that its other layers have"):
        compile_plan(folder, tp_size=2)
    extra = {gone.replace("layers.1", "layers.2"): tensors[gone].clone()}
    save_file({**tensors, **extra}, folder / "model.safetensors")
    with pytest.raises(CompileError, match="the model has more layers than its config says"):
        compile_plan(folder, tp_size=2)


def test_keys_that_a_config_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    """As gemma-3-4b-it is published, whose text_config names no heads and no vocabulary."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256,
        "text_config": {"hidden_size": 64, "intermediate_size": 96, "model_type": "gemma3_text",
                        "num_hidden_layers": 2, "sliding_window": 1024},
        "vision_config": SIGLIP,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    plan = compile_plan(bare(tmp_path / "bare", config), tp_size=4)
    shapes = {entry.name: (entry.dtype, plan.shape_of(entry)) for entry in plan.parameters}
    assert shapes["model.language_model.embed_tokens.weight"] == ("BF16", (262208, 64))
    assert shapes["model.language_model.layers.{0..1}.self_attn.k_proj.weight"][1] == (1024, 64)
    on_disk = {
        name: plan.shape_of(entry) for entry in plan.expanded() for name in entry.names_on_disk()
    }  # and from headers alone, where transformers has no word in it
    folder = write_checkpoint(tmp_path / "headers", on_disk, config=config)
    assert compile_plan(folder, tp_size=4).parameters == plan.parameters


def test_the_defaults_are_transformers_own() -> None:
    import transformers
    from transformers.models.glm4v.configuration_glm4v import Glm4vTextConfig

    path = Path(__file__).parents[3] / "autotp_plan/planner/wrappers/wrappers.json"
    for name, values in json.loads(path.read_text())["text_defaults"].items():
        cls: Any = Glm4vTextConfig if name == "glm4" else None
        cls = cls or type(transformers.AutoConfig.for_model(name))
        known = {field.name: field.default for field in dataclasses.fields(cls)}
        assert {key: known[key] for key in values} == values


def test_presets_that_a_wrapper_may_hold_are_placed_and_others_are_not() -> None:
    wrapper = find_wrapper({"model_type": "llava"})
    assert wrapper is not None
    placed = {name: wrapper.place(read_preset(name)) is not None for name in preset_names()}
    assert {name for name, fits in placed.items() if not fits} == {
        "bloom", "codegen", "dbrx", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "mpt", "opt",
    }  # fmt: skip
    deepseek = wrapper.place(read_preset("deepseek_v3"))
    assert deepseek is not None and list(deepseek.ignored_layers) == ["model.language_model.layers"]
    assert all(name.startswith("model.language_model.layers.*.mlp.experts.") for name in deepseek.assembled_tensors)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "qwen2_5_vl", "tie_word_embeddings": True}, True), ({"model_type": "qwen2_5_vl"}, False),
        ({"model_type": "qwen2_5_vl", "text_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "gemma3"}, True), ({"model_type": "gemma3", "tie_word_embeddings": False}, False),
        ({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}, True),
        ({"model_type": "mistral3", "tie_word_embeddings": False}, False),
    ],
)  # fmt: skip
def test_ties_are_where_transformers_looks_for_them(config: dict[str, Any], tied: bool) -> None:
    wrapper = find_wrapper(config)
    assert wrapper is not None
    assert wrapper.flat_config(config)["tie_word_embeddings"] is tied
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key != "model_type"}
    assert AutoConfig.for_model(config["model_type"], **values).tie_word_embeddings is tied


def test_sizes_of_a_spec_are_the_language_models(tmp_path: Path) -> None:
    """Of a model that is not known, too: keys in text_config count, and a tower's layers are not the text's."""
    config = {
        "model_type": "something", "num_hidden_layers": 7,
        "text_config": {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4},
        "vision_config": {"num_hidden_layers": 3, "hidden_size": 4},
    }  # fmt: skip
    shapes = {f"text.layers.{layer}.{name}.weight": (8, 8) for layer in range(2) for name in ("up", "down")}
    shapes |= {f"tower.layers.{layer}.fc.weight": (4, 4) for layer in range(3)}
    folder = write_checkpoint(tmp_path, shapes, config=config)
    rules = {
        "num_layers": "num_hidden_layers",
        "layer_specs": [
            {"patterns": [r"text\..*\.up\.weight$"], "unit": "hidden_size // num_attention_heads"},
            {"patterns": [r"text\..*\.down\.weight$"], "partition_type": "row", "unit": 2},
            {"patterns": [r"tower\..*"], "partition_type": "skip"},
        ],
    }
    plan = compile_plan(folder, tp_size=2, preset="none", specs=[SpecFile.from_dict(rules)])
    assert plan.layouts[plan.parameters[0].layout].dim is not None
    del shapes["text.layers.1.up.weight"]
    with pytest.raises(AutoTPError, match=r"text\.layers\.1\.up\.weight"):
        folder = write_checkpoint(tmp_path / "less", shapes, config=config)
        compile_plan(folder, tp_size=2, preset="none", specs=[SpecFile.from_dict(rules)])
    assert flattened({"a": 1, "text_config": {"a": 2}})["a"] == 2
    assert flattened({"a": 1, "text_config": [2]})["a"] == 1


def test_rules_for_a_text_config_hold_where_its_keys_are_outside_of_it(tmp_path: Path) -> None:
    """Published configs of Qwen2.5-VL have no text_config; what is inferred says `text_config.hidden_size`."""
    shapes = {f"text.layers.{layer}.{name}.weight": (8, 8) for layer in range(2) for name in ("up", "down")}
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4}
    unit = "text_config.hidden_size // text_config.num_attention_heads"
    rules = {
        "num_layers": "text_config.num_hidden_layers",
        "layer_specs": [
            {"patterns": [r".*\.up\.weight$"], "unit": unit},
            {"patterns": [r".*\.down\.weight$"], "partition_type": "row", "unit": unit},
        ],
    }
    plans = [
        compile_plan(
            write_checkpoint(tmp_path / name, shapes, config={"model_type": "something", **config}),
            tp_size=2, preset="none", specs=[SpecFile.from_dict(rules)],
        )
        for name, config in (("outside", sizes), ("inside", {"text_config": sizes}))
    ]  # fmt: skip
    assert layouts(plans[0]) == layouts(plans[1])
    assert {entry.style for entry in plans[0].parameters} == {"column", "row"}


def test_a_preset_is_named_by_the_language_model(tmp_path: Path) -> None:
    folder = save_wrapper(tmp_path / "llava", "llava")
    plan = compile_plan(folder, tp_size=2)
    assert compile_plan(folder, tp_size=2, preset="llama").parameters == plan.parameters
    with pytest.raises(CompileError, match="the preset is not for this model"):
        compile_plan(folder, tp_size=2, preset="qwen3")


def test_a_users_rule_decides_in_a_tower_too(tmp_path: Path) -> None:
    folder = save_wrapper(tmp_path / "llava", "llava")
    rules = [
        {"patterns": [r"model\.multi_modal_projector\.linear_1\.weight$"], "partition_type": "column"},
        {"patterns": [r"model\.multi_modal_projector\.linear_2\.weight$"], "partition_type": "row"},
    ]
    with pytest.raises(CompileError, match="runs a weight in a way that does not fit its module"):
        compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict({"layer_specs": rules})])


def test_a_wrapper_whose_language_model_has_no_preset_keeps_its_tower_replicated(tmp_path: Path) -> None:
    """transformers' tp_plan names no layer of a tower; that it is replicated is known of every one."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tests.planner.fallback.test_tp_plan import right

    config = AutoConfig.for_model(
        "cohere2_vision", vision_config=SIGLIP, text_config={**TEXT, "model_type": "cohere2"}, downsample_factor=2,
        image_token_id=250,
    )  # fmt: skip
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    plan = compile_plan(tmp_path, tp_size=2, prove=right)
    styles = {entry.name.partition(".layers")[0]: entry.style for entry in plan.parameters if "_proj" in entry.name}
    assert styles["model.vision_tower.encoder"] == "replicated"
    assert {e.style for e in plan.parameters if "language_model" in e.name} == {"column", "row", "vocab", "replicated"}


@pytest.mark.parametrize("variant", ["llava_next", "qwen2_5_vl"])
def test_a_published_checkpoint_comes_back_from_its_shards(tmp_path: Path, variant: str) -> None:
    from autotp_plan.planner.shards.merge import merge
    from autotp_plan.planner.shards.presplit import presplit

    folder = save_wrapper(tmp_path / "now", variant)
    published = renamed(folder, tmp_path / "published", PUBLISHED[variant])
    presplit(compile_plan(published, tp_size=2), published, tmp_path / "shards")
    merge(tmp_path / "shards", tmp_path / "merged")
    before, after = (load_file(path / "model.safetensors") for path in (published, tmp_path / "merged"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
