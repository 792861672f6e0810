"""Published weights of image classifiers, with how their images are prepared.

    params, cfg, published = from_pretrained("resnet50")
    logits = resnet.apply(params, preprocess(images, published), cfg)

Torchvision's are downloaded. Files, folders and hub repositories of torchvision, transformers or timm (ViT) are read
too, and checkpoints of one's own training of such a net, whatever its head.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from core import tree
from core.tree import Tree
from nets.blocks.conv_norm import fill_published
from nets.classifiers import vit
from nets.classifiers.by_name import find
from nets.weights import Rename, WeightsError, fetch, listing, read, read_config, strip_prefixes

URL = "https://download.pytorch.org/models/"

IMAGENET_CLASSES = Path(__file__).parent / "imagenet_classes.txt"
"""The 1000 classes of ImageNet's challenge, a line each, in the order of their labels."""
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
"""For nets that want pixels within [-1, 1], as those trained in TensorFlow."""


@dataclass(frozen=True)
class Published:
    """Weights, and how the images were prepared that they were tested on."""

    source: str
    """A file at URL whose name ends in the first eight hex digits of its SHA-256 sum, a local path, or a repository."""
    accuracy: float | None = None
    """Top-1 accuracy on ImageNet's validation images in percent, as published."""
    resize: int = 256
    """Pixels that the shorter side is scaled to."""
    crop: int = 224
    """Pixels a side of the centre crop."""
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET["mean"]
    """Mean per channel; pixels are in [0, 1]."""
    std: tuple[float, ...] = IMAGENET["std"]
    """Standard deviation per channel."""
    notes: tuple[str, ...] = ()
    """Differences of the file from the preset, to print: a prefix of all names, another head or none."""


# As torchvision recommends. Its GoogLeNet and Inception come from TensorFlow: its modules (`transform_input`) turn
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
    """(images - mean) / std. images: (..., channels, height, width) in [0, 1], already resized and cropped.

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
        directory: folder to keep it in; None is a folder in the user's cache.
        base_url: another server of the same files (their checksums are compared).

    Raises:
        WeightsError: torchvision has none, there is no connection, or the file has another checksum and is removed.
    """
    if name not in PUBLISHED:
        raise WeightsError(f"torchvision publishes no weights of '{name}'; it does of {', '.join(PUBLISHED)}")
    return fetch(f"{base_url.rstrip('/')}/{PUBLISHED[name].source}", directory)


def from_pretrained(
    name: str,
    source: str | None = None,
    *,
    classes: int | None = None,
    size: int | None = None,
    base_url: str = URL,
) -> tuple[Tree, Any, Published]:
    """(parameters and Stats, Config, how images are prepared) of a preset.

    Beside a file of transformers or timm lies a description of the net and of its images. Without one the images are
    taken to be prepared as for the weights that torchvision publishes. The number of classes is that of the file's
    head. A file without a head, or with one of another form, gives parameters without `head`: `features` and
    `feature_maps` work, and `by_name.adopt` draws a head. Auxiliary heads that it lacks, or that are for other classes,
    are left out (`cfg.aux` is then False). The `notes` of the third result say so.

    Args:
        name: as in `nets.classifiers.by_name.find`.
        source: a local file or folder, or a hub repository; by default the published weights, by download.
        classes: refuse a file whose head is not for that many.
        size: pixels per side of the images, if different from the published ones: a ViT's positions are resized.
            Other nets take images of any size.
        base_url: as in `download`.

    Raises:
        ValueError: no such preset.
        WeightsError: nothing is published or there, it cannot be read, or it is of another net.
    """
    net, cfg = find(name)
    if not hasattr(net, "rename_table"):
        raise WeightsError(f"'{name}': files of an mlp cannot be read, as their names are not known")
    if source is None and name not in PUBLISHED and name not in REPOSITORIES:
        raise WeightsError(f"no weights of '{name}' are published that are known here; give a source")
    if source is None and name in PUBLISHED:
        published, description = PUBLISHED[name], {}
        source = str(download(name, base_url=base_url))
    else:
        source = source or REPOSITORIES[name]
        description = read_config(source, "config.json", optional=True)
        published = preparation(source, description, PUBLISHED.get(name, Published(source)))
    cfg = _described(source, name, cfg, description)
    if net is vit:
        cfg = replace(cfg, image=size or published.crop)
    state, prefix = strip_prefixes(read(source, prefixes=()))
    notes = [f"stripped '{prefix}' from all names"] if prefix else []
    cfg, model, state, table = _fit_heads(net, cfg, state, classes, notes)
    return fill_published(model, state, table, source), cfg, replace(published, notes=tuple(notes))


def class_names(published: Published, count: int) -> tuple[str, ...]:
    """Names of the classes of published weights, each once.

    They are the `id2label` or `label_names` of a config.json beside the weights. Where it names none, 1000 classes are
    those of ImageNet, in torchvision's order, and others have their numbers.

    Args:
        published: third result of `from_pretrained`.
        count: number of classes.

    Raises:
        WeightsError: the config.json names other classes than 0 to count - 1.
    """
    source = published.source
    downloaded = any(source == other.source for other in PUBLISHED.values())
    description = {} if downloaded else read_config(source, "config.json", optional=True)
    names = description.get("id2label") or description.get("label_names") or {}
    if isinstance(names, list):
        names = {str(i): name for i, name in enumerate(names)}
    if not names or all(name == f"LABEL_{i}" for i, name in names.items()):  # transformers' names for unnamed classes
        listed = IMAGENET_CLASSES.read_text(encoding="utf-8").splitlines() if count == 1000 else range(count)
        names = {str(i): name for i, name in enumerate(listed)}
    if names.keys() != {str(i) for i in range(count)}:
        raise WeightsError(f"'{source}': its config.json names {len(names)} classes; expected 0 to {count - 1}")
    ordered = [str(names[str(i)]) for i in range(count)]
    times = Counter(ordered)
    return tuple(name if times[name] == 1 else f"{name} ({i})" for i, name in enumerate(ordered))


def _recognise(net: ModuleType, state: dict[str, Tensor], cfg: Any) -> tuple[dict[str, Tensor], dict[str, Rename]]:
    """The file's tensors, and the rename table for their names."""
    return net.recognise(state, cfg) if hasattr(net, "recognise") else (state, net.rename_table(cfg))


def _fit_heads(
    net: ModuleType, cfg: Any, state: dict[str, Tensor], classes: int | None, notes: list[str]
) -> tuple[Any, Tree, dict[str, Tensor], dict[str, Rename]]:
    """(Config, spec, tensors, rename table) that fit the heads of a file; `notes` gets a line for each unusual one."""
    tensors, table = _recognise(net, state, cfg)
    expected = {rename.theirs for ours, rename in table.items() if ours.startswith("head.")}
    head = {name for name in tensors if name.startswith(_prefix_of_head(table))}
    headless = classes is None and head != expected
    if headless:
        notes.append(f"left out its head: {listing(sorted(head))}" if head else "it has no head")
        tensors = {name: x for name, x in tensors.items() if name not in head}
    else:
        rows = classes or sum(tensors[table["head.weight"].theirs].shape[:1]) or cfg.classes
        notes += [f"its head is for {rows} classes"] if rows != cfg.classes else []
        cfg = replace(cfg, classes=rows)
    if getattr(cfg, "aux", False):
        weights = [rename.theirs for ours, rename in table.items() if fnmatch(ours, "aux.*head.weight")]
        rows = {sum(tensors[name].shape[:1]) for name in weights if name in tensors}
        if rows != {cfg.classes}:
            note = f"left out its auxiliary heads for {max(rows)} classes" if rows else "it has no auxiliary heads"
            notes.append(note)
            cfg = replace(cfg, aux=False)
            tensors, table = _recognise(net, tensors, cfg)
    model = net.spec(cfg)
    if headless:
        model, _ = tree.partition(model, lambda name, _: not name.startswith("head."))
    return cfg, model, tensors, table


def _prefix_of_head(table: dict[str, Rename]) -> str:
    """The shortest prefix of the head's names that no other name in a file begins with: "fc." or "classifier."."""
    others = [name for ours, rename in table.items() if not ours.startswith("head.") for name in rename.names]
    parts = table["head.weight"].theirs.split(".")
    prefixes = [".".join(parts[:depth]) + "." for depth in range(1, len(parts))]
    return next(prefix for prefix in prefixes if not any(name.startswith(prefix) for name in others))


FIXED = {
    "convnext": {"hidden_act": "gelu"},
    "mobilenet_v1": {"hidden_act": "relu6", "layer_norm_eps": 1e-3},
    "mobilenet_v2": {"hidden_act": "relu6", "output_stride": 32},
    "resnet": {"downsample_in_bottleneck": False, "downsample_in_first_stage": False, "hidden_act": "relu"},
    "vit": {"hidden_act": "gelu"},
}
"""Fields of transformers' config.json that change the net but no name and no shape. These are also its defaults."""

EPS = {"convnext": 1e-12, "mobilenet_v2": 1e-3, "vit": 1e-12}
"""Defaults of transformers' layer_norm_eps where a Config has an eps of its own."""

TIMM_VITS = {
    "vit_b_16": "base_patch16",
    "vit_b_32": "base_patch32",
    "vit_h_14": "huge_patch14",
    "vit_l_16": "large_patch16",
    "vit_l_32": "large_patch32",
    "vit_s_16": "small_patch16",
    "vit_ti_16": "tiny_patch16",
}
"""Timm's names of the presets of ViT, between vit_ or deit_ and the size of the images."""

IN_SHAPES = ("depth", "embed_dim", "img_size", "in_chans", "mlp_ratio", "num_classes", "patch_size")
"""Arguments of timm's nets that the tensors show, so that they need no look."""


def _described(source: str, name: str, cfg: Any, description: dict) -> Any:
    """The Config with the fields of a config.json that the tensors do not show.

    Raises:
        WeightsError: naming a field by which it is another net.
    """

    def expect(field: str, value: Any, expected: Any) -> None:
        if value != expected:
            raise WeightsError(f"'{source}' is of another net than {name}: {field} is {value!r}, expected {expected!r}")

    family, changes = find(name)[0].__name__.rpartition(".")[2], {}
    if "model_type" in description:  # transformers
        expect("model_type", description["model_type"], family)
        for field, fixed in FIXED.get(family, {}).items():
            expect(field, description.get(field, fixed), fixed)
        if family == "vit":
            expect("num_attention_heads", description.get("num_attention_heads", 12), cfg.heads)
        if family in EPS:
            changes["eps"] = description.get("layer_norm_eps", EPS[family])
        if family in ("mobilenet_v1", "mobilenet_v2"):
            changes["padding"] = "tensorflow" if description.get("tf_padding", True) else "symmetric"
    elif "architecture" in description:  # timm
        architecture, pool = description["architecture"], "token" if family == "vit" else "avg"
        usual = f"vit_{TIMM_VITS[name]}_224" if family == "vit" else name
        sizes = re.sub(r"^(vit|deit)_(\w+)_\d+$", r"vit_\2_224", str(architecture))  # the tensors show the image's size
        expect("architecture", usual if sizes == usual else architecture, usual)
        expect("global_pool", description.get("global_pool", pool), pool)
        known = {"global_pool": pool, "num_heads": getattr(cfg, "heads", None)}
        for field, value in (description.get("model_args") or {}).items():
            if field not in IN_SHAPES and not field.endswith("_rate"):
                expect(f"model_args.{field}", value, known.get(field))
    return replace(cfg, **changes)


INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's codes."""


def preparation(source: str, description: dict, usual: Published) -> Published:
    """The preparation of images by timm's config.json or transformers' preprocessor_config.json."""
    by_timm = "pretrained_cfg" in description
    file = "config.json" if by_timm else "preprocessor_config.json"
    try:
        preparation = {} if by_timm else read_config(source, file, optional=True)
        steps = _timm_steps(description["pretrained_cfg"]) if by_timm else _transformers_steps(preparation)
    except (KeyError, TypeError, IndexError) as error:
        raise WeightsError(f"'{source}': its {file} does not say how images are prepared: {error!r}") from error
    except ValueError as error:
        raise WeightsError(f"'{source}': its {file} prepares images in another way: {error}") from error
    return replace(usual, source=source, accuracy=None, **steps)


def _timm_steps(preparation: dict) -> dict:
    crop = preparation["input_size"][-1]
    return {
        "resize": math.floor(crop / preparation["crop_pct"]),
        "crop": crop,
        "interpolation": preparation["interpolation"],
        "mean": tuple(preparation["mean"]),
        "std": tuple(preparation["std"]),
    }


def _transformers_steps(preparation: dict) -> dict:
    if not preparation:
        return {}
    factor = preparation.get("rescale_factor", 1 / 255)
    if not preparation.get("do_rescale", True) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor is {factor}, expected bytes that are divided by 255")
    resize = crop = _side(preparation["size"])
    if preparation.get("crop_pct") and crop < 384:  # ConvNeXt's: larger images are not cropped
        resize = int(crop / preparation["crop_pct"])
    elif preparation.get("do_center_crop"):
        crop = _side(preparation["crop_size"])
    normalised = preparation.get("do_normalize", True)
    return {
        "resize": resize,
        "crop": crop,
        "interpolation": INTERPOLATIONS[preparation.get("resample", 2)],
        "mean": tuple(preparation["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        "std": tuple(preparation["image_std"]) if normalised else (1.0, 1.0, 1.0),
    }


def _side(size: int | dict) -> int:
    """Pixels: a number in older files, {"shortest_edge": 256} or {"height": 224, "width": 224} in newer ones."""
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
