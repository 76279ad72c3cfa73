"""The table of merge methods: what each of them drops, how it combines what is left, and what it can be
told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from ...errors import ConfigError
from . import combinations, matrices
from . import elementwise as elements
from .parameters import Parameter

Dropping = Literal["none", "random", "magnitude", "outliers", "magprune"]
"""How elements of each delta are chosen before the method combines them; `drops` has the rules."""

Reach = Literal["elements", "coefficients", "matrix", "tensor"]
"""What the function is given: any run of elements; the Gram matrix of the vectors that it combines; the
matrix of a linear layer, with those of its inputs; or whole tensors in their shapes."""


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
    """Names of those parameters that the function takes."""
    drops: Dropping = "none"
    space: Literal["deltas", "weights"] = "deltas"
    """What a method of coefficients combines."""
    needs: Literal["fisher", "gram", "undropped", "variance"] | None = None
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


WEIGHT = Parameter(name="weight", default=1.0, per_model=True, meaning="factor w of the model")
P = Parameter(
    name="p",
    default=0.0,
    per_model=True,
    meaning="drop rate: DARE before the method, on deltas of which nothing was dropped yet",
)
Q = Parameter(
    name="q", default=0.0, between=(0, 1), per_model=True,
    meaning="survivors are multiplied by 1/q where the rescale rule is q; 0: worked out",
)  # fmt: skip
LAMBDA = Parameter(name="lambda", default=1.0, meaning="factor of the merged delta")
DENSITY = Parameter(
    name="density",
    default=1.0,
    between=(0, 1),
    per_model=True,
    meaning="share of each tensor's elements that are kept",
)
_COMMON = (WEIGHT, P, Q)


def _normalize(default: bool) -> Parameter:
    return Parameter(
        name="normalize",
        kind=bool,
        default=default,
        meaning="divide by the sum of the weights that took part",
    )


def _default(parameter: Parameter, value: float) -> Parameter:
    return Parameter(**{**vars(parameter), "default": value})


_DARE = (WEIGHT, _default(P, 0.9), Q)
_GAMMA = Parameter(
    name="gamma",
    default=0.01,
    between=(0, 1),
    per_model=True,
    meaning="share of the elements, the largest, that are dropped as outliers",
)
_EPSILON = Parameter(
    name="epsilon",
    default=0.15,
    per_model=True,
    meaning="drop rates go from p + ε to p - ε as magnitudes grow",
)
_LARGEST = _default(DENSITY, 0.2)
_PRUNED = _default(DENSITY, 0.3)
_TALL = (
    Parameter(
        name="mask_threshold",
        default=0.4,
        meaning="λ of the masks: how large a delta must be beside what the others add",
    ),
    Parameter(name="agree", kind=int, default=2, meaning="in how many models' masks an element must be"),
)
_FLOOR = Parameter(
    name="floor", default=1e-6, between=(0, inf), meaning="least Fisher information that counts"
)
_TOPK = Parameter(
    name="select_topk", default=1.0, between=(0, 1), meaning="share of the elements, those that vary most"
)
_SUM: dict[str, Any] = dict(
    function=combinations.task_arithmetic, reach="coefficients", arguments=("normalize",)
)
_ELECTED: dict[str, Any] = dict(function=elements.ties, reach="elements", arguments=("normalize",))
_T = Parameter(name="t", default=0.5, meaning="where on the arc: 0 is the first model, 1 the second")

_BUILT_IN = [
    Method(
        name="average",
        function=combinations.average,
        reach="coefficients",
        space="weights",
        parameters=(*_COMMON, _normalize(True)),
        arguments=("normalize",),
    ),
    Method(name="task_arithmetic", **_SUM, parameters=(*_COMMON, LAMBDA, _normalize(False))),
    Method(
        name="ties", **_ELECTED, drops="magnitude", parameters=(*_COMMON, LAMBDA, _LARGEST, _normalize(True))
    ),
    Method(
        name="fisher",
        function=elements.fisher,
        reach="elements",
        needs="fisher",
        arguments=("floor",),
        parameters=(*_COMMON, LAMBDA, _FLOOR),
    ),
    Method(
        name="regmean",
        function=matrices.regmean,
        reach="matrix",
        needs="gram",
        arguments=("shrink", "ridge"),
        parameters=(
            *_COMMON,
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
    Method(name="dare_linear", **_SUM, parameters=(*_DARE, LAMBDA, _normalize(False))),
    Method(name="dare_ties", **_ELECTED, parameters=(*_DARE, LAMBDA, _normalize(False))),
    Method(name="drop_only", **_SUM, rescale="none", parameters=(*_DARE, LAMBDA, _normalize(False))),
    Method(
        name="magnitude",
        **_SUM,
        drops="magnitude",
        parameters=(*_COMMON, LAMBDA, _default(DENSITY, 0.1), _normalize(False)),
    ),
    Method(
        name="breadcrumbs",
        **_SUM,
        drops="outliers",
        parameters=(*_COMMON, LAMBDA, DENSITY, _GAMMA, _normalize(False)),
    ),
    Method(
        name="breadcrumbs_ties",
        **_ELECTED,
        drops="outliers",
        parameters=(*_COMMON, LAMBDA, DENSITY, _GAMMA, _normalize(False)),
    ),
    Method(
        name="della",
        **_ELECTED,
        drops="magprune",
        parameters=(*_COMMON, LAMBDA, _PRUNED, _EPSILON, _normalize(True)),
    ),
    Method(
        name="della_linear",
        **_SUM,
        drops="magprune",
        parameters=(*_COMMON, LAMBDA, _PRUNED, _EPSILON, _normalize(False)),
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
        parameters=(P, Q, _T),
        arguments=("t",),
    ),
    Method(
        name="nuslerp",
        function=combinations.nuslerp,
        reach="coefficients",
        models=(2, 2),
        parameters=(
            *_COMMON,
            Parameter(
                name="of",
                kind=str,
                default="deltas",
                choices=("deltas", "weights"),
                meaning="what is interpolated",
            ),
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
            *_COMMON,
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
        parameters=(P, Q, LAMBDA, _TOPK),
    ),
    Method(
        name="consensus_ta",
        function=elements.consensus_ta,
        reach="elements",
        needs="undropped",
        parameters=(*_COMMON, LAMBDA, *_TALL),
        arguments=("mask_threshold", "agree"),
    ),
    Method(
        name="consensus_ties",
        function=elements.consensus_ties,
        reach="elements",
        needs="undropped",
        drops="magnitude",
        parameters=(*_COMMON, LAMBDA, _LARGEST, _normalize(True), *_TALL),
        arguments=("normalize", "mask_threshold", "agree"),
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
        "none": (), "random": (), "magnitude": (DENSITY,), "outliers": (DENSITY, _GAMMA),
        "magprune": (DENSITY, _EPSILON),
    }  # fmt: skip
    if drops not in extra:
        raise ConfigError("drops", expected=f"one of {', '.join(extra)}", found=repr(drops))
    further = tuple(
        Parameter(name=key, kind=type(value), default=value) for key, value in (parameters or {}).items()
    )
    common = (WEIGHT, _default(P, 0.9) if drops == "random" else P, Q)
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
