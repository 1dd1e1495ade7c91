"""Names on disk and in memory: rules with `*`, prefixes, and the same as transformers itself writes and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autotp_plan.planner import SpecFile, check_checkpoint, compile_plan
from autotp_plan.planner.model.inventory import Inventory, inventory_of_folder, inventory_of_module
from autotp_plan.planner.model.tensor_names import DiskNames, ToDisk, ToMemory
from autotp_plan.runtime.loading.read_weights import read_weight
from autotp_plan.runtime.loading.weights import open_weights
from autotp_plan.schemas.errors import CompileError, DocumentError
from autotp_plan.schemas.plan.document import Plan, Sources
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.models import save_checkpoint

EXPERTS = {
    "model.layers.*.mlp.experts.gate_up_proj": (
        "model.layers.*.mlp.experts.*.gate_proj.weight", "model.layers.*.mlp.experts.*.up_proj.weight",
    ),
    "model.layers.*.mlp.experts.down_proj": ("model.layers.*.mlp.experts.*.down_proj.weight",),
}  # fmt: skip
NAMES = {
    "mixtral": DiskNames(
        renamed={"model.layers.*.block_sparse_moe.gate.weight": "model.layers.*.mlp.gate.weight"},
        assembled={
            "model.layers.*.mlp.experts.gate_up_proj": (
                "model.layers.*.block_sparse_moe.experts.*.w1.weight",
                "model.layers.*.block_sparse_moe.experts.*.w3.weight",
            ),
            "model.layers.*.mlp.experts.down_proj": ("model.layers.*.block_sparse_moe.experts.*.w2.weight",),
        },
    ),
    "qwen2_moe": DiskNames(assembled=EXPERTS),
    "qwen3_moe": DiskNames(assembled=EXPERTS),
    "deepseek_v2": DiskNames(assembled=EXPERTS),
    "deepseek_v3": DiskNames(assembled=EXPERTS),
    "granitemoe": DiskNames(
        renamed={
            f"model.layers.*.block_sparse_moe.{disk}.weight": f"model.layers.*.block_sparse_moe.{memory}"
            for disk, memory in (
                ("input_linear", "experts.gate_up_proj"),
                ("output_linear", "experts.down_proj"),
                ("router.layer", "router.weight"),
            )
        }
    ),
    "gpt_neox": DiskNames(renamed={"embed_out.weight": "lm_head.weight"}),
    "gpt2": DiskNames(base_model_prefix="transformer", tied={"lm_head.weight": "transformer.wte.weight"}),
}
COMMON = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 11, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 32, "tie_word_embeddings": False, "moe_intermediate_size": 8,
    "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "first_k_dense_replace": 1, "n_routed_experts": 12, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 12},
    "qwen2_moe": {"num_experts": 12, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 12, "head_dim": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "granitemoe": {"num_local_experts": 12},
    "gpt_neox": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32, "tie_word_embeddings": True, "n_positions": 8},
}
WHOLE = {"layer_specs": [{"patterns": [".*"], "partition_type": "skip"}]}


def spec_of(names: DiskNames) -> SpecFile:
    return SpecFile.from_dict(
        {
            **WHOLE,
            "renamed_tensors": names.renamed,
            "assembled_tensors": {memory: list(disks) for memory, disks in names.assembled.items()},
            "tied": [{"name": name, "to": to} for name, to in names.tied.items()],
            **({"base_model_prefix": names.base_model_prefix} if names.base_model_prefix else {}),
        }
    )


def plan_of(model: Any, names: DiskNames) -> Plan:
    return compile_plan(model, tp_size=2, preset="none", specs=[spec_of(names)])


@pytest.fixture(scope="module", params=list(CONFIGS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A model of random weights, norms, biases and buffers too, as `save_pretrained` writes it over several files."""
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    own = CONFIGS[request.param]
    config = transformers.AutoConfig.for_model(request.param, **(own if request.param == "gpt2" else {**COMMON, **own}))
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for seed, tensor in enumerate([*model.parameters(), *model.buffers()]):
        if tensor.is_floating_point():
            tensor.data.normal_(generator=torch.Generator().manual_seed(seed))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # as from_pretrained keeps it, and the checkpoints on the hub
            buffer.data = buffer.data.float()
    model.save_pretrained(folder, max_shard_size="20KB")
    return request.param, folder, model


def infos(inventory: Inventory) -> dict[str, tuple[Any, ...]]:
    return {name: (i.shape, i.dtype, i.source, i.sources) for name, i in inventory.parameters.items()}


def test_checkpoint_config_and_live_model_are_one_inventory(saved: tuple[str, Path, Any], tmp_path: Path) -> None:
    model_type, folder, model = saved
    names = NAMES[model_type]
    from_disk = inventory_of_folder(folder, names)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    from_config = inventory_of_folder(tmp_path, names)
    assert infos(from_disk) == infos(from_config) == infos(inventory_of_module(model, names))
    assert from_disk.tied == from_config.tied
    assert from_disk.identity() == from_config.identity()
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in from_disk.tied}
    assert {name: info.shape for name, info in from_disk.parameters.items()} == state
    plan = plan_of(folder, names)
    assert plan == plan_of(tmp_path, names)
    assert check_checkpoint(plan, folder) == []
    assert Plan.from_dict(json.loads(plan.to_json())) == plan


def test_assembled_bytes_are_the_models(saved: tuple[str, Path, Any]) -> None:
    """What transformers splits when it saves comes back as what the model held, bit by bit."""
    model_type, folder, model = saved
    plan = plan_of(folder, NAMES[model_type])
    held = model.state_dict()
    weights = list(open_weights(folder, plan).of_rank(0))
    assert {weight.name for weight in weights} == held.keys() - {tie.name for tie in plan.tied}
    for weight in weights:
        read = read_weight(weight, torch.device("cpu"), None)
        assert read.dtype == held[weight.name].dtype and torch.equal(read, held[weight.name]), weight.name


def test_names_are_transformers_own(saved: tuple[str, Path, Any]) -> None:
    """`ToMemory` renames each name on disk as transformers does when it loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model_type, folder, model = saved
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    on_disk = {tensor for file in folder.glob("*.safetensors") for tensor in _names(file)}
    to_memory = ToMemory(NAMES[model_type], on_disk)
    assert on_disk
    for name in on_disk:
        theirs, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, model.state_dict())
        part = to_memory.role(name)
        assert part is not None and part.parameter == theirs


def _names(path: Path) -> list[str]:
    from autotp_plan.schemas.storage.safetensors_header import read_header

    return [tensor.name for tensor in read_header(path).tensors]


def test_plans_fold_sources(saved: tuple[str, Path, Any]) -> None:
    model_type, folder, _ = saved
    entries = {entry.name: entry for entry in plan_of(folder, NAMES[model_type]).parameters}
    if model_type == "mixtral":
        prefix = "model.layers.{0..10}.block_sparse_moe"
        gate_up = entries["model.layers.{0..10}.mlp.experts.gate_up_proj"]
        assert gate_up.sources == Sources(
            names=(f"{prefix}.experts.*.w1.weight", f"{prefix}.experts.*.w3.weight"), count=12
        )
        assert gate_up.source is None
        assert entries["model.layers.{0..10}.mlp.gate.weight"].source == f"{prefix}.gate.weight"
    if model_type == "deepseek_v3":
        down = entries["model.layers.{1..10}.mlp.experts.down_proj"]
        assert down.sources == Sources(names=("model.layers.{1..10}.mlp.experts.*.down_proj.weight",), count=12)
        assert entries["model.layers.{1..10}.mlp.gate.e_score_correction_bias"].dtype == "F32"


OLD_GPT2 = {
    "wte.weight": (32, 16), "h.0.attn.c_attn.weight": (16, 48), "h.1.attn.c_attn.weight": (16, 48),
    "h.0.attn.bias": (1, 1, 8, 8), "h.1.attn.bias": (1, 1, 8, 8), "h.0.attn.masked_bias": (), "ln_f.weight": (16,),
}  # fmt: skip


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("written", ["h.*.attn", "transformer.h.*.attn"])
def test_a_checkpoint_without_the_prefix(tmp_path: Path, written: str, with_head: bool) -> None:
    spec = SpecFile.from_dict(
        {
            **WHOLE,
            "num_layers": 2,
            "base_model_prefix": "transformer",
            "ignored_tensors": [f"{written}.bias", f"{written}.masked_bias"],
        }
    )
    shapes = {**OLD_GPT2, **({"lm_head.weight": (32, 16)} if with_head else {})}
    old, new = write_checkpoint(tmp_path / "old", shapes), tmp_path / "new"
    write_checkpoint(new, {n if n.startswith("lm_head") else f"transformer.{n}": s for n, s in shapes.items()})
    plans = {folder: compile_plan(folder, tp_size=2, preset="none", specs=[spec]) for folder in (old, new)}
    assert plans[old].model.inventory == plans[new].model.inventory
    assert plans[old].ignored == plans[new].ignored
    sources = {entry.name: entry.source for entry in plans[old].parameters}
    assert sources["transformer.h.{0..1}.attn.c_attn.weight"] == "h.{0..1}.attn.c_attn.weight"
    assert sources["transformer.ln_f.weight"] == "ln_f.weight"
    assert sources.get("lm_head.weight") is None and ("lm_head.weight" in sources) == with_head
    assert not any("attn.bias" in name or "masked" in name for name in sources)
    assert all(entry.source is None for entry in plans[new].parameters)
    for folder, plan in plans.items():
        assert check_checkpoint(plan, folder) == []


def test_the_prefix_is_given_to_all_or_none() -> None:
    names = DiskNames(
        base_model_prefix="model",
        renamed={"embed_out.weight": "lm_head.weight", "model.h.*.old": "model.h.*.new"},
        assembled={"model.h.*.all": ("model.h.*.e.*.w",)},
        tied={"head.weight": "model.wte"},
    )

    def memory(disk: str, *others: str) -> str | None:
        found = ToMemory(names, [disk, *others]).role(disk)
        return None if found is None else found.parameter

    assert memory("h.3.x") == "model.h.3.x"
    assert memory("h.3.old") == memory("model.h.3.old") == "model.h.3.new"
    assert memory("h.3.x", "model.norm") == "h.3.x"
    assert memory("lm_head.weight") == memory("embed_out.weight") == "lm_head.weight"
    assert memory("head.weight") == "head.weight"
    assert memory("modelling.x") == "model.modelling.x", "a prefix ends with a dot"
    part = ToMemory(names, ["h.3.e.10.w"]).role("h.3.e.10.w")
    assert part is not None and part.sources == Sources(names=("h.3.e.*.w",))
    assert (part.parameter, part.number) == ("model.h.3.all", 10)


def test_stars_are_whole_numbers_only() -> None:
    names = DiskNames(renamed={"a.*.b.*.c": "x.*.y.*", "a.0.b.*.c": "first.*", "a.1.b.2.c": "one"})
    to_memory, to_disk = ToMemory(names, []), ToDisk(names)

    def memory(disk: str) -> str:
        part = to_memory.role(disk)
        assert part is not None
        return part.parameter

    assert memory("a.3.b.12.c") == "x.3.y.12"
    assert memory("a.0.b.12.c") == "first.12", "the pattern with fewer * comes first"
    assert memory("a.1.b.2.c") == "one"
    for other in ("a.03.b.1.c", "a.x.b.1.c", "a.1.b.1.cc", "a.1.b.1", "a.1.2.b.1.c"):
        assert memory(other) == other
    assert to_disk.source("x.3.y.12") == "a.3.b.12.c"
    assert to_disk.source("first.7") == "a.0.b.7.c"
    assert to_disk.source("second.7") is None


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"renamed_tensors": {"a.*.b": "c"}}, "renamed_tensors.a.*.b"),
        ({"renamed_tensors": {"a.*b": "c.*d"}}, "renamed_tensors.a.*b"),
        ({"assembled_tensors": {"a.*": ["b.*", "b.*.*"]}}, "assembled_tensors.a.*"),
        ({"assembled_tensors": {"a": ["b.*.*"]}}, "assembled_tensors.a"),
        ({"assembled_tensors": {"a": ["b.w*"]}}, "assembled_tensors.a"),
        ({"assembled_tensors": {"a": ["b", "b"]}}, "assembled_tensors"),
        ({"assembled_tensors": {"a": ["b"]}, "renamed_tensors": {"b": "c"}}, "assembled_tensors"),
        ({"assembled_tensors": {"a": []}}, "assembled_tensors.a"),
        ({"assembled_tensors": {"a": "b"}}, "assembled_tensors.a"),
        ({"base_model_prefix": "transformer."}, "base_model_prefix"),
    ],
)
def test_a_spec_whose_names_do_not_fit(data: dict[str, Any], where: str) -> None:
    with pytest.raises(DocumentError) as caught:
        SpecFile.from_dict(data)
    assert [fault.where for fault in caught.value.faults] == [where]


def test_layers_past_the_last_are_ignored(tmp_path: Path) -> None:
    """DeepSeek-V3's checkpoints hold a layer for multi-token prediction that the model does not have."""
    folder = save_checkpoint(tmp_path / "checkpoint", "deepseek_v3", num_nextn_predict_layers=1)
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in [*files, folder / "model.safetensors.index.json"]:
        file.unlink()
    extra = {name.replace("layers.1.", "layers.2."): t.clone() for name, t in tensors.items() if "layers.1." in name}
    save_file({**tensors, **extra}, folder / "model.safetensors", {"format": "pt"})
    plan = compile_plan(folder, tp_size=2)
    assert plan.ignored == ("model.layers.2.**",)
    assert check_checkpoint(plan, folder) == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(CompileError, match="more layers than its config says"):
        compile_plan(folder, tp_size=2)
