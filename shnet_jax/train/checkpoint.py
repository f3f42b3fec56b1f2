"""Checkpoints: all of a state (parameters, optimiser, averages, queues, ...), data position, clock and metric as one.

The only file that imports orbax. Saving is asynchronous; a step's folder gets its name only when it is complete, so a
run killed while saving continues from the checkpoint before.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from shnet_jax.train.state import TrainState

SELECTION_METRIC = "rsum"
"""Key of the validation result that decides which checkpoint is the best (higher is better)."""


_ITEMS = ("model", "loss", "ema", "batch_stats", "momentum", "trainer")  # arrays, each under its own name


def _selection(metrics: dict[str, float]) -> float:
    return metrics[SELECTION_METRIC]


def _says_something(record: Any) -> bool:
    # Orbax warns of each checkpoint between two evaluations that it has no metric, and of each folder only read.
    return not any(text in str(record.msg) for text in ("did not provide metrics", "directory is read only"))


class CheckpointError(RuntimeError):
    """A checkpoint is missing, does not fit the model, or cannot be read."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint: the state and the notes saved with it."""

    state: TrainState
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`.

    keep: newest ones kept; the best by the selection metric is kept beside them, and what a killed run has left
      half written is removed. None: only reads, and changes nothing, as beside a run in progress.
    """

    def __init__(self, workdir: str | Path, keep: int | None = None):
        self.folder = Path(workdir).absolute() / "checkpoints"
        policies = checkpoint_managers
        if keep is None:
            access: dict[str, Any] = {"read_only": True, "create": False, "save_interval_steps": 0}
        else:
            best = policies.BestN(get_metric_fn=_selection, n=1, keep_checkpoints_without_metrics=False)
            kept = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
            access = {"cleanup_tmp_directories": True, "preservation_policy": kept}
        logging.get_absl_logger().addFilter(_says_something)
        arrays = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
        self._manager = ocp.CheckpointManager(
            self.folder,
            # Named here, since a manager that has not yet saved would not know how to read them.
            item_handlers=arrays | {"notes": ocp.JsonCheckpointHandler(), "data": grain.checkpoint.CheckpointHandler()},
            options=ocp.CheckpointManagerOptions(best_fn=_selection, best_mode="max", **access),
        )

    def save(
        self,
        step: int,
        state: TrainState,
        notes: dict[str, Any],
        iterator: grain.DatasetIterator,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts to save `state` (arrays), `notes` (JSON) and the position of `iterator`; returns at once.

        metrics: validation result at this step, if it was evaluated; makes the checkpoint eligible as the best.
        """
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        items |= {"notes": ocp.args.JsonSave(notes), "data": grain.checkpoint.CheckpointSave(iterator)}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def save_variables(self, step: int, variables: dict[str, Any], notes: dict[str, Any]) -> None:
        """Saves {"params", "batch_stats"} and `notes` alone: can be evaluated, not continued. Returns when on disk."""
        trees = {"model": variables["params"], "batch_stats": variables["batch_stats"]}
        items: dict[str, Any] = {n: ocp.args.StandardSave(tree) for n, tree in trees.items() if jax.tree.leaves(tree)}
        self._manager.save(step, args=ocp.args.Composite(notes=ocp.args.JsonSave(notes), **items))
        self.wait()

    def abstract_variables(self, step: int, *, averaged: bool) -> dict[str, Any]:
        """Shapes and dtypes of what `restore_variables` gives, as they were saved."""
        saved = self._manager.item_metadata(step)
        trees = dict(saved["ema"]) if averaged else {"params": saved["model"], "batch_stats": saved.get("batch_stats")}
        return {
            name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(trees.get(name) or {}))
            for name in ("params", "batch_stats")
        }

    def wait(self) -> None:
        """Until what was started to be saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the best validation result; None when none was evaluated."""
        return self._manager.best_step()

    def step(self, which: str) -> int | None:
        """Step of the "last" or the "best" checkpoint; None when there is none. Without any evaluation best is last."""
        if which not in ("last", "best"):
            raise ValueError(f"config.eval.checkpoint is {which!r}; choose best or last")
        if which == "best" and self.best is not None:
            return self.best
        return self._manager.latest_step()

    def notes(self, step: int) -> dict[str, Any]:
        """The notes saved with a step."""
        return self._manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]

    def restore(self, step: int, like: TrainState, iterator: grain.DatasetIterator) -> Restored:
        """The state of a step in the structure, shapes and shardings of `like`; moves `iterator` to its position.

        Raises CheckpointError when the saved arrays differ from `like` in structure or shape.
        """
        target = _items(like)
        items = {name: self._request(step, name, tree) for name, tree in target.items()}
        items |= {"notes": ocp.args.JsonRestore(), "data": grain.checkpoint.CheckpointRestore(iterator)}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return Restored(_from_items({n: restored[n] for n in target}, like), restored.notes)

    def restore_variables(
        self, step: int, like: dict[str, Any], *, averaged: bool, on_host: bool = False
    ) -> dict[str, Any]:
        """Only {"params", "batch_stats"} of a step, on one device; `averaged`: their running averages.

        on_host: in the memory of the host, for what is more than a device holds.

        Raises CheckpointError when they differ from `like` in structure or shape.
        """
        one = SingleDeviceSharding(jax.local_devices(backend="cpu" if on_host else None)[0])
        wanted = {"ema": like} if averaged else {"model": like["params"], "batch_stats": like["batch_stats"]}
        wanted = {item: tree for item, tree in wanted.items() if jax.tree.leaves(tree)}
        items = {item: self._request(step, item, tree, one) for item, tree in wanted.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        if averaged:
            return restored["ema"]
        return {"params": restored["model"], "batch_stats": restored.get("batch_stats", like["batch_stats"])}

    def _request(self, step: int, name: str, tree: Any, sharding: Any = None) -> ocp.args.CheckpointArgs:
        saved = self._manager.item_metadata(step).get(name)
        if saved is None and name == "trainer":
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} holds weights alone, as --mode=convert writes them: it can be "
                "evaluated and not continued"
            )
        if saved is None:
            raise CheckpointError(f"checkpoint {step} in {self.folder} has no {name!r}: the run was configured without")
        self._check(step, name, saved, tree)
        return ocp.args.StandardRestore(jax.tree.map(lambda leaf: _abstract(leaf, sharding), tree))

    def _check(self, step: int, item: str, saved_tree: Any, target: Any) -> None:
        saved, wanted = _shapes(saved_tree), _shapes(target)
        wrong = [
            f"{item}/{name}: saved {saved.get(name, 'absent')}, expected {wanted.get(name, 'absent')}"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
        if wrong:
            shown = "\n  ".join(wrong[:10]) + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} does not fit this configuration and data set "
                f"(another model, text tower or feature size?):\n  {shown}"
            )


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that are saved under their own names, so that an evaluation reads only what it needs."""
    rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng, "nonfinite": state.nonfinite}
    items = {
        "model": state.params["model"],
        "loss": state.params["loss"],
        "ema": state.ema,
        "batch_stats": state.batch_stats,
        "momentum": state.momentum,
        "trainer": rest,
    }
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _from_items(items: dict[str, Any], like: TrainState) -> TrainState:
    return dataclasses.replace(
        like,
        params={"model": items["model"], "loss": items.get("loss", like.params["loss"])},
        ema=items.get("ema"),
        batch_stats=items.get("batch_stats", like.batch_stats),
        momentum=items.get("momentum"),
        **items["trainer"],
    )


def _abstract(leaf: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    sharding = sharding or getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def key(part: Any) -> str:
        return str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {"/".join(map(key, path)): tuple(leaf.shape) for path, leaf in leaves}
