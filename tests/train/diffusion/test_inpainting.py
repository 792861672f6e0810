import pytest
import torch
from PIL import Image

from train.diffusion.inpainting import mask_of


def test_masks(tmp_path):
    half = mask_of("half", 6, 8)
    Image.fromarray(half.numpy()).save(tmp_path / "half.png")
    assert half.sum() == 24 and half[:, :4].all() and half.shape == (6, 8)
    assert torch.equal(mask_of(str(tmp_path / "half.png"), 6, 8), half)
    box = mask_of("box", 6, 8)
    assert (~box).sum() == 16 and not box[1:5, 2:6].any()
    with pytest.raises(ValueError, match="has 6 x 8 pixels; expected those of the images, 8 x 8"):
        mask_of(str(tmp_path / "half.png"), 8, 8)
