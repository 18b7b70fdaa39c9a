"""Client of hotset, which keeps the right model weights resident.

    import hotset

    with hotset.connect() as hs, hs.load("sdxl-base", device="cpu") as models:
        state_dict = models["unet"].state_dict()      # torch tensors on the server's memory, without a copy
        array = models["vae"].numpy("decoder.conv_in.weight")

A lease lives until the set is released *and* the last tensor of it is gone; then the server may reuse the memory.
"""

from ._client import Client, connect, default
from ._errors import ConnectionLost, HotsetError, Refused
from ._memory import Component, LoadedSet, Progress, Split

__all__ = [
    "Client",
    "Component",
    "ConnectionLost",
    "HotsetError",
    "LoadedSet",
    "Progress",
    "Refused",
    "Split",
    "connect",
    "default",
]
__version__ = "0.1.0"
