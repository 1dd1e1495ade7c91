"""The config of a small model: every width another number, so that sizes are told apart, and the structure as it was.

Works on the JSON of a transformers config by the names of its keys, and knows no model. Kept are what decides the
structure: flags, kinds of layers, and whether query heads share key-value heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autotp_plan.huggingface import scale_config

HEADS = frozenset(
    {"num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"}
)
KV_HEADS = frozenset({"num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "num_key_value_groups"})
HIDDEN = frozenset({"hidden_size", "dim", "n_embd", "d_model", "n_embed", "dim_model", "emb_dim"})
_NO_WIDTHS = [
    "vocab",
    "position",
    "token",
    "window",
    "context",
    "length",
    "theta",
    "chunk",
    "seq",
    "ctx",
    "base",
    "layers",
    "experts",
    "steps",
    "_id",
    "image",
    "patch",
    "bucket",
    "codebook",
    "version",
    "tp",
    "iter",
]
_LARGE = 200
"""From here on an integer of an unknown key counts features, unless its name says that it does not."""
_HEAD_DIMS = ("head_dim", "kv_channels", "d_kv", "dim_head", "attention_head_dim", "d_head", "global_head_dim",
              "v_head_dim", "qk_nope_head_dim")  # fmt: skip
_SLIDING = "swa_"
"""In front of the keys of layers with sliding windows."""
_QK_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim")
_NOPE = 4
"""So much wider than a head of values is the part of a head that has no positions."""
_STATE_SPACE = (
    ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"),
    ("mamba_d_head", "mamba_headdim", "mamba_head_dim"),
    ("mamba_n_groups", "mamba_ngroups", "n_groups"),
)
"""Keys of heads, their widths and their groups, in state-space mixers."""
_DELTA_NET = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
              "linear_num_heads", "linear_head_dim")  # fmt: skip
"""Keys of gated delta nets: heads of keys, which several heads of values may share, and their widths."""
_ROTARY = frozenset({"qk_rope_head_dim", "rotary_dim"})
_WORDS = 256
_CHUNK = 16
"""Chunks of sequences, to which state-space mixers pad."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The numbers a small model is made of: heads, key-value heads where they are fewer, and how widths are counted."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    first_width: int
    step: int
    hidden: int
    """The hidden size, where it is not that of all heads."""
    delta_net: tuple[int, int, int, int]
    """Of gated delta nets: heads of keys, heads of values for each where they are more, and the widths of both."""
    state_space: tuple[int, ...]
    """Of state-space mixers: widths of heads, the first of which that fits is taken."""
    heads_per_group: int
    """Of state-space mixers whose width is not that of the model."""
    state: int
    """Features of a state, by which the time of a pass grows: odd and few."""
    tied: bool = False
    """Whether widths that are equal in the original stay equal."""
    square: bool = False
    """Whether the hidden size is that of all heads, even where a head's width has a key of its own."""
    shared: bool = False
    """Whether heads share key-value heads, even where they do not in the original: another size's may."""


_FIRST = Sizes(heads=8, kv_heads=2, head_dim=16, rotary=4, first_width=20, step=8, hidden=48,
               delta_net=(4, 3, 6, 10), state_space=(6, 8, 16, 4, 2), heads_per_group=4, state=9)  # fmt: skip
_SECOND = Sizes(heads=6, kv_heads=3, head_dim=24, rotary=8, first_width=34, step=10, hidden=96,
                delta_net=(10, 2, 14, 22), state_space=(12, 6, 4, 18, 24, 3),
                heads_per_group=3, state=11)  # fmt: skip
_ROUND = (
    dataclasses.replace(_FIRST, first_width=48, step=16, hidden=80),
    dataclasses.replace(_SECOND, heads=12, kv_heads=4, head_dim=8, first_width=64, step=24, hidden=144),
)
CANDIDATES: tuple[tuple[Sizes, Sizes], ...] = (
    (_FIRST, _SECOND),
    (replace(_FIRST, tied=True), replace(_SECOND, tied=True)),
    _ROUND,
    (replace(_ROUND[0], tied=True), replace(_ROUND[1], tied=True)),
    (replace(_FIRST, square=True), replace(_SECOND, square=True)),
    (replace(_ROUND[0], tied=True, square=True), replace(_ROUND[1], tied=True, square=True)),
)
"""Pairs of sizes to try; the second tells apart what happens to be equal in the first. No number of heads is that of a
head's features, so that a count of what depends on an index says which of the two it is.
"""


def resized(config: Mapping[str, Any], sizes: Sizes, layers: int | None) -> dict[str, Any]:
    """The config of a small model: every width another number, structure as it was.

    Args:
        config: of the original model.
        sizes: the numbers to use.
        layers: how many of the first layers to keep; None for all.
    """
    small = scale_config.shrink(
        config, divisor=1, layers=layers, experts=scale_config.fewest_experts(config), tp_size=1
    )
    values = {key.rpartition(".")[2]: value for key, value in numbers_of(config)}
    heads, old_hidden = _first(values, HEADS), _first(values, HIDDEN)
    free = any(values.get(key) for key in (*_HEAD_DIMS[:6], "v_head_dim")) and not sizes.square
    hidden = sizes.hidden if free else sizes.heads * sizes.head_dim
    every = list(scale_config.entries(config))
    nope, rope = ({one for key, one in every if key == part} for part in _QK_PARTS)
    qk_dims = {a + b for a in nope for b in rope}
    widths = iter(range(sizes.first_width, 10_000, sizes.step))
    by_old = {values[key]: hidden for key in HIDDEN if key in values}

    def width(old: int) -> int:
        if old not in by_old or not sizes.tied:
            new = next(widths)
            while new in (hidden, sizes.heads * sizes.head_dim):
                new = next(widths)
            by_old[old] = new
        return by_old[old]

    def kv_heads(old: int, around: Mapping[str, Any]) -> int:
        own = _first({key: one for key, one in around.items() if type(one) is int}, HEADS) or heads
        if old == own and not sizes.shared:
            return sizes.heads
        return 1 if old == 1 else sizes.kv_heads

    def changed(key: str, value: Any, around: Mapping[str, Any]) -> Any:
        key = key.removeprefix(_SLIDING)
        if isinstance(value, dict):
            return {inner: changed(inner, item, value) for inner, item in value.items()}
        if isinstance(value, list):
            if key == "mrope_section" and value:
                half = sizes.head_dim // 2
                return [half - (len(value) - 1), *[1] * (len(value) - 1)]
            if key in ("long_factor", "short_factor"):
                return value[: sizes.head_dim // 2]
            return [changed(key, item, around) for item in value]
        if type(value) is not int or value <= 0:
            return value
        if "vocab" in key:
            return min(value, _WORDS)
        if key in HEADS:
            return sizes.heads
        if key in KV_HEADS:
            return kv_heads(value, around)
        if key.endswith("chunk_size"):
            return min(value, _CHUNK)
        if key in HIDDEN:
            return hidden
        if key in _ROTARY or (key == "head_dim" and value == values.get("qk_rope_head_dim")):
            return sizes.rotary
        if key in ("head_dim", "qk_head_dim") and value in qk_dims:
            return sizes.head_dim + _NOPE + sizes.rotary
        if old_hidden and key.endswith("hidden_size") and value == 2 * old_hidden:
            return 2 * hidden
        if sizes.square and key in _HEAD_DIMS and heads and old_hidden and value * heads == 2 * old_hidden:
            return 2 * hidden // sizes.heads
        if key in _HEAD_DIMS:
            return sizes.head_dim + (_NOPE if key == "qk_nope_head_dim" else max(0, 2 * (_HEAD_DIMS.index(key) - 6)))
        if key in scale_config.STATES:
            return sizes.state
        if key in _DELTA_NET:
            return _delta_net(key, sizes, shared=values.get(_DELTA_NET[0]) != values.get(_DELTA_NET[1]))
        unknown = value >= _LARGE and not any(word in key for word in _NO_WIDTHS)
        if key in scale_config.WIDTHS or unknown:
            return width(value)
        return value

    return _with_state_space_heads({key: changed(key, value, small) for key, value in small.items()}, sizes)


def _with_state_space_heads(config: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The config with heads of state-space mixers that make up their width."""
    config = {
        key: _with_state_space_heads(value, sizes) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    heads, width, groups = (next((key for key in keys if config.get(key)), None) for keys in _STATE_SPACE)
    hidden = next((config[key] for key in sorted(HIDDEN) if config.get(key)), None)
    if config.get("model_type") == "mamba2":
        heads, width = "num_heads", "head_dim"
    if not heads or not width or not hidden:
        return config
    number = 2 * sizes.kv_heads if groups and config[groups] > 1 else 1
    if config.get("mamba_d_ssm") or heads == "mamba_num_heads":  # a width of its own
        inner = sizes.state_space[0] * (number * sizes.heads_per_group if number > 1 else 2 * sizes.heads)
    else:
        inner = _expand(config) * hidden
    head_dim = next((one for one in sizes.state_space if inner % one == 0 and (inner // one) % max(number, 2) == 0), 1)
    changed = {heads: inner // head_dim, width: head_dim}
    if config.get("mamba_d_ssm"):
        changed["mamba_d_ssm"] = inner
    if groups and number > 1:
        changed[groups] = number
    return {**config, **changed}


def _delta_net(key: str, sizes: Sizes, shared: bool) -> int:
    """The small value of a key of gated delta nets; `shared` where several heads of values share one of keys."""
    heads, number, width, value_width = sizes.delta_net
    values = heads * (number if shared else 1)
    return (heads, values, width, value_width, heads, width)[_DELTA_NET.index(key)]


def _expand(config: Mapping[str, Any]) -> int:
    return int(config.get("mamba_expand") or config.get("expand") or 2)


def numbers_of(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, int]]:
    """Every positive integer of a config with its key, those in inner objects with a dot."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from numbers_of(value, f"{before}{key}.")
        elif type(value) is int and value > 0:
            yield before + key, value


def _first(values: Mapping[str, int], keys: frozenset[str]) -> int | None:
    return next((values[key] for key in sorted(keys) if values.get(key)), None)
