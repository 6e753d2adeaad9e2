"""`python -m t2r.train CONFIG.yaml [key=value ...]`, for `accelerate launch -m t2r.train`: the command `t2r train`."""

import sys

from t2r.cli.main import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]], prog_name="t2r")
