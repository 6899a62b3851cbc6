"""Centers from and to PyTorch. What needs torch itself runs where it is installed; CI requires it."""

import importlib.util
import json
import os
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
        with pytest.raises(Exception, match=r"[Ww]eights"):
            jcl.from_torch(tmp_path / "evil.pt")
        assert not marker.exists()
