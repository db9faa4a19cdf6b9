from pathlib import Path

import pytest

# The helpers of the tests assert, too. With this a failure of theirs shows the values that were compared.
pytest.register_assert_rewrite(*(f"tests.{folder.name}" for folder in Path(__file__).parent.iterdir()))
