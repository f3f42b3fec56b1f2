"""Mapping of a per-device function over devices by `jax.shard_map` or `jax.pmap`; no other file knows which.

Neither this file nor JAX reduces gradients: `reduce_over_devices` in training/step.py does, by one explicit `psum`.

A step is written once, as `fn(state, batch, *rest)` of one device. It sees its own rows of the batch, whole copies of
everything else, and the other devices through the named axis `DATA` (parallel/axis.py). The convention:
  - a loss is this device's share; the shares add up (`psum`) to the global loss;
  - gradients of replicated parameters are combined by that `psum`;
  - nothing differentiates through a cross-device sum or mean of the loss.
`check_vma=False` below belongs to it. With `check_vma=True` gradients of replicated parameters arrive already summed,
and the explicit `psum` would make them too large by the number of devices n, with a correct loss and no error. AdamW
nearly hides that, as its updates hardly depend on the scale; clipping would begin at a norm of clip_norm / n.

A mesh may have a second axis `MODEL` (parallel/rules.py). A step does not see it: "one device" above is then a group of
them, and XLA's partitioner (GSPMD) splits the group's work by the shardings of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shnet_jax.parallel import axis
from shnet_jax.types import DATA, MODEL

MAPPINGS = ("shard_map", "pmap")

Tree = TypeVar("Tree")


class Mapped(Protocol):
    """A mapped function: call it with global arguments, or `lower` it (for `.compile().cost_analysis()`)."""

    def __call__(self, *args: Any) -> Any:
        """Runs the mapped function."""
        ...

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers the program for arguments of these shapes."""
        ...


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices, in their order, as a mesh with the one axis `DATA`.

    Those of one process lie side by side in the order of `make_mesh`: rows of a batch follow the processes.
    """
    if not devices:
        raise ValueError("a mesh needs at least one device, got none")
    # Explicit axes (the default of jax.make_mesh) would put shardings into types and reject ordinary code.
    return Mesh(np.asarray(devices), (DATA,), axis_types=(AxisType.Auto,))


def on_cpu(mesh: Mesh) -> bool:
    """Whether the devices of a mesh are CPUs, real or virtual; their best sizes are small."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def grid_mesh(devices: Sequence[jax.Device], shape: Mapping[str, int]) -> Mesh:
    """The devices as a mesh of several axes: {axis name: size}, the last one varying fastest.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    if math.prod(shape.values()) != len(devices):
        axes = " x ".join(f"{name} {size}" for name, size in shape.items())
        raise ValueError(f"a mesh of {axes} needs {math.prod(shape.values())} devices, got {len(devices)}")
    return Mesh(np.asarray(devices).reshape(*shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def make_mesh(wanted: int) -> Mesh:
    """A mesh of the first `wanted` devices, as config.parallel.devices; 0: of all."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if wanted and jax.process_count() > 1:
        raise ValueError(
            f"config.parallel.devices is {wanted}; {jax.process_count()} processes use all their devices: 0"
        )
    if not 0 <= wanted <= len(devices):
        raise ValueError(f"config.parallel.devices is {wanted}, this machine has {len(devices)}")
    return data_mesh(devices[: wanted or None])


def own_devices(mesh: Mesh) -> Mesh:
    """The devices of this process, for what each process does by itself; in one process all of the mesh."""
    return data_mesh(list(mesh.devices.flat) if jax.process_count() == 1 else jax.local_devices())


def map_step(
    fn: Callable[..., Any],
    mesh: Mesh,
    mapping: str = "shard_map",
    *,
    donate_state: bool = True,
    state_specs: Any = None,
) -> Mapped:
    """Compiles the per-device `fn(state, batch, *rest)` over the mesh.

    The result takes `state` (see `replicate`), `batch` (see `put_batch`; every leaf [b, ...] is split along
    its first axis) and `rest`, replicated. What `fn` returns must be equal on all devices (reduced by `psum`
    or `pmean`) and comes back once.
    donate_state: the result reuses the buffers of `state`, which is gone after the call.
    state_specs: how the state is partitioned (`sharding.specs`), under shard_map only; `fn` then returns (state, what
      is equal on all devices). None: every device has the whole state.
    """
    donate = (0,) if donate_state else ()
    return _map(fn, mesh, mapping, split_output=False, donate=donate, state_specs=state_specs)


def map_encode(fn: Callable[..., Any], mesh: Mesh, mapping: str = "shard_map") -> Mapped:
    """Compiles the per-device `fn(params, batch, *rest)` with outputs [b, ...], a row for each of the batch.

    The result takes arguments as in `map_step`, donates none, and gives the rows of all devices in the order
    of the batch; with several processes, to each of them (under pmap, its own rows).
    """
    if jax.process_count() > 1 and mapping == "shard_map":

        def everywhere(params: Any, batch: Any, *rest: Any) -> Any:
            return axis.all_gather(fn(params, batch, *rest), DATA)

        return _map(everywhere, mesh, mapping, split_output=False, donate=())
    return _map(fn, mesh, mapping, split_output=True, donate=())


def map_specs(fn: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Mapped:
    """Compiles the per-device `fn` over a mesh of any axes, with specs as in `jax.shard_map`."""
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def put_batch(batch: Tree, mesh: Mesh, mapping: str = "shard_map") -> Tree:
    """This process's rows of a batch, NumPy [b, ...], on its devices.

    Every process passes its own rows; together they are the global batch, in the order of the mesh.
    Raises ValueError when the rows do not divide among this process's devices, or groups of devices along `MODEL`.
    """
    _check(mapping)
    devices = len(mesh.local_devices) // mesh.shape.get(MODEL, 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] % devices:
            rows = f"{np.shape(leaf)[0]} rows" if np.ndim(leaf) else "no rows (a scalar)"
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"batch field {name!r} has {rows}, which do not divide among {devices} devices")
    if mapping == "pmap":  # each process hands pmap its own rows only
        sharding = NamedSharding(data_mesh(mesh.local_devices), P(DATA))
        return jax.device_put(batch, sharding)
    sharding = NamedSharding(mesh, P(DATA))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def replicate(tree: Tree, mesh: Mesh, specs: Any = None) -> Tree:
    """A copy of every leaf on each device of the mesh; of parts of it, where `specs` has a partition spec for each.

    The copies share no memory with `tree`, which therefore outlives the donation of the result.
    """

    def put(x, spec):
        if isinstance(x, jax.Array):
            # Not every backend sends what lies on one process's device to those of others; every process has it.
            on_host = jax.process_count() > 1 and x.is_fully_addressable
            # device_put keeps the buffer of a leaf that is on one of the devices, even with may_alias=False.
            x = np.asarray(x) if on_host else x.copy()
        return jax.device_put(x, NamedSharding(mesh, spec), may_alias=False)

    return jax.tree.map(put, tree, jax.tree.map(lambda _: P(), tree) if specs is None else specs)


def _map(
    fn: Callable[..., Any],
    mesh: Mesh,
    mapping: str,
    *,
    split_output: bool,
    donate: tuple[int, ...],
    state_specs: Any = None,
) -> Mapped:
    _check(mapping)
    if state_specs is not None and mapping != "shard_map":
        raise ValueError(f"a partitioned state needs parallel.mapping shard_map, not {mapping!r}")

    def per_device(state, batch, rest):
        return fn(state, batch, *rest)

    if mapping == "pmap":
        mapped = jax.pmap(
            per_device,
            axis_name=DATA,
            in_axes=(None, 0, None),
            out_axes=0 if split_output else None,
            devices=mesh.devices.tolist(),
            donate_argnums=donate,
        )
        return _Pmapped(mapped, data_mesh(mesh.local_devices), split_output)
    output_specs = P(DATA) if split_output else P()
    outputs = output_specs if state_specs is None else (state_specs, output_specs)
    sharded = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(P() if state_specs is None else _along_data(state_specs), P(DATA), P()),
        out_specs=_along_data(outputs),
        axis_names={DATA},
        check_vma=False,
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), outputs)
    return jax.jit(
        lambda state, batch, *rest: sharded(state, batch, rest), donate_argnums=donate, out_shardings=shardings
    )


def _along_data(specs: Any) -> Any:
    """The partition specs without other axes than `DATA`, which the mapped function does not see."""
    return jax.tree.map(lambda spec: P(*(name if name == DATA else None for name in spec)), specs)


class _Pmapped:
    """A pmapped function that takes and gives what a shard_mapped one does: no axis of devices."""

    def __init__(self, mapped: Any, mesh: Mesh, split_output: bool):
        def split(x):
            return x.reshape(mesh.size, x.shape[0] // mesh.size, *x.shape[1:])

        def merge(x):
            return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

        # The rows already lie on the right device; the sharding makes sure that none is moved.
        sharding = NamedSharding(mesh, P(DATA))
        self._mapped = mapped
        self._split = jax.jit(lambda tree: jax.tree.map(split, tree), out_shardings=sharding)
        self._merge = jax.jit(lambda tree: jax.tree.map(merge, tree), out_shardings=sharding)
        self._split_output = split_output

    def __call__(self, state: Any, batch: Any, *rest: Any) -> Any:
        out = self._mapped(state, self._split(batch), rest)
        return self._merge(out) if self._split_output else out

    def lower(self, state: Any, batch: Any, *rest: Any) -> jax.stages.Lowered:
        return self._mapped.lower(state, self._split(batch), rest)


def _check(mapping: str) -> None:
    if mapping not in MAPPINGS:
        raise ValueError(f"parallel.mapping is {' or '.join(MAPPINGS)}, not {mapping!r}")
