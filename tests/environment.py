"""What JAX reads as it is imported, for the tests and for every process that they start."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Virtual devices share the threads of the CPU, by default one for each of them. A device that waits for the
# others holds one, and those it waits for may find none left.
os.environ.setdefault("NPROC", "32")
# Most of the time goes to compiling small programs. They are kept, for the other worker and the next run. All
# of it in the environment, so that the processes that tests start compute the same bits.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
