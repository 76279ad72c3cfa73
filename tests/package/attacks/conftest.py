from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import save_weights
from forge import Forgery
from format_reader import Tensor

from dare_train import extract
from dare_train.dtypes import DTYPES, from_float, to_float

_ADDED_ROWS = 3


def _normal(random: np.random.Generator, code: str, *shape: int) -> Tensor:
    values = random.normal(size=shape).astype(np.float32)
    return Tensor(code, shape, from_float(values.reshape(-1), DTYPES[code]))


def _plus(tensor: Tensor, step: np.ndarray | float) -> Tensor:
    dtype = DTYPES[tensor.dtype]
    return Tensor(tensor.dtype, tensor.shape, from_float(to_float(tensor.words, dtype) + step, dtype))


def _base() -> dict[str, Tensor]:
    random = np.random.default_rng(7)
    return {
        "dense": _normal(random, "BF16", 40, 33),
        "embed": _normal(random, "F32", 6, 16),
        "idle": _normal(random, "BF16", 9),
        "steps": Tensor("I64", (20,), np.arange(20)),
        "wide": _normal(random, "F16", 30),
    }


def _tuned(base: dict[str, Tensor]) -> dict[str, Tensor]:
    random = np.random.default_rng(8)
    moved = {
        name: _plus(base[name], 0.01 * random.normal(size=base[name].words.size).astype(np.float32))
        for name in ("dense", "wide")
    }
    rows = _plus(base["embed"], np.float32(0.01))
    added = _normal(random, "F32", _ADDED_ROWS, 16)
    return {
        **base,
        **moved,
        "embed": Tensor("F32", (6 + _ADDED_ROWS, 16), np.concatenate([rows.words, added.words])),
        "steps": Tensor("I64", (20,), base["steps"].words + 1),
        "head": _normal(random, "BF16", 50),
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoint files of a base and of a tuned model: deltas, an embedding that grew, tensors that travel
    whole.
    """
    folder = tmp_path_factory.mktemp("models")
    base = _base()
    for name, tensors in (("base", base), ("tuned", _tuned(base))):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(f'{{"model": "{name}"}}')
        save_weights(tensors, folder / name / "model.safetensors")
    return folder / "base", folder / "tuned"


@pytest.fixture(scope="session")
def base(models: tuple[Path, Path]) -> Path:
    return models[0]


@pytest.fixture(scope="session")
def good(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small package with nothing wrong: one part, `exact` and `rounded` deltas, added rows, whole tensors,
    a file.
    """
    out = tmp_path_factory.mktemp("good") / "package"
    extract(*models, out, p=0.5)
    return out


@pytest.fixture
def forgery(good: Path, tmp_path: Path) -> Forgery:
    return Forgery(good, tmp_path / "package")


@pytest.fixture(params=["int8", "int4", "sign"])
def quantized(request: pytest.FixtureRequest, models: tuple[Path, Path], tmp_path: Path) -> Forgery:
    extract(*models, tmp_path / "quantized", p=0.5, values=request.param)
    return Forgery(tmp_path / "quantized", tmp_path / "package")
