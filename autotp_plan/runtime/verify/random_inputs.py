"""Random weights, random tokens and random images: the same for the dense and the sharded model, from fixed seeds."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.huggingface.meta_model import parameters_and_buffers


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """One image for each of the two rows of a batch, as a model's forward takes them.

    Attributes:
        token: the id that stands for a feature of an image.
        count: how many features an image has.
        start: the id of the token before them; None where there is none.
        reserved: ids that must not occur elsewhere.
        floats: inputs that are random numbers, by name: their shapes.
        integers: inputs that are the same in every batch, by name.
        types: inputs of the shape of the tokens, 1 for those of an image.
    """

    token: int
    count: int
    start: int | None = None
    reserved: tuple[int, ...] = ()
    floats: dict[str, list[int]] = field(default_factory=dict)
    integers: dict[str, Any] = field(default_factory=dict)
    types: tuple[str, ...] = ()

    def inputs(self, tokens: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The inputs of a batch with these tokens and an image in each row, behind the first token."""
        tokens = torch.where(torch.isin(tokens, torch.tensor(self.reserved)), torch.ones_like(tokens), tokens)
        run = ([] if self.start is None else [self.start]) + [self.token] * self.count
        images = torch.tensor([run]).expand(len(tokens), -1)
        tokens = torch.cat((tokens[:, :1], images, tokens[:, 1:]), dim=1)
        is_image = (tokens == self.token).long()
        return {
            "input_ids": tokens,
            **{name: torch.randn(shape, generator=generator) for name, shape in self.floats.items()},
            **{name: torch.tensor(value) for name, value in self.integers.items()},
            **dict.fromkeys(self.types, is_image),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """Batches of two rows of `length` token ids. Nothing is padded, but the id of the padding token occurs.

    With `images` a batch is the inputs of a forward by name, and its rows are longer by an image. With `uneven` those
    of odd seeds are a token shorter: ranks that share an even number of tokens evenly then hold different numbers.
    """

    vocab_size: int
    length: int
    padding: int | None
    images: Images | None = None
    uneven: bool = False

    def __call__(self, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        length = self.length - seed % 2 if self.uneven else self.length
        tokens = torch.randint(self.vocab_size, (2, length), generator=generator)
        if self.padding is not None and 0 <= self.padding < self.vocab_size:
            tokens[0, 0] = self.padding
        return tokens if self.images is None else self.images.inputs(tokens, generator)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Batches:
        """The batches that `dataclasses.asdict` wrote."""
        images = data.get("images")
        lists = ("reserved", "types")
        found = None if images is None else Images(**{**images, **{key: tuple(images[key]) for key in lists}})
        return cls(**{**data, "images": found})


def images_for(model: Any) -> Images | None:
    """Images for a small transformers model with random weights; None for a model that takes none.

    What an image is follows from the arguments of the model's forward, how many features it has from running its tower.

    Raises:
        ValueError: the model takes images in another way than those that are known. Its own forward may raise anything.
    """
    takes = inspect.signature(type(model).forward).parameters
    config = model.config
    vision = getattr(config, "vision_config", None)
    if "pixel_values" not in takes or vision is None:
        return None
    token = next((getattr(config, key) for key in _IMAGE_TOKENS if type(getattr(config, key, None)) is int), None)
    if token is None:
        raise ValueError("its config names no token for images")
    pixels, integers, features = _first_that_runs(model, _forms(takes, config, vision))
    if features % 2:
        raise ValueError(f"two images of one size have {features} features")
    return Images(
        token=token,
        count=features // 2,
        start=getattr(config, "vision_start_token_id", None),
        reserved=tuple(sorted({value for key, value in config.to_dict().items() if _RESERVED.search(key) and value})),
        floats={"pixel_values": pixels},
        integers=integers,
        types=tuple(name for name in ("token_type_ids", "mm_token_type_ids") if name in takes),
    )


_Form = tuple[list[Any], dict[str, Any]]


def _first_that_runs(model: Any, forms: Iterable[_Form]) -> tuple[list[int], dict[str, Any], int]:
    """The first of `forms` that the tower takes, without its integers where it can do without, and its features."""
    refused: list[Exception] = []
    for pixels, integers in forms:
        for given in ({}, integers) if integers else ({},):
            try:
                return pixels, given, _features(model, pixels, given)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                refused.append(error)
    raise refused[-1]


def _forms(takes: Collection[str], config: Any, vision: Any) -> Iterator[_Form]:
    """The shapes of the pixels of two images and the integers that go with them, likely ones first.

    Args:
        takes: the arguments of the model's forward.
        config: the model's.
        vision: its tower's.
    """
    patch = _one(vision.patch_size)
    side = _one(getattr(vision, "image_size", None) or 4 * patch)
    channels: Any = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
    grid = side // patch
    if "image_grid_thw" in takes:
        grids: dict[str, Any] = {"image_grid_thw": [[1, grid, grid]] * 2}
        if "image_merge_sizes" in takes:
            grids["image_merge_sizes"] = [2] * 2
        frames = getattr(vision, "temporal_patch_size", 1)
        yield [2 * grid * grid, channels * frames * patch * patch], grids
        yield [2 * grid * grid, channels, patch, patch], grids
    elif getattr(config, "image_grid_pinpoints", None) and "image_sizes" in takes:
        height, width = config.image_grid_pinpoints[0]
        tiles = 1 + (height // side) * (width // side)
        yield [2, tiles, channels, side, side], {"image_sizes": [[height, width]] * 2}
    elif "image_sizes" in takes:
        yield [2, channels, side, side], {"image_sizes": [[side, side]] * 2}
    elif "spatial_shapes" in takes:
        shapes = {"spatial_shapes": [[grid, grid]] * 2, "pixel_attention_mask": [[1] * (grid * grid)] * 2}
        yield [2, grid * grid, channels * patch * patch], shapes
    elif "image_position_ids" in takes:
        places = [[x, y] for y in range(grid) for x in range(grid)]
        yield [2, grid * grid, channels * patch * patch], {"image_position_ids": [places] * 2}
    elif "pixel_attention_mask" in takes:
        yield [2, 1, channels, side, side], {"pixel_attention_mask": [[True]] * 2}
    else:
        yield [2, channels, side, side], {}


_IMAGE_TOKENS = ("image_token_id", "image_token_index")
_RESERVED = re.compile("(image|video|vision|audio|boi|eoi).*_token_(id|index)$")


def _features(model: Any, pixels: list[int], integers: Mapping[str, Any]) -> int:
    """How many tokens the images are to a model's language model."""
    inner = getattr(model, "model", None)  # the outer method of some does not take all that the inner one needs
    owner: Any = inner if hasattr(inner, "get_image_features") else model
    takes = inspect.signature(type(owner).get_image_features).parameters
    named = {name: torch.tensor(value) for name, value in integers.items() if name in takes}
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        found = owner.get_image_features(pixel_values=torch.ones(pixels, dtype=dtype), **named)
    if hasattr(found, "pooler_output"):
        found = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(math.prod(part.shape[:-1]) for part in parts)


def _one(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def randomise(model: nn.Module) -> None:
    """Give every parameter, and every buffer that is saved, a random value: zeros and ones hide errors.

    Matrices are normal with variance 1 / (last dimension), so that activations keep their size; vectors have a standard
    deviation of 0.2, around 1 for weights of norms and around 0 for biases.
    """
    generator = torch.Generator().manual_seed(0)
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in sorted(parameters_and_buffers(model), key=lambda item: item[0]):
            if id(tensor) in done or not tensor.is_floating_point():
                continue
            done.add(id(tensor))
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.dim() > 1:
                tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
            else:
                tensor.copy_(noise * 0.2 + (1.0 if name.endswith("weight") else 0.0))
