"""From a converted model to a trained one: recipes, data, objectives, stages, trainer, merge and report."""

from t2r.training.config import TrainConfig
from t2r.training.merge import merge
from t2r.training.plan import Plan, plan_run, render
from t2r.training.portable import from_adapter
from t2r.training.recipe import load_config
from t2r.training.report import write_report
from t2r.training.run import dry_run, leave_the_others, run
from t2r.training.watch import Terminated

__all__ = [
    "Plan",
    "Terminated",
    "TrainConfig",
    "dry_run",
    "from_adapter",
    "leave_the_others",
    "load_config",
    "merge",
    "plan_run",
    "render",
    "run",
    "write_report",
]
