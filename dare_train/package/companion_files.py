"""Files that belong to a model beside its weights: which they are, and how they travel."""

from __future__ import annotations

import filecmp
import hashlib
import shutil
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PackageError
from ..reading.links import staying_inside
from ..reading.structures import json_in
from ..weights.files.checkpoint import ADAPTER_CONFIG, MERGE_RECORD, SINGLE, WEIGHT_SUFFIXES
from ..weights.files.config_file import CONFIG
from ..weights.files.module_folders import module_folders
from .absent_files import in_place_of_absent, notes_on_absent
from .manifest import CARRIED, FileRecord, file_record
from .model_config import Facts, settle_config
from .reader import DeltaPackage, check_digest

_COMPANION_SUFFIXES = {*CARRIED, ".py"}
_FOLDERS = ("additional_chat_templates",)
_WHOLE_FOLDERS = ("custom_generate", "language_model", "speaker_embeddings")
"""Of `generate` and of processors of speech: all that is in them is theirs, whatever it is called."""
_TOKENIZER = "tokenizer_config.json"
_OTHER_FILES = {"trainer_state.json", "dare_config.json", "requirements.txt", ADAPTER_CONFIG}
_COMPANION_NAMES = {"LICENSE", "LICENCE", "NOTICE"}
_NOT_THE_MODELS = {"README.md", MERGE_RECORD}


def companions(folder: Path) -> list[Path]:
    """Files that belong to a model beside its weights: configuration, tokenizer, generation settings,
    licence. Relative, sorted. Links that lead out of the folder are not followed, and named in a warning.

    Of subfolders only those count that a sentence-transformers `modules.json` names, with what is in them,
    those that processors of transformers write, and those of further tokenizers; others hold other things,
    such as a run's output.
    """
    inside = [folder / name for name in (*module_folders(folder), *_FOLDERS, *_tokenizers(folder))]
    found = [*folder.iterdir(), *(path for place in inside for path in _files_below(place))]
    files = [path for path in found if path.is_file() and _is_companion(path)]
    files += [path for name in _WHOLE_FOLDERS for path in _files_below(folder / name)]
    return sorted({path.relative_to(folder) for path in staying_inside(files, folder)})


def _tokenizers(folder: Path) -> list[str]:
    """Sub-folders with a tokenizer and no weights, such as that of a second text encoder."""
    places = [place for place in folder.iterdir() if (place / _TOKENIZER).is_file()]
    return [
        place.name for place in places if not any(path.suffix in WEIGHT_SUFFIXES for path in place.iterdir())
    ]


def _files_below(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return [
        path
        for path in place.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(place).parts)
    ]


def _is_companion(path: Path) -> bool:
    wanted = path.suffix in _COMPANION_SUFFIXES or path.stem.upper() in _COMPANION_NAMES
    of_something_else = path.name in _OTHER_FILES or path.name.endswith("_results.json")
    hidden_or_index = path.name.startswith(".") or ".index." in path.name
    return wanted and not of_something_else and not hidden_or_index


def copy_companions(folder: Path, staging: Path) -> None:
    """Copy what belongs to a model beside its weights."""
    for relative in companions(folder):
        if relative.name not in _NOT_THE_MODELS:
            _copy(folder / relative, staging / relative)


def copy_unchanged_modules(folder: Path, staging: Path) -> None:
    """Copy the weights of those modules of a base of which no tensor was written, since the package was made
    from the first module alone.
    """
    for name in module_folders(folder).keys() & module_folders(staging).keys():
        weights = Path(name) / SINGLE
        if (folder / weights).is_file() and not (staging / weights).exists():
            _copy(folder / weights, staging / weights)


def copy_carried(package: DeltaPackage, staging: Path) -> None:
    """Copy the files that a package brings.

    Raises:
        PackageError: one of them has the name of a folder of the base's, or is not what the manifest lists.
    """
    for record in package.manifest.files:
        target = staging / record.file
        if target.is_dir() or any(folder.is_file() for folder in target.parents):
            expected = "files that fit in beside the base's"
            remedy = "do not trust this package"
            raise PackageError(package.name, expected=expected, found=record.file, remedy=remedy)
        content = (package.path / record.file).read_bytes()
        check_digest(package.path / record.file, record, hashlib.sha256(content).hexdigest())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def carry_files(
    base: Path | None, tuned: Path | None, staging: Path, *, dequantised: bool = False
) -> tuple[FileRecord, ...]:
    """Copy into the package the configuration and tokenizer files that the base lacks or has otherwise.

    `dequantised`: the model was read in full precision, so its configuration does not speak of any other.
    """
    if tuned is None:
        return ()
    carried = []
    for relative in companions(tuned):
        if relative.suffix not in CARRIED:
            continue
        if base is None or not _same_content(base / relative, tuned / relative):
            target = staging / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((tuned / relative).read_bytes())
            if dequantised and relative == Path(CONFIG):
                settle_config(staging, Facts(tensors={}, dequantised=True))
            carried.append(file_record(target, staging))
    for name, text in in_place_of_absent(base, tuned) if base is not None else ():
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_text(text)
        carried.append(file_record(staging / name, staging))
    return tuple(carried)


def left_behind(base: Path | None, tuned: Path | None) -> list[str]:
    """Sentences on files of a model that its package does not bring, since they may be code, and that the
    base lacks or has otherwise; and on those of the base that would speak for it.
    """
    if tuned is None:
        return []
    others = [
        str(path)
        for path in companions(tuned)
        if path.suffix not in CARRIED
        and path.stem.upper() not in _COMPANION_NAMES
        and (base is None or not _same_content(base / path, tuned / path))
    ]
    named = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    note = f"not in the package, which brings configuration and tokenizers alone: {named}"
    remedy = f"copy from {tuned} beside the result what the model needs"
    return [*notes_on_absent(base, tuned), *([f"{note}; {remedy}"] if others else [])]


def _same_content(base: Path, tuned: Path) -> bool:
    if not base.is_file():
        return False
    if filecmp.cmp(base, tuned, shallow=False):
        return True
    if base.suffix != ".json":
        return False
    try:
        return bool(_settled(json_in(base, Any)) == _settled(json_in(tuned, Any)))
    except (CheckpointError, RecursionError):
        return False


def _settled(content: Any) -> Any:
    """Without what a fast tokenizer remembers of its last call: half a megabyte need not travel for that."""
    if isinstance(content, dict) and "added_tokens" in content:
        return {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    return content
