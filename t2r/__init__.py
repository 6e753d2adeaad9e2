"""t2r turns pretrained softmax Transformers into recurrent models with constant memory.

`import t2r` makes `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know the model type "t2r".
"""

import sys
from pathlib import Path

__version__ = "0.1.0"


def _from_adapter(cls, base, adapter):  # noqa: ARG001
    """The model that a finetune has made, of its base and its adapter; see `t2r.training.from_adapter`."""
    from t2r.training import from_adapter

    return from_adapter(base, adapter)


# The console script answers `-h` at once, so there the model waits for a command that needs it.
if Path(*sys.argv[:1]).stem != "t2r":
    from t2r import model as model

    # From here, since the model's own code, which goes with every saved model, knows neither PEFT nor conversion.
    model.T2RForCausalLM.from_adapter = classmethod(_from_adapter)
