"""``transformers serve`` on moe_ext's operators: the server loads models by moe_ext.from_pretrained and patches them,
so that it skips as their config says and serves layers that differ.

    python engines/transformers/serve.py MODEL [options of transformers serve]

Needs ``pip install moe_ext 'transformers[serving]'``.
"""

from typing import Any

import typer
from transformers import PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

import moe_ext


class PatchingManager(model_manager.ModelManager):
    """The server's models, patched."""

    def _load_model(
        self,
        model_id_and_revision: str,
        tqdm_class: type | None = None,
        progress_callback: Any = None,
        gguf_file: str | None = None,
    ) -> PreTrainedModel:
        if gguf_file is not None:
            raise ValueError(f"{gguf_file}: moe_ext loads no GGUF files; serve the folder that they were made of")
        name, revision = model_manager.split_revision(model_id_and_revision)
        model: PreTrainedModel = moe_ext.from_pretrained(
            name,
            revision=revision,
            attn_implementation=self.attn_implementation,
            dtype=self.dtype,
            device_map=self.device,
            trust_remote_code=self.trust_remote_code,
            quantization_config=self.get_quantization_config(),
            tqdm_class=tqdm_class,
        )
        return moe_ext.patch(model)


def install() -> None:
    """Has servers that are started from now on load and patch models so.

    Raises:
        ImportError: transformers loads its servers' models elsewhere by now.
    """
    if not hasattr(model_manager.ModelManager, "_load_model"):
        raise ImportError("this version of transformers loads a server's models in another place; moe_ext knows 5.24")
    model_manager.ModelManager = PatchingManager


if __name__ == "__main__":
    install()
    command = typer.Typer(add_completion=False)
    command.command()(Serve)
    command()
