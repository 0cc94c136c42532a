"""Which parameters a step used.

FSDP2 gives every parameter a gradient, zeros where nothing used it. An optimizer would then decay its moments and
weights, which it would not do in one process; so what no rank used is told apart here and keeps no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

_KNOWN = "_shoal_tracked"


class Usage:
    """Watches the gathered parameters of one model."""

    def __init__(self, model: nn.Module, names: Mapping[str, str]) -> None:
        """`names`: of its parameters, by their names in `model`."""
        self._tracked: set[str] = set()
        self._used: set[str] = set()
        known = {id(p): names[name] for name, p in model.named_parameters()}
        for module in model.modules():
            if isinstance(module, FSDPModule):
                owned = [(owner, key, known[id(p)]) for owner, key, p in _gathered_with(module)]
                module.register_forward_pre_hook(self._watch(owned))

    def clear(self) -> None:
        """A new step."""
        self._used.clear()

    def used(self, name: str) -> bool:
        """Whether this rank's samples used a parameter; one that was never seen at work counts as used."""
        return name in self._used or name not in self._tracked

    def _watch(self, owned: list[tuple[nn.Module, str, str]]) -> Callable[[nn.Module, object], None]:
        def before_forward(_: nn.Module, __: object) -> None:
            for owner, key, name in owned:
                parameter = getattr(owner, key)
                if not parameter.requires_grad or hasattr(parameter, _KNOWN):
                    continue
                setattr(parameter, _KNOWN, True)
                self._tracked.add(name)
                parameter.register_post_accumulate_grad_hook(self._note(name))

        return before_forward

    def _note(self, name: str) -> Callable[[Tensor], None]:
        def on_gradient(_: Tensor) -> None:
            self._used.add(name)

        return on_gradient


def _gathered_with(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, attribute, parameter) of what FSDP2 gathers for `module` itself: not what it gathers for those inside."""
    for key, parameter in module.named_parameters(recurse=False):
        yield module, key, parameter
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _gathered_with(child)
