"""A check that shows under `checkify` and costs nothing elsewhere.

`checkify.debug_check` vanishes from the compiled code too, but its effect stays on the program, and JAX runs
programs with effects outside its fast dispatch: some 0.1 ms on every call of the user's training step, and
an error under `remat` in JAX 0.7. Here the check sits in the jaxpr of a call without effects, which
`checkify` opens as it opens every call, and all else reads as the identity.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def debug_check(value: jax.Array, ok: jax.Array, message: str, /, **values: jax.Array) -> jax.Array:
    """`value`, which must be used, with a `checkify` error if the scalar `ok` is false.

    `values` are scalars of which the largest are shown in `message` where a batch of checks fails.
    """

    def checked(value: jax.Array, ok: jax.Array, *shown: jax.Array) -> jax.Array:
        checkify.debug_check(ok, message, **dict(zip(values, shown, strict=True)))
        return value

    args = (value, ok, *values.values())
    result: jax.Array = _check.bind(*args, call_jaxpr=jax.make_jaxpr(checked)(*args))[0]
    return result


class _Check(Primitive):
    multiple_results = True

    def bind(self, *args: Any, subfuns: Any = (), **params: Any) -> Any:
        # How checkify binds a call that it has opened: by `subfuns`, or with the function first in JAX 0.7.
        if hasattr(args[0], "call_wrapped"):
            subfuns, args = args[:1], args[1:]
        if subfuns:
            return subfuns[0].call_wrapped(*args)
        return super().bind(*args, **params)  # type: ignore[no-untyped-call]  # JAX leaves it unannotated.


def _first(value: Any, *_: Any, **__: Any) -> list[Any]:
    return [value]


def _batched(args: Any, dims: Any, *, call_jaxpr: Any) -> Any:
    def one(arg: jax.Array, dim: int | None, reduce: Any) -> jax.Array:
        return arg if dim is None else reduce(arg, axis=dim)

    value, ok, *shown = args
    ok = one(ok, dims[1], jnp.all)
    shown = [one(a, dim, jnp.max) for a, dim in zip(shown, dims[2:], strict=True)]
    return _check.bind(value, ok, *shown, call_jaxpr=call_jaxpr), dims[:1]


_check: Any = _Check("centerloss_check")
_check.def_impl(_first)
_check.def_abstract_eval(_first)
mlir.register_lowering(_check, lambda ctx, value, *_, **__: [value])
batching.primitive_batchers[_check] = _batched
