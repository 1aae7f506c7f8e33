"""Token Cropr for Hugging Face Transformers: prune the image patches that do not matter.

Importing the package registers its models with the Auto classes.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto import modeling_auto

from .configuration_cropr_vit import CroprViTConfig, schedule_from_sides
from .image_processing_cropr_vit import CroprViTImageProcessor
from .modeling_cropr_rf_detr import CroprRfDetrConfig, CroprRfDetrForObjectDetection, CroprRfDetrModel
from .modeling_cropr_vit import (
    CroprViTBackbone,
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
    CroprViTPreTrainedModel,
)
from .modeling_cropr_vit_detection import CroprViTForInstanceSegmentation, CroprViTForObjectDetection
from .schedule_search import FoundSchedule, find_schedule
from .schedules import curriculum_schedule, evaluate_schedules
from .token_reduction import (
    TOKEN_REDUCERS,
    TokenReducer,
    TokenState,
    has_auxiliary_heads,
    register_token_reducer,
)
from .version import __version__


AutoConfig.register(CroprViTConfig.model_type, CroprViTConfig, exist_ok=True)
AutoModel.register(CroprViTConfig, CroprViTModel, exist_ok=True)
AutoModelForImageClassification.register(CroprViTConfig, CroprViTForImageClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(CroprViTConfig, CroprViTForSemanticSegmentation, exist_ok=True)
AutoModelForObjectDetection.register(CroprViTConfig, CroprViTForObjectDetection, exist_ok=True)
AutoModelForInstanceSegmentation.register(CroprViTConfig, CroprViTForInstanceSegmentation, exist_ok=True)
# The segmentation pipeline looks here first; `config.architectures` decides between the two.
AutoModelForImageSegmentation.register(
    CroprViTConfig, (CroprViTForSemanticSegmentation, CroprViTForInstanceSegmentation), exist_ok=True
)
AutoImageProcessor.register(
    CroprViTConfig, image_processor_classes={"torchvision": CroprViTImageProcessor}, exist_ok=True
)
AutoBackbone.register(CroprViTConfig, CroprViTBackbone, exist_ok=True)
AutoConfig.register(CroprRfDetrConfig.model_type, CroprRfDetrConfig, exist_ok=True)
AutoModel.register(CroprRfDetrConfig, CroprRfDetrModel, exist_ok=True)
AutoModelForObjectDetection.register(CroprRfDetrConfig, CroprRfDetrForObjectDetection, exist_ok=True)
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
