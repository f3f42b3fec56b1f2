"""Checkpoints: the whole training state, the data position, the clock and the validation result of a step.

The only file that imports orbax. Saving is asynchronous, checksums (training/integrity.py) included. A step's folder
gets its name when it is complete, so a run killed while saving continues from the checkpoint before.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from shnet_jax.observe.files import free_space
from shnet_jax.training import integrity
from shnet_jax.training.integrity import CheckpointError
from shnet_jax.training.state import TrainState

SELECTION_METRICS = ("person_r1", "rsum")
"""Metrics of the validation result; the first present one decides which checkpoint is the best (higher is better)."""

log = logging.getLogger(__name__)

_FROM_ORBAX = (OSError, ValueError, RuntimeError)  # a disk that is full or gone, from Python or from TensorStore
_REMOVED = "removed"  # checkpoints that are no longer kept, until their files are deleted
_ITEMS = ("model", "loss", "ema", "batch_stats", "momentum", "trainer")  # arrays, each under its own name


def _selection(metrics: dict[str, float]) -> float:
    return next(metrics[name] for name in SELECTION_METRICS if name in metrics)


def _is_of_use(record: Any) -> bool:
    # Orbax warns that checkpoints between two evaluations have no metric, and that folders are only read. It logs a
    # traceback for each of its threads that fails, and raises as well: our own message reports that.
    if record.exc_info and not absl_logging.vlog_is_on(1):
        return not ("orbax" in record.pathname or "No space left on device" in str(record.exc_info[1]))
    return not any(text in str(record.msg) for text in ("did not provide metrics", "directory is read only"))


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
        self._saving: int | None = None
        self._checked: set[int] = set()
        for step in integrity.steps(self.folder):  # which one is the best is read from all of them
            integrity.check(self.folder, step, below="metrics/")
        policies = checkpoint_managers
        if keep is None:
            access: dict[str, Any] = {"read_only": True, "create": False, "save_interval_steps": 0}
        else:
            best = policies.BestN(get_metric_fn=_selection, n=1, keep_checkpoints_without_metrics=False)
            kept = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
            # Renamed before they are deleted: a run killed while deleting leaves no half checkpoint.
            access = {"cleanup_tmp_directories": True, "preservation_policy": kept, "todelete_subdir": _REMOVED}
        for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
            logger.addFilter(_is_of_use)
        self._arrays = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
        self._manager = ocp.CheckpointManager(
            self.folder,
            # Named here, since a manager that has not yet saved would not know how to read them.
            item_handlers=self._arrays
            | {"notes": ocp.JsonCheckpointHandler(), "data": grain.checkpoint.CheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                best_fn=_selection,
                best_mode="max",
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
                **access,
            ),
        )

    def _seal(self) -> None:
        """Adds checksums to the complete folder of the step that is being saved, before it gets its name."""
        for folder in self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            integrity.write_checksums(folder)

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
        self._save(step, items, metrics)

    def save_variables(self, step: int, variables: dict[str, Any], notes: dict[str, Any]) -> None:
        """Saves {"params", "batch_stats"} and `notes` alone: can be evaluated, not continued. Returns when on disk."""
        trees = {"model": variables["params"], "batch_stats": variables["batch_stats"]}
        items: dict[str, Any] = {n: ocp.args.StandardSave(tree) for n, tree in trees.items() if jax.tree.leaves(tree)}
        self._save(step, items | {"notes": ocp.args.JsonSave(notes)})
        self.wait()

    def _save(self, step: int, items: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        self.wait()
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        except _FROM_ORBAX as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> CheckpointError:
        last = integrity.steps(self.folder)
        return CheckpointError(
            f"checkpoint {self._saving} could not be written to {self.folder}, where {free_space(self.folder)}: "
            f"{_reason(error)}. The checkpoints before it are as they were"
            + (f", the last one is {last[-1]}: the same command goes on from it" if last else "")
        )

    def abstract_variables(self, step: int, *, averaged: bool) -> dict[str, Any]:
        """Shapes and dtypes of the result of `restore_variables`, as they were saved.

        Raises CheckpointError for a damaged file.
        """
        names = {"params": "model", "batch_stats": "batch_stats"}
        trees = (
            (self._saved(step, "ema") or {}) if averaged else {n: self._saved(step, item) for n, item in names.items()}
        )
        return {
            name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(trees.get(name) or {}))
            for name in ("params", "batch_stats")
        }

    def wait(self) -> None:
        """Waits until the checkpoint being saved is on disk. Raises CheckpointError when it could not be written."""
        try:
            self._manager.wait_until_finished()
        except _FROM_ORBAX as error:
            raise self._not_written(error) from error
        if self._saving is not None and jax.process_index() == 0:
            shutil.rmtree(self.folder / _REMOVED, ignore_errors=True)

    def close(self) -> None:
        """Waits for the checkpoint being saved and releases the folder."""
        try:
            self.wait()
        finally:
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
            if aside := integrity.damaged(self.folder):
                log.warning(
                    "%s: %s was set aside as damaged; %d is the best of the others",
                    self.folder,
                    ", ".join(aside),
                    self.best,
                )
            return self.best
        return self._manager.latest_step()

    def check(self, step: int) -> None:
        """Raises CheckpointError, naming file and fault, when a file of this step is not the one that was written."""
        if step not in self._checked:
            integrity.check(self.folder, step)
            self._checked.add(step)

    def notes(self, step: int) -> dict[str, Any]:
        """The notes saved with a step."""
        return self._read(step, {"notes": ocp.args.JsonRestore()})["notes"]

    def restore(self, step: int, like: TrainState, iterator: grain.DatasetIterator) -> Restored:
        """The state of a step in the structure, shapes and shardings of `like`; moves `iterator` to its position.

        Raises CheckpointError for a damaged file, or when the saved arrays differ from `like` in structure or shape.
        """
        target = _items(like)
        items = {name: self._request(step, name, tree) for name, tree in target.items()}
        items |= {"notes": ocp.args.JsonRestore(), "data": grain.checkpoint.CheckpointRestore(iterator)}
        restored = self._read(step, items)
        return Restored(_from_items({n: restored[n] for n in target}, like), restored.notes)

    def restore_variables(
        self, step: int, like: dict[str, Any], *, averaged: bool, on_host: bool = False
    ) -> dict[str, Any]:
        """Only {"params", "batch_stats"} of a step, on one device; `averaged`: their running averages.

        on_host: in the memory of the host, for more than a device holds. Raises CheckpointError for a damaged file, or
        for one that differs from `like` in structure or shape.
        """
        device = SingleDeviceSharding(jax.local_devices(backend="cpu" if on_host else None)[0])
        target = {"ema": like} if averaged else {"model": like["params"], "batch_stats": like["batch_stats"]}
        items = {n: self._request(step, n, tree, device) for n, tree in target.items() if jax.tree.leaves(tree)}
        restored = self._read(step, items)
        if averaged:
            return restored["ema"]
        return {"params": restored["model"], "batch_stats": restored.get("batch_stats", like["batch_stats"])}

    def _read(self, step: int, items: dict[str, Any]) -> Any:
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _saved(self, step: int, name: str) -> Any:
        """Shapes and dtypes of an item of a step, None where it has none. Each array's file is opened for them."""
        with self._reading(step):
            folder = self.folder / str(step)
            return self._arrays[name].metadata(folder / name) if name in os.listdir(folder) else None

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        self.check(step)
        try:
            yield
        except (OSError, ValueError) as error:  # without checksums this is how damage shows
            if not (self.folder / str(step)).exists():
                raise integrity.removed(self.folder, step) from error
            raise CheckpointError(f"checkpoint {step} in {self.folder} cannot be read: {_reason(error)}") from error

    def _request(self, step: int, name: str, tree: Any, sharding: Any = None) -> ocp.args.CheckpointArgs:
        saved = self._saved(step, name)
        if saved is None and name == "trainer":
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} holds weights alone, as --mode=convert writes them: it can be "
                "evaluated and not continued"
            )
        if saved is None:
            raise CheckpointError(f"checkpoint {step} in {self.folder} has no {name!r}: the run was configured without")
        if wrong := _shape_differences(name, saved, tree):
            shown = "\n  ".join(wrong[:10]) + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} does not fit this configuration and data set "
                f"(another model, text tower or feature size?):\n  {shown}"
            )

        def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or getattr(leaf, "sharding", None))

        return ocp.args.StandardRestore(jax.tree.map(abstract, tree))


def _shape_differences(item: str, saved_tree: Any, target: Any) -> list[str]:
    saved, expected = _shapes(saved_tree), _shapes(target)
    return [
        f"{item}/{name}: saved {saved.get(name, 'absent')}, expected {expected.get(name, 'absent')}"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]


def _reason(error: Exception) -> str:
    """The error in few words; TensorStore names every layer between the array and the file."""
    full = os.strerror(errno.ENOSPC)
    return full if full in str(error) else next(iter(str(error).splitlines()), type(error).__name__)[:300]


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


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
