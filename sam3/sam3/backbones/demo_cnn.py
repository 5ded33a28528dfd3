"""``demo_cnn``: a small convolutional student for the CPU demo, and the example to copy when you add a backbone.

Its last stage has stride 14, the patch size of SAM 3, so its grid is the teacher's own at any input size and nothing
has to be resampled: 18x18 at 252 px, 72x72 at 1008 px. Kernels are centred on the cells they feed, as patches are.
"""

from __future__ import annotations

from torch import Tensor, nn

from sam3.backbones.registry import BackboneSpec, register

FINE_CHANNELS, CHANNELS = 48, 128
"""Width at stride 7 and at stride 14."""


def conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm; the padding centres each output on the ``stride`` pixels it stands for."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - stride) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class MixerBlock(nn.Module):
    """Depthwise convolution over space, then an MLP over channels, each added to its input."""

    def __init__(self, channels: int, kernel: int, expansion: int = 2) -> None:
        super().__init__()
        self.space = conv_norm(channels, channels, kernel, groups=channels)
        self.channels = nn.Sequential(
            *conv_norm(channels, channels * expansion, 1), nn.ReLU(), *conv_norm(channels * expansion, channels, 1)
        )

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x_bchw = x_bchw + self.space(x_bchw)
        return x_bchw + self.channels(x_bchw)


class DemoCnn(nn.Module):
    """Stem to stride 7 and one block there, downsampling to stride 14 and four blocks there: 0.4M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.demo_stem = nn.Sequential(conv_norm(3, FINE_CHANNELS, kernel=9, stride=7), nn.ReLU())
        self.fine = MixerBlock(FINE_CHANNELS, kernel=5)
        self.down = nn.Sequential(conv_norm(FINE_CHANNELS, CHANNELS, kernel=4, stride=2), nn.ReLU())
        self.coarse = nn.Sequential(*(MixerBlock(CHANNELS, kernel=5) for _ in range(4)))

    def forward_taps(self, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Maps at stride 7 and at stride 14."""
        fine = self.fine(self.demo_stem(images_bchw))
        return fine, self.coarse(self.down(fine))


register(
    BackboneSpec(
        name="demo_cnn",
        build=DemoCnn,
        forward_taps=DemoCnn.forward_taps,  # type: ignore[arg-type]
        tap_channels=(FINE_CHANNELS, CHANNELS),
        tap_strides_px=(7, 14),
        marker="demo_stem.",
    )
)
