"""vLLM's plugin for checkpoints of moe_ext: ``vllm.general_plugins`` calls :func:`register` in each of its processes.

Nothing is imported here: an entry point that fails to import is only logged by vLLM, and everything after it would run
without skipping. What fails inside :func:`register` stops vLLM.
"""

import os

__version__ = "0.1.0"

SWITCH = "MOE_EXT_VLLM"
"""Environment variable: 0 leaves vLLM as it is."""


def register() -> None:
    """Puts moe_ext's parts into vLLM, once a process.

    Raises:
        RuntimeError: this vLLM does not have what the plugin builds on, or another plugin has replaced it; it is named.
        OSError: ``MOE_EXT_VLLM_LIBRARY`` names a file that cannot be loaded.
    """
    if os.environ.get(SWITCH) == "0":
        return
    from moe_ext_vllm.hooks import check

    check()
    from moe_ext_vllm.install import install

    install()
