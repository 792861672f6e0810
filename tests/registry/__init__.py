"""Every net of the zoo, once: what `test_laws.py` holds to the laws that all nets keep.

A net with the usual face is one call,

    net("gpt2", gpt2, gpt2.Config(vocabulary=31, ...), tokens(31, 8), draws=True)

with a configuration so small that a gradient takes milliseconds; give each choice that changes the code path (with and
without dropout, norm first or last) a line of its own. What has another face (a generator and its critic, a net in
several parts) is one `Net` a part, with a function in place of the module. `published` says which sizes its presets
must have. The batch is made by one of the makers below, or any function `(key, n) -> tree of tensors`; tuples are made
with `both`. A net goes into the file that says what it is for.
"""

from tests.registry import classifiers, generative, language
from tests.registry.face import NETS, PUBLISHED, Net

__all__ = ["NETS", "PUBLISHED", "Net", "classifiers", "generative", "language"]
