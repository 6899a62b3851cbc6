"""Time of a training step of a softmax head of many classes: the loss, the features' gradient, Adam's step.

python benchmarks/head.py            # prints the table; needs torch, what the examples need, and 12 GiB
python benchmarks/head.py --quick    # 10,000 classes alone

The softmax of the first four is over the batch's own classes and 4,096 drawn ones, that of the last over all:

- "here": the rows of these classes are moved by `row_optimizer(optax.adam(...)).apply_gradients`;
- "plain JAX": the same by hand, the rows of moments gathered, updated and scattered, donated;
- "torch, sparse": an embedding with sparse gradients, and SparseAdam;
- "Partial FC": as insightface describes it, with its AdamW without weight decay. It draws by the largest of C
  random numbers, in which those of the batch's classes are above all others;
- "full softmax": optax.adam on the whole table, donated.

Batches, with their drawn classes, are made ahead and taken in turn; Partial FC draws in its step. Torch is
timed with one thread and with all, and the faster of both counts.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from timing import alternate, keep_freed_memory
from torch.nn import functional

import jax_centerloss as jcl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from words import distinct_classes, rows_of, sampled_softmax

SAMPLES, FEATURES, DRAWN, RATE = 256, 128, 4096, 1e-3
CLASSES = (10_000, 100_000, 1_000_000)
BATCHES = 50
Step = Callable[[], object]
Batch = tuple[np.ndarray, ...]  # Features, labels, and the classes that are drawn.


def here(optimizer: Any, held: Any, x: jax.Array, labels: jax.Array, drawn: jax.Array) -> Any:
    table, state = held
    classes = distinct_classes(labels, drawn, len(table))
    loss, grads = jax.value_and_grad(sampled_softmax, (0, 1))(x, rows_of(table, classes), classes, labels)
    return optimizer.apply_gradients(table, state, classes, grads[1], after=(loss, grads)), loss, grads[0]


def plain(held: Any, x: jax.Array, labels: jax.Array, drawn: jax.Array) -> Any:
    table, (count, mean, square) = held
    classes = distinct_classes(labels, drawn, len(table))
    loss, grads = jax.value_and_grad(sampled_softmax, (0, 1))(x, rows_of(table, classes), classes, labels)
    count = count + 1
    means = 0.9 * rows_of(mean, classes) + 0.1 * grads[1]
    squares = 0.999 * rows_of(square, classes) + 0.001 * grads[1] ** 2
    step = -RATE * (means / (1 - 0.9**count)) / (jnp.sqrt(squares / (1 - 0.999**count)) + 1e-8)
    place = jnp.where(classes >= 0, classes, len(table))
    table = table.at[place].add(step, mode="drop")
    moments = (old.at[place].set(new, mode="drop") for old, new in ((mean, means), (square, squares)))
    return (table, (count, *moments)), loss, grads[0]


def full(tx: Any, held: Any, x: jax.Array, labels: jax.Array, drawn: jax.Array) -> Any:
    table, state = held

    def loss_fn(x: jax.Array, table: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(x @ table.T, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn, (0, 1))(x, table)
    updates, state = tx.update(grads[1], state, table)
    return (optax.apply_updates(table, updates), state), loss, grads[0]


def in_jax(step: Callable[..., Any], held: Any, batches: list[Batch]) -> Step:
    program = jax.jit(step, donate_argnums=0)
    turns = itertools.cycle([[jnp.asarray(array) for array in batch] for batch in batches])

    def call() -> None:
        nonlocal held
        held, *rest = program(held, *next(turns))
        jax.block_until_ready((held, rest))

    return call


def in_torch(batches: list[Batch]) -> Iterator[list[torch.Tensor]]:
    turns = [[torch.from_numpy(array) for array in batch] for batch in batches]
    return itertools.cycle([[x.requires_grad_(), *rest] for x, *rest in turns])


def torch_sparse(table: np.ndarray, batches: list[Batch]) -> Step:
    weight = torch.nn.Parameter(torch.from_numpy(table.copy()))
    optimizer = torch.optim.SparseAdam([weight], lr=RATE)
    turns = in_torch(batches)

    def call() -> None:
        x, labels, drawn = next(turns)
        x.grad = weight.grad = None
        classes = torch.unique(torch.cat([labels, drawn]))
        logits = x @ functional.embedding(classes, weight, sparse=True).T
        functional.cross_entropy(logits, torch.searchsorted(classes, labels)).backward()
        optimizer.step()

    return call


def partial_fc(table: np.ndarray, batches: list[Batch]) -> Step:
    weight = torch.from_numpy(table.copy())
    moments = torch.zeros_like(weight), torch.zeros_like(weight)
    turns, count = in_torch(batches), 0

    def call() -> None:
        nonlocal count
        x, labels, drawn = next(turns)
        chance = torch.rand(len(weight))
        positive = torch.unique(labels)
        chance[positive] = 2.0
        classes = torch.topk(chance, min(len(labels) + len(drawn), len(weight))).indices.sort().values
        rows = weight[classes].requires_grad_()
        x.grad = None
        functional.cross_entropy(x @ rows.T, torch.searchsorted(classes, labels)).backward()
        count += 1
        with torch.no_grad():
            mean = moments[0][classes].lerp_(rows.grad, 0.1)
            square = moments[1][classes].mul_(0.999).addcmul_(rows.grad, rows.grad, value=0.001)
            size = (square / (1 - 0.999**count)).sqrt_().add_(1e-8)
            weight[classes] = rows.addcdiv(mean, size, value=-RATE / (1 - 0.9**count))
            moments[0][classes], moments[1][classes] = mean, square

    return call


def with_threads(number: int, step: Step) -> Step:
    def call() -> None:
        torch.set_num_threads(number)
        step()

    return call


def peers(c: int) -> dict[str, list[Step]]:
    """The steps of each peer, of which the fastest counts."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((c, FEATURES), dtype=np.float32) / np.float32(FEATURES**0.5)
    batches = [
        (
            rng.standard_normal((SAMPLES, FEATURES), dtype=np.float32),
            rng.integers(0, c, SAMPLES),
            rng.choice(c, DRAWN, replace=False),
        )
        for _ in range(BATCHES)
    ]
    by_rows, dense = jcl.row_optimizer(optax.adam(RATE)), optax.adam(RATE)
    zeros = jnp.zeros((), jnp.int32), jnp.zeros_like(table), jnp.zeros_like(table)
    threads = {1, torch.get_num_threads()}

    def of_torch(make: Callable[..., Step]) -> list[Step]:
        step = make(table, batches)
        return [with_threads(number, step) for number in threads]

    return {
        "here": [in_jax(partial(here, by_rows), (jnp.array(table), by_rows.init(jnp.array(table))), batches)],
        "plain JAX": [in_jax(plain, (jnp.array(table), zeros), batches)],
        "torch, sparse": of_torch(torch_sparse),
        "Partial FC": of_torch(partial_fc),
        "full softmax": [
            in_jax(partial(full, dense), (jnp.array(table), dense.init(jnp.array(table))), batches)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10,000 classes alone")
    parser.add_argument("--seconds", type=float, default=5, help="time for each library (default: 5)")
    args = parser.parse_args()
    keep_freed_memory()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__}", end="; ")
    print(f"{SAMPLES} samples, {FEATURES} features, {DRAWN} drawn classes.\nMilliseconds a step, medians:\n")
    for c in CLASSES[:1] if args.quick else CLASSES:
        found = peers(c)
        if c == CLASSES[0]:
            print(f"| classes | {' | '.join(found)} |\n|--:|{'--:|' * len(found)}")
        # The steps in JAX in turn, then those in torch, whose threads spin for a while after each call, then
        # the full softmax, after which caches are full of its logits.
        groups = [[*found["here"], *found["plain JAX"]], [*found["torch, sparse"], *found["Partial FC"]]]
        took = iter([t for group in (*groups, found["full softmax"]) for t in alternate(group, args.seconds)])
        best = [min(next(took) for _ in steps) for steps in found.values()]
        print(f"| {c:,} | {' | '.join(f'{1e3 * t:.1f}' for t in best)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
