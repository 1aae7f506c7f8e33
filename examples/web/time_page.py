"""How fast the models of a page are in headless Chromium: each against the first, which is not pruned.

    python examples/web/time_page.py --page outputs/web --rounds 15

takes the folder that `build_page.py` wrote, selenium, Chromium and its driver. The models take turns within a round;
the last line is the record as JSON.
"""

import json
import shutil
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from build_page import server
from selenium import webdriver
from transformers import HfArgumentParser
from transformers.utils import logging

from cropr_hf.speed.instruments import machine_name
from cropr_hf.speed.timing import Timing, speed_ratio


TIMEOUT = 900  # seconds for one dtype
SCRIPT = """
    const [folders, device, dtype, rounds, done] = arguments;
    (async () => {
        const { AutoModel, AutoProcessor, RawImage } = await import("/vendor/transformers.min.js");
        const processor = await AutoProcessor.from_pretrained(folders[0]);
        const { pixel_values } = await processor(await RawImage.read("/sample.png"));
        const models = [];
        for (const folder of folders) {
            const model = await AutoModel.from_pretrained(folder, { device, dtype });
            await model({ pixel_values }); // the first call prepares
            models.push(model);
        }
        const times = models.map(() => []);
        for (let round = 0; round < rounds; round++) {
            for (const [index, model] of models.entries()) {
                const start = performance.now();
                await model({ pixel_values });
                times[index].push(performance.now() - start);
            }
        }
        return { times, cores: navigator.hardwareConcurrency, isolated: crossOriginIsolated };
    })().then(done, (error) => done({ error: String(error) }));
"""

logger = logging.get_logger("cropr_hf.examples.web")


@dataclass
class Arguments:
    """Of the command line."""

    page: str = field(default="outputs/web", metadata={"help": "Folder that build_page.py wrote."})
    device: str = field(default="wasm", metadata={"help": "wasm or webgpu."})
    dtypes: list[str] = field(default_factory=lambda: ["fp32", "q8"], metadata={"help": "Of fp32, fp16 and q8."})
    rounds: int = field(default=15, metadata={"help": "Rounds, in each of which every model runs once."})


def open_browser(*arguments: str) -> Any:
    """Headless Chromium with more arguments.

    Raises:
        `ValueError`: where Chromium or its driver is missing.
    """
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in paths.values():
        raise ValueError("Chromium and its driver are needed; the packages are `chromium` and `chromium-driver`.")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(paths["chromedriver"]))


def measure(args: Arguments) -> dict[str, Any]:
    """The record: for each dtype and schedule the median milliseconds, and speed-up and spread against the first."""
    page = Path(args.page)
    levels = json.loads((page / "models" / "levels.json").read_text(encoding="utf-8"))["levels"]
    record: dict[str, Any] = {"machine": machine_name(torch.device("cpu")), "device": args.device, "results": {}}
    with server(page, 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        browser = open_browser()
        try:
            record["browser"] = f"{browser.capabilities['browserName']} {browser.capabilities['browserVersion']}"
            browser.set_script_timeout(TIMEOUT)
            browser.get(f"http://127.0.0.1:{running.server_port}/")
            folders = [level["folder"] for level in levels]
            for dtype in logging.tqdm(args.dtypes, desc="Weights"):
                found = browser.execute_async_script(SCRIPT, folders, args.device, dtype, args.rounds)
                if "error" in found:
                    raise RuntimeError(f"{dtype} on {args.device}: {found['error']}")
                record |= {"cores": found["cores"], "isolated": found["isolated"]}
                timings = [Timing([time / 1000 for time in times]) for times in found["times"]]
                record["results"][dtype] = [
                    {
                        "name": level["name"],
                        "published": level["published"],
                        "milliseconds": 1000 * timing.median,
                        **dict(zip(("speedup", "spread"), speed_ratio(timing, timings[0]))),
                    }
                    for level, timing in zip(levels, timings)
                ]
        finally:
            browser.quit()
            running.shutdown()
    return record


def main() -> int:
    """Entry point."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    print(json.dumps(measure(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
