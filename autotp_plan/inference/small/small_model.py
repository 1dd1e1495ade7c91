"""Small models of an architecture of transformers: what inference runs in the place of the real one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autotp_plan.huggingface import scale_config
from autotp_plan.huggingface.disk_names import NamesOnDisk, disk_names
from autotp_plan.huggingface.meta_model import build_model
from autotp_plan.inference.regions.influence import Smooth
from autotp_plan.inference.small.resized import CANDIDATES, HEADS, HIDDEN, KV_HEADS, Sizes, numbers_of, resized
from autotp_plan.schemas.names import is_index
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, read_config

OPTIONS = {"experts_implementation": "eager", "attn_implementation": "eager"}
"""How transformers runs a small model: experts one by one (in float64), and attention step by step."""

_TOKENS = (2, 10)
MOST_PARAMETERS = 20_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallModel:
    """A small model in float64 with random weights.

    Attributes:
        model: transformers' model.
        config: its config as transformers has it.
        numbers: every integer of the config by its key, with a dot for one inside another.
        tokens: what to run it on.
        tentative: whether its heads share key-value heads and the original's do not.
    """

    model: Any
    config: dict[str, Any]
    numbers: dict[str, int]
    tokens: Tensor
    tentative: bool = False

    def run(self) -> Any:
        """A forward pass."""
        return self.model(input_ids=self.tokens, use_cache=False)

    def bypassed(self) -> frozenset[str]:
        """The modules that run with gradients and are passed by without: none in a model of transformers."""
        return frozenset()

    def embedding_and_head(self) -> tuple[Any, Any]:
        """The modules that begin with the vocabulary and end with it; None for one that is not there."""
        return self.model.get_input_embeddings(), self.model.get_output_embeddings()


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A model of transformers by its config.

    Attributes:
        folder: with a config.json.
        original: the model at its full size, on meta.
        given: config.json as it was given.
        config: the config as transformers completes it, without what it computes from other keys.
        computed: the keys that it computes.
        aliases: keys of `config` that config.json has under another name, with that name.
        layers: how many of the first layers hold every kind of layer.
    """

    folder: Path
    original: Any
    given: dict[str, Any]
    config: dict[str, Any]
    computed: frozenset[str] = field(default_factory=frozenset)
    aliases: Mapping[str, str] = field(default_factory=dict)
    layers: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Architecture:
        """The architecture of the config.json in `folder`.

        Raises:
            CheckpointError: transformers cannot build a model from it.
        """
        original = build_model(folder, on_meta="all")
        full = as_json(original.config)
        given = _part_of(read_config(folder) or {}, full)
        computed, aliases = _computed_keys(type(original.config), given, full)
        config = {key: value for key, value in full.items() if key not in computed}
        return cls(
            folder=folder,
            original=original,
            given=given,
            config=config,
            computed=computed,
            aliases=aliases,
            layers=_layers_needed(original, full),
        )

    @property
    def name(self) -> str:
        """The config's `model_type`."""
        return str(self.given.get("model_type"))

    @property
    def model_types(self) -> list[str]:
        """The `model_type`s that the rules are for."""
        return [self.name]

    @property
    def numbers(self) -> dict[str, int]:
        """Every positive integer of the config."""
        return dict(numbers_of(as_json(self.original.config)))

    def disk_names(self) -> NamesOnDisk:
        """What its tensors are called in checkpoints, as `disk_names` of a model."""
        return disk_names(self.original)

    def value_without(self, config: Mapping[str, Any], key: str) -> int | None:
        """What transformers takes for a key that a config leaves out; None for no integer."""
        try:
            full = as_json(type(self.original.config).from_dict({k: v for k, v in config.items() if k != key}))
        except Exception:  # a config that needs it
            return None
        value = full.get(key)
        return value if type(value) is int else None

    def small(self, sizes: Sizes) -> SmallModel:
        """A small model. Raises whatever transformers does for sizes that do not go together."""
        config = resized(self.config, sizes, self.layers)
        with tempfile.TemporaryDirectory(prefix="autotp-infer-") as name:
            (Path(name) / CONFIG_NAME).write_text(json.dumps({**config, "dtype": "float64"}))
            architecture = type(self.original).__name__
            elements = sum(p.numel() for p in build_model(Path(name), architecture, on_meta="all").parameters())
            if elements > MOST_PARAMETERS:
                raise ValueError(f"a small model of {elements} parameters is too large")
            model = build_model(Path(name), architecture, on_meta="nothing", **OPTIONS).eval().double()
        randomise(model)
        generator = torch.Generator().manual_seed(1)
        words = model.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(3, max(4, words - 40), _TOKENS, generator=generator)
        full = as_json(model.config)
        return SmallModel(
            model=model, config=full, numbers=dict(numbers_of(full)), tokens=tokens, tentative=sizes.shared
        )

    def _sizes(self) -> Iterator[tuple[Sizes, Sizes]]:
        """`CANDIDATES`, and before them those whose heads share key-value heads, where that makes a difference."""
        for alone in CANDIDATES:
            shared = replace(alone[0], shared=True), replace(alone[1], shared=True)
            if resized(self.config, shared[0], self.layers) != resized(self.config, alone[0], self.layers):
                yield shared
        yield from CANDIDATES

    def pairs(self) -> Iterator[tuple[SmallModel, SmallModel]]:
        """Pairs of small models that run, in the order in which they should be tried.

        Raises:
            ValueError: at the end, if there was none.
        """
        reason, found = "", False
        for first, second in self._sizes():
            if first.shared and found:
                continue
            try:
                one, other = self.small(first), self.small(second)
                with torch.no_grad(), Smooth():
                    one.run(), other.run()
            except Exception as error:  # transformers raises anything for sizes that do not go together
                reason = reason or f"{type(error).__name__}: {error}"
                continue
            found = True
            yield one, other
        if not found:
            raise ValueError(reason)


def as_json(config: Any) -> dict[str, Any]:
    """A config of transformers as the JSON of all its keys."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def randomise(model: Any) -> None:
    """Give every parameter and buffer of floating point that is saved a random value that is not near zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(noise * 0.2 + (1.0 if name.endswith("weight") else 0.0))


def _computed_keys(
    cls: type[Any], given: Mapping[str, Any], full: Mapping[str, Any]
) -> tuple[frozenset[str], dict[str, str]]:
    """The keys that were not given and whose values follow from others; and those given under another name."""
    missing = [key for key, value in full.items() if key not in given and type(value) is int]
    doubled = {
        key: 2 * value if type(value) is int and key in (scale_config.WIDTHS | HEADS | KV_HEADS | HIDDEN) else value
        for key, value in given.items()
    }
    try:
        other = as_json(cls.from_dict(doubled))
    except Exception:  # a config that does not allow it
        return frozenset(), {}
    changed = [key for key in missing if other.get(key) != full[key]]
    unread = [key for key in given if key not in full]
    aliases: dict[str, str] = {}
    for key in changed:
        same = [one for one in unread if (given[one], doubled[one]) == (full[key], other.get(key))]
        if len(same) == 1:
            aliases[key] = same[0]
    return frozenset(changed) - aliases.keys(), aliases


def _part_of(given: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the model with the config `full`, which may be one inside it."""
    inner = next(
        (
            value
            for value in given.values()
            if isinstance(value, dict) and value.get("model_type") == full.get("model_type") != given.get("model_type")
        ),
        {},
    )
    return {**(inner or given), "model_type": given.get("model_type")}


def _layers_needed(original: Any, config: Mapping[str, Any]) -> int | None:
    """How many of the first layers include every kind: by the parameters they have and what the config's lists say."""
    depth = scale_config.num_layers(config)
    if depth is None:
        return None
    kinds: dict[str, dict[int, set[Any]]] = {}
    for name, parameter in original.named_parameters():
        parts = name.split(".")
        at = next((place for place, part in enumerate(parts) if is_index(part)), None)
        if at is not None:
            layers = kinds.setdefault(".".join(parts[:at]), {})
            layers.setdefault(int(parts[at]), set()).add((".".join(parts[at + 1 :]), tuple(parameter.shape)))
    numbered = next((found for found in kinds.values() if found.keys() == set(range(depth))), None)
    if numbered is None:
        return None
    first: dict[Any, int] = {}
    for layer in range(depth):
        first.setdefault((frozenset(numbered[layer]), scale_config.per_layer(config, layer)), layer)
    return min(depth, max(2, 1 + max(first.values())))
