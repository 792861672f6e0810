"""Nets that enlarge pictures."""

from torch import Tensor

from core.tree import Tree
from nets.superresolution import drcn, drrn, edsr, espcn, fsrcnn, srcnn, srgan, vdsr
from tests.registry.face import Net, images, net, published, register

net("srcnn", srcnn, srcnn.Config(kernels=(5, 1, 3), widths=(3, 2)), images(1, 5, 6))
# Arithmetic of the paper's 8,032 and 57,184 weights, with biases.
published(srcnn, {"srcnn": 8_032 + 97, "srcnn-9-5-5": 57_184 + 97})

net("fsrcnn", fsrcnn, fsrcnn.Config(scale=2, width=4, shrunk=3, mappings=2), images(1, 5, 6))
# The paper's 12,464 weights, with biases and slopes.
published(fsrcnn, {"fsrcnn": 12_464 + 345})

net("espcn", espcn, espcn.Config(scale=2, widths=(3, 4), channels=2), images(2, 4, 5))
published(espcn, {"espcn": 22_729, "espcn-relu": 22_729})

net("vdsr", vdsr, vdsr.Config(depth=3, width=3), images(1, 5, 6))
published(vdsr, {"vdsr": 664_704})

net("drcn", drcn, drcn.Config(recursions=3, width=3), images(1, 5, 6))
# 1,774,080 weights, with biases and the weights of the average.
published(drcn, {"drcn": 1_774_080 + 4 * 256 + 1 + 16})

net("drrn", drrn, drrn.Config(blocks=2, units=2, width=3), images(1, 5, 6))
net("drrn, rectified", drrn, drrn.Config(units=2, width=3, rectified=True), images(1, 5, 6))
published(drrn, {"drrn": 297_216, "drrn-b1u25": 297_216})

net("edsr", edsr, edsr.Config(scales=(4,), blocks=2, width=3, residual_scale=0.5, white=2.0), images(3, 4, 5))
SEVERAL = edsr.Config(scales=(2, 3), blocks=1, width=3, white=2.0)


def every_scale(params: Tree, x: Tensor, key: Tensor | None, train: bool) -> list[Tensor]:
    """All scales of MDSR, so that all layers are in use."""
    return [edsr.apply(params, x, SEVERAL, scale=scale, key=key, train=train) for scale in SEVERAL.scales]


register(Net("edsr, several scales", edsr.spec(SEVERAL), every_scale, images(3, 4, 5)))
# Those of the authors' code; MDSR has 8.0 million in the paper.
published(edsr, {"edsr-baseline": 1_369_859, "edsr": 40_729_603})

SRGAN = srgan.Config(scale=2, blocks=2, width=3, channels=2, size=16, critic_width=2, hidden=5)
net("srresnet", srgan, SRGAN, images(2, 4, 5))


def srgan_critic(params: Tree, x: Tensor, key: Tensor | None, train: bool) -> Tensor:
    return srgan.critic(params, x, SRGAN, key=key, train=train)


register(Net("srgan critic", srgan.critic_spec(SRGAN), srgan_critic, images(2, 16)))
# 1,549,462 with the biases of the 33 convolutions before norms, which cancel them.
SRRESNET = 1_549_462 - 33 * 64
published(srgan, {"srresnet": SRRESNET, "srgan": SRRESNET})
