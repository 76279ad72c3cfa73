from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forge import Forgery
from safetensors.torch import save_file

from dare_train import extract


def _base() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    return {
        "dense": torch.randn(40, 33, generator=random).bfloat16(),
        "embed": torch.randn(6, 16, generator=random),
        "idle": torch.randn(9, generator=random).bfloat16(),
        "steps": torch.arange(20),
        "wide": torch.randn(30, generator=random).half(),
    }


def _tuned(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(8)
    moved = {
        name: base[name] + 0.01 * torch.randn(base[name].shape, generator=random).to(base[name].dtype)
        for name in ("dense", "wide")
    }
    grown = torch.cat([base["embed"] + 0.01, torch.randn(3, 16, generator=random)])
    return {
        **base,
        **moved,
        "embed": grown,
        "steps": base["steps"] + 1,
        "head": torch.randn(50, generator=random).bfloat16(),
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
        save_file(tensors, folder / name / "model.safetensors")
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
