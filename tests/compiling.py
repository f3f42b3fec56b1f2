"""Flags of XLA and thresholds of the garbage collector with which tests compile; imports nothing that starts JAX."""

from importlib.metadata import version

COLLECT_AFTER = (100_000, 20, 20)
"""Thresholds of the garbage collector, which save 7 % of the CPU time of a test that compiles."""


def xla_flags(devices: int, quick: bool = True) -> str:
    """So many virtual CPU devices and, if quick, no emitters of fusions, which take two thirds of a compilation.

    jaxlib after 0.10 has no flag for the emitters.
    """
    emitters = ["--xla_cpu_use_fusion_emitters=false"] if quick and version("jaxlib").startswith("0.10.") else []
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *emitters])
