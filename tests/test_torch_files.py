"""Centers from and to PyTorch. What needs torch itself runs where it is installed; CI requires it."""

import importlib.util
import io
import json
import os
import pickle
import resource
import warnings
import zipfile

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


def test_errors_say_what_the_file_holds(tmp_path):
    held = r"weight \(2, 2\) float32, ids \(3, 2\) int32, flat \(6,\) float32, epoch \(int\)"
    state = {
        "weight": np.ones((2, 2), np.float32),
        "ids": TABLE.astype(np.int32),
        "flat": TABLE.ravel(),
        "epoch": 3,
    }
    with pytest.raises(KeyError, match=held):
        jcl.from_torch(state)
    with pytest.raises(TypeError, match=rf"'ids' must be floating point, got int32.*{held}"):
        jcl.from_torch(state, key="ids")
    with pytest.raises(ValueError, match=rf"'flat' must have shape \(C, D\), got \(6,\).*{held}"):
        jcl.from_torch(state, key="flat")
    with pytest.raises(TypeError, match=rf"'epoch' must be a tensor.*{held}"):
        jcl.from_torch(state, key="epoch")
    with pytest.raises(ValueError, match=r"\.pt, \.pth or \.safetensors"):
        jcl.from_torch(tmp_path / "model.onnx")
    with pytest.raises(TypeError, match=r"state_dict\(\)"):
        jcl.from_torch(object())
    with pytest.raises(FileNotFoundError):
        jcl.from_torch(tmp_path / "none.safetensors")


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
    "no dtype of NumPy's": header(declared([3, 2], 6, "F8_E4M3"), bytes(6)),
    "unknown dtype": header(declared([3, 2], 24, "F33"), bytes(24)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors_are_refused_and_take_no_memory(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"model\.safetensors' can't be read: \w+"):
        jcl.from_torch(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB
    path.write_bytes(SOUND)
    np.testing.assert_array_equal(jcl.from_torch(path)["centers"], TABLE)


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

    def test_a_pickle_that_runs_code_does_not_run(tmp_path):
        marker = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        torch.save({"centers": Evil()}, tmp_path / "evil.pt")
        assert zipfile.is_zipfile(tmp_path / "evil.pt")
        torch.save({"centers": Evil()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
        (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
        for name in ("evil", "old", "module", "bare"):
            with (
                warnings.catch_warnings(action="ignore"),  # PyTorch's, of what a bare pickle is.
                pytest.raises(
                    ValueError, match=rf"{name}\.pt' can't be read: .*could run code and is not read"
                ),
            ):
                jcl.from_torch(tmp_path / f"{name}.pt")
        assert not marker.exists()

    def rezipped(content, compression, **changed):
        """An archive of PyTorch's, with other bytes in some of its members, or without them."""
        new = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new, "w", compression) as archive:
            for name in old.namelist():
                data = changed.get(name.split("/", 1)[1], old.read(name))
                if data is not None:
                    archive.writestr(name, data)
        return new.getvalue()

    def saved(value, **options):
        file = io.BytesIO()
        torch.save({"centers": value}, file, **options)
        return file.getvalue()

    def test_broken_and_forged_pickles_are_refused_and_take_no_memory(tmp_path):
        table = torch.arange(6.0).reshape(3, 2)
        new, old = saved(table), saved(table, _use_new_zipfile_serialization=False)
        huge = old.replace(b"K\x06N", b"\x8a\x06" + (10**13).to_bytes(6, "little") + b"N")  # Numbers in it.
        assert huge != old
        bomb = rezipped(new, zipfile.ZIP_DEFLATED, **{"data/0": bytes(2**28)})
        assert len(bomb) < 2**20
        files = {
            "empty": b"",
            "text": b"hello world\n" * 50,
            "cut": new[:-1],
            "half": new[: len(new) // 2],
            "old, cut": old[:-10],
            "old, half": old[: len(old) // 2],
            "old, huge": huge,
            "data cut": rezipped(new, zipfile.ZIP_STORED, **{"data/0": bytes(8)}),
            "data gone": rezipped(new, zipfile.ZIP_STORED, **{"data/0": None}),
            "bomb": bomb,
            "one number declared to be a terabyte": saved(torch.zeros(1).expand(10**6, 10**5)),
            "sparse": saved(torch.eye(3).to_sparse()),
        }
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, content in files.items():
            (tmp_path / f"{name}.pt").write_bytes(content)
            with (
                warnings.catch_warnings(action="ignore"),
                pytest.raises(ValueError, match=rf"{name}\.pt' can't be read: \w+"),
            ):
                jcl.from_torch(tmp_path / f"{name}.pt")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB
        for content in (new, old, rezipped(new, zipfile.ZIP_STORED)):
            (tmp_path / "sound.pth").write_bytes(content)
            np.testing.assert_array_equal(jcl.from_torch(tmp_path / "sound.pth")["centers"], TABLE)

    @pytest.mark.parametrize(
        "value", [torch.zeros(3, 2, device="meta"), torch.ones(3, 2).to(torch.float8_e4m3fn)]
    )
    def test_a_tensor_without_numbers_for_numpy_is_named(tmp_path, value):
        (tmp_path / "model.pt").write_bytes(saved(value))
        with pytest.raises(
            TypeError, match=r"'centers' must be a tensor; the state dict holds: centers \(3, 2\)"
        ):
            jcl.from_torch(tmp_path / "model.pt")
