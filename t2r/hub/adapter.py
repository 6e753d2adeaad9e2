"""What of a run goes to the Hub when its base need not: adapters and added parameters, and their card."""

from dataclasses import replace
from pathlib import Path

from t2r.hub.card import CARD, card_of, hub_id, own_card
from t2r.hub.contents import Contents
from t2r.hub.facts import model_facts
from t2r.training.portable import base_folder, check_finished, pack
from t2r_conversion.record import read_record


def adapter_contents(run: Path, repo: str, base: str | None = None) -> Contents:
    """A run's adapter with its card.

    Args:
        run: folder of a finished `t2r train`.
        repo: where it goes, "owner/name".
        base: name on the Hub of the model that was converted; None for the one that the record names.

    Raises:
        ValueError: see `pack`; or no base on the Hub is known.
    """
    check_finished(run)
    record = read_record(run)
    source = base or record.get("conversion", {}).get("source")
    if not hub_id(source):
        raise ValueError(f"{run}: no name on the Hub is known of its base ({source}); give --base OWNER/NAME")
    contents = pack(run, source)
    facts = replace(model_facts(base_folder(run)), record=record)
    return contents | {CARD: str(own_card(run) or card_of(facts, repo, source)).encode()}
