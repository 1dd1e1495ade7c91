"""A plan that has every kind of entry there is, and plans that were changed and bear the right fingerprint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from autotp_plan.schemas.errors import DocumentError
from autotp_plan.schemas.plan.document import Plan

Document = dict[str, Any]
_UNKNOWN = "sha256:" + "0" * 64

EVERYTHING: Document = {
    "format": "autotp-plan",
    "version": "1.0",
    "model": {
        "model_type": "tiny",
        "architecture": "TinyForCausalLM",
        "config": {
            "architectures": ["TinyForCausalLM"], "hidden_size": 4, "rope_scaling": {"factor": 2.0, "type": "linear"},
            "layer_types": ["full", "sliding", "sliding", "full"], "use_bias": False, "window": None,
        },
        "inventory": "sha256:" + "1" * 64,
        "repository": {"name": "org/tiny", "commit": "abc", "folder": "base"},
    },
    "tp_size": 2,
    "layouts": {
        "rows": {"shape": [8, 4], "dim": 0, "sub_parameters": [[8, 2]], "intervals": [[[0, 4]], [[4, 8]]]},
        "columns": {"shape": [4, 8], "dim": 1, "sub_parameters": [[8, 2]], "intervals": [[[0, 4]], [[4, 8]]]},
        "fused": {
            "shape": [8, 4], "dim": 0, "sub_parameters": [[4, 2], [4, 2]],
            "intervals": [[[0, 2], [4, 6]], [[2, 4], [6, 8]]],
        },
        "view": {"shape": [2, 4, 4], "dim": 1, "sub_parameters": [[4, 1]], "intervals": [[[0, 2]], [[2, 4]]]},
        "experts": {"shape": [3, 8, 4], "dim": 1, "sub_parameters": [[8, 1]], "intervals": [[[0, 4]], [[4, 8]]]},
        "same": {"shape": [4]},
        "table": {"shape": [2, 4]},
    },
    "parameters": [
        {"name": "lm_head.weight", "layout": "rows", "dtype": "BF16", "style": "column", "rule": "spec tiny #4",
         "gather_output": True},
        {"name": "model.embed.weight", "layout": "rows", "dtype": "BF16", "style": "vocab",
         "rule": "preset llama vocabulary #1"},
        {"name": "model.layers.{0..3}.q.weight", "layout": "rows", "dtype": "BF16", "style": "column",
         "rule": "spec tiny #1"},
        {"name": "model.layers.{0..3}.k.weight", "layout": "view", "shape": [8, 4], "dtype": "BF16", "style": "column",
         "rule": "spec tiny #1", "source": "layers.{0..3}.key"},
        {"name": "model.layers.{0..3}.up.weight", "layout": "fused", "dtype": "BF16", "style": "column",
         "rule": "spec tiny #2", "sources": {"names": ["layers.{0..3}.gate", "layers.{0..3}.up"]}},
        {"name": "model.layers.{0..3}.o.weight", "layout": "columns", "dtype": "BF16", "style": "row",
         "rule": "spec tiny #3", "transposed": True},
        {"name": "model.layers.{0,2}.down.weight", "layout": "columns", "dtype": "F32", "style": "row",
         "rule": "spec tiny #3", "split_input": True},
        {"name": "model.layers.{1,3}.experts.up", "layout": "experts", "dtype": "BF16", "style": "shard",
         "rule": "spec tiny #5", "sources": {"names": ["layers.{1,3}.experts.*.up"], "count": 3}},
        {"name": "model.layers.{0..3}.norm.weight", "layout": "same", "dtype": "F32", "style": "replicated",
         "rule": "default for 1-D", "partial_gradient": True},
        {"name": "model.layers.{0..3}.o.bias", "layout": "same", "dtype": "F32", "style": "replicated",
         "rule": "default for 1-D", "partial_gradient": True, "add_once": True},
        {"name": "model.table.weight", "layout": "table", "dtype": "F32", "style": "replicated",
         "rule": "spec tiny #6"},
    ],
    "module_attributes": [
        {"module": "model.layers.{0..3}", "attribute": "num_heads", "values": [2, 2]},
        {"module": "model.layers.{0..3}", "attribute": "config.first_head", "values": [0, 2]},
    ],
    "modules": [
        {"module": "model.layers.{1,3}.experts", "inputs": {"hidden": {"operation": "copy"}},
         "output": {"operation": "reduce"}, "mean_over_ranks": True, "buffers": {"scale": "up"}},
        {"module": "model.layers.{0..3}.attention",
         "inputs": {
             "alibi": {"operation": "split", "dim": 1, "size": 4, "intervals": [[[0, 2]], [[2, 4]]]},
             "states": {"operation": "copy", "interval": [1, 4]},
         }},
    ],
    "tied": [
        {"name": "model.head.weight", "to": "model.embed.weight", "style": "column", "rule": "spec tiny #7",
         "gather_output": True},
    ],
    "ignored": ["model.layers.{0..3}.inv_freq", "visual.**"],
    "dequantize": {"method": "fp8", "dtype": "BF16", "block": [128, 128]},
    "runtime": {"dtype": "bfloat16", "tp_overlap_comm": True},
    "notes": ["The bias is added once.", "Weights lie there. Not read: other.safetensors."],
    "rules": {
        "specs": [{"layer_specs": [
            {"patterns": ["q"], "partition_type": "column"}, {"patterns": ["up"], "partition_type": "column"},
            {"patterns": ["o", "down"], "partition_type": "row"},
        ]}],
        "deepspeed": {"partition_config": {"use_default_specs": False}},
        "strict": True,
    },
    "verified": {
        "plan": _UNKNOWN, "versions": {"torch": "2.13.0", "transformers": "5.23.0"}, "attention": ["eager", "sdpa"],
        "float64_error": 2e-15, "engine_error": 3e-7, "twin": "sha256:" + "2" * 64, "seal": _UNKNOWN,
    },
}  # fmt: skip
"""Of two ranks."""
WITH_STREAM: Document = {
    **EVERYTHING,
    "sequence_parallel": {
        "layers": ["model.layers.{0..3}"],
        "gather": [
            *(f"model.layers.{{0..3}}.{name}" for name in ("q", "k", "up")),
            "model.layers.{1,3}.experts",
        ],
        "scatter": ["model.layers.{0..3}.o", "model.layers.{0,2}.down", "model.layers.{1,3}.experts"],
        "end": "model.layers.3",
    },
}
"""The same, and its stream is sharded along the sequence."""


def plan_of(document: Document) -> Plan:
    """The plan of a document whose fingerprint and seal are those of a document before it was changed.

    Raises:
        DocumentError: anything else is wrong with it.
    """
    data = copy.deepcopy(document)
    data.setdefault("fingerprint", _UNKNOWN)
    for _ in range(2):
        try:
            return Plan.from_dict(data)
        except DocumentError as error:
            faults = {fault.code: fault for fault in error.faults}
            if faults.keys() == {"plan-fingerprint"}:
                data["fingerprint"] = faults["plan-fingerprint"].expected
                stamp = data.get("verified", {})
                if "plan" in stamp:
                    stamp["plan"] = data["fingerprint"]
            elif faults.keys() == {"stamp-changed"}:
                stamp["seal"] = faults["stamp-changed"].expected
            else:
                raise
    return Plan.from_dict(data)


def changed(change: Callable[[Document], object], document: Document = EVERYTHING) -> Plan:
    """The plan of a document after a change to a copy of it."""
    data = copy.deepcopy(document)
    change(data)
    return plan_of(data)
