"""A check that shows under `checkify` and costs nothing elsewhere.

`checkify.debug_check` vanishes from the compiled code too, but its effect stays on the program, and JAX runs
programs with effects outside its fast dispatch: some 0.1 ms on every call of the user's training step, and
an error under `remat` in JAX 0.7. Here the check sits in the jaxpr of a call without effects, which
`checkify` opens as it opens every call, and all else reads as the identity.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import checkify
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

Check = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def debug_check(value: jax.Array, message: str, check: Check, *arrays: jax.Array) -> jax.Array:
    """`value`, which must be used, with a `checkify` error of that message if a check fails.

    `check(*arrays)` returns whether all is well, a scalar, and the scalars that `message` shows; it runs
    nowhere else. It has to be the same object in every call, or each would trace it anew.
    """
    args = tuple(jax.lax.stop_gradient(a) for a in (value, *arrays))
    result: jax.Array = _check.bind(*args, call_jaxpr=_traced(message, check, *map(jax.typeof, args)))[0]
    return result


@functools.lru_cache(maxsize=512)
def _traced(message: str, check: Check, *types: Any) -> ClosedJaxpr:
    def checked(value: jax.Array, *arrays: jax.Array) -> jax.Array:
        ok, shown = check(*arrays)
        checkify.debug_check(ok, message, **shown)
        return value

    return jax.make_jaxpr(checked)(*types)


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


@functools.lru_cache(maxsize=512)
def _mapped(call_jaxpr: ClosedJaxpr, dims: tuple[int | None, ...], *types: Any) -> ClosedJaxpr:
    def checked(*args: jax.Array) -> jax.Array:
        jax.vmap(jaxpr_as_fun(call_jaxpr), in_axes=dims)(*args)
        return args[0]

    return jax.make_jaxpr(checked)(*types)


def _batched(args: Any, dims: Any, *, call_jaxpr: Any) -> Any:
    mapped = _mapped(call_jaxpr, tuple(dims), *map(jax.typeof, args))
    return _check.bind(*args, call_jaxpr=mapped), dims[:1]


_check: Any = _Check("centerloss_check")
_check.def_impl(_first)
_check.def_abstract_eval(_first)
mlir.register_lowering(_check, lambda ctx, value, *_, **__: [value])
batching.primitive_batchers[_check] = _batched
