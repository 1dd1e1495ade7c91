"""A `partition_config` that works in DeepSpeed works here, on models of one's own: the same shards, the dense numbers.

The forms are those of DeepSpeed's tutorial, its configuration page, its examples and its own tests of custom patterns.
What DeepSpeed accepts and computes wrongly is refused.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from autotp_plan.planner import Plan, SpecFile, compile_plan
from autotp_plan.planner.cli.main import main
from autotp_plan.planner.deepspeed.read_config import parse_section
from autotp_plan.schemas.errors import AutoTPError, CompileError
from tests.helpers.checkpoints import write_llama
from tests.helpers.launch import launch

WIDTH, VOCAB = 32, 64


class LinearLike(nn.Module):
    """A linear layer that is no nn.Linear, as in models written from scratch."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight.transpose(0, 1)
        return out if self.bias is None else out + self.bias


class Attention(nn.Module):
    def __init__(self, of: SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.fused = of.heads, of.kv_heads, of.head_dim, of.fused
        q_size, kv_size = of.heads * of.head_dim, of.kv_heads * of.head_dim
        if of.fused:
            self.qkv_proj = nn.Linear(WIDTH, q_size + 2 * kv_size, bias=of.bias)
        else:
            self.q_proj = nn.Linear(WIDTH, q_size, bias=of.bias)
            self.k_proj, self.v_proj = (nn.Linear(WIDTH, kv_size, bias=of.bias) for _ in range(2))
        if of.counted:
            self.num_heads, self.num_kv_heads, self.embed_dim = of.heads, of.kv_heads, q_size
        self.q_norm = nn.LayerNorm(of.head_dim)
        self.o_proj = of.linear(q_size, WIDTH, bias=of.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            qkv = self.qkv_proj(x)
            part = qkv.shape[-1] // (self.heads + 2 * self.kv_heads)
            q, k, v = qkv.split([self.heads * part, self.kv_heads * part, self.kv_heads * part], dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        counts = (self.num_heads, *[self.num_kv_heads] * 2) if hasattr(self, "num_heads") else (-1, -1, -1)
        q, k, v = (one.unflatten(-1, (count, self.head_dim)).transpose(1, 2) for one, count in zip((q, k, v), counts))
        heads = F.scaled_dot_product_attention(self.q_norm(q), k, v, is_causal=True, enable_gqa=True)
        heads = heads.transpose(1, 2).flatten(2)
        return self.o_proj(heads.reshape(*x.shape[:2], self.embed_dim) if hasattr(self, "embed_dim") else heads)


class Mlp(nn.Module):
    def __init__(self, of: SimpleNamespace) -> None:
        super().__init__()
        self.gate_up_proj = of.linear(WIDTH, 2 * of.inner, bias=of.bias)
        self.down_proj = nn.Linear(of.inner, WIDTH, bias=of.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, of: SimpleNamespace) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn, self.mlp = Attention(of), Mlp(of)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Config(SimpleNamespace):
    def to_json_string(self) -> str:
        return json.dumps({key: value for key, value in vars(self).items() if key != "base_model_tp_plan"})


class Decoder(nn.Module):
    """A language model of one's own: logits of `(batch, length)` token ids."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        defaults = {"heads": 8, "kv_heads": 4, "head_dim": 8, "inner": 48, "fused": False, "bias": False}
        more = {"linear": nn.Linear, "tied": False, "vocab": VOCAB, "tp_plan": None, "counted": False}
        of = SimpleNamespace(**{**defaults, **more, **options})
        self.config = Config(
            model_type="own",
            hidden_size=WIDTH,
            num_attention_heads=of.heads,
            num_key_value_heads=of.kv_heads,
            base_model_tp_plan=of.tp_plan,
        )
        self.embed_tokens = nn.Embedding(of.vocab, WIDTH)
        self.layers = nn.ModuleList(Block(of) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, of.vocab, bias=False)
        if of.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def rule(*patterns: str, kind: str = "column", **rest: Any) -> dict[str, Any]:
    return {"patterns": list(patterns), "partition_type": kind, **rest}


ROW = rule(r".*\.o_proj\.weight$", r".*\.down_proj\.weight$", kind="row")
QKV = rule(r".*\.[qkv]_proj\.weight$")
GATE_UP = rule(r".*\.gate_up_proj\.weight$", shape=[2, -1], partition_dim=0)
Q_NORM = rule(r".*\.q_norm\..*", kind="skip", grad_allreduce=True)
HEAD = rule(r".*lm_head\.weight$", gather_output=True)
REST = rule(".*", kind="skip")

TP_PLAN = {
    "self_attn.q_proj": "colwise", "self_attn.k_proj": "colwise", "self_attn.v_proj": "colwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce", "layers.*.self_attn.o_proj": "rowwise",
    "lm_head": "colwise_gather_output",
}  # fmt: skip

CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "tutorial": ({}, [ROW, QKV, GATE_UP, Q_NORM]),
    "catch-all at the end": ({"bias": True}, [Q_NORM, ROW, QKV, GATE_UP, REST]),
    "the first match counts": (
        {},
        [rule(r".*layers\.0\.mlp\..*", kind="skip"), Q_NORM, QKV, ROW, GATE_UP, rule(r".*down_proj\.weight$")],
    ),
    "half of the model": ({}, [rule(r".*\.down_proj\.weight$", kind="row"), GATE_UP]),
    "patterns of another model": ({}, [ROW, QKV, GATE_UP, Q_NORM, rule(r".*\.experts\.\d+\.w1\.weight$")]),
    "patterns without an end": (
        {"bias": True},
        [rule(r".*\.(q|k|v)_proj", r".*self_attn\.q_norm"), Q_NORM, rule(r".*(o|down)_proj", kind="ROW"), GATE_UP],
    ),
    "fused, grouped queries": (
        {"fused": True, "bias": True},
        [rule(r".*\.qkv_proj\.weight$", shape=[[64, 32, 32], -1], partition_dim=0), ROW, GATE_UP, Q_NORM],
    ),
    "fused, equal parts": (
        {"fused": True, "kv_heads": 8},
        [rule(r".*\.self_attn\.qkv_proj\.weight$", shape=[3, -1], partition_dim=0), ROW, GATE_UP, Q_NORM],
    ),
    "seen as experts": (
        {},
        [rule(r".*\.gate_up_proj\.weight$", shape=[2, -1, WIDTH], partition_dim=1), ROW, QKV, Q_NORM],
    ),
    "rules for other model types": (
        {},
        [rule(".*", kind="skip", model_types=["llama"]), {**QKV, "model_types": ["OWN"]}, ROW, GATE_UP, Q_NORM],
    ),
    "gathered head": ({}, [ROW, QKV, GATE_UP, Q_NORM, HEAD]),
    "row-parallel head": ({}, [ROW, QKV, GATE_UP, Q_NORM, rule(r".*lm_head\.weight$", kind="row")]),
    "tied head": ({"tied": True}, [ROW, QKV, GATE_UP, Q_NORM, HEAD]),
    "odd vocabulary": ({"vocab": 61}, [ROW, QKV, GATE_UP, Q_NORM, HEAD]),
    "three KV heads": ({"heads": 6, "kv_heads": 3}, [ROW, QKV, GATE_UP, Q_NORM]),
    "linear-like modules": ({"linear": LinearLike, "bias": True}, [ROW, QKV, GATE_UP, Q_NORM]),
    "its own tp_plan": ({"tp_plan": TP_PLAN, "bias": True}, None),
    "attributes that count heads": ({"tp_plan": TP_PLAN, "counted": True}, None),
}  # fmt: skip
"""Each with its model, None for no `partition_config` at all. All of them run in DeepSpeed."""
PLANTED = "half of the model"
"""Tried once more with a plan by other rules, which shard more and forget a partial gradient."""


def section_of(specs: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
    return {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": specs, **rest}}


def planned(case: str, **options: Any) -> Plan:
    model, specs = CASES[case]
    return compile_plan(Decoder(**model), deepspeed=parse_section(section_of(specs)), **options)


def rest_of(plan: Plan) -> set[str]:
    return {entry.name.split(".")[-2] for entry in plan.parameters if str(entry.rule) == "no rule"}


# against DeepSpeed


def fill(model: nn.Module) -> None:
    """The same random values in every process, in float64."""
    model.double()
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def run_both(work: Path, cases: list[str]) -> list[tuple[str, float, set[str]]]:
    """Inside a rank: the largest error of ours against the dense model, and the names of shards unlike DeepSpeed's."""
    import deepspeed

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.loading.local_shard import local_shard
    from tests.helpers import parity

    found = []
    deepspeed.init_distributed(dist_backend="gloo")
    rank = torch.distributed.get_rank()
    ids = torch.arange(24).view(2, 12) * 7 % 61
    for number, case in enumerate(cases):
        options, specs = CASES[case]
        dense = Decoder(**options)
        fill(dense)
        expected = dense(ids)
        expected.square().mean().backward()
        plan = load_plan(work / f"{number}.json")
        ours = plan.load_model(work / str(number), model=functools.partial(Decoder, **options)).train()
        logits = ours(ids)
        logits.square().mean().backward()
        errors = [(logits - expected).abs().max()]
        theirs = Decoder(**options)
        fill(theirs)
        tensor_parallel = {"autotp_size": 2} if specs is None else section_of(specs)
        settings = {**parity.engine_settings(0, accumulation=1), "tensor_parallel": tensor_parallel}
        theirs.float()
        engine, *_ = deepspeed.initialize(model=theirs, config=settings, model_parameters=list(theirs.parameters()))
        shards = dict(engine.module.named_parameters())
        other = set()
        for entry in plan.document.expanded():
            gradient, shard = local_shard(ours, entry.name, gradient=True), local_shard(ours, entry.name)
            layout, whole = plan.document.layouts[entry.layout], dense.get_parameter(entry.name).grad
            assert shard is not None and gradient is not None and whole is not None
            if layout.dim is not None:
                view = whole.view(layout.shape)
                runs = [view.narrow(layout.dim, start, stop - start) for start, stop in layout.intervals[rank]]
                whole = torch.cat(runs, layout.dim).view(gradient.shape)
            errors.append((gradient - whole).abs().max())
            if not torch.equal(shard.flatten().float(), shards[entry.name].flatten()):
                other.add(entry.name)
        found.append((case, float(max(errors)), other))
        engine.destroy()
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_the_shards_are_deepspeeds_and_the_numbers_the_dense_models(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cases = [*CASES, PLANTED]
    for number, case in enumerate(cases):
        model = Decoder(**CASES[case][0])
        fill(model)
        specs = [ROW, QKV, GATE_UP] if number == len(CASES) else CASES[case][1]
        options = {"tp_size": 2} if specs is None else {"deepspeed": parse_section(section_of(specs))}
        plan = compile_plan(model, **options)
        tensors = {entry.name: model.get_parameter(entry.name).data for entry in plan.expanded()}
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(plan.model.config))
        (tmp_path / f"{number}.json").write_text(plan.to_json())
    for found in launch(run_both, 2, tmp_path, cases, timeout=260):
        *right, (case, error, other) = found
        assert case == PLANTED and error > 1e-6 and "layers.0.self_attn.q_proj.weight" in other
        for case, error, other in right:
            assert error < 1e-10, f"{case}: off by {error}"
            assert not other, f"{case}: {other} are not sharded as by DeepSpeed"


# what is whole, and what is told


def test_a_catch_all_at_the_end_leaves_the_rest_whole_and_biases_with_their_weights() -> None:
    plan = planned("catch-all at the end")
    assert not plan.notes and not rest_of(plan)
    styles = {entry.name: entry.style for entry in plan.parameters}
    assert styles["embed_tokens.weight"] == styles["lm_head.weight"] == "replicated"
    assert styles["layers.{0..1}.self_attn.q_proj.bias"] == "column"
    assert styles["layers.{0..1}.self_attn.o_proj.bias"] == "replicated"
    strict = planned("catch-all at the end", strict=True)
    assert strict == plan, "every weight is named"


def test_what_no_rule_names_is_counted_in_bytes() -> None:
    plan = planned("tutorial")
    assert rest_of(plan) == {"embed_tokens", "lm_head"}
    total = sum(parameter.numel() * 4 for parameter in Decoder().parameters())
    held = 2 * VOCAB * WIDTH * 4
    (note,) = plan.notes
    assert note.startswith(f"2 parameters, {held} bytes ({100 * held / total:.1f} % of the model), stay replicated")
    assert "embed_tokens.weight, lm_head.weight" in note


@pytest.mark.parametrize(("options", "strict_mode"), [({"strict": True}, False), ({}, True)])
def test_strict_makes_what_no_rule_names_an_error(options: dict[str, Any], strict_mode: bool) -> None:
    section = parse_section(section_of(CASES["tutorial"][1], strict_mode=strict_mode))
    with pytest.raises(CompileError) as caught:
        compile_plan(Decoder(), deepspeed=section, **options)
    assert {(fault.code, fault.where) for fault in caught.value.faults} == {
        ("undecided-weight", "embed_tokens.weight"),
        ("undecided-weight", "lm_head.weight"),
    }
    section = parse_section(section_of([*CASES["tutorial"][1], REST], strict_mode=strict_mode))
    assert not rest_of(compile_plan(Decoder(), deepspeed=section, **options))


def test_the_same_rules_as_a_spec_file_are_held_to_all_of_it() -> None:
    """Our spec files stay strict: what is not named, what matches nothing, and rules that disagree."""
    for case, expected in (
        ("tutorial", {"undecided-weight"}),
        ("patterns of another model", {"undecided-weight", "pattern-without-match"}),
        ("the first match counts", {"undecided-weight", "rules-disagree"}),
    ):
        specs = CASES[case][1]
        with pytest.raises(CompileError) as caught:
            compile_plan(Decoder(), tp_size=2, specs=[SpecFile.from_dict({"layer_specs": specs})])
        assert {fault.code for fault in caught.value.faults} == expected
    other = SpecFile.from_dict({"layer_specs": [rule(r"lm_head\.weight$", kind="skip")]})
    with pytest.raises(CompileError, match="no rule decides a weight"):
        compile_plan(Decoder(), specs=[other], deepspeed=parse_section(section_of(CASES["tutorial"][1])))


def test_a_pattern_that_matches_nothing_is_noted() -> None:
    notes = planned("patterns of another model").notes
    assert notes[0].startswith(r"ds-config #5: the pattern .*\.experts\.\d+\.w1\.weight$ matches no parameter")
    with pytest.raises(CompileError, match="a pattern matches no parameter"):
        planned("patterns of another model", strict=True)


def test_a_rule_that_decides_nothing_is_noted() -> None:
    notes = planned("the first match counts").notes
    assert any(note.startswith("ds-config #6 (column) decides nothing") for note in notes)
    assert not any("decides nothing" in note for note in planned("catch-all at the end").notes)


def test_use_default_specs_without_defaults_leaves_the_rest_whole_too() -> None:
    """DeepSpeed looks at `use_default_specs` only where there is a `preset_model`."""
    section = {"autotp_size": 2, "partition_config": {"layer_specs": CASES["tutorial"][1]}}
    assert rest_of(compile_plan(Decoder(), deepspeed=parse_section(section))) == {"embed_tokens", "lm_head"}


def test_gather_output_where_deepspeed_does_not_look_at_it_is_noted() -> None:
    specs = [{**ROW, "gather_output": True}, QKV, GATE_UP, Q_NORM]
    plan = compile_plan(Decoder(), deepspeed=parse_section(section_of(specs)))
    assert "gather_output of ds-config #1 is not applied" in plan.notes[0]
    assert plan.parameters == planned("tutorial").parameters


# what DeepSpeed computes wrongly


@pytest.mark.parametrize(
    ("options", "specs", "code"),
    [
        pytest.param({}, [ROW], "row-without-column", id="rows whose input is whole"),
        pytest.param({}, [QKV, GATE_UP], "unconsumed-column", id="columns whose output nothing takes"),
        pytest.param(
            {}, [*CASES["tutorial"][1], rule("lm_head.*")], "unconsumed-column", id="a head that is not gathered"
        ),
        pytest.param({}, [*CASES["tutorial"][1], rule("embed.*")], "unconsumed-column", id="an embedding's width"),
        pytest.param({}, [*CASES["tutorial"][1], rule("embed.*", kind="row")], "row-without-column", id="its rows"),
        pytest.param(
            {}, [{**QKV, "grad_allreduce": True}, ROW, GATE_UP], "rule-contradicts-itself", id="summed shards"
        ),
        pytest.param(
            {"fused": True},
            [rule(r".*\.qkv_proj\.weight$", shape=[3, -1], partition_dim=0), ROW, GATE_UP],
            "unequal-sub-parameters",
            id="thirds of unequal parts",
        ),
    ],
)
def test_what_deepspeed_computes_wrongly_is_refused(options: Any, specs: list[dict[str, Any]], code: str) -> None:
    with pytest.raises(AutoTPError) as caught:
        compile_plan(Decoder(**options), deepspeed=parse_section(section_of(specs)))
    assert code in {fault.code for fault in caught.value.faults}


# the command line


def test_the_command_line_tells_on_stderr_and_strict_refuses(tmp_path: Path) -> None:
    folder, config, output = write_llama(tmp_path / "llama"), tmp_path / "ds.json", tmp_path / "plan.json"
    mlp = [rule(r".*\.(gate|up)_proj\.weight$"), rule(r".*\.down_proj\.weight$", kind="row")]
    config.write_text(json.dumps({"tensor_parallel": section_of(mlp)}))
    command = ["compile", "--model", str(folder), "--ds-config", str(config), "-o", str(output)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0 and "stay replicated because no rule names them" in done.stderr
    assert "stay replicated because no rule names them" in " ".join(Plan.read(output).notes)
    styles = {entry.name.split(".")[-2]: entry.style for entry in Plan.read(output).parameters}
    assert styles["q_proj"] == "replicated" and styles["up_proj"] == "column" and styles["embed_tokens"] == "vocab"
    output.unlink()
    done = CliRunner().invoke(main, [*command, "--strict"])
    assert done.exit_code == 2 and "no rule decides a weight" in done.stderr and not output.exists()
