"""Training and distillation, in one process or many, resumable after every epoch."""

from sepconv.train.checkpoint import CheckpointRefused as CheckpointRefused
from sepconv.train.distill import Distillation as Distillation
from sepconv.train.evaluate import Metrics as Metrics
from sepconv.train.evaluate import evaluate as evaluate
from sepconv.train.history import History as History
from sepconv.train.history import Progress as Progress
from sepconv.train.history import TrainingStopped as TrainingStopped
from sepconv.train.loop import train as train
from sepconv.train.mix import Mix as Mix
from sepconv.train.recipe import Recipe as Recipe
from sepconv.train.recipe import default_recipe as default_recipe
