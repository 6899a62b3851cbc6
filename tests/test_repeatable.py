"""The same seed gives the same bits in every process; a long run takes no more memory than a short one."""

import hashlib
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pytest

import jax_centerloss as jcl

C, D, N = 1000, 8, 64
STEPS = 20


def digest(tree):
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def run():
    """Every way to move centers, with a class that half of the batch is of, and the bits that come out."""
    keys = jax.random.split(jax.random.key(7), 3)
    params = jcl.init_centers(keys[0], C, D)
    x = jax.random.normal(keys[1], (STEPS, N, D))
    labels = jax.random.randint(keys[2], (STEPS, N), -1, C).at[:, ::2].set(3)
    rows = jcl.row_optimizer(optax.adam(0.1))

    @jax.jit
    def step(paper, gradient, by_rows, state, dense, x, labels):
        loss, grads = jax.value_and_grad(jcl.center_loss, (0, 1))(dense, x, labels)
        dense = jax.tree.map(lambda c, g: c - 0.5 * g, dense, grads[0])
        paper = jcl.update_centers(paper, x, labels)
        gradient = jcl.update_centers(gradient, x, labels, rule="gradient")
        by_rows, state = rows.update(by_rows, state, x, labels)
        return (paper, gradient, by_rows, state, dense), (loss, grads[1])

    with jax.numpy_dtype_promotion("standard"):
        carry, outputs = (params, params, params, rows.init(params), params), []
        for i in range(STEPS):
            carry, output = step(*carry, x[i], labels[i])
            outputs.append(output)
    return digest((carry, outputs))


@pytest.mark.slow
def test_the_same_bits_in_every_process_and_call():
    command = [sys.executable, __file__]
    # Compiled anew in each of them, as it is for users.
    compiled = ("JAX_COMPILATION_CACHE_DIR", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    own = {name: value for name, value in os.environ.items() if name not in compiled}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own) for _ in range(2)]
    printed = [process.communicate(timeout=240)[0].split() for process in processes]
    assert [len(lines) for lines in printed] == [2, 2]
    assert len({digest for lines in printed for digest in lines}) == 1


@pytest.mark.slow
def test_a_hundred_thousand_steps_take_no_more_memory():
    rows = jcl.row_optimizer(optax.sgd(0.1, momentum=0.9))
    by_rule, by_rows = (jcl.init_centers(jax.random.key(i), C, D) for i in range(2))
    state = rows.init(by_rows)
    x, labels = jnp.ones((N, D)), jnp.arange(N) % 7

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(by_rule, by_rows, state, x, labels):
        loss = jcl.center_loss(by_rule, x, labels) + jcl.center_loss(by_rows, x, labels)
        by_rule = jcl.update_centers(by_rule, x, labels, after=loss)
        return by_rule, *rows.update(by_rows, state, x, labels, after=loss), loss

    process = psutil.Process()
    for i in range(100_000):
        if i == 20_000:
            before = process.memory_info().rss
        by_rule, by_rows, state, loss = step(by_rule, by_rows, state, x, labels)
    growth = process.memory_info().rss - before
    assert growth < 2 * 2**20
    for moved in (by_rule, by_rows):
        np.testing.assert_allclose(moved["centers"][:7], np.ones((7, D)), atol=1e-4)
    assert float(loss) < 1e-6


if __name__ == "__main__":
    print(run(), run())
