"""A page that runs a published classifier in the browser, with a slider for the amount of pruning.

    python examples/web/build_page.py --model_name_or_path outputs/demo/cropr --serve

exports one checkpoint with several schedules, and puts page, models and libraries into a folder that any web server
can serve. It takes what `npm install --prefix examples/web` puts there. `docs/deploy.md` says more.
"""

import functools
import http.server
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoImageProcessor, HfArgumentParser
from transformers.utils import logging

from cropr_hf import CroprViTForImageClassification
from cropr_hf.files import write_json
from cropr_hf.publishing.web import export_for_web


HERE = Path(__file__).parent
MODULES = HERE / "node_modules"
LIBRARIES = (
    "@huggingface/transformers/dist/transformers.min.js",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
)
SHARES = (0.0, 0.5, 0.75, 1.0, 1.1)  # of the patches that the published schedule prunes

logger = logging.get_logger("cropr_hf.examples.web")


@dataclass
class Arguments:
    """Of the command line."""

    model_name_or_path: str = field(
        default="outputs/demo/cropr", metadata={"help": "Folder or Hub id of a classifier."}
    )
    output_dir: str = field(default="outputs/web", metadata={"help": "Folder for the page."})
    sample: str = field(default="docs/digit.png", metadata={"help": "Picture that visitors can take."})
    serve: bool = field(default=False, metadata={"help": "Serve the page on this machine."})
    port: int = field(default=8000, metadata={"help": "Port to serve on; 0 for any that is free."})


def schedules(model: CroprViTForImageClassification) -> list[list[int]]:
    """Patches kept after each block, from none pruned to more than the published schedule prunes."""
    config = model.config
    kept, patches = config.kept_patches(), config.num_patches
    found = [[max(1, patches - round(share * (patches - count))) for count in kept] for share in SHARES]
    return [schedule for index, schedule in enumerate(found) if schedule not in found[:index]]


def build(args: Arguments) -> Path:
    """Writes the page; returns its folder."""
    missing = [library for library in LIBRARIES if not (MODULES / library).is_file()]
    if missing:
        raise ValueError(f"{MODULES} lacks {missing[0]}; run `npm install --ignore-scripts --prefix {HERE}` first.")
    model = CroprViTForImageClassification.from_pretrained(args.model_name_or_path)
    model.remove_auxiliary_heads()
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    published, patches = model.config.kept_patches(), model.config.num_patches
    folder = Path(args.output_dir)
    models = folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    levels = []
    for number, schedule in enumerate(logging.tqdm(schedules(model), desc="Schedules")):
        model.set_pruning(schedule)
        export_for_web(model, models / str(number), processor)
        name = "none" if schedule[-1] == patches else f"{schedule[-1]} of {patches} patches left"
        levels.append({"folder": str(number), "name": name, "published": schedule == published})
    write_json(models / "levels.json", {"levels": levels})
    vendor = folder / "vendor"
    vendor.mkdir(exist_ok=True)
    for library in LIBRARIES:
        shutil.copyfile(MODULES / library, vendor / Path(library).name)
    for name in ("index.html", "style.css", "app.js"):
        shutil.copyfile(HERE / name, folder / name)
    shutil.copyfile(args.sample, folder / "sample.png")
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files with the headers that let WebAssembly use more than one thread."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def end_headers(self) -> None:
        """As usual, and isolated from other origins."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *args: object) -> None:
        """Says nothing."""


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """Serves a folder to this machine alone."""
    handler = functools.partial(Handler, directory=str(folder))
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


def main() -> int:
    """Entry point."""
    logging.set_verbosity_info()
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    folder = build(args)
    logger.info("%s holds the page.", folder)
    if args.serve:
        with server(folder, args.port) as running:
            logger.info("Serving http://127.0.0.1:%d until you press Ctrl+C.", running.server_port)
            try:
                running.serve_forever()
            except KeyboardInterrupt:
                pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
