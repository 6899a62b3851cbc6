"""257,195 classes on a laptop: a spelling corrector in which every English word is a class.

    python examples/words.py

trains a network on typos, each a word with one letter replaced, dropped, inserted or swapped with the next.
Then it names the words of 2,000 typos that training never saw, out of all words: by the softmax layer, and by
the nearest center. No step looks at all classes: the softmax is over the classes of the batch and 2,048 drawn
ones, and a row optimizer moves their rows; the centers move by rule. Three arms: softmax alone, a penalty on
the norm of the features, and center loss. Centers follow the features in all of them, and pull in the last.

    python examples/words.py --seeds 5 --select    # λ chosen by the typos of other words, five seeds
    python examples/words.py --scaling             # step time and accuracy by the number of classes
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _ctrl_c
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _common import (
    add_flags,
    arm_differences,
    check_finite,
    entries,
    make_folder,
    markdown,
    new_figure,
    number,
    over_seeds,
    progress,
    say_if_quick,
    spread,
)
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_centerloss

ARMS = {"softmax": "softmax alone", "norm": "norm penalty", "center": "center loss"}
JUDGES = {"head": "by the softmax layer, %", "center": "by the nearest center, %"}
SHORTEST, LONGEST = 4, 16
SIGNS = "abcdefghijklmnopqrstuvwxyz0123456789"  # Numbered from 1; 0 is what follows a word.
LETTERS = 26  # Typos put in letters only.
FIRST, LAST = len(SIGNS) + 1, len(SIGNS) + 2  # The marks before and after a word.
GRAMS = (1, 2, 3, 4)  # The lengths of the letter n-grams.
# The flags on which a run depends, beside its arm, λ, words and seed.
SETTINGS = ("steps", "batch_size", "negatives", "margin", "feat_dim", "buckets", "lr", "alpha", "warmup")
HELD_BACK = 8  # One typo in so many, by its hash, is kept for the test.


# Words and typos, as rows of letters `(N, LONGEST + 1)`, uint8.


def load_words(count: int | None) -> np.ndarray:
    """English words of 4 to 16 letters (some sixty with digits), in a random order, or the first `count`."""
    from english_words import get_english_words_set

    listed = get_english_words_set(["web2", "gcide"], alpha=True, lower=True)
    words = sorted(word for word in listed if SHORTEST <= len(word) <= LONGEST)
    order = np.random.default_rng(0).permutation(len(words))[:count]
    return as_letters([words[i] for i in order])


def as_letters(words: Sequence[str]) -> np.ndarray:
    number_of = np.zeros(128, np.uint8)
    number_of[np.frombuffer(SIGNS.encode(), np.uint8)] = np.arange(1, len(SIGNS) + 1)
    padded = np.asarray(words, f"S{LONGEST + 1}")
    return number_of[padded.view(np.uint8).reshape(len(words), LONGEST + 1)]


def as_text(letters: np.ndarray) -> list[str]:
    return ["".join(SIGNS[sign - 1] for sign in row if sign) for row in letters]


def hashes(letters: np.ndarray) -> np.ndarray:
    """A number for each row, the same in every run."""
    total = np.zeros(len(letters), np.uint64)
    for column in letters.T:
        total = (total + column) * np.uint64(0x9E3779B97F4A7C15)
        total ^= total >> np.uint64(29)
    return total


def edit(words: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each word with one letter replaced, dropped, inserted, or swapped with the next one."""
    count, width = words.shape
    lengths = np.count_nonzero(words, axis=1)
    kind = random.integers(0, 4, count)
    place = random.integers(0, lengths)
    place = np.where(kind == 2, random.integers(0, lengths + 1), place)  # May be inserted at the end.
    place = np.where(kind == 3, random.integers(0, lengths - 1), place)
    new = random.integers(1, LETTERS + 1, count)
    old = words[np.arange(count), np.minimum(place, width - 1)]
    new = np.where((kind == 0) & (new == old), new % LETTERS + 1, new).astype(np.uint8)
    # From which position of the word each letter comes.
    column, at = np.arange(width)[None], place[:, None]
    source = np.select(
        [(kind == 1)[:, None] & (column >= at), (kind == 2)[:, None] & (column > at)],
        [column + 1, column - 1],
        column,
    )
    swapped = (kind == 3)[:, None]
    source = np.where(swapped & (column == at), at + 1, np.where(swapped & (column == at + 1), at, source))
    edited = np.take_along_axis(np.pad(words, ((0, 0), (0, 1))), source, axis=1)
    written = ((kind == 0) | (kind == 2))[:, None] & (column == at)
    return np.where(written, new[:, None], edited)


def typos(words: np.ndarray, random: np.random.Generator, *, unseen: bool) -> np.ndarray:
    """Typos of the words: those that are kept for the test, or those of the training."""
    found = words.copy()
    missing = np.arange(len(words))
    while missing.size:
        drawn = edit(words[missing], random)
        fits = (hashes(drawn) % np.uint64(HELD_BACK) == 0) == unseen
        fits &= (drawn != words[missing]).any(axis=1)  # Two equal letters that were swapped are no typo.
        found[missing[fits]] = drawn[fits]
        missing = missing[~fits]
    return found


def grams_of(letters: np.ndarray, buckets: int) -> np.ndarray:
    """The numbers of the hashed letter n-grams of each row, `(N, most of them)`, and 0 after the last."""
    count, width = letters.shape
    marked = np.zeros((count, width + 2), np.uint32)
    marked[:, 0] = FIRST
    marked[:, 1:-1] = letters
    marked[np.arange(count), 1 + np.count_nonzero(letters, axis=1)] = LAST
    found = []
    for n in GRAMS:
        number_of = np.full((count, width + 3 - n), n, np.uint32)
        for i in range(n):
            number_of = (number_of + marked[:, i : width + 3 - n + i]) * np.uint32(0x85EBCA6B)
            number_of ^= number_of >> np.uint32(13)
        exists = marked[:, n - 1 : width + 2] > 0
        found.append(np.where(exists, 1 + number_of % np.uint32(buckets - 1), 0))
    return np.concatenate(found, axis=1).astype(np.int32)


class Batch(NamedTuple):
    grams: np.ndarray  # (N, the most n-grams)
    labels: np.ndarray  # (N,)
    negatives: np.ndarray  # (the classes that are drawn,)


def batches(args: argparse.Namespace, words: np.ndarray, seed: int, first: int = 0) -> Iterator[Batch]:
    """The batch of each step from `first` on, a function of the seed and the step alone."""
    for step in range(first, args.steps):
        random = np.random.default_rng((seed, step))
        labels = random.integers(0, len(words), args.batch_size).astype(np.int32)
        letters = typos(words[labels], random, unseen=False)
        negatives = np.arange(len(words)) if args.negatives >= len(words) else None
        if negatives is None:
            negatives = random.integers(0, len(words), args.negatives)
        yield Batch(grams_of(letters, args.buckets), labels, negatives.astype(np.int32))


# The training.


class Encoder(nnx.Module):
    """The sum of the embeddings of letter n-grams, and two layers to the features."""

    def __init__(self, buckets: int, feat_dim: int, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(buckets, feat_dim, rngs=rngs)
        self.hidden = nnx.Linear(feat_dim, 2 * feat_dim, rngs=rngs)
        self.last = nnx.Linear(2 * feat_dim, feat_dim, rngs=rngs)

    def __call__(self, grams: jax.Array) -> jax.Array:
        x = jnp.sum(self.embed(grams), axis=-2, where=grams[..., None] > 0)
        return self.last(nnx.relu(self.hidden(x)))


class Training(NamedTuple):
    """Everything that a step changes. `head` and `centers` are tables with a row for each class."""

    encoder: Any  # The state of an `Encoder`.
    optimizer: Any
    head: dict[str, jax.Array]
    head_state: Any
    centers: dict[str, jax.Array]


def unit(vectors: jax.Array) -> jax.Array:
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.sum(vectors**2, axis=-1, keepdims=True), 1e-12))


def distinct_classes(labels: jax.Array, drawn: jax.Array, num_classes: int) -> jax.Array:
    """The batch's own and the drawn classes, each once, sorted; what is left over is -1, and stands first."""
    both = jnp.concatenate([labels, drawn])
    return jnp.sort(jnp.unique(both, size=min(both.size, num_classes), fill_value=-1))


def rows_of(table: jax.Array, classes: jax.Array) -> jax.Array:
    """The rows of these classes; of -1 any row."""
    return table.at[jnp.maximum(classes, 0)].get(mode="promise_in_bounds")


def sampled_softmax(
    x: jax.Array, rows: jax.Array, classes: jax.Array, labels: jax.Array, margin: float = 0.0
) -> jax.Array:
    """The mean cross-entropy over the distinct `classes (S,)`, sorted, with their `rows (S, D)` of the head.

    Every label is among the classes; a negative class is none. With all classes it is the full softmax. With
    a `margin` it is over 16 times cosines, that of the own class less the margin.
    """
    own = jnp.searchsorted(classes, labels)
    if margin:
        x, rows = unit(x), unit(rows)
    logits = x @ rows.T
    if margin:
        logits = 16 * (logits - margin * jax.nn.one_hot(own, len(classes)))
    logits = jnp.where(classes >= 0, logits, -jnp.inf)
    return optax.softmax_cross_entropy_with_integer_labels(logits, own).mean()


class Trainer:
    """The compiled step, and what it starts from."""

    def __init__(self, args: argparse.Namespace, num_classes: int, mesh: Any = None) -> None:
        self.args, self.mesh = args, mesh
        shards = 1 if mesh is None else mesh.size
        self.rows = -(-num_classes // shards) * shards  # A mesh splits evenly.
        self.num_classes = num_classes
        self.graph = nnx.graphdef(
            nnx.eval_shape(lambda: Encoder(args.buckets, args.feat_dim, rngs=nnx.Rngs(0)))
        )
        rate = optax.cosine_decay_schedule(args.lr, args.steps)
        self.tx = optax.adam(rate)
        self.head_tx = jax_centerloss.row_optimizer(optax.adam(rate))
        self.step = jax.jit(self._step, donate_argnums=0, static_argnames="pull")

    def start(self, seed: int) -> Training:
        sharding = None if self.mesh is None else NamedSharding(self.mesh, P("classes", None))
        make = partial(jax_centerloss.init_centers, feat_dim=self.args.feat_dim, out_sharding=sharding)
        scaled = jax.nn.initializers.normal(self.args.feat_dim**-0.5)
        key, other = jax.random.split(jax.random.key(seed))
        head = make(key, self.rows, initializer=scaled)
        encoder = nnx.state(Encoder(self.args.buckets, self.args.feat_dim, rngs=nnx.Rngs(seed)))
        centers = make(other, self.rows, initializer=jax.nn.initializers.zeros)
        return Training(encoder, self.tx.init(encoder), head, self.head_tx.init(head), centers)

    def encode(self, encoder: Any, grams: Any) -> jax.Array:
        return nnx.merge(self.graph, encoder)(grams)

    def _step(self, now: Training, batch: Batch, lam: jax.Array, *, pull: bool) -> tuple[Training, jax.Array]:
        classes = distinct_classes(batch.labels, batch.negatives, self.num_classes)
        rows = rows_of(now.head["centers"], classes)

        def loss_fn(encoder: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = self.encode(encoder, batch.grams)
            loss = sampled_softmax(x, rows, classes, batch.labels, self.args.margin)
            if pull:
                return loss + lam * jax_centerloss.center_loss(now.centers, x, batch.labels), x
            return loss + lam * jnp.mean(jnp.sum(x * x, axis=-1)), x

        (loss, x), grads = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(now.encoder, rows)
        updates, optimizer = self.tx.update(grads[0], now.optimizer, now.encoder)
        encoder = optax.apply_updates(now.encoder, updates)
        # Neither table is written before everything that is computed from it.
        done = loss, grads
        head, head_state = self.head_tx.apply_gradients(
            now.head, now.head_state, classes, grads[1], after=done
        )
        alpha = self.args.alpha
        centers = jax_centerloss.update_centers(now.centers, x, batch.labels, alpha=alpha, after=done)
        return Training(encoder, optimizer, head, head_state, centers), loss


def run(trainer: Trainer, words: np.ndarray, arm: str, lam: float, seed: int, bar: Any) -> Training:
    """Trains one arm, from its last checkpoint if there is one."""
    args = trainer.args
    now, first = trainer.start(seed), 0
    saved = checkpoints_of(args, f"{arm}-{lam:g}-{len(words)}-{seed}")
    if saved is not None and saved.latest_step() is not None:
        first = saved.latest_step()
        now = saved.restore(first, args=ocp.args.StandardRestore(now))
    bar.update(first)
    loss = 0.0
    for step, batch in enumerate(batches(args, words, seed, first), start=first + 1):
        warm = min(1.0, step / max(args.warmup, 1))
        now, loss = trainer.step(now, batch, np.float32(lam * warm), pull=arm == "center")
        bar.update()
        if step % 500 == 0:
            bar.set_postfix(arm=arm, lam=lam, seed=seed, loss=f"{float(loss):.3f}", refresh=False)
        if saved is not None and (step % args.every == 0 or step == args.steps):
            saved.save(step, args=ocp.args.StandardSave(now))
    if saved is not None:
        saved.close()
    check_finite([float(loss)], f"{ARMS[arm]}, λ = {lam:g}, seed {seed}")
    return now


def checkpoints_of(args: argparse.Namespace, run: str) -> ocp.CheckpointManager | None:
    """The checkpoints of a run, which go on with the same flags only. None without --checkpoints."""
    if not args.checkpoints:
        return None
    folder = (args.checkpoints / run).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({name: getattr(args, name) for name in SETTINGS})
    file = folder / "settings.json"
    if file.exists() and file.read_text() != settings:
        raise SystemExit(f"{folder} is of a run with other flags: {file.read_text()}. Take another folder.")
    file.write_text(settings)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(folder / "steps", item_handlers=handler, options=options)


def make_mesh() -> Any:
    """All devices, for the tables of classes; None if there is one."""
    if jax.device_count() == 1:
        return None
    return jax.make_mesh((jax.device_count(),), ("classes",), (jax.sharding.AxisType.Auto,))


def judge(trainer: Trainer, now: Training, words: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """The words that each judge names for one unseen typo of each chosen word, and how many are right."""
    args = trainer.args
    letters = typos(words[chosen], np.random.default_rng(99), unseen=True)
    is_word = np.isin(hashes(letters), hashes(words))  # Such a typo, as "form" for "from", is ambiguous.
    letters, chosen = letters[~is_word], chosen[~is_word]
    x = jax.jit(trainer.encode)(now.encoder, grams_of(letters, args.buckets))
    centers, head = now.centers["centers"][: len(words)], now.head["centers"][: len(words)]
    if args.margin:  # Trained by cosines.
        head = unit(head)

    @jax.jit
    def by_head(x: jax.Array, head: jax.Array) -> jax.Array:
        return jnp.argmax(x @ head.T, axis=-1)

    parts = np.array_split(x, max(1, len(x) // 100))
    named = {
        "head": np.concatenate([np.asarray(by_head(part, head)) for part in parts]),
        "center": np.asarray(jax_centerloss.nearest_center(centers, x)),
    }
    right = {judge: 100 * float(np.mean(found == chosen)) for judge, found in named.items()}
    return right | {"typos": as_text(letters), "named": named, "chosen": chosen}


def held_out(words: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The words of the test, and others by whose typos λ is chosen."""
    order = np.random.default_rng(1).permutation(len(words))
    count = min(count, len(words) // 2)
    return order[:count], order[count : 2 * count]


def select(trainer: Trainer, words: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """λ of each arm, by the nearest center, for typos of words that the test does not ask for."""
    args = trainer.args
    runs = [(arm, lam) for arm in args.arms for lam in (args.grid if arm != "softmax" else [0.0])]
    found, rows = {}, []
    with progress(len(runs) * args.steps, "step") as bar:
        for arm, lam in runs:
            right = judge(trainer, run(trainer, words, arm, lam, 1000, bar), words, chosen)
            found[arm, lam] = right["center"]
            rows.append([ARMS[arm], f"{lam:g}", *(f"{right[name]:.1f}" for name in JUDGES)])
            bar.write(" ".join(rows[-1]))
    print(f"\nTypos of {len(chosen):,} other words, one seed; λ is chosen by the nearest center:\n")
    print(markdown(["arm", "λ", *JUDGES.values()], rows))
    best = {arm: max((r for r in runs if r[0] == arm), key=found.get)[1] for arm in args.arms}
    print("\nChosen:", ", ".join(f"λ = {lam:g} for {ARMS[arm]}" for arm, lam in best.items()))
    return best


def compare(args: argparse.Namespace, words: np.ndarray, lams: dict[str, float]) -> dict[str, list[Any]]:
    """Trains every arm with every seed, and prints how many typos are named rightly, and some of them."""
    chosen, others = held_out(words, args.typos)
    trainer = Trainer(args, len(words), make_mesh())  # One for all runs, which share its compiled step.
    lams = select(trainer, words, others) if args.select else lams
    results: dict[str, list[Any]] = {arm: [] for arm in args.arms}
    with progress(len(args.arms) * args.seeds * args.steps, "step") as bar:
        for seed in range(args.seeds):
            for arm in args.arms:
                now = run(trainer, words, arm, lams[arm], seed, bar)
                results[arm].append(judge(trainer, now, words, chosen))
    print(f"\n{len(words):,} classes, {len(chosen):,} typos never seen, {args.steps:,} steps of ", end="")
    print(f"{args.batch_size}, {over_seeds(args.seeds)}:\n")
    rows = [
        [f"{ARMS[arm]}, λ = {lams[arm]:g}", *(spread([r[name] for r in runs], 1) for name in JUDGES)]
        for arm, runs in results.items()
    ]
    print(markdown(["arm", *JUDGES.values()], rows))
    pairs = [("center", "softmax"), ("norm", "softmax"), ("center", "norm")]
    gains = arm_differences(results, ARMS, pairs, [entries(name) for name in JUDGES])
    if gains:
        print(f"\nDifferences{', paired by seed, with 95 % intervals' if args.seeds > 1 else ''}:\n")
        print(markdown(["", *JUDGES.values()], gains))
    print(corrections(results[args.arms[-1]][0], words, ARMS[args.arms[-1]]))
    say_if_quick(args)
    return results


def corrections(found: dict[str, Any], words: np.ndarray, arm: str) -> str:
    """Some typos and the words that are named for them: eight that are right, and eight that are not."""
    right = found["named"]["center"] == found["chosen"]
    shown = [*np.flatnonzero(right)[:8], *np.flatnonzero(~right)[:8]]
    meant = as_text(words[found["chosen"][shown]])
    named = {name: as_text(words[found["named"][name][shown]]) for name in JUDGES}
    rows = [[found["typos"][i], meant[k], named["center"][k], named["head"][k]] for k, i in enumerate(shown)]
    heads = ["typo", "meant", "nearest center", "softmax layer"]
    title = f"{arm}, seed 0: some that the nearest center names rightly, and some that it does not:"
    return f"\n{title}\n\n{markdown(heads, rows)}"


def scaling(args: argparse.Namespace, words: np.ndarray, lam: float) -> dict[int, dict[str, float]]:
    """Step time and accuracy of center loss by the number of classes, at the same number of steps."""
    counts = [count for count in (1_000, 10_000, 100_000) if count < len(words)] + [len(words)]
    results, steps = {}, []
    with progress(len(counts) * args.steps, "step") as bar:
        for count in counts:
            some = words[:count]
            trainer = Trainer(args, count, make_mesh())
            now = run(trainer, some, "center", lam, 0, bar)
            right = judge(trainer, now, some, held_out(some, args.typos)[0])
            results[count] = {name: right[name] for name in JUDGES}
            steps.append(timed_steps(trainer, some))
    for _ in range(8):  # In turn, so that a busy machine slows all sizes alike.
        for step in steps:
            next(step)
    for result, step in zip(results.values(), steps, strict=True):
        result["ms"] = 1e3 * float(np.median(next(step)))
    rows = [[f"{c:,}", f"{r['ms']:.1f}", *(f"{r[n]:.1f}" for n in JUDGES)] for c, r in results.items()]
    print(
        f"\nCenter loss, λ = {lam:g}, {args.steps:,} steps of {args.batch_size}; the time is the median of ",
        end="",
    )
    print("steps on batches made ahead:\n")
    print(markdown(["classes", "ms a step", *JUDGES.values()], rows))
    draw(args.out / "words.png", results)
    print(f"\nPicture: {args.out / 'words.png'}")
    say_if_quick(args)
    return results


def timed_steps(trainer: Trainer, words: np.ndarray) -> Iterator[list[float]]:
    """Takes ten steps whenever it is asked, on batches made ahead, and yields the seconds of each so far."""
    first = max(trainer.args.steps - 10, 0)
    ahead = jax.device_put(list(batches(trainer.args, words, 7, first)))
    now, took = trainer.start(7), []
    while True:
        for batch in ahead:
            begun = time.perf_counter()
            now, loss = trainer.step(now, batch, np.float32(0.01), pull=True)
            jax.block_until_ready((now, loss))
            took.append(time.perf_counter() - begun)
        yield took


def draw(path: Path, results: dict[int, dict[str, float]]) -> None:
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    counts = list(results)
    left.plot(counts, [r["ms"] for r in results.values()], "o-")
    left.set(xscale="log", xlabel="classes", ylabel="milliseconds", title="Time of a step", ylim=(0, None))
    for name, label in JUDGES.items():
        right.plot(counts, [r[name] for r in results.values()], "o-", label=label.removesuffix(", %"))
    right.set(xscale="log", xlabel="classes", ylabel="%", title="Typos named rightly", ylim=(0, 100))
    right.legend(loc="lower left")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A spelling corrector with a class for every English word.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--classes", type=number(int, 10), help="how many words; all by default")
    add("--steps", type=number(int, 1), default=12_000, help="steps of each run")
    add("--negatives", type=number(int, 1), default=2048, help="classes drawn for the softmax of each step")
    add("--margin", type=number(float, 0), default=0.0, help="of a softmax over cosines; 0: over products")
    add("--feat-dim", type=number(int, 2), default=128, help="features per word")
    add("--buckets", type=number(int, 2), default=2**13, help="rows of the embedding of n-grams")
    add("--typos", type=number(int, 1), default=2000, help="typos of the test")
    add("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="which to train")
    add("--lam-center", type=number(float, 0), default=0.003, help="weight λ of the center loss")
    add("--lam-norm", type=number(float, 0), default=0.003, help="weight λ of the norm penalty")
    add("--select", action="store_true", help="choose λ of both first")
    add("--grid", type=number(float, 0), nargs="+", default=[0.003, 0.01, 0.03], help="λ to choose from")
    add("--scaling", action="store_true", help="by the number of classes instead, of one arm")
    add("--checkpoints", type=Path, help="folder in which a run is saved, and from which it goes on")
    add("--every", type=number(int, 1), default=2000, help="steps between two checkpoints")
    add_flags(parser, warmup=None, batch_size=256, seeds=1, lr=2e-3, quick="5,000 words, 300 steps")
    add("--warmup", type=number(int, 0), default=1000, help="steps over which λ rises linearly")
    args = parser.parse_args(argv)
    args.arms = [arm for arm in ARMS if arm in args.arms]
    if args.scaling and args.select:
        parser.error("argument --select: not with --scaling, which takes --lam-center")
    if args.quick:
        args.seeds, args.steps, args.typos = 1, min(args.steps, 300), min(args.typos, 500)
        args.classes, args.warmup = min(args.classes or 5000, 5000), min(args.warmup, 50)
    make_folder(parser, args.out)
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs the comparison (for each arm a list with every seed's numbers), or the scaling."""
    args = parse_args(argv)
    lams = {"softmax": 0.0, "norm": args.lam_norm, "center": args.lam_center}
    with _ctrl_c.stopped_by_hand(" --checkpoints lets a run go on." if not args.checkpoints else ""):
        words = load_words(args.classes)
        print(f"{len(words):,} words, such as {', '.join(as_text(words[:4]))}")
        return scaling(args, words, args.lam_center) if args.scaling else compare(args, words, lams)


if __name__ == "__main__":
    main()
