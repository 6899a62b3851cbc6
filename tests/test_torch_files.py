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

import jax_centerloss as jcl

HAS_TORCH = importlib.util.find_spec("torch") is not None
TABLE = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_torch_is_there_where_it_is_required():
    assert HAS_TORCH or not os.environ.get("CENTERLOSS_REQUIRE_TORCH")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_mapping_and_safetensors_keep_values_and_dtype(tmp_path, dtype):
    state = {"net.weight": np.ones((2, 2), np.float32), "loss.centers": TABLE.astype(dtype)}
    save_file(state, tmp_path / "model.safetensors")
    for source in (state, tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        params = jcl.from_torch(source, key="loss.centers")
        assert params["centers"].dtype == dtype
        np.testing.assert_array_equal(params["centers"].astype(jnp.float32), TABLE)


def test_what_comes_in_is_a_copy():
    source = TABLE.copy()
    params = jcl.from_torch({"centers": source})
    source[:] = 0
    np.testing.assert_array_equal(params["centers"], TABLE)


def test_only_the_centers_of_a_file_are_read(tmp_path):
    # One tensor has a dtype that NumPy has not, as a header written by hand: 8 bytes of length, then JSON.
    header = json.dumps(
        {
            "half": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
            "centers": {"dtype": "F32", "shape": [3, 2], "data_offsets": [4, 28]},
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4) + TABLE.tobytes())
    np.testing.assert_array_equal(jcl.from_torch(path)["centers"], TABLE)
    with pytest.raises(KeyError, match=r"holds: (.*, )?half \(4,\) F8_E4M3"):
        jcl.from_torch(path, key="other")


def test_a_long_state_dict_is_not_listed_whole():
    with pytest.raises(KeyError, match=r"layer49 \(1,\) float64 and 50 more"):
        jcl.from_torch({f"layer{i}": np.zeros(1) for i in range(100)})


def test_a_reader_that_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="safetensors"):
        jcl.from_torch(tmp_path / "model.safetensors")


def test_errors_say_what_the_file_holds(tmp_path):
    held = r"weight \(2, 2\) float32, ids \(3, 2\) int32, flat \(6,\) float32, epoch \(int\)"
    state = {
        "weight": np.ones((2, 2), np.float32),
        "ids": TABLE.astype(np.int32),
        "flat": TABLE.ravel(),
        "epoch": 3,
    }
    with pytest.raises(KeyError, match=rf"{held}\. Name"):
        jcl.from_torch(state)
    with pytest.raises(KeyError, match=r"holds: nothing\. Name"):
        jcl.from_torch({})
    with pytest.raises(ValueError, match=r"'none' must have shape \(C, D\), got \(0, 3\)"):
        jcl.from_torch({"none": np.zeros((0, 3))}, key="none")
    with pytest.raises(TypeError, match=rf"'ids' must be floating point, got int32.*{held}"):
        jcl.from_torch(state, key="ids")
    with pytest.raises(ValueError, match=rf"'flat' must have shape \(C, D\), got \(6,\).*{held}"):
        jcl.from_torch(state, key="flat")
    with pytest.raises(TypeError, match=rf"'epoch' must be a tensor.*{held}"):
        jcl.from_torch(state, key="epoch")
    with pytest.raises(TypeError, match=r"state_dict\(\)"):
        jcl.from_torch(object())
    for ending in ("safetensors", "pt"):
        with pytest.raises(FileNotFoundError):
            jcl.from_torch(tmp_path / f"none.{ending}")


def header(content, body=b""):
    return len(content).to_bytes(8, "little") + content + body


def declared(shape, end, dtype="F32"):
    return json.dumps({"centers": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()


SOUND = header(declared([3, 2], 24), TABLE.tobytes())
BROKEN = {
    "empty": b"",
    "cut": SOUND[:-1],
    "half": SOUND[: len(SOUND) // 2],
    "pickle": b"\x80\x04\x95\x1f" + bytes(60),
    "endless header": (2**62).to_bytes(8, "little") + b"{}",
    "no JSON": header(b"{nope"),
    "larger than its bytes": header(declared([10**9, 10**6], 24), bytes(24)),
    "larger than the file": header(declared([10**9, 10**6], 4 * 10**15), bytes(24)),
    "no dtype of NumPy": header(declared([3, 2], 6, "F8_E4M3"), bytes(6)),
    "unknown dtype": header(declared([3, 2], 24, "F33"), bytes(24)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors_are_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"model\.safetensors' can't be read: \w+: ."):
        jcl.from_torch(path)


CHECKPOINT = {
    "epoch": 3,
    "state_dict": {"fc.weight": np.ones((2, 2)), "center_loss.centers": TABLE},
    "best": 0.5,
}


def test_a_key_leads_into_nested_checkpoints():
    params = jcl.from_torch(CHECKPOINT, key="state_dict.center_loss.centers")
    np.testing.assert_array_equal(params["centers"], TABLE)
    held = (
        r"epoch \(int\), state_dict\.fc\.weight \(2, 2\) float64, state_dict\.center_loss\.centers \(3, 2\)"
    )
    for key in ("centers", "center_loss.centers"):
        with pytest.raises(KeyError, match=held + ".* perhaps `key='state_dict.center_loss.centers'`"):
            jcl.from_torch(CHECKPOINT, key=key)


def test_one_array_is_centers():
    for source in (TABLE, jnp.asarray(TABLE)):
        np.testing.assert_array_equal(jcl.from_torch(source)["centers"], TABLE)
    with pytest.raises(ValueError, match=r"source must have shape \(C, D\), got \(2,\)"):
        jcl.from_torch(TABLE[0, :])
    with pytest.raises(TypeError, match=r"source must be a tensor, a mapping .* path of a file, got list"):
        jcl.from_torch([TABLE])


def test_a_folder_and_a_missing_torch_are_named(tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError, match="is a folder: pass the file in it"):
        jcl.from_torch(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs torch\. Without it, pass arrays"):
        jcl.from_torch(tmp_path / "model.ckpt")


if HAS_TORCH:
    import torch

    @pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
    def test_round_trip(tmp_path, name):
        tensor = torch.from_numpy(TABLE.copy()).to(getattr(torch, name))
        torch.save({"loss.centers": torch.nn.Parameter(tensor)}, tmp_path / "model.pt")
        for source in (tmp_path / "model.pt", {"loss.centers": tensor.requires_grad_()}):
            params = jcl.from_torch(source, key="loss.centers")
            assert params["centers"].dtype == ("float32" if name == "float64" else name)
            back = jcl.to_torch(params)["centers"]
            assert back.dtype == (torch.float32 if name == "float64" else tensor.dtype)
            np.testing.assert_array_equal(back.float().numpy(), TABLE)

    def test_to_torch_loads_into_a_module():
        module = torch.nn.Module()
        module.centers = torch.nn.Parameter(torch.zeros(3, 2))
        module.load_state_dict(jcl.to_torch({"centers": jnp.asarray(TABLE)}))
        np.testing.assert_array_equal(module.centers.detach().numpy(), TABLE)

    def test_a_module_is_refused_with_the_way_out():
        with pytest.raises(TypeError, match=r"module\.state_dict\(\)"):
            jcl.from_torch(torch.nn.Linear(2, 2))

    def save(path, value, **options):
        torch.save({"centers": value, "epoch": 3}, path, **options)
        return path

    def trained():
        module = torch.nn.Linear(2, 3)
        optimizer = torch.optim.Adam(module.parameters())
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return module, optimizer

    @pytest.mark.parametrize(
        "name", ["model.pth", "model.pth.tar", "model.pth.tar-60", "last.ckpt", "pytorch_model.bin", "none"]
    )
    def test_checkpoints_as_people_have_them(tmp_path, name):
        module, optimizer = trained()
        state = {"epoch": 3, "state_dict": module.state_dict(), "optimizer": optimizer.state_dict()}
        state["small"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        torch.save(state, tmp_path / name)
        for source in (tmp_path / name, str(tmp_path / name), state):
            loaded = jcl.from_torch(source, key="state_dict.weight")
            np.testing.assert_array_equal(loaded["centers"], module.weight.detach().numpy())
        with pytest.raises(KeyError, match=r"state_dict\.weight \(3, 2\) float32.*optimizer\.state\.0\.step"):
            jcl.from_torch(tmp_path / name)

    def test_tensors_that_need_a_gradient_are_named():
        x = torch.zeros(4, 2, requires_grad=True)
        with pytest.raises(TypeError, match="x must be an array, got Tensor"):
            jcl.center_loss(TABLE, x, np.zeros(4, int))
        assert jcl.center_loss(TABLE[:1] + 1, x.detach(), torch.zeros(4, dtype=torch.int32)) > 0

    def test_one_parameter(tmp_path):
        module, _ = trained()
        torch.save(module.weight, tmp_path / "weight.pt")
        for source in (module.weight, module.weight.detach(), tmp_path / "weight.pt"):
            want = module.weight.detach().numpy()
            np.testing.assert_array_equal(jcl.from_torch(source)["centers"], want)

    def test_a_tensor_that_goes_on_to_train_does_not_change_what_was_taken():
        # Large and aligned, so that JAX could share its memory.
        tensor = torch.zeros(4096, 64)
        params = jcl.from_torch(tensor)
        tensor.add_(1)
        np.testing.assert_array_equal(params["centers"], np.zeros((4096, 64)))

    def test_a_file_of_before_pytorch_1_6(tmp_path):
        path = save(tmp_path / "old.pt", torch.ones(3, 2), _use_new_zipfile_serialization=False)
        np.testing.assert_array_equal(jcl.from_torch(path)["centers"], np.ones((3, 2)))

    class Code:
        def __reduce__(self):
            return os.mkdir, ("RAN",)

    def test_what_pytorchs_safe_loader_refuses_is_named_with_the_way_out(tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save(torch.nn.Linear(2, 3), "module.pt")
        words = (
            r"'module\.pt' can't be read: .* holds torch\.nn\.modules\.linear\.Linear.*net\.state_dict\(\)"
        )
        with pytest.raises(ValueError, match=words):
            jcl.from_torch("module.pt")
        torch.save({"centers": torch.ones(3, 2), "args": argparse.Namespace(lr=0.1)}, "last.ckpt")
        with pytest.raises(ValueError, match=r"holds argparse\.Namespace.*weights_only=False"):
            jcl.from_torch("last.ckpt")
        save("code.pt", Code())
        with pytest.raises(ValueError, match=r"code\.pt' can't be read"):
            jcl.from_torch("code.pt")
        assert not (tmp_path / "RAN").exists()

    def test_an_error_of_the_disk_stays_what_it_is(tmp_path, monkeypatch):
        path = save(tmp_path / "model.pt", torch.ones(3, 2))

        def refuse(*args, **kwargs):
            raise PermissionError(13, "no; see weights_only")

        monkeypatch.setattr(torch, "load", refuse)
        with pytest.raises(PermissionError):
            jcl.from_torch(path)

    @pytest.mark.parametrize("content", [b"", b"hello world\n" * 50, "half"], ids=["empty", "text", "half"])
    def test_broken_files_are_refused(tmp_path, content):
        path = save(tmp_path / "model.pt", torch.ones(3, 2))
        path.write_bytes(path.read_bytes()[:300] if content == "half" else content)
        with pytest.raises(ValueError, match=r"model\.pt' can't be read: "):
            jcl.from_torch(path)

    @pytest.mark.parametrize("kind", ["meta", "float8", "sparse"])
    @pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PyTorch says so when it reads one.
    def test_a_tensor_without_numbers_for_numpy_is_named(tmp_path, kind):
        value = {
            "meta": torch.zeros(3, 2, device="meta"),
            "float8": torch.ones(3, 2).to(torch.float8_e4m3fn),
            "sparse": torch.eye(3).to_sparse(),
        }[kind]
        held = r"'centers' must be a tensor; the state dict holds: centers \(.*\)"
        for source in (save(tmp_path / "model.pt", value), {"centers": value}):
            with pytest.raises(TypeError, match=held):
                jcl.from_torch(source)
