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
"""Random pruning: the baseline of the paper (arXiv 2412.00965)."""

import torch

from .token_reduction import TokenReducer, register_token_reducer
from .token_state import TokenState


@register_token_reducer
class RandomReducer(TokenReducer):
    """Keeps patch tokens drawn at random, in training and inference."""

    name = "random"
    label = "random"
    title = "random pruning (a baseline)"
    deterministic = False
    supports_windows = True

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """See `TokenReducer.after_block`."""
        return self.keep_best(state, num_keep)

    def scores(self, state: TokenState) -> torch.Tensor:
        """See `TokenReducer.scores`."""
        return torch.rand(state.hidden_states.shape[:2], device=state.hidden_states.device)


__all__ = ["RandomReducer"]
