"""Models of sequences in the zoo, hand-made: attention, recurrence, transposes, sharing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracing_zoo.entry import Entry, Inputs, image, tokens

__all__ = ["SEQUENTIAL"]

VOCAB = 37


class MixerBlock(nn.Module):
    """One MLP over the patches, one over the channels."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.token_up, self.token_down = nn.Linear(patches, 10), nn.Linear(10, patches)
        self.channel_up, self.channel_down = nn.Linear(channels, 22), nn.Linear(22, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).transpose(1, 2)
        x = x + self.token_down(F.gelu(self.token_up(y))).transpose(1, 2)
        return x + self.channel_down(F.gelu(self.channel_up(self.norm2(x))))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 2, 2)
        self.block = MixerBlock(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.block(x).mean(1))


class Attention(nn.Module):
    """Grouped-query attention, written out; values are wider than keys."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim = heads, kv_heads, 5, 7
        self.scale = self.head_dim**-0.5
        self.q = nn.Linear(width, heads * self.head_dim)
        self.k = nn.Linear(width, kv_heads * self.head_dim)
        self.v = nn.Linear(width, kv_heads * self.value_dim)
        self.o = nn.Linear(heads * self.value_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, -1, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, s, -1, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, s, -1, self.value_dim).transpose(1, 2)
        repeats = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    """Two pre-norm blocks; the head may be the embedding, the blocks may be one."""

    def __init__(self, *, tied: bool = False, repeated: bool = False) -> None:
        super().__init__()
        width = 18
        self.embed = nn.Embedding(VOCAB, width)
        count = 1 if repeated else 2
        self.attention = nn.ModuleList(Attention(width, 12, 4) for _ in range(count))
        self.mlp = nn.ModuleList(GatedMLP(width, 22) for _ in range(count))
        self.norm1 = nn.ModuleList(nn.RMSNorm(width) for _ in range(count))
        self.norm2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(count))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.order = (0, 0) if repeated else (0, 1)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for i in self.order:
            x = x + self.attention[i](self.norm1[i](x))
            x = x + self.mlp[i](self.norm2[i](x))
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """What torch ships: TransformerEncoder on nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 24)
        layer = nn.TransformerEncoderLayer(24, 4, 22, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input_ids)).mean(1))


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 24)
        self.memory = nn.Linear(6, 14)
        self.attention = nn.MultiheadAttention(24, 4, kdim=14, vdim=14, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.relu(self.memory(x))
        return self.head(self.attention(self.query(x), memory, memory, need_weights=False)[0])


class Recurrent(nn.Module):
    """A recurrent classifier of two layers."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 10)
        self.first = kind(10, 14, batch_first=True)
        self.second = kind(14, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.second(self.first(self.embed(input_ids))[0])[0]
        return self.head(x[:, -1])


class Twice(nn.Module):
    """A module called twice on its own output: its two dimensions are one."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 10)
        self.again = nn.Linear(10, 10)
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        return self.out(torch.tanh(self.again(torch.tanh(self.again(x)))))


class Shared(nn.Module):
    """One parameter under two names, with different biases."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 10)
        self.left = nn.Linear(10, 14)
        self.right = nn.Linear(10, 14)
        self.right.weight = self.left.weight
        self.out = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inp(x))
        return self.out(torch.relu(self.left(x)) * torch.tanh(self.right(x)))


class Fused(nn.Module):
    """One projection for queries, keys and values, one for gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.hidden = 4, 6, 22
        self.embed = nn.Embedding(VOCAB, 18)
        self.norm1, self.norm2 = nn.LayerNorm(18), nn.LayerNorm(18)
        self.qkv = nn.Linear(18, 3 * 24)
        self.o = nn.Linear(24, 18)
        self.gate_up = nn.Linear(18, 2 * 22)
        self.down = nn.Linear(22, 18)
        self.head = nn.Linear(18, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        b, s, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, s, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, -1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return self.head(x + self.down(F.silu(gate) * up))


class Einsum(nn.Module):
    """Bare parameters and einsum, as research code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.inp_weight = nn.Parameter(torch.zeros(6, 4, 5))
        self.mix_weight = nn.Parameter(torch.zeros(4, 5, 7))
        self.out_weight = nn.Parameter(torch.zeros(4, 7, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.einsum("bsi,ihd->bshd", x, self.inp_weight))
        x = torch.tanh(torch.einsum("bshd,hde->bhse", x, self.mix_weight))
        return torch.einsum("bhse,heo->bso", x, self.out_weight)


def features(size: int = 6, length: int = 5) -> Inputs:
    """Two random sequences of vectors."""
    return lambda generator: {
        "x": torch.randn(2, length, size, generator=generator, dtype=torch.float64)
    }


SEQUENTIAL = (
    Entry("mixer", Mixer, image()),
    Entry("decoder", Decoder, tokens(VOCAB)),
    Entry("tied", lambda: Decoder(tied=True), tokens(VOCAB)),
    Entry("repeated", lambda: Decoder(repeated=True), tokens(VOCAB)),
    Entry("torch_encoder", Encoder, tokens(VOCAB)),
    Entry("cross_attention", CrossAttention, features()),
    Entry("lstm", lambda: Recurrent(nn.LSTM), tokens(VOCAB)),
    Entry("gru", lambda: Recurrent(nn.GRU), tokens(VOCAB)),
    Entry("twice", Twice, features()),
    Entry("shared", Shared, features()),
    Entry("fused", Fused, tokens(VOCAB)),
    Entry("einsum", Einsum, features()),
)
