"""The network: configuration, modeling, starts (gates) and cache. Flat, so that it can be exported whole.

Importing it registers the model type "t2r" with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from t2r.model.cache import T2RCache
from t2r.model.configuration_t2r import (
    HYBRID_ATTENTION,
    LINEAR_ATTENTION,
    SLOT_ATTENTION,
    SOFTMAX_ATTENTION,
    T2RConfig,
)
from t2r.model.modeling_t2r import T2RForCausalLM, T2RModel, T2RPreTrainedModel
from t2r.model.starts import STARTS, new_parameters, new_tensors

AutoConfig.register(T2RConfig.model_type, T2RConfig)
AutoModel.register(T2RConfig, T2RModel)
AutoModelForCausalLM.register(T2RConfig, T2RForCausalLM)

__all__ = [
    "HYBRID_ATTENTION",
    "LINEAR_ATTENTION",
    "SLOT_ATTENTION",
    "SOFTMAX_ATTENTION",
    "STARTS",
    "T2RCache",
    "T2RConfig",
    "T2RForCausalLM",
    "T2RModel",
    "T2RPreTrainedModel",
    "new_parameters",
    "new_tensors",
]
