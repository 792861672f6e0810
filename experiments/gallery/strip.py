"""strip.jpg, the row of pictures at the top of the README, cut from the gallery.

python experiments/gallery/strip.py
"""

from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
HEIGHT, GAP = 280, 16  # pixels
# Left, upper, right and lower edge of the part that is shown.
PARTS = {
    "diffusion_mnist.png": (392, 262, 980, 640),  # digits that lose their noise
    "gans/pix2pix.png": (115, 46, 372, 442),  # grey photographs, their colours by a net, the true ones
    "translate.png": (0, 296, 312, 597),  # attention of a translation, one head
    "gradients.png": (8, 4, 664, 496),  # gradient norms of a thousand examples while a net learns
    "vae.png": (624, 0, 1248, 560),  # codes of digits
}


def main() -> None:
    tiles = []
    for name, box in PARTS.items():
        part = Image.open(FOLDER / name).convert("RGB").crop(box)
        tiles.append(part.resize((round(part.width * HEIGHT / part.height), HEIGHT), Image.Resampling.LANCZOS))
    strip = Image.new("RGB", (sum(tile.width + GAP for tile in tiles) - GAP, HEIGHT), "white")
    left = 0
    for tile in tiles:
        strip.paste(tile, (left, 0))
        left += tile.width + GAP
    strip.save(FOLDER / "strip.jpg", quality=90, subsampling=0)
    print(f"{FOLDER / 'strip.jpg'}: {strip.width} x {strip.height} pixels")


if __name__ == "__main__":
    main()
