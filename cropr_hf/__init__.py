"""Token Cropr for Hugging Face Transformers: prune the image patches that do not matter.

Importing the package registers its models with the Auto classes.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .configuration_cropr_vit import CroprViTConfig
from .modeling_cropr_vit import (
    CroprViTBackbone,
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
    CroprViTPreTrainedModel,
)
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
AutoBackbone.register(CroprViTConfig, CroprViTBackbone, exist_ok=True)
# The segmentation pipeline looks for the name here as well, and calls a model that it does not find unsupported.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[CroprViTConfig.model_type] = CroprViTForSemanticSegmentation.__name__

__all__ = [
    "TOKEN_REDUCERS",
    "CroprViTBackbone",
    "CroprViTConfig",
    "CroprViTForImageClassification",
    "CroprViTForSemanticSegmentation",
    "CroprViTModel",
    "CroprViTPreTrainedModel",
    "TokenReducer",
    "TokenState",
    "__version__",
    "has_auxiliary_heads",
    "register_token_reducer",
]
