"""Configurations that people published for mergekit: its documentation's, its repository's examples,
        and model
cards'. Models have short names, and eight layers where theirs have 24 to 80; the rest is as it was found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Document = dict[str, Any]
SELF, MLP = "self_attn", "mlp"
S_CURVE, S_MIRRORED = [0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0]


class Public(NamedTuple):
    """One configuration.

    Attributes:
        source: where it was found.
        documents: several for `mergekit-multi`.
    """

    source: str
    documents: tuple[Document, ...]


def m(model: Any, **parameters: Any) -> Document:
    return {"model": model, **({"parameters": parameters} if parameters else {})}


def layers(model: Any, first: int, last: int, **parameters: Any) -> Document:
    return {**m(model, **parameters), "layer_range": [first, last]}


def part(*sources: Document, **keys: Any) -> Document:
    return {"sources": [*sources], **keys}


def cases(*pairs: tuple[str | None, Any]) -> list[Document]:
    return [{"value": value} if of is None else {"filter": of, "value": value} for of, value in pairs]


def doc(merge_method: str, models: list[Any] | None = None, **keys: Any) -> Document:
    listed = {} if models is None else {"models": [m(x) if isinstance(x, str) else x for x in models]}
    return {"merge_method": merge_method, **listed, **keys}


def half_and_half(*names: str) -> list[Document]:
    return [m(name, weight=0.5) for name in names]


_BF16 = {"dtype": "bfloat16"}
_F16 = {"dtype": "float16"}
_CURVES = cases((SELF, S_CURVE), (MLP, S_MIRRORED), (None, 0.5))
_UNION = {"source": "union"}


def _stack(*runs: tuple[str, int, int], **keys: Any) -> Document:
    return doc("passthrough", slices=[part(layers(*run)) for run in runs], **keys)


def _module(*sources: Document) -> Document:
    return {"default": {"slices": [part(*sources)]}}


_EXAMPLES = {
    "bio-merge": doc("ties", [m("a", density=0.5, weight=0.5), m("b", density=0.5, weight=0.5)],
        base_model="base",
        parameters={"normalize": False, "int8_mask": True}, **_F16),
    "gradient-slerp": doc("slerp", slices=[part(layers("a", 0, 8), layers("b", 0, 8))], base_model="a",
        parameters={"t": _CURVES}, **_F16),
    "linear": doc("linear", [m("a", weight=1.0), m("b", weight=0.3), m("c", weight=0.5)], **_F16),
    "ties": doc("ties", [m("a", density=[1, 0.7, 0.1], weight=1.0), m("b", density=0.5, weight=[0, 0.3, 0.7,
        1]),
        m("c", density=0.33, weight=cases((MLP, 0.5), (None, 0)))], base_model="base",
        parameters={"normalize": True, "int8_mask": True}, **_F16),
    "orcamini-platy-44layer": _stack(("a", 0, 5), ("b", 4, 8), **_F16),
    "arcee_fusion": doc("arcee_fusion", ["a", "b"], base_model="a", **_BF16),
    "gpt2-small": _stack(("gpt2", 0, 4), **_F16),
}  # fmt: skip

_DOCUMENTATION = {
    "tokens of a union": doc("dare_ties", [m("chatml", density=1.0, weight=0.5), m("llama3", density=1.0,
        weight=0.5)],
        base_model="base", tokenizer={**_UNION, "tokens": {"<|im_start|>": {"source": "chatml"},
        "<|im_end|>": {"source": "chatml"}, "<|eot_id|>": {"source": "llama3", "force": True}}}, **_BF16),
    "kinds of tokens": doc("linear", [m("chatml", weight=0.6), m("llama3", weight=0.4)],
        tokenizer={**_UNION, "tokens": {
        "<|header|>": {"source": {"kind": "model_token", "model": "chatml", "token": "<|im_start|>"}},
        "<|tune|>": {"source": {"kind": "model_token", "model": "llama3", "token_id": 3}},
        "<|unused|>": {"source": {"kind": "zero"}}}}, **_BF16),
    "padding": doc("linear", half_and_half("base", "chatml"), base_model="base",
        tokenizer={**_UNION, "pad_to_multiple_of": 16}, **_BF16),
    "tokenizer of a model": doc("ties", [m("chatml", density=1, weight=0.5), m("llama3", density=1,
        weight=0.5)],
        base_model="base", tokenizer={"source": "chatml"}, **_BF16),
    "nuslerp by rows": doc("nuslerp", [m("a", weight=0.3), m("b", weight=0.7)],
        parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}, **_BF16),
    "multislerp": doc("multislerp", [m("a", weight=0.3), m("b", weight=0.3), m("c", weight=0.4)],
        base_model="base",
        **_BF16),
    "sce": doc("sce", ["a", "b", "c"], base_model="base", parameters={"select_topk": 0.1}, **_BF16),
    "breadcrumbs": doc("breadcrumbs_ties", [m(x, weight=0.5, density=0.9, gamma=0.01) for x in "ab"],
        base_model="base", parameters={"lambda": 0.9}, **_BF16),
    "nearswap": doc("nearswap", ["a", "b"], base_model="a", parameters={"t": 0.01}, **_BF16),
    "scaled layers": doc("passthrough", slices=[part(layers("a", 0, 4)), part(layers("a", 2, 6,
        scale=cases(("o_proj", 0.5), ("down_proj", 0.5), (None, 1.0)))), part(layers("a", 4, 8))], **_BF16),
    "ram": doc("ramplus_tl", ["a", "b", "c"], base_model="base", parameters={"epsilon": 1e-5, "r": 0.1,
        "alpha": 0.2},
        **_BF16),
}  # fmt: skip

_SERIES = {
    "final one unnamed": (doc("linear", ["base", "a"], name="first-merge", parameters={"weight": 0.5}),
        doc("slerp", ["b"], name="second-merge", base_model="first-merge", parameters={"t": 0.5}),
        doc("task_arithmetic", [m("second-merge", weight=0.5), m("c", weight=0.5)], base_model="base")),
    "all named": (doc("linear", ["one", "two"], name="three", parameters={"weight": 0.5}),
        doc("task_arithmetic", [m("a", weight=0.7)], name="one", base_model="base"),
        doc("slerp", ["b"], name="two", base_model="one", parameters={"t": 0.4})),
    "karcher of a slerp": (doc("slerp", ["b"], name="First", base_model="a", parameters={"normalize": True,
        "t": [0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.6, 0.5, 0.6, 0.6]}, **_BF16),
        doc("karcher", modules=_module(layers("First", 0, 8), layers("c", 0, 8)),
        parameters={"max_iter": 30, "tol": 1e-9}, **_BF16)),
    "della of a karcher": (doc("karcher", ["a", "b"], name="First", parameters={"tol": 1e-10, "max_iter": 30},
        tokenizer=_UNION, **_BF16), doc("della_linear", modules=_module(
        layers("First", 0, 8, density=0.5, epsilon=0.4, weight=[0.9, 0.2, 0.2, 0.2, 0.95, 0.8, 0.4, 0.2]),
        layers("c", 0, 8, density=0.5, epsilon=0.4, weight=[0.1, 0.9, 1.0, 0.95, 0.4, 0.4, 0.5, 0.3]),
        layers("base", 0, 8)), base_model="base", parameters={"lambda": 1.0, "normalize": 1.0},
        tokenizer={}, **_BF16)),
    "stack of results": (doc("linear", [m("a", weight=0.4), m("b", weight=0.6)], name="core"),
        doc("linear", [m("c", weight=0.6), m("d", weight=0.4)], name="blend"),
        _stack(("a", 0, 2), ("core", 2, 5), ("blend", 5, 7), ("d", 7, 8))),
}  # fmt: skip

_DELTAS = {
    "base among the models": doc("task_arithmetic", ["base", m("a", weight=1.0), m("b", weight=0.01),
        m("c", weight=0.02)], base_model="base", **_F16),
    "negative weight": doc("task_arithmetic", [m("a", weight=1.0), m("b", weight=-0.5)], base_model="base",
        parameters={"normalize": False, "lambda": 1.1}, **_BF16),
    "dare_ties": doc("dare_ties", ["base", m("a", density=0.53, weight=0.4), m("b", density=0.53, weight=0.3),
        m("c", density=0.53, weight=0.3)], base_model="base", parameters={"int8_mask": True}, random_seed=0,
        **_BF16),
    "dare_ties by slices": doc("dare_ties", slices=[part(layers("base", 0, 8), layers("a", 0, 8, density=0.6,
        weight=[0.3, 0.5]), layers("b", 0, 8, density=[0.4, 0.8], weight=0.4))], base_model="base",
        parameters={"int8_mask": True, "normalize": True}, **_BF16),
    "dare_ties by modules": doc("dare_ties", modules=_module(layers("a", 0, 8, density=0.5, weight=0.3),
        layers("base", 0, 8, density=0.8, weight=0.8), layers("b", 0, 8, density=0.5, weight=0.1)),
        base_model="base",
        chat_template="auto", out_dtype="bfloat16", tokenizer={}),
    "dare_linear, one weight": doc("dare_linear", ["a", "b"], base_model="base", parameters={"weight": 1.0},
        **_F16),
    "dare_linear, not rescaled": doc("dare_linear", [m("a", weight=1.0, density=1.0), m("b", weight=0.85,
        density=1.0)],
        base_model="base", parameters={"lambda": 1.0, "rescale": False}, **_BF16),
    "della with a template": doc("della", half_and_half("a", "b"), base_model="base",
        parameters={"density": 0.5,
        "normalize": True, "epsilon": 0.4, "lambda": 1}, tokenizer_source="union", chat_template="llama3"),
    "della_linear": doc("della_linear", [m("a", weight=0.2, density=0.5, epsilon=0.4), m("b", weight=0.2,
        density=0.5,
        epsilon=0.4), m("c", weight=0.4, density=0.4, epsilon=0.3)], base_model="base",
        parameters={"lambda": 0.9, "normalize": True}, tokenizer=_UNION, **_BF16),
    "della_linear with filters": doc("della_linear", [m("a", weight=cases((SELF, 0.3), (MLP, 0.2), (None,
        0.25)),
        density=0.65), m("base", weight=0.2, density=0.6), m("b", weight=cases((MLP, 0.35), (None, 0.25)),
        density=0.7)],
        base_model="base", chat_template="chatml", tokenizer_source="union",
        parameters={"normalize": True, "int8_mask": True, "epsilon": 0.05, "lambda": 1}, **_BF16),
    "ties by modules": doc("ties", modules=_module(layers("a", 0, 8, density=0.4, weight=0.25), layers("b",
        0, 8,
        density=0.5, weight=0.35), layers("base", 0, 8, density=0.5, weight=0.3), layers("c", 0, 8,
        density=0.6,
        weight=0.45)), base_model="base", parameters={"normalize": 1.0}, tokenizer={"source": "base"},
        **_BF16),
    "ties of tied models": doc("ties", [m("tied-a", weight=1, density=1), m("tied-b", weight=1, density=1)],
        base_model="tied", parameters={"weight": 1, "density": 1, "normalize": True, "int8_mask": True},
        **_BF16),
    "leftovers at the top": doc("ties", [m("a", weight=0.5, density=0.5), m("b", weight=0.5, density=0.5)],
        base_model="base", parameters={"normalize": True}, out_path="./merged", experiment=True,
        metric_method="scale",
        **_F16),
    "base in slices": doc("task_arithmetic", slices=[part(layers("a", 0, 4, weight=0.6), layers("b", 0, 4,
        weight=0.4),
        base_model="base"), part(layers("a", 4, 8, weight=0.2), layers("c", 4, 8, weight=0.8),
        base_model="base")],
        **_BF16),
    "auto template, tokenizer of a model": doc("task_arithmetic", [m("a", weight=1.0), m("b", weight=0.5)],
        base_model="base", parameters={"normalize": False}, tokenizer={"source": "a"}, chat_template="auto",
        **_BF16),
    "an adapted base alone": doc("task_arithmetic", slices=[part(layers("a+lora-a", 0, 8, weight=1.0))],
        base_model="a+lora-a", parameters={"normalize": False}, **_BF16),
    "adapters of one base": doc("task_arithmetic", [m("base+lora1", weight=1.0), m("base+lora2", weight=1.0)],
        base_model="base", tokenizer_source="union", **_F16),
}  # fmt: skip

_STOCK = {
    "base listed": doc("model_stock", ["a", "b", "c", "base"], base_model="base", **_BF16),
    "by slices": doc("model_stock", slices=[part(layers("base", 0, 8), layers("a", 0, 8), layers("b", 0, 8))],
        base_model="base", **_BF16),
    "weights that are not read": doc("model_stock", [m("a", weight=cases((MLP, [2, 1]), (None, 1))),
        m("b", weight=cases((MLP, [1, 2]), (None, 1))), m("c", weight=1)], base_model="base",
        tokenizer={"source": "base"}, dtype="float32", out_dtype="bfloat16"),
    "named, with a tokenizer": doc("model_stock", ["a", "b", "c"], name="athena", base_model="base",
        tokenizer_source="base", **_BF16),
    "tokenizer of a model": doc("model_stock", ["a", "b", "chatml"], base_model="base",
        tokenizer_source="chatml",
        **_BF16),
    "adapters on an adapted base": doc("model_stock", ["a+lora1", "a+lora2", "a+lora-a"],
        base_model="a+lora1", **_BF16),
}  # fmt: skip

_MEANS = {
    "by modules": doc("linear", modules=_module(layers("a", 0, 8, weight=0.25), layers("b", 0, 8,
        weight=1.0)),
        parameters={"int8_mask": 1.0, "normalize": 1.0}, **_BF16),
    "models as mappings": doc("linear", [m({"model": {"path": "a"}}, weight=0.5),
        m({"model": {"path": "base"}, "lora": {"path": "lora2"}}, weight=0.5)], **_BF16),
    "torch.bfloat16": doc("linear", half_and_half("a", "b"), dtype="torch.bfloat16"),
    "padded rows": doc("linear", half_and_half("a", "wide"), base_model="base", parameters={"weight": 0.2},
        tokenizer_source="base", **_BF16),
    "nuslerp with gradients": doc("nuslerp", [m("a", weight=[0.1, 0.3, 0.1]), m("b", weight=[0.9, 0.7, 0.9])],
        dtype="float32", out_dtype="bfloat16", tokenizer={"source": "b"}),
    "overlapping slices": doc("linear", slices=[part(layers("a", 0, 6, weight=0.5), layers("b", 0, 6,
        weight=0.5)),
        part(layers("a", 2, 8, weight=0.7), layers("b", 2, 8, weight=0.3))], **_BF16),
    "slices of one model each": doc("linear", slices=[part(layers("a", 0, 5, weight=1)), part(layers("b", 3,
        8,
        weight=1))], **_F16),
    "head of one model": doc("linear", slices=[part(layers("a", 0, 4, weight=1), layers("b", 0, 4, weight=0)),
        part(layers("b", 2, 8, weight=1)), part(layers("a", 8, 8, weight=0), layers("b", 8, 8, weight=1))],
        tokenizer_source="a", **_F16),
}  # fmt: skip

_SLERP = {
    "indented": doc("slerp", slices=[part(layers("a", 0, 8), layers("b", 0, 8))], base_model="a",
        parameters={"t": cases((SELF, S_MIRRORED), (MLP, S_CURVE), (None, 0.5))}, **_F16),
    "lists of one": doc("slerp", slices=[part(layers("a", 0, 8), layers("b", 0, 8))], base_model="a",
        parameters={"t": cases(("lm_head", [0.75]), ("embed_tokens", [0.75]), (SELF, [0.75, 0.25]), (MLP,
        [0.25, 0.75]),
        ("layernorm", [0.5, 0.5]), ("modelnorm", [0.75]), (None, 0.5))}, **_BF16),
    "embed_slerp": doc("slerp", slices=[part(layers("a", 0, 8), layers("b", 0, 8))], base_model="a",
        parameters={"t": [0.1, 0.9], "embed_slerp": True}, tokenizer_source="union", **_BF16),
    "with an adapter": doc("slerp", ["base", "a+lora-a"], base_model="base", parameters={"t": 0.5}, **_BF16),
    "layers of other places": doc("slerp", slices=[part(layers("a", 0, 4), layers("b", 4, 8)),
        part(layers("a", 4, 8),
        layers("b", 0, 4))], base_model="a", parameters={"t": 0.3}, **_BF16),
}  # fmt: skip

_STACKS = {
    "four pieces": _stack(("a", 0, 3), ("b", 1, 5), ("a", 3, 6), ("b", 5, 8), **_F16),
    "up-scaled": _stack(("base", 0, 6), ("base", 2, 8), **_BF16),
    "pruned": _stack(("a", 0, 3), ("a", 5, 8), **_BF16),
    "an adapter merged": doc("passthrough", ["base+lora1"], **_BF16),
    "tokenizer of a model": _stack(("a", 0, 4), ("b", 2, 8), tokenizer_source="b", **_BF16),
    "by modules": doc("passthrough", modules={"default": {"slices": [part(layers("a", 0, 4)),
        part(layers("b", 4, 8))]}}, **_BF16),
}  # fmt: skip


def _all() -> dict[str, Public]:
    found = {f"examples/{name}.yml": Public("examples", (one,)) for name, one in _EXAMPLES.items()}
    found |= {f"docs: {name}": Public("documentation", (one,)) for name, one in _DOCUMENTATION.items()}
    found |= {
        f"series: {name}": Public("documentation and cards", several) for name, several in _SERIES.items()
    }
    for kind, of_cards in (
        ("deltas", _DELTAS), ("stock", _STOCK), ("means", _MEANS), ("slerp", _SLERP), ("stack", _STACKS)
    ):  # fmt: skip
        found |= {f"{kind}: {name}": Public("model cards", (one,)) for name, one in of_cards.items()}
    return found


PUBLIC = _all()
