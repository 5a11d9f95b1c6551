"""What a step would need on real hardware, from its compiler and without the hardware: bytes, FLOPs and seconds a device."""

from __future__ import annotations

import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_jax import chips, flops, hlo, shard
from lowrank_jax.adapters import Adapters
from lowrank_jax.forms import leaf_sharding
from lowrank_jax.plan import Plan

# What libtpu asks of a machine that has no TPU; the accelerator type only has to be a valid one.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-16"}


class TopologyError(ValueError):
    """A TPU topology that does not exist, or no TPU compiler to ask."""


class DoesNotFitError(ValueError):
    """The compiler refused a program because it needs more memory than the device has."""


@dataclass(frozen=True)
class CompileReport:
    """What the compiler says of one program, for one device.

    Attributes:
      peak: bytes at the worst moment, arguments included. temp: bytes of temporaries. argument: bytes of the arguments.
      flops: floating-point operations of the products of one call, an even share of all devices' (`lowrank_jax.flops.count`).
      sent: bytes that the device sends to others in collectives.
      seconds: of one call at best, by the TPU compiler's own estimate of cycles, collectives hidden behind computation as far as it is
        long enough; nan for a device that is not in `lowrank_jax.chips`.
      host: bytes of temporaries in the host's memory (offloaded activations), in none of the others.
    """

    peak: int
    temp: int
    argument: int
    flops: float
    sent: float = 0.0
    seconds: float = math.nan
    host: int = 0


def topology_mesh(topology: str, sizes: Mapping[str, int]) -> Mesh:
    """A mesh over the chips of a TPU topology, to compile for; no TPU is needed, but the libtpu package is.

    Args:
      topology: see `topology_devices`. sizes: of the axes, as for `lowrank_jax.shard.mesh`; {} is one chip.

    Raises:
      TopologyError: libtpu is missing, no such topology, too few chips, or an unknown axis.

    Example:
      >>> topology_mesh("cpu", {"data": 1_000})  # doctest: +IGNORE_EXCEPTION_DETAIL
      Traceback (most recent call last):
      lowrank_jax.memory.TopologyError: ...
    """
    try:
        return shard.mesh(sizes, topology_devices(topology))
    except shard.ShardingError as error:
        raise TopologyError(f"{topology}: {error}") from error


def topology_devices(topology: str) -> Sequence[Any]:
    """The devices of a topology.

    Args:
      topology: of TPUs, such as 'v5e:2x2', 'v5p:2x2x1', 'v6e:4x4', or of this machine: 'cpu', 'gpu', 'tpu'.

    Raises:
      TopologyError: libtpu is missing, no such topology, or no such devices here.

    Example:
      >>> topology_devices("cpu")[0].platform
      'cpu'
    """
    import importlib.util

    if topology in ("cpu", "gpu", "tpu"):
        try:
            return jax.devices(topology)
        except RuntimeError as error:
            raise TopologyError(f"{topology}: this machine has none ({str(error).splitlines()[0][:120]}).") from error
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "The TPU compiler is missing: pip install 'lowrank_jax[topology]' (the libtpu package), and set JAX_PLATFORMS=cpu."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise TopologyError(
            f"The TPU compiler knows no topology {topology!r} ({str(error).splitlines()[0][:120]}). "
            "Examples: v5e:2x2, v5e:4x4, v5p:2x2x1, v6e:4x4; cpu and gpu are the devices of this machine."
        ) from error


def compile_report(
    step: Callable[..., Any], args: Sequence[Any], donate: Sequence[int] = (), out_shardings: Any = None
) -> CompileReport:
    """Compiles a function for the devices its arguments are laid on and asks what it needs.

    Args:
      step: the function. args: trees of arrays or ShapeDtypeStructs; with shardings on a mesh of `topology_mesh` the TPU compiler
        answers, without any the one of this machine. donate: arguments whose buffers the results may take.
      out_shardings: as for `jax.jit`.

    Raises:
      DoesNotFitError: the program needs more memory than the device has; says how much.

    Example:
      >>> x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
      >>> report = compile_report(lambda x: x @ x, [x])
      >>> report.argument, report.flops
      (16384, 524288.0)
    """
    jitted = jax.jit(
        step, donate_argnums=tuple(donate), **({} if out_shardings is None else {"out_shardings": out_shardings})
    )
    lowered = jitted.lower(*args)
    devices = _devices(args)
    try:
        compiled, text = _compile(lowered, any(device.platform == "tpu" for device in devices))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(
            f"The step does not fit a device's memory: {str(error).splitlines()[0][:200]} Use a fuller remat policy, a smaller batch, or "
            "a mesh with more chips."
        ) from error
    m: Any = compiled.memory_analysis()
    total = m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    # The CPU compiler leaves the peak at the temporaries', and a peak with offloaded arrays has those in it: the sum of all parts is what
    # the device holds at most.
    peak = max(getattr(m, "peak_memory_in_bytes", 0), 0)
    on_cpu = all(device.platform == "cpu" for device in devices)
    host = getattr(m, "host_temp_size_in_bytes", 0)
    program, kind = hlo.read(text), chips.chip(next(iter(devices)))
    return CompileReport(
        peak=total if on_cpu or not peak or host else peak,
        temp=m.temp_size_in_bytes,
        argument=m.argument_size_in_bytes,
        flops=flops.count(step, *args) / len(devices),
        sent=program.sent,
        seconds=math.nan if kind is None else max(program.cycles / kind.clock, program.sent / kind.links),
        host=host,
    )


def _compile(lowered: Any, tpu: bool) -> tuple[Any, str]:
    """A compiled program and its text."""
    if not tpu:
        compiled = lowered.compile()
        return compiled, compiled.as_text() or ""
    # XLA cannot read back what libtpu makes of collectives on v5p, so as_text raises; what libtpu writes down itself is whole.
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (written,) = pathlib.Path(folder).glob("*.after_codegen.txt")
        return compiled, written.read_text()


def abstract_adapters(plan: Plan, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Adapters:
    """The adapter of a plan as ShapeDtypeStructs, laid out over ``mesh`` beside its kernels: nothing is computed.

    Example:
      >>> import lowrank_jax as lr
      >>> plan = lr.plan({"x": {"kernel": jnp.zeros((8, 4))}}, {"x": lr.lora(rank=2)})
      >>> abstract_adapters(plan).sites["x/kernel"]["a"].shape
      (8, 2)
    """

    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def make(shape: tuple[int, ...], sharding: NamedSharding | None, kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind or dtype, sharding=sharding or everywhere)

    sites: dict[str, Any] = {}
    for entry in plan.entries:
        batch = () if entry.site.kind == "param" else entry.local.batch_shape
        sites[entry.site.path] = {
            name: make((*batch, *leaf.shape), leaf_sharding(leaf, entry.local, mesh), leaf.dtype)
            for name, leaf in entry.leaves.items()
        }
    shared: dict[str, Any] = {
        group: {name: make(leaf.shape, None, leaf.dtype) for name, leaf in leaves.items()}
        for group, leaves in plan.shared_leaves.items()
    }
    return Adapters(sites, shared, plan)


def _devices(args: Any) -> set[Any]:
    found = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
    return {device for sharding in found if sharding is not None for device in sharding.device_set} or set(
        jax.devices()[:1]
    )
