"""Models of transformers as modules: what wraps them, who watches them, copies with other parts.

Nothing here changes a model: copies share its weights, and other threads may use it meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import nn


def plain(model: Any) -> Any:
    """The model of transformers inside of what compiles, adapts or casts it.

    That is torch.compile, PEFT's adapters (which stay in the layers) and accelerate's autocast
    around the forward pass, which would call the original.

    Raises:
        ValueError: a PEFT method whose tokens go before the prompt, or which is not in the layers
            alone; or a wrapper for data parallelism, whose gradients would not be shared.
    """
    if "_orig_mod" in getattr(model, "_modules", {}):  # torch.compile's
        return plain(model._orig_mod)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("the model must not be wrapped for data parallelism: give model.module")
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        method = model.active_peft_config
        kind = str(getattr(method.peft_type, "value", method.peft_type))
        if kind == "XLORA" or getattr(method, "alora_invocation_tokens", None):
            raise ValueError(
                f"PEFT's {'aLoRA' if kind != 'XLORA' else 'X-LoRA'} adapts by what its own forward "
                "pass is given; expected adapters that stay in the layers, such as LoRA"
            )
        if method.is_prompt_learning:
            raise ValueError(
                f"PEFT's {kind} puts tokens before the prompt, which a search does not see; "
                "expected adapters of layers, such as LoRA"
            )
        return plain(model.get_base_model())
    if "_original_forward" not in vars(model):
        return model
    other = copy.copy(model)
    vars(other).pop("forward", None)
    return other


def watched(module: nn.Module) -> bool:
    """Whether somebody waits for the module's own call, or has changed it."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None


def with_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The model with other modules at some names: a copy of the way there, sharing all weights."""
    root = shallow(model)
    for name, module in modules.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            at._modules[part] = shallow(cast(nn.Module, at._modules[part]))
            at = cast(nn.Module, at._modules[part])
        at._modules[last] = module
    return root


def shallow(module: nn.Module) -> Any:
    """A copy that shares everything but the tables of its children and its hooks: what is hooked
    onto it for a call does not stay on the module."""
    if "forward" in vars(module):  # bound to the module itself, as accelerate's hooks are
        raise ValueError(
            f"{type(module).__name__}.forward has been replaced on the module, as for offloading; "
            "put the model on one device"
        )
    other = copy.copy(module)
    vars(other)["_modules"] = dict(module._modules)
    for name, value in vars(module).items():
        if name.startswith(("_forward", "_backward")) and isinstance(value, dict):
            vars(other)[name] = copy.copy(value)
    return other
