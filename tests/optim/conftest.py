"""Makes the shared contract of optimizers importable as ``optimizer_contract``."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("optimizer_contract")
