"""Models of the transformers library on leased memory."""

from __future__ import annotations

from typing import Any

from ._client import Client, default
from ._errors import HotsetError, Missing


def from_pretrained(name: str, cls: Any = None, *, client: Client | None = None, device: str = "cpu", **kwargs: Any) -> Any:
    """A model by its name in the catalogue, in evaluation mode, with its parameters on the server's memory.

    `cls` is the model's class; where none is given, that of its configuration. Everything else goes to the class.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Missing(f"hotset.transformers needs torch and transformers: {error}") from error
    client = client or default()
    found = client.show(name)
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(found["path"])
    if cls is None:
        architectures = getattr(config, "architectures", None) or [None]
        cls = getattr(transformers, architectures[0] or "", None) or transformers.AutoModel
    leased = client.load(found["name"], device="ram", dependencies=False)
    if len(leased.components) != 1:
        raise HotsetError(f"{found['name']} has {len(leased.components)} components; transformers models have one")
    tensors = leased.components[0].state_dict()
    # The library works out names, buffers that are in no file, and tied weights; what it copies is then replaced.
    model = cls.from_pretrained(None, config=config, state_dict=dict(tensors), torch_dtype="auto", **kwargs)
    model.requires_grad_(False)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    prefix = f"{model.base_model_prefix}."
    for key, tensor in tensors.items():
        for place in (key, prefix + key, key.removeprefix(prefix)):
            held = own.get(place)
            if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
                _assign(model, place, tensor, torch)
                break
    model.tie_weights()
    leased.release()
    model.eval()
    return model if device == "cpu" else model.to(device)


def _assign(model: Any, place: str, tensor: Any, torch: Any) -> None:
    owner, _, leaf = place.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor
