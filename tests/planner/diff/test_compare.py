"""Every kind of change, planted in a plan: it is said, in the words of `show`, and nothing else is."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from autotp_plan.planner.diff import differences as differences_module
from autotp_plan.planner.diff import text
from autotp_plan.planner.diff.compare import compare_plans
from autotp_plan.planner.diff.differences import Differences
from autotp_plan.planner.diff.text import groups, lines
from autotp_plan.schemas.errors import OptionError
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.paths import PLANS
from tests.planner.diff.documents import EVERYTHING, Document, changed, plan_of

LAYERS = "model.layers.{0..3}."


def said(differences: Differences) -> list[str]:
    """The table and the sentences, a line each: `name | what: old -> new`."""
    table = []
    for prefix, rows in groups(differences):
        name = ""
        for row in rows:
            name = row.name or name
            table.append(f"{prefix}{name} | {row.what}: {row.old} -> {row.new}")
    signs = {"added": "+ ", "removed": "- ", "changed": ""}
    return table + [signs[line.kind] + line.text for line in lines(differences)[:-1]]


def entry(name: str, document: Document) -> Document:
    found: Document = next(one for one in document["parameters"] if one["name"] == name)
    return found


def set_in(*path: Any) -> Callable[[Document], None]:
    """A change that sets the place of a path, whose last item is the value; a string finds a parameter by its name."""

    def change(document: Document) -> None:
        *keys, last, value = path
        place: Any = document
        for key in keys:
            place = entry(key, document) if place is document["parameters"] else place[key]
        place[last] = value

    return change


def removed(*path: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


SAME = "what each rank holds and computes is the same"
CHANGES: dict[str, tuple[Callable[[Document], Any], list[str]]] = {
    "version": (set_in("version", "1.1"), ["version: 1.0 -> 1.1"]),
    "model type": (set_in("model", "model_type", "other"), ["model_type | : tiny -> other"]),
    "architecture": (set_in("model", "architecture", None), ["architecture | : TinyForCausalLM -> -"]),
    "inventory": (
        set_in("model", "inventory", "sha256:" + "9" * 64),
        [f"inventory | : sha256:{'1' * 64} -> sha256:{'9' * 64}"],
    ),
    "a value of the config": (
        set_in("model", "config", "rope_scaling", "factor", 4.0), ["config.rope_scaling.factor | : 2.0 -> 4.0"],
    ),
    "a number of another kind": (
        set_in("model", "config", "rope_scaling", "factor", 2), ["config.rope_scaling.factor | : 2.0 -> 2"],
    ),
    "a new key": (set_in("model", "config", "window", 8), ["config.window | : null -> 8"]),
    "a key that is gone": (removed("model", "config", "window"), ["config.window | : null -> -"]),
    "types of layers": (
        set_in("model", "config", "layer_types", ["full", "full", "full", "full"]),
        ['config.layer_types.{1..2} | : "sliding" -> "full"'],
    ),
    "no config": (
        set_in("model", "config", None),
        ['config | : {"architectures": ["TinyForCausalLM"], "hidden_size": 4, "layer_types": ["full", "sliding", '
         '"sliding", "full"], "rope_scaling": {"factor": 2.0, "type": "linear"}, "use_bias": false, '
         '"window": null} -> -'],
    ),
    "dtype": (
        set_in("parameters", LAYERS + "q.weight", "dtype", "F32"),
        [LAYERS + "q.weight | dtype: BF16 -> F32", LAYERS + "q.weight | per rank: 128 B -> 256 B",
         "all parameters: 1.91 KiB -> 2.16 KiB", "each rank holds: 1.03 KiB -> 1.16 KiB"],
    ),
    "rule": (
        set_in("parameters", LAYERS + "q.weight", "rule", "preset llama #1"),
        [LAYERS + "q.weight | rule: spec tiny #1 -> preset llama #1"],
    ),
    "style": (
        set_in("parameters", "model.embed.weight", "style", "column"),
        ["model.embed.weight | style: vocab -> column"],
    ),
    "gathered": (
        set_in("parameters", "lm_head.weight", "gather_output", False),
        ["lm_head.weight | style: column, gathered -> column"],
    ),
    "split input": (
        set_in("parameters", "model.layers.{0,2}.down.weight", "split_input", False),
        ["model.layers.{0,2}.down.weight | style: row, input split -> row"],
    ),
    "added once": (
        set_in("parameters", LAYERS + "o.bias", "add_once", False),
        [LAYERS + "o.bias | style: replicated, added once -> replicated, gradient summed"],
    ),
    "gradient summed": (
        set_in("parameters", LAYERS + "norm.weight", "partial_gradient", False),
        [LAYERS + "norm.weight | style: replicated, gradient summed -> replicated"],
    ),
    "layout": (
        set_in("parameters", LAYERS + "up.weight", "layout", "rows"),
        [LAYERS + "up.weight | each rank holds: 1/2 of each of 2 in dim 0 -> 1/2 of dim 0",
         LAYERS + "up.weight | in units of: 4 by 2, 4 by 2 -> 8 by 2"],
    ),
    "which half": (
        set_in("layouts", "view", "intervals", [[[2, 4]], [[0, 2]]]),
        [LAYERS + "k.weight | each rank holds: 1/2 of dim 1, rank 0: 0..2 -> 1/2 of dim 1, rank 0: 2..4"],
    ),
    "order within a rank": (
        set_in("layouts", "fused", "intervals", [[[0, 2], [4, 6]], [[6, 8], [2, 4]]]),
        [LAYERS + "up.weight | each rank holds: 1/2 of each of 2 in dim 0, rank 1: 2..4, 6..8 -> "
         "1/2 of each of 2 in dim 0, rank 1: 6..8, 2..4"],
    ),
    "units": (
        set_in("layouts", "view", "sub_parameters", [[4, 2]]), [LAYERS + "k.weight | in units of: 4 by 1 -> 4 by 2"],
    ),
    "uneven": (
        set_in("layouts", "experts", "intervals", [[[0, 5]], [[5, 8]]]),
        ["model.layers.{1,3}.experts.up | each rank holds: 1/2 of dim 1 -> 3 to 5 of 8 of dim 1",
         "model.layers.{1,3}.experts.up | per rank: 192 B -> 240 B",
         "each rank holds: 1.03 KiB -> 1008 B to 1.08 KiB"],
    ),
    "on several ranks": (
        set_in("layouts", "experts", "intervals", [[[0, 8]], [[0, 8]]]),
        ["model.layers.{1,3}.experts.up | each rank holds: 1/2 of dim 1 -> 8 of 8 of dim 1, some on 2 ranks",
         "model.layers.{1,3}.experts.up | per rank: 192 B -> 384 B",
         "each rank holds: 1.03 KiB -> 1.22 KiB", "copies over all ranks: 160 B -> 544 B"],
    ),
    "shape": (
        lambda data: [set_in("layouts", "same", "shape", [6])(data)],
        [LAYERS + "norm.weight | shape: 4 -> 6", LAYERS + "norm.weight | per rank: 64 B -> 96 B",
         LAYERS + "o.bias | shape: 4 -> 6", LAYERS + "o.bias | per rank: 64 B -> 96 B",
         "all parameters: 1.91 KiB -> 1.97 KiB", "each rank holds: 1.03 KiB -> 1.09 KiB",
         "replicated on every rank: 160 B -> 224 B", "copies over all ranks: 160 B -> 224 B"],
    ),
    "shape of a view": (
        set_in("parameters", LAYERS + "k.weight", "shape", [2, 16]),
        [LAYERS + "k.weight | shape: 8 x 4 -> 2 x 16"],
    ),
    "view": (
        removed("parameters", 3, "shape"),
        [LAYERS + "k.weight | shape: 8 x 4 -> 2 x 4 x 4", LAYERS + "k.weight | sharded in the view: 2 x 4 x 4 -> -"],
    ),
    "name on disk": (
        set_in("parameters", LAYERS + "k.weight", "source", "layers.{0..3}.k"),
        [LAYERS + "k.weight | on disk: layers.{0..3}.key -> layers.{0..3}.k"],
    ),
    "no other name on disk": (
        removed("parameters", 3, "source"),
        [LAYERS + "k.weight | on disk: layers.{0..3}.key -> model.layers.{0..3}.k.weight"],
    ),
    "layers exchanged on disk": (
        set_in("parameters", LAYERS + "k.weight", "source", "layers.{0,2,1,3}.key"),
        ["model.layers.{1..2}.k.weight | on disk: layers.{1..2}.key -> layers.2.key, layers.1.key"],
    ),
    "order of tensors on disk": (
        set_in("parameters", LAYERS + "up.weight", "sources", "names", ["layers.{0..3}.up", "layers.{0..3}.gate"]),
        [LAYERS + "up.weight | on disk: layers.{0..3}.gate + layers.{0..3}.up -> "
         "layers.{0..3}.up + layers.{0..3}.gate"],
    ),
    "stacked tensors on disk": (
        set_in("parameters", "model.layers.{1,3}.experts.up", "sources", "names", ["layers.{1,3}.experts.*.w"]),
        ["model.layers.{1,3}.experts.up | on disk: layers.{1,3}.experts.*.up, * from 0 to 2 -> "
         "layers.{1,3}.experts.*.w, * from 0 to 2"],
    ),
    "transposed": (
        removed("parameters", 5, "transposed"), [LAYERS + "o.weight | transposed on disk: yes -> -"],
    ),
    "a parameter is gone": (
        removed("parameters", 10),
        ["model.table.weight | removed: 2 x 4, F32, replicated, all, 32 B per rank, spec tiny #6 -> -",
         "all parameters: 1.91 KiB -> 1.88 KiB", "each rank holds: 1.03 KiB -> 1.00 KiB",
         "replicated on every rank: 160 B -> 128 B", "copies over all ranks: 160 B -> 128 B",
         "- computed in full on every rank: model.table"],
    ),
    "a parameter is new": (
        lambda data: data["parameters"].append(
            {"name": LAYERS + "v.weight", "layout": "rows", "dtype": "BF16", "style": "column", "rule": "spec tiny #1",
             "source": "layers.{0..3}.value"}
        ),
        [LAYERS + "v.weight | added: - -> 8 x 4, BF16, column, 1/2 of dim 0, in units of 8 by 2, 128 B per rank, "
         "spec tiny #1, on disk layers.{0..3}.value",
         "all parameters: 1.91 KiB -> 2.16 KiB", "each rank holds: 1.03 KiB -> 1.16 KiB"],
    ),
    "another name": (
        set_in("parameters", "model.table.weight", "name", "model.other"),
        ["model.other | added: - -> 2 x 4, F32, replicated, all, 32 B per rank, spec tiny #6",
         "model.table.weight | removed: 2 x 4, F32, replicated, all, 32 B per rank, spec tiny #6 -> -",
         "- computed in full on every rank: model.table"],
    ),
    "a tie's style": (
        set_in("tied", 0, "gather_output", False), ["model.head.weight | run as: column, gathered -> column"],
    ),
    "a tie's parameter": (
        set_in("tied", 0, "to", "lm_head.weight"), ["model.head.weight | is: model.embed.weight -> lm_head.weight"],
    ),
    "a tie's rule": (
        set_in("tied", 0, "rule", "spec tiny #8"), ["model.head.weight | rule: spec tiny #7 -> spec tiny #8"],
    ),
    "no tie": (
        removed("tied"),
        ["model.head.weight | tie removed: is model.embed.weight, run as column, gathered, spec tiny #7 -> -"],
    ),
    "an attribute": (
        set_in("module_attributes", 0, "values", [3, 3]), [LAYERS + "num_heads | set on each rank: 2 -> 3"],
    ),
    "an attribute of one rank": (
        set_in("module_attributes", 1, "values", [0, 3]),
        [LAYERS + "config.first_head | set on each rank: [0, 2] -> [0, 3]"],
    ),
    "no attribute in a layer": (
        set_in("module_attributes", 0, "module", "model.layers.{0..2}"),
        ["model.layers.3.num_heads | set on each rank: 2 -> -"],
    ),
    "an input": (
        removed("modules", 0, "inputs"),
        ["model.layers.{1,3}.experts | hidden: gradient summed -> -"],
    ),
    "another collective": (
        set_in("modules", 0, "inputs", "hidden", {"operation": "reduce"}),
        ["model.layers.{1,3}.experts | hidden: gradient summed -> summed"],
    ),
    "an output": (
        removed("modules", 0, "output"), ["model.layers.{1,3}.experts | output: summed -> -"],
    ),
    "means": (
        removed("modules", 0, "mean_over_ranks"), ["model.layers.{1,3}.experts | means: over all ranks -> -"],
    ),
    "a buffer": (
        removed("modules", 0, "buffers"), ["model.layers.{1,3}.experts | scale: split as up -> -"],
    ),
    "part of an input": (
        set_in("modules", 1, "inputs", "states", "interval", [0, 4]),
        [LAYERS + "attention | states: gradient of [1, 4] summed -> gradient of [0, 4] summed"],
    ),
    "how an input is split": (
        set_in("modules", 1, "inputs", "alibi", "intervals", [[[2, 4]], [[0, 2]]]),
        [LAYERS + "attention | alibi: split, 1/2 of 4 in dim 1, rank 0: 0..2 -> "
         "split, 1/2 of 4 in dim 1, rank 0: 2..4"],
    ),
    "where an input is split": (
        set_in("modules", 1, "inputs", "alibi", "dim", -1),
        [LAYERS + "attention | alibi: split, 1/2 of 4 in dim 1 -> split, 1/2 of 4 in dim -1"],
    ),
    "a module in fewer layers": (
        set_in("modules", 0, "module", "model.layers.1.experts"),
        ["model.layers.3.experts | collectives removed: hidden gradient summed, output summed, scale split as up, "
         "means over all ranks -> -"],
    ),
    "ignored": (
        set_in("ignored", 0, "model.layers.{0..1}.inv_freq"), ["model.layers.{2..3}.inv_freq | ignored: yes -> -"],
    ),
    "all ignored below": (removed("ignored", 1), ["visual.** | ignored: yes -> -"]),
    "dequantize": (
        set_in("dequantize", "block", [64, 128]),
        ["- dequantize: fp8 in blocks of 128 x 128, which become BF16",
         "+ dequantize: fp8 in blocks of 64 x 128, which become BF16"],
    ),
    "not quantised": (
        removed("dequantize"), ["dequantize: fp8 in blocks of 128 x 128, which become BF16 -> none"],
    ),
    "runtime dtype": (set_in("runtime", "dtype", "float16"), ["runtime.dtype | : bfloat16 -> float16"]),
    "overlap": (set_in("runtime", "tp_overlap_comm", False), ["runtime.tp_overlap_comm | : true -> -"]),
    "a note": (
        set_in("notes", 0, "Layer 1.5 is added."), ["+ note: Layer 1.5 is added.", "- note: The bias is added once."],
    ),
    "a note on the folder": (
        removed("notes", 1), ["- note: Weights lie there. Not read: other.safetensors."],
    ),
    "a commit": (
        set_in("model", "repository", "commit", "def"),
        ["compiled from: hf://org/tiny@abc/base -> hf://org/tiny@def/base"],
    ),
    "a spec's rule": (
        set_in("rules", "specs", 0, "layer_specs", 1, "partition_type", "skip"),
        ['compiled by.specs.0.layer_specs.1.partition_type: "column" -> "skip"'],
    ),
    "a new rule before others": (
        lambda data: data["rules"]["specs"][0]["layer_specs"].insert(0, {"patterns": ["x"], "partition_type": "skip"}),
        ['compiled by.specs.0.layer_specs.0: none -> {"partition_type": "skip", "patterns": ["x"]}'],
    ),
    "an option of compile": (set_in("rules", "uneven", True), ["compiled by.uneven: none -> true"]),
    "an attribute of another object": (
        set_in("module_attributes", 1, {"module": "model.layers.{0..3}.config", "attribute": "first_head",
                                        "values": [0, 2]}),
        [LAYERS + "config.first_head | set on each rank: [0, 2] -> -",
         LAYERS + "config.first_head | set on each rank: - -> [0, 2]"],
    ),
    "a key with a dot": (
        set_in("model", "config", "rope_scaling", {"factor": 2.0, "type": "linear", "a.b": 1}),
        ["config.rope_scaling.a.b | : - -> 1"],
    ),
    "how exact a stamp is": (
        set_in("verified", "float64_error", 3e-15),
        ["- verified: eager and sdpa attention, errors up to 2.0e-15 (float64) and 3.0e-07 (engine, "
         "float32); torch 2.13.0, transformers 5.23.0",
         "+ verified: eager and sdpa attention, errors up to 3.0e-15 (float64) and 3.0e-07 (engine, "
         "float32); torch 2.13.0, transformers 5.23.0"],
    ),
    "a stamp without a seal": (
        removed("verified", "seal"),
        ["- verified: eager and sdpa attention, errors up to 2.0e-15 (float64) and 3.0e-07 (engine, "
         "float32); torch 2.13.0, transformers 5.23.0",
         "+ a stamp of version 0.1, which nothing binds to a proof, says verified: eager and sdpa attention, "
         "errors up to 2.0e-15 (float64) and 3.0e-07 (engine, float32); torch 2.13.0, transformers 5.23.0"],
    ),
    "a stamp": (
        removed("verified"),
        ["- verified: eager and sdpa attention, errors up to 2.0e-15 (float64) and 3.0e-07 (engine, "
         "float32); torch 2.13.0, transformers 5.23.0", "+ not verified: run `autotp-plan verify`"],
    ),
}  # fmt: skip
RECORDED = {
    "version", "rule", "a tie's rule", "ignored", "all ignored below", "a note", "a note on the folder", "a commit",
    "a spec's rule", "a new rule before others", "an option of compile", "a stamp", "how exact a stamp is",
    "a stamp without a seal",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_said(name: str) -> None:
    change, expected = CHANGES[name]
    differences = compare_plans(plan_of(EVERYTHING), changed(change))
    assert said(differences) == expected
    assert not differences.equal
    assert (lines(differences)[-1].text == SAME) == differences.computes_the_same == (name in RECORDED)
    document = json.loads(json.dumps(differences.to_dict()))
    assert document["equal"] is False
    assert all(one["fields"] or one["of"] in ("note", "computed in full") for one in document["differences"])
    for one in document["differences"]:
        for field in one["fields"]:
            assert field.get("old", "absent") != field.get("new", "absent") or name == "a number of another kind"


def test_a_rule_under_another_number_is_the_same_rule() -> None:
    """A rule put before others changes the number of all that follow: the rule is said, and not each parameter."""

    def insert(data: Document) -> None:
        specs = data["rules"]["specs"][0]["layer_specs"]
        specs.insert(0, {"patterns": ["x"], "partition_type": "skip"})
        for one in data["parameters"]:
            head, _, number = one["rule"].rpartition(" #")
            if head == "spec file":
                one["rule"] = f"{head} #{int(number) + 1}"

    old = json.loads(json.dumps(EVERYTHING).replace("spec tiny #1", "spec file #1").replace("spec tiny", "spec other"))
    differences = compare_plans(plan_of(old), changed(insert, old))
    assert said(differences) == [
        'compiled by.specs.0.layer_specs.0: none -> {"partition_type": "skip", "patterns": ["x"]}',
        "the rules of 8 parameters say the same under other numbers",
    ]
    assert differences.computes_the_same
    moved = [one for one in differences.to_dict()["differences"] if one["of"] == "parameter"]
    assert [(one["name"], one["fields"]) for one in moved] == [
        (LAYERS + f"{name}.weight", [{"field": "rule", "old": "spec file #1", "new": "spec file #2"}]) for name in "kq"
    ]

    def insert_and_change(data: Document) -> None:
        insert(data)
        data["rules"]["specs"][0]["layer_specs"][1]["patterns"] = ["q", "k"]

    shown = said(compare_plans(plan_of(old), changed(insert_and_change, old)))
    assert LAYERS + "k.weight | rule: spec file #1 -> spec file #2" in shown


def test_a_table_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MOST_ROWS", 2)

    def others(data: Document) -> None:
        for one in data["parameters"]:
            one["rule"] = "spec tiny #9"

    differences = compare_plans(plan_of(EVERYTHING), changed(others))
    assert len(said(differences)) == 3
    assert said(differences)[-1] == "not in the table: 9 more names; --format json has all"


def test_a_json_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = compare_plans(plan_of(EVERYTHING), changed(set_in("version", "1.1")))
    assert json.loads("".join(compared.json_pieces())) == compared.to_dict()
    monkeypatch.setattr(differences_module, "MOST_JSON", 5)
    with pytest.raises(OptionError, match="too long to be printed as JSON"):
        compared.json_pieces()


def test_many_names_and_many_ranks() -> None:
    """Layouts of 8,192 ranks are compared once, and not for each of 2,000 names that do not fold."""
    ranks, count = 8192, 2_000
    every = [[[rank, rank + 1]] for rank in range(ranks)]
    layout = {"shape": [ranks], "dim": 0, "sub_parameters": [[ranks, 1]], "intervals": every}
    names = [f"w{number}" for number in range(count)]
    data = {key: EVERYTHING[key] for key in ("format", "version", "model")}
    plans = []
    for intervals in (every, every[::-1]):
        layouts = {"wide": {**layout, "intervals": intervals}}
        parameters = [
            {"name": name, "layout": "wide", "dtype": "F32", "style": "shard", "rule": "spec tiny #1"} for name in names
        ]
        plans.append(plan_of({**data, "tp_size": ranks, "layouts": layouts, "parameters": parameters}))
    started = time.process_time()
    differences = compare_plans(*plans)
    assert len(differences.found) == count
    assert said(differences)[0] == (
        f"w0 | each rank holds: 1/{ranks} of dim 0, rank 0: 0..1 -> 1/{ranks} of dim 0, rank 0: 8191..8192"
    )
    assert time.process_time() - started < 3


def test_the_number_of_ranks() -> None:
    old, new = (Plan.read(PLANS / "llama_3_1_70b" / f"tp{size}.json") for size in (8, 16))
    lines_of = said(compare_plans(old, new))
    assert lines_of[0] == "tp_size | : 8 -> 16"
    layers = "model.layers.{0..79}."
    assert f"{layers}self_attn.q_proj.weight | each rank holds: 1/8 of dim 0 -> 1/16 of dim 0" in lines_of
    held = "each rank holds: 1/8 of dim 0 -> 128 of 1024 of dim 0, some on 2 ranks"
    assert f"{layers}self_attn.k_proj.weight | {held}" in lines_of
    assert "each rank holds: 16.43 GiB -> 8.37 GiB" in lines_of


def test_more_copies_of_the_same_shards() -> None:
    """The words are the same for two ranks and four: the first rank that holds something else is named."""
    four = copy.deepcopy(EVERYTHING)
    four["tp_size"] = 4
    for layout in four["layouts"].values():
        if "intervals" in layout:
            layout["intervals"] *= 2
    for attribute in four["module_attributes"]:
        attribute["values"] *= 2
    four["modules"][1]["inputs"]["alibi"]["intervals"] *= 2
    eight = copy.deepcopy(four)
    eight["layouts"]["view"]["intervals"] = [[[0, 2]], [[0, 2]], [[2, 4]], [[2, 4]]]
    held = "2 of 4 of dim 1, some on 2 ranks, rank 1: "
    expected = [f"{LAYERS}k.weight | each rank holds: {held}2..4 -> {held}0..2"]
    assert said(compare_plans(plan_of(four), plan_of(eight))) == expected


def test_a_dimension_that_grows_keeps_its_parts() -> None:
    """`1/2 of dim 1` before and after: the shape says it, and the JSON has the intervals."""

    def twice(data: Document) -> None:
        data["layouts"]["experts"] = {
            "shape": [3, 16, 4], "dim": 1, "sub_parameters": [[16, 1]], "intervals": [[[0, 8]], [[8, 16]]],
        }  # fmt: skip

    differences = compare_plans(plan_of(EVERYTHING), changed(twice))
    name = "model.layers.{1,3}.experts.up"
    assert said(differences)[:3] == [
        f"{name} | shape: 3 x 8 x 4 -> 3 x 16 x 4",
        f"{name} | in units of: 8 by 1 -> 16 by 1",
        f"{name} | per rank: 192 B -> 384 B",
    ]
    fields = {field["field"]: field for field in differences.to_dict()["differences"][0]["fields"]}
    assert fields["held"]["new"] == {"dim": 1, "size": 16, "intervals": [[[0, 8]], [[8, 16]]]}


def expanded(document: Document) -> Document:
    """The same plan with an entry for every name, other names of layouts, and everything in another order."""
    data = copy.deepcopy(document)
    parameters = []
    for one in data["parameters"]:
        sources = [expand(name) for name in one.get("sources", {"names": [one.get("source", one["name"])]})["names"]]
        for name, *on_disk in zip(expand(one["name"]), *sources):
            single = {**one, "name": name, "layout": f"renamed {one['layout']}", "gather_output": "x"}
            single["gather_output"] = one.get("gather_output", False)
            if "source" in one:
                single["source"] = on_disk[0]
            if "sources" in one:
                single["sources"] = {**one["sources"], "names": on_disk}
            single.setdefault("shape", data["layouts"][one["layout"]]["shape"])
            parameters.append(dict(reversed(single.items())))
    data["parameters"] = parameters[::-1]
    data["layouts"] = {f"renamed {name}": layout for name, layout in data["layouts"].items()}
    data["layouts"]["of no parameter"] = {"shape": [7]}
    for key in ("module_attributes", "modules"):
        data[key] = [{**one, "module": name} for one in reversed(data[key]) for name in expand(one["module"])]
    data["ignored"] = [name for one in reversed(data["ignored"]) for name in expand(one)]
    data["modules"] = [{**one, "inputs": dict(reversed(one["inputs"].items()))} for one in data["modules"]]
    data["model"]["config"] = dict(reversed(data["model"]["config"].items()))
    return dict(reversed(data.items()))


def test_how_a_plan_is_written_is_no_difference() -> None:
    first, other = plan_of(EVERYTHING), plan_of(expanded(EVERYTHING))
    assert first.fingerprint != other.fingerprint
    differences = compare_plans(first, other)
    assert differences.equal, said(differences)
    assert [line.text for line in lines(differences)] == [
        "no difference but in how they are written: the fingerprints are not the same"
    ]
    assert [line.text for line in lines(compare_plans(first, first))] == ["no difference"]


def test_layers_of_an_expanded_plan_are_folded() -> None:
    """One rule of 32 layers is one line, however the plan has written them; and a layer that differs is its own."""
    data = expanded(EVERYTHING)
    for one in data["parameters"]:
        if one["name"].endswith(".q.weight"):
            one["rule"] = "spec tiny #9"
    name = LAYERS + "q.weight"
    assert said(compare_plans(plan_of(EVERYTHING), plan_of(data))) == [f"{name} | rule: spec tiny #1 -> spec tiny #9"]
    next(one for one in data["parameters"] if one["name"] == "model.layers.2.q.weight")["rule"] = "spec tiny #8"
    assert said(compare_plans(plan_of(EVERYTHING), plan_of(data))) == [
        "model.layers.{0..1,3}.q.weight | rule: spec tiny #1 -> spec tiny #9",
        "model.layers.2.q.weight | rule: spec tiny #1 -> spec tiny #8",
    ]


@pytest.mark.parametrize("model", ["bloom_176b", "deepseek_v3", "gemma_3_27b", "gpt_oss_20b", "qwen3_vl_30b_a3b"])
def test_published_plans_are_equal_to_themselves_alone(model: str) -> None:
    first, second, *_ = (Plan.read(path) for path in sorted((PLANS / model).glob("tp*.json")))
    assert compare_plans(first, first).equal
    assert not compare_plans(first, second).computes_the_same
