# Copyright 2026 The cropr_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Token reduction methods besides that of the paper, a file each; importing this folder registers them."""

from .ailurus import AiluRusConfig, AiluRusReducer
from .asvit import ASViTConfig, ASViTReducer
from .dtop import DToPConfig, DToPReducer
from .dynamicvit import DynamicViTConfig, DynamicViTReducer
from .evit import EViTConfig, EViTReducer
from .idlevit import IdleViTConfig, IdleViTReducer
from .itpn import MigrationConfig, MigrationReducer
from .ltp import LTPConfig, LTPReducer
from .stp import STPConfig, STPReducer
from .svit import SViTConfig, SViTReducer
from .tocom import ToComConfig, ToComReducer, load_compensator, save_compensator
from .tome import ToMeConfig, ToMeReducer


__all__ = [
    "ASViTConfig",
    "ASViTReducer",
    "AiluRusConfig",
    "AiluRusReducer",
    "DToPConfig",
    "DToPReducer",
    "DynamicViTConfig",
    "DynamicViTReducer",
    "EViTConfig",
    "EViTReducer",
    "IdleViTConfig",
    "IdleViTReducer",
    "LTPConfig",
    "LTPReducer",
    "MigrationConfig",
    "MigrationReducer",
    "STPConfig",
    "STPReducer",
    "SViTConfig",
    "SViTReducer",
    "ToComConfig",
    "ToComReducer",
    "ToMeConfig",
    "ToMeReducer",
    "load_compensator",
    "save_compensator",
]
