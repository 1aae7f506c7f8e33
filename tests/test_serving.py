"""The server and the load test of the examples, on tiny random models; answers are compared with pipelines."""

import asyncio
import base64
import json
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from io import BytesIO
from pathlib import Path

import anyio
import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image, ImageOps
from transformers import (
    AutoImageProcessor,
    SegformerImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from cropr_hf import (
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForInstanceSegmentation,
    CroprViTForObjectDetection,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
)
from cropr_hf.image_processing_cropr_vit import CroprViTImageProcessor
from cropr_hf.publishing.published import resized_size
from tests.common import DETECTOR, TINY


EXAMPLES = Path(__file__).parents[1] / "examples"
SQUARE = {"height": 32, "width": 32}
EDGES = {"shortest_edge": 32, "longest_edge": 32}
MODELS = {
    "classifier": (CroprViTForImageClassification, {}, ViTImageProcessor(size=SQUARE)),
    "segmenter": (CroprViTForSemanticSegmentation, {}, SegformerImageProcessor(size=SQUARE)),
    "detector": (CroprViTForObjectDetection, DETECTOR, CroprViTImageProcessor(size=EDGES, pad_size=SQUARE)),
    "instances": (CroprViTForInstanceSegmentation, DETECTOR, CroprViTImageProcessor(size=EDGES, pad_size=SQUARE)),
    "detector_of_all_shapes": (CroprViTForObjectDetection, DETECTOR, CroprViTImageProcessor(size=EDGES)),
    "cropping": (
        CroprViTForImageClassification,
        {},
        ViTImageProcessor(size={"shortest_edge": 36}, do_center_crop=True, crop_size=SQUARE),
    ),
}
FOREVER = 600_000  # a delay in ms: batches start when they are full


@pytest.fixture(scope="module")
def serve(example):
    return example("serve")


def save_models(tmp_path_factory) -> dict[str, str]:
    """A folder of each kind of model."""
    paths = {}
    for name, (model_class, fields, processor) in MODELS.items():
        torch.manual_seed(0)
        paths[name] = str(tmp_path_factory.mktemp(name))
        model = model_class(CroprViTConfig(**{**TINY, **fields}))
        if name == "instances":  # certain of a class, and masks that fill their boxes, so that segments are found
            torch.nn.init.constant_(model.mask_head.predictor.mask_fcn_logits.bias, 3.0)
            for head in model.box_heads:
                torch.nn.init.constant_(head.class_predictor.bias[0], 5.0)
        model.save_pretrained(paths[name])
        processor.save_pretrained(paths[name])
    return paths


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return save_models(tmp_path_factory)


@pytest.fixture(scope="module")
def build(serve, folders):
    """Builds an application for one of the models, and the list of the sizes of the batches that its model sees."""

    def build(name: str = "classifier", change=lambda forward: forward, **settings):
        predictor = serve.Predictor(serve.Settings(folders[name], device="cpu", **settings))
        sizes, forward = [], change(predictor.forward)

        def watched(inputs):
            sizes.append(len(inputs))
            return forward(inputs)

        predictor.forward = watched
        return serve.build_app(predictor), sizes

    return build


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """An image of random colours in blocks of some pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).convert(mode)


def encode(image: Image.Image, file_format: str = "PNG", **kwargs) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **kwargs)
    return file.getvalue()


def lying() -> bytes:
    """A JPEG on its side that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture(3), "JPEG", exif=exif)


PNG = encode(picture(0))


def pretending(width: int, height: int) -> bytes:
    """A PNG whose header, with its checksum, says so."""
    header = b"IHDR" + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


GOOD = {
    "png": PNG,
    "jpeg": encode(picture(1, (64, 20)), "JPEG"),
    "webp": encode(picture(2, (20, 50)), "WEBP"),
    "exif": lying(),
    "rgba": encode(picture(4, mode="RGBA")),
    "palette": encode(picture(5, mode="P")),
    "grey": encode(picture(6, mode="L")),
    "cmyk": encode(picture(7, mode="CMYK"), "JPEG"),
    "one_bit": encode(picture(8, mode="1")),
    "animated": encode(picture(9), "GIF", save_all=True, append_images=[picture(10), picture(11)]),
    "one_pixel": encode(picture(12, (1, 1))),
}
BAD = {
    "empty": (b"", 400, "empty"),
    "text": (b"What is in the picture?", 415, "not an image"),
    "form": (
        b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + PNG + b"\r\n--x--\r\n",
        415,
        "not an image",
    ),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not an image"),
    "floats": (encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), 415, "integer"),
    "truncated_png": (PNG[:-40], 400, "broken"),
    "truncated_jpeg": (encode(picture(0, (400, 300)), "JPEG")[:2000], 400, "broken"),
    "garbled_png": (PNG[:60] + bytes(30) + PNG[90:], 400, "broken"),
    "bomb": (pretending(20_000, 20_000), 413, "40 megapixels"),
    "many_pixels": (pretending(8_000, 6_000), 413, "40 megapixels"),
    "large_body": (bytes(10_000_001), 413, "10 MB"),
}


def opened(body: bytes) -> Image.Image:
    return Image.open(BytesIO(body))


@asynccontextmanager
async def client(app):
    """A client of an application that runs in this process."""
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            yield client


def post(app, *bodies, **parameters) -> list:
    """Answers to requests that are sent at once; none stays in the house."""

    async def send():
        async with client(app) as user:
            responses = [user.post("/predict", content=body, params=parameters) for body in bodies]
            responses = await asyncio.gather(*responses)
            assert (await user.get("/health")).json()["in_house"] == 0
            return responses

    return asyncio.run(send())


async def until(user, **counts: int) -> None:
    """Waits until the server's counts are as large, for 20 seconds at most."""
    with anyio.fail_after(20):
        while True:
            health = (await user.get("/health")).json()
            if all(health[name] >= count for name, count in counts.items()):
                return
            await asyncio.sleep(0.001)


def check_classes(response, expected: list[dict]) -> None:
    assert response.status_code == 200, response.text
    assert [entry["label"] for entry in response.json()] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in response.json()] == pytest.approx([e["score"] for e in expected], abs=1e-4)


def nearly_equal(mask: np.ndarray, expected: np.ndarray) -> bool:
    """But for pixels between two classes, which rounding decides: it depends on the size of a batch."""
    return mask.shape == expected.shape and (mask != expected).mean() < 0.01


def check_refusal(response, status: int, reason: str) -> None:
    assert response.status_code == status and reason in response.json()["detail"], response.text


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, list[dict]]:
    """What the pipeline says about each good image."""
    classify = pipeline("image-classification", model=folders["classifier"], device="cpu")
    return {name: classify(opened(body), top_k=5) for name, body in GOOD.items()}


class TestAnswers:
    @pytest.mark.parametrize("max_batch_size", [1, len(GOOD)])
    def test_classes_are_those_of_the_pipeline(self, build, expected, max_batch_size):
        app, sizes = build(max_batch_size=max_batch_size, max_delay_ms=FOREVER)
        for name, response in zip(GOOD, post(app, *GOOD.values())):
            check_classes(response, expected[name])
        assert set(sizes) == {max_batch_size}

    def test_top_k(self, build, expected):
        app, _ = build()
        for top_k, count in ((1, 1), (100, 5)):
            check_classes(post(app, PNG, top_k=top_k)[0], expected["png"][:count])
        (response,) = post(app, PNG, top_k=0)
        assert response.status_code == 422 and "greater than or equal to 1" in response.text

    def test_several_labels_per_image_have_independent_probabilities(self, serve, folders):
        predictor = serve.Predictor(serve.Settings(folders["classifier"], device="cpu"))
        classify = pipeline("image-classification", model=folders["classifier"], device="cpu")
        for model in (predictor.model, classify.model):
            model.config.problem_type = "multi_label_classification"
        check_classes(post(serve.build_app(predictor), PNG)[0], classify(opened(PNG), top_k=5))

    def test_sixteen_bits_are_not_clipped(self, build):
        grey = np.random.default_rng(0).integers(0, 256, (30, 40)).astype(np.uint16)
        files = [encode(Image.fromarray(grey.astype(np.uint8))), encode(Image.fromarray(257 * grey))]
        files.append(encode(Image.fromarray(257 * grey.astype(np.int32)), "TIFF"))
        assert opened(files[1]).mode.startswith("I") and opened(files[2]).mode == "I"
        first, *others = post(build()[0], *files)
        for response in others:
            check_classes(response, first.json())

    def test_metadata_that_is_broken_does_not_matter(self, build):
        files = [encode(picture(3)), encode(picture(3), exif=b"Exif\0\0no header of a TIFF file")]
        with pytest.raises(SyntaxError, match="TIFF"):
            ImageOps.exif_transpose(opened(files[1]))
        plain, broken = post(build()[0], *files)
        check_classes(broken, plain.json())

    def test_images_of_one_shape_are_a_batch_among_others(self, build):
        app, sizes = build("detector_of_all_shapes", max_batch_size=5, max_delay_ms=FOREVER)
        wide = encode(picture(1, (64, 32)))
        bodies = [PNG, wide, PNG, wide, PNG]
        together = [response.json() for response in post(app, *bodies, threshold=0.05)]
        alone = [response.json() for response in post(build("detector_of_all_shapes")[0], PNG, wide, threshold=0.05)]
        for answer, expected in zip(together, [alone[0], alone[1], alone[0], alone[1], alone[0]]):
            assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-4) and len(answer["scores"]) >= 1
        assert sorted(sizes) == [2, 3, 5]

    def test_label_maps_are_those_of_the_pipeline(self, build, folders):
        app, sizes = build("segmenter", max_batch_size=len(GOOD), max_delay_ms=FOREVER)
        segment = pipeline("image-segmentation", model=folders["segmenter"], device="cpu")
        for body, response in zip(GOOD.values(), post(app, *GOOD.values())):
            assert response.status_code == 200 and response.headers["content-type"] == "image/png"
            labels, found = np.asarray(opened(response.content)), segment(opened(body))
            assert len(found) == len(np.unique(labels))
            for area in found:
                mask = labels == segment.model.config.label2id[area["label"]]
                assert nearly_equal(mask, np.asarray(area["mask"]) == 255)
        assert sizes == [len(GOOD)]

    @pytest.mark.parametrize("name", ["detector", "instances", "detector_of_all_shapes"])
    def test_objects_are_those_of_the_pipeline(self, build, folders, name):
        app, sizes = build(name, max_batch_size=len(GOOD), max_delay_ms=FOREVER)
        detect = pipeline("object-detection", model=folders[name], device="cpu")
        for body, response in zip(GOOD.values(), post(app, *GOOD.values(), threshold=0.05)):
            assert response.status_code == 200, response.text
            answer, found = response.json(), detect(opened(body).convert("RGB"), threshold=0.05)
            assert len(found) >= 1 and answer["labels"] == [entry["label"] for entry in found]
            assert answer["scores"] == pytest.approx([entry["score"] for entry in found], abs=1e-4)
            corners = [[*entry["box"].values()] for entry in found]
            assert np.abs(np.array(answer["boxes"]) - corners).max() < 1.001  # the pipeline cuts off decimals
            assert ("segment_map" in answer) == (name == "instances")
        assert sizes[0] == len(GOOD)

    def test_masks_are_those_of_the_pipeline(self, build, folders):
        app, _ = build("instances", max_batch_size=4)
        segment = pipeline("image-segmentation", model=folders["instances"], device="cpu")
        settings = {"subtask": "instance", "threshold": 0.05, "overlap_mask_area_threshold": 0.8}
        count = 0
        for body, response in zip(GOOD.values(), post(app, *GOOD.values(), threshold=0.05)):
            answer, found = response.json(), segment(opened(body).convert("RGB"), **settings)
            segments = np.asarray(opened(base64.b64decode(answer["segment_map"])))
            assert [entry["label"] for entry in answer["segments"]] == [entry["label"] for entry in found]
            for entry, area in zip(answer["segments"], found):
                assert nearly_equal(segments == entry["id"], np.asarray(area["mask"]) == 255)
            assert set(np.unique(segments)) <= {0, *(entry["id"] for entry in answer["segments"])}
            count += len(found)
        assert count >= 1
        nothing = post(app, PNG, threshold=1)[0].json()
        assert nothing["scores"] == nothing["segments"] == []
        assert not np.asarray(opened(base64.b64decode(nothing["segment_map"]))).any()

    def test_maps_of_large_images_are_found_at_a_size_that_fits(self, build, serve, monkeypatch):
        app, _ = build("segmenter")
        (exact,) = post(app, encode(picture(0, (400, 300))))
        monkeypatch.setattr(serve, "MAX_MAP_VALUES", 5 * 200 * 150)
        assert serve.affordable((300, 400), 5) == (150, 200)
        (coarse,) = post(app, encode(picture(0, (400, 300))))
        exact, coarse = (np.asarray(opened(response.content)) for response in (exact, coarse))
        assert exact.shape == coarse.shape == (300, 400) and (exact == coarse).mean() > 0.97

    def test_many_labels_need_sixteen_bits(self, serve):
        labels = torch.tensor([[0, 255], [256, 700]])
        image = np.asarray(opened(serve.encode_map(labels, (4, 6))))
        assert np.array_equal(image, labels.repeat_interleave(2, 0).repeat_interleave(3, 1))

    def test_names_of_the_labels(self, build):
        async def get():
            async with client(build()[0]) as user:
                return (await user.get("/labels")).json()

        assert asyncio.run(get()) == [f"LABEL_{label}" for label in range(5)]

    def test_pruning_rate_and_dtype(self, build, expected):
        score = expected["png"][0]["score"]
        (unpruned,), (half,) = post(build(pruning_rate=0)[0], PNG), post(build(dtype="bfloat16")[0], PNG)
        assert abs(unpruned.json()[0]["score"] - score) > 1e-4
        assert 0 < abs(half.json()[0]["score"] - score) < 0.05
        assert sum(entry["score"] for entry in half.json()) == pytest.approx(1, abs=1e-5)  # found in float32


class TestBadRequests:
    def test_each_hears_why_and_spoils_no_other(self, build, expected):
        app, sizes = build(max_batch_size=len(GOOD), max_delay_ms=FOREVER)
        bodies = [body for pair in zip(GOOD.values(), (body for body, _, _ in BAD.values())) for body in pair]
        responses = post(app, *bodies)
        for name, response in zip(GOOD, responses[::2]):
            check_classes(response, expected[name])
        for (_, *refusal), response in zip(BAD.values(), responses[1::2]):
            check_refusal(response, *refusal)
        assert len(GOOD) == len(BAD) and sizes == [len(GOOD)]

    def test_what_the_image_processor_refuses(self, build):
        strip, good = post(build("detector")[0], encode(Image.new("RGB", (1, 5000))), PNG)
        check_refusal(strip, 422, "1 x 5000 pixels does not fit")
        assert good.status_code == 200

    @pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
    def test_strips_are_not_enlarged_without_bounds(self, serve, folders, size):
        """A crop comes after resizing: of a strip of 100 bytes that would be 2.6 megapixels, of a longer one more."""
        predictor = serve.Predictor(serve.Settings(folders["cropping"], device="cpu", max_megapixels=2))
        strip, good, panorama = post(
            serve.build_app(predictor), encode(Image.new("RGB", size)), PNG, encode(picture(1, (800, 20)))
        )
        width, height = (36 * side for side in size)
        check_refusal(strip, 422, f"resized to {width} x {height} it has more than 2 megapixels")
        assert good.status_code == panorama.status_code == 200

    @pytest.mark.parametrize("name", MODELS)
    def test_what_an_image_is_resized_to(self, folders, name):
        """The bound is what the image processor makes, as far as that can be larger than its configuration."""
        processor = AutoImageProcessor.from_pretrained(folders[name])
        for size in ((20, 800), (300, 40), (36, 36)):
            pixels = torch.zeros(3, *size, dtype=torch.uint8)
            made, bound = processor.resize(pixels, processor.size).shape[1:], resized_size(processor, size)
            assert max(made) <= 36 or np.abs(np.subtract(made, bound)).max() <= 1

    def test_what_the_model_refuses(self, build):
        """Of four images in a batch one has too few patches for the schedule."""
        strip = encode(picture(1, (96, 12)))
        app, sizes = build("detector_of_all_shapes", max_batch_size=4, max_delay_ms=FOREVER)
        first, refused, *others = post(app, PNG, strip, PNG, GOOD["webp"])
        check_refusal(refused, 422, "96 x 12 pixels does not fit")
        assert [response.status_code for response in (first, *others)] == [200] * 3
        assert sizes[0] == 4

    def test_endless_scans(self, build):
        """A progressive JPEG may have as many as it likes, each of the price of an image."""
        scans = b"\xff\xda" * 101
        body = encode(picture(0), "JPEG")
        several = encode(picture(0), "MPO", save_all=True, append_images=[picture(1)])  # as some cameras write them
        assert opened(several).format == "MPO" and post(build()[0], several)[0].status_code == 200
        for image in (body, several):
            image = image[:2] + b"\xff\xfe" + struct.pack(">H", len(scans) + 2) + scans + image[2:]
            check_refusal(post(build()[0], image)[0], 400, "more than 100 scans")

    def test_large_bodies_without_an_announced_length(self, build):
        async def chunks():
            for _ in range(30):
                yield bytes(100_000)
                await asyncio.sleep(0)

        check_refusal(post(build(max_megabytes=1)[0], chunks())[0], 413, "1 MB")

    def test_slow_clients(self, build):
        async def chunks():
            yield PNG[:50]
            await asyncio.sleep(600)

        check_refusal(post(build(body_seconds=0.1)[0], chunks())[0], 408, "0.1 seconds")

    def test_slow_clients_do_not_take_the_places_of_others(self, build, expected):
        """Of bodies on their way the oldest makes room; images in work do not count among them."""
        app, _ = build(max_bodies=2, queue_size=1)

        async def chunks():
            yield PNG[:50]
            await asyncio.sleep(600)

        async def scenario():
            async with client(app) as user:
                slow = []
                for count in (1, 2):
                    slow.append(asyncio.create_task(user.post("/predict", content=chunks())))
                    await until(user, receiving=count)
                good = [await user.post("/predict", content=PNG) for _ in range(4)]
                assert (await user.get("/health")).json()["receiving"] == 1
                slow[1].cancel()
                await asyncio.wait(slow)
                assert (await user.get("/health")).json()["receiving"] == 0
                return good, slow[0].result()

        good, given_up = asyncio.run(scenario())
        for response in good:
            check_classes(response, expected["png"])
        check_refusal(given_up, 503, "longer than the others")
        assert given_up.headers["retry-after"] == "1" and given_up.headers["connection"] == "close"

    def test_headers_have_a_size_and_connections_a_number(self, build, serve):
        with running(build()[0], **serve.CONNECTIONS) as url:
            address = httpx.URL(url)
            with socket.create_connection((address.host, address.port), timeout=20) as flood:
                with suppress(ConnectionError):  # the server need not read to the end
                    flood.sendall(b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 100_000)
                    assert b" 400 " in flood.recv(100)
            limit = serve.CONNECTIONS["limit_concurrency"]
            with ExitStack() as stack:
                for _ in range(limit):
                    stack.enter_context(socket.create_connection((address.host, address.port), timeout=20))
                assert httpx.get(f"{url}/health", timeout=20).status_code == 503
            with httpx.Client() as user:
                for _ in range(200):  # until the server has noticed that they are gone
                    if user.get(f"{url}/health").status_code == 200:
                        break
                    time.sleep(0.01)
                assert user.get(f"{url}/health").status_code == 200

    def test_a_threshold_is_a_number(self, build):
        assert post(build("detector")[0], PNG, threshold="nan")[0].status_code == 422

    def test_clients_that_leave_early(self, build):
        app, sizes = build()
        messages = [{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}]
        sent = []
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        async def leave():
            async with client(app) as user:
                await app(scope, receive, send)
                assert (await user.get("/health")).json()["in_house"] == 0

        asyncio.run(leave())
        assert sent[0]["status"] == 400 and sizes == []


class TestBatcher:
    """On numbers instead of images."""

    @staticmethod
    def ask(serve, function, scenario, **settings):
        """What the coroutine `scenario(batcher)` returns."""

        async def run():
            with ThreadPoolExecutor(1) as thread:
                batcher = serve.Batcher(function, thread, **settings)
                runner = asyncio.create_task(batcher.run())
                result = await asyncio.wait_for(scenario(batcher), 60)
                runner.cancel()
                return result

        return asyncio.run(run())

    def test_full_batches_start_at_once_and_others_after_the_delay(self, serve):
        sizes = []

        def function(items):
            sizes.append(len(items))
            return items

        async def scenario(batcher):
            return await asyncio.gather(*(batcher(number) for number in range(19)))

        assert self.ask(serve, function, scenario, max_batch_size=8, max_delay=0.5) == [*range(19)]
        assert sizes == [8, 8, 3]

    def test_what_comes_meanwhile_is_the_next_batch_without_delay(self, serve):
        """The delay counts from when an item came, not from when the function is free."""
        sizes, release = [], threading.Event()

        def function(items):
            sizes.append(len(items))
            release.wait(60)
            return [2 * item for item in items]

        async def scenario(batcher):
            first = asyncio.create_task(batcher(1))
            while not sizes:
                await asyncio.sleep(0.001)
            others = [asyncio.create_task(batcher(number)) for number in range(2, 12)]
            while len(batcher.waiting) < 10:
                await asyncio.sleep(0.001)
            release.set()
            return await asyncio.gather(first, *others)

        results = self.ask(serve, function, scenario, max_batch_size=4, max_delay=0.0)
        assert results == [2 * number for number in range(1, 12)] and sizes == [1, 4, 4, 2]

    def test_many_short_delays_lose_nothing(self, serve):
        async def scenario(batcher):
            async def ask(number):
                await asyncio.sleep(number % 17 * 1e-4)
                return await batcher(number)

            results = await asyncio.gather(*(ask(number) for number in range(1000)))
            assert batcher.items == 1000
            return results

        assert self.ask(serve, lambda items: items, scenario, max_batch_size=3, max_delay=1e-4) == [*range(1000)]

    def test_a_batch_that_fails_is_tried_one_by_one(self, serve):
        def inverse(items):
            return [1 / item for item in items]

        async def scenario(batcher):
            return await asyncio.gather(*(batcher(number) for number in (4, 0, 2)), return_exceptions=True)

        first, second, third = self.ask(serve, inverse, scenario, max_batch_size=3, max_delay=1.0)
        assert (first, third) == (0.25, 0.5) and isinstance(second, ZeroDivisionError)


class TestTrouble:
    def test_a_full_house_refuses(self, build, expected):
        release = threading.Event()
        app, _ = build(change=lambda forward: lambda inputs: release.wait(60) and forward(inputs), queue_size=4)

        async def scenario():
            async with client(app) as user:
                inside = [asyncio.create_task(user.post("/predict", content=PNG)) for _ in range(4)]
                await until(user, in_house=4)
                refused = await asyncio.gather(*(user.post("/predict", content=PNG) for _ in range(5)))
                release.set()
                return refused, [*await asyncio.gather(*inside), await user.post("/predict", content=PNG)]

        refused, served = asyncio.run(scenario())
        for response in refused:
            check_refusal(response, 503, "busy")
            assert response.headers["retry-after"] == "1"
        for response in served:
            check_classes(response, expected["png"])

    def test_a_failure_of_the_model_is_that_of_its_batch(self, build, expected):
        calls = []

        def change(forward):
            def failing(inputs):
                calls.append(len(inputs))
                if 2 <= len(calls) <= 6:  # the second batch, and each of its images
                    raise torch.OutOfMemoryError("no memory")
                return forward(inputs)

            return failing

        app, _ = build(change=change, max_batch_size=4, max_delay_ms=FOREVER)
        responses = post(app, *[PNG] * 12)
        assert calls == [4, 4, 1, 1, 1, 1, 4]
        assert sorted(response.status_code for response in responses) == [200] * 8 + [500] * 4
        for response in responses:
            if response.status_code == 200:
                check_classes(response, expected["png"])
            else:
                check_refusal(response, 500, "The model failed")

    @pytest.mark.parametrize(
        "name, value",
        [("classifier", torch.nan), ("classifier", torch.inf), ("segmenter", torch.nan), ("detector", torch.nan)],
    )
    def test_no_numbers_are_no_answer(self, serve, folders, name, value):
        predictor = serve.Predictor(
            serve.Settings(folders[name], device="cpu", max_batch_size=3, max_delay_ms=FOREVER)
        )
        forward = predictor.model.forward

        def overflowing(pixel_values, **kwargs):
            """Of a white image nothing comes out."""
            outputs = forward(pixel_values, **kwargs)
            outputs.logits[pixel_values.std(dim=(2, 3)).amax(dim=1) < 1e-6] = value
            return outputs

        predictor.model.forward = overflowing
        white = encode(Image.new("RGB", (40, 40), "white"))
        first, refused, last = post(serve.build_app(predictor), PNG, white, PNG)
        check_refusal(refused, 500, "The model failed on this image")
        assert first.status_code == last.status_code == 200

    def test_answers_that_fail_are_the_servers_fault(self, serve, folders):
        predictor = serve.Predictor(serve.Settings(folders["classifier"], device="cpu"))
        predictor.task = "SemanticSegmentation"  # which this image processor knows nothing of
        check_refusal(post(serve.build_app(predictor), PNG)[0], 500, "no answer for this image")

    def test_health_fails_when_the_model_fails_again_and_again(self, build, serve):
        works = iter([False] * serve.MAX_FAILURES + [True])

        def change(forward):
            def failing(inputs):
                if not next(works):
                    raise RuntimeError("CUDA error")
                return forward(inputs)

            return failing

        async def scenario():
            states = []
            async with client(build(change=change)[0]) as user:
                for _ in range(serve.MAX_FAILURES + 1):
                    await user.post("/predict", content=PNG)
                    states.append((await user.get("/health")).status_code)
            return states

        assert asyncio.run(scenario()) == [200] * (serve.MAX_FAILURES - 1) + [503, 200]

    def test_health_fails_when_the_model_returns_no_numbers(self, serve, folders):
        predictor = serve.Predictor(serve.Settings(folders["classifier"], device="cpu"))
        torch.nn.init.constant_(predictor.model.classifier.weight, torch.nan)

        async def scenario():
            async with client(serve.build_app(predictor)) as user:
                for _ in range(serve.MAX_FAILURES):
                    check_refusal(await user.post("/predict", content=PNG), 500, "The model failed on this image")
                return await user.get("/health")

        check_refusal(asyncio.run(scenario()), 503, "Restart")

    def test_cancelled_requests_leave_no_trace(self, build, expected):
        release = threading.Event()
        app, _ = build(change=lambda forward: lambda inputs: release.wait(60) and forward(inputs))

        async def scenario():
            async with client(app) as user:
                tasks = [asyncio.create_task(user.post("/predict", content=PNG)) for _ in range(12)]
                await until(user, batches=1)
                for task in tasks[::2]:
                    task.cancel()
                await asyncio.wait(tasks[::2])
                release.set()
                served = await asyncio.gather(*tasks[1::2])
                assert (await user.get("/health")).json()["in_house"] == 0
                return served

        for response in asyncio.run(scenario()):
            check_classes(response, expected["png"])

    def test_images_whose_clients_left_are_not_computed(self, build, expected):
        """Eleven clients close their connections while the model is busy with the image of another one."""
        release = threading.Event()
        app, sizes = build(change=lambda forward: lambda inputs: release.wait(30) and forward(inputs))

        async def scenario(url):
            async with httpx.AsyncClient(base_url=url, timeout=30) as user:
                first = asyncio.create_task(user.post("/predict", content=PNG))
                await until(user, batches=1)
                leaving = [asyncio.create_task(user.post("/predict", content=PNG)) for _ in range(11)]
                await until(user, in_house=12)
                for task in leaving:
                    task.cancel()
                try:
                    with anyio.fail_after(20):
                        while (await user.get("/health")).json()["in_house"] > 1:
                            await asyncio.sleep(0.001)
                finally:
                    release.set()
                return [await first, await user.post("/predict", content=PNG)]

        with running(app) as url:
            for response in asyncio.run(scenario(url)):
                check_classes(response, expected["png"])
        assert sizes == [1, 1]

    def test_requests_that_a_server_cannot_answer_before_it_ends(self, build):
        release = threading.Event()
        app, _ = build(change=lambda forward: lambda inputs: release.wait(30) and forward(inputs))

        async def full(url):
            async with httpx.AsyncClient(base_url=url) as user:
                await until(user, in_house=3, batches=1)

        with ThreadPoolExecutor() as pool:
            with running(app, timeout_graceful_shutdown=1) as url:
                answers = [pool.submit(httpx.post, f"{url}/predict", content=PNG, timeout=30) for _ in range(3)]
                asyncio.run(full(url))
                told = pool.submit(wait, answers, 20)
                told.add_done_callback(lambda _: release.set())  # that batch is still running when they are told
            for answer in answers:
                check_refusal(answer.result(), 503, "is shutting down")
            assert not told.result().not_done

    def test_health_fails_when_no_batches_are_served(self, build):
        app, _ = build()

        async def scenario():
            async with client(app) as user:
                app.state.runner.cancel()
                await asyncio.wait([app.state.runner])
                return await user.get("/health")

        check_refusal(asyncio.run(scenario()), 503, "Restart")

    def test_other_models_are_refused(self, serve, tmp_path):
        CroprViTModel(CroprViTConfig(**TINY)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds CroprViTModel; this serves ImageClassification"):
            serve.Predictor(serve.Settings(str(tmp_path)))

    def test_code_beside_a_model_is_neither_run_nor_asked_about(self, serve, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr("builtins.input", asked.append)
        config = {"model_type": "foreign", "auto_map": {"AutoConfig": "configuration_foreign.ForeignConfig"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "configuration_foreign.py").write_text("raise SystemExit('It runs.')")
        with pytest.raises(ValueError, match="trust_remote_code"):
            serve.Predictor(serve.Settings(str(tmp_path)))
        assert asked == []

    def test_a_model_that_cannot_prune_has_no_rate(self, serve, tmp_path):
        ViTForImageClassification(
            ViTConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, num_labels=3
            )
        ).save_pretrained(tmp_path)
        ViTImageProcessor(size=SQUARE).save_pretrained(tmp_path)
        app = serve.build_app(serve.Predictor(serve.Settings(str(tmp_path))))
        assert len(post(app, PNG)[0].json()) == 3
        with pytest.raises(ValueError, match="holds ViTForImageClassification, without pruning"):
            serve.Predictor(serve.Settings(str(tmp_path), pruning_rate=0))

    @pytest.mark.parametrize("name", ["max_batch_size", "queue_size", "max_bodies", "threads", "image_threads"])
    def test_numbers_must_be_positive(self, serve, name):
        with pytest.raises(ValueError, match=f"--{name} is 0; give 1 or more"):
            serve.Settings("folder", **{name: 0})

    @pytest.mark.parametrize("value", [0, -1.0, float("nan")])
    @pytest.mark.parametrize("name", ["max_megabytes", "max_megapixels", "body_seconds"])
    def test_limits_must_let_something_in(self, serve, name, value):
        with pytest.raises(ValueError, match=f"--{name} is {value}, which refuses every image; give more than 0"):
            serve.Settings("folder", **{name: value})

    @pytest.mark.parametrize("value", [-1.0, float("nan")])
    def test_a_delay_is_not_negative(self, serve, value):
        with pytest.raises(ValueError, match=f"--max_delay_ms is {value}; give 0"):
            serve.Settings("folder", max_delay_ms=value)


def test_threads(serve):
    """Image threads compute with one thread each, whatever the model's thread has, in whatever order they start."""
    with (
        ThreadPoolExecutor(1, initializer=serve.use_threads, initargs=(3,)) as model,
        ThreadPoolExecutor(1, initializer=serve.use_threads, initargs=(1,)) as images,
    ):
        before = torch.get_num_threads()
        numbers = [pool.submit(torch.get_num_threads).result() for pool in (model, images, model, images)]
        assert numbers == [3, 1, 3, 1] and torch.get_num_threads() == before
    torch.set_num_threads(before)  # what threads of later tests take


@pytest.mark.full
def test_a_server_in_a_process_of_its_own(example, folders, expected):
    """Good and bad images at once, and a signal while requests are waiting."""
    load_test = example("load_test")
    settings = ["--model", folders["classifier"], "--device", "cpu"]
    settings += ["--max_batch_size", "11", "--max_delay_ms", "3000"]
    with ThreadPoolExecutor(24) as pool:

        def send(body: bytes):
            return pool.submit(httpx.post, f"{url}/predict", content=body, timeout=60)

        with load_test.running_server(*settings) as url:
            good, bad = [send(body) for body in GOOD.values()], [send(body) for body, _, _ in BAD.values()]
            for name, answer in zip(GOOD, good):
                check_classes(answer.result(), expected[name])
            for (_, *refusal), answer in zip(BAD.values(), bad):
                check_refusal(answer.result(), *refusal)
            waiting = [send(PNG) for _ in range(5)]  # too few for a batch
            while httpx.get(f"{url}/health").json()["in_house"] < 5 and not any(answer.done() for answer in waiting):
                time.sleep(0.01)
        for answer in waiting:
            check_classes(answer.result(), expected["png"])


@contextmanager
def running(app, **settings):
    """The address of an application that a thread serves."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class TestLoadTest:
    SHORT = ("--clients", "4", "--seconds", "0.3")

    def test_one_server(self, example, build, tmp_path, capsys):
        output = tmp_path / "load.json"
        with running(build(max_batch_size=4)[0]) as url:
            arguments = ["--url", url, *self.SHORT, "--rounds", "2", "--output", str(output)]
            assert example("load_test").main(arguments) == json.loads(output.read_text())
        record = json.loads(output.read_text())
        (result,) = record["results"].values()
        assert result["requests"] > 4 and result["errors"] == {} and 1 <= result["mean_batch_size"] <= 4
        assert 0 < result["latency_ms"]["p50"]
        assert result["requests_per_second"] > 0 and len(result["rounds"]) == 2 and "speedup" not in record
        assert f"| {url} | 4 | " in capsys.readouterr().out

    def test_turns_ratios_and_percentiles(self, example, monkeypatch):
        """100 requests in two rounds, whose latencies are known; the server of the pruned model is twice as fast."""
        load_test, order = example("load_test"), []

        async def load_round(url, images, clients, seconds):
            order.append(url)
            speed = 2 if url == "pruned" else 1
            return {
                "requests_per_second": 10.0 * speed,
                "latencies_ms": [number / speed for number in range(50)],
                "mean_batch_size": 4.0,
                "errors": {"503": 1},
            }

        monkeypatch.setattr(load_test, "load_round", load_round)
        record = load_test.compare(load_test.Arguments(rounds=2), {"unpruned": "unpruned", "Cropr": "pruned"})
        assert order == ["unpruned", "pruned", "unpruned", "pruned", "pruned", "unpruned"]  # the first two warm up
        assert record["speedup"] == {"median": 2.0, "min": 2.0, "max": 2.0}
        result = record["results"]["Cropr"]
        assert result["latency_ms"] == pytest.approx({"p50": 12.25, "p95": 23.5, "p99": 24.5}, abs=0.3)
        assert result["requests"] == 100 and result["errors"] == {"503": 2}
        assert load_test.summarise(record["results"]["Cropr"]["rounds"][:1])["latency_ms"]["p99"] is None

    @pytest.mark.full
    def test_two_servers(self, example, build, monkeypatch, capsys):
        load_test, started = example("load_test"), []
        with running(build()[0]) as url:

            @contextmanager
            def running_server(*arguments):
                started.append(arguments)
                yield url

            monkeypatch.setattr(load_test, "running_server", running_server)
            record = load_test.main(["--compare", "folder", "--server_arguments=--threads 2", *self.SHORT])
        ratio = record["speedup"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        common = ("--model", "folder", "--queue_size", "64", "--threads", "2")
        assert started == [(*common, "--pruning_rate", "0"), common]
        lines = capsys.readouterr().out.splitlines()
        assert lines[2].startswith("| unpruned | 4 |") and lines[3].startswith("| Cropr | 4 |")
        assert lines[-1].startswith(f"Speed-up {ratio['median']:.2f} ")

    def test_refusals_are_counted_apart(self, example, build, tmp_path):
        for name, body in (("a.png", PNG), ("b.txt", b"no image")):
            (tmp_path / name).write_bytes(body)
        with running(build()[0]) as url:
            arguments = ["--url", url, "--image_dir", str(tmp_path), *self.SHORT, "--rounds", "1"]
            (result,) = example("load_test").main(arguments)["results"].values()
        assert result["requests"] > 0 and result["errors"].keys() == {"415"}

    def test_wrong_arguments(self, example, tmp_path):
        load_test = example("load_test")
        for wrong in ("--clients", "--rounds"):
            with pytest.raises(ValueError, match=f"{wrong} is 0; give 1 or more"):
                load_test.main(["--url", "http://localhost", wrong, "0"])
        for arguments in ([], ["--url", "http://localhost", "--compare", "folder"]):
            with pytest.raises(ValueError, match="--url of a server that runs, or --compare"):
                load_test.main(arguments)
        with pytest.raises(ValueError, match="has no files"):
            load_test.main(["--url", "http://127.0.0.1:1", "--image_dir", str(tmp_path)])
        for nobody in ("http://127.0.0.1:1", "127.0.0.1:1"):
            with pytest.raises(RuntimeError, match=f"No server answers at {nobody}"):
                load_test.main(["--url", nobody])
