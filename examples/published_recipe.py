# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""`--published_recipe`: how the authors of a method train, as arguments of a script that come before all others."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from cropr_hf.token_reduction import TOKEN_REDUCERS


logger = logging.get_logger("transformers.published_recipe")  # where `--log_level` sets the level


def published_recipe(given: Namespace) -> dict[str, Any]:
    """The recipe of the method, by names of arguments; nothing unless the arguments that are given ask for it.

    It is asked for, and no default of `--token_reducer`, so that methods which are compared train alike.

    Raises:
        `ValueError`: when no method is named, or one without a recipe.
    """
    if not getattr(given, "published_recipe", False):
        return {}
    recipes = {name: method.training_recipe for name, method in TOKEN_REDUCERS.items() if method.training_recipe}
    if given.token_reducer not in recipes:
        raise ValueError(
            f"--published_recipe is there for the methods {', '.join(sorted(recipes))}, but --token_reducer is "
            f"{given.token_reducer}; name one of them, or leave it out."
        )
    return recipes[given.token_reducer]


def tell_recipe(recipe: dict[str, Any], groups: Sequence[Any]) -> None:
    """Logs which arguments have the values of a recipe, and not others that were given."""
    words = [
        f"--{name} {value}"
        for name, value in recipe.items()
        if any(getattr(group, name, None) == value for group in groups)
    ]
    if words:
        logger.info(f"The published recipe says {' '.join(words)}.")
