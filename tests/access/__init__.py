"""Access: each kind of process as a separate Redis user, with the rights of its file in `config/acl/`."""

import pytest

# Tests stand in these, too: `test_roles.py` has them all.
pytest.register_assert_rewrite("tests.access.each_command", "tests.access.in_flower", "tests.access.manual")
