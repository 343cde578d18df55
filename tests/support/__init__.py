"""What several test files share; no test file imports another."""

import pytest

# Their assertions show what was compared, as those of test files do.
pytest.register_assert_rewrite("tests.support.operators", "tests.support.reference")
