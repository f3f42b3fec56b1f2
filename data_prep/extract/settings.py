"""Settings that determine the result of an extraction, and their flags."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from data_prep import command
from data_prep.schema import DataError
from shnet_jax.paths import expand, to_path

TOKENS = ("hidden", "projected", "none")
TIMM = "timm/"
"""Start of the names of timm's models, as --backbone=timm/tf_efficientnet_lite0."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the features depend on, beside the photographs.

    segmenter, backbone: folders or hub names of transformers models; "" leaves their fields out.
    segmenter_sha256, backbone_sha256: what `weights.digest` has to give; "" takes any.
    image_size: side of the square that the backbone sees; None is its own.
    tokens: what grid and regions are made of: "hidden", the backbone's last hidden state | "projected", CLIP's patches
      in the space of its image embedding, as wide as that | "none": neither grid nor regions, the global vector alone.
    regions, region_score: most regions of an image, and the least confidence of all but the first.
    seg_map: "panoptic" (segments without overlap, unsure pixels void) or "semantic" (the likeliest class everywhere).
    feature_dtype: what regions, grid and seg_semantic are stored in.
    """

    images: Path
    segmenter: str
    backbone: str
    segmenter_sha256: str = ""
    backbone_sha256: str = ""
    image_size: int | None = None
    tokens: str = "hidden"
    regions: int = 36
    region_score: float = 0.1
    seg_map: str = "panoptic"
    feature_dtype: str = "float16"

    def __post_init__(self) -> None:
        """Raises DataError when no model is named."""
        if not self.segmenter and not self.backbone:
            raise DataError("expected --segmenter, --backbone or both, found neither")

    def as_json(self) -> dict[str, Any]:
        """Settings as JSON; a later run must have equal ones to resume the blocks of an earlier run."""
        return dataclasses.asdict(self) | {"images": str(self.images.resolve())}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `from_arguments`."""
    count = command.at_least(1)
    parser.add_argument(
        "--images",
        type=to_path,
        required=True,
        help="folder of photographs; or a tar (WebDataset), a Parquet file (Hugging Face), or a folder of such",
    )
    parser.add_argument(
        "--segmenter", type=expand, default="", help="Mask2Former, MaskFormer or DETR on COCO panoptic: folder or name"
    )
    parser.add_argument(
        "--backbone",
        type=expand,
        default="",
        help="CLIP, SigLIP, DINOv2, DINOv3: folder or name; a convolutional network of timm: timm/NAME",
    )
    for model in ("segmenter", "backbone"):
        parser.add_argument(f"--{model}_sha256", default="", help="of its weights: an error where they are others")
    parser.add_argument("--image_size", type=count, help="side of the square that the backbone sees; default: its own")
    parser.add_argument(
        "--tokens",
        choices=TOKENS,
        default="hidden",
        help="grid and regions: last hidden state, or, of a CLIP, projected to the width of image_embedding; or none",
    )
    parser.add_argument("--regions", type=count, default=36, help="most regions of an image")
    parser.add_argument("--region_score", type=float, default=0.1, help="least confidence of a region, 0..1")
    parser.add_argument("--seg_map", choices=("panoptic", "semantic"), default="panoptic", help="kind of label map")


def from_arguments(args: argparse.Namespace) -> Settings:
    """The settings that the flags say."""
    names = [field.name for field in dataclasses.fields(Settings)]
    return Settings(**{name: getattr(args, name) for name in names})
