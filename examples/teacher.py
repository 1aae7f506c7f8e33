# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the training scripts can be told about a teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared import ModelArguments, class_numbers, cropr_config
from transformers import AutoConfig
from transformers.hf_argparser import HfArg

from cropr_hf.training import Distillation


@dataclass(kw_only=True)
class TeacherArguments:
    """From whom a model learns, and what; see `cropr_hf.training.Distillation`. To be mixed into `ModelArguments`."""

    teacher_name_or_path: str | None = HfArg(
        default=None, help="A trained model, usually unpruned, from which to learn what the weights below say."
    )
    distill_logits: float = HfArg(default=0.0, help="Weight of the divergence from the teacher's probabilities.")
    distill_embedding: float = HfArg(default=0.0, help="Weight of 1 - cosine of the pooled embeddings.")
    distill_tokens: float = HfArg(default=0.0, help="Weight of the squared error of the patches that are left.")
    distill_temperature: float = HfArg(default=1.0, help="By which the logits of both are divided.")

    def distillation(self) -> Distillation | None:
        """What is learned from the teacher; `None` with weights of 0."""
        weights = {name: getattr(self, f"distill_{name}") for name in ("logits", "embedding", "tokens")}
        return Distillation(**weights, temperature=self.distill_temperature) if any(weights.values()) else None

    def default_teacher(self, label_names: Sequence[str] | None) -> Any:
        """Who teaches where nobody is named; `None` is nobody.

        Raises:
            `ValueError`: when a teacher must be named.
        """
        given = {name: value for name, value in vars(self).items() if name.startswith("distill_") and value}
        name = next(iter(given))
        raise ValueError(f"--{name} is {given[name]}, but nobody teaches; name a model by --teacher_name_or_path.")

    def teaching(self, label_names: Sequence[str] | None = None) -> dict[str, Any]:
        """The arguments `teacher` and `distillation` of a `CroprTrainer`; empty where nobody teaches.

        Args:
            label_names: classes of the data set, if it has some.

        Raises:
            `ValueError`: for a teacher of whom nothing is learned, weights without a teacher, or negative ones.
        """
        distillation, teacher = self.distillation(), self.teacher_name_or_path
        if distillation is None:
            if teacher is not None:
                raise ValueError(
                    f"--teacher_name_or_path is {teacher}, but the weights of all losses are 0; say what to learn, "
                    "such as by --distill_logits 1."
                )
            return {}
        teacher = self.default_teacher(label_names) if teacher is None else teacher
        return {} if teacher is None else {"teacher": teacher, "distillation": distillation}


def unpruned_source(model_class: Any, args: ModelArguments) -> Any:
    """The model to start from as a teacher, which pools as its student does.

    Raises:
        `ValueError`: when it is pruned already.
    """
    stored = cropr_config(args.model_name_or_path, **args.hub())
    if stored is not None and stored.token_reducer is not None:
        raise ValueError(
            f"{args.model_name_or_path} is pruned already; name its unpruned source by --teacher_name_or_path."
        )
    if stored is not None:
        return model_class.from_pretrained(args.model_name_or_path, **args.hub())
    return model_class.from_vit(args.model_name_or_path, token_reducer=None, **args.hub())


def has_learned(args: ModelArguments, label_names: Sequence[str]) -> bool:
    """Whether the model to start from is an unpruned classifier of these classes, in this order."""
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path, trust_remote_code=False, **args.hub())
    except (OSError, ValueError):  # a timm model has no Transformers configuration
        return False
    is_classifier = "ForImageClassification" in (config.architectures or [""])[0]
    is_pruned = getattr(config, "token_reducer", None) is not None
    if not is_classifier or is_pruned or len(config.id2label) != len(label_names):
        return False
    return class_numbers(label_names, config.id2label) == [*range(len(label_names))]
