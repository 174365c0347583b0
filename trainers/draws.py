"""Counter-based randomness: every draw is a pure function of (seed, stream, ...), on any device and in any order.

A process with a generator of its own draws other numbers after a restart, or on another number of ranks; a hash of
the counters does not, and nothing of it has to be saved. The hash is splitmix64 (Steele, Lea and Flood 2014), chained:
h = mix(h + part). The integers are exact, so CPU and GPU agree to the bit. It is no cryptography, and it draws no
permutations (the order of an epoch is the store's business).
"""

# legend: B items, n draws for each item, D embedding

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

# one stream per purpose: two purposes with equal counters must not share their draws
NEGATIVES = 0x6E656761  # "nega"
HARD = 0x68617264  # "hard"
BANK = 0x62616E6B  # "bank"


def _signed(x: int) -> int:
    """The int64 with the bits of `x` modulo 2^64 (torch has no complete uint64)."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: Tensor, places: int) -> Tensor:
    """Logical shift: torch's `>>` copies the sign bit."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64's output for the state `x` (int64, any shape), element by element."""
    x = x + _signed(_STEP)
    x = (x ^ _shift_right(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift_right(x, 27)) * _signed(_SECOND)
    return x ^ _shift_right(x, 31)


def mix_integer(x: int) -> int:
    """The same for one Python integer, result in [0, 2^64)."""
    x = (x + _STEP) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    """One 64-bit key of integers in a given order: key(1, 2) differs from key(2, 1)."""
    h = 0
    for part in parts:
        h = mix_integer(h + int(part))
    return h


def bits(base: int, items_B: list[Tensor], n: int) -> Tensor:
    """(B, n) int64 of random bits, a function of `base` and of the item's own counters (each (B,) int64)."""
    h = torch.full_like(items_B[0], _signed(base))
    for item_B in items_B:
        h = mix(h + item_B)
    return mix(h[:, None] + torch.arange(n, device=h.device))


def below(bits: Tensor, bound: Tensor | int) -> Tensor:
    """Integers in [0, bound) from the upper 32 bits; the bias is below bound / 2^32. `bound` < 2^31."""
    return (_shift_right(bits, 32) * bound) >> 32


def unit_vectors(seed: int, first: int, last: int, vectors: int, dim: int) -> Tensor:
    """(last - first, vectors, dim) float64 on the CPU: for each row, `vectors` uniform directions on the sphere.

    Normalised Gaussians by Box and Muller; row i depends on (seed, i) alone, whatever block it is computed in.
    """
    rows = torch.arange(first, last)
    pairs = (vectors * dim + 1) // 2
    word = bits(key(seed, BANK), [rows], 2 * pairs)
    u = (_shift_right(word, 11).double() + 0.5) * 2.0**-53  # (0, 1), never 0: its logarithm is taken
    radius, angle = torch.sqrt(-2 * torch.log(u[:, :pairs])), 2 * math.pi * u[:, pairs:]
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)[:, : vectors * dim]
    return torch.nn.functional.normalize(normal.view(len(rows), vectors, dim), dim=-1)
