"""Random numbers as a pure function of (seed, stream, epoch, video, draw): no generator, no state to checkpoint.

Definition (all arithmetic modulo 2**64), so that anyone can write a twin of it, on any device, in any language:

    mix(x):  z = x + 0x9E3779B97F4A7C15                          the finaliser of splitmix64 with its golden-gamma step
             z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9            (Steele, Lea, Flood: "Fast splittable pseudorandom
             z = (z ^ (z >> 27)) * 0x94D049BB133111EB             number generators", OOPSLA 2014)
             return z ^ (z >> 31)
    h        = mix(mix(mix(mix(mix(seed) + stream) + epoch) + video) + draw)
    bits[i]  = mix(h + i)                                        i = 0 .. n-1
    uniform  = (bits >> 11) * 2**-53                             in [0, 1), exact in float64

`stream` is a number of `STREAMS`; numbers in it are never reused, since old runs are resumed by them. `video` is
whatever integer names the video for the whole run (its row in the run's selection). Only NumPy, same on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from avstore.errors import UsageError, did_you_mean

# What a random number is for. Two streams never share numbers, so that adding a draw to one leaves the others alone.
STREAMS: dict[str, int] = {
    "order": 1,  # the order of an epoch's (video, draw) pairs
    "window": 2,  # where a clip is cut
    "augment": 3,  # crops, flips, colour
    "augment-sound": 4,  # gain, masks and resize-crops of the sound
    "negatives": 5,  # entries of the memory bank
    "mask": 6,  # masked time steps
    "dropout": 7,
    "init": 8,  # weights and banks
    "select": 9,  # subsets of a store
    "cluster": 10,  # k-means
    "shuffle": 11,  # derangements, shuffled frames and sounds of the rivals
    "probe": 12,  # linear probes: their splits and batches
}

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = (np.uint64(s) for s in (30, 27, 31, 11))

Ints = int | np.integer[Any] | NDArray[np.integer[Any]]


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, golden-gamma step included; uint64 array in, uint64 array of the same shape out."""
    with np.errstate(over="ignore"):  # wrapping is the arithmetic meant; NumPy warns of it for scalars only
        z = np.asarray(x, np.uint64) + _GAMMA
        z = (z ^ (z >> _S30)) * _M1
        z = (z ^ (z >> _S27)) * _M2
        return z ^ (z >> _S31)


def bits(seed: int, stream: str, epoch: Ints, video: Ints, draw: Ints, n: int = 1) -> NDArray[np.uint64]:
    """64 random bits, `n` of them for each (epoch, video, draw).

    epoch, video, draw: integers or integer arrays >= 0 that broadcast to a shape S; seed: any integer (modulo 2**64).
    Returns uint64 of shape S + (n,). The first n of a longer call are those of a shorter one.
    Raises UsageError for an unknown stream, a negative or non-integer index, n < 0.
    """
    if stream not in STREAMS:
        raise UsageError(f"no stream of random numbers is called {stream!r}", did_you_mean(stream, STREAMS))
    if n < 0:
        raise UsageError(f"cannot draw {n} numbers", "n must be 0 or more")
    h: NDArray[np.uint64] = mix(np.array([int(seed) & 0xFFFFFFFFFFFFFFFF], np.uint64))
    h = mix(h + np.uint64(STREAMS[stream]))
    for name, value in (("epoch", epoch), ("video", video), ("draw", draw)):
        index = _index(name, value)[..., None]
        h = mix(np.asarray(h + index, np.uint64))
    return mix(np.asarray(h + np.arange(n, dtype=np.uint64), np.uint64))


def uniform(seed: int, stream: str, epoch: Ints, video: Ints, draw: Ints, n: int = 1) -> NDArray[np.float64]:
    """`bits` as float64 in [0, 1), of 53 bits each; same arguments, shapes and errors."""
    return to_uniform(bits(seed, stream, epoch, video, draw, n))


def to_uniform(random: NDArray[np.uint64]) -> NDArray[np.float64]:
    """uint64 bits -> float64 in [0, 1): the upper 53 bits, exactly."""
    return (np.asarray(random, np.uint64) >> _S11).astype(np.float64) * 2.0**-53


def integers(u: NDArray[np.float64], low: Ints, high: Ints) -> NDArray[np.int64]:
    """Uniform numbers u in [0, 1) -> int64 in [low, high], both ends included; broadcast.

    Exact for ranges below 2**53, where the least likely value is missed by less than range * 2**-53 of its share.
    Raises UsageError where high < low.
    """
    lo, hi = np.asarray(low, np.int64), np.asarray(high, np.int64)
    if np.any(hi < lo):
        raise UsageError("cannot draw an integer from an empty range", "an upper end lies below its lower end")
    span = hi - lo + 1
    return lo + np.minimum(np.floor(u * span).astype(np.int64), span - 1)


def _index(name: str, value: Ints) -> NDArray[np.uint64]:
    array: NDArray[Any] = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise UsageError(f"{name} must be an integer, not {array.dtype}", "random numbers are keyed by integers")
    if array.dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise UsageError(f"{name} is negative", f"the smallest is {int(array.min())}; numbers start at 0")
    return array.astype(np.uint64)
