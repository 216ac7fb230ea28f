"""Commands of the package, as `python -m transformer`; the script `modular-attention` runs the same."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
