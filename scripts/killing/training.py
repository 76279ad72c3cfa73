"""A training that writes packages and forgets old ones, killed in it, and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .scenarios import Scenario, State

_STEPS = 8


def of_training(inputs: Path) -> list[Scenario]:
    """A Trainer with `DareCallback(when=(2, "end"), keep=2)`: the next run goes on from its last
    checkpoint.
    """
    import torch
    import transformers

    from dare_train import DareCallback, DeltaPackage
    from dare_train.errors import DareError

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    transformers.set_seed(0)
    base = inputs / "llama"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(base)
    rows = [{"input_ids": torch.arange(6) + n, "labels": torch.arange(6) + n} for n in range(16)]
    results: dict[str, str] = {}

    def act(place: Path) -> None:
        transformers.set_seed(0)
        arguments = transformers.TrainingArguments(
            output_dir=str(place / "run"), max_steps=_STEPS, per_device_train_batch_size=2, save_steps=3,
            logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        callback = DareCallback(p=0.5, when=(2, "end"), keep=2)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=_last_whole(place / "run"))
        assert trainer.state.global_step == _STEPS, "the training ended early"

    def prepare(place: Path) -> None:
        if not results:
            act(place)
            found = {path.name: DeltaPackage.open(path).manifest.result for path in _packages(place)}
            assert set(found) == {"step-6", "step-8", "final"}, sorted(found)
            results.update(found)
            shutil.rmtree(place)
            place.mkdir()

    def state(place: Path) -> State:
        found = {}
        for path in _packages(place):
            try:
                package = DeltaPackage.open(path)
                package.check_integrity()
            except DareError as error:
                return f"half: {error}"
            found[path.name] = package.manifest.result
        wrong = [name for name, result in found.items() if results.get(name, result) != result]
        if wrong:
            return f"another {wrong[0]}"
        return "new" if "final" in found else "going on"  # a step whose snapshot failed is not made up

    return [
        Scenario(
            name="training, forgetting and resuming",
            act=act,
            prepare=prepare,
            state=state,
            allowed=frozenset({"going on", "new"}),
            below="run/dare",
            slow=True,
        )
    ]


def _packages(place: Path) -> list[Path]:
    folder = place / "run" / "dare"
    return [*sorted(folder.glob("step-*")), *folder.glob("final")] if folder.is_dir() else []


def _last_whole(run: Path) -> str | None:
    """The last checkpoint that the Trainer had finished: it writes them in place, its state last."""
    whole = []
    for state in run.glob("checkpoint-*/trainer_state.json"):
        try:
            json.loads(state.read_text())
        except ValueError:
            continue
        whole.append(str(state.parent))
    return max(whole, default=None)
