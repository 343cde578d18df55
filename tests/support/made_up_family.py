"""A family that transformers does not have, made of Mixtral's code by other names and another formula: what one that is
added tomorrow is to this package.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

NAME = "made_up"

# What Mixtral's code calls so; in no config or module of a family that there is.
_NAMES = {
    "Mixtral": "MadeUp",
    "mixtral": NAME,
    "num_local_experts": "specialists",
    "num_experts_per_tok": "specialists_a_token",
    "self.top_k": "self.chosen",
    "self.gate(": "self.chooser(",
    "self.gate =": "self.chooser =",
    "self.experts": "self.crowd",
    "mlp.experts": "mlp.crowd",
}
_WEIGHTS = "router_scores = router_top_value", "router_scores = router_top_value.square()"


@contextmanager
def registered(folder: Path) -> Iterator[None]:
    """transformers with that family.

    Args:
        folder: where its code is written; empty.
    """
    source, package = Path(transformers.__path__[0]) / "models" / "mixtral", folder / NAME
    package.mkdir()
    for kind in ("__init__", "configuration_mixtral", "modeling_mixtral"):
        text = (source / f"{kind}.py").read_text(encoding="utf-8")
        for old, new in _NAMES.items():
            text = re.sub(re.escape(old), new, text)
        if kind == "modeling_mixtral":
            assert _WEIGHTS[0] in text
            text = text.replace(*_WEIGHTS)
        (package / f"{kind.replace('mixtral', NAME)}.py").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.models, "__path__", [*transformers.models.__path__, str(folder)])
        patch.setitem(configuration_auto.CONFIG_MAPPING_NAMES, NAME, "MadeUpConfig")
        patch.setitem(modeling_auto.MODEL_MAPPING_NAMES, NAME, "MadeUpModel")
        patch.setitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, NAME, "MadeUpForCausalLM")
        modeling = import_module(f"transformers.models.{NAME}.modeling_{NAME}")
        for name in ("MadeUpModel", "MadeUpForCausalLM"):
            patch.setattr(transformers, name, getattr(modeling, name), raising=False)
        yield
    for name in [name for name in sys.modules if name.startswith(f"transformers.models.{NAME}")]:
        del sys.modules[name]
