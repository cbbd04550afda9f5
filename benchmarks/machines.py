"""Accelerators that need not be there: programs compile for them with their compiler alone."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.common.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of accelerator.

    Attributes:
      name: what to call it.
      platform: the platform that compiles for it.
      memory: the bytes of memory of one device.
      topologies: the topology of so many devices, by the name that its compiler knows.
      packages: what to install to compile for it.
      target: for CUDA, the description of the device.
    """

    name: str
    platform: str
    memory: float
    topologies: Mapping[int, str]
    packages: tuple[str, ...]
    target: str = ""


# The figures are those of NVIDIA's data sheet of the H100 SXM, and its compute capability 9.0.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  name: "NVIDIA H100 80GB HBM3"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def _slices(generation: str, *shapes: str) -> Mapping[int, str]:
    """Returns the slices of a generation of TPUs, by their number of chips."""
    return {math.prod(map(int, shape.split("x"))): f"{generation}:{shape}" for shape in shapes}


_LIBTPU = ("libtpu",)
_CUDA = ("jax-cuda12-plugin", "jax-cuda12-pjrt")
MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            "tpu-v5e",
            "tpu",
            16 * GIB,
            _slices("v5e", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
            _LIBTPU,
        ),
        Machine(
            "tpu-v5p",
            "tpu",
            95 * GIB,
            _slices("v5p", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
            _LIBTPU,
        ),
        Machine(
            "tpu-v6e",
            "tpu",
            32 * GIB,
            _slices("v6e", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
            _LIBTPU,
        ),
        Machine(
            "h100",
            "cuda",
            80 * GIB,
            {
                **{count: f"1x1x{count}" for count in (1, 2, 4, 8)},
                **{8 * hosts: f"1x{hosts}x8" for hosts in (2, 4, 8, 16, 32)},
            },
            _CUDA,
            _H100,
        ),
    )
}
_WITHOUT_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

# Whose versions decide what is compiled.
_COMPILERS = ("jax", "libtpu", "jax-cuda12-plugin")

# Virtual devices of this machine's processor: what they hold in bfloat16 is held in float32 too.
CPU = "cpu"


def devices_of(name: str, count: int) -> list[Any]:
    """Returns devices to compile for.

    Args:
      name: the name of a machine, or `CPU`.
      count: how many.

    Raises:
      InputError: the compiler is missing, or the machine has no slice of so many devices; the
        message says what to do.
    """
    if name == CPU:
        if jax.device_count() < count:
            raise InputError(
                f"this process has {jax.device_count()} CPU devices, not {count}; "
                f"JAX_NUM_CPU_DEVICES={count} gives it so many"
            )
        return jax.devices()[:count]
    machine = MACHINES[name]
    if count not in machine.topologies:
        known = ", ".join(map(str, machine.topologies))
        raise InputError(f"{name} has no slice of {count} devices here; expected one of {known}")
    _check_compiler(machine)
    from jax.experimental import topologies

    options: dict[str, Any] = {"platform": machine.platform}
    topology = machine.topologies[count]
    if machine.target:
        described = topologies.get_topology_desc(
            "", target_config=machine.target, topology=topology, **options
        )
        return list(described.devices)
    # Nothing is asked of a machine with a TPU.
    for variable, value in _WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    return list(topologies.get_topology_desc(topology, **options).devices)


def shapes_on(device: Any, tree: Any) -> Any:
    """Returns a tree of shapes on one device, as a mesh of one.

    Without a mesh, tracing would take the machine at hand for the one to compile for.
    """
    mesh = Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(put, tree)


def compiler_versions() -> dict[str, str]:
    """Returns the versions that decide what is compiled, of the compilers that are installed."""
    found = {}
    for package in _COMPILERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def requirements(name: str) -> list[str]:
    """Returns what pip installs to compile for a machine, as this JAX asks for it."""
    return list(map(_required, MACHINES[name].packages))


def _check_compiler(machine: Machine) -> None:
    modules = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda12"}
    if _is_installed(modules[machine.platform]):
        return
    versions = " ".join(f"'{each}'" for each in requirements(machine.name))
    raise InputError(
        f"compiling for {machine.name} needs {machine.packages[0]}, which is not installed: "
        f"pip install --no-deps {versions} installs what this JAX asks for"
    )


def _is_installed(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return (not parent or _is_installed(parent)) and importlib.util.find_spec(module) is not None


def _required(package: str) -> str:
    """Returns a package with the version that JAX asks for."""
    if package in _CUDA:
        return f"{package}=={jax.__version__}"
    found = importlib.metadata.requires("jax") or []
    return next(each.split(";")[0].strip() for each in found if each.startswith(package))
