"""Every net of the zoo, once, for the laws of `test_laws.py` that all nets keep.

A net with the usual face is one call,

    net("gpt2", gpt2, gpt2.Config(vocabulary=31, ...), tokens(31, 8), draws=True)

with a configuration so small that a gradient takes milliseconds; give each choice that changes the code path (with and
without dropout, norm first or last) a line of its own. A net with another face (a generator and its critic, a net in
several parts) is one `Net` per part, with a function in place of the module. `published` states the parameter counts of
its presets. The batch comes from one of the functions of `face`, or any function `(key, n) -> tree of tensors`; tuples
come from `both`. A net goes into the file of its family. Modules to compare with are in `references`.
"""

from tests.registry import classifiers, dense, generative, language, multimodal, superresolution
from tests.registry.face import NETS, PUBLISHED, Net

__all__ = [
    "NETS",
    "PUBLISHED",
    "Net",
    "classifiers",
    "dense",
    "generative",
    "language",
    "multimodal",
    "superresolution",
]
