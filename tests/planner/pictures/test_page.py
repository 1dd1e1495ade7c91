"""The page and the picture of a layer: what they say, that names of strangers stay text, and that they are bounded."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from autotp_plan.planner.estimate.from_plan import estimate_from_plan
from autotp_plan.planner.pictures.estimate_file import EstimateFile, read_estimate
from autotp_plan.planner.pictures.facts import picture
from autotp_plan.planner.pictures.layer_svg import layer_svg
from autotp_plan.planner.pictures.model_part import title
from autotp_plan.planner.pictures.page import page
from autotp_plan.schemas.errors import DocumentError, MismatchError
from autotp_plan.schemas.estimate.settings import Settings
from autotp_plan.schemas.plan.document import Plan, PlannedModule
from autotp_plan.schemas.plan.stamp import Stamp
from tests.helpers.paths import PLANS
from tests.planner.pictures.plans import HOSTILE, plan

STAMP = Stamp(
    plan="sha256:0",
    versions={"torch": "2.13.0"},
    attention=("eager", "sdpa"),
    float64_error=2.5e-15,
    engine_error=3e-7,
    seal="sha256:0",
)


class Parsed(HTMLParser):
    """The elements, attributes and text of a page; every element that is opened must be closed."""

    void = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"] and self.open[-1:] != ["script"]:
            self.text.append(data)


def said(text: str) -> str:
    """The text of a page, as one reads it."""
    return re.sub(r"\s+", " ", " ".join(Parsed(text).text))


def read(name: str) -> Plan:
    return Plan.read(PLANS / f"{name}.json")


def test_layers_that_differ_are_drawn_apart_from_top_to_bottom() -> None:
    titles = {name: [title(section) for section in picture(read(name)).sections] for name in (
        "llama_3_1_8b/tp4", "deepseek_v3/tp8", "nemotron_h_8b/tp4",
    )}  # fmt: skip
    assert titles["llama_3_1_8b/tp4"] == [
        "model.embed_tokens.weight",
        "Layers 0 to 31",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert titles["deepseek_v3/tp8"][1:3] == ["Layers 0 to 2", "Layers 3 to 60"]
    assert titles["nemotron_h_8b/tp4"][1:4] == [
        "Layers 0, 2, 4, 6 and 20 more",
        "Layers 1, 3, 5, 8 and 20 more",
        "Layers 7, 18, 29, 40",
    ]


def test_every_entry_of_every_plan_is_drawn() -> None:
    for path in sorted(PLANS.glob("*/tp*.json")):
        one = Plan.read(path)
        drawn = picture(one)
        names = [*(entry.name for entry in one.parameters), *(tie.name for tie in one.tied)]
        assert {weight.name for weight in drawn.weights()} == set(names), path
        assert drawn.not_drawn == 0


def test_the_flow_through_a_layer_has_its_collectives() -> None:
    layer = picture(read("llama_3_1_8b/tp4")).sections[1]
    blocks = {block.name: block for block in layer.blocks if block.name}
    assert list(blocks) == ["self_attn", "mlp"]
    for block in blocks.values():
        assert [stage.style for stage in block.stages] == ["column", "row"]
        assert [(one.what, one.backward) for one in block.before] == [("all-reduce", True)]
        assert [(one.what, one.backward) for one in block.after] == [("all-reduce", False)]
    names = [weight.label for weight in blocks["self_attn"].stages[0].weights]
    assert names == [f"self_attn.{one}_proj.weight" for one in "qkv"]
    moe = {block.name: block for block in picture(read("deepseek_v3/tp8")).sections[2].blocks}
    assert [one.why for one in moe["mlp.experts"].after] == ["sums the partial outputs"]
    assert {one.why for one in moe["mlp.experts"].before} == {
        "of the gradient of hidden_states",
        "of the gradient of top_k_weights",
    }


def test_a_tied_head_is_drawn_as_it_runs() -> None:
    head = picture(read("qwen2_5_0_5b/tp2")).sections[-1].blocks[0]
    (weight,) = head.stages[0].weights
    assert (weight.name, weight.style, weight.tied_to) == ("lm_head.weight", "column", "model.embed_tokens.weight")
    assert [one.what for one in head.after] == ["all-gather"]


def test_a_bias_stands_with_its_weight() -> None:
    attention = next(
        block for block in picture(read("gpt_oss_20b/tp4")).sections[1].blocks if block.name == "self_attn"
    )
    assert [stage.style for stage in attention.stages] == ["column", "shard", "row"]
    row = [(weight.label, weight.style) for weight in attention.stages[2].weights]
    assert row == [("self_attn.o_proj.weight", "row"), ("self_attn.o_proj.bias", "replicated")]


def test_what_a_module_exchanges_is_said_of_the_layers_that_it_is_in() -> None:
    norms = {weight.label: weight.notes for weight in picture(read("minimax_m2_5/tp4")).weights()}
    assert norms["self_attn.q_norm.weight"] == ("its mean all-reduced",)
    latent = {weight.label: weight.notes for weight in picture(read("deepseek_v3/tp8")).weights()}
    assert latent["self_attn.kv_a_proj_with_mqa.weight"] == ("gradient of its output [512, 576) all-reduced",)
    some = PlannedModule(module="layers.{2..3}.mlp.up", mean_over_ranks=True)
    one = dataclasses.replace(plan(("layers.{0..3}.mlp.up.weight",)), modules=(some,))
    assert [section.numbers for section in picture(one).sections] == [(0, 1), (2, 3)], "layers that differ in this"


def test_a_plan_on_one_rank_has_no_collectives() -> None:
    one = plan(("model.layers.{0..3}.mlp.up_proj.weight",), tp_size=1)
    assert not [block for section in picture(one).sections for block in section.blocks if block.before or block.after]


def test_the_page_says_bytes_rules_proof_and_what_is_replicated() -> None:
    text = said(page(read("qwen2_5_vl_7b/tp4")))
    for words in (
        "4.81 GiB",
        "3.78 GiB of copies over all ranks",
        "Not verified",
        "preset qwen2_5_vl #1",
        "model.visual",
    ):
        assert words in text
    assert "\u00d7" in text and "Note: qwen2_5_vl" in text
    assert "Outside of layers model.visual" in text
    stamped = dataclasses.replace(read("llama_3_1_8b/tp4"), verified=STAMP)
    text = said(page(stamped))
    assert "2.5e-15" in text and "3.0e-07" in text and "torch 2.13.0" in text and "Not verified" not in text
    old = dataclasses.replace(stamped, verified=dataclasses.replace(STAMP, seal=None))
    assert "nothing binds it to a proof" in said(page(old))


@pytest.mark.parametrize("name", ["llama_3_1_8b/tp4", "bloom_176b/tp16"])
def test_the_page_needs_nothing_else(name: str) -> None:
    text = page(read(name))
    parsed = Parsed(text)
    assert not {"link", "img", "iframe", "object", "base", "image", "use"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"(?i)https?:|//[a-z]+\.|@import|src=|href=|url\((?!#)", text.replace("// Both", ""))
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    (policy,) = (found["content"] for tag, found in parsed.tags if found.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'sha256-")
    assert not [found for _, found in parsed.tags if any(key.startswith("on") or key == "style" for key in found)]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_names_of_strangers_stay_text(number: int) -> None:
    name = HOSTILE[number]
    names = (
        name,
        f"model.layers.0.mlp.{name}.weight",
        f"{name}.layers.1.mlp.up.weight",
        f"model.layers.0.{name}.a.weight",
    )
    hostile = plan(tuple(sorted(set(names))), architecture=name, rule=name)
    hostile = dataclasses.replace(
        hostile,
        notes=(name,),
        verified=dataclasses.replace(STAMP, versions={name: name}, attention=(name,)),
        modules=(PlannedModule(module=f"model.layers.0.{name}"),),
    )
    plain = Parsed(
        page(plan(("w", "model.layers.0.mlp.x.weight", "y.layers.1.mlp.up.weight", "model.layers.0.z.a.weight")))
    )
    for text in (page(hostile), layer_svg(hostile)):
        parsed = Parsed(text)
        assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in plain.tags} | {"circle", "tspan", "text"}
        assert [tag for tag, _ in parsed.tags].count("script") == (1 if text.startswith("<!DOCTYPE") else 0)
        assert not [key for _, found in parsed.tags for key in found if key.startswith("on") or key == "src"]
        assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ufffe]", text)
    ElementTree.fromstring(layer_svg(hostile))


def test_markup_that_is_not_escaped_is_caught() -> None:
    broken = page(plan(("w",))).replace("<tbody>", '<tbody><br onclick="1"/>', 1)
    assert [key for _, found in Parsed(broken).tags for key in found if key.startswith("on")] == ["onclick"]


@pytest.mark.parametrize(
    "name", ["deepseek_v3/tp16", "llama_3_1_405b/tp8", "bloom_176b/tp16", "llama_4_scout_vision/tp8"]
)
def test_pages_of_large_models_are_small_and_quick(name: str) -> None:
    one = read(name)
    start = time.process_time()
    text = page(one)
    assert time.process_time() - start < 2
    assert len(text.encode()) < 300_000


def test_very_much_of_everything_is_bounded_and_said() -> None:
    many = plan(tuple(f"w{'x' * 300}{number}" for number in range(1500)))
    text = page(many)
    assert len(text.encode()) < 1_000_000
    assert "1,260 further entries are not drawn" in said(text)
    assert "The first 1,000 of 1,500 entries" in said(text)
    kinds = plan(tuple(f"layers.{number}.mlp.w{number}.weight" for number in range(500)))
    text = page(kinds)
    assert len(text.encode()) < 1_000_000 and "460 further entries are not drawn" in said(text)
    ranks = plan(tuple(f"w{number}" for number in range(20)), tp_size=4096)
    text = page(ranks)
    assert len(text.encode()) < 1_000_000 and "ranks 0 to 63" in said(text)
    rules = dataclasses.replace(
        many, parameters=tuple(dataclasses.replace(entry, rule=type(entry.rule).from_value(f"spec {at} #1"))
                               for at, entry in enumerate(many.parameters)), notes=("n" * 10_000,) * 100,
    )  # fmt: skip
    text = page(rules)
    assert len(text.encode()) < 1_000_000 and "and 1,440 rules that decided less" in said(text)


def test_the_picture_of_a_layer_is_a_file_of_its_own() -> None:
    for path in sorted(PLANS.glob("*/tp4.json")):
        text = layer_svg(Plan.read(path))
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(text) < 200_000
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        for one in root:
            x, y = float(one.get("x", 0)), float(one.get("y", 0))
            assert 0 <= x <= width and 0 <= y <= height, (path, one.attrib)
            if one.get("class") == "weight":
                assert x + float(one.attrib["width"]) <= width and y + float(one.attrib["height"]) <= height
    assert "Layers 0 to 31 of LlamaForCausalLM at TP=4" in layer_svg(read("llama_3_1_8b/tp4"))
    assert "Layers 0 to 27 of Qwen2_5_VL" in layer_svg(read("qwen2_5_vl_7b/tp4")), "and not the smaller vision tower"
    assert "Layers 3 to 60 of DeepseekV3" in layer_svg(read("deepseek_v3/tp8"))


def estimate(one: Plan, **changes: Any) -> dict[str, Any]:
    """An estimate of a plan as `autotp-plan estimate --format json` writes it."""
    rank = {
        "tp_ranks": [0, 1, 2, 3],
        "peak": 60 * 2**30,
        "when": "backward, gradient 12 of 291",
        "at_peak": [
            {"what": "weights", "bytes": 4 * 2**30},
            {"what": "optimizer states", "bytes": 16 * 2**30},
            {"what": "activations", "bytes": 40 * 2**30},
        ],
        "phases": [{"what": "forward", "bytes": 50 * 2**30}],
        "host": [{"what": "master weights", "bytes": 7 * 2**30}],
        "traffic": [{"operation": "all-reduce", "group": "tensor", "count": 129, "bytes": 2**30}],
        "forward_operations": 10**15,
        "backward_operations": 2 * 10**15,
    }
    return {
        "model": "llama",
        "plan": one.fingerprint,
        "settings": {"tp_size": 4, "dp_size": 2, "offload": None, "activation_checkpointing": False},
        "measured": False,
        "missing": ["temporary"],
        "ranks": [rank],
        **changes,
    }


def given(path: Path, one: Plan, **changes: Any) -> EstimateFile:
    (path / "estimate.json").write_text(json.dumps(estimate(one, **changes)))
    return read_estimate(path / "estimate.json", one.fingerprint)


def test_an_estimate_is_drawn(tmp_path: Path) -> None:
    one = read("llama_3_1_8b/tp4")
    text = page(one, given(tmp_path, one))
    words = said(text)
    parts = (
        *(
            "ranks 0 to 3",
            "60.00 GiB",
            "optimizer states",
            "66.7%",
            "backward, gradient 12 of 291",
            "129",
            "3e+15",
            "50.00 GiB",
            "7.00 GiB",
            "over tensor-parallel ranks",
        ),
        *("offload none", "activation checkpointing no", "The model's code was not run", "Not in it: temporary"),
    )
    for part in parts:
        assert part in words
    bars = re.findall(r'<rect class="e(\d)" x="(\d+)" y="0" width="(\d+)" height="1"', text)
    widths = [int(width) for _, _, width in bars]
    assert [int(x) for _, x, _ in bars] == [0, widths[0], widths[0] + widths[1]]
    assert [round(width / widths[0], 2) for width in widths] == [1, 4, 10]
    assert 'class="limit"' not in text


@pytest.mark.parametrize("name", ["llama_3_1_8b/tp4", "falcon_7b/tp4"])
def test_what_the_command_writes_is_read(tmp_path: Path, name: str) -> None:
    one = read(name)
    made = estimate_from_plan(one, Settings(dp_size=2, zero_stage=2, offload="optimizer"))
    (tmp_path / "estimate.json").write_text(json.dumps(made.to_dict()))
    found = read_estimate(tmp_path / "estimate.json", one.fingerprint)
    assert found.ranks == made.ranks and found.missing == made.missing and found.measured == made.measured
    assert ("dp size", "2") in found.settings and found.memory is None
    assert "in the memory of the host" in said(page(one, found))


@pytest.mark.parametrize(
    ("memory", "verdict"),
    [(80 * 2**30, "It fits, with 20.00 GiB left"), (40 * 2**30, "It does not fit: 20.00 GiB too much")],
)
def test_the_memory_of_a_device_is_a_line(tmp_path: Path, memory: int, verdict: str) -> None:
    one = read("llama_3_1_8b/tp4")
    text = page(one, given(tmp_path, one, memory={"bytes": memory, "margin": 0}))
    assert verdict in said(text) and 'class="limit"' in text


def test_an_estimate_that_is_none_or_of_another_plan_is_refused(tmp_path: Path) -> None:
    one = read("llama_3_1_8b/tp4")
    rank = estimate(one)["ranks"][0]
    with pytest.raises(MismatchError, match="of another plan"):
        given(tmp_path, one, plan=read("llama_3_1_8b/tp2").fingerprint)
    with pytest.raises(DocumentError, match="the parts of a peak are not its bytes"):
        given(tmp_path, one, ranks=[{**rank, "peak": 1}])
    changed: tuple[dict[str, Any], ...] = (
        *({"peak": -1}, {"peak": "much"}, {"peak": 10**30}, {"tp_ranks": []}, {"tp_ranks": None}),
        *({"at_peak": [{"what": 3, "bytes": 1}]}, {"at_peak": [{"what": "weights"}]}, {"when": []}),
    )
    for wrong in (*({**rank, **one_change} for one_change in changed), []):
        with pytest.raises(DocumentError):
            given(tmp_path, one, ranks=[wrong])
    tops: tuple[dict[str, Any], ...] = (
        {"ranks": []},
        {"settings": []},
        {"measured": "yes"},
        {"memory": {"bytes": 0}},
    )
    for changes in tops:
        with pytest.raises(DocumentError):
            given(tmp_path, one, **changes)


def test_texts_of_an_estimate_stay_text(tmp_path: Path) -> None:
    one = read("llama_3_1_8b/tp4")
    rank = estimate(one)["ranks"][0]
    for name in HOSTILE:
        rank = {**rank, "when": name, "at_peak": [{"what": name, "bytes": rank["peak"]}],
                "phases": [{"what": "forward", "bytes": 50 * 2**30}],
        "host": [{"what": "master weights", "bytes": 7 * 2**30}],
        "traffic": [{"operation": name, "group": name, "count": 1, "bytes": 1}]}  # fmt: skip
        text = page(one, given(tmp_path, one, ranks=[rank], missing=[name], settings={name: name}))
        parsed = Parsed(text)
        assert [tag for tag, _ in parsed.tags].count("script") == 1 and "img" not in {tag for tag, _ in parsed.tags}
        assert len(text) < 70_000
