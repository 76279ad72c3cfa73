"""The `trl` command, as people start it, inside `dare-train run`: on one process, and on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from worded_models import save_llama, save_texts

from dare_train import DeltaPackage, extract

SETTINGS = """
model_name_or_path: base
dtype: bfloat16
dataset_name: texts
output_dir: out
max_steps: 2
save_steps: 2
per_device_train_batch_size: 4
learning_rate: 0.01
use_cpu: true
report_to: none
max_length: 16
"""
TRL = Path(sys.executable).with_name("trl")


@pytest.mark.parametrize("launching", [[], ["--multi_gpu", "--num_processes", "2"]], ids=["one", "two ranks"])
def test_trl_sft(tmp_path: Path, launching: list[str]) -> None:
    save_llama(tmp_path / "base", tied=False)
    (tmp_path / "texts").mkdir()
    save_texts(tmp_path / "texts/train.jsonl")
    (tmp_path / "sft.yml").write_text(SETTINGS)
    command = [sys.executable, "-m", "dare_train", "run", "--dare", "p=0.5", "--dare", "when=end", "--"]
    done = subprocess.run(
        [*command, str(TRL), "sft", "--config", "sft.yml", *launching],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package = DeltaPackage.open(tmp_path / "out/dare/final")
    package.verify(tmp_path / "base")
    theirs = extract(tmp_path / "base", tmp_path / "out/checkpoint-2", tmp_path / "extracted", p=0.5)
    assert package.manifest.result == theirs.manifest.result
