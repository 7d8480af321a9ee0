"""What any network takes and gives: the tensors in its arguments and in its outputs, whatever their structure."""

from sepconv.leaves.closeness import Closeness as Closeness
from sepconv.leaves.closeness import LeafScore as LeafScore
from sepconv.leaves.inputs import Inputs as Inputs
from sepconv.leaves.outputs import leaves as leaves
