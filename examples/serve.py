# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Serve a classifier, segmenter or detector over HTTP, in batches that form by themselves.

    python examples/serve.py --model outputs/demo/cropr --port 8000 --max_batch_size 8 --max_delay_ms 5
    curl --data-binary @docs/digit.png localhost:8000/predict

The way of a request: `read_body` and `decode_image` refuse what is not a good image, `Predictor.read` makes the
input of the model in one of several threads, `Batcher` gathers inputs and runs `Predictor.forward` in a thread of its
own, and `Predictor.answer` turns the outputs for one image into the response, again in one of several threads.
"""

import asyncio
import base64
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import anyio
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.requests import ClientDisconnect
from transformers import BatchFeature, HfArgumentParser
from transformers.hf_argparser import HfArg

from cropr_hf.images import ImageTooLarge, NotAnImage, open_upload
from cropr_hf.publishing.published import PublishedModel, misfit


logger = logging.getLogger("uvicorn.error")

STATUS = {NotAnImage: 415, ImageTooLarge: 413}  # of an image that is refused; 400 for other reasons
MAX_FAILURES = 3  # batches in a row, after which the server reports unhealthy
MAX_MAP_VALUES = 2**27  # 0.5 GB of maps per image while labels of pixels are found
# What the connections may do before a request is known. The parser is named, since not every one bounds headers; the
# number of connections stays below that of the files a process may open (256 on macOS).
CONNECTIONS = {"http": "h11", "h11_max_incomplete_event_size": 2**14, "limit_concurrency": 200, "ws": "none"}


@dataclass
class Settings:
    """What to serve, and how."""

    model: str = field(metadata={"help": "Folder or Hub id of a model with its image processor."})
    host: str = HfArg(default="127.0.0.1", help="Address to listen at; 0.0.0.0 is all of the machine's.")
    port: int = HfArg(default=8000, help="Port to listen at.")
    max_batch_size: int = HfArg(default=8, help="Images that the model sees at once, at most.")
    max_delay_ms: float = HfArg(default=5.0, help="How long the first image of a batch waits for others.")
    queue_size: int = HfArg(default=64, help="Images waiting or computed, at most; others get 503.")
    threads: int = HfArg(default=torch.get_num_threads(), help="CPU threads of the model.")
    image_threads: int = HfArg(default=min(4, os.cpu_count() or 1), help="Images prepared or answered at a time.")
    pruning_rate: int | None = HfArg(
        default=None, help="Patches pruned per module, if not as published; 0 prunes none."
    )
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="Where the model runs.")
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(default="float32", help="Type of the weights.")
    compile: bool = HfArg(default=False, help="Compile the encoder; the start takes a minute or more.")
    max_bodies: int = HfArg(default=64, help="Bodies being received, at most; the slowest makes room for a new one.")
    max_megabytes: float = HfArg(default=10.0, help="Size of a body, at most.")
    max_megapixels: float = HfArg(default=40.0, help="Size of an image, at most, as it comes and as it is resized.")
    body_seconds: float = HfArg(default=10.0, help="Time that a client has to send its image.")

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "queue_size", "max_bodies", "threads", "image_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; give 1 or more.")
        for name in ("max_megabytes", "max_megapixels", "body_seconds"):
            if not getattr(self, name) > 0:  # nor NaN
                raise ValueError(f"--{name} is {getattr(self, name)}, which refuses every image; give more than 0.")
        if not self.max_delay_ms >= 0:
            raise ValueError(f"--max_delay_ms is {self.max_delay_ms}; give 0, which never waits, or more.")


async def read_body(request: Request, settings: Settings, receiving: dict[anyio.CancelScope, None]) -> bytearray:
    """The body of a request, or an `HTTPException` that says what is wrong with it.

    `receiving` holds those that are on their way, the oldest first. Where they are too many, that one is given up:
    slow clients lose their own requests, not those of others.
    """
    body, announced = bytearray(), int(request.headers.get("content-length", 0))
    if len(receiving) >= settings.max_bodies:
        slowest = next(iter(receiving))
        del receiving[slowest]
        slowest.cancel()
    with anyio.move_on_after(settings.body_seconds) as scope:
        receiving[scope] = None
        try:
            async for chunk in request.stream():
                body += chunk
                if max(len(body), announced) > settings.max_megabytes * 1e6:
                    raise HTTPException(413, f"The body is larger than {settings.max_megabytes:g} MB.")
            return body
        except ClientDisconnect:
            raise HTTPException(400, "The body ended early.") from None
        finally:
            receiving.pop(scope, None)
    if anyio.current_time() >= scope.deadline:
        reason = f"The body took longer than {settings.body_seconds:g} seconds."
        raise HTTPException(408, reason, {"Connection": "close"})
    reason = "The server is busy, and this body took longer than the others; try again later."
    raise HTTPException(503, reason, {"Connection": "close", "Retry-After": "1"})


def decode_image(body: bytes | bytearray, max_megapixels: float) -> Image.Image:
    """The first frame, upright and in RGB, or an `HTTPException` that says why there is none."""
    try:
        return open_upload(body, max_megapixels)
    except ValueError as error:
        raise HTTPException(STATUS.get(type(error), 400), str(error)) from None


class Predictor(PublishedModel):
    """A model with what comes before and after it. All methods run outside the event loop, and keep no state."""

    def __init__(self, settings: Settings):
        self.settings, self.dtype = settings, getattr(torch, settings.dtype)
        super().__init__(settings.model, self.dtype)
        self.model.to(settings.device)
        if settings.pruning_rate is not None:
            if self.prunable is None:
                name = type(self.model).__name__
                raise ValueError(f"--pruning_rate is given, but {settings.model} holds {name}, without pruning.")
            self.prunable.set_pruning(settings.pruning_rate)
        if settings.compile:
            self.model.base_model.compile(dynamic=True)
        use_threads(settings.threads)
        blank = self.processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")
        for batch_size in (1, 2, settings.max_batch_size):  # compiles; and what cannot work fails here
            self.forward([blank] * batch_size)

    def read(self, body: bytes | bytearray) -> tuple[BatchFeature, tuple[int, int]]:
        """A file -> the model's input, whose tensors start with a dimension of 1, and (height, width) of the image."""
        image = decode_image(body, self.settings.max_megapixels)
        try:
            return self.prepare(image, self.settings.max_megapixels), (image.height, image.width)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    @torch.inference_mode()
    def forward(self, inputs: Sequence[BatchFeature]) -> list[SimpleNamespace]:
        """The model's inputs for some images -> its outputs for each, in float32 on the CPU."""
        shapes = [item["pixel_values"].shape for item in inputs]
        if len(set(shapes)) > 1:  # an image processor without a fixed size
            results = dict.fromkeys(range(len(inputs)))
            for shape in set(shapes):
                places = [place for place, own in enumerate(shapes) if own == shape]
                results.update(zip(places, self.forward([inputs[place] for place in places])))
            return list(results.values())
        batch = BatchFeature({name: torch.cat([item[name] for item in inputs]) for name in inputs[0]})
        outputs = self.model(**batch.to(self.settings.device, self.dtype))
        names = [name for name in ("logits", "pred_boxes", "pred_masks") if name in outputs]
        tensors = [outputs[name].float().cpu() for name in names]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise FloatingPointError(
                "The model returns what is not a finite number; half precision may be too little for it."
            )
        columns = [tensor.split(1) for tensor in tensors]
        return [SimpleNamespace(**dict(zip(names, row))) for row in zip(*columns)]

    def answer(self, outputs: SimpleNamespace, size: tuple[int, int], top_k: int, threshold: float) -> Response:
        """Outputs for one image of (height, width) `size` -> the response."""
        if self.task == "ImageClassification":
            likeliest = self.likeliest(outputs.logits[0], top_k)
            return JSONResponse([{"label": label, "score": score} for label, score in likeliest])
        if self.task == "SemanticSegmentation":
            target = affordable(size, len(self.labels))
            (label_map,) = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[target])
            return Response(encode_map(label_map, size), media_type="image/png")
        (found,) = self.processor.post_process_object_detection(outputs, threshold, target_sizes=[size])
        objects = {
            "scores": found["scores"].tolist(),
            "labels": [self.labels[label] for label in found["labels"]],
            "boxes": found["boxes"].tolist(),
        }
        if self.task == "InstanceSegmentation":
            target = affordable(size, outputs.logits.shape[1])
            (found,) = self.processor.post_process_instance_segmentation(outputs, threshold, target_sizes=[target])
            found["segmentation"].clamp_(min=0)  # -1 where there is no object at all
            objects["segment_map"] = base64.b64encode(encode_map(found["segmentation"], size)).decode()
            objects["segments"] = found["segments_info"]
            for segment in objects["segments"]:
                segment["label"] = self.labels[segment.pop("label_id")]
        return JSONResponse(objects)


def use_threads(count: int) -> None:
    """Makes what torch computes in the thread that calls this use `count` threads."""
    torch.get_num_threads()  # the first use in a thread sets the number that was given last in any; so it comes before
    torch.set_num_threads(count)


def affordable(size: tuple[int, int], channels: int) -> tuple[int, int]:
    """The (height, width) `size`, made smaller if so many maps of it have more than `MAX_MAP_VALUES` values."""
    scale = min(1.0, (MAX_MAP_VALUES / (channels * size[0] * size[1])) ** 0.5)
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def encode_map(labels: torch.Tensor, size: tuple[int, int]) -> bytes:
    """A PNG of (height, width) `size` whose grey levels are the labels; of 16 bits for more than 256 labels."""
    image = Image.fromarray(labels.numpy().astype(np.uint8 if labels.max() < 256 else np.uint16))
    file = BytesIO()
    image.resize(size[::-1], Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


async def unless_left(request: Request, work: Coroutine) -> Any:
    """What `work` returns; a client that leaves cancels it. The body must have been read."""

    async def until_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(until_left())
    leaving.add_done_callback(lambda _: task.cancel())
    try:
        return await task
    finally:
        leaving.cancel()


class Batcher:
    """Gathers single items to batches, and runs a function on these in the one thread of an executor.

    A batch starts when it is full or when `max_delay` seconds have passed since its first item came; what comes while
    the function runs waits for the next one. All but `attempt` is in the event loop, so that there are no locks.
    """

    def __init__(self, function: Callable[[list], Sequence], thread: Executor, max_batch_size: int, max_delay: float):
        self.function, self.thread, self.max_batch_size, self.max_delay = function, thread, max_batch_size, max_delay
        self.waiting: dict[asyncio.Future, tuple[Any, float]] = {}  # items, and when they came; the first came first
        self.came = asyncio.Event()
        self.items = self.batches = self.failures = 0  # failures: batches in a row of which nothing came out

    async def __call__(self, item: Any) -> Any:
        """What the function returns for the item; raises what the function raises on the item alone."""
        future = asyncio.get_running_loop().create_future()
        self.waiting[future] = (item, anyio.current_time())
        self.came.set()
        try:
            return await future
        finally:
            self.waiting.pop(future, None)  # cancelled before its batch began

    async def gather(self) -> dict[asyncio.Future, Any]:
        """Waits for the next batch."""
        while len(self.waiting) < self.max_batch_size:
            first_came = next((came for _, came in self.waiting.values()), float("inf"))
            remaining = first_came + self.max_delay - anyio.current_time()
            if remaining <= 0:
                break
            self.came.clear()
            with anyio.move_on_after(remaining):
                await self.came.wait()
        batch = list(islice(self.waiting, self.max_batch_size))
        return {future: self.waiting.pop(future)[0] for future in batch}

    def attempt(self, items: list) -> list:
        """Results of the function; where it fails on several items, those for each alone, with errors among them."""
        try:
            return list(self.function(items))
        except Exception as error:
            trace = not isinstance(error, ValueError)  # which is the model's word for a wrong input
            logger.error("The model failed on %d image(s): %s", len(items), error, exc_info=trace)
            errors = [error.with_traceback(None)]  # which would keep the tensors of the failed batch
        return errors if len(items) == 1 else [self.attempt([item])[0] for item in items]

    async def run(self) -> None:
        """Serves until it is cancelled."""
        while True:
            batch = await self.gather()
            self.items, self.batches = self.items + len(batch), self.batches + 1
            items = list(batch.values())
            results = await asyncio.get_running_loop().run_in_executor(self.thread, self.attempt, items)
            failed = all(isinstance(result, Exception) and not isinstance(result, ValueError) for result in results)
            self.failures = self.failures + 1 if failed else 0
            for future, result in zip(batch, results):
                if future.done():  # cancelled: the client left while the model ran, or the server ends
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)


def build_app(predictor: Predictor) -> FastAPI:
    """The application: `POST /predict`, `GET /health` and `GET /labels`."""
    settings = predictor.settings
    receiving: dict[anyio.CancelScope, None] = {}
    in_house = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        with (
            ThreadPoolExecutor(1, "model", use_threads, (settings.threads,)) as model_thread,
            ThreadPoolExecutor(settings.image_threads, "images", use_threads, (1,)) as app.state.image_threads,
        ):
            max_delay = settings.max_delay_ms / 1000
            app.state.batcher = Batcher(predictor.forward, model_thread, settings.max_batch_size, max_delay)
            app.state.runner = asyncio.create_task(app.state.batcher.run())
            yield  # uvicorn goes on when the last request is answered, or cancelled
            app.state.runner.cancel()
            while receiving or in_house:  # those that were cancelled hear it before the end of a batch is waited for
                await asyncio.sleep(0.01)

    app = FastAPI(title=f"{predictor.task} by {settings.model}", lifespan=lifespan)

    async def in_thread(function: Callable, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(app.state.image_threads, function, *args)

    def refuse_if_full() -> None:
        if in_house >= settings.queue_size:
            raise HTTPException(503, "The server is busy; try again later.", {"Retry-After": "1"})

    @app.post("/predict")
    async def predict(
        request: Request,
        top_k: Annotated[int, Query(ge=1)] = 5,
        threshold: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False)] = 0.5,
    ) -> Response:
        """Answers for the image that is the body: `top_k` classes, a label map, or objects from a score on."""
        nonlocal in_house
        try:
            refuse_if_full()  # before the body is sent
            body = await read_body(request, settings, receiving)
            refuse_if_full()  # by others that were faster
            in_house += 1
            try:
                return await respond(request, body, top_k, threshold)
            finally:
                in_house -= 1
        except asyncio.CancelledError:  # the client left, and hears nothing, or the time after a signal is over
            raise HTTPException(503, "The server is shutting down.", {"Retry-After": "1"}) from None

    async def respond(request: Request, body: bytearray, top_k: int, threshold: float) -> Response:
        inputs, size = await in_thread(predictor.read, body)
        try:
            outputs = await unless_left(request, app.state.batcher(inputs))
        except ValueError as error:  # too few patches for the schedule, for example
            raise HTTPException(422, str(misfit(size, error))) from None
        except Exception:
            raise HTTPException(500, "The model failed on this image; the server's log has the reason.") from None
        try:
            return await in_thread(predictor.answer, outputs, size, top_k, threshold)
        except Exception:
            logger.exception("There is no answer for an image.")
            raise HTTPException(500, "There is no answer for this image; the server's log has the reason.") from None

    @app.get("/health")
    async def health() -> dict[str, int]:
        """200 if batches are being served, with counts of what the model has seen and of what is in work."""
        if app.state.runner.done() or app.state.batcher.failures >= MAX_FAILURES:
            raise HTTPException(503, "The last batches failed; the server's log has the reason. Restart it.")
        batcher = app.state.batcher
        return {
            "images": batcher.items,
            "batches": batcher.batches,
            "receiving": len(receiving),
            "in_house": in_house,
        }

    @app.get("/labels")
    async def labels() -> list[str]:
        """Names of the classes, by their numbers in label maps."""
        return predictor.labels

    return app


def main() -> None:
    """Loads the model and serves it until a signal ends the process.

    It answers what has come by then, for 30 seconds at most.
    """
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    app = build_app(Predictor(settings))
    address = {"host": settings.host, "port": settings.port}
    uvicorn.run(app, **address, **CONNECTIONS, access_log=False, timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
