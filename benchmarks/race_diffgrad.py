"""DiffGrad's step against pytorch_optimizer and torch_optimizer, on large and on many small tensors."""

from __future__ import annotations

from _optimizers import ENTRIES, race_entry
from _timer import main

if __name__ == "__main__":
    main(lambda: race_entry(ENTRIES["diffgrad"]))
