"""Weights from the Hugging Face Hub, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

from sam3.checkpoint_io import CheckpointError

SAM3_REPO = "facebook/sam3"
SAM3_FILE = "sam3.pt"


def download_ckpt_from_hf(repo_id: str = SAM3_REPO, filename: str = SAM3_FILE) -> Path:
    """Download a file from the Hub, or find it in the local cache.

    The released SAM 3 weights are gated: their licence has to be accepted once, by an account that is logged in.

    Raises:
        CheckpointError: If access is not granted, the file does not exist or the Hub cannot be reached.
    """
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import hf_hub_download

    page = f"https://huggingface.co/{repo_id}"
    log_in = "log in with `hf auth login` (or set HF_TOKEN)"
    try:
        return Path(hf_hub_download(repo_id=repo_id, filename=filename))
    except hub_errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id}/{filename}: access is not granted. Open {page}, accept the licence (SAM License for "
            f"{SAM3_REPO}), wait for the approval, then {log_in} with the account that accepted it."
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id}: no such model on the Hub, or it is private and you are not logged in: check {page}, {log_in}."
        ) from error
    except hub_errors.EntryNotFoundError as error:
        if isinstance(error, hub_errors.LocalEntryNotFoundError):
            raise CheckpointError(_unreachable(repo_id, filename, error)) from error
        raise CheckpointError(f"{repo_id}/{filename}: the model exists but has no such file; see {page}") from error
    except Exception as error:  # each version of the client passes on its own transport's errors
        raise CheckpointError(_unreachable(repo_id, filename, error)) from error


def _unreachable(repo_id: str, filename: str, error: Exception) -> str:
    cause = (str(error).strip().splitlines() or ["no details"])[0]
    return (
        f"{repo_id}/{filename}: cannot be downloaded and is not in the local cache ({type(error).__name__}: {cause}). "
        "Check the connection (and HF_HUB_OFFLINE, HF_ENDPOINT, proxies), or download the file elsewhere and pass its "
        "path as checkpoint_path."
    )
