"""The architectures of the installed transformers, and those of them that people use most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KINDS = {
    "causal": ("CAUSAL_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "vision": (
        "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION",
        "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION",
        "MASK_GENERATION", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "IMAGE_TO_IMAGE", "IMAGE_MATTING",
        "POSE_ESTIMATION", "NORMAL_ESTIMATION", "POINTMAP_ESTIMATION", "MASKED_IMAGE_MODELING", "BACKBONE",
        "TEXT_RECOGNITION",
    ),
    "audio": (
        "CTC", "SPEECH_SEQ_2_SEQ", "AUDIO_CLASSIFICATION", "RNNT", "TDT", "TEXT_TO_SPECTROGRAM",
        "TEXT_TO_WAVEFORM",
    ),
    "multimodal": (
        "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "VISUAL_QUESTION_ANSWERING", "ZERO_SHOT_IMAGE_CLASSIFICATION",
    ),
    "classification": ("SEQUENCE_CLASSIFICATION",),
    "other": ("TIME_SERIES_PREDICTION", "DECISION", "PRETRAINING", "RETRIEVAL"),
}  # fmt: skip
"""By kind, transformers' mappings; of a model type the first class counts that one of them has."""
_ELSE = ("classification", "other")
"""Kinds that count where a model type has no class of the kinds before: theirs differ by a head."""

BARE = "bare"
"""Classes without a head, of model types that have no class of another kind."""

MOST_USED = (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForConditionalGeneration", "Phi3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
    "OPTForCausalLM",
    "BloomForCausalLM", "FalconForCausalLM", "MambaForCausalLM", "SmolLM3ForCausalLM", "MixtralForCausalLM",
    "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "BertForMaskedLM",
    "RobertaForMaskedLM",
    "XLMRobertaForMaskedLM", "DistilBertForMaskedLM", "AlbertForMaskedLM", "DebertaV2ForMaskedLM",
    "ElectraForMaskedLM", "ModernBertForMaskedLM", "MPNetForMaskedLM", "NomicBertForMaskedLM",
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "PegasusForConditionalGeneration",
    "M2M100ForConditionalGeneration", "ViTForImageClassification", "Dinov2ForImageClassification",
    "SegformerForImageClassification", "CLIPModel", "WhisperForConditionalGeneration", "Wav2Vec2ForCTC",
    "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration",
)  # fmt: skip
"""The 40 that the tests try: families that many people use, and one for each way in which
files are laid out otherwise than modules."""


@dataclass(frozen=True)
class Architecture:
    name: str
    """Of its class."""
    kind: str
    model_type: str

    @property
    def model_class(self) -> Any:
        import transformers

        return getattr(transformers, self.name)


def architectures() -> list[Architecture]:
    """All of them, sorted by name."""
    found: dict[str, Architecture] = {}
    seen: set[str] = set()
    for kind, mappings in KINDS.items():
        known = set(seen)
        for model_type, names in _mapped(mappings):
            seen.add(model_type)
            for name in names if kind not in _ELSE or model_type not in known else ():
                found.setdefault(name, Architecture(name, kind, model_type))
    for model_type, names in _mapped(("",)):
        if model_type not in seen:
            found.setdefault(names[0], Architecture(names[0], BARE, model_type))
    return sorted(found.values(), key=lambda one: one.name)


def named(name: str) -> Architecture:
    return next(one for one in architectures() if one.name == name)


def _mapped(mappings: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """(model type, classes) of mappings; of a type, those of the first that has it."""
    from transformers.models.auto import modeling_auto

    seen: set[str] = set()
    for mapping in mappings:
        name = f"MODEL_FOR_{mapping}_MAPPING_NAMES" if mapping else "MODEL_MAPPING_NAMES"
        for model_type, classes in getattr(modeling_auto, name).items():
            if model_type not in seen:
                seen.add(model_type)
                yield model_type, [classes] if isinstance(classes, str) else list(classes)[:1]
