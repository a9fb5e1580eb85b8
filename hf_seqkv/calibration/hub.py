"""A calibration's files from the Hub, or from its cache."""

from __future__ import annotations

from pathlib import Path

from ..errors import CalibrationNotFoundError

TENSORS_NAME, CONFIG_NAME = "calibration.safetensors", "seqkv_config.json"


def download(repo_id: str, revision, token, cache_dir, local_files_only: bool) -> Path:
    """Directory in the Hub cache with a repository's calibration files."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    options = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    try:
        paths = [Path(hf_hub_download(repo_id, name, **options)) for name in (CONFIG_NAME, TENSORS_NAME)]
    except HFValidationError as error:
        raise CalibrationNotFoundError(f"{repo_id!r} is neither a directory nor a Hub repository id") from error
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise CalibrationNotFoundError(
            f"no calibration at {repo_id!r} on the Hub or in its cache ({type(error).__name__}: {error}); check the "
            f"name and the network, or fetch it where there is one: `hf download {repo_id}`"
        ) from error
    return paths[0].parent
