"""From a converted model to a finetuned one: configuration, data, objective, trainer, merge and report."""

from t2r.training.config import TrainConfig
from t2r.training.merge import merge
from t2r.training.recipe import load_config
from t2r.training.report import write_report
from t2r.training.run import run

__all__ = ["TrainConfig", "load_config", "merge", "run", "write_report"]
