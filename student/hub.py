"""Push a student to the Hugging Face Hub."""

import os
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from teachercache.pipeline.errors import CheckpointError
from teachercache.pipeline.places.hub_storage import CARD_FILE, pushing
from teachercache.pipeline.sharing.licences import LINEAGE, UNSTATED, require_shareable
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
    `LicenceError` where it may not simply be public, by its teachers' licences or for want of a card.
    """
    place = find_saved(folder)
    config = read_config(place)
    if not (place / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"The student in {place} has no weights.",
            got=f"no {WEIGHTS_FILE}",
            expected=f"a {CONFIG_FILE} and a {WEIGHTS_FILE} that save_pretrained() wrote together",
            do="copy or download the folder again",
        )
    if not private and not accept_licences:
        require_shareable(dict.fromkeys(config.get("teacher_dims", ()), UNSTATED) | teacher_licences(place))
    api = HfApi()
    files = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
    with pushing("student", repository, CheckpointError):
        api.create_repo(repository, private=private, exist_ok=True)
        uploaded = api.upload_folder(repo_id=repository, folder_path=place, allow_patterns=files)
    return str(uploaded.repo_url)


def carry_card(source: str | os.PathLike[str], target: Path, change: str) -> None:
    """Give a student that was made of another the other's card, if it has one, and say what changed."""
    card = find_saved(source) / CARD_FILE
    if card.is_file():  # what a teacher gave to the stem stays when its path goes, and so does its licence
        (target / CARD_FILE).write_text(f"{card.read_text()}\n{change}\n")


def teacher_licences(student: str | os.PathLike[str]) -> dict[str, str]:
    """What the card of a saved student says: licences by teacher; none where there is no card."""
    card = find_saved(student) / CARD_FILE
    return ModelCard.load(card).data.to_dict().get(LINEAGE, {}) if card.is_file() else {}
