"""The recipes of examples/README.md: the knobs with which this library does what others do."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
import reference as ref

import jax_centerloss as jcl

RATE = 0.5


def half(reduce_fn=jnp.mean):
    return lambda c, x, labels: 0.5 * jcl.center_loss(c, x, labels, reduce_fn=reduce_fn, clip=None)


def by_rule(rule, scale=1.0):
    def move(centers, x, labels, state):
        return jcl.update_centers(centers, x, labels, alpha=scale * RATE, rule=rule), state

    return move


def by_optax(lam_divided):
    chain = optax.sgd(RATE) if not lam_divided else optax.chain(optax.scale(1 / peers.LAM), optax.sgd(RATE))
    tx = jcl.with_center_optimizer(optax.sgd(1.0), chain)

    def move(centers, x, labels, state):
        params = {"centers": centers}
        grads = jax.grad(lambda p: peers.LAM * jcl.center_loss(p["centers"], x, labels))(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)["centers"], state

    return move


def solver(centers, x, labels, state):
    """Caffe's: every row in every step, with what the rule would subtract as its gradient."""
    tx = optax.chain(optax.add_decayed_weights(peers.DECAY), optax.sgd(RATE, momentum=peers.MOMENTUM))
    direction = centers - jcl.update_centers(centers, x, labels, alpha=1.0, rule="paper")
    updates, state = tx.update(direction, tx.init(centers) if state is None else state, centers)
    return optax.apply_updates(centers, updates), state


RECIPES = {
    "paper": (half(jnp.sum), by_rule("paper")),
    "caffe": (half(), solver),
    "facenet": (
        lambda c, x, labels: jcl.center_loss(c, x, labels, clip=None) / x.shape[-1],
        lambda c, x, labels, state: by_rule("gradient", scale=len(labels) / 2)(c, x, labels, state),
    ),
    "module": (jcl.center_loss, by_rule("gradient")),
    "module, by optax": (jcl.center_loss, by_optax(lam_divided=True)),
    "module, λ left in": (jcl.center_loss, by_optax(lam_divided=False)),
    "own backward, sum": (half(jnp.sum), by_rule("paper")),
    "own backward, mean": (
        half(),
        lambda c, x, labels, state: by_rule("paper", scale=1 / len(labels))(c, x, labels, state),
    ),
}


def expected(name, source):
    name = "module" if name == "module, by optax" else name
    if name in peers.NUMPY or source == "live":
        return peers.run(name)
    golden = ref.golden(f"recipes/{name}")
    return golden["losses"], golden["centers"]


@pytest.mark.parametrize("source", ref.SOURCES)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_takes_the_same_steps(name, source):
    loss_of, move = RECIPES[name]
    want_losses, want_centers = expected(name, source)
    with ref.enable_x64():
        centers, state, losses, tables = jnp.asarray(peers.draws()[0][0]), None, [], []
        for _, x, labels in peers.draws():
            x, labels = jnp.asarray(x), jnp.asarray(labels)
            losses.append(loss_of(centers, x, labels))
            centers, state = move(centers, x, labels, state)
            tables.append(centers)
        np.testing.assert_allclose(losses, want_losses, rtol=1e-10)
        np.testing.assert_allclose(tables, want_centers, rtol=1e-10, atol=1e-12)


def test_caffes_momentum_by_rows_rests_where_a_class_is_absent():
    # Equal to the solver while every class is in every batch; then a class that is left out stays.
    random = np.random.default_rng(0)
    start = random.standard_normal((3, 2))
    tx = optax.chain(optax.add_decayed_weights(peers.DECAY), optax.sgd(RATE, momentum=peers.MOMENTUM))
    with ref.enable_x64():
        rows = jcl.row_optimizer(tx)
        ours, theirs, state, velocity = jnp.asarray(start), start, rows.init(jnp.asarray(start)), None
        for labels in (np.arange(9) % 3, np.arange(9) % 3, np.arange(9) % 2):
            x, before = random.standard_normal((9, 2)), np.asarray(ours)
            ours, state = rows.update(ours, state, jnp.asarray(x), labels, rule="paper")
            _, theirs, velocity = peers.caffe(theirs, x, labels, RATE, velocity)
            np.testing.assert_allclose(ours[:2], theirs[:2], rtol=1e-10)
        np.testing.assert_array_equal(ours[2], before[2])
        assert np.abs(theirs[2] - before[2]).max() > 0.01


def steps_in_the_readme():
    text = (Path(__file__).parent.parent / "examples" / "README.md").read_text(encoding="utf-8")
    table = text.split("step of a lone sample")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \|.*\| ([\d.]+)(?: λ)? \|$", table, re.M)
    return {name: float(step) for name, step in rows}


def test_steps_in_the_readme():
    names = {
        "the paper": "paper",
        "its Caffe layer": "caffe",
        "the PyTorch module, λ divided out": "module",
        "the same, λ left in": "module, λ left in",
        "the PyTorch version with its own backward pass": "own backward, mean",
        "the same, `size_average=False`": "own backward, sum",
        "FaceNet's TensorFlow code": "facenet",
    }
    told = steps_in_the_readme()
    assert told.keys() == names.keys()
    with ref.enable_x64():
        for title, name in names.items():
            _, move = RECIPES[name]
            centers, x = jnp.zeros((2, 2)), jnp.zeros((128, 2)).at[0, 0].set(1.0)
            moved, _ = move(centers, x, jnp.append(0, jnp.ones(127, int)), None)
            lam = peers.LAM if "left in" in name else 1.0
            assert f"{float(moved[0, 0]) / lam:.2g}" == f"{told[title]:.2g}"
            if name in peers.NUMPY or "live" in ref.SOURCES:
                assert float(moved[0, 0]) == pytest.approx(peers.lonely_step(name), rel=1e-10)
