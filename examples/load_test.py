# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Put a server of `serve.py` under load: clients that send an image as soon as they have the answer to the last one.

    python examples/load_test.py --url http://127.0.0.1:8000 --clients 16 --seconds 20

With `--compare` it starts two servers of one model, as it was published and with nothing pruned, loads them in turns,
and reports the ratio of their throughputs:

    python examples/load_test.py --compare outputs/demo/cropr --clients 16 --seconds 10 --rounds 5

It prints a Markdown table; `--output` writes the same as JSON. Clients and server share the machine if they run on
one: the clients send bytes that are encoded before the test, and do not decode answers.
"""

import asyncio
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from cropr_hf.files import write_json
from cropr_hf.speed.instruments import library_versions, machine_name
from cropr_hf.speed.tables import markdown_table
from cropr_hf.speed.timing import Timing


SERVER = Path(__file__).with_name("serve.py")
START_SECONDS = 600  # compilers take their time


@dataclass
class Arguments:
    """Whom to load, and how."""

    url: str | None = HfArg(default=None, help="A server that runs.")
    compare: str | None = HfArg(default=None, help="Instead of a server: a model to compare with itself, unpruned.")
    server_arguments: str = HfArg(default="", help="Further arguments of both servers, in one string.")
    clients: int = HfArg(default=16, help="Requests at a time.")
    seconds: float = HfArg(default=10.0, help="Length of a round.")
    rounds: int = HfArg(default=3, help="Rounds of each server.")
    image_dir: str | None = HfArg(default=None, help="Folder of images to send; drawn ones otherwise.")
    image_size: int = HfArg(default=320, help="Width of drawn images, in pixels; the height is three quarters of it.")
    output: str | None = HfArg(default=None, help="A JSON file for the results.")


def load_images(args: Arguments) -> list[bytes]:
    """Files to send.

    Raises:
        `ValueError`: when the folder has no files.
    """
    if args.image_dir is not None:
        files = [path.read_bytes() for path in sorted(Path(args.image_dir).iterdir()) if path.is_file()]
        if not files:
            raise ValueError(f"--image_dir is {args.image_dir}, which has no files; name a folder of images.")
        return files
    return [draw_image(args.image_size, seed) for seed in range(16)]


def draw_image(width: int, seed: int) -> bytes:
    """A JPEG of coloured clouds, about as large as a photograph of that size."""
    clouds = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(clouds).resize((width, width * 3 // 4), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0, 8, (image.height, width, 3))
    file = BytesIO()
    Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


async def health(client: httpx.AsyncClient) -> dict[str, int]:
    """The counts of the server.

    Raises:
        `RuntimeError`: when there is none, or it is ill.
    """
    try:
        response = await client.get("/health")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RuntimeError(f"No server answers at {client.base_url} ({error}); start one, or give another.") from None
    if response.status_code != 200:
        raise RuntimeError(f"The server at {client.base_url} is ill: {response.text}")
    return response.json()


async def load_round(url: str, images: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Loads a server for some seconds; returns requests per second, all latencies in ms and numbers of errors."""
    latencies: list[float] = []
    errors: Counter[str] = Counter()
    files = cycle(images)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        before = await health(client)
        start = time.perf_counter()

        async def send_images() -> None:
            while (begin := time.perf_counter()) < start + seconds:
                try:
                    status = str((await client.post("/predict", content=next(files))).status_code)
                except httpx.HTTPError as error:
                    status = type(error).__name__
                if status == "200":
                    latencies.append(1000 * (time.perf_counter() - begin))
                else:
                    errors[status] += 1
                    await asyncio.sleep(0.05)  # a refusal costs nothing, and should not keep the server busy

        await asyncio.gather(*(send_images() for _ in range(clients)))
        duration = time.perf_counter() - start
        after = await health(client)
    batches = after["batches"] - before["batches"]
    return {
        "requests_per_second": len(latencies) / duration,
        "latencies_ms": latencies,
        "mean_batch_size": (after["images"] - before["images"]) / max(batches, 1),
        "requests": len(latencies),
        "errors": dict(errors),
    }


@contextmanager
def running_server(*arguments: str) -> Any:
    """Starts `serve.py` on a free port, and yields its address once it answers.

    Raises:
        `RuntimeError`: when it ends or does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVER), *arguments, "--port", str(port)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.perf_counter() + START_SECONDS
        while True:
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.perf_counter() > deadline:
                    raise RuntimeError(f"The server did not start: {' '.join(command)}") from None
                time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def summarise(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, percentiles of all latencies that are enough for it, and all errors."""
    latencies = [latency for each in rounds for latency in each["latencies_ms"]]
    percentiles = {f"p{percent}": Timing(latencies).percentile(percent) for percent in (50, 95, 99)}  # in ms
    medians = {name: median(each[name] for each in rounds) for name in ("requests_per_second", "mean_batch_size")}
    errors = sum((Counter(each["errors"]) for each in rounds), Counter())
    return {**medians, "latency_ms": percentiles, "requests": len(latencies), "errors": dict(errors)}


def compare(args: Arguments, urls: dict[str, str]) -> dict[str, Any]:
    """Loads the servers in turns, the first of a round last in the next one, and summarises."""
    images = load_images(args)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in urls}
    for url in urls.values():  # connections, caches and clock rates
        asyncio.run(load_round(url, images, args.clients, min(args.seconds, 3)))
    for number in range(args.rounds):
        for name in list(urls)[:: -1 if number % 2 else 1]:
            rounds[name].append(asyncio.run(load_round(urls[name], images, args.clients, args.seconds)))
    results = {name: {**summarise(rounds[name]), "rounds": rounds[name]} for name in urls}
    machine = {"machine": machine_name(torch.device("cpu")), "versions": library_versions()}  # of the clients
    record: dict[str, Any] = {"arguments": asdict(args), **machine, "results": results}
    if len(urls) > 1:
        pairs = zip(*([r["requests_per_second"] for r in rounds[name]] for name in urls))
        ratios = [pruned / unpruned if unpruned else float("nan") for unpruned, pruned in pairs]
        record["speedup"] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
    return record


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    columns = [
        "server",
        "clients",
        "requests/s",
        "p50 (ms)",
        "p95 (ms)",
        "p99 (ms)",
        "mean batch",
        "requests",
        "errors",
    ]
    rows = []
    for name, result in record["results"].items():
        latencies = ["-" if value is None else f"{value:.0f}" for value in result["latency_ms"].values()]
        errors = ", ".join(f"{status}: {count}" for status, count in result["errors"].items()) or "none"
        speed, batch = f"{result['requests_per_second']:.1f}", f"{result['mean_batch_size']:.1f}"
        clients, requests = str(record["arguments"]["clients"]), str(result["requests"])
        rows.append([name, clients, speed, *latencies, batch, requests, errors])
    lines = [markdown_table(columns, rows)]
    if "speedup" in record:
        ratio = record["speedup"]
        lines.append(f"\nSpeed-up {ratio['median']:.2f} (rounds: {ratio['min']:.2f} to {ratio['max']:.2f}).")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the test, prints the table and returns the record."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    for name in ("clients", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; give 1 or more.")
    if (args.url is None) == (args.compare is None):
        raise ValueError("Give --url of a server that runs, or --compare with the folder or Hub id of a model.")
    if args.url is not None:
        record = compare(args, {args.url: args.url})
    else:
        common = [
            "--model",
            args.compare,
            "--queue_size",
            str(max(64, args.clients)),
            *shlex.split(args.server_arguments),
        ]
        with running_server(*common, "--pruning_rate", "0") as unpruned, running_server(*common) as pruned:
            record = compare(args, {"unpruned": unpruned, "Cropr": pruned})
    if args.output is not None:
        write_json(args.output, record)
    print(table(record))
    return record


if __name__ == "__main__":
    main()
