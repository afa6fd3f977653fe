"""Flash-attention: under which names a model has it, and where it comes from."""

from __future__ import annotations

FLASH = ("flash_attention_2", "kernels-community/flash-attn2")
"""The package's, and that of the kernel which transformers takes in its place."""


def is_flash(attention: str | None) -> bool:
    """Say whether a model with this `_attn_implementation` attends by flash-attention, of any version."""
    return attention is not None and (attention in FLASH or attention.startswith("flash_attention"))


def fetch_from_kernels() -> str | None:
    """Fetch the flash-attention that the package `kernels` has for this machine; return what stands in the way, or None.

    Where it is there, transformers takes it for `flash_attention_2`, and the model's attention then has the kernel's name.
    """
    try:
        from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
        from transformers.utils.import_utils import is_kernels_available
    except ImportError:
        return "this transformers takes none from kernels"
    if not is_kernels_available():
        return "nor is kernels"
    try:
        lazy_import_flash_attention(FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"])
    except Exception as error:  # no network, no build for this GPU, another interface
        said = str(error).strip().partition("\n")[0][:120]
        return f"kernels has none for this machine ({type(error).__name__}: {said})"
    return None
