"""The config of a twin, a small model of the same architecture: narrower, fewer layers, experts and tokens.

Works on the JSON of a transformers config by the names of its keys, and knows no model. Unchanged are the numbers of
heads, the ratios between widths, the kinds of layers, and the remainder of the vocabulary size by the TP size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

WIDTHS = frozenset(
    {"hidden_size", "n_embd", "d_model", "intermediate_size", "moe_intermediate_size", "shared_intermediate_size"}
    | {"shared_expert_intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"}
    | {"head_dim", "kv_channels", "d_kv", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"}
    | {"qk_head_dim", "v_head_dim", "rotary_dim", "word_embed_proj_dim", "embedding_size", "global_head_dim"}
    | {"shared_expert_size", "moe_ffn_hidden_size", "decoder_ffn_dim", "inner_dim", "dense_intermediate_size"}
    | {"expert_ffn_hidden_size", "dim", "hidden_dim", "emb_dim"}
    | {"mamba_d_head", "mamba_headdim", "mamba_head_dim", "mamba_d_ssm", "mamba_d_state", "ssm_state_size"}
    | {"state_size", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"}
)
"""Keys that hold a number of features: all are divided by the same number, which keeps their ratios."""

STATES = ("mamba_d_state", "ssm_state_size", "state_size")
"""But a state stays as it is where a few features would be left: some mixers normalize what they write into it."""
_DELTA_HEADS = ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim")
"""But the heads of gated delta nets stay wide: vectors of a few features are normalized, and may be near zero."""

_HEAD_DIMS = ("head_dim", "kv_channels", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
              "global_head_dim")  # fmt: skip
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "emb_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_PARTIAL = ("partial_rotary_factor", "rotary_pct", "rope_pct")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LAYER_KINDS = ("layer_types", "layers_block_type")
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_moe_experts")
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window", "window_size", "attention_chunk_size")
_CHUNKS = ("chunk_size", "mamba_chunk_size")
"""Keys of state-space mixers, which pad sequences to a chunk: time and memory grow with its square."""
_PER_FREQUENCY = ("long_factor", "short_factor", "mrope_section")

_TEXT = "text_config"
_TOKEN_IDS = ("_token_id", "_token_ids", "_token_index")
_TOWER_WIDTHS = ("embed_dim", "hidden_size", "d_model")
"""The width of a vision tower; where there are two, the first: the other is what the tower gives."""
_TOWER_DEPTHS = ("depth", "num_hidden_layers", "num_layers")
_TO_TEXT = ("out_hidden_size", "projection_dim", "text_hidden_size", "hidden_size")
"""Keys outside of the language model that may hold its width."""
_TOWER_LINKED = ("vision_output_dim", "projector_input_dim", "projector_output_dim")
"""Keys of Llama 4's projector that hold the same width."""
_TOWER_HEAD = 8
_TOWER_LAYERS = 2
_SIDE = 4
_PATCH = 2

_NORM_EPS = 1e-2
"""Far above the rounding of float32, and below the mean square of what a norm takes, which is around 1."""

WINDOW = 8
"""Sliding windows and chunks of a twin, in tokens: shorter than its batch."""
_MIN_VOCABULARY = 256
_MIN_HEAD_DIM = 4
_MIN_DELTA_HEAD = 16
_MIN_STATE = 4


def divisors(config: Mapping[str, Any], dims: Collection[int] = ()) -> list[int]:
    """The numbers that divide all widths of `config` and leave heads even and at least 4 wide; the largest first.

    Args:
        config: of the original model.
        dims: the dimensions of its parameters. A width that divides none of them is of something that this model does
            not have, and does not count: that of experts, by default, in a model without any.
    """
    text = language_model(config)
    widths = [value for key, value in entries(text) if key in WIDTHS and value]
    widths = [width for width in widths if any(dim % width == 0 for dim in dims)] or widths
    common = math.gcd(*widths) if widths else 1
    return [k for k in range(common, 0, -1) if common % k == 0 and (k == 1 or _heads_stay(text, k))]


def num_layers(config: Mapping[str, Any]) -> int | None:
    """Number of layers, where the config says it or lists their kinds."""
    text = language_model(config)
    listed = (len(text[key]) for key in _LAYER_KINDS if isinstance(text.get(key), list))
    return next((text[key] for key in LAYERS if type(text.get(key)) is int), None) or next(listed, None)


def per_layer(config: Mapping[str, Any], layer: int) -> tuple[tuple[str, str], ...]:
    """The entries for one layer in the lists that have one for each; a list of the layers' numbers does not count."""
    depth = num_layers(config) or 0
    return tuple(
        (key, repr(value[layer]))
        for key, value in _all(language_model(config))
        if isinstance(value, list) and len(value) == depth and key not in _PER_FREQUENCY and value != [*range(depth)]
    )


def num_experts(config: Mapping[str, Any]) -> int | None:
    """Number of routed experts, where the model has any."""
    values = dict(entries(language_model(config)))
    return next((values[key] for key in _EXPERTS if values.get(key)), None)


def fewest_experts(config: Mapping[str, Any]) -> int | None:
    """The smallest number of experts among which a router still has a choice; None for a model without experts."""
    values, experts = dict(entries(language_model(config))), num_experts(config)
    if experts is None:
        return None
    chosen = max((values.get(key) or 0 for key in _EXPERTS_PER_TOKEN), default=0)
    groups, chosen_groups = values.get("n_group") or values.get("num_expert_group") or 1, values.get("topk_group") or 1
    for count in range(groups, experts, groups):
        in_group = count // groups
        if count >= max(4, chosen + 1) and chosen_groups * in_group >= chosen and (groups == 1 or in_group >= 2):
            return count
    return experts


def shrink(
    config: Mapping[str, Any], *, divisor: int, layers: int | None, experts: int | None, tp_size: int
) -> dict[str, Any]:
    """The twin's config, without dropout and with short attention windows.

    Args:
        config: of the original model. In one with a language model inside, that is shrunk as a model by itself is; a
            vision tower, which is replicated, becomes a small one that makes features of the same kind.
        divisor: one of `divisors(config)`.
        layers: how many of the first layers to keep; None for all.
        experts: number of routed experts; None for as many as there are.
        tp_size: the vocabulary size keeps its remainder by it.

    Returns:
        A config of the same keys.
    """
    depth, text = num_layers(config), language_model(config)
    vocabulary = dict(entries(text)).get("vocab_size")
    words = _vocabulary(vocabulary, tp_size) if vocabulary else 0
    taken = {value for key, value in entries(config) if key.endswith(_TOKEN_IDS)}
    unused = (token for token in range(words - 2, 0, -1) if token not in taken)
    specials: dict[int, int] = {}
    hidden = _first(text, _HIDDEN)
    of_delta_heads = _delta_divisor(text, divisor)

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            if layers is not None and value and all(str(one).isdecimal() for one in value):  # what some layers have
                value = {number: item for number, item in value.items() if int(number) < layers}
            return {inner: changed(inner, item) for inner, item in value.items()}
        if isinstance(value, list):
            if key in _PER_FREQUENCY:
                return [item // divisor for item in value] if key == "mrope_section" else value[: len(value) // divisor]
            kept = value[:layers] if len(value) == depth else value
            return [changed(key, item) for item in kept]
        if "drop" in key or "jitter" in key:
            return type(value)(0) if type(value) in (int, float) else value
        if type(value) is not int:
            return value
        if key in STATES and value // divisor < _MIN_STATE:
            return value
        if key in WIDTHS:
            return value // (of_delta_heads if key in _DELTA_HEADS else divisor)
        if key in LAYERS and layers is not None:
            return layers
        if key in _EXPERTS and experts is not None:
            return min(value, experts)
        if key in (*_WINDOWS, *_CHUNKS):
            return min(value, WINDOW)
        if key == "vocab_size":
            return words
        if "vocab" in key and words and value > words:
            return words
        return small_token(key, value)

    def small_token(key: str, value: Any) -> Any:
        if not key.endswith(_TOKEN_IDS) or type(value) is not int or value < words:
            return value
        if value not in specials:
            specials[value] = next(unused)
        return specials[value]

    if text is config:
        smaller = {key: changed(key, value) for key, value in config.items()}
    else:
        around = _Around(hidden=hidden or 0, divisor=divisor, image=_image_size(config))
        smaller = {
            key: changed(key, value) if key == _TEXT else around.shrink(key, small_token(key, value))
            for key, value in config.items()
        }
        if words:
            smaller[_TEXT] = {**smaller[_TEXT], "pad_token_id": words - 1}
    if str(config.get("architectures")).endswith("ForTokenClassification']"):  # whose dropout need not be in the config
        smaller["classifier_dropout"] = 0.0
    return {**smaller, "pad_token_id": words - 1} if words else smaller  # an embedding treats its padding row apart


def with_mild_norms(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with an eps in its norms of 1e-2 at least.

    A norm multiplies what is near zero, and its rounding error, by up to 1 / sqrt(eps). With random weights there
    always is some: the first token of a delta rule, for one, gives each head a multiple of one dot product.
    """
    inner = {key: with_mild_norms(value) for key, value in config.items() if isinstance(value, Mapping)}
    eps = {
        key: max(value, _NORM_EPS)
        for key, value in config.items()
        if "norm" in key and "eps" in key and type(value) is float
    }
    return {**config, **inner, **eps}


def language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model in a model of several; the config itself of one that is one."""
    text = config.get(_TEXT)
    return text if isinstance(text, Mapping) else config


@dataclass(frozen=True, kw_only=True, slots=True)
class _Around:
    """What is around a language model of `hidden` features, whose twin has `hidden // divisor`.

    Nothing of it is sharded, so its sizes need not keep their ratios: they only have to fit each other. `image` is the
    height of the original's images.
    """

    hidden: int
    divisor: int
    image: int | None

    def shrink(self, key: str, value: Any) -> Any:
        """The twin's value of an entry outside of the language model's config."""
        if isinstance(value, Mapping) and (_first(value, _TOWER_WIDTHS) or _first(value, _TOWER_DEPTHS)):
            return self._tower(value)
        if isinstance(value, Mapping):
            return {inner: self.shrink(inner, item) for inner, item in value.items()}
        if key in _TO_TEXT and value == self.hidden:
            return self.hidden // self.divisor
        if key == "image_grid_pinpoints" and value and self.image:
            return [[side // self.image * _SIDE * _PATCH for side in point] for point in value]
        if key == "mm_tokens_per_image" and value:
            return _SIDE
        return value

    def _tower(self, tower: Mapping[str, Any]) -> dict[str, Any]:
        """A tower of two layers, whose heads are `_TOWER_HEAD` wide, for images of `_SIDE` x `_SIDE` patches."""
        depth = _first(tower, _TOWER_DEPTHS)
        old = _first(tower, _TOWER_WIDTHS) or 0
        width = (_first(tower, _HEADS) or 1) * _TOWER_HEAD
        widths = next((key for key in _TOWER_WIDTHS if tower.get(key)), None)

        def changed(key: str, value: Any) -> Any:
            if key == widths:
                return width
            if key in (*_TO_TEXT, *_HIDDEN) and value == self.hidden:
                return self.hidden // self.divisor
            if key in ("head_dim", "global_head_dim"):
                return _TOWER_HEAD if value else value
            if key in _TOWER_DEPTHS:
                return min(value, _TOWER_LAYERS)
            if key in _TOWER_LINKED:
                return 2 * width
            if key == "intermediate_size" and value:
                return width * value // old if old and value % old == 0 else 2 * width
            if key == "patch_size":
                return [_PATCH] * len(value) if isinstance(value, list) else _PATCH
            if key in ("image_size", "window_size") and value:
                return [_SIDE * _PATCH] * len(value) if isinstance(value, list) else _SIDE * _PATCH
            if key == "num_position_embeddings":
                return _SIDE * _SIDE
            if key == "fullatt_block_indexes":
                return [_TOWER_LAYERS - 1]
            if key == "deepstack_visual_indexes":
                return [*range(min(len(value), _TOWER_LAYERS))]
            if isinstance(value, list) and len(value) == depth:
                return value[:_TOWER_LAYERS]
            if "drop" in key and type(value) in (int, float):
                return type(value)(0)
            return value

        return {key: changed(key, value) for key, value in tower.items()}


def _image_size(config: Mapping[str, Any]) -> int | None:
    sizes = [value.get("image_size") for value in config.values() if isinstance(value, Mapping)]
    return next((size for size in sizes if type(size) is int), None)


def entries(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every integer of a config with its key, in lists and inner objects too."""
    for key, value in _all(config):
        for item in value if isinstance(value, list) else [value]:
            if type(item) is int:
                yield key, item


def _all(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for value in config.values():  # inner objects first: of two keys of one name a dict keeps the outer
        if isinstance(value, dict):
            yield from _all(value)
    for key, value in config.items():
        if not isinstance(value, dict):
            yield key, value


def _vocabulary(size: int, tp_size: int) -> int:
    """A few hundred tokens; the remainder by `tp_size` is that of `size`."""
    least = max(_MIN_VOCABULARY, 2 * tp_size)
    smaller = least + (size - least) % tp_size
    return min(size, smaller)


def _heads_stay(config: Mapping[str, Any], divisor: int) -> bool:
    head_dims = [config[key] for key in _HEAD_DIMS if config.get(key)]
    hidden, heads = _first(config, _HIDDEN), _first(config, _HEADS)
    if hidden and heads and not config.get("head_dim"):
        head_dims.append(hidden // heads)
    parts = {value for key, value in _all(config) if key in _PARTIAL and type(value) in (int, float) and value < 1}
    rotary = [int(head_dim // divisor * part) for head_dim in head_dims for part in parts]
    if config.get("rotary_dim"):
        rotary.append(config["rotary_dim"] // divisor)
    heads_stay = all(size // divisor >= _MIN_HEAD_DIM and size // divisor % 2 == 0 for size in head_dims)
    return heads_stay and all(size >= 2 and size % 2 == 0 for size in rotary)


def _delta_divisor(config: Mapping[str, Any], divisor: int) -> int:
    """The largest number that divides `divisor` and leaves the heads of gated delta nets wide."""
    widths = [value for key, value in entries(config) if key in _DELTA_HEADS and value]
    fits = (k for k in range(divisor, 1, -1) if divisor % k == 0 and all(width % k == 0 for width in widths))
    return next((k for k in fits if all(width // k >= _MIN_DELTA_HEAD for width in widths)), 1)


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if config.get(key)), None)
