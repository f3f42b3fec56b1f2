"""--mode=embed: writes the vectors of a split. The modes search and page make the same vectors before they begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.data.checksums import CHECKSUMS, sha256
from shnet_jax.evaluation.evaluator import provenance
from shnet_jax.evaluation.pair_scores import digest
from shnet_jax.evaluation.prefix import check_sizes
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import make_mesh, own_devices
from shnet_jax.retrieve import embed as writer
from shnet_jax.retrieve.embeddings import Embeddings
from shnet_jax.training.load import Loaded, load
from shnet_jax.training.workdir import CONFIG


def embed(config: ConfigDict, workdir: str | Path) -> None:
    """Writes the embeddings of config.search.split, images and captions; a killed run goes on with the same command.

    Several processes share the work.
    """
    workdir, mesh = Path(workdir), own_devices(make_mesh(config.parallel.devices))
    embeddings = split_embeddings(load(workdir, config), config, workdir, mesh)
    n, t = len(embeddings.ids.image_ids), len(embeddings.ids.captions)
    if hosts.is_first():
        print(f"{embeddings.folder}: {n} images and {t} captions, {embeddings.images.vector.shape[1]} numbers each")


def split_embeddings(loaded: Loaded, config: ConfigDict, workdir: Path, mesh: Mesh) -> Embeddings:
    """The embeddings of config.search.split from their folder, which is made unless it is complete."""
    split, dims = config.search.split, config.search.dims
    check_sizes(loaded.experiment, (dims,) if dims else (), "search.dims")
    name = f"{loaded.experiment.dataset.path.parent.name}_{split}_{loaded.step}" + (f"_{dims}" if dims else "")
    folder = Path(config.search.embeddings or workdir / "embeddings" / name)
    source = origin(loaded, workdir, split, mesh.size) | ({"dims": dims} if dims else {})
    return writer.embed(loaded.experiment, loaded.variables, split, mesh, folder, source)


def origin(loaded: Loaded, workdir: Path, split: str, devices: int) -> dict[str, Any]:
    """The origin of embeddings: data set, split, checkpoint step, hashes of configuration, weights and data set."""
    about = provenance(loaded.experiment, split, loaded.step, loaded.selected_on, devices)
    checksums = loaded.experiment.dataset.path / CHECKSUMS  # sets of other tools have none
    return {
        "dataset": about.dataset,
        "dataset_sha256": sha256(checksums) if checksums.is_file() else None,
        "split": split,
        "checkpoint_step": loaded.step,
        "parameters": about.parameters,
        "config_sha256": sha256(workdir / CONFIG),
        "weights_sha256": digest(loaded.variables),
        "dtype": about.dtype,
        "devices": devices,
    }


def one_process_mesh(config: ConfigDict) -> Mesh:
    """The devices of config.parallel.devices. Raises ValueError in a job of several processes."""
    mesh = make_mesh(config.parallel.devices)
    if not hosts.is_first():
        raise ValueError("the modes search and page run in one process")
    return mesh
