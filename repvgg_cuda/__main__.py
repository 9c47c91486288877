# SPDX-License-Identifier: MIT
"""``python -m repvgg_cuda``."""

import sys

from repvgg_cuda.cli import main

if __name__ == "__main__":
    sys.exit(main())
