"""vlm-attn: published vision-attention methods as plug-ins for Hugging Face vision-language models.

The public names are loaded on first use, so that `import vlm_attn` does not load torch. `wrap` and `families` are
also the names of submodules: the package class below keeps Python from putting the submodule over the function.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_attn.families import families
    from vlm_attn.registry import method, methods
    from vlm_attn.session import attach
    from vlm_attn.wrap import VLM, wrap

__version__ = "0.1.0"
__all__ = ["VLM", "__version__", "attach", "families", "method", "methods", "wrap"]

_HOME = {
    "VLM": "vlm_attn.wrap",
    "wrap": "vlm_attn.wrap",
    "attach": "vlm_attn.session",
    "method": "vlm_attn.registry",
    "methods": "vlm_attn.registry",
    "families": "vlm_attn.families",
}


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'vlm_attn' has no attribute {name!r}; it offers {', '.join(__all__)}")
        return getattr(import_module(_HOME[name]), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
