"""What a model is worth: perplexity beside its teacher, and generated text."""

from t2r.evaluation.generate import GenerationStats, generate_stream
from t2r.evaluation.layers import softmax_gains
from t2r.evaluation.loading import load_model, load_tokenizer, locate, resolve_device
from t2r.evaluation.perplexity import (
    Band,
    PerplexityReport,
    cut_windows,
    evaluate_perplexity,
    render,
    summarise,
    window_nlls,
)
from t2r.evaluation.text import read_text
from t2r.evaluation.verify import Verification, verify_conversion

__all__ = [
    "Band",
    "GenerationStats",
    "PerplexityReport",
    "Verification",
    "cut_windows",
    "evaluate_perplexity",
    "generate_stream",
    "load_model",
    "load_tokenizer",
    "locate",
    "read_text",
    "render",
    "resolve_device",
    "softmax_gains",
    "summarise",
    "verify_conversion",
    "window_nlls",
]
