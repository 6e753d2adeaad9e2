"""Models on their way out: what a folder holds, its model card, and its upload."""

from t2r.hub.card import build_card, own_card
from t2r.hub.facts import ModelFacts, model_facts
from t2r.hub.push import Push, push

__all__ = ["ModelFacts", "Push", "build_card", "model_facts", "own_card", "push"]
