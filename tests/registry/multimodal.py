"""Nets that relate pictures and words."""

from nets.multimodal import captioner, clip
from tests.registry.face import both, images, net, published, tokens

TEXT = {"vocabulary": 11, "context": 6, "text_layers": 2, "text_heads": 2, "text_width": 8}
VIT = clip.Config(6, 8, patch=4, image_layers=2, image_heads=2, image_width=8, **TEXT)
PAIRS = both(images(3, 8), tokens(11, 6))
net("clip", clip, VIT, PAIRS)
RESNET = clip.Config(6, 32, depths=(1, 1, 1, 1), image_width=4, image_heads=2, end_id=10, zero_init=False, **TEXT)
net("clip, resnet", clip, RESNET, both(images(3, 32), tokens(11, 6)))
SIZES = {"image_layers": 1, "image_heads": 2, "image_width": 12, "image_hidden": 16, "vocabulary": 11, "context": 7}
SIZES |= {"text_layers": 1, "text_heads": 2, "text_width": 8, "text_hidden": 16}
CAPTIONER = captioner.Config(8, patch=4, dropout=0.1, **SIZES)
CAPTIONS = both(images(3, 8), tokens(11, 6))
net("captioner", captioner, CAPTIONER, CAPTIONS, draws=True)
STEM = captioner.Config(8, patch=4, stem=(8,), **(SIZES | {"text_width": 12}))
net("captioner, stem", captioner, STEM, CAPTIONS)
published(
    captioner,
    # Of nlpconnect/vit-gpt2-image-captioning without the ViT's pooler, by transformers
    # (tests/nets/multimodal/test_captioner.py).
    {"vit-gpt2": 238_605_312},
)
published(
    clip,
    {
        # As in the published weights (open_clip's model cards; tests/nets/multimodal/test_clip.py).
        "rn50": 102_007_137,
        "rn101": 119_688_033,
        "rn50x4": 178_300_601,
        "vit-b-16": 149_620_737,
        "vit-b-32": 151_277_313,
        "vit-l-14": 427_616_513,
    },
)
