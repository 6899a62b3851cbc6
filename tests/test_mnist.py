"""The MNIST example, on scikit-learn's digits written as files of MNIST's format."""

import gzip
import re
import struct
import tracemalloc

import jax
import mnist
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def declaring(*shape, data=b"", kind=8, zeros=0):
    """A file of MNIST's format that declares this shape and holds this data."""
    head = struct.pack(f">HBB{len(shape)}I", zeros, kind, len(shape), *shape)
    return gzip.compress(head + data, compresslevel=1)


def idx(array, **wrong):
    return declaring(*array.shape, data=array.astype(np.uint8).tobytes(), **wrong)


@pytest.fixture(scope="module")
def files():
    """1,797 real digits of 8 x 8 pixels, enlarged to 28 x 28; the last 397 are for the test."""
    data = load_digits()
    images = np.pad(np.kron(data.images * 15.9375, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2))).round()
    names = list(mnist.SHA256)
    arrays = (images[:1400], data.target[:1400], images[1400:], data.target[1400:])
    return {name: idx(array) for name, array in zip(names, arrays, strict=True)}


@pytest.fixture
def folder(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def flags(folder, *more):
    return [
        *("--data", str(folder), "--out", str(folder / "out"), "--lams", "0", "0.1", "--seeds", "1"),
        *("--batch-size", "64", "--warmup", "1", *more),
    ]


@pytest.mark.slow
def test_learns_and_compacts(folder, capsys):
    results = mnist.main(flags(folder, "--epochs", "5"))
    (softmax,), (center,) = results[0.0], results[0.1]
    for run in (softmax, center):
        assert len(run["losses"]) == 5
        assert run["losses"][-1] < 0.7 * run["losses"][0]
        assert run["accuracy"] > 50
    assert center["own_between"] < 0.9 * softmax["own_between"]
    assert center["own_distance"] < 0.5 * softmax["own_distance"]
    assert 0 < center["moved"] < center["own_distance"]
    assert (folder / "out" / "mnist.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| λ = 0.1 |" in printed
    assert "1,400 training images, one seed, 5 epochs" in printed
    assert "±" not in printed


@pytest.mark.slow
def test_goes_on_where_it_was_stopped(folder, monkeypatch, capsys):
    command = flags(folder, "--epochs", "3", "--images", "256", "--lams", "0.1", "--centers", "optax")
    whole = mnist.main([*command, "--out", str(folder / "other")])
    steps, train_step = [], mnist.train_step

    def stops(*args, **kwargs):
        steps.append(1)
        if len(steps) == 7:  # In the second of three epochs of four steps.
            raise KeyboardInterrupt
        return train_step(*args, **kwargs)

    monkeypatch.setattr(mnist, "train_step", stops)
    with pytest.raises(SystemExit) as stopped:
        mnist.main(command)
    assert stopped.value.code == 130
    assert "Stopped before the end. The same command goes on" in capsys.readouterr().err
    assert mnist.main(command) == whole
    assert len(steps) == 7 + 2 * 4  # The first epoch was kept.
    assert mnist.main(command) == whole
    assert len(steps) == 7 + 2 * 4  # A finished run is not trained again, and that is said.
    assert re.search(r"λ = 0\.1, seed 0: 3 of 3 epochs from .*mnist-runs", capsys.readouterr().out)
    for path in (folder / "out" / "mnist-runs").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=r"mnist-runs.* can't be read, delete it"):
        mnist.main(command)


@pytest.mark.slow
def test_the_control_is_a_penalty_on_the_norm():
    model = mnist.Model("zero", rngs=nnx.Rngs(0))
    x, labels = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32), np.arange(6)
    np.testing.assert_allclose(model.center_loss(x, labels), np.mean(np.sum(x**2, -1)), rtol=1e-6)
    assert not jax.tree.leaves(nnx.state(model.center_loss, nnx.Param))  # No optimizer moves them.


def test_a_run_resumes_from_no_other(tmp_path):
    images, labels = np.zeros(3), np.ones(3)

    def folder(*more, data=(images, labels), lam=0.1, seed=0):
        return mnist.run_folder(mnist.parse_args(["--out", str(tmp_path), *more]), data, lam, seed)

    flags = ["warmup", "alpha", "images", "epochs", "batch-size", "lr", "weight-decay"]
    others = [
        *(folder(f"--{flag}", "5") for flag in flags),
        *(folder("--centers", kind) for kind in ("rule", "optax", "zero")),
        *(folder(lam=0.10000001), folder(seed=1), folder(data=(images, images))),
    ]
    assert len({*others}) == len(others)
    assert folder("--seeds", "7", "--lams", "3") == folder()


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
BROKEN = {
    "not gzip": (IMAGES, b"plain text", "Not a gzipped file"),
    "cut gzip": (IMAGES, lambda content: content[:5000], "ended before"),
    "flipped bytes": (IMAGES, lambda content: content[:100] + b"\xff" * 900 + content[1000:], "decompress"),
    "empty": (IMAGES, gzip.compress(b""), "unpack requires"),
    "wrong magic": (IMAGES, idx(np.zeros((4, 28, 28)), zeros=7), "not those of images"),
    "labels for images": (IMAGES, idx(np.zeros(1400)), "not those of images"),
    "images for labels": (LABELS, idx(np.zeros((4, 28, 28))), "not those of labels"),
    "not bytes": (IMAGES, idx(np.zeros((4, 28, 28)), kind=13), "not those of images"),
    "other size": (IMAGES, idx(np.zeros((4, 32, 32))), "32 x 32, expected 28 x 28"),
    "too few items": (IMAGES, declaring(100, 28, 28), "declares 78,400 bytes and ends after 0"),
    "huge claim": (IMAGES, declaring(2**32 - 1, 28, 28, data=bytes(784)), "and ends after 784"),
    "goes on": (IMAGES, declaring(1, 28, 28, data=bytes(2**23)), "declares 784 bytes and goes on"),
    "huge images": (IMAGES, declaring(1, 2**31, 2**31), "expected 28 x 28"),
    "fewer labels": (LABELS, idx(np.zeros(3)), "There are 1400 training images and 3 labels"),
    "no nines": (LABELS, idx(np.arange(1400) % 9), "The 1400 training images hold none of class 9"),
    "letters": (LABELS, idx(np.arange(1400) % 26), "label is 25, expected 0 to 9"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(folder, name, content, message):
    path = folder / name
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    with pytest.raises(SystemExit, match=message) as stopped:
        mnist.main(flags(folder))
    assert isinstance(stopped.value.code, str)  # A message, not a code.


def test_damage_behind_what_is_used_is_found(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(400, 28, 28), dtype=np.uint8)
    path = tmp_path / IMAGES
    content = bytearray(idx(images))
    path.write_bytes(content)
    np.testing.assert_array_equal(mnist.read_idx(path, 3, 10), images[:10])
    # Noise is stored as it is, so that other bytes unpack as well: only the checksum tells.
    middle = len(content) // 2
    content[middle : middle + 2] = bytes(255 - byte for byte in content[middle : middle + 2])
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"{IMAGES} is not .*: CRC check failed"):
        mnist.read_idx(path, 3, 10)


def test_no_more_is_kept_than_asked_for(tmp_path):
    # 32 MiB of zeros in a small file, of which ten images are asked for.
    path = tmp_path / "bomb.gz"
    path.write_bytes(idx(np.zeros((2**25 // 28**2, 28, 28), np.uint8)))
    tracemalloc.start()
    try:
        assert mnist.read_idx(path, 3, 10).shape == (10, 28, 28)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_batch_above_the_data(folder):
    with pytest.raises(SystemExit, match="--batch-size: 64 is above the 32 training images"):
        mnist.main(flags(folder, "--images", "32"))


@pytest.mark.slow
def test_divergence_is_named(folder):
    with pytest.raises(SystemExit, match=r"λ = 0, seed 0: the loss is not finite"):
        mnist.main(flags(folder, "--lr", "1000", "--epochs", "2", "--images", "256"))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ([], (20_000, 8, 0.05, 3)),
        (["--quick"], (2000, 3, 0.05, 1)),
        (["--epochs", "3"], (20_000, 3, 0.05, 3)),
    ],
    ids=["full", "quick", "other epochs"],
)
def test_defaults_of_each_form(form, expected, tmp_path):
    args = mnist.parse_args([*form, "--out", str(tmp_path / "new")])
    assert (args.images, args.epochs, args.lr, args.seeds) == expected
    assert (tmp_path / "new").is_dir()
