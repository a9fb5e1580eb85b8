"""The one place that imports transformers."""

# First, because the hook of `hf_seqkv.register` runs when this import ends and itself imports the modules beside it.
import transformers.modeling_utils  # noqa: F401

from . import compat

compat.check()
