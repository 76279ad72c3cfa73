"""The table of merge methods: what each of them drops, how it combines what is left, and what it can be
told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from ...errors import ConfigError
from . import combinations, interference, matrices, spectra
from . import elementwise as elements
from .common_parameters import (
    COMMON,
    DARE,
    DENSITY,
    EPSILON,
    FLOOR,
    GAMMA,
    LAMBDA,
    LARGEST,
    MOVES,
    OF,
    PRUNED,
    TALL,
    TOPK,
    UNWEIGHTED,
    WEIGHT,
    P,
    Q,
    T,
    normalized,
    with_default,
)
from .parameters import Parameter

Dropping = Literal["none", "random", "magnitude", "outliers", "magprune"]
"""How elements of each delta are chosen before the method combines them; `drops` has the rules."""

Reach = Literal["elements", "coefficients", "matrix", "tensor"]
"""What the function is given: any run of elements; the Gram matrix of the vectors that it combines; matrices,
with those of their inputs where it `needs` them, while what is no matrix is averaged; or whole tensors in
their shapes."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to merge."""

    name: str
    function: Callable[..., Any]
    """Called with deltas (or a Gram matrix) and weights, and with `arguments` by name."""
    reach: Reach
    parameters: tuple[Parameter, ...] = ()
    """All that a recipe may say for it."""
    arguments: tuple[str, ...] = ()
    """Names of those parameters that the function takes, and of what is worked out for it like one."""
    drops: Dropping = "none"
    space: Literal["deltas", "weights"] = "deltas"
    """What a method of coefficients combines."""
    needs: Literal["fisher", "gram", "undropped", "variance", "importance", "overlap", "task"] | None = None
    """What the function is given besides."""
    rescale: Literal["none"] | None = None
    """The rule that is the method's own, whatever the recipe says."""
    models: tuple[int, int | None] = (1, None)
    """Fewest and most models."""

    @property
    def needs_gram(self) -> bool:
        """Whether its coefficients depend on the vectors."""
        return self.reach == "coefficients" and self.function not in (
            combinations.average,
            combinations.task_arithmetic,
        )


_SUM: dict[str, Any] = dict(
    function=combinations.task_arithmetic, reach="coefficients", arguments=("normalize",)
)
_ELECTED: dict[str, Any] = dict(function=elements.ties, reach="elements", arguments=("normalize",))

_BUILT_IN = [
    Method(
        name="average",
        function=combinations.average,
        reach="coefficients",
        space="weights",
        parameters=(*COMMON, normalized(True)),
        arguments=("normalize",),
    ),
    Method(name="task_arithmetic", **_SUM, parameters=(*COMMON, LAMBDA, normalized(False))),
    Method(
        name="ties", **_ELECTED, drops="magnitude", parameters=(*COMMON, LAMBDA, LARGEST, normalized(True))
    ),
    Method(
        name="fisher",
        function=elements.fisher,
        reach="elements",
        needs="fisher",
        arguments=("floor",),
        parameters=(*COMMON, LAMBDA, FLOOR),
    ),
    Method(
        name="regmean",
        function=matrices.regmean,
        reach="matrix",
        needs="gram",
        arguments=("shrink", "ridge"),
        parameters=(
            *COMMON,
            LAMBDA,
            Parameter(name="shrink", default=0.9, meaning="factor α of the Gram matrices off the diagonal"),
            Parameter(
                name="ridge",
                default=1e-6,
                between=(0, inf),
                meaning="added to each diagonal, as a share of its mean",
            ),
        ),
    ),
    Method(name="dare_linear", **_SUM, parameters=(*DARE, LAMBDA, normalized(False))),
    Method(name="dare_ties", **_ELECTED, parameters=(*DARE, LAMBDA, normalized(False))),
    Method(name="drop_only", **_SUM, rescale="none", parameters=(*DARE, LAMBDA, normalized(False))),
    Method(
        name="magnitude",
        **_SUM,
        drops="magnitude",
        parameters=(*COMMON, LAMBDA, with_default(DENSITY, 0.1), normalized(False)),
    ),
    Method(
        name="breadcrumbs",
        **_SUM,
        drops="outliers",
        parameters=(*COMMON, LAMBDA, DENSITY, GAMMA, normalized(False)),
    ),
    Method(
        name="breadcrumbs_ties",
        **_ELECTED,
        drops="outliers",
        parameters=(*COMMON, LAMBDA, DENSITY, GAMMA, normalized(False)),
    ),
    Method(
        name="della",
        **_ELECTED,
        drops="magprune",
        parameters=(*COMMON, LAMBDA, PRUNED, EPSILON, normalized(True)),
    ),
    Method(
        name="della_linear",
        **_SUM,
        drops="magprune",
        parameters=(*COMMON, LAMBDA, PRUNED, EPSILON, normalized(False)),
    ),
    Method(
        name="model_stock",
        function=combinations.model_stock,
        reach="coefficients",
        models=(2, None),
        parameters=(
            P,
            Q,
            Parameter(
                name="filter_wise",
                kind=bool,
                default=False,
                meaning="one ratio for each row instead of each tensor",
            ),
        ),
    ),
    Method(
        name="slerp",
        function=combinations.slerp,
        reach="coefficients",
        space="weights",
        models=(2, 2),
        parameters=(P, Q, T),
        arguments=("t",),
    ),
    Method(
        name="nuslerp",
        function=combinations.nuslerp,
        reach="coefficients",
        models=(2, 2),
        parameters=(
            *COMMON,
            OF,
            Parameter(name="nuslerp_flatten", kind=bool, default=True, meaning="one angle for the tensor"),
            Parameter(
                name="nuslerp_row_wise",
                kind=bool,
                default=False,
                meaning="not flattened: an angle along the first dimension",
            ),
        ),
    ),
    Method(
        name="karcher",
        function=combinations.karcher,
        reach="coefficients",
        space="weights",
        parameters=(
            *COMMON,
            Parameter(name="max_iter", kind=int, default=10, between=(0, inf), meaning="most steps"),
            Parameter(name="tol", default=1e-5, meaning="a step shorter than this is the last"),
        ),
        arguments=("max_iter", "tol"),
    ),
    Method(
        name="sce",
        function=elements.sce,
        reach="elements",
        needs="variance",
        parameters=(*UNWEIGHTED, TOPK),
    ),
    Method(
        name="consensus_ta",
        function=elements.consensus_ta,
        reach="elements",
        needs="undropped",
        parameters=(*COMMON, LAMBDA, *TALL),
        arguments=("mask_threshold", "agree"),
    ),
    Method(
        name="consensus_ties",
        function=elements.consensus_ties,
        reach="elements",
        needs="undropped",
        drops="magnitude",
        parameters=(*COMMON, LAMBDA, LARGEST, normalized(True), *TALL),
        arguments=("normalize", "mask_threshold", "agree"),
    ),
    Method(
        name="nearswap",
        function=elements.nearswap,
        reach="elements",
        models=(1, 1),
        parameters=(
            *UNWEIGHTED,
            Parameter(
                name="t", default=1e-4, between=(0, inf), meaning="how far an element may move from the base"
            ),
        ),
        arguments=("t",),
    ),
    Method(
        name="arcee_fusion",
        function=elements.arcee_fusion,
        reach="elements",
        needs="importance",
        models=(1, 1),
        parameters=UNWEIGHTED,
    ),
    Method(
        name="multislerp",
        function=combinations.multislerp,
        reach="coefficients",
        parameters=(
            *COMMON,
            OF,
            Parameter(
                name="normalize_weights", kind=bool, default=True, meaning="divide the weights by their sum"
            ),
            Parameter(name="eps", default=1e-8, between=(0, inf), meaning="added to the vectors' lengths"),
        ),
        arguments=("normalize_weights", "eps"),
    ),
    Method(
        name="ram",
        function=elements.ram,
        reach="elements",
        parameters=(*UNWEIGHTED, MOVES),
        arguments=("epsilon",),
    ),
    Method(
        name="ramplus_tl",
        function=elements.ramplus_tl,
        reach="elements",
        needs="overlap",
        parameters=(
            *UNWEIGHTED,
            MOVES,
            Parameter(name="r", default=0.1, meaning="how much more counts what only one model moves"),
            Parameter(
                name="alpha", default=0.2, between=(0, inf), meaning="most of shared to unique that counts"
            ),
        ),
        arguments=("epsilon",),
    ),
    Method(
        name="emr",
        function=elements.emr,
        reach="elements",
        needs="task",
        parameters=(
            *UNWEIGHTED,
            Parameter(
                name="task",
                kind=int,
                default=0,
                between=(0, inf),
                meaning="whose mask and factor: 1 is the first model, 0 none's",
            ),
        ),
        arguments=("task", "factor"),
    ),
    Method(name="tsv", function=spectra.tsv, reach="matrix", parameters=UNWEIGHTED),
    Method(name="iso_c", function=spectra.iso_c, reach="matrix", parameters=UNWEIGHTED),
    Method(
        name="iso_cts",
        function=spectra.iso_cts,
        reach="matrix",
        parameters=(
            *UNWEIGHTED,
            Parameter(
                name="common_space_fraction",
                default=0.8,
                between=(0, 1),
                meaning="share of the directions that are the sum's",
            ),
        ),
        arguments=("common_space_fraction",),
    ),
    Method(
        name="wudi",
        function=interference.wudi,
        reach="matrix",
        parameters=(
            *UNWEIGHTED,
            Parameter(name="steps", kind=int, default=300, between=(0, inf), meaning="steps of Adam"),
            Parameter(name="learning_rate", default=1e-5, between=(0, inf), meaning="of Adam"),
        ),
        arguments=("steps", "learning_rate"),
    ),
]

MERGE_METHODS: dict[str, Method] = {method.name: method for method in _BUILT_IN}
"""Methods by name."""


def register_merge_method(
    name: str,
    function: Callable[..., Any],
    *,
    reach: Literal["elements", "tensor"] = "tensor",
    parameters: Mapping[str, float | int | bool | str] | None = None,
    drops: Dropping = "none",
) -> None:
    """Add a method of your own to the table, by which `merge(method=name)` and recipes find it.

    Args:
        name: not one that is taken.
        function: called for each tensor as `function(deltas, weights, **parameters)`; returns the merged
            delta. `deltas`: numpy, float32 (float64 for float64 tensors), [n, *shape] with `reach="tensor"`,
            and [n, k], any k elements of a tensor, with `reach="elements"`, which streams and costs what was
            kept. Elements that no model moves may be left out then, so it must give zero for them.
            `weights`: [n]. It must not change its arguments.
        parameters: further parameters and their defaults, which recipes may set by tensor and layer.
        drops: dropped before it is called, with `density` (`magnitude`, `outliers`, `magprune`); `p` works
            with every method.

    Raises:
        ConfigError: the name is taken, or a choice does not exist.
    """
    if name in MERGE_METHODS:
        raise ConfigError("name", expected="one that is not taken", found=repr(name))
    if reach not in ("elements", "tensor"):
        raise ConfigError("reach", expected="elements or tensor", found=repr(reach))
    extra: dict[Dropping, tuple[Parameter, ...]] = {
        "none": (), "random": (), "magnitude": (DENSITY,), "outliers": (DENSITY, GAMMA),
        "magprune": (DENSITY, EPSILON),
    }  # fmt: skip
    if drops not in extra:
        raise ConfigError("drops", expected=f"one of {', '.join(extra)}", found=repr(drops))
    further = tuple(
        Parameter(name=key, kind=type(value), default=value) for key, value in (parameters or {}).items()
    )
    common = (WEIGHT, with_default(P, 0.9) if drops == "random" else P, Q)
    rule: Dropping = "none" if drops == "random" else drops
    MERGE_METHODS[name] = Method(
        name=name, function=function, reach=reach, drops=rule,
        parameters=(*common, LAMBDA, *extra[drops], *further), arguments=tuple(parameters or {}),
    )  # fmt: skip


def method_of(name: str) -> Method:
    """The method of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in MERGE_METHODS:
        raise ConfigError("method", expected=f"one of {', '.join(sorted(MERGE_METHODS))}", found=repr(name))
    return MERGE_METHODS[name]
