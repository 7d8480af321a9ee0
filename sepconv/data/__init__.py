"""Data sets as batches: the digits, image folders, parquet files, IDX folders, Hugging Face data sets, sample files."""

from sepconv.data.augment import Augment as Augment
from sepconv.data.dataset import Data as Data
from sepconv.data.dataset import Split as Split
from sepconv.data.dataset import load as load
from sepconv.data.images import BrokenImage as BrokenImage
from sepconv.data.preprocessing import Crop as Crop
from sepconv.data.preprocessing import Preprocessing as Preprocessing
from sepconv.data.samples import LoaderSplit as LoaderSplit
from sepconv.data.samples import SampleData as SampleData
from sepconv.data.samples import SampleFiles as SampleFiles
from sepconv.data.samples import Samples as Samples
from sepconv.data.samples import load_samples as load_samples
