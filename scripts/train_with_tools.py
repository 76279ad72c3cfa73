"""What `scripts/integrations` runs in a tool's own environment: tiny trainings, and whether their packages
are what was saved.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from worded_models import save_llama, save_texts

from dare_train import DeltaPackage, extract

VERSIONS = ("transformers", "trl", "peft", "accelerate", "torch", "zstandard", "huggingface_hub")

AXOLOTL = """
base_model: ./base
plugins:
  - dare_train.integrations.axolotl.DarePlugin
dare:
  p: 0.5
  when: [save, end]
datasets:
  - path: ./texts.jsonl
    ds_type: json
    type: completion
output_dir: ./plugin
dataset_prepared_path: ./prepared
sequence_len: 16
micro_batch_size: 4
gradient_accumulation_steps: 1
max_steps: 2
save_steps: 2
optimizer: adamw_torch
learning_rate: 0.01
bf16: false
fp16: false
tf32: false
val_set_size: 0
"""
LLAMA_FACTORY = """
model_name_or_path: ./base
stage: pt
do_train: true
finetuning_type: full
dataset: texts
dataset_dir: .
template: default
cutoff_len: 16
output_dir: ./OUT
max_steps: 2
save_steps: 2
per_device_train_batch_size: 4
learning_rate: 0.01
report_to: none
use_cpu: true
"""
IN_PYTHON = """
import yaml
from llamafactory.train.tuner import run_exp
from dare_train import DareCallback

run_exp(yaml.safe_load(open("python.yml")), callbacks=[DareCallback(p=0.5)])
"""
RUN = ["dare-train", "run", "--dare", "p=0.5", "--"]


def command(words: list[str], *, expecting: int = 0, **environment: str) -> str:
    """Run it; what it said, if it ended as expected."""
    env = {**os.environ, **environment}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode != expecting:
        sys.exit(f"{done.stdout}{done.stderr}\nFAIL {' '.join(words)}: exit code {done.returncode}")
    return done.stdout + done.stderr


def check(out: str) -> None:
    """Whether a training's packages are those of what it saved."""
    for name, tuned in (("step-2", f"{out}/checkpoint-2"), ("final", out)):
        package = DeltaPackage.open(f"{out}/dare/{name}")
        package.verify("base")
        again = extract("base", tuned, "extracted", p=0.5, overwrite=True)
        if package.manifest.result != again.manifest.result:
            sys.exit(f"FAIL {package.path}: expected the package of {tuned}, found another")


def axolotl() -> list[str]:
    Path("plugin.yml").write_text(AXOLOTL)
    command(["axolotl", "train", "plugin.yml", "--launcher", "python"])
    check("plugin")
    Path("wrong.yml").write_text(AXOLOTL.replace("  p: 0.5", "  pp: 0.5"))
    said = command(["axolotl", "train", "wrong.yml", "--launcher", "python"], expecting=1)
    if "pp: expected an argument of DareCallback" not in said:
        sys.exit(f"{said}\nFAIL wrong.yml: expected a refusal of pp")
    return ["plugin", "wrong option refused"]


def llamafactory() -> list[str]:
    Path("dataset_info.json").write_text(
        json.dumps({"texts": {"file_name": "texts.jsonl", "columns": {"prompt": "text"}}})
    )
    for out in ("one", "two", "python"):
        Path(f"{out}.yml").write_text(LLAMA_FACTORY.replace("OUT", out))
    command([*RUN, "llamafactory-cli", "train", "one.yml"])
    check("one")
    command([*RUN, "llamafactory-cli", "train", "two.yml"], FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    check("two")
    command([sys.executable, "-c", IN_PYTHON])
    check("python")
    return ["dare-train run", "dare-train run on two ranks", "run_exp(callbacks=)"]


TOOLS: dict[str, Callable[[], list[str]]] = {"axolotl": axolotl, "llamafactory": llamafactory}


def main() -> None:
    tool = sys.argv[1]
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        save_llama(Path("base"), tied=False)
        save_texts(Path("texts.jsonl"))
        ways = TOOLS[tool]()
        os.chdir("/")
    print(f"PASS {tool} {version(tool)}: {', '.join(ways)} ({versions}, Python {platform.python_version()})")


if __name__ == "__main__":
    main()
