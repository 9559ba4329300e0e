"""Weights, images and digests that everybody can rebuild: NumPy's frozen legacy generator, seeded by a name."""

import math
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_KEPT = ("running_mean", "running_var", "num_batches_tracked", "pos_embed")
_CACHED_VALUES = 30_000_000
_probe_vectors: dict[tuple[int, int], NDArray[np.float64]] = {}


def random_state(salt: str, key: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(f"{salt}|{key}".encode()))


def weight(salt: str, name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """The state-dict entry of that official name; None where the constructor's own value stays."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _KEPT:
        return None
    z = random_state(salt, f"param|{name}").standard_normal(math.prod(shape)).reshape(shape)
    if leaf == "cls_token":
        z = 0.2 * z
    elif len(shape) >= 2:
        z = z / math.sqrt(math.prod(shape[1:]))
    elif leaf == "weight":
        z = 1 + 0.1 * z
        # The last norm of a bottleneck: with large branches a random ResNet-50 is chaotic.
        z = 0.2 * z if name.endswith(".bn3.weight") else z
    elif leaf == "bias":
        z = 0.05 * z
    else:
        raise ValueError(name)
    return z.astype(np.float32)


def images(salt: str, tag: str, n: int, size: int, view: int) -> torch.Tensor:
    """One of two related views, (n, 3, size, size) in float64, as if already normalised; size is divisible by 4."""
    scale = size // 4
    low = random_state(salt, f"img|{tag}|low").standard_normal((n, 3, 4, 4))
    own = random_state(salt, f"img|{tag}|low|{view}").standard_normal((n, 3, 4, 4))
    noise = random_state(salt, f"img|{tag}|noise|{view}").standard_normal((n, 3, size, size))
    coarse = [a.repeat(scale, axis=2).repeat(scale, axis=3) for a in (low, own)]
    return torch.from_numpy((coarse[0] + 0.3 * coarse[1] + 0.5 * noise).astype(np.float32)).double()


def array(salt: str, key: str, shape: tuple[int, ...], scale: float = 1.0) -> NDArray[np.float32]:
    return (scale * random_state(salt, key).standard_normal(shape)).astype(np.float32)


def digest(tensor: torch.Tensor) -> dict[str, Any]:
    values = tensor.detach().double().numpy()
    flat = values.reshape(-1)
    return {
        "shape": list(values.shape),
        "norm": float(np.sqrt((flat * flat).sum())),
        "absmax": float(np.abs(flat).max()),
        "first": flat[:8].tolist(),
        "last": flat[-4:].tolist(),
        "proj": [float(flat @ _probe_vector(flat.size, j)) for j in range(2)],
    }


def _probe_vector(size: int, j: int) -> NDArray[np.float64]:
    if (size, j) not in _probe_vectors:
        if sum(v.size for v in _probe_vectors.values()) > _CACHED_VALUES:
            _probe_vectors.clear()
        _probe_vectors[size, j] = random_state("probe", f"{size}|{j}").standard_normal(size)
    return _probe_vectors[size, j]
