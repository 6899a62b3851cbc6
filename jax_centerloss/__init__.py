"""Center loss for JAX, with the values of the PyTorch module github.com/KaiyangZhou/pytorch-center-loss.

The loss reads only the rows of the batch's classes. With donated centers, `update_centers` and a
`row_optimizer` also write only these.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jax_centerloss._check_batch import check_batch
from jax_centerloss._distances import distance_map, nearest_center
from jax_centerloss._init import init_centers
from jax_centerloss._loss import center_loss
from jax_centerloss._means import init_from_features
from jax_centerloss._metrics import center_metrics
from jax_centerloss._plot import plot
from jax_centerloss._torch import from_torch, to_torch
from jax_centerloss._update import update_centers

if TYPE_CHECKING:
    from jax_centerloss import linen, nnx
    from jax_centerloss._optim import with_center_optimizer
    from jax_centerloss._row_optimizer import row_optimizer

__version__ = "0.1.0"

# Imported when first used: importing the package costs no more than importing jax.
_LAZY = {
    "linen": "linen",
    "nnx": "nnx",
    "row_optimizer": "_row_optimizer",
    "with_center_optimizer": "_optim",
}

__all__ = [
    "center_loss",
    "center_metrics",
    "check_batch",
    "distance_map",
    "from_torch",
    "init_centers",
    "init_from_features",
    "linen",
    "nearest_center",
    "nnx",
    "plot",
    "row_optimizer",
    "to_torch",
    "update_centers",
    "with_center_optimizer",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        hint = ": the modules are nnx.CenterLoss and linen.CenterLoss" if name == "CenterLoss" else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    return module if name == _LAZY[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
