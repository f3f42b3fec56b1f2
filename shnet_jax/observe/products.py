"""Multiplications of the matrix products and convolutions in the text of a compiled program.

On GPUs many of them are calls of cuBLAS or cuDNN; the text states their dimensions.
"""

from __future__ import annotations

import math
import re

from shnet_jax.observe.hlo import Instruction, Shape

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_LIBRARIES = ("__cublas", "__cudnn", "__cuda", "__onednn", "tpu_custom_call", "triton", "__gpu$xla.gpu.triton")


def multiplications(instruction: Instruction, left: Shape, right: Shape) -> float | None:
    """Multiplications of the instruction; None if it is no product. left, right: its first two operands."""
    opcode = instruction.opcode
    if opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return _product(instruction, left, match[1] if match else "")
    if opcode == "convolution":
        return _convolution(instruction, left, right, instruction.shapes[0])
    target = _target(instruction)
    result = instruction.shapes[0] if instruction.shapes else left  # a second shape is the library's workspace
    if target.startswith("__cublas"):
        match = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        return _product(instruction, left, match[1]) if match else None
    if target.startswith("__cudnn$convBackwardInput"):  # operands: gradient of the output, kernel
        return _convolution(instruction, result, right, left)
    if target.startswith("__cudnn$convBackwardFilter"):  # operands: input, gradient of the output
        return _convolution(instruction, left, result, right)
    return _convolution(instruction, left, right, result) if target.startswith("__cudnn$conv") else None


def is_hidden(instruction: Instruction) -> bool:
    """Whether the instruction calls a library or a custom kernel, whose operations the text does not state."""
    return _target(instruction).startswith(_LIBRARIES)


def precision(instruction: Instruction, left: Shape, right: Shape) -> str | None:
    """The `lax.Precision` of a product with a float32 operand: "default", "high" or "highest"; else None."""
    if "f32" not in (left.dtype, right.dtype):
        return None
    # An attribute of the instruction, or in the note for cuBLAS.
    match = re.search(r'operand_precision(?:=\{|":\[")(\w+)', instruction.attributes)
    return match[1].lower() if match else "default"


def _target(instruction: Instruction) -> str:
    match = _TARGET.search(instruction.attributes) if instruction.opcode == "custom-call" else None
    return match[1] if match else ""


def _product(instruction: Instruction, left: Shape, contracted: str) -> float:
    """Multiplications of a matrix product. contracted: numbers of the axes of `left` that are summed over."""
    axes = map(int, re.findall(r"\d+", contracted))
    return math.prod(instruction.shapes[0].dims) * math.prod(left.dims[axis] for axis in axes)


def _convolution(instruction: Instruction, left: Shape, right: Shape, result: Shape) -> float:
    """Multiplications of a convolution, without those with padding, of which TPU's batched products have much.

    left, right, result: input, kernel and output, as dim_labels names their axes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"HLO: a convolution without dim_labels: {instruction.name}")
    of_input, of_kernel, of_output = labels.groups()
    out = result.dims
    count = float(out[of_output.index("b")] * out[of_output.index("f")] * right.dims[of_kernel.index("i")])
    window = "".join(re.findall(r"window=\{([^}]*)\}", instruction.attributes))
    options = dict(re.findall(r"(\w+)=([\w\-]+)", window))  # such as stride=2x3 pad=0_1x0_1
    for number, label in enumerate(sorted(label for label in of_kernel if label.isdecimal())):
        stride, low, lhs, rhs = (
            int(options[key].split("x")[number].split("_")[0]) if key in options else default
            for key, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        size, kernel = left.dims[of_input.index(label)], right.dims[of_kernel.index(label)]
        positions = (
            place * stride + element * rhs - low
            for place in range(out[of_output.index(label)])
            for element in range(kernel)
        )
        count *= sum(0 <= position <= (size - 1) * lhs and position % lhs == 0 for position in positions)
    return count
