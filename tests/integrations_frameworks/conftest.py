"""Frameworks as they are installed by `make test-integrations`; tests of those that are not there are not collected."""

import importlib.util

collect_ignore = [
    f"test_{name}.py" for name in ("accelerate", "lightning", "transformers") if importlib.util.find_spec(name) is None
]
