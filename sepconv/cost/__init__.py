"""What a network costs: parameters, multiply-adds and bytes, in all and per layer."""

from sepconv.cost.meta import count as count
from sepconv.cost.result import Cost as Cost
from sepconv.cost.result import Layer as Layer
from sepconv.cost.result import separable_ratio as separable_ratio
