"""Regions, grid, both in one model and both as an ensemble, each with and without segmentation, on flickr8k_mini."""

from ml_collections import ConfigDict

from configs import shnet

UNITS = {"region": ("regions",), "grid": ("grid",), "joint": ("regions", "grid")}


def get_config() -> ConfigDict:
    """`--mode=study`: 12 arms, then ensembles of the region and the grid model of the same highlighting and seed.

    The joint arms are those of shnet.py:hybrid,flickr8k.
    """
    c = shnet.get_config("hybrid,flickr8k")
    c.name = "3SHNet"
    kinds = c.study.arms.to_dict()  # full, semantic, spatial, none
    c.study.arms = ConfigDict(
        {
            f"{name}_{kind}": {"model": {"units": units} | changes.get("model", {})}
            for name, units in UNITS.items()
            for kind, changes in kinds.items()
        }
    )
    c.study.ensembles = ConfigDict({f"ensemble_{kind}": (f"region_{kind}", f"grid_{kind}") for kind in kinds})
    c.study.compare = tuple(
        [f"{name}_{kind} - {name}_none" for name in (*UNITS, "ensemble") for kind in ("semantic", "spatial", "full")]
        + [
            f"{two}_{kind} - {one}_{kind}"
            for two in ("joint", "ensemble")
            for one in ("region", "grid")
            for kind in kinds
        ]
    )
    return c
