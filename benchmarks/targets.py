"""GPUs and TPUs that programs are compiled for on a machine that has neither."""

import importlib.util
import os
from typing import Any

# Before JAX looks for devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # JAX 0.7 would ask for a driver.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import jax
import jaxlib
from jax.experimental import topologies

# From the vendor's data sheets: compute capability, multiprocessors, GB/s, MiB of L2 cache, GHz and GiB; of a
# multiprocessor its KiB of shared memory, its threads and its float32 units.
GPUS = {
    "T4": ((7, 5), 40, 320, 4, 1.59, 16, 64, 1024, 64),
    "A100": ((8, 0), 108, 2039, 40, 1.41, 80, 164, 2048, 64),
    "H100": ((9, 0), 132, 3352, 50, 1.98, 80, 228, 2048, 128),
    "H200": ((9, 0), 132, 4800, 50, 1.98, 141, 228, 2048, 128),
}
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
POD = "v5e:16x16"
CUDA_WHEELS = "jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0} nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12"


def description(name: str) -> str:
    """The GPU as XLA takes it, in the text form of its `GpuTargetConfigProto`."""
    (major, minor), cores, bandwidth, cache, clock, memory, shared, threads, units = GPUS[name]
    most = shared if name == "T4" else shared - 1  # KiB that one block can ask for.
    return f"""gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
      memory_bandwidth: {bandwidth * 10**9} l2_cache_size: {cache * 2**20}
      device_memory_size: {memory * 2**30}
      shared_memory_per_core: {shared * 2**10} shared_memory_per_block: 49152
      shared_memory_per_block_optin: {most * 2**10}
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}" """


def devices(target: str) -> list[Any]:
    """The devices of a target, for which programs can be compiled but not run."""
    if target in GPUS:
        options = {"topology": "1x1x1", "target_config": description(target)}
        return list(topologies.get_topology_desc(platform="cuda", **options).devices)
    name = TPUS.get(target, target)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def missing(target: str) -> str | None:
    """The command that installs the compiler of a target, where it is not installed."""
    names = ("jax_cuda12_plugin", "jax_cuda13_plugin") if target in GPUS else ("libtpu",)
    if any(map(importlib.util.find_spec, names)):
        return None
    if target in GPUS:
        return f"pip install --no-deps {CUDA_WHEELS.format(jaxlib.__version__)}"
    return f'pip install "jax[tpu]=={jax.__version__}"'
