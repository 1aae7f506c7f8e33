"""Token Cropr for Hugging Face Transformers: prune the image patches that do not matter.

Importing the package registers its models with the Auto classes.
"""

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageSegmentation
from transformers.models.auto import modeling_auto
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from . import methods  # noqa: F401 (registers them)
from .configuration_cropr_vit import CroprViTConfig
from .conversion import convert_vit
from .image_processing_cropr_vit import CroprViTImageProcessor
from .modeling_cropr_rf_detr import CroprRfDetrConfig, CroprRfDetrForObjectDetection, CroprRfDetrModel
from .modeling_cropr_vit import (
    CroprViTBackbone,
    CroprViTForImageClassification,
    CroprViTModel,
    CroprViTPreTrainedModel,
)
from .modeling_cropr_vit_detection import CroprViTForInstanceSegmentation, CroprViTForObjectDetection
from .modeling_cropr_vit_segmentation import CroprViTForSemanticSegmentation
from .publishing.hub import code_patterns, write_code
from .publishing.model_card import write_card
from .saving import StrippableModel
from .speed.schedule_search import FoundSchedule, find_schedule
from .speed.tradeoff import evaluate_schedules
from .tasks import RF_DETR, TASKS
from .token_reduction import (
    TOKEN_REDUCERS,
    AttentionFacts,
    ReducerConfig,
    TokenReducer,
    find_token_reducer,
    has_auxiliary_heads,
    register_token_reducer,
)
from .token_schedule import curriculum_schedule, schedule_from_sides
from .token_state import TokenState
from .version import __version__


# What the code that travels to the Hub uses where the package is there, and does without elsewhere.
CroprViTConfig.find_reducer = staticmethod(find_token_reducer)  # type: ignore[assignment]
CroprViTPreTrainedModel.convert = staticmethod(convert_vit)
StrippableModel.write_card = write_card
StrippableModel.write_code = write_code
StrippableModel.code_patterns = staticmethod(code_patterns)  # type: ignore[assignment]
CroprViTImageProcessor.register_for_auto_class()  # its code goes along whenever it is saved

AutoConfig.register(CroprViTConfig.model_type, CroprViTConfig, exist_ok=True)
AutoImageProcessor.register(
    CroprViTConfig, image_processor_classes={"torchvision": CroprViTImageProcessor}, exist_ok=True
)
# From the name of an image processor with code, pipelines guess that of a video processor, and would ask on standard
# input whether to run its code: there is none.
VIDEO_PROCESSOR_MAPPING.register(CroprViTConfig, None, exist_ok=True)  # type: ignore[arg-type]
AutoConfig.register(CroprRfDetrConfig.model_type, CroprRfDetrConfig, exist_ok=True)
transformers.AutoModel.register(CroprRfDetrConfig, CroprRfDetrModel, exist_ok=True)
for config_class, tasks in ((CroprViTConfig, TASKS.values()), (CroprRfDetrConfig, [RF_DETR])):
    for task in tasks:
        getattr(transformers, task.auto_class).register(config_class, task.model_class, exist_ok=True)
# The segmentation pipeline looks here first; `config.architectures` decides between the two.
AutoModelForImageSegmentation.register(
    CroprViTConfig, (CroprViTForSemanticSegmentation, CroprViTForInstanceSegmentation), exist_ok=True
)
# Pipelines look for the names here as well, and call a model that they do not find unsupported.
modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["cropr_vit"] = "CroprViTForSemanticSegmentation"
modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["cropr_vit"] = "CroprViTForObjectDetection"
modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["cropr_rf_detr"] = "CroprRfDetrForObjectDetection"
# The segmentation pipeline joins this table with the semantic one, of which it would hide the entry.
modeling_auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES["cropr_vit"] = (  # type: ignore[assignment]
    "CroprViTForSemanticSegmentation",
    "CroprViTForInstanceSegmentation",
)

__all__ = [
    "TOKEN_REDUCERS",
    "AttentionFacts",
    "CroprRfDetrConfig",
    "CroprRfDetrForObjectDetection",
    "CroprRfDetrModel",
    "CroprViTBackbone",
    "CroprViTConfig",
    "CroprViTForImageClassification",
    "CroprViTForInstanceSegmentation",
    "CroprViTForObjectDetection",
    "CroprViTForSemanticSegmentation",
    "CroprViTImageProcessor",
    "CroprViTModel",
    "CroprViTPreTrainedModel",
    "FoundSchedule",
    "ReducerConfig",
    "TokenReducer",
    "TokenState",
    "__version__",
    "curriculum_schedule",
    "evaluate_schedules",
    "find_schedule",
    "has_auxiliary_heads",
    "register_token_reducer",
    "schedule_from_sides",
]
