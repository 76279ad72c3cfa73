"""A UNet of diffusers: what `apply` writes is what `from_pretrained` loads, whole, sharded and as a variant.

In a process of its own: diffusers warns while it is imported, and warnings are errors here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

import dare_train

place, options = Path(sys.argv[1]), eval(sys.argv[2])
variant = {name: value for name, value in options.items() if name == "variant"}
torch.manual_seed(0)
model = UNet2DConditionModel(
    sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
    attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
model.save_pretrained(place / "base", **options)
with torch.no_grad():
    for parameter in model.parameters():
        parameter += 0.01 * torch.randn_like(parameter)
model.save_pretrained(place / "tuned", **options)
package = dare_train.extract(place / "base", place / "tuned", place / "package", p=0)
package.verify(place / "base")
dare_train.apply(place / "base", package, place / "result")
loaded = UNet2DConditionModel.from_pretrained(place / "result", **variant)
assert list(loaded.config.block_out_channels) == [8, 16]
state = model.state_dict()
assert state.keys() == loaded.state_dict().keys()
assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
"""


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, 1),
        ({"max_shard_size": "60KB"}, 6),
        ({"variant": "fp16", "max_shard_size": "60KB"}, 6),
    ],
    ids=["whole", "sharded", "variant"],
)
def test_a_unet_comes_back(tmp_path: Path, options: dict[str, str], files: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), repr(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert len(names) == files + 1, "the weights, and config.json"
    assert names == {path.name for path in (tmp_path / "result").iterdir()}
