"""The Space: its files, its page by the client of Gradio and in a browser, on tiny random models; and what it shares
with the server.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard
from PIL import Image
from transformers import (
    DeformableDetrImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from cropr_hf import CroprRfDetrForObjectDetection, CroprViTForImageClassification
from cropr_hf.images import ImageTooLarge, NotAnImage, open_upload
from cropr_hf.publishing.published import PublishedModel, detections
from tests.common import NUM_PATCHES, make_model, tiny_config
from tests.test_composites import rf_detr
from tests.test_serving import BAD, SQUARE, encode, picture, pretending, save_models


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples" / "space"
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
KINDS = ("classifier", "segmenter", "detector", "instances", "rf_detr")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def read_project() -> dict:
    """The section `project` of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="Python reads TOML from 3.11 on.")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


class TestFiles:
    def test_the_front_matter_is_what_spaces_read(self):
        card = SpaceCard.load(SPACE / "README.md")
        fields = card.data.to_dict()
        assert fields["title"] and card.text.strip()
        assert fields["sdk"] == "gradio" and re.fullmatch(r"\d+\.\d+\.\d+", fields["sdk_version"])
        assert re.fullmatch(r"3\.\d+", fields["python_version"])
        assert (SPACE / fields["app_file"]).is_file()
        assert {fields["colorFrom"], fields["colorTo"]} <= COLOURS
        assert len(fields["short_description"]) <= 60 and not fields["emoji"].isascii()
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in fields["models"])
        assert fields["license"] == "apache-2.0"

    def test_requirements_are_those_of_the_library(self):
        lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
        listed = {line for line in lines if not line.startswith(("#", "--"))}
        project = read_project()
        assert listed == {*project["dependencies"], *project["optional-dependencies"]["viz"]}

    def test_the_version_of_gradio_is_one_that_the_extra_allows(self):
        project = read_project()
        version = SpaceCard.load(SPACE / "README.md").data.sdk_version
        assert f"gradio>={version.rpartition('.')[0]}" in project["optional-dependencies"]["space"]


class TestWhatIsShared:
    @pytest.mark.parametrize("name", sorted({*BAD} - {"large_body"}))
    def test_bad_files(self, name):
        body, status, words = BAD[name]
        kind = {415: NotAnImage, 413: ImageTooLarge}.get(status, ValueError)
        with pytest.raises(kind, match=words):
            open_upload(body, max_megapixels=40)

    def test_a_good_file_is_upright_and_rgb(self):
        assert np.array_equal(open_upload(encode(picture(3)), 40), picture(3))

    def test_detections_have_masks_of_the_scores_above_the_threshold(self, folders):
        model = PublishedModel(folders["instances"])
        with torch.inference_mode():
            outputs = model.model(**model.prepare(picture(), 40))
        (everything,) = detections(outputs, model.processor, [(30, 40)])
        threshold = everything["scores"].median().item()
        (best,) = detections(outputs, model.processor, [(30, 40)], threshold)
        above = everything["scores"] > threshold
        assert 0 < len(best["scores"]) < len(everything["scores"])
        assert torch.equal(best["masks"], everything["masks"][above]) and best["masks"].shape[1:] == (30, 40)


@pytest.fixture(scope="module")
def space():
    """The application as a module."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nor does its client report
    pytest.importorskip("gradio", reason="The Space needs Gradio: pip install cropr_hf[space]")
    specification = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.MEASURED_SECONDS = 0.01
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A folder of each kind of model."""
    paths = save_models(tmp_path_factory)
    paths["rf_detr"] = str(tmp_path_factory.mktemp("rf_detr"))
    torch.manual_seed(0)
    backbone = tiny_config(out_features=["stage2", "stage5"])
    CroprRfDetrForObjectDetection(rf_detr(backbone)).save_pretrained(paths["rf_detr"])
    DeformableDetrImageProcessor(size=SQUARE).save_pretrained(paths["rf_detr"])
    return {name: paths[name] for name in KINDS}


@pytest.fixture(scope="module")
def url(space, folders, tmp_path_factory):
    """Where the application runs, with all models."""
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    app = space.build_app(list(folders.values()))
    limit = space.MAX_MEGABYTES * space.gr.FileSize.MB
    _, url, _ = app.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, max_file_size=limit)
    yield url
    app.close()


@pytest.fixture(scope="module")
def client(url):
    from gradio_client import Client

    return Client(url, verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Files to upload; all but the first are no good pictures, whatever their names say."""
    folder = tmp_path_factory.mktemp("files")
    bodies = {"good": encode(picture()), "text": b"What is in the picture?", "huge": pretending(8_000, 6_000)}
    for name, body in bodies.items():
        (folder / f"{name}.png").write_bytes(body)
    return {name: str(folder / f"{name}.png") for name in bodies}


class TestModels:
    @pytest.mark.parametrize("name", KINDS)
    def test_without_pruning_it_is_the_unpruned_model(self, space, folders, name):
        """And with it the same weights, so that they are in memory once."""
        model = space.ShownModel(folders[name])
        assert model.unpruned is not model.model
        weights = dict(model.model.named_parameters())
        for key, weight in model.unpruned.named_parameters():
            assert weight.data_ptr() == weights[key].data_ptr()
        inputs = model.prepare(picture(), 40)
        model.prunable.set_pruning(0)
        with torch.inference_mode():
            torch.testing.assert_close(model.unpruned(**inputs).logits, model.model(**inputs).logits)

    def test_the_map_is_that_of_the_model(self, space, folders):
        model = space.ShownModel(folders["classifier"])
        inputs = model.prepare(picture(), 40)
        outputs, blocks, grid_size = space.with_pruning_map(model.model, inputs)
        expected = model.model(**inputs, output_pruning=True)
        assert torch.equal(blocks, expected.pruned_after_block) and grid_size == (4, 4)
        assert torch.equal(outputs.logits, expected.logits) and outputs.pruned_after_block is not None
        assert model.model(**inputs).pruned_after_block is None

    def test_scores_are_those_of_the_pipeline(self, space, folders):
        model = space.ShownModel(folders["classifier"])
        scores, _, words = model.show(picture(), space.PUBLISHED, 0.5)
        classify = pipeline("image-classification", model=folders["classifier"], device="cpu")
        assert scores == pytest.approx({row["label"]: row["score"] for row in classify(picture(), top_k=5)}, abs=1e-4)
        kept = model.config.kept_patches()[-2]
        assert words.startswith(f"{kept} of {NUM_PATCHES} patches are still there before the last block.")

    def test_stronger_is_stronger_for_the_next_visitor_as_well(self, space, folders):
        model = space.ShownModel(folders["classifier"])
        left = [int(model.show(picture(), choice, 0.5)[2].split()[0]) for choice in (*model.choices, model.choices[0])]
        published, stronger, none, again = left
        assert stronger < published == again < none == NUM_PATCHES

    @pytest.mark.parametrize("name", ["plain", "schedule", "windows", "tome", "evit", "idlevit", "svit", "dtop"])
    def test_stronger_schedules_are_possible(self, space, name):
        config = tiny_config(name)
        schedule = space.stronger_schedule(config, NUM_PATCHES)
        assert config.kept_patches(pruning=schedule) == schedule
        assert sum(schedule) < sum(config.kept_patches())

    def test_where_nothing_can_be_stronger(self, space, tmp_path):
        config = tiny_config("ltp", pruning_rate=None)  # all may stay
        assert space.stronger_schedule(config, NUM_PATCHES) is None
        make_model(CroprViTForImageClassification, tiny_config("unpruned")).save_pretrained(tmp_path)
        ViTImageProcessor(size=SQUARE).save_pretrained(tmp_path)
        model = space.ShownModel(str(tmp_path))
        assert model.choices == [space.NONE] and model.unpruned is model.model
        assert "with this pruning" not in model.show(picture(), space.NONE, 0.5)[2]
        with pytest.raises(ValueError, match="not possible with this model; choose none"):
            model.show(picture(), space.STRONGER, 0.5)

    def test_other_models_are_refused(self, space, tmp_path):
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "num_labels": 3,
        }
        ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(tmp_path)
        ViTImageProcessor(size=SQUARE).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds ViTForImageClassification, without a Cropr ViT"):
            space.ShownModel(str(tmp_path))

    def test_which_models(self, space, monkeypatch):
        monkeypatch.setenv("CROPR_MODELS", "outputs/my model, me/other")
        assert space.model_names() == ["outputs/my model", "me/other"]
        monkeypatch.delenv("CROPR_MODELS")
        assert space.model_names() == SpaceCard.load(SPACE / "README.md").data.models


class TestClient:
    @pytest.mark.parametrize(
        "kind", ["classifier", *(pytest.param(kind, marks=pytest.mark.full) for kind in KINDS[1:])]
    )
    def test_answers(self, client, folders, files, kind):
        from gradio_client import handle_file

        arguments = (folders[kind], handle_file(files["good"]), "as published", 0.05)
        label, drawing, words = client.predict(*arguments, api_name="/show")
        assert bool(label) == (kind == "classifier")
        times = r"\*\*[\d.]+ ms\*\* with this pruning, \*\*[\d.]+ ms\*\* without pruning"
        assert re.search(times + r" \(one run: \d+ pass(es)? each, with \d+ CPU threads?\)", words)
        with Image.open(drawing) as image:
            assert image.format == "PNG" and image.width > 700 and len(np.unique(np.asarray(image))) > 20

    @pytest.mark.parametrize(
        "name, words",
        [("text", "The file is not an image"), ("huge", "more than 40 megapixels"), (None, "no picture yet")],
    )
    def test_visitors_hear_what_is_wrong_and_the_app_goes_on(self, client, folders, files, name, words):
        from gradio_client import handle_file
        from gradio_client.exceptions import AppError

        def ask(name):
            file = name and handle_file(files[name])
            return client.predict(folders["classifier"], file, "as published", 0.5, api_name="/show")

        with pytest.raises(AppError, match=words):
            ask(name)
        assert ask("good")[0]["confidences"]

    def test_a_strip_does_not_fit(self, client, folders, tmp_path):
        from gradio_client import handle_file
        from gradio_client.exceptions import AppError

        (tmp_path / "strip.png").write_bytes(encode(Image.new("RGB", (2000, 1))))
        with pytest.raises(AppError, match="2000 x 1 pixels does not fit the model"):
            file = handle_file(tmp_path / "strip.png")
            client.predict(folders["detector"], file, "as published", 0.5, api_name="/show")

    def test_nothing_but_files_is_read(self, space):
        assert space.read_picture(None) is None
        assert space.read_picture(SimpleNamespace(path=None, url="data:image/png;base64,AAAA")) is None

    def test_large_files_are_not_taken(self, client, folders, tmp_path):
        from gradio_client import handle_file

        (tmp_path / "large.png").write_bytes(bytes(10_600_000))
        with pytest.raises(Exception, match=r"413|large"):
            file = handle_file(tmp_path / "large.png")
            client.predict(folders["classifier"], file, "as published", 0.5, api_name="/show")

    def test_nothing_is_reported_to_others(self, space, folders):
        assert not space.build_app([folders["classifier"]]).analytics_enabled


@pytest.fixture
def browser():
    """A Chromium without a window that finds no host but this machine."""
    pytest.importorskip("selenium", reason="A browser is steered by Selenium: pip install selenium")
    if BROWSER is None or DRIVER is None:
        pytest.skip("There is no Chromium with its driver on this machine.")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1300,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.full
def test_the_page_in_a_browser(browser, url, folders, files):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(condition):
        return WebDriverWait(browser, 60).until(condition)

    def upload(name):
        field = wait(lambda page: page.find_elements(By.CSS_SELECTOR, "#picture input[type=file]"))
        field[0].send_keys(files[name])

    def says(element, text):
        return wait(lambda page: text in page.find_element(By.ID, element).text)

    browser.get(url)
    upload("text")
    wait(lambda page: "The file is not an image" in page.find_element(By.TAG_NAME, "body").text)
    browser.get(url)
    upload("good")  # which runs the model
    says("words", "with this pruning")
    (drawing,) = wait(lambda page: page.find_elements(By.CSS_SELECTOR, "#drawing img"))
    wait(lambda page: page.execute_script("return arguments[0].naturalWidth", drawing) > 700)
    says("classes", "LABEL_")
    browser.find_element(By.CSS_SELECTOR, "#pruning input[value=none]").click()
    browser.find_element(By.ID, "run").click()
    says("words", "16 of 16 patches are still there")
    name = browser.find_element(By.CSS_SELECTOR, "#model input")
    name.click()
    name.send_keys(Keys.CONTROL, "a")
    name.send_keys(folders["detector"], Keys.ENTER)
    wait(lambda page: page.find_elements(By.CSS_SELECTOR, "#threshold input[type=range]"))
    assert not browser.find_elements(By.ID, "classes") and not browser.find_elements(By.CSS_SELECTOR, "#drawing img")
    assert browser.find_element(By.CSS_SELECTOR, "#pruning input[value='as published']").is_selected()
    browser.find_element(By.ID, "run").click()
    says("words", "with this pruning")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded and all(address.startswith((url, "data:", "blob:")) for address in loaded), loaded


@pytest.mark.full
def test_a_space_is_this_folder_and_the_library(space, folders, tmp_path):
    """As they lie in the repository of a Space, where the package is not installed."""
    shutil.copytree(SPACE, tmp_path / "space")
    shutil.copytree(ROOT / "cropr_hf", tmp_path / "space" / "cropr_hf")
    code = f"import app; app.build_app([{folders['classifier']!r}]); print(app.CroprViTModel.__module__, app.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "space", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert str(tmp_path) in result.stdout
