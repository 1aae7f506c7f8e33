"""Settings of the whole suite: no network, no progress bars, one thread for tiny models unless
OMP_NUM_THREADS says otherwise."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# For this process and those that tests start: the processes of pytest share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib
import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.utils import logging as transformers_logging


EXAMPLES = Path(__file__).parents[1] / "examples"

transformers_logging.disable_progress_bar()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def example():
    """Imports a script of the examples folder by name."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def render():
    """The script that writes the tables of pages."""
    spec = importlib.util.spec_from_file_location("render_pages", EXAMPLES.parent / "docs" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory) -> str:
    """A folder with a random plain ViT and its image processor."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("vit"))
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, image_size=48, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


@pytest.fixture
def log_records():
    """Everything that Transformers and this package log during the test (their loggers do not reach caplog)."""
    records = []
    handler = logging.Handler(level=logging.INFO)
    handler.emit = records.append
    loggers = [logging.getLogger("transformers"), logging.getLogger("cropr_hf")]
    transformers_logging.warning_once.cache_clear()
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture
def hub_server(tmp_path):
    """A Hub of its own for the test; see `tests.hub_server.HubServer`."""
    from tests.hub_server import HubServer

    with HubServer(tmp_path / "hf_home") as server:
        yield server
