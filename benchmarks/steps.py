"""Training steps that the benchmarks compile for devices that are not here, and run on one that is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

import jax_centerloss as jcl
from jax_centerloss._checks import RULES

CELLS = [(n, d, c) for n in (128, 1024, 8192) for d in (2, 128, 512) for c in (10, 1_000, 1_000_000)]
QUICK = [(1024, 128, 10), (1024, 128, 1_000), (1024, 128, 1_000_000)]
ADAM = jcl.row_optimizer(optax.adam(0.1))
HALF_ADAM = jcl.row_optimizer(optax.adam(0.1), state_dtype=jnp.bfloat16)


def loss_and_gradient(centers, x, labels):
    return jax.value_and_grad(lambda x: jcl.center_loss(centers, x, labels))(x)


def by_rule(rule, centers, x, labels, key=None):
    loss, gradient = loss_and_gradient(centers, x, labels)
    moved = jcl.update_centers(centers, x, labels, rule=rule, after=loss, rounding_key=key)
    return moved, loss, gradient


def by_rows(optimizer, held, x, labels, key=None):
    loss, gradient = loss_and_gradient(held[0], x, labels)
    return optimizer.update(*held, x, labels, after=loss, rounding_key=key), loss, gradient


def plain_loss(x, rows):
    return jnp.mean(jnp.sum((x - rows) ** 2, axis=-1))


def plain_rule(rule, centers, x, labels):
    """A step by rule as a JAX user would write it: no masks, no checks, nothing of this library."""
    loss, gradient = jax.value_and_grad(plain_loss)(x, centers[labels])
    difference = x - centers[labels]
    if rule == "paper":
        counts = jnp.zeros(len(centers)).at[labels].add(1)[labels]
        step = 0.5 * difference / (1 + counts)[:, None]
    else:
        step = 0.5 * 2 / len(x) * difference
    return centers.at[labels].add(step), loss, gradient


def plain_adam(held, x, labels):
    """Adam by rows in the same way: the moments of the batch's classes are read, updated and written."""
    centers, (count, mean, square) = held
    loss, gradient = jax.value_and_grad(plain_loss)(x, centers[labels])
    classes, slots = jnp.unique(labels, return_inverse=True, size=len(x), fill_value=len(centers))
    sums = jax.ops.segment_sum(-gradient, slots, len(x))
    count = count + 1
    means = 0.9 * mean[classes] + 0.1 * sums
    squares = 0.999 * square[classes] + 0.001 * sums**2
    step = -0.1 * (means / (1 - 0.9**count)) / (jnp.sqrt(squares / (1 - 0.999**count)) + 1e-8)
    moved = centers.at[classes].add(step, mode="drop")
    moments = mean.at[classes].set(means, mode="drop"), square.at[classes].set(squares, mode="drop")
    return (moved, (count, *moments)), loss, gradient


def plain_state(centers):
    return jnp.zeros((), jnp.int32), jnp.zeros_like(centers), jnp.zeros_like(centers)


def dense(centers, x, labels):
    return jax.value_and_grad(jcl.center_loss, (0, 1))(centers, x, labels)


def scatter_add(centers, x, labels):
    """Not a step: what a plain sum by class becomes, to compare with."""
    return centers.at[labels].add(x, mode="drop")


class Net(nnx.Module):
    def __init__(self, classes, width, rngs):
        self.features, self.head = nnx.Linear(64, width, rngs=rngs), nnx.Linear(width, 10, rngs=rngs)
        self.center_loss = jcl.nnx.CenterLoss(classes, width, centers_as="state", rngs=rngs)


def objective(x, logits, labels, center_loss):
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels % 10).mean()
    return cross_entropy + 0.1 * center_loss(x, labels)


def nnx_step(classes, width):
    """The README's step with NNX, of a head for ten classes, on split state."""

    def make():
        model = Net(classes, width, nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    graph, state = nnx.split(nnx.eval_shape(make))

    def step(state, images, labels):
        model, optimizer = nnx.merge(graph, state)

        def loss_fn(model):
            x = model.features(images)
            return objective(x, model.head(x), labels, model.center_loss), x

        (loss, x), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        model.center_loss.update_centers(x, labels, after=loss)
        return nnx.state((model, optimizer)), loss

    return step, state


class LinenNet(linen.Module):
    classes: int
    width: int

    @linen.compact
    def __call__(self, images, labels):
        x = linen.Dense(self.width)(images)
        center_loss = jcl.linen.CenterLoss(self.classes, self.width, centers_as="state")
        return objective(x, linen.Dense(10)(x), labels, center_loss)


def linen_step(classes, width):
    """The README's step with Linen, of a head for ten classes."""
    net, tx = LinenNet(classes, width), optax.adam(1e-3)
    images, labels = jnp.zeros((1, 64)), jnp.zeros(1, jnp.int32)
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), images, labels))
    held = variables, jax.eval_shape(tx.init, variables["params"])

    def step(held, images, labels):
        variables, opt_state = held

        def loss_fn(params):
            return net.apply(variables | {"params": params}, images, labels, mutable=["centers"])

        (loss, moved), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return (moved | {"params": params}, opt_state), loss

    return step, held


def program(name: str, n: int, d: int, c: int) -> tuple[Callable[..., Any], Any]:
    """A step, and the shapes of what it takes: what it holds first, which is donated, then the batch."""
    shape = jax.ShapeDtypeStruct
    table = shape((c, d), jnp.float32)
    x, labels = shape((n, d), jnp.float32), shape((n,), jnp.int32)
    if name == SCATTER:
        return scatter_add, (table, x, labels)
    if name in PLAIN_RULES:
        return partial(plain_rule, PLAIN_RULES[name]), (table, x, labels)
    if name == PLAIN_ADAM:
        return plain_adam, ((table, jax.eval_shape(plain_state, table)), x, labels)
    if name in RULES:
        return partial(by_rule, name), (table, x, labels)
    half, key = shape((c, d), jnp.bfloat16), shape((2,), jnp.uint32)
    if name == HALF:
        return partial(by_rule, "paper"), (half, x, labels)
    if name == ROUNDED:
        return partial(by_rule, "paper"), (half, x, labels, key)
    if name == HALF_ROWS:
        return partial(by_rows, HALF_ADAM), ((half, jax.eval_shape(HALF_ADAM.init, half)), x, labels, key)
    if name in ("NNX", "Linen"):
        step, held = {"NNX": nnx_step, "Linen": linen_step}[name](c, d)
        return step, (held, shape((n, 64), jnp.float32), labels)
    if name == "row Adam":
        return partial(by_rows, ADAM), ((table, jax.eval_shape(ADAM.init, table)), x, labels)
    return (dense, (table, x, labels)) if name == "dense gradient" else (jcl.nearest_center, (table, x))


SCATTER = "`.at[].add`"
PLAIN_RULES = {"plain paper": "paper", "plain gradient": "gradient"}
PLAIN_ADAM = "plain Adam"
PLAIN = (*PLAIN_RULES, PLAIN_ADAM)  # By hand, for a device at hand.
HALF, ROUNDED, HALF_ROWS = "bfloat16, paper", "bfloat16, paper, with a key", "bfloat16, row Adam, with a key"
IN_HALF = (HALF, ROUNDED, HALF_ROWS)
STEPS = (SCATTER, *RULES, "row Adam", "dense gradient", "nearest_center", "NNX", "Linen", *IN_HALF)
