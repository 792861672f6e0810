"""`/v1/predict`: a picture over HTTP, and its classes, its boxes, its mask or its enlargement.

A picture stays in memory: neither its bytes nor its name reach the disk.
"""

import asyncio
import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from core import tree
from experiments.parts import classifier, detector, segmenter, upscaled_files, upscaler, web
from experiments.parts.engine import Pictures
from experiments.parts.web import Limits, Refusal
from train.data import DataError
from train.data.images import boxed, full_range
from train.data.images.arrays import Labelled
from train.data.images.picture import Cut, converted, decode, opened
from train.plots import segmentation as pictures
from train.run import SavedRun, open_run

PATH = "/v1/predict"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read; Pillow knows others, some by other programs."""
TOGETHER = 16
"""Pictures that go through a classifier or a detector at once."""
SCORE = 0.5
"""Score above which a box is part of the answer."""

Answer = dict[str, Any]
"""Facts in JSON's types, and under "picture" the bytes of a PNG."""


class Model(NamedTuple):
    """kind: classes, boxes, mask or enlargement. answer: files in memory -> an answer or an exception for each.

    pixels: pixels of a picture, at most, if no flag says it.
    """

    kind: str
    facts: dict[str, Any]
    answer: Callable[[Sequence[bytes]], list[Answer | Exception]]
    pixels: int
    together: int


def _each(files: Sequence[bytes], answer: Callable[[io.BytesIO], Any]) -> list[Any]:
    """The answer to each file, or the exception that it raised."""
    out = []
    for data in files:
        try:
            out.append(answer(io.BytesIO(data)))
        except Exception as error:
            out.append(error)
    return out


def _joined(values: list[Any], answer: Callable[[list[Any]], list[Answer]]) -> list[Answer | Exception]:
    """The answers to the values that are no exceptions, computed at once, in the places of these."""
    good = [value for value in values if not isinstance(value, Exception)]
    answers = iter(answer(good) if good else [])
    return [value if isinstance(value, Exception) else next(answers) for value in values]


def of_classifier(trained: classifier.Trained, values: tree.Tree) -> Model:
    """The five likeliest classes of a picture."""
    cut = Cut(trained.size, trained.channels, resize=trained.resize, interpolation=trained.interpolation)

    def classes(pixels: list[np.ndarray]) -> list[Answer]:
        images = Labelled(torch.from_numpy(np.stack(pixels)), torch.zeros(len(pixels), dtype=torch.int64))
        out = []
        for row in classifier.predictions(values, trained, images)[0].exp():
            best = row.topk(min(5, len(row)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            out.append({"classes": [{"class": trained.classes[i], "probability": p} for i, p in pairs]})
        return out

    def answer(files: Sequence[bytes]) -> list[Answer | Exception]:
        return _joined(_each(files, lambda file: decode(file, cut)), classes)

    facts = {"net": trained.net, "classes": list(trained.classes)}
    return Model("classes", facts, answer, 16_000_000, TOGETHER)


def of_detector(model: detector.Detector) -> Model:
    """Boxes in pixels of the upright picture."""

    def read(file: io.BytesIO) -> tuple[np.ndarray, float]:
        with opened(file) as image:
            return boxed.fitted(image, model.size, 3)

    def boxes(inputs: list[tuple[np.ndarray, float]]) -> list[Answer]:
        images, out = torch.from_numpy(np.stack([pixels for pixels, _ in inputs])), []
        detections = detector.detect(model, images, SCORE)
        for one, (_, scale) in zip(detections, inputs, strict=True):
            rows = zip((one.boxes / scale).tolist(), one.scores.tolist(), one.labels.tolist(), strict=True)
            objects = [{"class": model.classes[k], "score": s, "box": [round(x, 2) for x in b]} for b, s, k in rows]
            out.append({"objects": objects})
        return out

    def answer(files: Sequence[bytes]) -> list[Answer | Exception]:
        return _joined(_each(files, read), boxes)

    return Model("boxes", {"net": model.net, "classes": list(model.classes)}, answer, 16_000_000, TOGETHER)


def of_segmenter(model: segmenter.Segmenter) -> Model:
    """A class for each pixel: their shares, and the picture under their colours."""
    trained = model.trained
    colours = pictures.palette(len(trained.classes), trained.background)

    def mask(file: io.BytesIO) -> Answer:
        with opened(file) as opening:
            image = converted(opening, 3).copy()
        labels = segmenter.predicted(model, image).labels
        planes = np.stack([np.asarray(channel) for channel in image.split()])
        counts = labels.flatten().bincount(minlength=len(trained.classes)).tolist()
        shares = [
            {"class": name, "share": count / labels.numel(), "colour": "#" + bytes(colour).hex()}
            for name, count, colour in zip(trained.classes, counts, colours, strict=True)
            if count
        ]
        over = pictures.overlay(planes, labels, colours, trained.background)
        shares.sort(key=lambda entry: -entry["share"])
        return {"classes": shares, "picture": _png(over)}

    facts = {"net": trained.net, "classes": list(trained.classes)}
    return Model("mask", facts, lambda files: _each(files, mask), 1_000_000, 1)


def of_upscaler(model: upscaler.Upscaler) -> Model:
    """The enlargement of a picture by the net's first scale."""
    scale = model.scales[0]

    def enlargement(file: io.BytesIO) -> Answer:
        small = full_range.read(file)
        if small.suffix != ".png":
            raise DataError("the picture has floating-point values; expected 8 or 16 bits")
        large = upscaled_files.enlarged(model, small, scale, upscaler.TILE)
        height, width = large.pixels.shape[:2]
        return {"scale": scale, "width": width, "height": height, "picture": full_range.encoded(large)}

    facts = {"net": model.name, "scale": scale}
    return Model("enlargement", facts, lambda files: _each(files, enlargement), 1_000_000, 1)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _classifier_of(run: SavedRun, device: torch.device) -> Model:
    trained, values = classifier.load(run.folder, str(run.step))
    return of_classifier(trained, tree.move(values, device))


def _upscaler_of(run: SavedRun, device: torch.device) -> Model:
    model = upscaler.load(run)
    return of_upscaler(model._replace(values=tree.move(model.values, device)))


def _segmenter_of(run: SavedRun, device: torch.device) -> Model:
    sizes = {name: run.config["args"][name] for name in ("tile", "overlap")}
    return of_segmenter(segmenter.load(run, device)._replace(**sizes))


MODELS: dict[str, Callable[[SavedRun, torch.device], Model]] = {
    "classify": _classifier_of,
    "detect": lambda run, device: of_detector(detector.load(run, device)),
    "segment": _segmenter_of,
    "superres": _upscaler_of,
}
"""Experiments whose runs answer pictures."""


def of_run(experiment: str, folder: Path, checkpoint: str, device: torch.device) -> Model:
    """The model of a run. Raises ValueError: no such run or checkpoint, or a damaged one."""
    return MODELS[experiment](open_run(folder, Path("runs") / experiment, checkpoint), device)


class Service:
    """A model of pictures behind an engine."""

    def __init__(self, model: Model, engine: Pictures, limits: Limits):
        self.model, self.engine, self.limits = model, engine, limits
        self.pixels = limits.pixels or model.pixels

    async def predict(self, http: Any) -> Any:
        """The answer to a request: JSON, or with `Accept: image/png` the picture alone."""
        from fastapi.responses import JSONResponse, Response

        data = await _file_of(http)
        await asyncio.to_thread(self._check, data)
        job = web.submitted(self.engine, data)
        try:
            async for events in web.events(self.engine, job, http, self.limits.timeout):
                answer = events[-1].value
        except (Refusal, web.Gone):
            raise
        except Exception as error:
            raise web.refusal_of(error) from error
        png = answer.pop("picture", None)
        if png is None:
            return JSONResponse(answer)
        if "image/png" in http.headers.get("accept", ""):
            return Response(png, media_type="image/png")
        return JSONResponse(answer | {"picture": f"data:image/png;base64,{base64.b64encode(png).decode()}"})

    def _check(self, data: bytes) -> None:
        """Raise Refusal unless the bytes are a picture of a size that is computed; nothing is decoded."""
        try:
            with opened(io.BytesIO(data), FORMATS) as image:
                width, height = image.size
        except DataError as error:
            raise Refusal(400, f"{error}; expected one of {', '.join(FORMATS)}") from None
        if width * height > self.pixels:
            raise Refusal(413, f"the picture has {width} x {height} pixels; expected up to {self.pixels:,} in all")


async def _file_of(http: Any) -> bytes:
    """The bytes of the picture: the body, or the one file of a form. Raises Refusal."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return await http.body()
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    parser = MultiPartParser(http.headers, http.stream(), max_files=1, max_fields=8)
    parser.spool_max_size = 2**62  # in memory; the body has been held to its limit before
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        message = getattr(error, "message", "it has no boundary")
        raise Refusal(400, f"the form cannot be read: {message}") from None
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if len(files) != 1:
            raise Refusal(400, f"the form has {len(files)} files; expected one picture")
        return await files[0].read()
    finally:
        await form.close()


def add_routes(app: Any, service: Service) -> None:
    from fastapi import Request

    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/png", "image/jpeg")}

    @app.post(PATH, openapi_extra={"requestBody": {"required": True, "content": content}})
    async def predict(request: Request) -> Any:
        """The classes, boxes, mask or enlargement of a picture."""
        return await service.predict(request)

    app.state.paths.add(PATH)
