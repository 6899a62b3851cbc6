"""The examples, run briefly: they learn, center loss compacts, bad flags are refused."""

import os
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import _common
import _ctrl_c
import digits
import intents
import jax
import jax.numpy as jnp
import mnist
import numpy as np
import ocr
import omniglot
import optax
import pos_tagging
import pytest
import reid

EXAMPLES = Path(__file__).parent.parent / "examples"
MODULES = {module.__name__: module for module in (digits, intents, mnist, ocr, omniglot, pos_tagging, reid)}

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.mark.slow
@pytest.mark.parametrize("centers", ["rule", "optax"])
def test_learns_and_compacts(centers, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    results = digits.main(["--seeds", "1", "--epochs", "15", "--centers", centers, "--out", str(out)])
    (softmax,), (center,) = results["softmax"], results["center"]

    for arm in (softmax, center):
        losses = arm["losses"]
        assert len(losses) == 15
        assert losses[-1] < 0.5 * losses[0]
        assert arm["accuracy"] > 80
    assert center["own_between"] < 0.75 * softmax["own_between"]
    assert center["nearest_mean"] > softmax["nearest_mean"]
    assert center["own_distance"] < softmax["own_distance"]
    assert 0 < center["moved"] < center["own_distance"]
    # What the optimizer moves has a gradient of λ = 0; the rule moves centers whatever λ is.
    assert (softmax["moved"] > 0) == (centers == "rule")

    png = (out / "digits.png").read_bytes()
    assert results["picture"] == out / "digits.png"
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert width > 1.5 * height > 450  # Two square panels side by side.

    printed = capsys.readouterr().out
    assert "softmax alone" in printed
    assert "| center loss" in printed
    for title, meaning, _ in _common.COMPACTNESS.values():
        assert f"{title}: {meaning}" in printed
    assert all(len(line) <= 100 for line in printed.splitlines() if line.startswith("|"))
    assert "one seed, 15 epochs" in printed
    assert "±" not in printed


def test_compactness_by_hand():
    # Class means at 0, 1, ..., 9 on a line: 45 pairs, of mean distance (10 + 1) / 3.
    x_train = np.stack([np.repeat(np.arange(10.0), 2), np.tile([1.0, -1.0], 10)], -1).astype(np.float32)
    y_train = np.repeat(np.arange(10), 2).astype(np.int32)
    x_test = np.array([[0.0, 0.25], [3.0, 0.5], [5.0, 4.0], [7.75, 0.0]], np.float32)
    y_test = np.array([0, 3, 5, 7], np.int32)
    centers = np.stack([np.arange(10.0), np.full(10, 0.25)], -1).astype(np.float32)
    previous = centers + np.float32([[3.0, 4.0]])
    metrics, means = _common.compactness(
        (x_train, y_train), (x_test, y_test), np.array([0, 3, 5, 8]), centers, previous
    )
    np.testing.assert_allclose(means, np.stack([np.arange(10), np.zeros(10)], -1), atol=1e-6)
    to_center = [0.0, 0.25, 3.75, (0.75**2 + 0.25**2) ** 0.5]
    expected = {
        "accuracy": 75.0,
        "nearest_mean": 75.0,
        "own_between": (0.5 + 0.75) / 2 / (11 / 3),
        "own_distance": np.mean(to_center),
        "moved": 5.0,
    }
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_spread_and_difference_by_hand():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027.
    assert _common.spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert _common.spread([1.5], 1) == "1.5"
    assert _common.over_seeds(1) == "one seed"
    assert _common.over_seeds(3) == "mean ± standard deviation over 3 seeds"
    assert _common.difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], 2) == "+2.00 [-0.48, +4.48]"
    assert _common.difference([2.0], [3.0], 1) == "-1.0"


def test_tables_are_markdown():
    assert _common.markdown(["arm", "x"], [["a", "10.0"], ["longer", "2"]]).splitlines() == [
        "| arm    |    x |",
        "| ------ | ---: |",
        "| a      | 10.0 |",
        "| longer |    2 |",
    ]


def test_planes_are_turned_and_mirrored_alike(rng):
    points = rng.normal(size=(50, 2)) * (3, 1)
    labels = np.arange(50) % 2
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    first = _common.Plane("a", points[:2], points, labels, points[2:4])
    others = [
        _common.Plane("b", *(part @ change for part in (points[:2], points)), labels, points[2:4] @ change)
        for change in (0.5 * turn, 0.5 * turn * (1, -1))
    ]
    unchanged, *turned = _common.alike([first, *others])
    for plane, scale in ((unchanged, 1), *((plane, 0.5) for plane in turned)):
        np.testing.assert_allclose(plane.features, scale * points, rtol=1e-6)
        np.testing.assert_allclose(plane.centers, scale * points[:2], rtol=1e-6)
        np.testing.assert_allclose(plane.previous, scale * points[2:4], rtol=1e-6)
    assert _common.alike([replace(first, previous=None)])[0].previous is None


@pytest.mark.parametrize("example", [digits, mnist], ids=["digits", "mnist"])
def test_warm_up_is_linear(example):
    lams = example.lam_at(np.arange(6), 0.4, 4)
    assert lams.dtype == np.float32
    np.testing.assert_allclose(lams, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rtol=1e-6)
    np.testing.assert_allclose(example.lam_at(np.arange(3), 0.4, 0), [0.4] * 3, rtol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 1e-4, 3.0])
@pytest.mark.parametrize("example", [digits, mnist], ids=["digits", "mnist"])
def test_centers_step_has_no_lam(example, lam):
    tx = example.with_centers(optax.sgd(0.1), 0.5, lam, 4, 6)
    params = {"centers": jnp.zeros((1, 2)), "head": jnp.zeros(1)}
    state, update = tx.init(params), jax.jit(tx.update)
    for weight in example.lam_at(np.arange(6), lam, 4):
        grads = {"centers": weight * jnp.array([[1.0, -2.0]]), "head": jnp.ones(1)}
        updates, state = update(grads, state, params)
        expected = [[-0.5, 1.0]] if lam > 0 else [[0.0, 0.0]]
        np.testing.assert_allclose(updates["centers"], expected, rtol=1e-6)
        np.testing.assert_allclose(updates["head"], [-0.1], rtol=1e-6)


@pytest.mark.slow
def test_warm_up_and_wide_features(tmp_path, capsys):
    flags = ["--quick", "--feat-dim", "3", "--centers", "optax", "--out", str(tmp_path)]
    plain = digits.main(flags)
    results = digits.main([*flags, "--warmup", "5"])
    # The first epoch of the warm-up weighs the center loss least; softmax alone has none to weigh.
    assert results["center"][0]["losses"][0] < plain["center"][0]["losses"][0]
    assert results["softmax"][0]["losses"] == plain["softmax"][0]["losses"]
    assert results["picture"] is None
    assert "No picture" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_lam_zero_is_softmax_alone(tmp_path):
    flags = ["--quick", "--epochs", "1", "--feat-dim", "3", "--lam", "0", "--out", str(tmp_path)]
    results = digits.main(flags)
    assert results["center"] == results["softmax"]


# What is refused, and the words of it, after the name of an example.
REFUSED = {
    "digits --lam -0.1": "argument --lam: must be finite and at least 0, got -0.1",
    "digits --lam nan": "argument --lam: must be finite",
    "digits --alpha -1": "argument --alpha: must be finite and at least 0",
    "digits --epochs 0": "argument --epochs: must be finite and at least 1",
    "digits --epochs few": "argument --epochs: 'few' is not a valid int",
    "digits --seeds 0": "argument --seeds: must be finite and at least 1",
    "digits --feat-dim 0": "argument --feat-dim: must be finite and at least 1",
    "digits --batch-size 0": "argument --batch-size: must be finite and at least 1",
    "digits --batch-size 5000": "argument --batch-size: 5000 is above the 1347 training samples",
    "digits --lr 0": "argument --lr: must be finite and above 0",
    "digits --warmup -1": "argument --warmup: must be finite and at least 0",
    "digits --warmup 61": "argument --warmup: 61 is above the 60 epochs",
    "digits --centers adam": "argument --centers: invalid choice",
    "digits --out file": "argument --out: can't make the folder file",
    "digits --unknown": "unrecognized arguments: --unknown",
    "mnist --lams -1": "argument --lams: must be finite and at least 0",
    "mnist --warmup 9": "argument --warmup: 9 is above the 8 epochs",
    "mnist --images 0": "argument --images: must be finite and at least 1",
    "mnist --centers adam": "argument --centers: invalid choice",
    "ocr --only-select": "argument --only-select: needs --select",
    "ocr --feat-dim 15": "argument --feat-dim: the two directions of --sequence lstm need an even number",
    "ocr --length 9 --width 64": "9 characters may need 17 frames, and --width 64 makes 16",
    "omniglot --warmup 13": "argument --warmup: 13 is above the 12 epochs",
    "omniglot --arms triplet": "argument --arms: invalid choice",
    "omniglot --grid -1": "argument --grid: must be finite and at least 0",
    "omniglot --negatives 0": "argument --negatives: must be finite and at least 1",
    "omniglot --feat-dim 1": "argument --feat-dim: must be finite and at least 2",
    "omniglot --only-select": "argument --only-select: needs --select",
    "pos_tagging --warmup 7": "argument --warmup: 7 is above the 6 epochs",
    "pos_tagging --lr 0": "argument --lr: must be finite and above 0",
    "reid --batch-size 30": "30 is no multiple of --instances 4, or too few",
    "reid --batch-size 4": "4 is no multiple of --instances 4, or too few",
    "reid --instances 1": "argument --instances: must be finite and at least 2",
    "reid --lams -1": "argument --lams: must be finite and at least 0",
    "reid --epochs 0": "argument --epochs: must be finite and at least 1",
}


@pytest.mark.parametrize(("command", "message"), REFUSED.items(), ids=REFUSED)
def test_bad_flags(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    name, *flags = command.split()
    with pytest.raises(SystemExit) as stopped:
        MODULES[name].main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("intents", r"data_full\.json is no file of CLINC150: FileNotFoundError"),
        ("mnist", r"There is no train-images-idx3-ubyte\.gz in "),
        ("ocr", r"There is no images_background\*\.zip in "),
        ("omniglot", r"There is no images_background\*\.zip in "),
        ("pos_tagging", r"Expected one file \*-ud-train\.conllu in .*, found 0"),
        ("reid", r"There is no images_background\*\.zip in "),
    ],
)
def test_a_folder_without_the_data(name, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        MODULES[name].main(["--data", str(tmp_path), "--out", str(tmp_path)])


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        digits.main(["--help"])
    assert stopped.value.code == 0
    assert "(default: 0.1)" in capsys.readouterr().out


def test_divergence_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"λ = 0, seed 0: the loss is not finite\. Lower --lr"):
        digits.main(["--quick", "--lr", "100", "--out", str(tmp_path)])


def test_interrupt(monkeypatch, tmp_path, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        digits.main(["--quick", "--out", str(tmp_path)])
    assert stopped.value.code == 130
    assert "Stopped" in capsys.readouterr().err


@pytest.fixture
def with_ctrl_c():
    """For processes started by a test: in the background of a shell script they would ignore Ctrl-C."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


def assert_stopped(status, error):
    assert status == 130
    assert "Stopped before the end." in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["digits", "mnist", "ocr", "omniglot", "pos_tagging", "reid", "sharded"])
def test_interrupt_while_importing(name, with_ctrl_c, tmp_path):
    # In JAX's place, whose import takes its time, a module that is interrupted.
    (tmp_path / "jax.py").write_text("import signal; signal.raise_signal(signal.SIGINT); raise ImportError")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert_stopped(done.returncode, done.stderr)


def test_an_import_leaves_ctrl_c_alone():
    # The tests import all examples, as the notebook does.
    assert signal.getsignal(signal.SIGINT) is not _ctrl_c.stop_at_once


@pytest.mark.slow
@pytest.mark.parametrize("sent", [1, 3])
def test_interrupt_while_sharded_trains(sent, with_ctrl_c):
    flags = ["--classes", "1000", "--feat-dim", "4", "--batch-size", "64", "--steps", "1000000"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, str(SHARDED), *flags], env=environment, text=True, **pipes) as run:
        assert "8 devices" in run.stdout.readline()
        for _ in range(sent):  # The later ones while it waits for its devices.
            time.sleep(0.3)
            run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=60)
    assert_stopped(run.returncode, error)


SHARDED = EXAMPLES / "sharded.py"


def run_sharded(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # Devices are made by the script.
    command = [sys.executable, str(SHARDED), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_sharded_splits_the_table_and_learns():
    done = run_sharded(
        "--quick", "--classes", "10000", "--feat-dim", "16", "--tail", "20", "--batch-size", "256"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 devices (cpu), mesh {'data': 2, 'classes': 4}" in done.stdout
    assert "centers and state: 0.6 MiB" in done.stdout
    # 2,500 classes of 16 features on each device.
    assert len(re.findall(r"0\.2 MiB of centers and state", done.stdout)) == 8
    assert re.search(r"[\d.]+ steps per second, 10,000 classes of 16 features", done.stdout)
    first, last, noise = map(
        float, re.search(r"class: ([\d.]+), then ([\d.]+); .*: ([\d.]+)", done.stdout).groups()
    )
    assert noise == 2.0
    assert last < 0.6 * first


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "1001"), "--classes: 1001 does not divide into 4 shards: 1004 does"),
        (("--data", "3"), "--data: 3 does not divide the 8 devices"),
        (("--batch-size", "1023"), "--batch-size: 1023 does not divide by --data 2"),
        (("--steps", "0"), "--steps: must be at least 1, got 0"),
    ],
)
def test_sharded_refuses(arguments, message):
    done = run_sharded(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
