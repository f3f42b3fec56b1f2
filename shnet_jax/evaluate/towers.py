"""Old place of `encode`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from shnet_jax.data.gallery import Gallery
from shnet_jax.evaluate.encode import Encoder, Tower, Towers, check, encode_parts, halves, image_tower, text_tower
from shnet_jax.experiment import Experiment
from shnet_jax.types import Embedding

__all__ = ["Tower", "check", "encode_parts", "halves", "image_tower", "make_encoder", "make_towers", "text_tower"]


def make_towers(
    experiment: Experiment, image_mesh: Mesh, text_mesh: Mesh
) -> Callable[[dict[str, Any]], tuple[Tower, Tower]]:
    """`Towers.place`."""
    return Towers(experiment, image_mesh, text_mesh).place


def make_encoder(
    experiment: Experiment, gallery: Gallery, mesh: Mesh
) -> Callable[[dict[str, Any]], tuple[Embedding, Embedding]]:
    """`Encoder.encode` of one gallery."""
    encoder = Encoder(experiment, mesh)
    return lambda variables: encoder.encode(gallery, variables)
