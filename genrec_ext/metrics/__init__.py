"""How good and how varied a set of ranked recommendations is.

Every figure is computed from `items [U, K]`: one row a user, best first, internal item ids, -1
where there is no recommendation. Arrays in, floats out; nothing is trained and nothing is read.
Arrays may be numpy's or tensors on any device.

What has a value for each user is returned user by user, so that it can be averaged, bootstrapped,
paired or split by groups of users. There is one target a user, so Recall@K is the hit rate and the
ideal DCG is 1.

Collisions. Where several items share one semantic ID, a model that generates that ID has not said
which of them it means. Given `group` (see `collision_groups`) any item of the target's group counts
as found at the rank of the group's first item, with credit 1/size of the group: half-right at most,
and no more when a decoder lists the whole group.
"""

from ._arrays import Array
from .accuracy import (
    DISCOUNTS,
    ambiguous_hits,
    cold_recall,
    collision_groups,
    gain,
    hits,
    mrr,
    ndcg,
    prefix_survival,
    recall,
)
from .intervals import (
    Difference,
    bootstrap,
    list_bootstrap,
    paired_bootstrap,
    paired_list_bootstrap,
)
from .popularity import (
    HEAD,
    MIDDLE,
    RARE,
    TAIL,
    miscalibration,
    popularity_groups,
    popularity_lift,
    tail_share,
)
from .summary import OF_A_LIST, evaluate_rankings, of_lists
from .variety import (
    SPREADS,
    coverage,
    entropy,
    gini,
    intra_list_diversity,
    invalid_rate,
    list_entropy,
)

__all__ = [
    "DISCOUNTS",
    "HEAD",
    "MIDDLE",
    "OF_A_LIST",
    "RARE",
    "SPREADS",
    "TAIL",
    "Array",
    "Difference",
    "ambiguous_hits",
    "bootstrap",
    "cold_recall",
    "collision_groups",
    "coverage",
    "entropy",
    "evaluate_rankings",
    "gain",
    "gini",
    "hits",
    "intra_list_diversity",
    "invalid_rate",
    "list_bootstrap",
    "list_entropy",
    "miscalibration",
    "mrr",
    "ndcg",
    "of_lists",
    "paired_bootstrap",
    "paired_list_bootstrap",
    "popularity_groups",
    "popularity_lift",
    "prefix_survival",
    "recall",
    "tail_share",
]
