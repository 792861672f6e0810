"""Settings of torch.compile for a program."""

import os

import torch


def configure() -> None:
    """Keep inductor's cache in a folder of this processor's instruction set, and start it without probing.

    torch 2.13 takes graphs out of its cache that were compiled for vectors of another width, and they leave values
    unwritten: where a home is shared by unlike machines, say, or with ATEN_CPU_CAPABILITY. TORCHINDUCTOR_CACHE_DIR, if
    set, stays as it is.
    """
    named = (
        "TORCHINDUCTOR_CACHE_DIR" in os.environ
    )  # asked first: torch names its default when parts of it are imported
    import torch._inductor.config as inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if not named:
        instructions = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "_")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{default_cache_dir()}_{instructions}"
    # The processor's own flags say which vector instructions it has. Inductor would also build, load and run a program
    # for each kind, at every start.
    if inductor.cpp.vec_isa_ok is None:
        inductor.cpp.vec_isa_ok = True
