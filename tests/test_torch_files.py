"""Centers from and to PyTorch. What needs torch itself runs where it is installed; CI requires it."""

import importlib.util
import io
import json
import os
import pickle
import re
import subprocess
import sys
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
    with pytest.raises(ValueError, match=r"\.pt, \.pth or \.safetensors"):
        jcl.from_torch(tmp_path / "model.onnx")
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


NUMBERS = TABLE.tobytes()


def text(word):
    return b"X" + len(word).to_bytes(4, "little") + word


def numbers(*values):
    return b"(" + b"".join(b"J" + v.to_bytes(4, "little", signed=True) for v in values) + b"t"


def tensor(
    shape=(3, 2), strides=(2, 1), offset=0, kind=b"FloatStorage", made_by=b"torch._utils\n_rebuild_tensor_v2"
):
    """As PyTorch pickles it: a call of `made_by`, whose storage is the member "0" of the archive."""
    storage = b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + text(b"0") + text(b"cpu") + b"K\x06tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    sizes = numbers(offset)[1:-1] + numbers(*shape) + numbers(*strides)
    return b"c" + made_by + b"\n(" + storage + sizes + hooks + b"tR"


def archive(centers, data=NUMBERS, compression=zipfile.ZIP_STORED, order=b"little"):
    """As `torch.save({"centers": ...})` writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as members:
        if order is not None:
            members.writestr("model/byteorder", order)
        members.writestr("model/data.pkl", b"\x80\x02}" + text(b"centers") + centers + b"s.")
        if data is not None:
            members.writestr("model/data/0", data)
    return file.getvalue()


SOUND_PT = archive(tensor())
BROKEN_PT = {
    "empty": b"",
    "text": b"hello world\n" * 50,
    "cut": SOUND_PT[:-1],
    "half": SOUND_PT[: len(SOUND_PT) // 2],
    "a flipped byte": SOUND_PT.replace(TABLE.tobytes(), TABLE.tobytes()[::-1]),
    "a bare pickle": pickle.dumps({"centers": 1}),
    "numbers cut": archive(tensor(), bytes(8)),
    "numbers gone": archive(tensor(), None),
    "more numbers than stored": archive(tensor((10**9, 10**6), (10**6, 1))),
    "one number for all": archive(tensor((10**5, 10**5), (0, 0))),
    "steps beyond the end": archive(tensor((3, 2), (10**6, 1))),
    "a start beyond the end": archive(tensor(offset=10**6)),
    "a negative start": archive(tensor(offset=-1)),
    "negative steps": archive(tensor(strides=(-2, 1))),
    "a negative size": archive(tensor((-3, -2))),
    "fewer steps than sizes": archive(tensor((3, 2), (1,))),
    "unknown storage": archive(tensor(kind=b"PicoStorage")),
    "a bomb": archive(tensor((2**13, 2**13), (2**13, 1)), bytes(2**28), zipfile.ZIP_DEFLATED),
    "a place beyond memory": archive(tensor() + b"r" + (2**31 - 1).to_bytes(4, "little")),
    "an endless array": archive(b"\x96" + (2**40).to_bytes(8, "little")),
    "an endless word": archive(b"X" + (2**31 - 1).to_bytes(4, "little")),
    "an open pickle": archive(b"(((("),
    "an unknown operation": archive(b"\xff"),
    "another order of bytes": archive(tensor(), order=b"big"),
}
# What is not a tensor is not made, whatever it is.
NO_TENSORS = {
    "memory": tensor(made_by=b"builtins\nbytearray"),
    "a gigabyte": b"cbuiltins\nbytearray\n" + numbers(10**9) + b"R",
    "not filled": b"ctorch\nTensor\n" + numbers(10**4, 10**5) + b"R",
    "code": b"cos\nmkdir\n(" + text(b"RAN") + b"tR",
    "evaluated": b"cbuiltins\neval\n(" + text(b"__import__('os').mkdir('RAN')") + b"tR",
    "of a class": b"(i__main__\nCode\n}" + text(b"ran") + b"\x88sb",
    "filled": b"ccollections\ndeque\n)R(K\x01K\x02e",
    "a mapping": b"ccollections\nCounter\n)RK\x01K\x02s",
    "a number": b"K\x03",
}
READ = """
import json, resource, sys
import jax_centerloss
def read(path):
    try:
        jax_centerloss.from_torch(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
assert read(sys.argv[1]) is None, read(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {path: read(path) for path in sys.argv[2:]}
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([grown * 1024, found, "torch" in sys.modules]))
"""


def errors(folder, sound, files, ending):
    """What `from_torch` raises of each, in a process in which they may not take 64 MB."""
    paths = [folder / f"{name}.{ending}" for name in ("sound", *files)]
    for path, content in zip(paths, (sound, *files.values()), strict=True):
        path.write_bytes(content)
    printed = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)], check=True, capture_output=True, text=True
    ).stdout
    grown, found, torch_used = json.loads(printed)
    assert grown < 2**26
    assert not torch_used
    return {name: found[str(path)] for name, path in zip(files, paths[1:], strict=True)}


def test_broken_safetensors_are_refused_and_take_no_memory(tmp_path):
    for name, message in errors(tmp_path, SOUND, BROKEN, "safetensors").items():
        words = rf"ValueError: .*{name}\.safetensors' can't be read: \w+: ."
        assert re.match(words, message), (name, message)


def test_broken_and_forged_pickles_are_refused_and_take_no_memory(tmp_path):
    for name, message in errors(tmp_path, SOUND_PT, BROKEN_PT, "pt").items():
        assert re.match(rf"ValueError: .*{name}\.pt' can't be read: \w+: .", message), (name, message)


def test_a_pickle_that_runs_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {name: archive(centers) for name, centers in NO_TENSORS.items()}
    for name, message in errors(tmp_path, SOUND_PT, files, "pt").items():
        words = "TypeError: 'centers' must be a tensor; the state dict holds: centers ("
        assert message.startswith(words), (name, message)
    assert not (tmp_path / "RAN").exists()


def test_archives_of_old_and_with_tensors_of_the_future(tmp_path):
    (tmp_path / "model.pt").write_bytes(archive(tensor(), order=None))
    np.testing.assert_array_equal(jcl.from_torch(tmp_path / "model.pt")["centers"], TABLE)
    (tmp_path / "model.pt").write_bytes(archive(tensor(kind=b"PicoStorage")))
    with pytest.raises(KeyError, match=r"holds: centers \(3, 2\) PicoStorage\. Name"):
        jcl.from_torch(tmp_path / "model.pt", key="other")


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((3, 2), (2, 1), 0), ((2, 3), (1, 2), 0), ((2, 2), (2, 1), 2), ((3, 1), (2, 1), 1)],
)
def test_views_of_an_archive(tmp_path, shape, strides, offset):
    (tmp_path / "model.pth").write_bytes(archive(tensor(shape, strides, offset)))
    want = np.lib.stride_tricks.as_strided(TABLE.ravel()[offset:], shape, [4 * step for step in strides])
    np.testing.assert_array_equal(jcl.from_torch(tmp_path / "model.pth")["centers"], want)


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

    def test_what_pytorch_saves_beside_tensors_is_no_hindrance(tmp_path):
        module = torch.nn.Linear(2, 3)
        optimizer = torch.optim.Adam(module.parameters())
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        state = {"loss.centers": module.weight, "optimizer": optimizer.state_dict(), "size": torch.Size([3])}
        torch.save(state | {"small": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.pt")
        loaded = jcl.from_torch(tmp_path / "model.pt", key="loss.centers")
        np.testing.assert_array_equal(loaded["centers"], module.weight.detach().numpy())
        held = r"loss\.centers \(3, 2\) float32, optimizer \(dict\), size \(torch\.Size\)"
        with pytest.raises(KeyError, match=held):
            jcl.from_torch(tmp_path / "model.pt")
        torch.save(module, tmp_path / "module.pt")
        with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.linear\.Linear\. For a module pass"):
            jcl.from_torch(tmp_path / "module.pt")

    def test_a_file_of_before_pytorch_1_6_says_how_to_read_it(tmp_path):
        path = save(tmp_path / "old.pt", torch.ones(3, 2), _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match=r"can't be read: .*`torch\.load\(path, weights_only=True\)`"):
            jcl.from_torch(path)
        state = torch.load(path, weights_only=True)
        np.testing.assert_array_equal(jcl.from_torch(state)["centers"], np.ones((3, 2)))

    @pytest.mark.parametrize("kind", ["meta", "float8", "sparse"])
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
