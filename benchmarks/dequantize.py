"""How fast weights that are quantised are computed while they are read: `python -m benchmarks.dequantize`.

Each format is read from memory (the page cache), 4 MB at a time as `presplit` reads, next to bf16 of as many bytes;
then both are pre-split. The time of the processor that one thread takes for a byte that comes out does not depend on
what else the machine does; the rates of `presplit`, and what they are of that of bf16, do.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autotp_plan.planner.compiler import compile_plan
from autotp_plan.planner.copying.copy_engine import CHUNK_BYTES
from autotp_plan.planner.shards.presplit import presplit
from autotp_plan.schemas.storage.files import ByteRange, Reader
from autotp_plan.schemas.storage.safetensors_header import header_bytes
from autotp_plan.sources.model_folder import open_checkpoint

Arrays = dict[str, tuple[str, Any]]

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4"}


def _compressed(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


INT4 = _compressed(num_bits=4, type="int", symmetric=True, group_size=32)
ROWS = _compressed(num_bits=8, type="float", symmetric=True)
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 16, "vocab_size": 128,
    "num_experts_per_tok": 4, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def _bytes(*shape: int, below: int = 256, least: int = 0) -> Any:
    return np.random.default_rng(0).integers(least, below, shape, dtype=np.uint8)


def bf16(name: str, rows: int, columns: int) -> Arrays:
    return {name: ("BF16", _bytes(rows, columns, 2))}


def fp8(name: str, rows: int, columns: int) -> Arrays:
    scale = np.full((-(-rows // 128), -(-columns // 128)), 0.01, np.float32)
    return {name: ("F8_E4M3", _bytes(rows, columns)), f"{name}_scale_inv": ("F32", scale)}


def fp8_rows(name: str, rows: int, columns: int) -> Arrays:
    return {name: ("F8_E4M3", _bytes(rows, columns)), f"{name}_scale": ("F32", np.full((rows, 1), 0.01, np.float32))}


def int4(name: str, rows: int, columns: int) -> Arrays:
    shape = np.array([rows, columns], np.int32)
    scale = _bytes(rows, columns // 32, 2, below=60, least=58)
    return {
        f"{name}_packed": ("I32", _bytes(rows, columns // 8, 4)),
        f"{name}_scale": ("BF16", scale),
        f"{name}_shape": ("I32", shape),
    }


def llama(make: Callable[[str, int, int], Arrays], layers: int) -> Arrays:
    """A Llama with layers of the size of the 8B model."""
    hidden, inner = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    found: Arrays = {name: ("BF16", _bytes(128, hidden, 2)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for number in range(layers):
        layer = f"model.layers.{number}"
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", 1024, hidden),
            ("self_attn.v_proj", 1024, hidden), ("self_attn.o_proj", hidden, hidden), ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            found |= make(f"{layer}.{name}.weight", rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = ("BF16", _bytes(hidden, 2))
    return {**found, "model.norm.weight": ("BF16", _bytes(hidden, 2))}


def gpt_oss(quantized: bool) -> Arrays:
    """A gpt-oss of one layer with 16 experts of the published size."""
    hidden, experts = 2880, 16
    layer = "model.layers.0"
    found: Arrays = {name: ("BF16", _bytes(128, hidden, 2)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for name, rows, columns in (
        ("self_attn.q_proj", 4096, hidden), ("self_attn.k_proj", 512, hidden), ("self_attn.v_proj", 512, hidden),
        ("self_attn.o_proj", hidden, 4096), ("mlp.router", experts, hidden),
    ):  # fmt: skip
        found[f"{layer}.{name}.weight"] = ("BF16", _bytes(rows, columns, 2))
        found[f"{layer}.{name}.bias"] = ("BF16", _bytes(rows, 2))
    found[f"{layer}.self_attn.sinks"] = ("BF16", _bytes(64, 2))
    for name, rows in (("gate_up_proj", 2 * hidden), ("down_proj", hidden)):
        stem = f"{layer}.mlp.experts.{name}"
        if quantized:
            found[f"{stem}_blocks"] = ("U8", _bytes(experts, rows, hidden // 32, 16))
            found[f"{stem}_scales"] = ("U8", _bytes(experts, rows, hidden // 32, below=123, least=117))
        else:
            found[stem] = ("BF16", _bytes(experts, hidden, rows, 2))
        found[f"{stem}_bias"] = ("BF16", _bytes(experts, rows, 2))
    for norm in (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"):
        found[f"{norm}.weight"] = ("BF16", _bytes(hidden, 2))
    return found


def write(folder: Path, config: Mapping[str, Any], arrays: Arrays) -> Path:
    """A checkpoint of one file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        name: (dtype, array.shape[:-1] if array.dtype == np.uint8 and dtype in ("BF16", "I32") else array.shape)
        for name, (dtype, array) in arrays.items()
    }
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_bytes([(name, dtype, shape) for name, (dtype, shape) in shapes.items()], {}))
        for _, array in arrays.values():
            file.write(array.tobytes())
    return folder


def read_time(folder: Path) -> float:
    """Nanoseconds of the processor for a byte of the tensors of a checkpoint, 4 MB at a time; the best of three."""
    tensors = [tensor for tensor in open_checkpoint(folder).tensors.values() if len(tensor.shape) > 1]
    memory = memoryview(bytearray(CHUNK_BYTES))
    best, total = float("inf"), sum(tensor.stop - tensor.start for tensor in tensors)
    for _ in range(3):
        started = time.thread_time()
        with Reader() as reader:
            for one in tensors:
                for _ in reader.read_through(memory, [ByteRange(one.file, one.start, one.stop - one.start)]):
                    pass
        best = min(best, time.thread_time() - started)
    return best / total * 1e9


def presplit_times(folder: Path, tp_size: int) -> tuple[float, float]:
    """Seconds, and seconds of all processors; the best of three."""
    plan = compile_plan(folder, tp_size=tp_size)
    found = []
    for _ in range(3):
        started, busy = time.perf_counter(), time.process_time()
        presplit(plan, folder, folder.parent / "shards")
        found.append((time.perf_counter() - started, time.process_time() - busy))
        shutil.rmtree(folder.parent / "shards")
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="of the Llama; each is 436 MB in bf16")
    parser.add_argument("--tp", type=int, default=4)
    arguments = parser.parse_args()

    def quantized(config: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        return {**config, "quantization_config": settings}

    dense = {**LLAMA, "num_hidden_layers": arguments.layers}
    experts = {**GPT_OSS, "num_hidden_layers": 1}
    cases: list[tuple[str, Mapping[str, Any], Callable[[], Arrays]]] = [
        ("bf16", dense, lambda: llama(bf16, arguments.layers)),
        ("fp8, 128 x 128", quantized(dense, FP8), lambda: llama(fp8, arguments.layers)),
        ("fp8, rows", quantized(dense, ROWS), lambda: llama(fp8_rows, arguments.layers)),
        ("int4, by 32", quantized(dense, INT4), lambda: llama(int4, arguments.layers)),
        ("bf16, experts", experts, lambda: gpt_oss(False)),
        ("MXFP4, experts", quantized(experts, MXFP4), lambda: gpt_oss(True)),
    ]
    print("| format | read, ns per byte | presplit, s | busy, s | of bf16's rate |\n|---|---|---|---|---|")
    plain = 0.0
    for name, config, arrays in cases:
        with tempfile.TemporaryDirectory(prefix="autotp-dequantize-") as work:
            folder = write(Path(work) / "model", config, arrays())
            read, (seconds, busy) = read_time(folder), presplit_times(folder, arguments.tp)
        plain = seconds if name.startswith("bf16") else plain
        print(f"| {name} | {read:.2f} | {seconds:.2f} | {busy:.2f} | {plain / seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
