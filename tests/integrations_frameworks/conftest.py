"""Frameworks as they are installed by `make test-integrations`; tests of those that are not there are not collected."""

import importlib.util

NEEDS = {name: name for name in ("accelerate", "keras", "lightning", "ml_dtypes", "tensorflow", "transformers")}
NEEDS["azure"] = "adlfs"

collect_ignore = [f"test_{name}.py" for name, package in NEEDS.items() if importlib.util.find_spec(package) is None]
