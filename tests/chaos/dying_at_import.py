"""A grader module that ends its process while it is imported."""

from __future__ import annotations

import sys

sys.stderr.write("licence file not found\n")
sys.exit(3)
