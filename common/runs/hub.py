"""Sends the final model to the hub: asked for before a run begins, so that a mistake is not found after it."""

from __future__ import annotations  # for type hints whose import would take seconds

import logging
from pathlib import Path

from common.mistakes import first_line

logger = logging.getLogger("nanorlhf")


def prepare_upload(name: str) -> str:
    """Make the repository that the final model is uploaded to; one that is there stays as it is.

    Args:
        name: the setting push_to_hub.

    Returns:
        The repository's id, with its owner.

    Raises:
        ValueError: if the hub cannot be reached, or does not let this account write there.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # of the network, of the hub's client, of the account
        raise ValueError(
            f"push_to_hub={name}: the final model could not be uploaded there: {first_line(error)}. Log in with hf "
            "auth login to an account that may write there, or leave out --push_to_hub and upload final/ later with "
            "hf upload."
        ) from error


def upload(repository: str, folder: Path) -> None:
    """Send a folder to the hub; if that fails, say where it is and how to send it, since the run's work is done.

    Args:
        repository: that `prepare_upload` made.
        folder: of the final model.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # of the network, of the hub's client, of the account
        logger.warning(
            "push_to_hub=%s: the upload failed: %s. The final model is in %s; upload it with: hf upload %s %s",
            *(repository, first_line(error), folder, repository, folder),
        )
