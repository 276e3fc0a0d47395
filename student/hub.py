"""Push a student to the Hugging Face Hub."""

from __future__ import annotations

import os

from huggingface_hub import HfApi, ModelCard

from teachercache.pipeline.errors import CheckpointError
from teachercache.pipeline.places.hub_storage import CARD_FILE, pushing
from teachercache.pipeline.sharing.licences import LINEAGE, require_shareable
from teachercache.student.models.student import CONFIG_FILE, WEIGHTS_FILE, find_saved, read_config


def push_to_hub(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    accept_licences: bool = False,
) -> str:
    """Upload a saved student, with its model card if it has one, and return the address.

    `repository`: "user/name", created if missing. Logs in as huggingface_hub does (HF_TOKEN).
    Raises `CheckpointError` if the folder does not hold a complete student, or the Hub refuses it,
    `LicenceError` where its card names licences of teachers under which it may not simply be public.
    """
    place = find_saved(folder)
    read_config(place)
    if not (place / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"The student in {place} has no weights.",
            got=f"no {WEIGHTS_FILE}",
            expected=f"a {CONFIG_FILE} and a {WEIGHTS_FILE} that save_pretrained() wrote together",
            do="copy or download the folder again",
        )
    if not private and not accept_licences:
        head = ModelCard.load(place / CARD_FILE).data.to_dict() if (place / CARD_FILE).is_file() else {}
        require_shareable(head.get(LINEAGE, {}))
    api = HfApi()
    files = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
    with pushing("student", repository, CheckpointError):
        api.create_repo(repository, private=private, exist_ok=True)
        uploaded = api.upload_folder(repo_id=repository, folder_path=place, allow_patterns=files)
    return str(uploaded.repo_url)
