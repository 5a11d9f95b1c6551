"""Eight virtual CPU devices for every test, and quick compilation; set before jax is imported anywhere."""

import os
import pathlib
import tempfile

import pytest
from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests compile the same programs: the workers of a run, and the processes that tests start, share what is compiled.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="lowrank_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# XLA's threads. With one a device, its default on a small machine, devices that wait for each other can wait for ever.
os.environ.setdefault("NPROC", "16")
# Tests compile much and run little: leaving LLVM's slow passes out saves a third of their time, the emitters by MLIR another.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",  # the workers fill the cores already
)
_missing = [flag for flag in _FLAGS if flag not in os.environ.get("XLA_FLAGS", "")]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_missing]).strip()

_MAPS = pathlib.Path("/proc/self/maps")
_MANY = 20_000  # Linux allows a process 65,530 by default


# The same few examples in every run, however slow the machine is.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption("--every-mesh", action="store_true", help="every method on every division of eight devices")
    parser.addoption(
        "--soak-steps",
        type=int,
        default=48,
        help="updates of the run that meets every fault; 5000 are an hour of MiniLM's",
    )


@pytest.fixture(autouse=True)
def _few_compiled_programs():
    """Every program that XLA compiles on a CPU keeps memory mappings; when they run out the compiler crashes."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
        import jax

        jax.clear_caches()
