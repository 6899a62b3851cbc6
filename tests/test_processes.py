"""Two processes, each with half of the devices, train what one process does with all of them."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).with_name("train_in_processes.py")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # The script sets the devices.

    def start(out, processes, process):
        command = [sys.executable, "-W", "ignore::UserWarning", str(SCRIPT), str(tmp_path / out)]
        return subprocess.Popen(
            [*command, str(processes), str(process), address],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(started):
        try:
            # One that waits for the other would wait for ever.
            printed = [process.communicate(timeout=240)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == [0] * len(started), "\n\n".join(printed)[-6000:]

    finish([start("one.npz", 1, 0)])
    finish([start("two.npz", 2, process) for process in range(2)])
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one.files == two.files
    assert any(np.isnan(one[name]).all() for name in one.files)  # The loss of the bad label.
    for name in one.files:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5)
