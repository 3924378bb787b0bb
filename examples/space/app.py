"""A Space with the demo of hf_efficient; README.md beside it says what to put into the folder."""

import os

from hf_efficient.demo import Checkpoints, launch


# ids of your own on the Hub may be set as variables of the Space; else the folders of model_cards/ are used
checkpoints = Checkpoints.find(**{name: os.environ.get(name.upper()) for name in ("toe", "kdfs", "pix2pix")})
app = launch(checkpoints)

if __name__ == "__main__":
    app.block_thread()
