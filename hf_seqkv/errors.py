"""Everything that can go wrong, by name. Each message states the value, the rule it broke and the remedy."""


class SeqKVError(Exception):
    """Base of all errors raised by this package."""


class ConfigError(SeqKVError, ValueError):
    """An option is unknown, out of its range, or contradicts another."""


class NonFiniteError(SeqKVError, ValueError):
    """Keys or values hold NaN or infinity; a quantiser has no code for them."""


class FormatError(SeqKVError, ValueError):
    """Stored bytes are truncated, damaged, foreign, or of another format version."""


class CalibrationMismatchError(SeqKVError, ValueError):
    """A calibration was made for another model, shape, RoPE setting or format version."""


class CalibrationNotFoundError(SeqKVError, FileNotFoundError):
    """No calibration at this path or Hub repository, or none reachable offline."""


class UnsupportedModelError(SeqKVError, ValueError):
    """The model keeps a kind of cache that cannot be coded as pages."""


class UnsupportedVersionError(SeqKVError, ImportError):
    """The installed transformers lacks something this package hooks into."""


class UnsupportedOperationError(SeqKVError, RuntimeError):
    """The operation cannot be done on this cache (cropping past dropped pages, gradients, ...)."""


class BackendError(SeqKVError, RuntimeError):
    """The requested kernel backend cannot run here."""


class SeqKVWarning(UserWarning):
    """Something works, but not the way it was asked for; given once, with the reason."""
