"""Packed codes to numbers through a table of all bytes: a look per byte, for one number or two."""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.numerics.codec import Codec

__all__ = ["look_up", "takes"]

# By identity, since a codec of a plugin may have no hash; it is kept alive beside its table.
_TABLES: dict[tuple[int, int, torch.device], tuple[Codec, Tensor | None]] = {}


def takes(codes: Tensor) -> bool:
    """Whether a tensor is one of numbers in memory: compilers and functorch get arithmetic."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(codes)
    return type(codes) is Tensor and codes.element_size() == 1 and not wrapped


def look_up(codes: Tensor, codec: Codec, *, nibbles: bool, length: int) -> Tensor | None:
    """Return the numbers that codes stand for, `Codec.load` of them.

    Args:
        codes: Bytes that hold one code each, or two.
        codec: The codec.
        nibbles: Whether it is two, the even index in the low nibble (`pack_nibbles`).
        length: Extent of the last axis before packing.

    Returns:
        Float32; ``None`` where the codec does not know what some bytes stand for.
    """
    table = _table(codec, nibbles=nibbles, device=codes.device)
    if table is None:
        return None
    index = codes.reshape(-1).view(torch.uint8).int()
    found = table.index_select(0, index).view(torch.float32)
    return found.view(*codes.shape[:-1], -1)[..., :length]


def _table(codec: Codec, *, nibbles: bool, device: torch.device) -> Tensor | None:
    """Return 256 float32 numbers, or pairs of them as int64."""
    key = (id(codec), 4 if nibbles else 8, device)
    if key not in _TABLES:
        with torch.inference_mode(False), torch.no_grad():
            made = _made(codec, nibbles=nibbles)
            _TABLES[key] = (codec, None if made is None else made.to(device))
    return _TABLES[key][1]


def _made(codec: Codec, *, nibbles: bool) -> Tensor | None:
    every = torch.arange(16 if nibbles else 256, dtype=torch.uint8)  # on the CPU: it may fail
    if codec.storage == torch.int8 and nibbles:
        every = (every ^ 8).to(torch.int8) - 8  # two's complement
    try:
        numbers = codec.load(every.view(codec.storage)).float()
    except IndexError:  # a codebook with fewer numbers than bits could count
        return None
    if not nibbles:
        return numbers
    pairs = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], -1)
    return pairs.contiguous().view(torch.int64).view(-1)
