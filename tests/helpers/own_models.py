"""Models that are not from transformers, as people write them, and some that cannot be planned."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NanoBlock(nn.Module):
    """Fused q, k and v, dropout that is no module, attributes under names of its own."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.n_embd, self.dropout = n_head, n_embd, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.c_fc, self.c_out = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)
        self.drop = nn.Dropout(dropout)

    def attention(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (part.view(rows, length, self.n_head, -1).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.drop(self.c_proj(y.transpose(1, 2).contiguous().view(rows, length, self.n_embd)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.drop(self.c_out(F.gelu(self.c_fc(self.ln_2(x)))))


class Nano(nn.Module):
    """`(ids, targets=None)` to `(logits, loss)`, with a head that is tied to the table."""

    def __init__(
        self, vocab_size: int = 320, block_size: int = 128, n_layer: int = 3, n_head: int = 4, n_embd: int = 96,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(NanoBlock(n_embd, n_head, dropout) for _ in range(n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class GatedLayer(nn.Module):
    """Separate projections with shared key-value heads, gate and up, RMS norms, no biases."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        size = dim // heads
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = (nn.Linear(dim, kv_heads * size, bias=False) for _ in range(2))
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.norm1, self.norm2, self.q_norm = nn.RMSNorm(dim), nn.RMSNorm(dim), nn.RMSNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        given = self.norm1(x)
        q = self.q_norm(self.wq(given).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        k, v = (part(given).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for part in (self.wk, self.wv))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        given = self.norm2(x)
        return x + self.w2(F.silu(self.w1(given)) * self.w3(given))


class Gated(nn.Module):
    """Ids to `{"logits": ...}`: no loss, and the table is read by a function, so that it must stay whole."""

    def __init__(self, words: int, dim: int, heads: int, kv_heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, dim)
        self.layers = nn.ModuleList(GatedLayer(dim, heads, kv_heads, hidden) for _ in range(depth))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)
        return {"logits": F.linear(x, self.table.weight)}


def gated(vocab_size: int = 300, dim: int = 64, n_heads: int = 8, n_kv_heads: int = 4, ffn_dim: int = 176,
          depth: int = 2) -> nn.Module:  # fmt: skip
    """A function that makes the model."""
    return Gated(vocab_size, dim, n_heads, n_kv_heads, ffn_dim, depth)


class Router(nn.Module):
    """A feed-forward whose hidden features go on to that of the next layer, which scales and adds them."""

    def __init__(self, dim: int, hidden: int, is_first: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        if not is_first:
            self.carry = nn.Parameter(torch.full((hidden,), 0.5))

    def forward(self, x: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = self.down(x) if states is None else self.down(x) + states * self.carry
        return self.up(F.silu(hidden)), hidden @ torch.ones_like(hidden[0, 0]).diag().roll(1, 0)


class Carried(nn.Module):
    """Layers of two kinds: of the first the hidden features are independent, of the others they are not."""

    def __init__(
        self, vocab_size: int = 300, dim: int = 64, n_heads: int = 8, hidden: int = 48, depth: int = 3
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(GatedLayer(dim, n_heads, n_heads, 4 * hidden) for _ in range(depth))
        self.routers = nn.ModuleList(Router(dim, hidden, at == 0) for at in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        x, states = self.table(tokens), None
        for layer, router in zip(self.layers, self.routers):
            x = layer(x)
            found, states = router(x, states)
            x = x + found
        return x @ self.table.weight.T


class Frames(nn.Module):
    """Frames of sound, which only the model itself can make up; its output is an object."""

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    def __init__(self, bands: int, width: int, heads: int) -> None:
        super().__init__()
        self.bands = bands
        self.enter = nn.Linear(bands, width)
        self.blocks = nn.ModuleList(NanoBlock(width, heads, 0.0) for _ in range(2))
        self.classes = nn.Linear(width, 10)

    def example_inputs(self) -> dict[str, Any]:
        return {"frames": torch.randn(2, 7, self.bands), "scale": 2.0}

    def forward(self, frames: Tensor, scale: float) -> Output:
        x = self.enter(frames * scale)
        for block in self.blocks:
            x = block(x)
        return Frames.Output(self.classes(x.mean(1)))


def frames() -> nn.Module:
    """A model of one size."""
    return Frames(20, 48, 4)


def blocks_of_sizes(sizes: tuple[int, ...] | list[int], heads: int = 4) -> nn.Module:
    """Sizes in a list: a small model needs --small."""
    return Frames(sizes[0], sizes[1], heads)


class Encoder(nn.Module):
    """torch's own layers, which read the weights of their linear layers where no gradient is asked for."""

    def __init__(self, words: int = 200, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.blocks = nn.ModuleList(NanoBlock(width, heads, 0.0) for _ in range(depth))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.encoder(self.table(ids))
        for block in self.blocks:
            x = block(x)
        return x + self.down(F.gelu(self.up(x)))


class ShortcutBlock(NanoBlock):
    """Reads weights itself where no gradient is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        x = x + self.attention(self.ln_1(x))
        inner = F.gelu(F.linear(self.ln_2(x), self.c_fc.weight, self.c_fc.bias))
        return x + F.linear(inner, self.c_out.weight, self.c_out.bias)


class Shortcut(nn.Module):
    def __init__(self, words: int = 64, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(ShortcutBlock(width, heads, 0.0) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*sizes, bias=False) for sizes in ((width, inner), (width, inner), (inner, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """Experts one by one, chosen by a router."""

    def __init__(self, width: int, inner: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.router, self.top_k = nn.Linear(width, num_experts, bias=False), top_k
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(self.top_k)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, places, None])
        return out.view_as(x)


class Sparsely(nn.Module):
    """A mixture of experts behind attention."""

    def __init__(self, vocab_size: int = 256, dim: int = 64, heads: int = 8, inner: int = 96, num_experts: int = 4,
                 top_k: int = 2, layers: int = 2) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(NanoBlock(dim, heads, 0.0) for _ in range(layers))
        self.mixtures = nn.ModuleList(Mixture(dim, inner, num_experts, top_k) for _ in range(layers))
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block, mixture in zip(self.blocks, self.mixtures):
            x = block(x)
            x = x + mixture(x)
        return self.head(x)


def of_transformers(hidden_size: int = 64, num_attention_heads: int = 8, num_key_value_heads: int = 4,
                    intermediate_size: int = 96, vocab_size: int = 256, num_layers: int = 2) -> nn.Module:  # fmt: skip
    """A model of transformers that a function makes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden_size, num_attention_heads=num_attention_heads, num_key_value_heads=num_key_value_heads,
        intermediate_size=intermediate_size, vocab_size=vocab_size, num_hidden_layers=num_layers,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# what cannot be planned


def raises(**sizes: int) -> nn.Module:
    raise RuntimeError("no weights on this machine")


def leaves() -> nn.Module:
    raise SystemExit(3)


def no_module() -> Any:
    return "a model"


NOT_A_FUNCTION = 3


class Uncounted(Nano):
    """Needs what nobody can make up."""

    def forward(self, idx: Tensor, graph: Any) -> Tensor:  # type: ignore[override]
        return graph(idx)


class Random(Nano):
    """Another output each time, in evaluation too."""

    def forward(self, idx: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(idx)[0] + torch.rand(())


class Counting(Nano):
    """A side effect: it counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, idx: Tensor) -> Tensor:  # type: ignore[override]
        self.calls += 1
        return super().forward(idx)[0] * self.calls


class Sparse(Nano):
    """An output whose shape depends on the values of its input."""

    def forward(self, idx: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(idx)[0][idx % 3 == 0]


class Silent(Nano):
    """An output without a tensor."""

    def forward(self, idx: Tensor) -> str:  # type: ignore[override]
        super().forward(idx)
        return "done"


class BadExample(Nano):
    """Example inputs that are none."""

    def example_inputs(self) -> str:
        return "ids"


class Convolution(nn.Module):
    """Nothing in it can be sharded."""

    def __init__(self, words: int = 64) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(words, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.table(ids).transpose(1, 2))


def too_large() -> nn.Module:
    """A model of one size that is not small."""
    return Nano(n_embd=1024, n_layer=2)


def endless() -> nn.Module:
    while True:
        pass


def hungry() -> nn.Module:
    """A gibibyte at once, whatever the device."""
    torch.ones(2**28, device="cpu")
    return Nano()


def growing() -> nn.Module:
    """A gibibyte bit by bit."""
    kept = [torch.ones(2**18, device="cpu") for _ in range(2**10)]
    return Nano(n_layer=len(kept))


def multiply(x: Tensor, layer: nn.Linear) -> Tensor:
    """A product with the weight of a layer, which is not called."""
    return F.linear(x, layer.weight)


class Peeking(nn.Module):
    """Multiplies by the weight of `down`, in a function that is given the layer."""

    def __init__(self, words: int = 64, width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return multiply(torch.tanh(self.up(self.table(tokens))), self.down)


class Reading(Peeking):
    """Multiplies by the weight of `down` itself."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.up(self.table(tokens))), self.down.weight)
