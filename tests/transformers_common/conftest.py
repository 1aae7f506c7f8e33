"""Makes the common tests of the installed Transformers release importable.

They have to be fetched (`python tests/transformers_common/fetch.py`) and take a while to import, so that this folder
is collected only when the marker `common` is asked for.
"""

import re
import sys
from importlib.util import find_spec

import pytest
from fetch import PACKAGE, suite_folder


def pytest_configure(config):
    if suite_folder().is_dir():
        source = (suite_folder() / PACKAGE / "test_modeling_common.py").read_text()
        for marker in sorted(set(re.findall(r"\bmark\.(\w+)", source)) - {"parametrize", "slow"}):
            config.addinivalue_line("markers", f"{marker}: of Transformers")


def pytest_ignore_collect(collection_path, config):
    if re.search(r"(?<!not )\bcommon\b", config.getoption("markexpr")) is None:
        return True
    if not suite_folder().is_dir():
        raise pytest.UsageError(f"There is no {suite_folder()}; run tests/transformers_common/fetch.py first.")
    if find_spec("parameterized") is None:
        raise pytest.UsageError("The tests of Transformers need `pip install parameterized`.")
    if str(suite_folder()) not in sys.path:
        sys.path.append(str(suite_folder()))
    return None
