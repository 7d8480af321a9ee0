"""Data sets as batches: the digits, image folders, parquet files, IDX folders and Hugging Face data sets."""

from sepconv.data.augment import Augment as Augment
from sepconv.data.dataset import Data as Data
from sepconv.data.dataset import Split as Split
from sepconv.data.dataset import load as load
from sepconv.data.images import BrokenImage as BrokenImage
from sepconv.data.preprocessing import Crop as Crop
from sepconv.data.preprocessing import Preprocessing as Preprocessing
