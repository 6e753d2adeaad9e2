"""t2r turns pretrained softmax Transformers into recurrent models with constant memory.

`import t2r` makes `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know the model type "t2r".
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# The console script answers `-h` at once, so there the model waits for a command that needs it.
if Path(*sys.argv[:1]).stem != "t2r":
    from t2r import model as model
