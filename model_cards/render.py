# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Writes the cards in this folder (`make cards`): of the models that the demos train, from the records that the demos
wrote, and of the recipes, which nobody has run here.

    python model_cards/render.py
"""

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

from cropr_hf import CroprViTConfig
from cropr_hf.publishing.model_card import model_facts, read_record, render_card


HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "examples" / "recipes"
SIZES = {
    "facebook/vit-mae-base": "base",
    "facebook/vit-mae-large": "large",
    "facebook/vit-mae-huge": "huge",
    "timm/eva02_large": "eva02_large",
}
CLASSES = {
    "train_image_classification.py": "CroprViTForImageClassification",
    "train_semantic_segmentation.py": "CroprViTForSemanticSegmentation",
    "train_object_detection.py": "CroprViTForObjectDetection",
    "train_instance_segmentation.py": "CroprViTForInstanceSegmentation",
}


def recipe_record(recipe: Path) -> dict[str, Any]:
    """What a card can say about a recipe: the model, the paper's figures, the settings."""
    text = recipe.read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    header = yaml.safe_load(text.split("\n\n")[0].replace("# ", ""))
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}  # one of a script has the same name
    own = {field.name for field in dataclasses.fields(CroprViTConfig)} - general
    overrides = {name: settings[name] for name in own & settings.keys()} | settings.get("config", {})
    source = settings["model_name_or_path"]
    size = next(size for name, size in SIZES.items() if source.startswith(name))
    if "window_size" in overrides:
        size += "_detection"
    config = CroprViTConfig.from_size(size, **overrides)
    data = settings.get("dataset_name") or Path(settings["train_annotations"]).stem
    return {
        "model": model_facts(config, CLASSES[header["script"]], header["title"], base_model=source),
        "published": f"{header['paper']}.",
        "recipe": f"accelerate launch examples/{header['script']} examples/recipes/{recipe.name}",
        "training": {"dataset": data, "settings": settings},
    }


def render() -> dict[Path, str]:
    """Path in this folder -> text of every card."""
    cards = {folder / "README.md": str(render_card(read_record(folder), folder)) for folder in record_folders()}
    for recipe in sorted(RECIPES.glob("*.yaml")):
        cards[HERE / "recipes" / f"{recipe.stem}.md"] = str(render_card(recipe_record(recipe)))
    return cards


def record_folders() -> list[Path]:
    """Folders of models that were trained here."""
    return sorted(file.parent for file in HERE.glob("*/record.json"))


if __name__ == "__main__":
    for path, card in render().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(card, encoding="utf-8")
        print(path.relative_to(HERE))
