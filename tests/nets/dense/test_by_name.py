"""Segmentation nets by name, and files of other libraries."""

import hashlib

import pooch
import pytest
import torch
from torch import nn

from core import random, spec, tree
from nets.blocks.residual_stages import Stages, stage_maps, stages_spec
from nets.dense import by_name, fcn, transunet, unet
from nets.weights import WeightsError
from tests.benchmarks.module_unet import UNet
from tests.local_server import serve
from tests.nets.parity import randomise
from tests.registry.dense_references import TransUNet


def test_every_preset_has_one_name_and_a_wrong_one_lists_others():
    names = [preset for net in by_name.FAMILIES.values() for preset in net.PRESETS]
    assert len(set(names)) == len(names)
    for name in names:
        net, cfg = by_name.find(name)
        assert net.PRESETS[name] is cfg
    with pytest.raises(ValueError, match="no segmentation net is named 'unett'; expected one such as unet"):
        by_name.find("unett")


def test_configured_for_other_classes_and_sizes():
    net, cfg = by_name.configured("unet-small", classes=5, size=64, width=8, depth=None)
    assert net is unet and cfg == unet.Config(8, 4, classes=5)
    assert by_name.configured("transunet-small", classes=5, size=64)[1].image == 64
    with pytest.raises(ValueError, match="'fcn_resnet50' has no depth, width to choose"):
        by_name.configured("fcn_resnet50", classes=5, size=64, width=8, depth=2)


def test_milesials_file_with_the_values_of_its_masks(tmp_path):
    module = randomise(UNet(8, 2, True, 3)).eval()
    torch.save({**module.state_dict(), "mask_values": [0, 1, 2]}, tmp_path / "checkpoint.pth")
    params, cfg = by_name.from_pretrained("unet", str(tmp_path / "checkpoint.pth"))
    assert cfg == unet.Config(8, 2, True, classes=3)
    x = random.normal(random.key(0), (2, 3, 20, 17))
    with torch.no_grad():
        torch.testing.assert_close(unet.apply(params, x, cfg), module(x))


def test_transunets_file_tells_the_size_of_its_images(tmp_path, monkeypatch):
    sizes = {"layers": 1, "heads": 2, "width": 12, "hidden": 8, "decoder": (6, 5, 4, 3), "bridge": 6, "dropout": 0.0}
    small = transunet.Config(32, (1, 1, 1), 4, 2, **sizes)
    monkeypatch.setitem(transunet.PRESETS, "small", small)
    module = TransUNet(transunet.Config(48, (1, 1, 1), 4, 2, **sizes, classes=4)).eval()
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    params, cfg = by_name.from_pretrained("small", str(tmp_path / "weights.pth"))
    assert (cfg.image, cfg.classes) == (48, 4)
    x = random.normal(random.key(0), (1, 3, 48, 48))
    with torch.no_grad():
        torch.testing.assert_close(transunet.apply(params, x, cfg), module(x))
        grey = transunet.apply(params, x[:, :1], cfg)
        torch.testing.assert_close(grey, module(x[:, :1].repeat(1, 3, 1, 1)))


SMALL = fcn.Config(Stages((1, 1), "bottleneck", width=4), classes=21)


def published(module_spec, table, skip: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a spec by their published names."""
    values = spec.init(random.key(1), module_spec)
    return {table[n].theirs: x for n, x in tree.items(values) if not (skip and table[n].theirs.startswith(skip))}


@pytest.mark.parametrize("lacking", ["", "aux_classifier."])
def test_torchvisions_file_by_download_with_or_without_auxiliary_head(tmp_path, monkeypatch, lacking):
    served = tmp_path / "served"
    served.mkdir()
    torch.save(published(fcn.spec(SMALL), fcn.rename_table(SMALL), lacking), served / "file")
    digest = hashlib.sha256((served / "file").read_bytes()).hexdigest()[:8]
    (served / "file").rename(served / f"small-{digest}.pth")
    monkeypatch.setitem(fcn.PRESETS, "small", SMALL)
    monkeypatch.setitem(by_name.PUBLISHED, "small", f"small-{digest}.pth")
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
    with serve(served) as url:
        params, cfg = by_name.from_pretrained("small", base_url=url)
    assert cfg.aux == ("aux" in params) == (not lacking) and cfg.classes == 21
    again, _ = by_name.from_pretrained("small", base_url="http://127.0.0.1:9")  # nothing to fetch
    assert tree.names(again) == tree.names(params)


def test_torchvision_still_publishes_these_files():
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    for name, file in by_name.PUBLISHED.items():
        weights = models.get_model_weights(name).DEFAULT
        assert weights.url == f"{by_name.URL}/{file}"
        assert tuple(weights.meta["categories"]) == ("__background__", *by_name.VOC[1:])


def test_backbone_of_a_classifier(tmp_path):
    cfg = Stages((1, 1), "bottleneck", width=4)
    table = fcn.stage_names(cfg)
    state = published(stages_spec(cfg), table)
    torch.save({**state, "fc.weight": torch.zeros(3, 32), "fc.bias": torch.zeros(3)}, tmp_path / "resnet.pth")
    params = fcn.backbone_from_pretrained(str(tmp_path / "resnet.pth"), cfg)
    x = random.normal(random.key(0), (1, 3, 32, 32))
    fine = [tuple(m.shape[2:]) for m in stage_maps(params, x, cfg, output_stride=4)]
    assert fine == [(16, 16), (8, 8), (8, 8)] and stage_maps(params, x, cfg)[-1].shape[2:] == (4, 4)


def test_files_of_other_nets_are_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "linear.pth")
    source = str(tmp_path / "linear.pth")
    with pytest.raises(WeightsError, match="of another net than milesial's U-Net: it has no inc.double_conv.0.weight"):
        by_name.from_pretrained("unet", source)
    with pytest.raises(WeightsError, match="of another net than fcn_resnet50: it has no classifier.4.weight"):
        by_name.from_pretrained("fcn_resnet50", source)
    with pytest.raises(WeightsError, match="no weights of 'unet' are published that are known here; give a file"):
        by_name.from_pretrained("unet")
    torch.save(UNet(4, 2, False, 2).state_dict() | {"extra": torch.zeros(1)}, tmp_path / "extra.pth")
    with pytest.raises(WeightsError, match="1 tensors that the model has no place for: 'extra'"):
        by_name.from_pretrained("unet", str(tmp_path / "extra.pth"))


def test_pictures_smaller_than_the_stride_are_refused():
    for name, least in (("unet", 16), ("fcn_resnet18", 8), ("transunet-small", 128)):
        net, cfg = by_name.find(name)
        params = spec.abstract(net.spec(cfg))
        with pytest.raises(ValueError, match=f"expected at least {least} a side"):
            net.apply(params, torch.empty(1, 3, least - 1, 200, device="meta"), cfg)
    with pytest.raises(ValueError, match=r"transunet: the images are 200 x 200; expected 128 x 128"):
        net.apply(params, torch.empty(1, 3, 200, 200, device="meta"), cfg)


def test_wrong_configurations_are_refused():
    for make, error in (
        (lambda: unet.Config(depth=0), "unet: depth is 0; expected at least 1"),
        (lambda: transunet.Config(image=100), "transunet: image is 100; expected a multiple of 16"),
        (lambda: transunet.Config(heads=7), "transunet: 7 heads do not divide width 768"),
        (lambda: transunet.Config(depths=(1, 2)), "expected 3 and 4 numbers from 1 on"),
        (lambda: fcn.Config(output_stride=3), "fcn: output_stride is 3; expected 4, 8, 16 or 32"),
        (lambda: fcn.Config(dropout=1.0), r"fcn: dropout 1.0 is outside \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=error):
            make()
