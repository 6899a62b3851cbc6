"""Centers from and to PyTorch. What needs torch itself runs where it is installed; CI requires it."""

import argparse
import importlib.util
import json
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_field import aligned

import jax_centerloss as jcl

TABLE = np.arange(6, dtype=np.float32).reshape(3, 2)
NESTED = {
    "epoch": 3,
    "state_dict": {"fc.weight": np.ones((2, 2)), "center_loss.centers": TABLE},
    "best": 0.5,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_mappings_and_files_keep_values_and_dtype(tmp_path, dtype):
    centers = TABLE.astype(dtype)
    state = {"net.weight": np.ones((2, 2), np.float32), "loss.centers": centers}
    save_file(state, tmp_path / "model.safetensors")
    for source, key in (
        (state, "loss.centers"),
        (tmp_path / "model.safetensors", "loss.centers"),
        (str(tmp_path / "model.safetensors"), "loss.centers"),
        ({"state_dict": state}, "state_dict.loss.centers"),
        (centers, "is not used"),
        (jnp.asarray(centers), "is not used"),
    ):
        params = jcl.from_torch(source, key=key)
        assert params["centers"].dtype == dtype
        np.testing.assert_array_equal(params["centers"].astype(jnp.float32), TABLE)


def test_an_array_that_is_overwritten_does_not_change_what_was_taken():
    array = aligned(4096, 64)
    taken = [jcl.from_torch(source)["centers"] for source in (array, {"centers": array})]
    array[:] = 1
    for centers in taken:
        np.testing.assert_array_equal(centers, np.zeros((4096, 64)))


STATE = {
    "weight": np.ones((2, 2), np.float32),
    "ids": TABLE.astype(np.int32),
    "flat": TABLE.ravel(),
    "epoch": 3,
}
HELD = r"weight \(2, 2\) float32, ids \(3, 2\) int32, flat \(6,\) float32, epoch \(int\)"
HELD_NESTED = (
    r"epoch \(int\), state_dict\.fc\.weight \(2, 2\) float64, state_dict\.center_loss\.centers \(3, 2\)"
    ".* perhaps `key='state_dict.center_loss.centers'`"
)
LONG = {f"layer{i}": np.zeros(1) for i in range(100)}
REFUSED = {
    "no such key": (STATE, "centers", KeyError, rf"{HELD}\. Name"),
    "nothing in it": ({}, "centers", KeyError, r"holds: nothing\. Name"),
    "a long state dict": (LONG, "centers", KeyError, r"layer49 \(1,\) float64 and 50 more"),
    "the last part of a key": (NESTED, "centers", KeyError, HELD_NESTED),
    "the end of a key": (NESTED, "center_loss.centers", KeyError, HELD_NESTED),
    "no rows": (
        {"none": np.zeros((0, 3))},
        "none",
        ValueError,
        r"'none' must have shape \(C, D\), got \(0, 3\)",
    ),
    "integers": (STATE, "ids", TypeError, rf"'ids' must be floating point, got int32.*{HELD}"),
    "flat": (STATE, "flat", ValueError, rf"'flat' must have shape \(C, D\), got \(6,\).*{HELD}"),
    "a number": (STATE, "epoch", TypeError, rf"'epoch' must be a tensor.*{HELD}"),
    "a row": (TABLE[0, :], "centers", ValueError, r"source must have shape \(C, D\), got \(2,\)"),
    "a list": (
        [TABLE],
        "centers",
        TypeError,
        "source must be a tensor, a mapping .* path of a file, got list",
    ),
    "an object": (object(), "centers", TypeError, r"module\.state_dict\(\)"),
    "no safetensors": ("none.safetensors", "centers", FileNotFoundError, "none"),
    "no file": ("none.pt", "centers", FileNotFoundError, "none"),
    "a folder": (".", "centers", IsADirectoryError, "is a folder: pass the file in it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_say_what_there_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    source, key, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        jcl.from_torch(source, key=key)


@pytest.mark.parametrize(
    ("library", "file", "words"),
    [
        ("safetensors", "model.safetensors", "safetensors"),
        ("torch", "model.ckpt", r"needs torch\. Without it, pass arrays"),
    ],
)
def test_a_reader_that_is_not_installed_is_named(tmp_path, monkeypatch, library, file, words):
    (tmp_path / file).write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=words):
        jcl.from_torch(tmp_path / file)


def safetensors(tensors, body):
    """A file as a header written by hand: 8 bytes of length, JSON, and the numbers."""
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + body


def declared(shape, end, dtype="F32", start=0):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_only_the_centers_of_a_file_are_read(tmp_path):
    # The other tensor has a dtype that NumPy has not.
    tensors = {"half": declared([4], 4, "F8_E4M3"), "centers": declared([3, 2], 28, start=4)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(tensors, bytes(4) + TABLE.tobytes()))
    np.testing.assert_array_equal(jcl.from_torch(path)["centers"], TABLE)
    with pytest.raises(KeyError, match=r"holds: (.*, )?half \(4,\) F8_E4M3"):
        jcl.from_torch(path, key="other")


SOUND = safetensors({"centers": declared([3, 2], 24)}, TABLE.tobytes())
BROKEN = {
    "empty": b"",
    "cut": SOUND[:-1],
    "half": SOUND[: len(SOUND) // 2],
    "pickle": b"\x80\x04\x95\x1f" + bytes(60),
    "endless header": (2**62).to_bytes(8, "little") + b"{}",
    "no JSON": (5).to_bytes(8, "little") + b"{nope",
    "larger than its bytes": safetensors({"centers": declared([10**9, 10**6], 24)}, bytes(24)),
    "larger than the file": safetensors({"centers": declared([10**9, 10**6], 4 * 10**15)}, bytes(24)),
    "no dtype of NumPy": safetensors({"centers": declared([3, 2], 6, "F8_E4M3")}, bytes(6)),
    "unknown dtype": safetensors({"centers": declared([3, 2], 24, "F33")}, bytes(24)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors_are_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"model\.safetensors' can't be read: \w+: ."):
        jcl.from_torch(path)


if importlib.util.find_spec("torch") is not None:
    import torch

    @pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
    def test_round_trip(tmp_path, name):
        tensor = torch.from_numpy(TABLE.copy()).to(getattr(torch, name))
        torch.save({"loss.centers": torch.nn.Parameter(tensor)}, tmp_path / "model.pt")
        for source in (tmp_path / "model.pt", {"loss.centers": tensor.requires_grad_()}):
            params = jcl.from_torch(source, key="loss.centers")
            assert params["centers"].dtype == ("float32" if name == "float64" else name)
            back = jcl.to_torch(params)
            assert back.keys() == {"centers"}
            assert back["centers"].dtype == (torch.float32 if name == "float64" else tensor.dtype)
            np.testing.assert_array_equal(back["centers"].float().numpy(), TABLE)

    def test_checkpoints_as_people_have_them(tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        module = torch.nn.Linear(2, 3)
        optimizer = torch.optim.Adam(module.parameters())
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        state = {"epoch": 3, "state_dict": module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(module.weight, "weight.pt")
        torch.save(state, "old.pt", _use_new_zipfile_serialization=False)  # As before PyTorch 1.6.
        state["small"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        torch.save(state, "model.pth.tar-60")
        torch.save(state, "none")
        for source in ("model.pth.tar-60", "none", "old.pt", state):
            loaded = jcl.from_torch(source, key="state_dict.weight")
            np.testing.assert_array_equal(loaded["centers"], module.weight.detach().numpy())
        for source in ("weight.pt", module.weight, module.weight.detach()):
            loaded = jcl.from_torch(source)
            np.testing.assert_array_equal(loaded["centers"], module.weight.detach().numpy())
        with pytest.raises(KeyError, match=r"state_dict\.weight \(3, 2\) float32.*optimizer\.state\.0\.step"):
            jcl.from_torch("none")
        with pytest.raises(TypeError, match=r"module\.state_dict\(\)"):
            jcl.from_torch(module)

    def test_tensors_that_need_a_gradient_are_named():
        x = torch.zeros(4, 2, requires_grad=True)
        with pytest.raises(TypeError, match="x must be an array, got Tensor"):
            jcl.center_loss(TABLE, x, np.zeros(4, int))
        assert jcl.center_loss(TABLE[:1] + 1, x.detach(), torch.zeros(4, dtype=torch.int32)) > 0

    def test_a_tensor_that_goes_on_to_train_does_not_change_what_was_taken():
        # Large and aligned, so that JAX could share its memory.
        tensor = torch.zeros(4096, 64)
        params = jcl.from_torch(tensor)
        tensor.add_(1)
        np.testing.assert_array_equal(params["centers"], np.zeros((4096, 64)))

    class Code:
        def __reduce__(self):
            return os.mkdir, ("RAN",)

    SAVED = torch.ones(3, 2)
    UNSAFE = {
        "a module": (
            torch.nn.Linear(2, 3),
            r"'model\.pt' can't be read: .* holds torch\.nn\.modules\.linear\.Linear.*net\.state_dict\(\)",
        ),
        "its arguments": (
            {"centers": SAVED, "args": argparse.Namespace(lr=0.1)},
            r"holds argparse\.Namespace.*weights_only=False",
        ),
        "code": ({"centers": Code(), "epoch": 3}, r"model\.pt' can't be read"),
    }

    @pytest.mark.parametrize("name", UNSAFE)
    def test_what_pytorchs_safe_loader_refuses_is_named_with_the_way_out(tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        value, words = UNSAFE[name]
        torch.save(value, "model.pt")
        with pytest.raises(ValueError, match=words):
            jcl.from_torch("model.pt")
        assert not (tmp_path / "RAN").exists()

    def test_an_error_of_the_disk_stays_what_it_is(tmp_path, monkeypatch):
        (tmp_path / "model.pt").write_bytes(b"")

        def refuse(*args, **kwargs):
            raise PermissionError(13, "no; see weights_only")

        monkeypatch.setattr(torch, "load", refuse)
        with pytest.raises(PermissionError):
            jcl.from_torch(tmp_path / "model.pt")

    @pytest.mark.parametrize("content", [b"", b"hello world\n" * 50, "half"], ids=["empty", "text", "half"])
    def test_broken_files_are_refused(tmp_path, content):
        path = tmp_path / "model.pt"
        torch.save({"centers": SAVED}, path)
        path.write_bytes(path.read_bytes()[:300] if content == "half" else content)
        with pytest.raises(ValueError, match=r"model\.pt' can't be read: "):
            jcl.from_torch(path)

    @pytest.mark.parametrize(
        "value",
        [torch.zeros(3, 2, device="meta"), SAVED.to(torch.float8_e4m3fn), torch.eye(3).to_sparse()],
        ids=["meta", "float8", "sparse"],
    )
    @pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PyTorch says so when it reads one.
    def test_a_tensor_without_numbers_for_numpy_is_named(tmp_path, value):
        torch.save({"centers": value}, tmp_path / "model.pt")
        for source in (tmp_path / "model.pt", {"centers": value}):
            with pytest.raises(
                TypeError, match=r"'centers' must be a tensor; the state dict holds: centers \("
            ):
                jcl.from_torch(source)
