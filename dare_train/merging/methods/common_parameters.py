"""Parameters that several merge methods take, or one that has a meaning of its own."""

from __future__ import annotations

from math import inf

from .parameters import Parameter

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
COMMON = (WEIGHT, P, Q)
UNWEIGHTED = (P, Q, LAMBDA)


def normalized(default: bool) -> Parameter:
    return Parameter(
        name="normalize",
        kind=bool,
        default=default,
        meaning="divide by the sum of the weights that took part",
    )


def with_default(parameter: Parameter, value: float) -> Parameter:
    return Parameter(**{**vars(parameter), "default": value})


DARE = (WEIGHT, with_default(P, 0.9), Q)
GAMMA = Parameter(
    name="gamma",
    default=0.01,
    between=(0, 1),
    per_model=True,
    meaning="share of the elements, the largest, that are dropped as outliers",
)
EPSILON = Parameter(
    name="epsilon",
    default=0.15,
    per_model=True,
    meaning="drop rates go from p + ε to p - ε as magnitudes grow",
)
LARGEST = with_default(DENSITY, 0.2)
PRUNED = with_default(DENSITY, 0.3)
TALL = (
    Parameter(
        name="mask_threshold",
        default=0.4,
        meaning="λ of the masks: how large a delta must be beside what the others add",
    ),
    Parameter(name="agree", kind=int, default=2, meaning="in how many models' masks an element must be"),
)
FLOOR = Parameter(
    name="floor", default=1e-6, between=(0, inf), meaning="least Fisher information that counts"
)
TOPK = Parameter(
    name="select_topk", default=1.0, between=(0, 1), meaning="share of the elements, those that vary most"
)
T = Parameter(name="t", default=0.5, meaning="where on the arc: 0 is the first model, 1 the second")
OF = Parameter(
    name="of",
    kind=str,
    default="deltas",
    choices=("deltas", "weights"),
    meaning="what is interpolated",
)
MOVES = Parameter(
    name="epsilon", default=1e-5, between=(0, inf), meaning="a model moves what it changes by more than this"
)
