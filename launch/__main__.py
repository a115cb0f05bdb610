"""``python -m launch``: the command line without an installed script; also what the first line of an executable YAML runs."""

from __future__ import annotations

import sys

from launch.command import main

if __name__ == "__main__":
    sys.exit(main())
