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
"""Makes any pretrained ViT of a supported family prunable: `convert_vit`, called by `from_vit` of every model.

`convert_eva02_detector` does so for the detectors of EVA-02.
"""

from .convert import SUPPORTED_FAMILIES, convert_vit
from .eva02_detection import convert_eva02_detector


__all__ = ["SUPPORTED_FAMILIES", "convert_eva02_detector", "convert_vit"]
