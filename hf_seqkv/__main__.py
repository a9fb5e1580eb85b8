"""`python -m hf_seqkv` is `seqkv`."""

import sys

from .cli import main

sys.exit(main())
