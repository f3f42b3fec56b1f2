"""Parameters split over a second mesh axis by rules, for towers that do not fit on one device (tensor parallelism).

config.parallel.model groups the devices: those of a group share one part of the batch, and each holds a part of the
arrays that a rule of config.parallel.rules names. XLA's partitioner (GSPMD) splits the products by these shardings, so
neither training nor evaluation needs a whole copy on one device, and models and losses stay as they are.

A rule is "REGEX = AXES", as in big_vision: a regular expression for the whole path of a parameter, and for each of its
dimensions the mesh axis that splits it, or None. The first rule that fits is the one. `NAMED` has sets of rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.parallel.mapping import grid_mesh
from shnet_jax.types import DATA, MODEL

NAMED = {
    "tensor": (
        r".*/layer_\d+/attention/(query|key|value)/kernel = None, model",
        r".*/layer_\d+/attention/(query|key|value)/bias = model",
        r".*/layer_\d+/(mlp/)?in/kernel = None, model",
        r".*/layer_\d+/(mlp/)?in/bias = model",
        r".*/layer_\d+/(attention/|mlp/)?out/kernel = model, None",
        r".*/words = None, model",
        r"(image|text)/head/(f1|f2|in|hidden_[02])/kernel = None, model",
        r"(image|text)/head/(f1|f2|in|hidden_[02])/bias = model",
        r"(image|text)/head/(g|out|proj|lin1|lin2|hidden_1)/kernel = model, None",
    )
}
"""Sets of rules by name. tensor: those of Megatron-LM (Shoeybi et al., 2019) for every transformer layer and for the
heads of `align`: columns of the first matrix of a branch and rows of the last, hence one sum over the group a branch.
The table of words is split by columns: vocabularies rarely divide."""


class Rule(NamedTuple):
    """A rule as it was written, its regular expression, and its mesh axis or None for each dimension."""

    text: str
    pattern: re.Pattern[str]
    axes: tuple[str | None, ...]


def step_mesh(mesh: Mesh, parallel: ConfigDict | FrozenConfigDict) -> Mesh:
    """The devices of a mesh, in their order, as `DATA` x `MODEL` by config.parallel.model; for 1 the mesh itself.

    Raises ValueError for a size that does not divide the devices of each process, and for one above 1 under pmap.
    """
    size = parallel.model
    if size == 1:
        return mesh
    if parallel.mapping != "shard_map":
        raise ValueError(f"config.parallel.model is {size}, which needs config.parallel.mapping shard_map")
    devices = list(mesh.devices.flat)
    each = len(devices) // jax.process_count()
    if size < 1 or each % size:
        raise ValueError(
            f"config.parallel.model is {size}; it must be at least 1 and divide the {each} devices of a process"
        )
    return grid_mesh(devices, {DATA: len(devices) // size, MODEL: size})


def param_specs(params: Any, rules: Sequence[str], mesh: Mesh) -> Any:
    """The partition spec of each parameter of a model on `step_mesh`; P() where no rule fits, and without `MODEL`.

    params: arrays or their shapes. rules: config.parallel.rules. Raises ValueError for a rule that fits no parameter (a
    set of `NAMED`: none of its rules), has another number of dimensions, names an axis that the mesh does not have, or
    splits a dimension that its size does not divide.
    """
    if MODEL not in mesh.shape:
        return jax.tree.map(lambda _: P(), params)
    sets = [[_parse(text, mesh) for text in NAMED.get(entry, (entry,))] for entry in rules]
    used: set[str] = set()

    def spec(path: Any, leaf: Any) -> P:
        name = _name(path)
        for rule in (rule for rules in sets for rule in rules):
            if rule.pattern.fullmatch(name):
                used.add(rule.text)
                _check(rule, name, leaf.shape, mesh)
                return P(*rule.axes)
        return P()

    specs = jax.tree_util.tree_map_with_path(spec, params)
    unused = [entry for entry, rules in zip(rules, sets, strict=True) if not used & {rule.text for rule in rules}]
    if unused or not rules:
        names = [_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if len(leaf.shape) > 1]
        fault = (
            f"the rule {unused[0]!r} of config.parallel.rules fits"
            if unused
            else "config.parallel.rules is empty and fits"
        )
        raise ValueError(f"{fault} no parameter that an earlier rule leaves, as {', '.join(names[:3])}")
    return specs


def variable_specs(variables: dict[str, Any], rules: Sequence[str], mesh: Mesh) -> dict[str, Any]:
    """The partition spec of each array of {"params", "batch_stats"}; statistics are whole. Raises as `param_specs`."""
    replicated = {name: jax.tree.map(lambda _: P(), tree) for name, tree in variables.items()}
    return replicated | {"params": param_specs(variables["params"], rules, mesh)}


def like_params(tree: Any, params: Any, specs: Any) -> Any:
    """The partition spec of each array of a tree that holds arrays like parameters, as an optimiser's state does.

    An array whose path ends in a parameter's path, and that has its shape, is split like it; others are whole.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    known = {
        (_name(path), tuple(leaf.shape)): spec
        for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs), strict=True)
    }

    def spec(path: Any, leaf: Any) -> P:
        ends = ((_name(path[start:]), tuple(leaf.shape)) for start in range(len(path)))
        return next((known[end] for end in ends if end in known), P())

    return jax.tree_util.tree_map_with_path(spec, tree)


def _parse(text: str, mesh: Mesh) -> Rule:
    pattern, equals, axes = text.rpartition("=")
    names = tuple(None if name == "None" else name for name in _stripped(axes))
    try:
        compiled = re.compile(pattern.strip())
    except re.error as error:
        raise ValueError(
            f"the rule {text!r} of config.parallel.rules has a wrong regular expression: {error}"
        ) from error
    if not equals or not pattern.strip():
        raise ValueError(
            f"config.parallel.rules has {text!r}; choose {', '.join(NAMED)}, or write 'REGEX = AXES' with {MODEL} or "
            "None for each dimension, as 'text/.*/in/kernel = None, model'"
        )
    for name in names:
        if name is not None and name != MODEL:
            sizes = ", ".join(f"{axis} ({size} devices)" for axis, size in mesh.shape.items())
            raise ValueError(
                f"the rule {text!r} of config.parallel.rules names the axis {name!r}; the mesh has {sizes}, of which "
                f"rules split over {MODEL} (config.parallel.shard_params splits over {DATA})"
            )
    return Rule(text, compiled, names)


def _check(rule: Rule, name: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    """Raises ValueError where a rule does not fit the parameter `name` of this shape."""
    about = f"the rule {rule.text!r} of config.parallel.rules fits {name}, of shape {tuple(shape)}"
    if len(rule.axes) != len(shape):
        raise ValueError(f"{about}, and names {len(rule.axes)} dimensions; name {len(shape)}")
    if rule.axes.count(MODEL) > 1:
        raise ValueError(f"{about}, and names {MODEL} more than once; an axis splits one dimension")
    for dimension, axis in zip(shape, rule.axes, strict=True):
        if axis is not None and dimension % mesh.shape[axis]:
            raise ValueError(f"{about}: {dimension} does not divide into the {mesh.shape[axis]} devices of axis {axis}")


def _stripped(axes: str) -> Iterator[str]:
    return (name.strip() for name in axes.split(","))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
