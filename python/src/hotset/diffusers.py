"""Pipelines of the diffusers library on leased memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from . import transformers as _transformers
from ._client import Client, default
from ._errors import HotsetError, Missing
from .torch import load_into


def load_pipeline(name: str, *, loras: Iterable[str] = (), client: Client | None = None, device: str = "cpu", **kwargs: Any) -> Any:
    """A pipeline folder by its name in the catalogue, with the weights of its components on the server's memory.

    `loras` are names of the catalogue too; they are added as adapters of the pipeline. What has no weights (schedulers, tokenizers) is read
    from the folder. Everything else goes to the pipeline's class.
    """
    try:
        import diffusers
        import torch
        import transformers
    except ImportError as error:
        raise Missing(f"hotset.diffusers needs torch, transformers and diffusers: {error}") from error
    client = client or default()
    found = client.show(name)
    if found["format"] != "diffusers":
        raise HotsetError(f"{found['name']} is no diffusers folder but {found['format']}")
    index = diffusers.DiffusionPipeline.load_config(found["path"])
    adapters = [client.show(lora) for lora in loras]
    # All of it at once, or nothing.
    leased = client.load(found["name"], *(adapter["name"] for adapter in adapters), device="ram")
    parts: dict[str, Any] = {}
    for component in leased.components:
        if component.model != found["name"]:
            continue
        library, cls = index[component.name]
        folder = os.path.join(found["path"], component.name)
        kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), cls, None)
        if kind is None:
            raise HotsetError(f"{component.id} is a {library}.{cls}, which is not known here")
        if library == "transformers":
            config = transformers.AutoConfig.from_pretrained(folder)
            part = kind.from_pretrained(None, config=config, state_dict=component.state_dict(), torch_dtype="auto")
            own = dict(part.named_parameters())
            for key, tensor in component.state_dict().items():
                if key in own and own[key].shape == tensor.shape and own[key].dtype == tensor.dtype:
                    _transformers._assign(part, key, tensor, torch)
        else:
            with torch.device("meta"):
                part = kind.from_config(kind.load_config(folder))
            load_into(part, component, strict=False)
            left = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
            if left:
                raise HotsetError(f"{component.id} lacks {len(left)} tensors of {cls}, such as {left[0]}")
        part.requires_grad_(False)
        parts[component.name] = part.eval()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(found["path"], **parts, **kwargs)
    for adapter in adapters:
        tensors = {k: t for c in leased.components if c.model == adapter["name"] for k, t in c.state_dict().items()}
        pipeline.load_lora_weights(tensors, adapter_name=adapter["name"].rsplit("/", 1)[-1].replace(".", "_"))
    leased.release()
    return pipeline if device == "cpu" else pipeline.to(device)
