"""Published weights of image classifiers, with how their images are prepared.

    params, cfg, published = from_pretrained("resnet50")
    logits = resnet.apply(params, preprocess(images, published), cfg)

Torchvision's are downloaded; a file, a folder or a hub repository of torchvision, transformers or timm (ViT) will do.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from core.tree import Tree
from nets.classifiers import vit
from nets.classifiers.by_name import find
from nets.weights import WeightsError, locate, read_config

URL = "https://download.pytorch.org/models/"

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
"""For nets that want pixels within [-1, 1], as those trained in TensorFlow."""


@dataclass(frozen=True)
class Published:
    """Weights, and how the images were prepared that they were tested on."""

    source: str
    """A file at URL whose name ends in the first eight hex digits of its SHA-256 sum, a local path, or a repository."""
    accuracy: float | None = None
    """Top-1 on ImageNet's validation images in percent, as published."""
    resize: int = 256
    """Pixels that the shorter side is scaled to."""
    crop: int = 224
    """Pixels a side of the middle that is cut out."""
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET["mean"]
    """Of each channel; pixels are in [0, 1]."""
    std: tuple[float, ...] = IMAGENET["std"]


# What torchvision recommends. Its GoogLeNet and Inception come from TensorFlow: its modules (`transform_input`) turn
# images that are normalised with ImageNet's constants into those with HALF.
PUBLISHED = {
    "alexnet": Published("alexnet-owt-7be5be79.pth", 56.522),
    "convnext_tiny": Published("convnext_tiny-983f1562.pth", 82.52, 236),
    "convnext_small": Published("convnext_small-0c510722.pth", 83.616, 230),
    "convnext_base": Published("convnext_base-6075fbad.pth", 84.062, 232),
    "convnext_large": Published("convnext_large-ea097f82.pth", 84.414, 232),
    "densenet121": Published("densenet121-a639ec97.pth", 74.434),
    "densenet161": Published("densenet161-8d451a50.pth", 77.138),
    "densenet169": Published("densenet169-b2777c0a.pth", 75.6),
    "densenet201": Published("densenet201-c1103571.pth", 76.896),
    "googlenet": Published("googlenet-1378be20.pth", 69.778, **HALF),
    "inception_v3": Published("inception_v3_google-0cc3c7bd.pth", 77.294, 342, 299, **HALF),
    "mobilenet_v2": Published("mobilenet_v2-7ebf99e0.pth", 72.154, 232),
    "mobilenet_v3_large": Published("mobilenet_v3_large-5c1a4163.pth", 75.274, 232),
    "mobilenet_v3_small": Published("mobilenet_v3_small-047dcff4.pth", 67.668),
    "resnet18": Published("resnet18-f37072fd.pth", 69.758),
    "resnet34": Published("resnet34-b627a593.pth", 73.314),
    "resnet50": Published("resnet50-11ad3fa6.pth", 80.858, 232),
    "resnet101": Published("resnet101-cd907fc2.pth", 81.886, 232),
    "resnet152": Published("resnet152-f82ba261.pth", 82.284, 232),
    "resnext50_32x4d": Published("resnext50_32x4d-1a0047aa.pth", 81.198, 232),
    "resnext101_32x8d": Published("resnext101_32x8d-110c445d.pth", 82.834, 232),
    "resnext101_64x4d": Published("resnext101_64x4d-173b62eb.pth", 83.246, 232),
    "wide_resnet50_2": Published("wide_resnet50_2-9ba9bcbe.pth", 81.602, 232),
    "wide_resnet101_2": Published("wide_resnet101_2-d733dc28.pth", 82.51, 232),
    "squeezenet1_0": Published("squeezenet1_0-b66bff10.pth", 58.092),
    "squeezenet1_1": Published("squeezenet1_1-b8a52dc0.pth", 58.178),
    "vgg11": Published("vgg11-8a719046.pth", 69.02),
    "vgg11_bn": Published("vgg11_bn-6002323d.pth", 70.37),
    "vgg13": Published("vgg13-19584684.pth", 69.928),
    "vgg13_bn": Published("vgg13_bn-abd245e5.pth", 71.586),
    "vgg16": Published("vgg16-397923af.pth", 71.592),
    "vgg16_bn": Published("vgg16_bn-6c64b313.pth", 73.36),
    "vgg19": Published("vgg19-dcbb9e9d.pth", 72.376),
    "vgg19_bn": Published("vgg19_bn-c79401a0.pth", 74.218),
    "vit_b_16": Published("vit_b_16-c867db91.pth", 81.072),
    "vit_b_32": Published("vit_b_32-d86f8d99.pth", 75.912),
    "vit_l_16": Published("vit_l_16-852ce7e3.pth", 79.662, 242),
    "vit_l_32": Published("vit_l_32-c7638314.pth", 76.972),
    "vit_h_14": Published("vit_h_14_swag-80465313.pth", 88.552, 518, 518, "bicubic"),
}

REPOSITORIES = {
    "mobilenet_v1": "google/mobilenet_v1_1.0_224",
    "vit_s_16": "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_ti_16": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
}
"""On the Hugging Face hub, for presets that torchvision does not have."""


def preprocess(images: Tensor, published: Published) -> Tensor:
    """(images - mean) / std. images: (..., channels, height, width) in [0, 1], resized and cropped already.

    Raises:
        ValueError: images with other channels.
    """
    channels = len(published.mean)
    if images.ndim < 3 or images.shape[-3] != channels:
        raise ValueError(f"expected images (..., {channels}, height, width), found {tuple(images.shape)}")
    mean, std = (images.new_tensor(x)[:, None, None] for x in (published.mean, published.std))
    return (images - mean) / std


def download(name: str, directory: str | Path | None = None, base_url: str = URL) -> Path:
    """Fetch torchvision's weights of a preset; a file that is there already is not fetched again.

    Args:
        directory: where to keep it, a folder in the user's cache if None.
        base_url: another place that serves the same files (their checksums are compared).

    Raises:
        WeightsError: torchvision has none, no connection, or a file with another checksum, which is removed.
    """
    if name not in PUBLISHED:
        raise WeightsError(f"torchvision publishes no weights of '{name}'; it does of {', '.join(PUBLISHED)}")
    import pooch

    file = PUBLISHED[name].source
    folder = Path(directory) if directory is not None else Path(pooch.os_cache("functree")) / "weights"
    address = f"{base_url.rstrip('/')}/{file}"
    try:
        path = Path(pooch.retrieve(address, known_hash=None, fname=file, path=folder))
    except Exception as error:  # whatever the network library raises
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"cannot fetch {address}: {first}") from None
    wanted, found = Path(file).stem.rpartition("-")[2], pooch.file_hash(str(path), alg="sha256")
    if not found.startswith(wanted):
        path.unlink()
        raise WeightsError(f"{address} is not the published file: its SHA-256 sum is {found[:8]}..., not {wanted}...")
    return path


def from_pretrained(
    name: str,
    source: str | None = None,
    *,
    classes: int | None = None,
    size: int | None = None,
    base_url: str = URL,
) -> tuple[Tree, Any, Published]:
    """(parameters and Stats, Config, what they are) of a preset.

    Beside a file of transformers or timm lie the numbers of its classes and how its images are prepared. Without such a
    description they are taken to be those that torchvision publishes.

    Args:
        name: as in `nets.classifiers.find`.
        source: a local file or folder, or a hub repository; by default what is published, by download.
        classes: of the file's head, if they are not 1000 and nothing beside it says so.
        size: pixels a side of the images, if they are not the published ones: a vit's positions are resized. Other nets
            take images of any size.
        base_url: as in `download`.

    Raises:
        ValueError: no such preset.
        WeightsError: nothing is published or there, it cannot be read, or it is of another net.
    """
    net, cfg = find(name)
    if source is None and name not in PUBLISHED and name not in REPOSITORIES:
        raise WeightsError(f"no weights of '{name}' are published that are known here; give a source")
    if source is None and name in PUBLISHED:
        published, description = PUBLISHED[name], {}
        source = str(download(name, base_url=base_url))
    else:
        source = source or REPOSITORIES[name]
        description = _description(source, "config.json")
        published = _preparation(source, description, PUBLISHED.get(name, Published(source)))
    cfg = _described(source, cfg, description)
    if classes is not None:
        cfg = replace(cfg, classes=classes)
    if net is vit:
        cfg = replace(cfg, image=size or published.crop)
    return net.from_pretrained(source, cfg), cfg, published


def _description(source: str, file: str) -> dict:
    """A JSON file beside the weights, {} if there is none."""
    folder = str(Path(source).parent) if Path(source).is_file() else source
    try:
        locate(folder, (file,))
    except WeightsError:  # if it is the source that is not there, reading the weights will say so
        return {}
    return read_config(folder, file)


def _described(source: str, cfg: Any, description: dict) -> Any:
    """The Config with what a description says and tensors do not show."""
    kind, changes = description.get("model_type"), {}
    for option in ("downsample_in_first_stage", "downsample_in_bottleneck"):  # of transformers' ResNets
        if description.get(option):
            raise WeightsError(f"'{source}' has strides elsewhere: {option} is true")
    if kind in EPS:
        changes["eps"] = description.get("layer_norm_eps", EPS[kind])
    if kind in ("mobilenet_v1", "mobilenet_v2"):
        changes["padding"] = "tensorflow" if description.get("tf_padding", True) else "symmetric"
    if "id2label" in description or "num_classes" in description:  # transformers, timm
        changes["classes"] = description.get("num_classes") or len(description["id2label"])
    return replace(cfg, **changes)


EPS = {"mobilenet_v2": 1e-3, "vit": 1e-12}
"""Of the norms, where transformers lets them differ and a description may leave them out."""

INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


def _preparation(source: str, description: dict, otherwise: Published) -> Published:
    """How the images are prepared, from timm's config.json or transformers' preprocessor_config.json."""
    timms = "pretrained_cfg" in description
    file = "config.json" if timms else "preprocessor_config.json"
    try:
        found = _of_timm(description["pretrained_cfg"]) if timms else _of_transformers(_description(source, file))
    except (KeyError, TypeError, IndexError) as error:
        raise WeightsError(f"'{source}': its {file} does not say how images are prepared: {error!r}") from error
    return replace(otherwise, source=source, accuracy=None, **found)


def _of_timm(found: dict) -> dict:
    crop = found["input_size"][-1]
    return {
        "resize": math.floor(crop / found["crop_pct"]),
        "crop": crop,
        "interpolation": found["interpolation"],
        "mean": tuple(found["mean"]),
        "std": tuple(found["std"]),
    }


def _of_transformers(found: dict) -> dict:
    if not found:
        return {}
    resize = crop = _side(found["size"])
    if found.get("crop_pct") and crop < 384:  # ConvNeXt's: larger images are not cropped
        resize = int(crop / found["crop_pct"])
    elif found.get("do_center_crop"):
        crop = _side(found["crop_size"])
    return {
        "resize": resize,
        "crop": crop,
        "interpolation": INTERPOLATIONS[found.get("resample", 2)],
        "mean": tuple(found["image_mean"]),
        "std": tuple(found["image_std"]),
    }


def _side(size: int | dict) -> int:
    """Pixels: of older files a number, of newer ones {"shortest_edge": 256} or {"height": 224, "width": 224}."""
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
