"""Folders for transformers.js and the page in `examples/web`, in Node and in headless Chromium."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import DetrImageProcessor, SegformerImageProcessor, ViTImageProcessor

from cropr_hf.cli import main
from cropr_hf.publishing.export import export_model, onnx_runner
from cropr_hf.publishing.onnx_operators import operators
from cropr_hf.publishing.web import FACTS, FILES, export_for_web
from tests.common import TASKS, assert_close_relative, make_images
from tests.test_composites import build_rf_detr


WEB = Path(__file__).parents[1] / "examples" / "web"
PACKAGE = WEB / "node_modules" / "@huggingface" / "transformers"
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="ONNX is not installed"
)
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not PACKAGE.is_dir(), reason="Node or transformers.js is not there: `make web`"
)
needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None or find_spec("selenium") is None,
    reason="Chromium, its driver or selenium is not installed",
)
SHORT = {"num_hidden_layers": 3, "pruning_rate": 4}
SIZE = {"height": 32, "width": 32}
MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "classification": lambda: (TASKS["classification"].build(**SHORT), ViTImageProcessor(size=SIZE)),
    "segmentation": lambda: (TASKS["segmentation"].build("eva02", **SHORT), SegformerImageProcessor(size=SIZE)),
    "encoder": lambda: (TASKS["model"].build("no_fusion", **SHORT), ViTImageProcessor(size=SIZE)),
    "rf_detr": lambda: (
        build_rf_detr(num_hidden_layers=3, out_features=["stage1", "stage2", "stage3"]),
        DetrImageProcessor(size={"height": 64, "width": 64}, do_pad=False),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """The folder for transformers.js of a name in `MODELS`, with a picture as large as its input; each made once."""
    root = tmp_path_factory.mktemp("web")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            torch.manual_seed(0)
            model, processor = MODELS[name]()
            # Scores of random queries are so close that rounding takes others.
            export_for_web(model.eval(), folder, processor, tolerance=1 if name == "rf_detr" else None)
            height, width = facts(folder)["image_size"]
            noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / f"{name}.png")
        return folder

    return make


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())[FACTS]


def pixels_of(picture: Path) -> torch.Tensor:
    """What the classifier gets of a picture."""
    return ViTImageProcessor(size=SIZE)(Image.open(picture), return_tensors="pt")["pixel_values"]


def node(code: str, folder: Path) -> Any:
    """What a program in the folder of the installed packages prints as JSON in its last line."""
    head = f"""
        import {{ AutoModel, AutoProcessor, RawImage, env, pipeline }} from "@huggingface/transformers";
        env.allowRemoteModels = false;
        env.localModelPath = {json.dumps(str(folder.parent) + "/")};
        const folder = {json.dumps(folder.name)};
        const picture = {json.dumps(str(folder.with_suffix(".png")))};
    """
    command = ["node", "--input-type=module", "--eval", head + code]
    done = subprocess.run(command, cwd=WEB, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


# Operators


@needs_onnx
def test_a_file_for_the_web_computes_what_the_model_computes(tmp_path):
    model = TASKS["classification"].build(**SHORT)
    export_model(model, tmp_path / "model.onnx", for_web=True, output_pruning=True)
    images = make_images(1, seed=7)
    with torch.no_grad():
        expected = model(images, output_pruning=True)
    actual = onnx_runner(tmp_path / "model.onnx")(images)
    assert list(actual) == ["logits", "pruned_after_block"]
    assert_close_relative(actual["logits"], expected.logits, 5e-5)
    assert torch.equal(actual["pruned_after_block"].long(), expected.pruned_after_block)


@needs_onnx
@pytest.mark.parametrize("descending", [False, True])
def test_sorting_by_counting_is_stable_sorting(descending, tmp_path):
    class Sort(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = values.sort(dim=1, stable=True, descending=descending)
            return found.values, values.gather(1, found.indices)

    values = torch.randint(5, (1, 40)).float()
    values[0, 3], values[0, 30] = torch.inf, -torch.inf
    program = torch.export.export(Sort(), (values,))
    written = torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=operators(for_web=True))
    assert "TopK" not in {node.op_type for node in written.model.graph}
    written.save(tmp_path / "sort.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "sort.onnx", providers=["CPUExecutionProvider"])
    (name,) = [given.name for given in session.get_inputs()]
    for actual, expected in zip(session.run(None, {name: values.numpy()}), Sort()(values)):
        assert_close(torch.from_numpy(actual), expected, rtol=0, atol=0)


@needs_onnx
@pytest.mark.full
@pytest.mark.parametrize("method", ["evit", "tome"])
def test_other_methods_have_files_for_the_web(method, tmp_path):
    import onnx

    model = TASKS["classification"].build(**SHORT, token_reducer=method, last_layer_fusion=False)
    export_model(model, tmp_path / "model.onnx", for_web=True)
    uses_cpu = "TopK" in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert uses_cpu == (method == "tome")  # as `docs/web.md` has it
    images = make_images(1, seed=7)
    with torch.no_grad():
        assert_close_relative(onnx_runner(tmp_path / "model.onnx")(images)["logits"], model(images).logits, 5e-5)


# Folders


@needs_onnx
@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_has_a_file_per_dtype_and_a_card(name, folders):
    folder = folders(name)
    assert {path.name for path in (folder / "onnx").iterdir()} == set(FILES.values())
    differences = facts(folder)["differences"]
    assert differences["fp32"] < 1e-5 < differences["fp16"] < 5e-3 < differences["q8"]
    card = (folder / "README.md").read_text()
    assert "library_name: transformers.js" in card
    assert ("pruned_after_block" in card) == (name != "rf_detr")


@needs_onnx
@pytest.mark.full
def test_the_command_writes_a_folder_over_an_older_one(tmp_path):
    model, processor = MODELS["classification"]()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    folder = tmp_path / "web"
    command = ["export", str(tmp_path / "model"), str(folder), "--for", "transformers.js"]
    assert main(command) == 0
    (folder / "onnx" / "model_old.onnx").touch()
    (folder / "mine.txt").touch()
    assert facts(folder)["patches_kept"] == model.config.kept_patches()
    assert main([*command, "--pruning_rate", "2"]) == 0
    assert facts(folder)["patches_kept"] == model.config.kept_patches(pruning=2)
    assert not (folder / "onnx" / "model_old.onnx").exists()
    assert (folder / "mine.txt").exists()
    before = (folder / "config.json").read_text()
    assert main([*command, "--tolerance", "0"]) == 1  # no file is that exact
    assert (folder / "config.json").read_text() == before
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "mine.txt",
        "onnx",
        "preprocessor_config.json",
    ]


def test_what_cannot_go_on_the_web_is_an_error(tmp_path):
    processor = ViTImageProcessor(size=SIZE)
    with pytest.raises(ValueError, match="no type that is like CroprViTBackbone"):
        export_for_web(TASKS["backbone"].build(), tmp_path, processor)
    model = TASKS["classification"].build()
    with pytest.raises(ValueError, match=r"torch\.bfloat16; load it in float32"):
        export_for_web(TASKS["classification"].build().bfloat16(), tmp_path, processor)
    with pytest.raises(ValueError, match="no image processor"):
        export_for_web(model, tmp_path, None)
    with pytest.raises(ValueError, match=r"not for \.pt2"):
        export_model(model, tmp_path / "model.pt2", for_web=True)
    with pytest.raises(ValueError, match="one image per call"):
        export_model(model, tmp_path / "model.onnx", batch_size=2, for_web=True)
    with pytest.raises(ValueError, match="CroprViTBackbone have no pruning map"):
        export_model(TASKS["backbone"].build(), tmp_path / "model.onnx", output_pruning=True)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"the config\.json of another model"):
        export_for_web(model, tmp_path, processor)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# Node


@needs_onnx
@needs_node
@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_transformers_js_computes_what_python_computes(name, folders):
    folder = folders(name)
    pixels = MODELS[name]()[1](Image.open(folder.with_suffix(".png")), return_tensors="pt")["pixel_values"]
    code = """
        const processor = await AutoProcessor.from_pretrained(folder);
        const { pixel_values } = await processor(await RawImage.read(picture));
        const found = {};
        for (const dtype of ["fp32", "fp16", "q8"]) {
            const model = await AutoModel.from_pretrained(folder, { dtype });
            const outputs = Object.entries(await model({ pixel_values }));
            found[dtype] = Object.fromEntries(outputs.map(([name, { data }]) => [name, Array.from(data, Number)]));
        }
        console.log(JSON.stringify(found));
    """
    found = node(code, folder)
    for dtype, file in FILES.items():
        for output, expected in onnx_runner(folder / "onnx" / file)(pixels).items():
            actual = torch.tensor(found[dtype][output], dtype=torch.float32).view_as(expected)
            assert_close(actual, expected.float(), rtol=1e-3, atol=1e-3 if dtype == "fp32" else 1e-2)


@needs_onnx
@needs_node
@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_the_snippet_of_the_card_runs(name, folders):
    folder = folders(name)
    (code,) = re.findall(
        r"```javascript\n.*?@huggingface/transformers\";\n(.*?)```", (folder / "README.md").read_text(), re.S
    )
    code = code.replace('"OWNER/NAME"', "folder").replace('"photo.jpg"', "picture")
    code = re.sub(r"console\.log\((.*)\);\s*$", r"console.log(JSON.stringify(\1));", code)
    imports = "import { AutoModelForObjectDetection } from '@huggingface/transformers';"
    found = node(imports + code, folder)
    if name == "classification":
        pixels = pixels_of(folder.with_suffix(".png"))
        scores = onnx_runner(folder / "onnx" / FILES["fp32"])(pixels)["logits"][0].softmax(dim=0)
        best = scores.topk(len(found))
        labels = json.loads((folder / "config.json").read_text())["id2label"]
        assert [entry["label"] for entry in found] == [labels[str(index)] for index in best.indices.tolist()]
        assert_close(torch.tensor([entry["score"] for entry in found]), best.values, rtol=1e-3, atol=0)
    elif name == "segmentation":
        assert found and all(entry["mask"]["width"] == 32 for entry in found)
    elif name == "encoder":
        assert len(found["ort_tensor"]["dims"]) == 3
    else:
        score, box = found
        assert 0 < score < 1 and len(box) == 4


# The page


@pytest.fixture(scope="module")
def web_example() -> Iterator[Callable[[str], Any]]:
    """Imports a script of `examples/web`."""
    sys.path.insert(0, str(WEB))
    yield importlib.import_module
    sys.path.remove(str(WEB))


@pytest.fixture(scope="module")
def page(web_example, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """The page, served, with a tiny classifier that was never trained."""
    root = tmp_path_factory.mktemp("page")
    model, processor = MODELS["classification"]()
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / "photo.png")
    build = web_example("build_page")
    arguments = build.Arguments(str(root / "model"), str(root / "page"), str(root / "photo.png"))
    folder = build.build(arguments)
    with build.server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        levels = json.loads((folder / "models" / "levels.json").read_text())["levels"]
        (published,) = [level["folder"] for level in levels if level["published"]]
        yield SimpleNamespace(
            root=root, folder=folder, published=published, address=f"http://127.0.0.1:{server.server_port}/"
        )
        server.shutdown()


@pytest.fixture(scope="module")
def browser(web_example) -> Iterator[Any]:
    """Headless Chromium, whose GPU is a program."""
    gpu = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    driver = web_example("time_page").open_browser("--window-size=420,1200", *gpu)
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def visitor(page, browser) -> Any:
    """The browser, which has opened the page."""
    browser.get(page.address)
    wait_for(browser, "Choose a picture")
    return browser


def wait_for(browser: Any, text: str) -> str:
    from selenium.webdriver.support.ui import WebDriverWait

    def reached(driver: Any) -> Any:
        status = driver.find_element("id", "status").text
        return status if re.search(text, status) else False

    return WebDriverWait(browser, 120).until(reached)


@needs_onnx
@needs_node
@needs_chromium
@pytest.mark.full
def test_a_visitor_sees_class_and_dropped_patches(page, visitor):
    visitor.find_element("id", "file").send_keys(str(page.root / "photo.png"))
    published = page.folder / "models" / page.published
    kept = facts(published)["patches_kept"][-1]
    wait_for(visitor, f"^{kept} patches reach the last block")
    assert "times as fast" in visitor.find_element("id", "time").text
    assert visitor.find_element("id", "picture").get_attribute("aria-label").startswith(f"The picture; {kept} of 16")
    file = published / "onnx" / FILES["fp32"]
    scores = onnx_runner(file)(pixels_of(page.root / "photo.png"))["logits"][0].softmax(dim=0)
    labels = json.loads((published / "config.json").read_text())["id2label"]
    shown = visitor.find_element("id", "classes").text.splitlines()[0]
    assert shown == labels[str(scores.argmax().item())]
    # The slider's first place is the model without pruning.
    script = "const s = document.getElementById('amount'); s.value = 0; s.dispatchEvent(new Event('input'));"
    visitor.execute_script(script)
    wait_for(visitor, "^16 patches reach the last block")
    assert visitor.find_element("id", "time").text.endswith("ms, unpruned")
    assert visitor.find_element("id", "legend").text == "none"
    width = visitor.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0  # nothing is cut off on a phone


@needs_onnx
@needs_node
@needs_chromium
@pytest.mark.full
def test_a_file_that_is_no_picture_and_a_huge_one_are_errors(page, visitor):
    (page.root / "notes.png").write_text("no picture")
    visitor.find_element("id", "file").send_keys(str(page.root / "notes.png"))
    wait_for(visitor, "notes.png is no picture")
    Image.new("1", (10_000, 6_000)).save(page.root / "huge.png")
    visitor.find_element("id", "file").send_keys(str(page.root / "huge.png"))
    wait_for(visitor, "10000 x 6000 pixels, more than 50 million")
    assert not visitor.find_element("id", "result").is_displayed()
    visitor.find_element("id", "sample").click()  # it goes on
    wait_for(visitor, "patches reach the last block")


@needs_onnx
@needs_node
@needs_chromium
@pytest.mark.full
def test_on_webgpu_nothing_runs_on_the_processor(page, visitor):
    code = """
        const [folder, done] = arguments;
        (async () => {
            if (!(await navigator.gpu?.requestAdapter())) return null;
            const { AutoModel, AutoProcessor, RawImage } = await import("/vendor/transformers.min.js");
            const session_options = { logSeverityLevel: 0, logVerbosityLevel: 1 };
            const options = { device: "webgpu", dtype: "fp32", session_options };
            const model = await AutoModel.from_pretrained(folder, options);
            const processor = await AutoProcessor.from_pretrained(folder);
            const { pixel_values } = await processor(await RawImage.read("/sample.png"));
            return Array.from((await model({ pixel_values })).logits.data);
        })().then(done, (error) => done(String(error)));
    """
    logits = visitor.execute_async_script(code, page.published)
    if logits is None:
        pytest.skip("this Chromium has no WebGPU")
    file = page.folder / "models" / page.published / "onnx" / FILES["fp32"]
    expected = onnx_runner(file)(pixels_of(page.root / "photo.png"))["logits"][0]
    assert isinstance(logits, list), logits
    assert_close(torch.tensor(logits), expected, rtol=1e-3, atol=1e-3)
    log = "".join(entry["message"] for entry in visitor.get_log("browser"))
    assert "All nodes placed on [WebGpuExecutionProvider]" in log


@needs_onnx
@needs_node
@needs_chromium
@pytest.mark.full
def test_the_page_is_measured(page, web_example):
    measure = web_example("time_page")
    record = measure.measure(measure.Arguments(str(page.folder), dtypes=["q8"], rounds=3))
    assert record["isolated"]
    unpruned, *others = record["results"]["q8"]
    assert (unpruned["speedup"], unpruned["spread"]) == (1, 0)
    assert [entry["published"] for entry in others].count(True) == 1
    assert all(entry["milliseconds"] > 0 for entry in others)
