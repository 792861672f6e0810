"""Super-resolution nets by name: any preset, fitted to the factors of enlargement, and one call for all of them.

    net, cfg = configured("fsrcnn", (3,))
    params = spec.init(random.key(0), net.spec(cfg))
    large = enlarge(net, params, cfg, small, bicubic, 3)

A family is a module with `PRESETS`, `spec(cfg)`, `apply(params, x, cfg, *, key, train)`, `reach(cfg)` and `ENLARGED`,
whether x is the bicubic enlargement or the small picture.
"""

from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import Tensor

from core.tree import Tree
from nets.superresolution import drcn, drrn, edsr, espcn, fsrcnn, srcnn, srgan, vdsr

FAMILIES = (srcnn, fsrcnn, espcn, vdsr, drcn, drrn, edsr, srgan)
PRESETS: dict[str, ModuleType] = {name: net for net in FAMILIES for name in net.PRESETS}
"""The module of each preset."""


def configured(name: str, scales: tuple[int, ...]) -> tuple[ModuleType, Any]:
    """(module, Config) of a preset for factors of enlargement.

    Raises:
        ValueError: no such preset; several factors, or one of them, that the net cannot have.
    """
    if name not in PRESETS:
        raise ValueError(f"no net is named '{name}'; expected one of {', '.join(PRESETS)}")
    net, cfg = PRESETS[name], PRESETS[name].PRESETS[name]
    if not scales or len(set(scales)) < len(scales) or min(scales) < 2:
        raise ValueError(f"scales {', '.join(map(str, scales))}; expected different ones from 2 on")
    if hasattr(cfg, "scales") and (len(cfg.scales) > 1 or len(scales) == 1):
        return net, replace(cfg, scales=scales)
    if not net.ENLARGED and len(scales) > 1:
        several = ", ".join(n for n, m in PRESETS.items() if m.ENLARGED or len(getattr(m.PRESETS[n], "scales", ())) > 1)
        raise ValueError(f"{name} has one scale, not {', '.join(map(str, scales))}; for several there are {several}")
    return net, cfg if net.ENLARGED else replace(cfg, scale=scales[0])


def scales_of(net: ModuleType, cfg: Any) -> tuple[int, ...] | None:
    """Factors of enlargement that a net has; None for a net of enlarged pictures, which has any."""
    return None if net.ENLARGED else getattr(cfg, "scales", None) or (cfg.scale,)


def enlarge(
    net: ModuleType,
    params: Tree,
    cfg: Any,
    small: Tensor,
    bicubic: Tensor,
    scale: int,
    *,
    residual: bool = False,
    train: bool = False,
) -> Tensor:
    """Enlarged pictures by any of the nets.

    Args:
        small: (batch, channels, height, width) in [0, 1].
        bicubic: its bicubic enlargement, (batch, channels, scale height, scale width).
        residual: the net's output, EDSR's without the mean colour, is added to the bicubic enlargement; VDSR, DRCN
            and DRRN do so themselves.

    Returns:
        (batch, channels, scale height, scale width).

    Raises:
        ValueError: a scale that the net has not, or other channels.
    """
    scales = scales_of(net, cfg)
    if scales is not None and scale not in scales:
        raise ValueError(f"the net enlarges by {', '.join(map(str, scales))}, not by {scale}")
    if net in (vdsr, drcn, drrn):
        return net.apply(params, bicubic, cfg, train=train)
    options = {"scale": scale} if net is edsr else {}
    out = net.apply(params, bicubic if net.ENLARGED else small, cfg, train=train, **options)
    if not residual:
        return out
    return bicubic + (out - edsr.mean_colour(out) if net is edsr else out)
